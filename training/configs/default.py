"""The daily run: VQL, softmax target attention and mean pooling on the same rows, sized for two CPU cores.

Command: `python -m training.main --dataset D --warehouse W --dt YYYY-MM-DD --attempt A --runs RUNS --config default`
"""

from training.config import ModelConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        models={
            "vql": ModelConfig(interest="vql"),
            "softmax_attention": ModelConfig(interest="softmax_attention"),
            "mean_pooling": ModelConfig(interest="mean_pooling"),
        }
    )

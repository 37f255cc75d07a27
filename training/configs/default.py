"""The daily run: VQL, softmax target attention and mean pooling on the same rows, sized for two CPU cores.

Command: `python -m training.train --dataset D --warehouse W --dt YYYY-MM-DD --attempt A --runs RUNS --config default`
Time: some 3 minutes of one core for each attention model on a simulated partition of 490,000 events, shared by the
workers.
Expected there (`make run`, 1,000 users), AUC of the evaluation day: see tests/pipeline; VQL minus softmax attention
+.0036 +- .0012 over 5 simulated partitions with the recipe of 2026-11-24 (docs/claims.md, 8 epochs).
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

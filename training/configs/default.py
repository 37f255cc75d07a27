"""The daily run: VQL, softmax target attention and mean pooling on the same rows, sized for two CPU cores.

Command: `python -m training.train --dataset D --warehouse W --dt YYYY-MM-DD --attempt A --runs RUNS --config default`
Time: about 2 minutes for a simulated partition of 490,000 events on two quiet CPU cores.
Expected there (`make run`, 1,000 users), AUC of the evaluation day: VQL .775 +- .010, softmax attention .774 +- .010,
mean pooling .54 +- .02 over 3 simulated seeds (tests/pipeline); VQL minus softmax attention +.0036 +- .0012 over 5
(docs/claims.md, 8 epochs).
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

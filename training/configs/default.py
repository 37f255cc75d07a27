"""The daily run: VQL, softmax target attention and mean pooling on the same rows, sized for two CPU cores.

Command: `python -m training.train --dataset D --warehouse W --dt YYYY-MM-DD --attempt A --runs RUNS --config default`
Time: 75 s of one core for each attention model on a simulated partition of 490,000 events, 17 s for mean pooling; the
workers share it.
Expected there (1,000 users, 452,230 training targets), AUC of the evaluation day, mean and standard deviation over the
seeds 7 to 11: VQL .7877, .0012 (.7860 to .7894); softmax attention .7884, .0023 (.7844 to .7905). A VQL outside of
.7877 +- .005 is no noise.
"""

from training.config import ModelConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        models={
            "vql": ModelConfig(interest="vql"),
            "softmax_attention": ModelConfig(interest="softmax_attention"),
            "mean_pooling": ModelConfig(interest="mean_pooling"),
        },
        auc_seed_sd=0.0012,
    )

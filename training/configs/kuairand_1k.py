"""KuaiRand-1K on one GPU: 1,000 users with some 11,700 impressions each; VQL and its two baselines.

Command: `make run DATASET=kuairand_1k DT=2022-04-21 CONFIG=kuairand_1k WORKERS=1`, on a Ray cluster or host with a GPU.
Never run on these logs, for want of logs and a GPU in one place. Run on simulated rows of their shape on 2022-04-21,
that is 14 days of 1,000 users, 4,923,048 impressions of 50,000 items, the last 4,000 a target (`python -m
etl.datasets.simulate --users 1000 --length-scale 0.4 --items 50000`, then the stages of docs/stages.md and
`python -m evaluation.trials --config kuairand_1k --models vql,softmax_attention,mean_pooling --seeds 7,8,9,10,11`):
Time there: fifteen trainings at once on one H100, 1,154 steps each, in 92 s; of one training alone it is not known.
Expected there (4,219,086 training targets, 350,432 on the evaluation day), AUC of the evaluation day, mean and standard
deviation over the seeds 7 to 11: VQL .8188, .0002 (.8185 to .8189); softmax attention .8184, .0002 (.8181 to .8186);
mean pooling .5716, .0026 (.5685 to .5757); the best possible is .8283. A VQL outside of .8188 +- .001 is no noise.
`auc_seed_sd` stays None: what seeds do on simulated rows, .01 below the best possible, says nothing of real ones. The
promotion gate's margin is its least then, .005, as it would be with .0002.
"""

import dataclasses

from training.config import TrainConfig
from training.configs import default


def config() -> TrainConfig:
    return dataclasses.replace(
        default.config(),
        users_per_step=8,
        targets_per_visit=1024,
        epochs=2,
        warmup_steps=600,
        learning_rate_warmup_steps=200,
        bf16=True,
        auc_seed_sd=None,
    )

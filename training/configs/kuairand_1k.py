"""KuaiRand-1K on one GPU: 1,000 users with some 11,700 impressions each; VQL and its two baselines.

Command: `make run DATASET=kuairand_1k DT=2022-04-21 CONFIG=kuairand_1k WORKERS=1`, on a Ray cluster or host with a GPU.
Measured: a step of 32 users with 16,384 random events and 1,024 targets each takes 10 ms in bf16 on an H100, forward,
backward and optimizer (benchmarks/LOG.md, 2026-11-26); a step here has a quarter of these users.
Expected metrics: none. Quality, time and memory on these logs were never measured, for want of the logs and a GPU in
one place. So neither a mean nor a noise over seeds is known, and the promotion gate takes its least margin.
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

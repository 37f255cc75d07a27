"""Seconds on a laptop, whatever the partition: for tests and for a first look in a debugger (`--workers 0`).

An epoch has 100 steps at most, and the figures mean nothing.
"""

import dataclasses

from training.config import TrainConfig
from training.configs import default


def config() -> TrainConfig:
    models = {
        name: dataclasses.replace(model, codes=8, mlp=(16,), heads=2, groups=2, head_width=8)
        for name, model in default.config().models.items()
    }
    return TrainConfig(
        models=models,
        epochs=2,
        min_epoch_steps=2,
        max_epoch_steps=100,
        warmup_steps=2,
        users_per_step=4,
        targets_per_visit=8,
        checkpoint_every_steps=3,
    )

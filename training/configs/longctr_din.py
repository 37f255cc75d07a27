"""DIN against the length of the history, with the settings that LongCTR publishes for it on KuaiRand-1K; one GPU.

Command: `make compare DATASET=kuairand_1k DT=2022-05-08 CONFIG=longctr_din MODELS=din,din_softmax,vql
LENGTHS=10,20,50,100,500,1000,2000,5000,10000 SEEDS=1,2,3,4,5`, on a partition built with `MAX_HISTORY=10000`
(docs/comparison.md has the command).
Taken over: the widths of ids (32) and of a value (224, seven item fields there), head, rate without a fall, dropout,
next to no decay, 8,192 targets a step, the stop after one epoch without a gain. Not: 512 and 256 hidden units of the
attention, of which our DIN has 36, and its dropout; more fields of items and users; the split of the rows, which is not
published.
Expected there (LongCTR, one seed): AUC .7022 at 10 events, .7303 at 500, .7169 at 10,000; GAUC .6675 at 10,000. Never
run here on these logs.
"""

import dataclasses

from training.config import ModelConfig, TrainConfig
from training.configs import default


def config() -> TrainConfig:
    din = ModelConfig(interest="din", id_width=32, field_width=32, heads=4, head_width=56, mlp=(1024, 512, 256))
    return dataclasses.replace(
        default.config(),
        models={"din": din},
        users_per_step=8,
        targets_per_visit=1024,
        epochs=10,
        patience=1,
        learning_rate=1e-3,
        learning_rate_end=1.0,
        weight_decay=1e-8,
        auc_seed_sd=None,
    )

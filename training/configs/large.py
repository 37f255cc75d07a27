"""Histories of 16,000 events on several GPUs: VQL and exact attention.

Command: `make run DATASET=D CONFIG=large WORKERS=N` with N GPUs and `history: {max_events: 16384}` in D's definition.
Measured: a step of 32 users with 16,384 random events and 64 targets each takes 2 to 3 ms in bf16 on one H100, with
1,024 targets 3 to 10 ms; two GPUs do 1.7 to 1.9 times what one does (benchmarks/LOG.md, 2026-11-27).
Expected metrics: none. No whole training was ever run, for want of such logs and of GPUs for so long: neither its
quality, nor a noise over seeds, nor how it speeds up with several GPUs is known, and the promotion gate takes its least
margin.
"""

from training.config import ModelConfig, TrainConfig, VocabularyConfig


def config() -> TrainConfig:
    return TrainConfig(
        models={
            name: ModelConfig(interest=name, id_width=32, codes=256, mlp=(256, 128))
            for name in ("vql", "softmax_attention")
        },
        vocabulary=VocabularyConfig(hashed_rows=4096),
        users_per_step=64,
        targets_per_visit=256,
        epochs=1,
        warmup_steps=2000,
        learning_rate_warmup_steps=500,
        bf16=True,
        checkpoint_every_seconds=300.0,
    )

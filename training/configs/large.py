"""Histories of 16,000 events on several GPUs: VQL and exact attention.

Command: `make run DATASET=D CONFIG=large WORKERS=N` with N GPUs and `history: {max_events: 16384}` in D's definition.
Measured: a step of 32 users with 16,384 random events and 64 targets each takes 2.0 to 2.4 ms in bf16 on one H100, with
1,024 targets 3.1 to 9.4 ms; two GPUs do 1.9 times what one does (benchmarks/LOG.md, 2026-11-27).
Run on simulated rows of this shape, 300 users with 5,894,053 impressions of 50,000 items in 14 days (`python -m
etl.datasets.simulate --users 300 --length-scale 1.6 --items 50000`, sequences with `--max-history 16384`, then
`python -m evaluation.trials --config large --models vql,softmax_attention --seeds 7,8,9,10,11`), one GPU a training:
Time there: 311 steps in 12 to 15 s with three trainings at once on one H100, in 36 to 39 s with ten, which found no
room for all in 79 GiB: one takes 6 to 11.
Expected there (5,052,697 training targets, 421,541 on the evaluation day), AUC of the evaluation day, mean and standard
deviation over the seeds 7 to 11: VQL .8203, .0003 (.8198 to .8204); softmax attention .8208, .0002 (.8206 to .8211):
VQL loses .0006, with each seed. The best possible is .8279. A VQL outside of .8203 +- .001 is no noise.
Not known: quality on real logs, and what seeds do there, so the promotion gate takes its least margin; the time of a
whole training on several GPUs; an epoch as long as `warmup_steps` means it, of which half of the steps were taken here.
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

"""What is trained for the claims report: one entry a model, all with the same embeddings, head and training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.claims.alternates import TRIALS
from training.config import ModelConfig, TrainConfig
from training.loop import TrainingData
from training.model.interests import INTERESTS
from training.vocabulary import ItemFeatures

MAX_EVENTS = b"max_events"  # key of a sequences.parquet's metadata: a target sees at most so many
INTERESTS.update(TRIALS)  # the configurations below, and the processes that train them, name them like any other kind
SIMULATED = {"simulated": 0.0, "drifting": 4.0}  # mean days that a taste lasts; 0 = for ever


@dataclass(frozen=True)
class Variant:
    """One model.

    Attributes:
        everywhere: trained on the real sets too, not on the simulated alone.
        short: not on the git log, whose history of 85,478 events takes minutes a training on a CPU.
        drifting: trained on the simulated sets whose tastes change.
        alter: what is done to the training data.
        warmup_steps: steps before the codebooks start.
    """

    model: ModelConfig
    everywhere: bool = False
    drifting: bool = False
    short: bool = False
    alter: Callable[[TrainingData], TrainingData] | None = None
    warmup_steps: int = TrainConfig.warmup_steps

    def runs_on(self, data_set: str) -> bool:
        if data_set == "buildroot":
            return self.everywhere and not self.short
        return {"simulated": True, "drifting": self.drifting}.get(data_set, self.everywhere)


def without_context(share: float, how: str) -> Callable[[TrainingData], TrainingData]:
    """Return what makes the static fields of a share of the items `missing`, or gives them those of other items
    (`shuffled`).

    Only the item's own id stays as it is. The same items in training and in scoring.
    """

    def alter(data: TrainingData) -> TrainingData:
        rows = dict(data.joined.items.rows)
        items = len(rows["item_id"])
        rng = np.random.default_rng(0)
        hit = np.flatnonzero(rng.random(items) < share)
        other = rng.permutation(hit)
        for name, values in rows.items():
            if name != "item_id":
                rows[name] = values.copy()
                rows[name][hit] = 0 if how == "missing" else values[other]
        return replace(data, joined=replace(data.joined, items=ItemFeatures(rows)))

    return alter


EXACT = ModelConfig(interest="softmax_attention")
THREE_HALF_LIVES = (0.25, 4.0, 180.0)

VARIANTS: dict[str, Variant] = {
    "exact": Variant(EXACT, everywhere=True, drifting=True),
    "vql": Variant(ModelConfig(), everywhere=True, drifting=True),
    "recent_200": Variant(ModelConfig(interest="recent_attention", recent_window=200), everywhere=True, drifting=True),
    "sdim": Variant(ModelConfig(interest="sdim"), everywhere=True, drifting=True),
    "mean_pooling": Variant(ModelConfig(interest="mean_pooling"), everywhere=True, drifting=True),
    # codebook size, groups, refinement, recent window
    **{
        f"vql_{c}_codes": Variant(ModelConfig(codes=c), everywhere=c in (16, 256), drifting=c == 256)
        for c in (4, 8, 16, 32, 128, 256, 512)
    },
    **{
        f"vql_{g}_groups_{c}_codes": Variant(ModelConfig(groups=g, codes=c), everywhere=(g, c) == (1, 64))
        for g in (1, 2)
        for c in (64, 256)
    },
    "vql_uneven_codes": Variant(ModelConfig(codes=(16, 32, 80, 128))),
    **{f"vql_refined_{k}": Variant(ModelConfig(refine_k=k), everywhere=k == 64, drifting=k == 64) for k in (4, 16, 64)},
    "vql_16_codes_refined_64": Variant(ModelConfig(codes=16, refine_k=64)),
    "vql_recent_50": Variant(ModelConfig(recent_window=50), everywhere=True, short=True, drifting=True),
    # temporal kernels
    "exact_no_kernel": Variant(replace(EXACT, kernel_components=0), everywhere=True, short=True, drifting=True),
    "vql_no_kernel": Variant(ModelConfig(kernel_components=0), everywhere=True, drifting=True),
    "vql_1_exponential": Variant(ModelConfig(kernel_components=1), everywhere=True, short=True, drifting=True),
    "vql_3_exponentials": Variant(ModelConfig(kernel_components=3, half_life_days=THREE_HALF_LIVES), drifting=True),
    "vql_kernel_outside": Variant(ModelConfig(interest="vql_kernel_outside"), drifting=True),
    "vql_periodic_kernel": Variant(ModelConfig(interest="vql_periodic_kernel"), drifting=True),
    "vql_rank_kernel": Variant(ModelConfig(interest="vql_rank_kernel"), drifting=True),
    # codebook training
    "vql_ema": Variant(ModelConfig(ema_decay=0.99)),
    "vql_simvq": Variant(ModelConfig(interest="vql_simvq")),
    "vql_shared_codebook": Variant(ModelConfig(interest="vql_shared_codebook")),
    "vql_aggregated_gradient": Variant(ModelConfig(interest="vql_aggregated_gradient")),
    "vql_both_gradients": Variant(ModelConfig(interest="vql_both_gradients")),
    "vql_loss_weight_0.01": Variant(ModelConfig(codebook_weight=0.01), drifting=True),
    "vql_warmup_100": Variant(ModelConfig(), warmup_steps=100, drifting=True),
    "vql_warmup_20": Variant(ModelConfig(), warmup_steps=20, drifting=True),
    "vql_loss_weight_1": Variant(ModelConfig(codebook_weight=1.0)),
    "vql_commitment_1": Variant(ModelConfig(commitment=1.0)),
    "vql_l2_keys": Variant(ModelConfig(interest="vql_l2_keys")),
    # failures
    "vql_careless_start": Variant(ModelConfig(interest="vql_careless_start")),
    "vql_sharp_queries": Variant(ModelConfig(interest="vql_sharp_queries")),
    "vql_unbounded_keys": Variant(ModelConfig(interest="vql_unbounded_keys")),
    # static context
    **{
        f"{name}_{how}_{share}": Variant(model, alter=without_context(share / 100, how))
        for name, model in (("vql", ModelConfig()), ("exact", EXACT))
        for how in ("missing", "shuffled")
        for share in (25, 50, 100)
    },
}

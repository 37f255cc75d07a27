"""Sampled hashing attention (SDIM, arXiv 2205.10249): the events whose hash equals the target's are pooled.

    o_t = 1 / X sum_x  sum_{i: h_x(k_i) = h_x(k_t)} v_i / || the same sum ||,   h_x: signs of B random projections

The target is hashed by its key, so that what is similar to it shares its buckets.

Legend: N distinct items, E events (flat), T targets (flat), L events of one user, H heads, d head width, D = H * d,
X hash tables, B bits of a table (in a layout N, P and B are those of blocks.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import ModelConfig
from training.model.attention import hidden
from training.model.blocks import Layout
from training.model.history import Events, Items, Targets, each_user
from training.model.interests.interface import Attention
from training.model.passes import by_layout

TABLES, BITS = 16, 3  # the paper's 48 hash functions in groups of 3


class Sdim(Attention):
    """Random hyperplanes, fixed; the gradient reaches the values alone.

    Of `Attention` it uses the keys. Queries and kernel have no part in the result; they are built all the same, because
    without their draws every later weight of a seed, and every figure of earlier trainings, would be another.
    """

    planes_DXB: Tensor
    powers_B: Tensor

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.register_buffer("planes_DXB", torch.randn(config.width, TABLES, BITS))
        self.register_buffer("powers_B", 2 ** torch.arange(BITS))

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        bucket_NX = self.buckets(self.keys(items.static_NS))
        nothing = items.static_NS.new_zeros(())
        if self.at_once(events):
            return _pooled_at_once(bucket_NX, events, targets), nothing
        return torch.cat([_pooled(bucket_NX, mine, seen) for mine, seen, _ in each_user(events, targets)]), nothing

    def buckets(self, vector_NHd: Tensor) -> Tensor:
        """Return the bucket of each vector in every table, int64 [N, X]."""
        bits_NXB = torch.einsum("nd,dxb->nxb", vector_NHd.detach().flatten(1).float(), self.planes_DXB) > 0
        return (bits_NXB * self.powers_B).sum(-1)


def _pooled(bucket_NX: Tensor, events: Events, targets: Targets) -> Tensor:
    """Return the mean over tables of the normalised sum of the bucket's values, [T, H, d], for one user."""
    length, heads, width = events.value_EHd.shape
    value_LD = events.value_EHd.flatten(1)
    event_LX, target_TX = bucket_NX[events.item_E], bucket_NX[targets.item_T]
    seen_TL = ~hidden(length, targets.bound_T, targets.end_T)
    total_TD = value_LD.new_zeros(len(target_TX), heads * width)
    for table in range(TABLES):
        same_TL = (target_TX[:, table, None] == event_LX[None, :, table]) & seen_TL
        total_TD = total_TD + F.normalize(same_TL.to(value_LD.dtype) @ value_LD, dim=-1)
    return (total_TD / TABLES).view(-1, heads, width)


def _pooled_at_once(bucket_NX: Tensor, events: Events, targets: Targets) -> Tensor:
    """The same for the targets of all users, [T, H, d]."""
    event_EX, target_TX = bucket_NX[events.item_E], bucket_NX[targets.item_T]

    def pooled(layout: Layout) -> Tensor:
        visible_NPB = layout.visible(targets)
        value_NBD = layout.events(events.value_EHd).permute(1, 2, 0, 3).flatten(2)
        total_TD = value_NBD.new_zeros(len(layout.slot_T), value_NBD.shape[-1])
        for table in range(TABLES):
            target_NP1 = target_TX[:, table][layout.target_NP][..., None]
            same_NPB = (target_NP1 == event_EX[:, table][layout.event_NB][:, None]) & visible_NPB
            sum_TD = layout.summed((same_NPB.to(value_NBD.dtype) @ value_NBD)[None])[:, 0]
            # Normalised after the sum over blocks: a bucket's length is that of all its events.
            total_TD = total_TD + F.normalize(sum_TD, dim=-1)
        return (total_TD / TABLES).view(-1, *events.value_EHd.shape[1:])

    return by_layout(pooled, events, targets)

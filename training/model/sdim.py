"""Baseline: sampled hashing attention (SDIM, arXiv 2205.10249). Events whose hash equals the target's are pooled.

Legend: L events, T targets, N items, H heads, d head width, D = H * d, X hash tables, B bits a table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model.attention import hidden
from training.model.blocks import Layout

TABLES, BITS = 16, 3  # the paper's 48 hash functions in groups of 3


class HashedAttention(nn.Module):
    """Random hyperplanes, fixed; the gradient reaches the values alone."""

    planes_DXB: Tensor
    powers_B: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("planes_DXB", torch.randn(width, TABLES, BITS))
        self.register_buffer("powers_B", 2 ** torch.arange(BITS))

    def signatures(self, vector_NHd: Tensor) -> Tensor:
        """Return the bucket of each vector in every table, int64 [N, X]."""
        bits_NXB = torch.einsum("nd,dxb->nxb", vector_NHd.detach().flatten(1).float(), self.planes_DXB) > 0
        return (bits_NXB * self.powers_B).sum(-1)

    def forward(self, target_TX: Tensor, event_LX: Tensor, value_LHd: Tensor, target_end_T: Tensor, first_T: Tensor | None = None) -> Tensor:
        """Return the mean over tables of the normalised sum of the values in the target's bucket, [T, H, d].

        Seen are the events `first` (default 0) to `target_end`.
        """
        length, heads, width = value_LHd.shape
        value_LD = value_LHd.flatten(1)
        seen_TL = ~hidden(length, first_T, target_end_T)
        total_TD = value_LD.new_zeros(len(target_TX), heads * width)
        for table in range(TABLES):
            same_TL = (target_TX[:, table, None] == event_LX[None, :, table]) & seen_TL
            total_TD = total_TD + F.normalize(same_TL.to(value_LD.dtype) @ value_LD, dim=-1)
        return (total_TD / TABLES).view(-1, heads, width)

    def pooled(self, layout: Layout, target_TX: Tensor, event_EX: Tensor, value_EHd: Tensor, target_end_T: Tensor, first_T: Tensor | None = None) -> Tensor:
        """The same for the layout's targets, of many users at once."""
        seen_NPB, value_NBD = layout.seen(target_end_T), layout.events(value_EHd).permute(1, 2, 0, 3).flatten(2)
        if first_T is not None:
            seen_NPB = seen_NPB & ~layout.seen(first_T)
        total_TD = value_EHd.new_zeros(len(layout.slot_T), value_NBD.shape[-1])
        for table in range(TABLES):
            same_NPB = (target_TX[:, table][layout.target_NP][..., None] == event_EX[:, table][layout.event_NB][:, None]) & seen_NPB
            total_TD = total_TD + F.normalize(layout.summed((same_NPB.to(value_NBD.dtype) @ value_NBD)[None])[:, 0], dim=-1)
        return (total_TD / TABLES).view(-1, *value_EHd.shape[1:])

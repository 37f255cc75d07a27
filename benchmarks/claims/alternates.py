"""Open choices of the method that were tried once and not kept, and ways to break it: rankers for the claims report alone.

Legend as in training/model/blocks.py; G groups, C codes, w group width.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.config import ModelConfig
from training.data import Batch
from training.model.blocks import Layout, age_days_of_pairs, block_attention
from training.model.kernel import MixtureKernel
from training.model.quantizer import GroupedQuantizer
from training.model.ranker import FieldSizes, Ranker


class Alternate(Ranker):
    """A ranker whose histories are always read by the item-level pass over all users."""

    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__(sizes, config)
        self.block_attention = functools.partial(block_attention)


class _Quantizer(GroupedQuantizer):
    """Sizes of the given configuration."""

    @classmethod
    def of(cls, config: ModelConfig):
        return cls(config.groups, config.codes, config.width // config.groups)


# ---- codebooks -------------------------------------------------------------------------------------------------------


class _Shared(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, words_1Cw: Tensor) -> Tensor:
        return words_1Cw.expand(self.heads, -1, -1)


class _SharedQuantizer(GroupedQuantizer):
    """One codebook for all heads, each of which assigns its keys by itself."""

    def __init__(self, heads: int, codes: int, width: int) -> None:
        super().__init__(heads, codes, width)
        self.codebook_GCw = nn.Parameter(self.codebook_GCw.data[:1].clone())
        parametrize.register_parametrization(self, "codebook_GCw", _Shared(heads), unsafe=True)

    @torch.no_grad()
    def start_from_keys(self, keys_NHd: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        pooled = GroupedQuantizer(1, self.codes, self.group_width).to(keys_NHd.device)
        pooled.start_from_keys(keys_NHd.flatten(0, 1)[:, None], generator, iterations)
        self.parametrizations.codebook_GCw.original.copy_(pooled.codebook_GCw)
        self.started.fill_(1)

    @torch.no_grad()
    def revive(self, keys_NHd: Tensor, generator: torch.Generator, threshold: float = 0.02) -> int:
        return 0


class SharedCodebook(Alternate):
    """One codebook for all heads, each of which has codes of its own."""

    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__(sizes, config)
        assert isinstance(config.codes, int) and config.groups == config.heads
        self.quantizer = _SharedQuantizer(config.heads, config.codes, config.head_width)


class _Mapped(nn.Module):
    frozen_GCw: Tensor

    def __init__(self, words_GCw: Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen_GCw", words_GCw)

    def forward(self, map_Gww: Tensor) -> Tensor:
        return self.frozen_GCw @ map_Gww


class _SimVQ(_Quantizer):
    """Frozen Gaussian codewords times a learned map (SimVQ); no start from keys, no revival."""

    def __init__(self, groups: int, codes: int, group_width: int) -> None:
        super().__init__(groups, codes, group_width)
        frozen_GCw = self.codebook_GCw.data.clone()
        self.codebook_GCw = nn.Parameter(torch.eye(group_width).repeat(groups, 1, 1))
        parametrize.register_parametrization(self, "codebook_GCw", _Mapped(frozen_GCw), unsafe=True)

    @torch.no_grad()
    def start_from_keys(self, keys_NHd: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        self.started.fill_(1)

    @torch.no_grad()
    def revive(self, keys_NHd: Tensor, generator: torch.Generator, threshold: float = 0.02) -> int:
        return 0


class SimVQ(Alternate):
    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__(sizes, config)
        self.quantizer = _SimVQ.of(config)


class _Random(_Quantizer):
    """Codewords as they were drawn: neither started from keys nor revived."""

    @torch.no_grad()
    def start_from_keys(self, keys_NHd: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        self.codebook_GCw.mul_(8.0)  # far from the keys, as a careless start is
        self.started.fill_(1)

    @torch.no_grad()
    def revive(self, keys_NHd: Tensor, generator: torch.Generator, threshold: float = 0.02) -> int:
        return 0


class CarelessStart(Alternate):
    """No start from keys, no revival: codes collapse."""

    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__(sizes, config)
        self.quantizer = _Random.of(config)


# ---- gradients -------------------------------------------------------------------------------------------------------


class _Aggregated(_Quantizer):
    """The task's gradient goes to the codewords and not to the keys, as it does where the cached form is differentiated."""

    through = 0.0

    def forward(self, keys_NHd: Tensor, weight_N: Tensor, commitment: float) -> tuple[Tensor, Tensor, Tensor]:
        _, loss, codes_NG = super().forward(keys_NHd, weight_N, commitment)
        keys_GNw = self._grouped(keys_NHd)
        return self._ungrouped(self.lookup(codes_NG) + self.through * (keys_GNw - keys_GNw.detach()), keys_NHd), loss, codes_NG


class _Both(_Aggregated):
    through = 1.0


class AggregatedGradient(Alternate):
    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__(sizes, config)
        self.quantizer = _Aggregated.of(config)


class BothGradients(Alternate):
    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__(sizes, config)
        self.quantizer = _Both.of(config)


# ---- kernels ---------------------------------------------------------------------------------------------------------


class KernelOutside(Alternate):
    """o = sum_i alpha_i K(t_q - t_i) v_i: the kernel weights values, not logits; an old history fades."""

    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__(sizes, config)
        self.block_attention = _attention_times_kernel


def _attention_times_kernel(
    layout: Layout, query_THd: Tensor, key_EHd: Tensor, value_EHd: Tensor, event_ms_E: Tensor, target_ms_T: Tensor, end_T: Tensor, kernel: MixtureKernel, **_
) -> Tensor:
    logit_HNPB = layout.targets(query_THd) @ layout.events(key_EHd).transpose(2, 3)
    # Logits are bounded by 4 sqrt(d), so their exponentials need no maximum.
    weight_HNPB = logit_HNPB.exp() * layout.seen(end_T)
    kernel_HNPB = kernel.log_kernel_of_age(age_days_of_pairs(layout, event_ms_E, target_ms_T, query_THd.dtype)[None]).exp()
    total_TH1 = layout.summed(weight_HNPB.sum(-1, keepdim=True))
    return layout.summed((weight_HNPB * kernel_HNPB) @ layout.events(value_EHd)) / total_TH1.clamp(min=1e-12)


class _Periodic(MixtureKernel):
    """The mixture times 1 + rho cos(2 pi age / 1 day + phi)."""

    def __init__(self, heads: int, half_life_days: tuple[float, ...]) -> None:
        super().__init__(heads, half_life_days)
        self.depth_H, self.phase_H = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))

    def log_kernel_of_age(self, age_H: Tensor) -> Tensor:
        per_head = (-1, *[1] * (age_H.dim() - 1))
        depth, phase = 0.9 * self.depth_H.tanh().view(per_head), self.phase_H.view(per_head)
        return super().log_kernel_of_age(age_H) + torch.log1p(depth * torch.cos(2 * math.pi * age_H + phase))


class PeriodicKernel(Alternate):
    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__(sizes, config)
        self.kernel = _Periodic(config.heads, config.half_life_days[: config.kernel_components])


class RankKernel(Alternate):
    """Ages in events instead of days: 50 events count as one day."""

    MS_PER_EVENT = 86_400_000 // 50

    def _attend_all(self, batch: Batch, query_THd: Tensor, keys, value_EHd: Tensor) -> Tensor:
        rank_E = torch.arange(len(batch.event_item), device=query_THd.device)
        owner_T = torch.repeat_interleave(torch.tensor(batch.target_start).diff()).to(query_THd.device)
        first_T = torch.tensor(batch.event_start, device=query_THd.device)[owner_T]
        ranked = dataclasses.replace(batch, event_time_ms=rank_E * self.MS_PER_EVENT, target_time_ms=(first_T + batch.target_end) * self.MS_PER_EVENT)
        return super()._attend_all(ranked, query_THd, keys, value_EHd)


# ---- scales ----------------------------------------------------------------------------------------------------------


class SharpQueries(Alternate):
    """Logits four times as large, beyond the cap of the learned scale."""

    def queries(self, static_NS: Tensor) -> Tensor:
        return 4.0 * super().queries(static_NS)


class UnboundedKeys(Alternate):
    """Queries and keys without normalisation: their lengths, and the codebook's error, know no bound."""

    def _normalised(self, flat: Tensor) -> Tensor:
        return 4.0 * self._heads(flat) * self.config.head_width**-0.25


class L2Keys(Alternate):
    """Queries and keys of length d^1/4 without centring."""

    def _normalised(self, flat: Tensor) -> Tensor:
        return F.normalize(self._heads(flat), dim=-1) * self.config.head_width**0.25

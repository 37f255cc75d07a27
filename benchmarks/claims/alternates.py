"""Open choices of the method that were tried once and not kept, and ways to break it: kinds of interest for the claims
report alone, under the names that its configurations give them.

Legend as in training/model/blocks.py; G groups, C codes, w group width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.config import ModelConfig
from training.model.blocks import Layout, age_days_of_pairs
from training.model.history import Events, Targets
from training.model.interests.interface import Interest
from training.model.interests.vql import Vql
from training.model.kernel import MixtureKernel
from training.model.passes import Keys, by_layout, in_blocks
from training.model.quantizer import GroupedQuantizer


class _Trial(Vql):
    """VQL whose histories are always read by the plain pass: what is changed need not hold in the others."""

    def attend(self, query_THd: Tensor, keys: Keys, events: Events, targets: Targets) -> Tensor:
        return in_blocks(query_THd, keys, events, targets, self.softmax(), self.block_attention)


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
        parametrizations: Any = self.parametrizations
        parametrizations.codebook_GCw.original.copy_(pooled.codebook_GCw)
        self.started.fill_(1)

    @torch.no_grad()
    def revive(self, keys_NHd: Tensor, generator: torch.Generator, threshold: float = 0.02) -> None:
        pass


class SharedCodebook(_Trial):
    """One codebook for all heads, each of which has codes of its own."""

    def new_quantizer(self) -> GroupedQuantizer:
        config = self.config
        assert isinstance(config.codes, int) and config.groups == config.heads
        return _SharedQuantizer(config.heads, config.codes, config.head_width)


class _Mapped(nn.Module):
    frozen_GCw: Tensor

    def __init__(self, words_GCw: Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen_GCw", words_GCw)

    def forward(self, map_Gww: Tensor) -> Tensor:
        return self.frozen_GCw @ map_Gww


class _SimVQ(GroupedQuantizer):
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
    def revive(self, keys_NHd: Tensor, generator: torch.Generator, threshold: float = 0.02) -> None:
        pass


class _Random(GroupedQuantizer):
    """Codewords as they were drawn: neither started from keys nor revived."""

    @torch.no_grad()
    def start_from_keys(self, keys_NHd: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        self.codebook_GCw.mul_(8.0)  # far from the keys, as a careless start is
        self.started.fill_(1)

    @torch.no_grad()
    def revive(self, keys_NHd: Tensor, generator: torch.Generator, threshold: float = 0.02) -> None:
        pass


# ---- gradients -------------------------------------------------------------------------------------------------------


class _Aggregated(GroupedQuantizer):
    """The task's gradient goes to the codewords, not to the keys, as where the cached form is differentiated."""

    through = 0.0

    def forward(self, keys_NHd: Tensor, weight_N: Tensor, commitment: float) -> tuple[Tensor, Tensor, Tensor]:
        _, loss, codes_NG = super().forward(keys_NHd, weight_N, commitment)
        words_NHd = self.quantized(codes_NG, keys_NHd) + self.through * (keys_NHd - keys_NHd.detach())
        return words_NHd, loss, codes_NG


class _Both(_Aggregated):
    through = 1.0


def _with_quantizer(quantizer: type[GroupedQuantizer], about: str) -> type[Vql]:
    """Return VQL with other codebooks of the configured sizes."""

    class WithQuantizer(_Trial):
        __doc__ = about

        def new_quantizer(self) -> GroupedQuantizer:
            config = self.config
            return quantizer(config.groups, config.codes, config.width // config.groups)

    return WithQuantizer


# ---- kernels ---------------------------------------------------------------------------------------------------------


class KernelOutside(_Trial):
    """o = sum_i alpha_i K(t_q - t_i) v_i: the kernel weights values, not logits; an old history fades."""

    def attend(self, query_THd: Tensor, keys: Keys, events: Events, targets: Targets) -> Tensor:
        assert self.kernel is not None
        key_EHd, kernel = keys.hard_NHd.index_select(0, events.item_E), self.kernel

        def attended(layout: Layout) -> Tensor:
            logit_HNPB = layout.targets(query_THd) @ layout.events(key_EHd).transpose(2, 3)
            # Logits are bounded by 4 sqrt(d), so their exponentials need no maximum.
            weight_HNPB = logit_HNPB.exp() * layout.visible(targets)
            age_NPB = age_days_of_pairs(layout, events.time_ms_E, targets.time_ms_T, query_THd.dtype)
            kernel_HNPB = kernel.log_kernel_of_age(age_NPB[None]).exp()
            total_TH1 = layout.summed(weight_HNPB.sum(-1, keepdim=True))
            mixed_THd = layout.summed((weight_HNPB * kernel_HNPB) @ layout.events(events.value_EHd))
            return mixed_THd / total_TH1.clamp(min=1e-12)

        return by_layout(attended, events, targets)


class _Periodic(MixtureKernel):
    """The mixture times 1 + rho cos(2 pi age / 1 day + phi)."""

    def __init__(self, heads: int, half_life_days: tuple[float, ...]) -> None:
        super().__init__(heads, half_life_days)
        self.depth_H, self.phase_H = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))

    def log_kernel_of_age(self, age_H: Tensor) -> Tensor:
        per_head = (-1, *[1] * (age_H.dim() - 1))
        depth, phase = 0.9 * self.depth_H.tanh().view(per_head), self.phase_H.view(per_head)
        return super().log_kernel_of_age(age_H) + torch.log1p(depth * torch.cos(2 * math.pi * age_H + phase))


class PeriodicKernel(_Trial):
    """A taste that comes back at the same time of day."""

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.kernel = _Periodic(config.heads, config.half_life_days[: config.kernel_components])


class RankKernel(_Trial):
    """Ages in events instead of days: 50 events count as one day."""

    MS_PER_EVENT = 86_400_000 // 50

    def attend(self, query_THd: Tensor, keys: Keys, events: Events, targets: Targets) -> Tensor:
        device = query_THd.device
        rank_E = torch.arange(len(events.item_E), device=device)
        owner_T = torch.repeat_interleave(torch.tensor(targets.start).diff()).to(device)
        first_T = torch.tensor(events.start, device=device)[owner_T]
        return super().attend(
            query_THd,
            keys,
            replace(events, time_ms_E=rank_E * self.MS_PER_EVENT),
            replace(targets, time_ms_T=(first_T + targets.end_T) * self.MS_PER_EVENT),
        )


# ---- scales ----------------------------------------------------------------------------------------------------------


class SharpQueries(_Trial):
    """Logits four times as large, beyond the cap of the learned scale."""

    def queries(self, static_NS: Tensor) -> Tensor:
        return 4.0 * super().queries(static_NS)


class UnboundedKeys(_Trial):
    """Queries and keys without normalisation: their lengths, and the codebook's error, know no bound."""

    def normalised(self, flat_ND: Tensor) -> Tensor:
        return 4.0 * self.heads(flat_ND) * self.config.head_width**-0.25


class L2Keys(_Trial):
    """Queries and keys of length d^1/4 without centring."""

    def normalised(self, flat_ND: Tensor) -> Tensor:
        return F.normalize(self.heads(flat_ND), dim=-1) * self.config.head_width**0.25


TRIALS: dict[str, type[Interest]] = {
    "vql_kernel_outside": KernelOutside,
    "vql_periodic_kernel": PeriodicKernel,
    "vql_rank_kernel": RankKernel,
    "vql_simvq": _with_quantizer(_SimVQ, "Codewords as a learned map of frozen ones."),
    "vql_shared_codebook": SharedCodebook,
    "vql_aggregated_gradient": _with_quantizer(_Aggregated, "The task trains the codewords, not the keys."),
    "vql_both_gradients": _with_quantizer(_Both, "The task trains both."),
    "vql_l2_keys": L2Keys,
    "vql_careless_start": _with_quantizer(_Random, "No start from keys, no revival: codes collapse."),
    "vql_sharp_queries": SharpQueries,
    "vql_unbounded_keys": UnboundedKeys,
}

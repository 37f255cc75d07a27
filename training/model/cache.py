"""A user's history as counts and means per code: build, append, merge, rebase, expire, store. The cost never holds an
L.

Legend: L events, H heads, d head width, G groups, C codes, M kernel components (1 without a kernel), K stored entries.

Every weight lives in log space. Log counts are fp64 wherever caches are computed with: under an hour's half-life a code
last used a year ago stands at -6,000, where an fp32 step is 5e-4, and a thousand rebases would add up a thousand of
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from etl.warehouse.partitions import MS_PER_DAY
from training.model.kernel import MixtureKernel, age_days


@dataclass(frozen=True)
class UserCache:
    """All that attention needs of one user's history, whatever its length.

    Attributes:
        log_count_HMC: log of the kernel-weighted event count per code, fp64; -inf where a code has no event.
        mean_HMCd: kernel-weighted mean of the values per code (means, not sums: bounded, so fp16 can hold them).
        reference_time_ms: time at which the kernel's weights are taken.
    """

    log_count_HMC: Tensor
    mean_HMCd: Tensor
    reference_time_ms: int


def tables(codes_LG: Tensor, value_LHd: Tensor, log_weight_HML: Tensor, codes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum weighted events into their codes (docs/method.md#cached-form), with a maximum per code: linear counts
    underflow.

    Args:
        codes_LG: int64 assignments; the heads of a group share them.
        log_weight_HML: log of each event's weight, any precision.

    Returns:
        log counts [H, M, C] in the weights' precision, means [H, M, C, d] in the values', and each event's share of its
        code's count [H, M, L] in the values'.
    """
    heads, components, _ = log_weight_HML.shape
    width = value_LHd.shape[2]
    code_HL = codes_LG.T.repeat_interleave(heads // codes_LG.shape[1], dim=0)
    index_HML = code_HL[:, None].expand(-1, components, -1)
    empty = log_weight_HML.new_full((heads, components, codes), float("-inf"))
    top_HMC = empty.scatter_reduce(2, index_HML, log_weight_HML, "amax")
    safe_top = torch.where(top_HMC.isinf(), 0.0, top_HMC)  # -inf - -inf of an empty code would be nan
    mass_HMC = torch.zeros_like(empty).scatter_add(2, index_HML, (log_weight_HML - safe_top.gather(2, index_HML)).exp())
    log_count_HMC = safe_top + mass_HMC.log()
    # Shares of a code sum to 1, so its mean is never formed as a quotient of two sums that may both be tiny.
    share_HML = (log_weight_HML - log_count_HMC.gather(2, index_HML)).exp().to(value_LHd.dtype)
    # One sum over all heads and components at once: events are added to rows, no [L, C] of zeros and ones is ever made.
    row_HML = index_HML + codes * torch.arange(heads * components, device=codes_LG.device).view(heads, components, 1)
    weighted_HMLd = share_HML[..., None] * value_LHd.transpose(0, 1)[:, None]
    mean_Rd = value_LHd.new_zeros(heads * components * codes, width)
    mean_Rd = mean_Rd.index_add(0, row_HML.flatten(), weighted_HMLd.reshape(-1, width))
    return log_count_HMC, mean_Rd.view(heads, components, codes, width), share_HML


def joined(
    left_count_HMC: Tensor, left_mean_HMCd: Tensor, right_count_HMC: Tensor, right_mean_HMCd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join the tables of two disjoint sets of events at one reference time.

    Returns:
        log counts and means of both, and the parts of every count that come from the left and from the right, [H, M,
        C].
    """
    log_count_HMC = torch.logaddexp(left_count_HMC, right_count_HMC)
    left_part_HMC = (left_count_HMC - log_count_HMC).exp().nan_to_num(0.0)  # -inf - -inf where neither has an event
    right_part_HMC = (right_count_HMC - log_count_HMC).exp().nan_to_num(0.0)
    dtype = left_mean_HMCd.dtype
    mean_HMCd = (
        left_part_HMC[..., None].to(dtype) * left_mean_HMCd + right_part_HMC[..., None].to(dtype) * right_mean_HMCd
    )
    return log_count_HMC, mean_HMCd, left_part_HMC, right_part_HMC


@torch.no_grad()
def build_cache(
    codes_LG: Tensor,
    value_LHd: Tensor,
    event_time_ms_L: Tensor,
    reference_time_ms: int,
    codes: int,
    kernel: MixtureKernel | None,
) -> UserCache:
    """Sum a history into its codes; an event later than the reference time counts as if it came just then."""
    length, heads, _ = value_LHd.shape
    if kernel is None:
        log_weight_HML = torch.zeros(heads, 1, length, dtype=torch.float64, device=value_LHd.device)
    else:
        reference_L = torch.full_like(event_time_ms_L, reference_time_ms)
        log_weight_HML = -kernel.rate_HM().double()[:, :, None] * age_days(reference_L, event_time_ms_L, torch.float64)
    log_count_HMC, mean_HMCd, _ = tables(codes_LG, value_LHd, log_weight_HML, codes)
    return UserCache(log_count_HMC, mean_HMCd, reference_time_ms)


@torch.no_grad()
def rebase(cache: UserCache, reference_time_ms: int, kernel: MixtureKernel | None) -> UserCache:
    """Take the kernel's weights at another time: one subtraction, log n <- log n - a (t' - t)."""
    if kernel is None:
        return replace(cache, reference_time_ms=reference_time_ms)
    days = (reference_time_ms - cache.reference_time_ms) / MS_PER_DAY
    moved = cache.log_count_HMC.double() - kernel.rate_HM().double()[:, :, None] * days
    return replace(cache, log_count_HMC=moved, reference_time_ms=reference_time_ms)


@torch.no_grad()
def merge(left: UserCache, right: UserCache, kernel: MixtureKernel | None) -> UserCache:
    """Return the cache of two disjoint sets of events, at the later of the two reference times."""
    # The later one: no event then lies after the reference time, where its weight would exceed 1.
    reference = max(left.reference_time_ms, right.reference_time_ms)
    left, right = rebase(left, reference, kernel), rebase(right, reference, kernel)
    log_count_HMC, mean_HMCd, *_ = joined(
        left.log_count_HMC.double(), left.mean_HMCd, right.log_count_HMC.double(), right.mean_HMCd
    )
    return UserCache(log_count_HMC, mean_HMCd, reference)


def append(
    cache: UserCache, codes_LG: Tensor, value_LHd: Tensor, event_time_ms_L: Tensor, kernel: MixtureKernel | None
) -> UserCache:
    """Add new events in any order.

    Costs the new events and one pass over the cache, and moves the reference time on.
    """
    reference = max(cache.reference_time_ms, int(event_time_ms_L.max())) if len(codes_LG) else cache.reference_time_ms
    codes = cache.log_count_HMC.shape[-1]
    return merge(cache, build_cache(codes_LG, value_LHd, event_time_ms_L, reference, codes, kernel), kernel)


@dataclass
class PeriodCaches:
    """One cache a period (a day, a week): old events expire by dropping their period, never by a subtraction.

    Attributes:
        period_ms: length of a period.
        caches: period number (time // period_ms) -> cache of its events.
    """

    period_ms: int
    codes: int
    kernel: MixtureKernel | None
    caches: dict[int, UserCache] = field(default_factory=dict)

    def append(self, codes_LG: Tensor, value_LHd: Tensor, event_time_ms_L: Tensor) -> None:
        period_L = event_time_ms_L // self.period_ms
        for period in period_L.unique().tolist():
            mine = period_L == period
            events = (codes_LG[mine], value_LHd[mine], event_time_ms_L[mine])
            if period in self.caches:
                self.caches[period] = append(self.caches[period], *events, self.kernel)
            else:
                self.caches[period] = build_cache(*events, int(events[2].max()), self.codes, self.kernel)

    def expire(self, before_ms: int) -> None:
        """Drop the periods that ended by `before_ms`."""
        self.caches = {period: c for period, c in self.caches.items() if (period + 1) * self.period_ms > before_ms}

    def live(self) -> UserCache | None:
        """Return the cache of all live events, None if there is none."""
        return merge_all(self.caches.values(), self.kernel) if self.caches else None


def merge_all(caches: Iterable[UserCache], kernel: MixtureKernel | None) -> UserCache:
    """Merge one cache or more."""
    return reduce(lambda left, right: merge(left, right, kernel), caches)


def stored(cache: UserCache, mean_dtype: torch.dtype) -> UserCache:
    """Round a cache for storage: fp32 log counts, means in `mean_dtype`; attention reads it as it is.

    Its reference time should be near the newest event or the request: an fp32 log count is exact to 6e-8 of its size.
    """
    return replace(cache, log_count_HMC=cache.log_count_HMC.float(), mean_HMCd=cache.mean_HMCd.to(mean_dtype))


@dataclass(frozen=True)
class SparseCache:
    """The entries of a cache whose code has an event.

    Attributes:
        entry_K: int32, position of the entry in the dense [H, M, C].
        log_count_K, mean_Kd: as in the dense form, in its precision.
        shape: (H, M, C).
        reference_time_ms: time at which the kernel's weights are taken.
    """

    entry_K: Tensor
    log_count_K: Tensor
    mean_Kd: Tensor
    shape: tuple[int, int, int]
    reference_time_ms: int


def to_sparse(cache: UserCache) -> SparseCache:
    heads, components, codes = cache.log_count_HMC.shape
    log_count = cache.log_count_HMC.flatten()
    entry_K = (~log_count.isinf()).nonzero()[:, 0]
    mean_Kd = cache.mean_HMCd.flatten(0, 2)[entry_K]
    shape = (heads, components, codes)
    return SparseCache(entry_K.int(), log_count[entry_K], mean_Kd, shape, cache.reference_time_ms)


def to_dense(sparse: SparseCache) -> UserCache:
    entries = sparse.shape[0] * sparse.shape[1] * sparse.shape[2]
    log_count = sparse.log_count_K.new_full((entries,), float("-inf"))
    mean = sparse.mean_Kd.new_zeros(entries, sparse.mean_Kd.shape[1])
    index_K = sparse.entry_K.long()
    log_count[index_K], mean[index_K] = sparse.log_count_K, sparse.mean_Kd
    return UserCache(log_count.view(sparse.shape), mean.view(*sparse.shape, -1), sparse.reference_time_ms)

"""The separable temporal kernel: a mixture of exponentials inside the softmax (docs/method.md#temporal-kernel).

    K(t_q - t_i) = sum_m b_m exp(-a_m (t_q - t_i)),   b = softmax,   per head        (a single exponential would cancel)

Legend: H heads, M components, T targets, L events. Times are int64 milliseconds; differences are taken in int64 and
only then become floating-point days, because epoch milliseconds do not fit into fp32.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor, nn

from etl.warehouse.partitions import MS_PER_DAY

# At an hour's half-life an event of ten years ago has a log weight of -61,000, which fp64 counts hold to 1e-11.
MIN_HALF_LIFE_DAYS, MAX_HALF_LIFE_DAYS = 1 / 24, 365.0


class MixtureKernel(nn.Module):
    """Rates and weights of the components of every head."""

    def __init__(self, heads: int, half_life_days: tuple[float, ...]) -> None:
        super().__init__()
        # Logs: no step of the optimizer makes a rate negative, and a step is a share of the rate, fast or slow.
        log_rates = torch.log(math.log(2) / torch.tensor(half_life_days))
        self.log_rate_HM = nn.Parameter(log_rates.repeat(heads, 1))  # per day
        self.weight_HM = nn.Parameter(torch.zeros(heads, len(half_life_days)))

    def rate_HM(self) -> Tensor:
        """Rates per day, half-lives clamped to an hour .. a year."""
        low, high = math.log(math.log(2) / MAX_HALF_LIFE_DAYS), math.log(math.log(2) / MIN_HALF_LIFE_DAYS)
        return self.log_rate_HM.clamp(low, high).exp()

    def log_weight_HM(self) -> Tensor:
        return self.weight_HM.log_softmax(-1)

    def log_kernel(self, target_time_ms: Tensor, event_time_ms: Tensor) -> Tensor:
        """Return log K of broadcastable times, [H, *times], in the kernel's own precision."""
        return self.log_kernel_of_age(age_days(target_time_ms, event_time_ms, self.weight_HM.dtype)[None])

    def log_kernel_of_age(self, age_H: Tensor) -> Tensor:
        """Return log K of ages in days, [H or 1, ...] -> [H, ...]."""
        per_head = (-1, *[1] * (age_H.dim() - 1))
        # One component after the other: stacked, they would be M times the largest tensor of a step.
        parts = [
            log_weight_H.view(per_head) - rate_H.view(per_head) * age_H
            for log_weight_H, rate_H in zip(self.log_weight_HM().unbind(1), self.rate_HM().unbind(1), strict=True)
        ]
        return reduce(torch.logaddexp, parts)


def age_days(later_ms: Tensor, earlier_ms: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return later - earlier in days, never negative (clock skew)."""
    return ((later_ms - earlier_ms).clamp(min=0).double() / MS_PER_DAY).to(dtype)

"""How far quantized attention is from exact attention, and what the theorem promises, by length of history.

With delta_i the error of event i's logit, Delta its range over the history, eps_i = ||k_i - e_i|| and alpha the exact
weights:

    ||alpha_hat - alpha||_1  <=  2 tanh(Delta / 4)  <=  Delta / 2  <=  ||q|| max eps        (no L anywhere)

Its proof, and when eps grows: docs/method.md#error-bound.

Legend: L events, T targets, H heads, d head width. Queries and keys arrive scaled, so tau is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionErrors(NamedTuple):
    """Figures of every head and target of one user, fp64 [H, T].

    Attributes:
        delta: range of the logit errors. bound: 2 tanh(delta / 4). error: measured L1 distance of the weights, 0 .. 2.
        key_error: sqrt(sum_i alpha_i eps_i^2), what an attention-weighted codebook loss would see.
        cauchy: ||q|| max eps, the bound that needs no logits.
    """

    delta: Tensor
    bound: Tensor
    error: Tensor
    key_error: Tensor
    cauchy: Tensor


@torch.no_grad()
def attention_errors(
    query_THd: Tensor, key_LHd: Tensor, hard_LHd: Tensor, bias_HTL: Tensor | None = None
) -> AttentionErrors:
    """Compare attention for exact keys with attention for their codewords.

    Args:
        bias_HTL: log K, -inf where hidden, in both; every target sees an event.
    """
    query_HTd = query_THd.double().transpose(0, 1)
    logit_HTL, coarse_HTL = (query_HTd @ keys.double().permute(1, 2, 0) for keys in (key_LHd, hard_LHd))
    bias_HTL = torch.zeros_like(logit_HTL) if bias_HTL is None else bias_HTL.double()
    hidden_HTL = bias_HTL.isinf()
    alpha_HTL = (logit_HTL + bias_HTL).softmax(-1)
    shift_HTL = coarse_HTL - logit_HTL
    highest = shift_HTL.masked_fill(hidden_HTL, -torch.inf).amax(-1)
    delta = highest - shift_HTL.masked_fill(hidden_HTL, torch.inf).amin(-1)
    eps_H1L = (key_LHd.double() - hard_LHd.double()).norm(dim=-1).T[:, None]
    return AttentionErrors(
        delta=delta,
        bound=2 * torch.tanh(delta / 4),
        error=((coarse_HTL + bias_HTL).softmax(-1) - alpha_HTL).abs().sum(-1),
        key_error=(alpha_HTL * eps_H1L.square()).sum(-1).sqrt(),
        cauchy=query_HTd.norm(dim=-1) * torch.where(hidden_HTL, 0.0, eps_H1L).amax(-1),
    )


@dataclass(frozen=True)
class BoundProbe:
    """Means over the heads and targets of the users whose history has from `shortest` to below `longest` events.

    Attributes:
        users: how many users fell into the bucket. delta, bound, error, key_error, cauchy: as in `AttentionErrors`.
        error_max: the largest measured error.
        holds: no error was above its bound.
    """

    shortest: int
    longest: int
    users: int
    delta: float
    bound: float
    error: float
    error_max: float
    key_error: float
    cauchy: float
    holds: bool


def probe_by_length(
    users: Iterable[tuple[int, AttentionErrors]], edges: Sequence[int] = (1, 100, 1_000, 10_000, 1_000_000)
) -> list[BoundProbe]:
    """Collect (length of the history, errors) of users into one probe per bucket of lengths that has any."""
    buckets: dict[tuple[int, int], list[AttentionErrors]] = {bucket: [] for bucket in pairwise(edges)}
    for length, errors in users:
        for (shortest, longest), mine in buckets.items():
            if shortest <= length < longest:
                mine.append(errors)
    probes = []
    for (shortest, longest), mine in buckets.items():
        if mine:
            flat = AttentionErrors(
                *(torch.cat([part.flatten() for part in parts]) for parts in zip(*mine, strict=True))
            )
            means = {name: float(value.mean()) for name, value in flat._asdict().items()}
            holds = bool((flat.error <= flat.bound + 1e-9).all())
            error_max = float(flat.error.max())
            probes.append(BoundProbe(shortest, longest, len(mine), **means, error_max=error_max, holds=holds))
    return probes


def probe_warnings(
    probes: Sequence[BoundProbe],
    perplexity_share_G: Tensor,
    *,
    vacuous: float = 1.8,
    growth: float = 1.5,
    collapsed: float = 0.3,
) -> list[str]:
    """Say in words what is wrong with a codebook, nothing if nothing is.

    Args:
        perplexity_share_G: exp(entropy of usage) / C of every group.
        vacuous: a mean bound above it says next to nothing, for 2 is the largest distance there is.
        growth: how much the key error may rise from the shortest histories to the longest.
        collapsed: perplexity share below which codes have collapsed.
    """
    found = []
    for probe in probes:
        span = f"histories of {probe.shortest} to {probe.longest - 1} events"
        if not probe.holds:
            found.append(
                f"{span}: an attention error above its bound; the quantized keys are not those that were probed"
            )
        if probe.bound > vacuous:
            found.append(
                f"{span}: the bound is loose ({probe.bound:.2f} of 2, measured {probe.error:.2f}): logits too large for"
                " the codebook"
            )
    if probes and probes[-1].key_error > growth * probes[0].key_error:
        found.append(
            f"the key error grows with length, from {probes[0].key_error:.3g} to {probes[-1].key_error:.3g}: "
            "long histories hold items that the codebook was not fitted to"
        )
    found += [
        f"group {group}: codes have collapsed, perplexity is {share:.2f} of the codes"
        for group, share in enumerate(perplexity_share_G.tolist())
        if share < collapsed
    ]
    return found


def shared_information(codes_NG: Tensor, weight_N: Tensor) -> float:
    """Return the mean normalised mutual information of the groups' assignments, 0 (independent) .. 1 (the same
    partition).

    Groups that partition the items alike waste their codebooks: a product of codebooks has more cells than one.

    Args:
        codes_NG: int64 assignments of the items. weight_N: how often each occurs.
    """
    codes, groups = int(codes_NG.max()) + 1, codes_NG.shape[1]
    share_N = weight_N.double() / weight_N.sum()

    def entropy(cell_N: Tensor, cells: int) -> Tensor:
        share = torch.zeros(cells, dtype=torch.float64, device=cell_N.device).index_add_(0, cell_N, share_N)
        return -(share * share.clamp(min=1e-300).log()).sum()

    single = [entropy(codes_NG[:, g], codes) for g in range(groups)]
    found = []
    for a in range(groups):
        for b in range(a):
            joint = entropy(codes_NG[:, a] * codes + codes_NG[:, b], codes * codes)
            mean = (single[a] + single[b]) / 2
            found.append(float((single[a] + single[b] - joint) / mean) if mean > 0 else 1.0)
    return sum(found) / len(found) if found else 0.0

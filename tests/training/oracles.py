"""What each kind of interest computes, by definition: one target of one user at a time, in loops and double precision.

An oracle reads the weights of the interest, never its passes. Whoever adds a kind writes its definition here;
test_interests.py holds every kind of the registry against its own.

Legend: L visible events of the target's user, H heads, d head width, C codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.config import ModelConfig
from training.model.history import Events, Items, Targets
from training.model.interests.interface import Attention, Interest

MS_PER_DAY = 86_400_000


@dataclass(frozen=True)
class Seen:
    """One target and the events that it may see, oldest first.

    Attributes:
        event_LS, target_S: static embeddings. value_LHd: values. age_days: of each event, never negative.
        items, event_L, target: the batch's items, and which of them the events and the target are.
    """

    items: Items
    event_L: list[int]
    target: int
    event_LS: Tensor
    target_S: Tensor
    value_LHd: Tensor
    age_days: list[float]


def each_target(items: Items, events: Events, targets: Targets) -> list[Seen]:
    found = []
    for user in range(len(targets.start) - 1):
        for t in range(targets.start[user], targets.start[user + 1]):
            mine = range(events.start[user] + int(targets.first_T[t]), events.start[user] + int(targets.end_T[t]))
            found.append(
                Seen(
                    items=items,
                    event_L=[int(events.item_E[i]) for i in mine],
                    target=int(targets.item_T[t]),
                    event_LS=torch.stack([items.static_NS[events.item_E[i]] for i in mine]) if mine else torch.empty(0),
                    target_S=items.static_NS[targets.item_T[t]],
                    value_LHd=torch.stack([events.value_EHd[i] for i in mine]).double() if mine else torch.empty(0),
                    age_days=[max(0, int(targets.time_ms_T[t] - events.time_ms_E[i])) / MS_PER_DAY for i in mine],
                )
            )
    return found


def interests(of: Callable[[Interest, Seen], Tensor], interest: Interest, *batch) -> Tensor:
    """Return what `of` gives for every target, [T, H, d]; zeros for one that sees no event."""
    nothing = torch.zeros(interest.config.heads, interest.config.head_width, dtype=torch.float64)
    with torch.no_grad():
        return torch.stack([of(interest, seen) if seen.age_days else nothing for seen in each_target(*batch)])


def log_kernel(interest: Attention, head: int, age: float) -> float:
    """log sum_m b_m exp(-a_m age)."""
    if interest.kernel is None:
        return 0.0
    weights = interest.kernel.weight_HM[head].double().softmax(0).tolist()
    rates = interest.kernel.log_rate_HM[head].double().exp().tolist()
    return math.log(sum(b * math.exp(-a * age) for b, a in zip(weights, rates, strict=True)))


def mixed(logits: list[float], value_Ld: Tensor) -> Tensor:
    return (torch.tensor(logits, dtype=torch.float64).softmax(0)[:, None] * value_Ld).sum(0)


def mean_pooling(interest: Interest, seen: Seen) -> Tensor:
    return sum(seen.value_LHd) / len(seen.age_days)


def softmax_attention(interest: Attention, seen: Seen) -> Tensor:
    query_Hd, key_LHd = interest.queries(seen.target_S[None])[0].double(), interest.keys(seen.event_LS).double()
    heads = []
    for h in range(interest.config.heads):
        logits = [float(query_Hd[h] @ key_LHd[i, h]) + log_kernel(interest, h, a) for i, a in enumerate(seen.age_days)]
        heads.append(mixed(logits, seen.value_LHd[:, h]))
    return torch.stack(heads)


def recent_attention(interest: Attention, seen: Seen) -> Tensor:
    last = slice(-interest.config.recent_window, None)
    newest = replace(
        seen,
        event_L=seen.event_L[last],
        event_LS=seen.event_LS[last],
        value_LHd=seen.value_LHd[last],
        age_days=seen.age_days[last],
    )
    return softmax_attention(interest, newest)


def vql(interest, seen: Seen) -> Tensor:
    """Keys at their nearest codewords; exact for the newest events and for those of the highest quantized logits."""
    config, book_GCw = interest.config, interest.quantizer.codebook_GCw.double()
    query_Hd, key_LHd = interest.queries(seen.target_S[None])[0].double(), interest.keys(seen.event_LS).double()
    length, a_group = len(seen.age_days), config.heads // config.groups
    hard_LHd = torch.zeros_like(key_LHd)
    for i in range(length):
        for g in range(config.groups):
            mine = slice(g * a_group, (g + 1) * a_group)
            key_w = key_LHd[i, mine].flatten()
            words = book_GCw[g, : config.codes[g] if isinstance(config.codes, tuple) else config.codes]
            distances = [float((key_w - word_w).square().sum()) for word_w in words]
            hard_LHd[i, mine] = book_GCw[g, distances.index(min(distances))].view(a_group, -1)
    tail = max(0, length - config.recent_window)
    heads = []
    for h in range(config.heads):
        logits = [
            float(query_Hd[h] @ hard_LHd[i, h]) + log_kernel(interest, h, seen.age_days[i]) for i in range(length)
        ]
        best = sorted(range(tail), key=lambda i: (round(logits[i], 5), i), reverse=True)[: config.refine_k]
        for i in [*best, *range(tail, length)]:
            logits[i] += float(query_Hd[h] @ (key_LHd[i, h] - hard_LHd[i, h]))
        heads.append(mixed(logits, seen.value_LHd[:, h]))
    return torch.stack(heads)


def sdim(interest, seen: Seen) -> Tensor:
    """The mean over tables of the normalised sum of the values whose signs, in all projections, are the target's."""
    vectors = [key.flatten() for key in interest.keys(torch.cat([seen.event_LS, seen.target_S[None]]))]
    total_D = torch.zeros(seen.value_LHd[0].numel(), dtype=torch.float64)
    for plane_DB in interest.planes_DXB.unbind(1):
        *events, target = [[bool(sign > 0) for sign in vector @ plane_DB] for vector in vectors]
        bucket_D = sum((v.flatten() for v, e in zip(seen.value_LHd, events, strict=True) if e == target), 0 * total_D)
        total_D += bucket_D / max(float(bucket_D.norm()), 1e-12)
    return (total_D / interest.planes_DXB.shape[1]).view(seen.value_LHd.shape[1:])


def linear_attention(interest: Attention, seen: Seen) -> Tensor:
    query_Hd, key_LHd = interest.queries(seen.target_S[None])[0].double(), interest.keys(seen.event_LS).double()
    heads = []
    for h in range(interest.config.heads):
        weights = []
        for i, age in enumerate(seen.age_days):
            product = sum(
                (x + 1 if x > 0 else math.exp(x)) * (y + 1 if y > 0 else math.exp(y))
                for x, y in zip(query_Hd[h].tolist(), key_LHd[i, h].tolist(), strict=True)
            )
            weights.append(product * math.exp(log_kernel(interest, h, age)))
        heads.append(sum(w * v for w, v in zip(weights, seen.value_LHd[:, h], strict=True)) / sum(weights))
    return torch.stack(heads)


# By the registry's names: the definition, and the settings under which it is tried.
ORACLES: dict[str, tuple[Callable[..., Tensor], list[dict]]] = {
    "mean_pooling": (mean_pooling, [{}]),
    "softmax_attention": (softmax_attention, [{}, {"kernel_components": 0}]),
    "recent_attention": (recent_attention, [{"recent_window": 1}, {"recent_window": 4}]),
    "vql": (
        vql,
        [
            {},
            {"kernel_components": 0},
            {"groups": 1},
            {"codes": (2, 5)},
            {"recent_window": 3},
            {"refine_k": 2},
            {"refine_k": 2, "recent_window": 3},
        ],
    ),
    "sdim": (sdim, [{}]),
    "linear_attention": (linear_attention, [{}, {"kernel_components": 0}]),
}


def config(kind: str, **settings) -> ModelConfig:
    """A model small enough for loops."""
    return ModelConfig(interest=kind, **{"heads": 2, "head_width": 4, "groups": 2, "codes": 4, **settings})

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
    return softmax_attention(interest, some(seen, list(range(len(seen.event_L)))[-interest.config.recent_window :]))


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


def shares(items: Items, one: int, other: int) -> bool:
    tags = lambda item: set(items.rows["tags"][item].tolist()) - {0}  # noqa: E731
    return bool(tags(one) & tags(other))


def some(seen: Seen, chosen: list[int]) -> Seen:
    """The target with some of its events alone."""
    return replace(
        seen,
        event_L=[seen.event_L[i] for i in chosen],
        event_LS=seen.event_LS[chosen],
        value_LHd=seen.value_LHd[chosen],
        age_days=[seen.age_days[i] for i in chosen],
    )


def best(scores: list[float], count: int) -> list[int]:
    """The places of the highest scores, newer ones first among equals; -inf is none."""
    ranked = sorted(range(len(scores)), key=lambda i: (round(scores[i], 5), i), reverse=True)
    return sorted(i for i in ranked[:count] if scores[i] > -math.inf)


def category_pooling(interest: Interest, seen: Seen) -> Tensor:
    alike = [v for item, v in zip(seen.event_L, seen.value_LHd, strict=True) if shares(seen.items, item, seen.target)]
    return sum(alike) / len(alike) if alike else torch.zeros(seen.value_LHd.shape[1:])


def attended(interest: Attention, seen: Seen, scores: list[float]) -> Tensor:
    chosen = best(scores, interest.config.search_k)
    return softmax_attention(interest, some(seen, chosen)) if chosen else torch.zeros(seen.value_LHd.shape[1:])


def sim_hard(interest: Attention, seen: Seen) -> Tensor:
    scores = [0.0 if shares(seen.items, item, seen.target) else -math.inf for item in seen.event_L]
    return attended(interest, seen, scores)


def sim_soft(interest, seen: Seen) -> Tensor:
    target_D = interest.to_target(seen.target_S).double()
    return attended(interest, seen, [float(interest.to_event(e).double() @ target_D) for e in seen.event_LS])


def eta(interest, seen: Seen) -> Tensor:
    vectors = [key.flatten() for key in interest.keys(torch.cat([seen.event_LS, seen.target_S[None]]))]
    *events, target = [[bool(sign > 0) for sign in vector @ interest.planes_DB] for vector in vectors]
    return attended(interest, seen, [-sum(a != b for a, b in zip(event, target, strict=True)) for event in events])


def twin(interest: Attention, seen: Seen) -> Tensor:
    query_Hd, key_LHd = interest.queries(seen.target_S[None])[0].double(), interest.keys(seen.event_LS).double()
    heads = []
    for h in range(interest.config.heads):
        logits = [float(query_Hd[h] @ key_LHd[i, h]) + log_kernel(interest, h, a) for i, a in enumerate(seen.age_days)]
        chosen = best(logits, interest.config.search_k)
        heads.append(mixed([logits[i] for i in chosen], seen.value_LHd[chosen, h]))
    return torch.stack(heads)


def activations(interest, seen: Seen) -> list[float]:
    t = seen.target_S
    units = [interest.first(torch.cat([t, e, t - e, t * e])) for e in seen.event_LS]
    return [float(interest.last(unit.relu())) for unit in units]


def din(interest, seen: Seen) -> Tensor:
    return sum(w * v for w, v in zip(activations(interest, seen), seen.value_LHd, strict=True))


def din_softmax(interest, seen: Seen) -> Tensor:
    return mixed(activations(interest, seen), seen.value_LHd.flatten(1)).view(seen.value_LHd.shape[1:])


def dien(interest, seen: Seen) -> Tensor:
    """By PyTorch's own cell for the first network, and by its equations for the second."""
    newest = some(seen, list(range(len(seen.event_L)))[-interest.config.recent_window :])
    width, read = interest.config.width, interest.read
    cell = torch.nn.GRUCell(width, width)
    cell.load_state_dict({name.removesuffix("_l0"): weights for name, weights in read.state_dict().items()})
    state, states = torch.zeros(1, width), []
    for value in newest.value_LHd.float().flatten(1):
        states.append(state := cell(value[None], state))
    query = interest.to_query(newest.target_S)
    share = torch.stack([state[0] @ query for state in states]).softmax(0)
    out = torch.zeros(width)
    for state, a in zip(states, share, strict=True):
        update, reset = interest.gates(torch.cat([state[0], out])).sigmoid().chunk(2)
        candidate = interest.candidate(torch.cat([state[0], reset * out])).tanh()
        out = (1 - a * update) * out + a * update * candidate
    return out.double().view(newest.value_LHd.shape[1:])


def hstu(interest, seen: Seen) -> Tensor:
    if window := interest.config.recent_window:
        seen = some(seen, list(range(len(seen.event_L)))[-window:])
    silu, shape = torch.nn.functional.silu, seen.value_LHd.shape[1:]
    query_Hd = silu(interest.to_query(seen.target_S)).view(shape)
    total_Hd = torch.zeros(shape, dtype=torch.float64)
    for e, v, age in zip(seen.event_LS, seen.value_LHd, seen.age_days, strict=True):
        bucket = min(127, int(math.log(max(1.0, 86_400 * age)) / 0.301))
        for h in range(shape[0]):
            key = silu(interest.to_key(e)).view(shape)[h]
            total_Hd[h] += silu(query_Hd[h] @ key + interest.bias_of_age.weight[bucket, h]) * v[h]
    mean = (total_Hd / len(seen.event_L)).flatten().float()
    return interest.out(interest.norm(mean) * silu(interest.to_gate(seen.target_S))).double().view(shape)


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
    "frozen_codebook": (vql, [{}]),
    "random_codebook": (vql, [{}]),
    "sdim": (sdim, [{}]),
    "linear_attention": (linear_attention, [{}, {"kernel_components": 0}]),
    "category_pooling": (category_pooling, [{}]),
    "din": (din, [{}]),
    "din_softmax": (din_softmax, [{}]),
    "dien": (dien, [{"recent_window": 1}, {"recent_window": 5}]),
    "sim_hard": (sim_hard, [{"search_k": 2}, {"search_k": 4, "kernel_components": 0}]),
    "sim_soft": (sim_soft, [{"search_k": 1}, {"search_k": 4}]),
    "eta": (eta, [{"search_k": 1}, {"search_k": 4}]),
    "twin": (twin, [{"search_k": 1}, {"search_k": 4, "kernel_components": 0}]),
    "hstu": (hstu, [{}, {"recent_window": 4}]),
}


def config(kind: str, **settings) -> ModelConfig:
    """A model small enough for loops."""
    return ModelConfig(interest=kind, **{"heads": 2, "head_width": 4, "groups": 2, "codes": 4, **settings})

"""The ways to run one softmax over the histories of a batch; outputs and gradients of all are equal within rounding.

A pass takes queries, keys of the distinct items, events, targets and a `Softmax`, and gives one interest a target. It
knows neither the model around it nor which kind of interest asks.

Legend: N distinct items of the batch, E events (flat), T targets (flat), H heads, d head width, G groups, C codes;
L events of one user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from training.model import fused, fused_codes
from training.model.attention import Attended, CodedKeys, combine, event_attention, event_part, window_part
from training.model.blocks import Exact, Layout, block_attention
from training.model.factored import bounded_factored_attention, factored_attention, prefers_factored
from training.model.fused_rows import Places, gathered
from training.model.history import Events, Targets, each_user
from training.model.kernel import MixtureKernel
from training.model.refined import refined_event_part


@dataclass(frozen=True)
class Keys:
    """Keys of the N items of a batch.

    Attributes:
        exact_NHd: float, scaled so that a logit is a plain product.
        hard_NHd: at their codewords, gradient straight through to the exact ones; those where none is quantized.
        codes_NG, codebook_HCd: int64 codes, and each head's slice of the codewords; None where none is quantized.
    """

    exact_NHd: Tensor
    hard_NHd: Tensor
    codes_NG: Tensor | None = None
    codebook_HCd: Tensor | None = None

    @staticmethod
    def exact(key_NHd: Tensor) -> Keys:
        return Keys(key_NHd, key_NHd)


@dataclass(frozen=True)
class Softmax:
    """What decides the logits, besides queries and keys.

    Attributes:
        kernel: of the ages, inside the softmax; None: age does not matter.
        recent_window: so many of the newest events that a target sees have exact keys.
        refine_k: so many events of the highest quantized logits have exact keys too.
        window_alone: a target sees no event that is older than the window.
    """

    kernel: MixtureKernel | None
    recent_window: int = 0
    refine_k: int = 0
    window_alone: bool = False


def user_by_user(query_THd: Tensor, keys: Keys, events: Events, targets: Targets, softmax: Softmax) -> Tensor:
    """Return the interests [T, H, d] one user after another: fastest on a CPU, whose caches hold one history."""
    return torch.cat(
        [_one_user(query_THd[rows], keys, mine, seen, softmax) for mine, seen, rows in each_user(events, targets)]
    )


def in_blocks(
    query_THd: Tensor,
    keys: Keys,
    events: Events,
    targets: Targets,
    softmax: Softmax,
    attention: Callable[..., Tensor] = block_attention,
) -> Tensor:
    """Return the interests [T, H, d] of all users at once: what a GPU, or compiled code, is fastest at (blocks.py).

    Args:
        attention: `block_attention`, or the same function compiled.
    """
    # Every distinct item was projected and searched once; its key is copied to its events here and nowhere earlier.
    exact_EHd = keys.exact_NHd.index_select(0, events.item_E)
    key_EHd, first_T, exact_from_T = exact_EHd, targets.bound_T, None
    recent_T = (targets.end_T - softmax.recent_window).clamp(min=0)
    if softmax.window_alone:
        first_T = recent_T if first_T is None else torch.maximum(recent_T, first_T)
    elif keys.codes_NG is not None:
        key_EHd = keys.hard_NHd.index_select(0, events.item_E)
        if softmax.recent_window or softmax.refine_k:
            exact_from_T = recent_T
    seen = fused.Seen(events.time_ms_E, targets.time_ms_T, targets.end_T, first_T, exact_from_T)
    exact = None if exact_from_T is None else Exact(exact_EHd, softmax.refine_k)
    return by_layout(
        lambda layout: attention(layout, query_THd, key_EHd, events.value_EHd, seen, softmax.kernel, exact),
        events,
        targets,
    )


def has_kernels(query_THd: Tensor, softmax: Softmax) -> bool:
    """Say whether `in_kernels` can do it: on a GPU that runs the kernels, if no code is refined."""
    return fused.available(query_THd) and not softmax.refine_k


def in_kernels(query_THd: Tensor, keys: Keys, events: Events, targets: Targets, softmax: Softmax) -> Tensor:
    """Return the interests [T, H, d] of all users at once by the fused kernels: over events (fused.py) or, for users
    with many targets for their cut-offs, over codes (fused_codes.py).
    """
    first_T, exact_from_T, exact_EHd = targets.bound_T, None, None
    by_item = events.by_item or Places(events.item_E)
    recent_T = (targets.end_T - softmax.recent_window).clamp(min=0) if softmax.recent_window else None
    if softmax.window_alone and recent_T is not None:
        first_T = recent_T if first_T is None else torch.maximum(recent_T, first_T)
    elif keys.codes_NG is not None and recent_T is not None:
        exact_from_T, exact_EHd = recent_T, gathered(keys.exact_NHd, by_item)
    seen = fused.Seen(events.time_ms_E, targets.time_ms_T, targets.end_T, first_T, exact_from_T)
    work, codes, parts = events.work, events.codes, []
    if work is None and codes is None:
        sizes, device = (events.start, targets.start, targets.cut_offs), query_THd.device
        factored_U = np.zeros(len(events.start) - 1, bool)
        if keys.codes_NG is not None and keys.codebook_HCd is not None and first_T is None and exact_EHd is None:
            components = softmax.kernel.weight_HM.shape[1] if softmax.kernel else 1
            factored_U = fused_codes.preferred(*sizes, keys.codebook_HCd.shape, components)
        codes = fused_codes.CodeWork.of(*sizes, factored_U, device) if factored_U.any() else None
        if codes is None or not factored_U.all():
            work = fused.Work.of(events.start, targets.start, query_THd.shape[1], device, ~factored_U)
    if codes is not None and keys.codes_NG is not None and keys.codebook_HCd is not None:
        coded = fused_codes.Coded(keys.hard_NHd, keys.codebook_HCd, keys.codes_NG, by_item)
        parts.append(fused_codes.coded_attention(codes, query_THd, coded, events.value_EHd, seen, softmax.kernel))
    if work is not None:
        key_EHd = gathered(keys.hard_NHd, by_item)
        parts.append(fused.fused_attention(work, query_THd, key_EHd, events.value_EHd, seen, softmax.kernel, exact_EHd))
    return sum(parts[1:], parts[0])


def by_layout(attend: Callable[[Layout], Tensor], events: Events, targets: Targets) -> Tensor:
    """Return what `attend` gives for all targets, [T, ...]: one layout after another, so that memory stays bounded."""
    return torch.cat([attend(layout) for layout in Layout.of(events.start, targets.start, events.value_EHd.device)])


def _one_user(query_THd: Tensor, keys: Keys, events: Events, targets: Targets, softmax: Softmax) -> Tensor:
    """Return the interests of one user's targets, by whatever form is the cheapest for this history."""
    item_L, kernel, window = events.item_E, softmax.kernel, softmax.recent_window
    if softmax.window_alone:
        return window_part(query_THd, keys.exact_NHd[item_L], events, targets, kernel, window).out_THd
    if keys.codes_NG is None:
        return event_attention(query_THd, keys.exact_NHd[item_L], events, targets, kernel)
    shared = len(item_L) - targets.shared_from[0]
    factored = prefers_factored(shared, len(query_THd), targets.cut_offs[0], kernel is not None)
    if not (softmax.refine_k or window or factored):
        return event_attention(query_THd, keys.hard_NHd[item_L], events, targets, kernel)
    # The newest events have exact keys, so codes end before them; the two parts are joined to one softmax.
    older = replace(targets, end_T=(targets.end_T - window).clamp(min=0))
    tail = _coded_part(query_THd, keys, events, older, softmax, factored)
    if not window:
        return tail.out_THd
    return combine(window_part(query_THd, keys.exact_NHd[item_L], events, targets, kernel, window), tail).out_THd


def _coded_part(
    query_THd: Tensor, keys: Keys, events: Events, targets: Targets, softmax: Softmax, factored: bool
) -> Attended:
    """Return the attention of one user's targets, keys at their codewords."""
    assert keys.codes_NG is not None and keys.codebook_HCd is not None
    item_L, kernel = events.item_E, softmax.kernel
    if not (softmax.refine_k or factored):
        return event_part(query_THd, keys.hard_NHd[item_L], events, targets, kernel)
    coded = CodedKeys(keys.exact_NHd[item_L], keys.codebook_HCd, keys.codes_NG[item_L])
    if softmax.refine_k:
        return refined_event_part(query_THd, coded, events, targets, kernel, softmax.refine_k)
    run = factored_attention if targets.bound_T is None else bounded_factored_attention
    return run(query_THd, coded, events, targets, kernel)

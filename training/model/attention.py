"""Target attention over one user's history, in its two equal forms: over events (training), over codes (serving).

Legend: L events of the user, T targets, H heads, d head width, G groups, C codes, M kernel components, R events of the
exact recent window, K entries of any softmax. Queries and keys arrive scaled, so logits are plain dot products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model.cache import UserCache
from training.model.cache import build_cache as build_cache
from training.model.history import Events, Targets
from training.model.kernel import MixtureKernel, age_days
from training.model.quantizer import straight_through

NOTHING = -1e30  # log of the weight of no event: finite, so that no gradient meets inf - inf


class Attended(NamedTuple):
    """Attention over a part of a history, ready to be joined with the attention over the other parts.

    Attributes:
        out_THd: softmax-weighted mean of the part's values; zeros where a target sees none of the part.
        lse_TH: log of the sum of the part's exp(logit); `NOTHING` where a target sees none of the part.
    """

    out_THd: Tensor
    lse_TH: Tensor


class CodedKeys(NamedTuple):
    """The keys of one user's events and their codes.

    Attributes:
        key_LHd: exact keys. codebook_HCd: each head's slice of its group's codewords. codes_LG: int64.
    """

    key_LHd: Tensor
    codebook_HCd: Tensor
    codes_LG: Tensor

    def of(self, events: slice) -> CodedKeys:
        """Return those of some events."""
        return CodedKeys(self.key_LHd[events], self.codebook_HCd, self.codes_LG[events])

    def hard_LHd(self) -> Tensor:
        """Keys at their codewords, whose gradient goes to the exact keys (docs/method.md#straight-through-gradient)."""
        heads = self.codebook_HCd.shape[0]
        code_LH = self.codes_LG.repeat_interleave(heads // self.codes_LG.shape[1], dim=1)
        word_LHd = self.codebook_HCd[torch.arange(heads, device=self.codes_LG.device), code_LH]
        return straight_through(self.key_LHd, word_LHd)


def combine(*parts: Attended) -> Attended:
    """Join the attention over disjoint sets of events: exactly the one softmax over all of them."""
    lse_PTH = torch.stack([part.lse_TH for part in parts])
    out_PTHd = torch.stack([part.out_THd for part in parts])
    out_THd = (lse_PTH.softmax(0)[..., None] * out_PTHd).sum(0)
    return Attended(out_THd, lse_PTH.logsumexp(0))


def softmax_part(logit_HTK: Tensor, value: Tensor) -> Attended:
    """Softmax over K entries, -inf where hidden, of values [H, K, d] or, if each target has its own, [H, T, K, d]."""
    empty_HT1 = logit_HTK.isinf().all(-1, keepdim=True)
    shown_HTK = logit_HTK.masked_fill(empty_HT1, 0.0)  # whatever is not -inf: the result is masked below
    weight_HTK = shown_HTK.softmax(-1)
    out_HTd = weight_HTK @ value if value.dim() == 3 else (weight_HTK[:, :, None] @ value)[:, :, 0]
    lse_HT = shown_HTK.logsumexp(-1).masked_fill(empty_HT1[..., 0], NOTHING)
    return Attended(out_HTd.masked_fill(empty_HT1, 0.0).transpose(0, 1), lse_HT.T)


def hidden(length: int, first_T: Tensor | None, end_T: Tensor) -> Tensor:
    """Mark the events that a target may not see, bool [T, L]."""
    place_L = torch.arange(length, device=end_T.device)
    hidden_TL = place_L >= end_T[:, None]
    return hidden_TL if first_T is None else hidden_TL | (place_L < first_T[:, None])


def event_attention(
    query_THd: Tensor, key_LHd: Tensor, events: Events, targets: Targets, kernel: MixtureKernel | None
) -> Tensor:
    """Softmax attention of one user's targets over the events that each may see; exact for every target.

    Args:
        key_LHd: keys of the events.

    Returns:
        [T, H, d]; a target that may see no event gets zeros.
    """
    out_THd = torch.zeros_like(query_THd)
    if key_LHd.shape[0] == 0:
        return out_THd
    # A softmax over nothing is 0 / 0, in its gradient too: targets that see no event take no part.
    end_T, first_T, time_ms_T = targets.end_T, targets.bound_T, targets.time_ms_T
    seen_T = end_T > (0 if first_T is None else first_T)
    every = bool(seen_T.all())
    if not every:
        query_THd, end_T, time_ms_T = query_THd[seen_T], end_T[seen_T], time_ms_T[seen_T]
        first_T = first_T if first_T is None else first_T[seen_T]
    if query_THd.shape[0] == 0:
        return out_THd
    # What is hidden goes into the bias: the product below then never holds T x L logits for a backward pass.
    hidden_TL = hidden(key_LHd.shape[0], first_T, end_T)
    if kernel is None:
        nothing_TL = torch.zeros(hidden_TL.shape, dtype=query_THd.dtype, device=query_THd.device)
        bias = nothing_TL.masked_fill_(hidden_TL, float("-inf"))
    else:
        bias = kernel.log_kernel(time_ms_T[:, None], events.time_ms_E).masked_fill(hidden_TL, float("-inf"))
        bias = bias.to(query_THd.dtype)
    mixed_HTd = F.scaled_dot_product_attention(
        query_THd.transpose(0, 1)[None],
        key_LHd.transpose(0, 1)[None],
        events.value_EHd.transpose(0, 1)[None],
        attn_mask=bias[None] if bias.dim() == 3 else bias,
        scale=1.0,
    )[0]
    mixed_THd = mixed_HTd.transpose(0, 1).to(out_THd.dtype)
    return mixed_THd if every else out_THd.index_put((seen_T.nonzero()[:, 0],), mixed_THd)


def event_part(
    query_THd: Tensor, key_LHd: Tensor, events: Events, targets: Targets, kernel: MixtureKernel | None
) -> Attended:
    """`event_attention` as a part of a larger softmax; keeps T x L logits."""
    hidden_TL = hidden(key_LHd.shape[0], targets.bound_T, targets.end_T)
    logit_HTL = query_THd.transpose(0, 1) @ key_LHd.permute(1, 2, 0)
    if kernel is not None:
        logit_HTL = logit_HTL + kernel.log_kernel(targets.time_ms_T[:, None], events.time_ms_E).to(logit_HTL.dtype)
    return softmax_part(logit_HTL.masked_fill(hidden_TL, float("-inf")), events.value_EHd.transpose(0, 1))


def window_part(
    query_THd: Tensor, key_LHd: Tensor, events: Events, targets: Targets, kernel: MixtureKernel | None, window: int
) -> Attended:
    """Attention of one user's targets over the newest `window` events that each may see, for their exact keys.

    See docs/method.md#recent-window. The same function trains (all events, a cut-off per target) and serves (the newest
    events alone, every cut-off at their end); the other part ends at `end - window`, clamped at 0, or is a cache that
    leaves the newest events out.
    """
    if key_LHd.shape[0] == 0:
        return Attended(torch.zeros_like(query_THd), query_THd.new_full(query_THd.shape[:2], NOTHING))
    place_TR = targets.end_T[:, None] + torch.arange(-window, 0, device=query_THd.device)
    event_TR = place_TR.clamp(min=0)  # places before the history are hidden below; what is read there does not matter
    logit_HTR = torch.einsum("thd,trhd->htr", query_THd, key_LHd[event_TR])
    if kernel is not None:
        log_kernel_HTR = kernel.log_kernel(targets.time_ms_T[:, None], events.time_ms_E[event_TR])
        logit_HTR = logit_HTR + log_kernel_HTR.to(logit_HTR.dtype)
    first_T = targets.bound_T
    hidden_TR = place_TR < (0 if first_T is None else first_T[:, None])
    value_HTRd = events.value_EHd[event_TR].permute(2, 0, 1, 3)
    return softmax_part(logit_HTR.masked_fill(hidden_TR, float("-inf")), value_HTRd)


def cache_part(
    query_THd: Tensor, codebook_HCd: Tensor, cache: UserCache, target_time_ms_T: Tensor, kernel: MixtureKernel | None
) -> Attended:
    """Attention over codes (docs/method.md#cached-form): softmax(q . e_c + log phi + log n_c) on the means.

    The log count is what makes the softmax over codes the softmax over events; without it a code with a thousand events
    weighs no more than a code with one.
    """
    logit_HTMC = code_logits(
        query_THd, codebook_HCd, cache.log_count_HMC, target_time_ms_T, cache.reference_time_ms, kernel
    )
    return softmax_part(logit_HTMC.flatten(2), cache.mean_HMCd.to(query_THd.dtype).flatten(1, 2))


def cache_attention(
    query_THd: Tensor, codebook_HCd: Tensor, cache: UserCache, target_time_ms_T: Tensor, kernel: MixtureKernel | None
) -> Tensor:
    """Attention over codes, [T, H, d]; equals `event_attention` on codewords. An empty cache gives zeros."""
    return cache_part(query_THd, codebook_HCd, cache, target_time_ms_T, kernel).out_THd


def code_logits(
    query_THd: Tensor,
    codebook_HCd: Tensor,
    log_count_HMC: Tensor,
    target_time_ms_T: Tensor,
    reference_time_ms: int,
    kernel: MixtureKernel | None,
) -> Tensor:
    """Return q . e_c + log phi_m(t_q) + log n_cm, [H, T, M, C]; a target before the reference time counts as at it."""
    logit_HT1C = (query_THd.transpose(0, 1) @ codebook_HCd.transpose(1, 2))[:, :, None]
    if kernel is None:
        return logit_HT1C + log_count_HMC[:, None].to(query_THd.dtype)
    # Under a fast kernel log phi and log n are in the thousands: summed in fp64, and only the sum is rounded.
    age_T = age_days(target_time_ms_T, torch.full_like(target_time_ms_T, reference_time_ms), torch.float64)
    log_phi_HTM = kernel.log_weight_HM()[:, None] - kernel.rate_HM()[:, None] * age_T[None, :, None]
    return logit_HT1C + (log_phi_HTM[..., None] + log_count_HMC[:, None]).to(query_THd.dtype)

"""Refined codes (docs/method.md#refined-codes): in the softmax over codewords, the events that weigh most get their
exact logits.

An event's quantized logit is q . e_z + log K(t_q - t_i). The `refine` events of the highest, newer ones first among
equals, get q . k_i + log K instead; all others keep their code's. In training that is a substitution among T x L
logits. In serving the codes are an inverted file: within a code newer events weigh more, so the chosen ones are the
fronts of the codes' lists, merged. A candidate costs `refine` x C comparisons and `refine` dot products whatever the
length of the history.

Legend: L events, T targets, H heads, d head width, G groups, C codes, M kernel components, K refined events, X list
starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.model.attention import Attended, CodedKeys, code_logits, hidden, softmax_part
from training.model.cache import UserCache
from training.model.history import Events, Targets
from training.model.kernel import MixtureKernel, age_days

# Added per position: the order of equal logits becomes the order of time; far below a logit's rounding.
TIE = 1e-12


def refined_event_part(
    query_THd: Tensor,
    keys: CodedKeys,
    events: Events,
    targets: Targets,
    kernel: MixtureKernel | None,
    refine: int,
) -> Attended:
    """Training form: attention over the events that each target may see; straight-through keys, exact where refined.

    Refined events send the task's gradient to query and key as in exact attention, all others as in VQL.
    """
    key_LHd, codebook_HCd, codes_LG = keys
    heads, length = query_THd.shape[1], len(key_LHd)
    code_HL = codes_LG.T.repeat_interleave(heads // codes_LG.shape[1], dim=0)
    hard_LHd = keys.hard_LHd()
    hidden_TL = hidden(length, targets.bound_T, targets.end_T)
    query_HTd = query_THd.transpose(0, 1)
    logit_HTL = query_HTd @ hard_LHd.permute(1, 2, 0)
    bias_HTL = torch.zeros_like(logit_HTL)
    if kernel is not None:
        bias_HTL = kernel.log_kernel(targets.time_ms_T[:, None], events.time_ms_E).to(logit_HTL.dtype)
    bias_HTL = bias_HTL.masked_fill(hidden_TL, float("-inf"))
    if length:
        with torch.no_grad():
            # Chosen by the codes' logits, as serving sees them: events of one code are equal to the bit.
            score_HTC = query_HTd @ codebook_HCd.transpose(1, 2)
            score_HTL = score_HTC.gather(2, code_HL[:, None].expand(-1, len(query_THd), -1)) + bias_HTL
            order_L = TIE * torch.arange(length, device=code_HL.device, dtype=torch.float64)
            chosen_HTK = (score_HTL.double() + order_L).topk(min(refine, length), dim=-1).indices
        head_H11 = torch.arange(heads, device=code_HL.device)[:, None, None]
        exact_HTK = torch.einsum("htd,htkd->htk", query_HTd, key_LHd[chosen_HTK, head_H11])
        logit_HTL = logit_HTL.scatter(2, chosen_HTK, exact_HTK)
    return softmax_part(logit_HTL + bias_HTL, events.value_EHd.transpose(0, 1))


@dataclass(frozen=True)
class CodeIndex:
    """The events of a user by code, in compressed rows.

    Attributes:
        event_GL: positions of events in the history, ordered by code and within a code by position, oldest first.
        start_GX: [G, C + 1]; code c of group g owns event_GL[g, start_GX[g, c] : start_GX[g, c + 1]].
    """

    event_GL: Tensor
    start_GX: Tensor


def index_events(codes_LG: Tensor, codes: int) -> CodeIndex:
    """Group events, sorted by time, by code."""
    order = codes_LG.T.sort(dim=1, stable=True)
    starts_GX = torch.arange(codes + 1, device=codes_LG.device).repeat(codes_LG.shape[1], 1)
    return CodeIndex(order.indices, torch.searchsorted(order.values.contiguous(), starts_GX))


@dataclass(frozen=True)
class CodedHistory:
    """A user's history in serving: its cache, and the events behind the codes.

    Attributes:
        index: of the very events that are in the cache.
        key_LHd, value_LHd, time_ms_L: of these events, read at the opened ones only.
    """

    cache: UserCache
    index: CodeIndex
    key_LHd: Tensor
    value_LHd: Tensor
    time_ms_L: Tensor


def refined_cache_part(
    query_THd: Tensor,
    codebook_HCd: Tensor,
    history: CodedHistory,
    target_time_ms_T: Tensor,
    kernel: MixtureKernel | None,
    refine: int,
) -> Attended:
    """Serving form: attention over the codes of a history, its `refine` best events taken out of their codes and scored
    exactly.
    """
    cache, time_ms_L = history.cache, history.time_ms_L
    logit_HTMC = code_logits(
        query_THd, codebook_HCd, cache.log_count_HMC, target_time_ms_T, cache.reference_time_ms, kernel
    )
    mean_HKd = cache.mean_HMCd.to(query_THd.dtype).flatten(1, 2)
    if len(time_ms_L) == 0:
        return softmax_part(logit_HTMC.flatten(2), mean_HKd)
    query_HTd = query_THd.transpose(0, 1)
    score_HTC = query_HTd @ codebook_HCd.transpose(1, 2)
    event_HTK, coarse_HTK, keeps_HTK, keeps_HTC = _best_events(
        score_HTC, history.index, time_ms_L, target_time_ms_T, kernel, refine
    )
    head_H11 = torch.arange(len(query_HTd), device=query_THd.device)[:, None, None]
    key_HTKd, value_HTKd = history.key_LHd[event_HTK, head_H11], history.value_LHd[event_HTK, head_H11]
    log_kernel_HTK = _log_kernel(event_HTK, time_ms_L, target_time_ms_T, kernel).to(coarse_HTK.dtype)
    exact_HTK = (query_HTd[:, :, None] * key_HTKd).sum(-1) + log_kernel_HTK
    coarse_HTK = coarse_HTK + log_kernel_HTK
    # A code all of whose events are chosen leaves the softmax; from others the chosen are subtracted. Subtracting all
    # of a code's events would leave the rounding of its count for a count.
    logit_HTK = logit_HTMC.masked_fill(~keeps_HTC[:, :, None], float("-inf")).flatten(2)
    top_HT1 = torch.maximum(logit_HTK.amax(-1, keepdim=True), exact_HTK.amax(-1, keepdim=True))
    code_weight_HTK = (logit_HTK - top_HT1).exp()
    event_weight_HTK = (exact_HTK - top_HT1).exp() - (coarse_HTK - top_HT1).exp() * keeps_HTK
    total_HT1 = code_weight_HTK.sum(-1, keepdim=True) + event_weight_HTK.sum(-1, keepdim=True)
    # What is left of a code may be far below the 1 that it had, and the rounding of that 1 larger than all of it.
    total_HT1 = total_HT1.clamp(min=torch.finfo(total_HT1.dtype).eps)
    mixed_HTd = code_weight_HTK @ mean_HKd + (event_weight_HTK[:, :, None] @ value_HTKd)[:, :, 0]
    return Attended((mixed_HTd / total_HT1).transpose(0, 1), (top_HT1 + total_HT1.log())[..., 0].T)


def _best_events(
    score_HTC: Tensor,
    index: CodeIndex,
    event_time_ms_L: Tensor,
    target_time_ms_T: Tensor,
    kernel: MixtureKernel | None,
    refine: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge the codes' lists, newest event first, by quantized logit.

    Returns:
        the chosen events int64 [H, T, K], all if there are fewer; q . e of their codes [H, T, K]; whether their code
        keeps other events [H, T, K]; whether a code keeps any event [H, T, C].
    """
    heads = len(score_HTC)
    group_H = torch.arange(heads, device=score_HTC.device) // (heads // len(index.event_GL))
    start_HX, group_H11 = index.start_GX[group_H], group_H[:, None, None]
    first_HTC = start_HX[:, None, :-1].expand(score_HTC.shape)
    next_HTC = (start_HX[:, None, 1:] - 1).expand(score_HTC.shape).clone()  # place of each list's front

    def rank(score_HTX: Tensor, event_HTX: Tensor) -> Tensor:
        """Quantized logit and, among equals, position."""
        log_kernel_HTX = _log_kernel(event_HTX, event_time_ms_L, target_time_ms_T, kernel).to(score_HTX.dtype)
        # Summed in the logits' own precision first, as in training: events that tie there have to tie here.
        return (score_HTX + log_kernel_HTX).double() + TIE * event_HTX

    event_HTC = index.event_GL[group_H11, next_HTC.clamp(min=0)]
    rank_HTC = rank(score_HTC, event_HTC).masked_fill(next_HTC < first_HTC, float("-inf"))
    events, owners = [], []
    # One event a round, for all targets at once: what lies behind a list's front weighs no more than it, so fronts are
    # enough.
    for _ in range(min(refine, len(event_time_ms_L))):
        code_HT1 = rank_HTC.argmax(-1, keepdim=True)
        place_HT1 = next_HTC.gather(2, code_HT1)
        events.append(index.event_GL[group_H11, place_HT1])
        owners.append(code_HT1)
        event_HT1 = index.event_GL[group_H11, (place_HT1 - 1).clamp(min=0)]
        rank_HT1 = rank(score_HTC.gather(2, code_HT1), event_HT1)
        next_HTC.scatter_(2, code_HT1, place_HT1 - 1)
        rank_HTC.scatter_(2, code_HT1, rank_HT1.masked_fill(place_HT1 <= first_HTC.gather(2, code_HT1), float("-inf")))
    keeps_HTC, owner_HTK = next_HTC >= first_HTC, torch.cat(owners, -1)
    return torch.cat(events, -1), score_HTC.gather(2, owner_HTK), keeps_HTC.gather(2, owner_HTK), keeps_HTC


def _log_kernel(
    event_HTX: Tensor, event_time_ms_L: Tensor, target_time_ms_T: Tensor, kernel: MixtureKernel | None
) -> Tensor:
    """log K of each head's own events, [H, T, ...]; zeros without a kernel."""
    if kernel is None:
        return torch.zeros_like(event_HTX)
    time_1T = target_time_ms_T.view(1, -1, *[1] * (event_HTX.dim() - 2))
    return kernel.log_kernel_of_age(age_days(time_1T, event_time_ms_L[event_HTX], kernel.weight_HM.dtype))

"""Straight-through training of attention over codewords without a T x L product
(docs/method.md#factored-training-pass).

With keys at codewords an event's weight depends on the event through its code alone, so the forward pass is the cache's
and the straight-through gradients are one small matrix per code. Over a kernel component m, with A the softmax over (m,
c), g the gradient of the output, g_ the gradient of the log sum and r_i an event's share of its code's count:

    o_t   = sum_mc A_tmc mu_mc                             x_tmc  = A_tmc (g_t . mu_mc - g_t . o_t + g_t_)
    dq_t  = sum_mc x_tmc e_c                               dv_i   = sum_m r_im U_m[z_i],    U_mc = sum_t A_tmc g_t
    dk_i  = sum_m r_im (P_m[z_i] v_i - B_m[z_i])   P_mc   = sum_t A_tmc q_t g_t^T,
                                                   B_mc   = sum_t A_tmc (g_t . o_t - g_t_) q_t

Targets with their own cut-offs split the history into segments. Counts and means run forward over the segments, U, P
and B run backward, each step scaled by how much of a code's new count the old one is (at most 1: nothing overflows).

Legend: L events, T targets, H heads, d head width, G groups, C codes, M kernel components, S segments; N tiles of B
events of one head and code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from etl.warehouse.partitions import MS_PER_DAY
from training.model.attention import NOTHING, Attended, CodedKeys, combine, event_part
from training.model.cache import joined, tables
from training.model.history import Events, Targets, one_user
from training.model.kernel import MixtureKernel, age_days

TARGETS_PER_SEGMENT = 32
TARGETS_PER_PRODUCT = 256  # d x d numbers a target live this long only


def factored_attention(
    query_THd: Tensor, keys: CodedKeys, events: Events, targets: Targets, kernel: MixtureKernel | None
) -> Attended:
    """Attention of one user's targets over the events before their ends, keys at codewords, in O(L + T) time and
    memory.

    Output and gradients (of queries, keys, values and kernel; straight through to the keys, none to the codebook) are
    those of `event_part` on `keys.hard_LHd()`, for sorted event times and no target before an event that it sees. Up to
    `TARGETS_PER_SEGMENT` targets between two segment borders attend to their last, partial segment event by event.

    Args:
        keys: of the exact ones only the gradient is used.
        targets: any order of ends; `first_T` is not looked at.
    """
    if len(events.value_EHd) == 0 or len(query_THd) == 0:
        return Attended(torch.zeros_like(query_THd), query_THd.new_full(query_THd.shape[:2], NOTHING))
    # Segments grow from the oldest border to the newest, so targets are taken in the order of their ends.
    order_T = targets.end_T.argsort(stable=True)
    end_T, time_ms_T, query_THd = targets.end_T[order_T], targets.time_ms_T[order_T], query_THd[order_T]
    border_T, segments = _borders(end_T)
    if kernel is None:
        rate_HM, log_weight_HM = query_THd.new_zeros(2, query_THd.shape[1], 1)
    else:
        rate_HM, log_weight_HM = kernel.rate_HM(), kernel.log_weight_HM()
    part = Attended(
        *_CodeAttention.apply(
            query_THd,
            keys.key_LHd,
            events.value_EHd,
            rate_HM,
            log_weight_HM,
            _Given(keys.codebook_HCd.detach(), keys.codes_LG, events.time_ms_E, time_ms_T, segments),
        )
    )
    if bool((border_T < end_T).any()):
        ordered = replace(targets, time_ms_T=time_ms_T, end_T=end_T)
        part = combine(part, _partial_segments(query_THd, keys, events, ordered, border_T, kernel))
    back_T = order_T.argsort()
    return Attended(part.out_THd[back_T], part.lse_TH[back_T])


def bounded_factored_attention(
    query_THd: Tensor, keys: CodedKeys, events: Events, targets: Targets, kernel: MixtureKernel | None
) -> Attended:
    """`factored_attention` where targets see nothing of the events before their `first_T`.

    Events from `shared_from` on are summed into codes: no target is too late for one of them. The older ones meet the
    targets one by one, since a sum cannot be undone: what would be subtracted may be nearly all of it.
    """
    (shared_from,) = targets.shared_from
    old, new = slice(0, shared_from), slice(shared_from, None)
    rest = replace(targets, end_T=(targets.end_T - shared_from).clamp(min=0))
    return combine(
        event_part(query_THd, keys.of(old).hard_LHd(), events.of(old), targets, kernel),
        factored_attention(query_THd, keys.of(new), events.of(new), rest, kernel),
    )


def prefers_factored(length: int, targets: int, cut_offs: int, with_kernel: bool) -> bool:
    """Say whether the factored pass is the cheaper one for a user with so many distinct cut-offs.

    Costs are in pairs of an event and a target at four heads of width 16 on one CPU thread, fitted to
    benchmarks/factored.py: a segment costs a fixed number of small operations, an event and a target their own passes,
    and many cut-offs a partial segment. The item-level pass writes its kernel out for every pair, which doubles it at
    least.
    """
    pairs = length * targets * (2 if with_kernel else 1)
    many = cut_offs > TARGETS_PER_SEGMENT
    segments = -(-targets // TARGETS_PER_SEGMENT) if many else cut_offs
    return pairs > 45_000 * segments + (40 + TARGETS_PER_SEGMENT * many) * length + 400 * targets


class _Segment(NamedTuple):
    """Events [first, last) and the targets [target_first, target_last), sorted by cut-off, whose border is `last`."""

    first: int
    last: int
    target_first: int
    target_last: int


def _borders(end_T: Tensor) -> tuple[Tensor, list[_Segment]]:
    """Choose the segments: borders at all cut-offs if they are few, else at every so manyth target's."""
    distinct_S, count_S = end_T.unique_consecutive(return_counts=True)
    if len(distinct_S) > TARGETS_PER_SEGMENT:
        distinct_S = end_T[::TARGETS_PER_SEGMENT].unique_consecutive()
        count_S = torch.searchsorted(end_T, distinct_S[1:]).diff(
            prepend=end_T.new_zeros(1), append=end_T.new_full((1,), len(end_T))
        )
    ends, counts = distinct_S.tolist(), count_S.tolist()
    segments, event, target = [], 0, 0
    for end, count in zip(ends, counts, strict=True):
        if end > 0:
            segments.append(_Segment(event, end, target, target + count))
        event, target = end, target + count
    return distinct_S.repeat_interleave(count_S), segments


def _partial_segments(
    query_THd: Tensor,
    keys: CodedKeys,
    events: Events,
    targets: Targets,
    border_T: Tensor,
    kernel: MixtureKernel | None,
) -> Attended:
    """Attention of every target over the events between its border and its end."""
    hard_LHd, end_T = keys.hard_LHd(), targets.end_T
    inside_T = (end_T > border_T).nonzero()[:, 0]
    outs, lses = [], []
    for rows in inside_T.split((border_T[inside_T].unique_consecutive(return_counts=True)[1]).tolist()):
        border, end = int(border_T[rows[0]]), int(end_T[rows[-1]])
        between = slice(border, end)
        # The border is at or behind every `first_T`: within the segment all of it is seen.
        value_LHd, time_ms_L = events.value_EHd[between], events.time_ms_E[between]
        mine = one_user(value_LHd, time_ms_L, targets.time_ms_T[rows], end_T[rows] - border)
        part = event_part(query_THd[rows], hard_LHd[between], *mine, kernel)
        outs.append(part.out_THd)
        lses.append(part.lse_TH)
    out_THd = torch.zeros_like(query_THd).index_copy(0, inside_T, torch.cat(outs))
    lse_TH = query_THd.new_full(query_THd.shape[:2], NOTHING).index_copy(0, inside_T, torch.cat(lses))
    return Attended(out_THd, lse_TH)


class _Given(NamedTuple):
    """What has no gradient: codewords and codes, times of events and targets, and the segments."""

    codebook_HCd: Tensor
    codes_LG: Tensor
    event_time_ms_L: Tensor
    target_time_ms_T: Tensor
    segments: list[_Segment]


class _CodeAttention(torch.autograd.Function):
    """Attention of every target over the whole segments up to its border; targets sorted by border."""

    @staticmethod
    def forward(
        ctx,
        query_THd: Tensor,
        key_LHd: Tensor,
        value_LHd: Tensor,
        rate_HM: Tensor,
        log_weight_HM: Tensor,
        given: _Given,
    ) -> tuple[Tensor, Tensor]:
        codebook_HCd, codes_LG, event_time_ms_L, target_time_ms_T, segments = given
        targets, heads, width = query_THd.shape
        components, codes = rate_HM.shape[1], codebook_HCd.shape[1]
        code_HL = codes_LG.T.repeat_interleave(heads // codes_LG.shape[1], dim=0)
        query_HTd = query_THd.transpose(0, 1)
        rate_HM1 = rate_HM[:, :, None]
        codebook_HKd = codebook_HCd.repeat(1, components, 1)
        out_HTd, lse_HT = torch.zeros_like(query_HTd), query_THd.new_full((heads, targets), NOTHING)
        share_HML = value_LHd.new_empty(heads, components, len(value_LHd))
        log_count_HMC = query_THd.new_full((heads, components, codes), float("-inf"))
        mean_HMCd = value_LHd.new_zeros(heads, components, codes, width)
        weights, means, carried = [], [], []
        newest_ms: Tensor | None = None
        for segment in segments:
            events, aims = slice(segment.first, segment.last), slice(segment.target_first, segment.target_last)
            # The newest event so far is the reference time: no weight is above 1, whatever the rates.
            older_ms, newest_ms = newest_ms, event_time_ms_L[segment.last - 1]
            log_new_HML = -rate_HM1 * age_days(newest_ms, event_time_ms_L[events], rate_HM.dtype)
            count_HMC, new_mean_HMCd, share = tables(codes_LG[events], value_LHd[events], log_new_HML, codes)
            if older_ms is not None:
                old_HMC = log_count_HMC - rate_HM1 * age_days(newest_ms, older_ms, rate_HM.dtype)
                log_count_HMC, mean_HMCd, old_part_HMC, new_part_HMC = joined(
                    old_HMC, mean_HMCd, count_HMC, new_mean_HMCd
                )
                share = share * new_part_HMC.gather(2, code_HL[:, None, events].expand(-1, components, -1))
                carried.append(old_part_HMC)
            else:
                log_count_HMC, mean_HMCd = count_HMC, new_mean_HMCd
            means.append(mean_HMCd)
            share_HML[:, :, events] = share
            age_T1 = age_days(target_time_ms_T[aims], newest_ms, rate_HM.dtype)[:, None]
            log_phi_HTM = log_weight_HM[:, None] - rate_HM[:, None] * age_T1
            log_count_H1K = log_count_HMC.flatten(1)[:, None].expand(-1, len(age_T1), -1)
            logit_HTK = torch.baddbmm(log_count_H1K, query_HTd[:, aims], codebook_HKd.transpose(1, 2))
            logit_HTK.view(heads, -1, components, codes).add_(log_phi_HTM[..., None])
            weights.append(logit_HTK.softmax(-1))
            # The largest weight is exp(largest logit - log sum): the log sum without a second pass of exponentials.
            lse_HT[:, aims] = logit_HTK.amax(-1) - weights[-1].amax(-1).log()
            out_HTd[:, aims] = weights[-1] @ mean_HMCd.flatten(1, 2)
        inputs = query_HTd, codebook_HKd, code_HL, value_LHd
        ctx.save_for_backward(*inputs, out_HTd, share_HML, *weights, *means, *carried)
        ctx.given = given
        return out_HTd.transpose(0, 1), lse_HT.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_THd: Tensor, grad_lse_TH: Tensor):
        query_HTd, codebook_HKd, code_HL, value_LHd, out_HTd, share_HML, *per_segment = ctx.saved_tensors
        _, _, event_time_ms_L, target_time_ms_T, segments = ctx.given
        count = len(segments)
        weights, means, carried = per_segment[:count], per_segment[count : 2 * count], per_segment[2 * count :]
        grad_HTd = grad_out_THd.transpose(0, 1)
        heads, targets, width = query_HTd.shape
        components = share_HML.shape[1]
        codes = codebook_HKd.shape[1] // components
        base_HT1 = (grad_HTd * out_HTd).sum(-1, keepdim=True) - grad_lse_TH.T[..., None]
        table_HMCX = query_HTd.new_zeros(heads, components, codes, width + width * width + width + 1)
        grad_query_HTd, pull_HTM = torch.zeros_like(query_HTd), query_HTd.new_zeros(heads, targets, components)
        grad_key_LHd, grad_value_LHd = torch.zeros_like(value_LHd), torch.zeros_like(value_LHd)
        # ages from the newest event, whichever it is: the pairs' gradients have the same sum from the targets' side as
        # from the events', so (target - newest) + (newest - event) may be summed one by one
        with_kernel = ctx.needs_input_grad[3]
        age_L = _days(event_time_ms_L[-1] - event_time_ms_L, query_HTd.dtype)
        event_age_HM = query_HTd.new_zeros(heads, components)
        for s in reversed(range(count)):
            segment = segments[s]
            events, aims = slice(segment.first, segment.last), slice(segment.target_first, segment.target_last)
            if s + 1 < count:  # later targets' sums are per unit of a later count, of which this segment's is a part
                table_HMCX *= carried[s][..., None]
            per_target = (weights[s], query_HTd[:, aims], grad_HTd[:, aims], base_HT1[:, aims])
            for weight, query, grad, base in zip(*(t.split(TARGETS_PER_PRODUCT, 1) for t in per_target), strict=True):
                table_HMCX += (weight.transpose(1, 2) @ _summands(query, grad, base)).view_as(table_HMCX)
            pull_HTK = grad_HTd[:, aims] @ means[s].flatten(1, 2).transpose(1, 2)
            pull_HTK.sub_(base_HT1[:, aims]).mul_(weights[s])
            grad_query_HTd[:, aims] = pull_HTK @ codebook_HKd
            _event_gradients(
                code_HL[:, events],
                value_LHd[events],
                share_HML[:, :, events],
                table_HMCX,
                grad_key_LHd[events],
                grad_value_LHd[events],
            )
            if with_kernel:
                pull_HTM[:, aims] = pull_HTK.unflatten(2, (components, codes)).sum(-1)
                event_age_HM += _pull_of_ages(
                    code_HL[:, events], value_LHd[events], share_HML[:, :, events] * age_L[events], table_HMCX
                )
        target_age_T = _days(target_time_ms_T - event_time_ms_L[-1], query_HTd.dtype)
        grad_rate_HM = -torch.einsum("htm,t->hm", pull_HTM, target_age_T) - event_age_HM
        grad_query_THd = grad_query_HTd.transpose(0, 1)
        return grad_query_THd, grad_key_LHd, grad_value_LHd, grad_rate_HM, pull_HTM.sum(1), None


def _summands(query_HTd: Tensor, grad_HTd: Tensor, base_HT1: Tensor) -> Tensor:
    """What is summed over targets into a table per code, [H, T, X]: for U, P, B and sum_t A_tmc (g_t . o_t - g_t_)."""
    outer_HTX = (query_HTd[..., None] * grad_HTd[:, :, None]).flatten(2)
    return torch.cat([grad_HTd, outer_HTX, base_HT1 * query_HTd, base_HT1], -1)


def _pull_of_ages(code_HL: Tensor, value_LHd: Tensor, aged_HML: Tensor, table_HMCX: Tensor) -> Tensor:
    """Sum over events of age times the gradient of the event's log weight, [H, M].

    First per code, as the tables are.
    """
    heads, components, codes, _ = table_HMCX.shape
    width = value_LHd.shape[2]
    entry_HML = (
        codes * torch.arange(heads * components, device=code_HL.device).view(heads, components, 1) + code_HL[:, None]
    )
    aged_HMLk = (
        aged_HML[..., None] * torch.cat([value_LHd, torch.ones_like(value_LHd[..., :1])], -1).transpose(0, 1)[:, None]
    )
    sum_Ek = value_LHd.new_zeros(heads * components * codes, width + 1)
    sum_Ek.index_add_(0, entry_HML.flatten(), aged_HMLk.flatten(0, 2))
    pull_HMCk = torch.cat([table_HMCX[..., :width], -table_HMCX[..., -1:]], -1)
    return (pull_HMCk.flatten(2) * sum_Ek.view(heads, components, -1)).sum(-1)


def _event_gradients(
    code_HL: Tensor,
    value_LHd: Tensor,
    share_HML: Tensor,
    table_HMCX: Tensor,
    grad_key_LHd: Tensor,
    grad_value_LHd: Tensor,
) -> None:
    """Write the gradients of keys and values of some events from the tables of their codes.

    For the products with P, events are laid out sorted by code in tiles of one code each, so that one batched product
    reads a table once a tile: a table per event would be d times the memory, a padding to the fullest code up to C
    times.
    """
    length, heads, width = value_LHd.shape
    _, components, codes, _ = table_HMCX.shape
    tile = max(4, min(32, length // codes))
    bucket_LH = code_HL.T + codes * torch.arange(heads, device=code_HL.device)  # rows R in the layout [L, H]
    sorted_R, order_R = bucket_LH.flatten().sort(stable=True)
    count_X = sorted_R.bincount(minlength=heads * codes)
    tiles_X = (count_X + tile - 1) // tile
    shift_X = tile * (tiles_X.cumsum(0) - tiles_X) - (count_X.cumsum(0) - count_X)
    place_R = torch.arange(len(order_R), device=order_R.device) + shift_X.repeat_interleave(count_X)
    source_P = order_R.new_zeros(int(tiles_X.sum()) * tile).scatter_(0, place_R, order_R)  # padding is never read back
    result_R = torch.empty_like(order_R).scatter_(0, order_R, place_R)

    value_NBd = value_LHd.flatten(0, 1).index_select(0, source_P).view(-1, tile, width)
    for m in range(components):
        share_R1 = share_HML[:, m].T.reshape(-1, 1)
        u_Xd, p_Xdd, b_Xd, _ = table_HMCX[:, m].flatten(0, 1).split([width, width * width, width, 1], -1)
        p_Ndd = p_Xdd.repeat_interleave(tiles_X, 0).view(-1, width, width)
        b_N1d = b_Xd.repeat_interleave(tiles_X, 0)[:, None]
        key_Pd = torch.baddbmm(b_N1d, value_NBd, p_Ndd.mT, beta=-1).flatten(0, 1)
        key_Rd = key_Pd.index_select(0, result_R).mul_(share_R1)
        value_Rd = u_Xd.index_select(0, bucket_LH.flatten()).mul_(share_R1)
        if m == 0:
            grad_key_LHd.copy_(key_Rd.view_as(grad_key_LHd))
            grad_value_LHd.copy_(value_Rd.view_as(grad_value_LHd))
        else:
            grad_key_LHd += key_Rd.view_as(grad_key_LHd)
            grad_value_LHd += value_Rd.view_as(grad_value_LHd)


def _days(ms: Tensor, dtype: torch.dtype) -> Tensor:
    return (ms.double() / MS_PER_DAY).to(dtype)

"""The factored pass of quantized attention for many users at once, in fused kernels (Triton, on a GPU).

What `training.model.factored` does for one user on a CPU (its equations are there): events meet the codes of their
prefix and targets meet codes, and nothing costs events x targets. Outputs and gradients are, to rounding, those of
`training.model.fused` on keys at their codewords.

Every user's events are split at their targets' distinct cut-offs. Events are sorted by (group, code) once, where those
of a segment are neighbours; a program a code sums its runs over the prefixes, a tile of targets reads the prefix that
each target sees, and backward the other way round. No atomics: equal inputs give equal bits. Sizes come from lists that
the host has; the device is not waited for.

Legend: V users of this pass, Y their segments, N distinct items, E events (flat), T targets (flat), H heads, d head
width, G groups, C codes, M kernel components, X tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.model.fused import TILE, Seen, as_table, expanded, padded, precision_of, tables_on
from training.model.fused_rows import Places, narrowest, summed
from training.model.kernel import MixtureKernel

SEARCHED = 32  # keys of a program that looks for their codes
MOST_SEARCHED = 4_096  # numbers of a group's codewords: with twice as many its products leave the registers
BLOCK = 256  # events of a program that looks for those that nobody sees
# Fastest on an H100 of those tried (benchmarks/LOG.md).
BY_CODE = {"B": 32, "num_warps": 1}
BY_EVENT = BY_CODE | {"num_stages": 1, "maxnreg": 128}
BY_TARGET = {"P": 32, "num_warps": 2}
BY_BORDER = {"P": 16, "CB": 64, "num_warps": 4}
MOST_CODES, WIDEST = 256, 128  # codes; columns of a code's events, a head's width for each component
MOST_BYTES = 2**31  # of tables
# Costs of an event, a number of a segment's table and a target, and of a batch, whose kernels some targets do not fill;
# in pairs of an event and a target in the other pass.
EVENT_PAIRS, TABLE_PAIRS, TARGET_PAIRS, BATCH_PAIRS = 14, 1.0, 1_000, 6_400_000


@dataclass(frozen=True)
class CodeWork:
    """What the programs work on, int64 tables on the device.

    Attributes:
        users_V5: first event, first target, end of targets, first segment, segments.
        blocks_N3: user (of V), first and last place, of each block of events.
        tiles_X3: user, first target, end of targets, of each tile.
        segments: Y.
        whole: all users of the batch are among the V.
    """

    users_V5: Tensor
    blocks_N3: Tensor
    tiles_X3: Tensor
    segments: int
    whole: bool

    @staticmethod
    def of(
        event_start: Sequence[int],
        target_start: Sequence[int],
        cut_offs: Sequence[int],
        chosen_U: np.ndarray,
        device: torch.device,
    ) -> CodeWork:
        """Lay out the chosen users.

        Args:
            cut_offs: distinct ends of each user's targets; more than there are cost time alone.
        """
        tables = code_tables(event_start, target_start, cut_offs, chosen_U)
        users, blocks, tiles = tables_on(device, tables)
        segments = int(np.asarray(cut_offs)[chosen_U].sum())
        return CodeWork(users, blocks, tiles, segments, whole=bool(chosen_U.all()))


def code_tables(
    event_start: Sequence[int] | np.ndarray,
    target_start: Sequence[int] | np.ndarray,
    cut_offs: Sequence[int] | np.ndarray,
    chosen_U: np.ndarray,
    rows: Sequence[int] = (0, 0, 0),
) -> list[np.ndarray]:
    """Return the tables of `CodeWork`, int64 [V, 5], [N, 3] and [X, 3], with idle rows behind up to so many `rows`."""
    event_U, target_U = np.asarray(event_start, np.int64), np.asarray(target_start, np.int64)
    segments_V = np.asarray(cut_offs, np.int64)[chosen_U]
    event_V, first_V, last_V = event_U[:-1][chosen_U], target_U[:-1][chosen_U], target_U[1:][chosen_U]
    length_V = event_U[1:][chosen_U] - event_V
    tile = BY_TARGET["P"]
    user_N, block_N = expanded(-(-length_V // BLOCK))
    user_X, tile_X = expanded(-(-(last_V - first_V) // tile))
    low_N, low_X = block_N * BLOCK, first_V[user_X] + tile_X * tile
    return [
        as_table([event_V, first_V, last_V, segments_V.cumsum() - segments_V, segments_V], rows[0]),
        as_table([user_N, low_N, np.minimum(low_N + BLOCK, length_V[user_N])], rows[1]),
        as_table([user_X, low_X, np.minimum(low_X + tile, last_V[user_X])], rows[2]),
    ]


def preferred(
    event_start: Sequence[int] | np.ndarray,
    target_start: Sequence[int] | np.ndarray,
    cut_offs: Sequence[int] | np.ndarray,
    words: torch.Size,
    components: int,
) -> np.ndarray:
    """Say for which users this pass is the cheaper one, bool [U], by costs fitted to the table in benchmarks/LOG.md.

    Args:
        words: [H, C, d] of the codewords.
    """
    heads, codes, width = words
    event_U, target_U = np.asarray(event_start, np.int64), np.asarray(target_start, np.int64)
    length_U, targets_U = event_U[1:] - event_U[:-1], target_U[1:] - target_U[:-1]
    segments_U = np.asarray(cut_offs, np.int64)
    table = components * codes * width * (width + 2)  # numbers a segment and head
    pairs_U = length_U * (-(-targets_U // TILE) * TILE)
    cost_U = EVENT_PAIRS * length_U + TABLE_PAIRS * table * segments_U + TARGET_PAIRS * targets_U
    fits = codes <= MOST_CODES and _power(components) * _power(width) <= WIDEST
    gain_U = np.maximum(pairs_U - cost_U, 0) * fits
    if gain_U.sum() <= BATCH_PAIRS:
        return np.zeros(len(gain_U), bool)
    return (gain_U > 0) & ((4 * heads * table * segments_U * (gain_U > 0)).cumsum() <= MOST_BYTES)


def searches(codes: int, width: int) -> bool:
    """Say whether `nearest` takes groups of so many codes of a width."""
    return padded(codes) * padded(width) <= MOST_SEARCHED


def nearest(keys_NGw: Tensor, centre_Gw: Tensor, codes_GCw: Tensor, square_GC: Tensor) -> Tensor:
    """Return the nearest code of every key and group, int64 [N, G]; ties go to the lower code.

    Args:
        keys_NGw: float32.
        codes_GCw: the codewords less their centres, float32. square_GC: their squared lengths; inf: no code.
    """
    from training.model import fused_code_kernels as kernels

    count, groups, width = keys_NGw.shape
    codes = codes_GCw.shape[1]
    found_NG = torch.empty(count, groups, dtype=torch.int64, device=keys_NGw.device)
    if count:
        given = keys_NGw.contiguous(), centre_Gw, codes_GCw, square_GC, found_NG, count
        sizes = {"G": groups, "C": codes, "CP": padded(codes), "W": width, "WP": padded(width)}
        kernels.nearest_kernel[(-(-count // SEARCHED), groups)](*given, **sizes, P=SEARCHED)
    return found_NG


class Coded(NamedTuple):
    """The keys of a batch and their codes.

    Attributes:
        hard_NHd: keys of the items at their codewords; what is used is where their gradient goes.
        codebook_HCd, codes_NG: each head's slice of the codewords, int64 codes.
        places: the item of each event.
    """

    hard_NHd: Tensor
    codebook_HCd: Tensor
    codes_NG: Tensor
    places: Places


def coded_attention(
    work: CodeWork, query_THd: Tensor, keys: Coded, value_EHd: Tensor, seen: Seen, kernel: MixtureKernel | None
) -> Tensor:
    """Softmax attention of the targets of the chosen users over the events before their ends, keys at codewords.

    The codebook gets no gradient. `seen` has neither first places nor exact keys.

    Returns:
        [T, H, d], fp32; zeros for a target that sees no event, and for users who were not chosen.
    """
    heads = query_THd.shape[1]
    if kernel is None:  # one component of no rate: every event weighs 1
        rate_HM = log_weight_HM = torch.zeros(heads, 1, device=query_THd.device)
    else:
        rate_HM, log_weight_HM = kernel.rate_HM().float(), kernel.log_weight_HM().float()
    precision = precision_of(query_THd)[1]
    rows = query_THd.float().contiguous(), keys.hard_NHd, value_EHd.contiguous()
    codes = _Codes(keys.codebook_HCd.detach().float().contiguous(), keys.codes_NG.contiguous(), keys.places)
    return _CodeAttention.apply(*rows, rate_HM, log_weight_HM, _Pass(work, codes, seen, precision))


class _Codes(NamedTuple):
    codebook_HCd: Tensor
    codes_NG: Tensor
    places: Places


class _Pass(NamedTuple):
    """What has no gradient."""

    work: CodeWork
    codes: _Codes
    seen: Seen
    precision: str


class _Runs(NamedTuple):
    """Events in the order of their (group, code), those of a code in their own.

    Attributes:
        borders_Y6: cut-off, first target and end of targets that have it, time of the newest event before it, first
            and end of its segment's events.
        order: events of all groups, int64 [G * E].
        bounds_R2: int32, where in `order` each run (group, segment, code) begins and ends.
    """

    borders_Y6: Tensor
    order: Tensor
    bounds_R2: Tensor


def _runs(given: _Pass) -> _Runs:
    from training.model import fused_code_kernels as kernels

    work, codes = given.work, given.codes
    groups, count = codes.codes_NG.shape[1], codes.codebook_HCd.shape[1]
    events, segments = len(codes.places.row_E), work.segments
    borders_Y6 = work.users_V5.new_zeros(segments, kernels.BORDER.value)
    kernels.border_kernel[(len(work.users_V5),)](
        work.users_V5, given.seen.end_T, given.seen.event_ms_E, borders_Y6, P=1024
    )
    # A user's events lie together and in order of time, so that a code's are in order of segments already: a sort looks
    # at codes alone.
    shift_G = torch.arange(0, groups * count, count, device=borders_Y6.device)
    key_GN = (codes.codes_NG + shift_G).to(narrowest(groups * count)).t().contiguous()
    keys, order = key_GN.index_select(1, codes.places.row_E).flatten().sort(stable=True)
    bounds_R2 = torch.empty(groups * segments * count, 2, dtype=torch.int32, device=borders_Y6.device)
    if segments:
        sizes = {"C": count, "CP": _power(count), "G": groups, "STEPS": (groups * events).bit_length()}
        kernels.run_kernel[(groups * segments,)](borders_Y6, keys, order, bounds_R2, events, segments, **sizes)
    return _Runs(borders_Y6, order, bounds_R2)


class _CodeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, hard, value, rate_HM, log_weight_HM, given: _Pass) -> Tensor:
        from training.model import fused_code_kernels as kernels

        (targets, heads, width), components = query.shape, rate_HM.shape[1]
        work, seen, sizes = given.work, given.seen, _Sizes(query, rate_HM, given)
        runs = _runs(given)
        make = query.new_empty if work.whole else query.new_zeros
        out_THd, lse_TH = make(targets, heads, width), query.new_empty(targets, heads)
        segments, codes = work.segments, sizes.by_code["C"]
        sums = query.new_empty(segments, heads, components, 2, codes, sizes.padded)
        counts = query.new_empty(segments, heads, components, 2, codes)
        if segments:
            kernels.prefix_kernel[(len(work.users_V5) * heads * codes,)](
                work.users_V5,
                runs.borders_Y6,
                runs.order,
                runs.bounds_R2,
                seen.event_ms_E,
                value,
                rate_HM,
                sums,
                counts,
                len(value),
                segments,
                **sizes.by_code,
            )
            kernels.code_forward_kernel[(len(work.tiles_X3) * heads,)](
                work.users_V5,
                work.tiles_X3,
                runs.borders_Y6,
                query,
                given.codes.codebook_HCd,
                sums,
                counts,
                seen.target_ms_T,
                seen.end_T,
                rate_HM,
                log_weight_HM,
                out_THd,
                lse_TH,
                **sizes.by_target,
            )
        ctx.save_for_backward(query, value, rate_HM, log_weight_HM, out_THd, lse_TH, sums, counts, *runs)
        ctx.given, ctx.shape, ctx.dtype = given, hard.shape, hard.dtype
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THd: Tensor):
        *rest, borders_Y6, order, bounds_R2 = ctx.saved_tensors
        given: _Pass = ctx.given
        forward = _Forward._make((*rest, _Runs(borders_Y6, order, bounds_R2)))
        sizes, components = _Sizes(forward.query, forward.rate_HM, given), forward.rate_HM.shape[1]
        grad_query_THd, part_sums, tables = _by_target(given, forward, sizes, grad_THd)
        grad_key_EHd, grad_value_EHd = _by_event(given, forward, sizes, tables)
        sums_HMk = part_sums.sum(0)[:, : 2 * components].unflatten(1, (components, 2))
        grad_hard_NHd = summed(grad_key_EHd, given.codes.places, ctx.shape).to(ctx.dtype)
        return grad_query_THd, grad_hard_NHd, grad_value_EHd, -sums_HMk[..., 1], sums_HMk[..., 0], None


class _Forward(NamedTuple):
    """What the forward pass leaves to the backward pass; `sums` and `counts` are the tables of the prefixes."""

    query: Tensor
    value: Tensor
    rate_HM: Tensor
    log_weight_HM: Tensor
    out_THd: Tensor
    lse_TH: Tensor
    sums: Tensor
    counts: Tensor
    runs: _Runs


def _by_target(given: _Pass, forward: _Forward, sizes: _Sizes, grad_THd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, the tiles' sums for rates and weights, and the tables of the borders."""
    from training.model import fused_code_kernels as kernels
    from training.model.fused_kernels import base_kernel

    query, work, runs = forward.query, given.work, forward.runs
    (targets, heads, width), (_, components) = query.shape, forward.rate_HM.shape
    codes, padded = sizes.by_code["C"], sizes.padded
    grad_query_THd = (torch.empty_like if work.whole else torch.zeros_like)(query)
    columns = max(2, _power(2 * components))
    part_sums = query.new_empty(len(work.tiles_X3), heads, columns)
    tables = query.new_empty(work.segments, heads, components, codes, padded * (padded + 2))
    if not work.segments:
        return grad_query_THd, part_sums, tables
    rounded_THd, base_TH = torch.empty_like(query), torch.empty_like(forward.lse_TH)
    constants = {"D": width, "DP": padded, "P": TILE, "PRECISION": given.precision}
    rows = targets * heads
    base_kernel[(-(-rows // TILE),)](grad_THd.contiguous(), forward.out_THd, rounded_THd, base_TH, rows, **constants)
    weights = forward.rate_HM, forward.log_weight_HM
    pairs = given.seen.target_ms_T, given.seen.end_T, *weights, rounded_THd, forward.lse_TH, base_TH
    what = runs.borders_Y6, query, given.codes.codebook_HCd
    kernels.code_query_kernel[(len(work.tiles_X3) * heads,)](
        work.users_V5,
        work.tiles_X3,
        *what,
        forward.sums,
        forward.counts,
        *pairs,
        grad_query_THd,
        part_sums,
        W=columns,
        **sizes.by_target,
    )
    parts = -(-width // sizes.by_border["Q"]) * -(-codes // sizes.by_border["CB"])
    kernels.code_gradient_kernel[(work.segments * heads * components * parts,)](
        *what, *pairs, tables, **sizes.by_border
    )
    return grad_query_THd, part_sums, tables


def _by_event(given: _Pass, forward: _Forward, sizes: _Sizes, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of keys and values."""
    from training.model import fused_code_kernels as kernels

    work, runs, value = given.work, forward.runs, forward.value
    events, heads, width = value.shape
    codes = sizes.by_code["C"]
    make = torch.empty_like if work.whole else torch.zeros_like
    grads = make(value), make(value)
    if len(work.blocks_N3):
        constants = {"HEADS": heads, "D": width, "DP": sizes.padded, "B": BLOCK}
        kernels.unseen_kernel[(len(work.blocks_N3),)](
            work.users_V5, work.blocks_N3, runs.borders_Y6, *grads, **constants
        )
    if work.segments:
        kernels.code_event_kernel[(len(work.users_V5) * heads * codes,)](
            work.users_V5,
            *runs,
            given.seen.event_ms_E,
            value,
            forward.rate_HM,
            tables,
            *grads,
            events,
            work.segments,
            **sizes.by_event,
        )
    return grads


class _Sizes:
    """What the kernels are compiled for."""

    def __init__(self, query: Tensor, rate_HM: Tensor, given: _Pass) -> None:
        (_, heads, width), components = query.shape, rate_HM.shape[1]
        codes, groups = given.codes.codebook_HCd.shape[1], given.codes.codes_NG.shape[1]
        self.padded = padded(width)
        alike: dict[str, Any] = {"HEADS": heads, "C": codes, "D": width, "DP": self.padded, "M": components}
        self.by_code = alike | {"G": groups, "MP": _power(components)} | BY_CODE
        alike["PRECISION"] = given.precision
        self.by_event = self.by_code | alike | BY_EVENT
        self.by_target = alike | {"CP": padded(codes)} | BY_TARGET
        self.by_border = alike | BY_BORDER | {"Q": min(self.padded, 256 // self.padded)}
        self.by_border["CB"] = min(BY_BORDER["CB"], padded(codes))


def _power(count: int) -> int:
    """Return the next power of 2."""
    return 1 << (count - 1).bit_length()

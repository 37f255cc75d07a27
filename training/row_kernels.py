"""Triton kernels for the rows of a table that a step read: what `read_rows.py` does by torch, a launch each.

Legend: B places of a program, each with the id of a row; d width of a row.
"""

import triton
import triton.language as tl
from torch import Tensor

from training.model.fused import padded

PLACES = 64  # of a program


@triton.jit
def mark_kernel(ids, last, places, B: tl.constexpr):
    """Note the last place of every id."""
    place_B = tl.program_id(0) * B + tl.arange(0, B)
    inside_B = place_B < places
    tl.atomic_max(last + tl.load(ids + place_B, inside_B, other=0), place_B, inside_B, sem="relaxed")


@triton.jit
def join_kernel(ids, last, values, stride, out, places, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr):
    """Add the values of every place to those of the last place of its id."""
    place_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside_B, column = place_B < places, tl.arange(0, DP)
    inside = inside_B[:, None] & (column < D)[None, :]
    values_Bd = tl.load(values + place_B[:, None] * stride + column[None, :], inside, other=0.0)
    to_B = tl.load(last + tl.load(ids + place_B, inside_B, other=0), inside_B, other=0).to(tl.int64)
    some = inside & (values_Bd != 0)
    tl.atomic_add(out + to_B[:, None] * D + column[None, :], values_Bd, some, sem="relaxed")


@triton.jit
def note_kernel(ids, values, stride, part, last, places, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr):
    """Note the places of a part whose rows are not 0."""
    place_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside_B, column = place_B < places, tl.arange(0, DP)
    own = values + part * stride + place_B[:, None] * D + column[None, :]
    values_Bd = tl.load(own, inside_B[:, None] & (column < D)[None, :], other=0.0)
    some_B = tl.max((values_Bd != 0).to(tl.int32), 1) > 0
    id_B = tl.load(ids + part * places + place_B, some_B, other=0)
    tl.store(last + id_B, (part * places + place_B).to(tl.int32), some_B)


@triton.jit
def merge_kernel(ids, values, stride, part, last, places, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr):
    """Move the rows of a part that are not 0, each there once, to the places that earlier parts have for them.

    It may not note the others' places, too: threads that share an element would read what one of them noted.
    """
    place_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside_B, column = place_B < places, tl.arange(0, DP)
    wide = (column < D)[None, :]
    own = values + part * stride + place_B[:, None] * D + column[None, :]
    values_Bd = tl.load(own, inside_B[:, None] & wide, other=0.0)
    some_B = tl.max((values_Bd != 0).to(tl.int32), 1) > 0
    id_B = tl.load(ids + part * places + place_B, some_B, other=0)
    to_B = tl.load(last + id_B, some_B, other=-1).to(tl.int64)
    moved = (to_B >= 0)[:, None] & wide
    at = values + (to_B // places * stride + to_B % places * D)[:, None] + column[None, :]
    tl.store(at, tl.load(at, moved, other=0.0) + values_Bd, moved)
    tl.store(own, tl.zeros_like(values_Bd), moved)


@triton.jit
def forget_kernel(ids, last, places, B: tl.constexpr):
    """Undo `mark_kernel`."""
    place_B = tl.program_id(0) * B + tl.arange(0, B)
    inside_B = place_B < places
    tl.store(last + tl.load(ids + place_B, inside_B, other=0), tl.full((B,), -1, tl.int32), inside_B)


@triton.jit
def adagrad_kernel(
    ids, values, stride, each, table, sums, rate, decay, epsilon, places,
    D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Move the rows whose gradient is not 0; no two places have one for the same row."""
    place_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside_B, column = place_B < places, tl.arange(0, DP)
    wide = (column < D)[None, :]
    from_B = place_B // each * stride + place_B % each * D
    grad_Bd = tl.load(values + from_B[:, None] + column[None, :], inside_B[:, None] & wide, other=0.0)
    square_B = tl.sum(grad_Bd * grad_Bd, 1) / D
    moved_B, id_B = inside_B & (square_B > 0), tl.load(ids + place_B, inside_B, other=0)
    # Read and written at once: of threads that share an element some would read what another one wrote.
    sum_B = tl.atomic_add(sums + id_B, square_B, moved_B, sem="relaxed") + square_B
    sum_B = tl.where(moved_B, sum_B, 1.0)
    at, moved = table + id_B[:, None] * D + column[None, :], moved_B[:, None] & wide
    row_Bd = tl.load(at, moved, other=0.0)
    step_Bd = grad_Bd / (tl.sqrt(sum_B) + epsilon)[:, None] + decay * row_Bd
    tl.store(at, row_Bd - tl.load(rate) * step_Bd, moved)


@triton.jit
def put_kernel(
    ids, values, stride, each, table, places,
    D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Store the rows that are not 0 where their ids say; if `ZERO`, store zeros there."""
    place_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside_B, column = place_B < places, tl.arange(0, DP)
    inside = inside_B[:, None] & (column < D)[None, :]
    from_B = place_B // each * stride + place_B % each * D
    values_Bd = tl.load(values + from_B[:, None] + column[None, :], inside, other=0.0)
    at = table + tl.load(ids + place_B, inside_B, other=0)[:, None] * D + column[None, :]
    tl.store(at, tl.where(ZERO, 0.0, values_Bd), inside & (values_Bd != 0))


def join(ids: Tensor, values: Tensor, last: Tensor, out: Tensor) -> None:
    """Add the values of each id to `out`, float32 [N, d], at the last place that has the id, in whatever order.

    Args:
        ids: int64 [N]; values: float32 [N, d], of any row stride.
        last: int32 [rows of the table], -1 everywhere, before and after.
    """
    width, places = values.shape[1], len(ids)
    if places:
        grid, sizes = (-(-places // PLACES),), {"D": width, "DP": padded(width), "B": PLACES}
        mark_kernel[grid](ids, last, places, B=PLACES)
        join_kernel[grid](ids, last, values, values.stride(0), out, places, **sizes)
        forget_kernel[grid](ids, last, places, B=PLACES)


def merge(ids: Tensor, values: Tensor, last: Tensor) -> None:
    """Add up rows that several parts have, in place and in the order of the parts; they stand in the first one then.

    Args:
        ids: int64 [W, R]; values: float32 [W, R, d], a part without gaps; a part has a row that is not 0 once.
        last: as in `join`.
    """
    parts, places, width = values.shape
    sizes = {"D": width, "DP": padded(width), "B": PLACES}
    grid = (-(-places // PLACES),)
    for part in range(1, parts):
        note_kernel[grid](ids, values, values.stride(0), part - 1, last, places, **sizes)
        merge_kernel[grid](ids, values, values.stride(0), part, last, places, **sizes)
    forget_kernel[(-(-ids.numel() // PLACES),)](ids, last, ids.numel(), B=PLACES)


def adagrad(ids: Tensor, values: Tensor, table: Tensor, sums: Tensor, rate: Tensor, how: tuple[float, float]) -> None:
    """Take a step of `RowwiseAdagrad`, with `how` its decay and epsilon; `ids` and `values` as in `merge`."""
    _, each, width = values.shape
    if places := ids.numel():
        sizes = {"D": width, "DP": padded(width), "B": PLACES}
        grid = (-(-places // PLACES),)
        adagrad_kernel[grid](ids, values, values.stride(0), each, table, sums, rate, *how, places, **sizes)


def put(ids: Tensor, values: Tensor, table: Tensor, zero: bool = False) -> None:
    """Store the numbers that are not 0 in the table's rows, or zeros in their places; arguments as in `merge`."""
    _, each, width = values.shape
    if places := ids.numel():
        sizes = {"D": width, "DP": padded(width), "B": PLACES}
        grid = (-(-places // PLACES),)
        put_kernel[grid](ids, values, values.stride(0), each, table, places, **sizes, ZERO=zero)

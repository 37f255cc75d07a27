"""Rows of tables for every event, and their gradients back, in one pass each (Triton, on a GPU).

A batch has tens of events for each distinct item, so the gradient is added up in the order of the items: one addition
to the table a run of equal items in place of one an event.

Legend: E events, N rows of a table, D their width (flattened).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from training.model import fused
from training.model.fused import padded

ROWS = 64  # events of a program
# Rows that a program adds up, and runs of them at once: the fastest of those tried (benchmarks/LOG.md).
ADDED, RUNS = 32, 16
UNSORTED = 8_192  # events at most
NARROW = (2**8, torch.uint8), (2**15, torch.int16)


class Places:
    """Which row of a table each event takes.

    Attributes:
        row_E: int64 or int32 [E], contiguous.
    """

    def __init__(self, row_E: Tensor) -> None:
        self.row_E = row_E.contiguous()

        self._ordered: tuple[Tensor, Tensor] | None = None

    def ordered(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return (order, ids): the events in the order of their rows, and these rows, int64 and int32 [E].

        A few are left in their order: to sort them takes longer than to add each by itself.

        Args:
            rows: of the table: with few of them a sort has few digits to look at.
        """
        if self._ordered is None and len(self.row_E) <= UNSORTED:
            self._ordered = torch.arange(len(self.row_E), device=self.row_E.device), self.row_E.int()
        if self._ordered is None:
            ids, order = self.row_E.to(narrowest(rows)).sort()
            self._ordered = order, ids.int()
        return self._ordered


def narrowest(count: int) -> torch.dtype:
    """Return the type of the fewest bytes for numbers below a count: the fewer, the faster they are sorted."""
    return next((kind for most, kind in NARROW if count <= most), torch.int32)


def gathered(table: Tensor, places: Places, other: Tensor | None = None, other_places: Places | None = None) -> Tensor:
    """Return table[row] (+ other[other row]) of every event, [E, ...], in autocast's precision.

    Gradients are summed in fp32. With `torch.use_deterministic_algorithms` they have the same bits in every run.
    """
    if not fused.available(table):
        rows = table.index_select(0, places.row_E)
        return rows if other is None or other_places is None else rows + other.index_select(0, other_places.row_E)
    dtype = table.dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return _Gathered.apply(table, other, places, other_places, dtype, None)


def gathered_exactly(table: Tensor, places: Places) -> Tensor:
    """Return table[row] of every event in the table's own precision."""
    with torch.autocast(table.device.type, enabled=False):
        return gathered(table, places)


def embedded(table: nn.Module, places: Places, shape: torch.Size) -> Tensor:
    """Return rows [*shape, d] of an `nn.Embedding` in its own precision; its padding row, if any, has no gradient."""
    assert isinstance(table, nn.Embedding)
    if not fused.available(table.weight):
        return table(places.row_E.view(shape))
    with torch.autocast(table.weight.device.type, enabled=False):
        rows = _Gathered.apply(table.weight, None, places, None, table.weight.dtype, table.padding_idx)
    return rows.view(*shape, -1)


def embedded_in_part(table: nn.Embedding, row_N: Tensor) -> Tensor:
    """Return rows [N, d] of a table in its own precision; the gradient is sparse, of these rows in their order."""
    if not fused.available(table.weight):
        return F.embedding(row_N, table.weight, sparse=True)
    return _ReadInPart.apply(table.weight, row_N.contiguous())


def normalised(rows: Tensor) -> Tensor:
    """Return LayerNorm without gain of every [..., d]."""
    if not fused.available(rows):
        return F.layer_norm(rows, rows.shape[-1:])
    return _Normalised.apply(rows.contiguous())


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        from training.model.fused_kernels import normalise_kernel

        width, out = rows.shape[-1], torch.empty_like(rows)
        count = rows.numel() // width
        scale = rows.new_empty(count, dtype=torch.float32)
        if count:
            sizes = {"D": width, "DP": padded(width), "B": ROWS}
            normalise_kernel[(-(-count // ROWS),)](rows, out, scale, count, **sizes)
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from training.model.fused_kernels import normalise_backward_kernel

        out, scale = ctx.saved_tensors
        found, width = torch.empty_like(out), out.shape[-1]
        if len(scale):
            sizes = {"D": width, "DP": padded(width), "B": ROWS}
            normalise_backward_kernel[(-(-len(scale) // ROWS),)](
                grad.contiguous(), out, scale, found, len(scale), **sizes
            )
        return found


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        table: Tensor,
        other: Tensor | None,
        places: Places,
        other_places: Places | None,
        dtype: torch.dtype,
        padding_row: int | None,
    ) -> Tensor:
        from training.model.fused_kernels import gather_kernel

        table = table.contiguous()
        second = table if other is None else other.contiguous()
        ctx.places, ctx.shapes = (places, other_places), (table.shape, second.shape)
        ctx.dtypes, ctx.padding_row = (table.dtype, second.dtype), padding_row
        events, width = len(places.row_E), table[0].numel()
        out = table.new_empty(events, *table.shape[1:], dtype=dtype)
        if events:
            gather_kernel[(-(-events // ROWS),)](
                table,
                places.row_E,
                second,
                (other_places or places).row_E,
                out,
                events,
                D=width,
                DP=padded(width),
                B=ROWS,
                TWO=other is not None,
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        found = [
            None if places is None or not needed else summed(grad, places, shape).to(dtype)
            for places, shape, dtype, needed in zip(
                ctx.places, ctx.shapes, ctx.dtypes, ctx.needs_input_grad, strict=False
            )
        ]
        if ctx.padding_row is not None and found[0] is not None:
            found[0][ctx.padding_row].zero_()
        return *found, None, None, None, None


class _ReadInPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, row_N: Tensor) -> Tensor:
        from training.model.fused_kernels import gather_kernel

        ctx.save_for_backward(row_N)
        ctx.shape = weight.shape
        rows, width = len(row_N), weight.shape[1]
        out = weight.new_empty(rows, width)
        if rows:
            sizes = {"D": width, "DP": padded(width), "B": ROWS}
            gather_kernel[(-(-rows // ROWS),)](weight, row_N, weight, row_N, out, rows, **sizes, TWO=False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        [row_N] = ctx.saved_tensors
        return torch.sparse_coo_tensor(row_N.long()[None], grad.float(), ctx.shape, check_invariants=False), None


def summed(grad: Tensor, places: Places, shape: torch.Size) -> Tensor:
    """Sum the rows of a gather's gradient into a table, fp32."""
    from training.model.fused_kernels import scatter_kernel

    table = grad.new_zeros(shape, dtype=torch.float32)
    events, width = len(places.row_E), table[0].numel()
    if torch.are_deterministic_algorithms_enabled():
        return table.index_add_(0, places.row_E, grad.float())
    if events:
        order, ids = places.ordered(len(table))
        sizes = {"D": width, "DP": padded(width), "B": ADDED, "R": RUNS, "num_warps": max(1, padded(width) // 64)}
        scatter_kernel[(-(-events // ADDED),)](grad, order, ids, table, events, **sizes)
    return table

"""Embedding tables of which a step reads few rows: gradients, their exchange and updates are of these rows alone.

A table of millions of rows has no gradient of its size: its part is the rows that the batch read and what each gets,
which workers exchange in place of the table. By AdamW every row moves in every step, read or not; by row-wise Adagrad
only rows that were read do (Duchi et al., 2011; one sum a row as in FBGEMM's row-wise Adagrad).

Legend: N places of rows that were read, W workers, R the most places of one of them, d width of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.model import fused

READ_OFTEN = 2  # a table is summed as a whole if a step of all workers reads more than one of so many rows
EPSILON = 1e-8


def read_in_part(tables: list[nn.Embedding], rows_a_step: float) -> list[nn.Embedding]:
    """Return the tables of which a step of all workers, which reads about so many rows, reads a small part."""
    return [table for table in tables if len(table.weight) > READ_OFTEN * rows_a_step]


class Rows(NamedTuple):
    """Gradients of some rows of a table, a part a worker: ids int64 [W, R], values float32 [W, R, d].

    A row's gradient stands at one place that has its id, zeros at all others. A part has no gaps; there may be some
    between parts.
    """

    ids: Tensor
    values: Tensor


class RowGradients:
    """The gradients of some tables by the rows that were read; from now on `autograd` finds them sparse.

    Args:
        tables: of ids, one a place of a batch's distinct items.
        world: workers, which all have the same tables.
    """

    def __init__(self, tables: list[nn.Embedding], world: int) -> None:
        self.tables, self.world = tables, world
        for table in tables:
            table.sparse = True
        self.last = [no_places(table.weight) for table in tables]  # of each row a place that has it

    def summed(self, found: list[Tensor | None], most: int, gather: Callable[[Tensor, Tensor], object]) -> list[Rows]:
        """Return the gradients of each table, summed over the workers, to the same bits on all of them.

        Args:
            found: autograd's gradients of this worker, None without a part of the batch.
            most: rows of any worker's part at most, the same on all of them.
            gather: writes the tensors of all workers, one after another, into its first argument.
        """
        if self.world == 1:
            return [self._alone(*each) for each in zip(self.tables, self.last, found, strict=True)]
        sizes = [most * (1 + table.embedding_dim) for table in self.tables]
        sent = self.tables[0].weight.new_zeros(sum(sizes))
        for table, last, gradient, part in zip(self.tables, self.last, found, sent.split(sizes), strict=True):
            _pack(part, table, last, gradient, most)
        got = sent.new_empty(self.world, len(sent))
        gather(got.view(-1), sent)
        return [_merged(part, last, most) for last, part in zip(self.last, got.split(sizes, 1), strict=True)]

    def _alone(self, table: nn.Embedding, last: Tensor, gradient: Tensor | None) -> Rows:
        assert gradient is not None, "a worker that is alone has every batch"
        ids, values = gradient._indices()[0], gradient._values()
        return Rows(ids[None], join(ids, values, last, torch.zeros_like(values))[None])


class RowwiseAdagrad:
    """Moves the rows that were read alone: 4 bytes of state a row, where AdamW has 8 a number.

    A row's step is its gradient over the root of the sum of its mean squares so far; decay is of rows that have a
    gradient.

    Attributes:
        sums: [of each table] float32 [rows].
    """

    def __init__(self, tables: list[nn.Embedding], decay: float) -> None:
        self.tables, self.decay = tables, decay
        self.sums = [torch.zeros(len(table.weight), device=table.weight.device) for table in tables]

    @torch.no_grad()
    def step(self, gradients: list[Rows], rate: Tensor) -> None:
        """Take a step."""
        for table, sums, rows in zip(self.tables, self.sums, gradients, strict=True):
            self._move(rows, table.weight, sums, rate)

    def _move(self, rows: Rows, weight: Tensor, sums: Tensor, rate: Tensor) -> None:
        if fused.available(weight):
            from training import row_kernels

            row_kernels.adagrad(*rows, weight, sums, rate, (self.decay, EPSILON))
            return
        ids, values = rows.ids.flatten(), rows.values.flatten(0, 1)
        square = values.square().mean(1)
        sums.index_add_(0, ids, square)
        move = values / (sums[ids].sqrt() + EPSILON)[:, None]
        move += self.decay * weight[ids] * (square > 0)[:, None]
        weight.index_add_(0, ids, move * -rate)

    def load(self, sums: list[Tensor]) -> None:
        """Go on from the sums of another one."""
        for mine, other in zip(self.sums, sums, strict=True):
            mine.copy_(other)


def put(rows: Rows, whole: Tensor) -> None:
    """Write gradients of rows into that of the whole table, which is 0."""
    if fused.available(whole):
        from training import row_kernels

        row_kernels.put(rows.ids, rows.values, whole)
    else:
        whole.index_add_(0, rows.ids.flatten(), rows.values.flatten(0, 1))


def take_back(rows: Rows, whole: Tensor) -> None:
    """Undo `put`."""
    if fused.available(whole):
        from training import row_kernels

        row_kernels.put(rows.ids, rows.values, whole, zero=True)
    else:
        whole.index_fill_(0, rows.ids.flatten(), 0)


def no_places(weight: Tensor) -> Tensor:
    """Return of each row of a table that no place has it, int32 [rows]."""
    return torch.full((len(weight),), -1, dtype=torch.int32, device=weight.device)


def _pack(sent: Tensor, table: nn.Embedding, last: Tensor, gradient: Tensor | None, most: int) -> None:
    """Write the ids (their bits) of a worker's gradient, and behind them the values, into zeros, [R + R d].

    What is left over has zeros for rows of all the table: one row's would be added up in turn.
    """
    ids = torch.arange(most, dtype=torch.int32, device=sent.device) % len(table.weight)
    if gradient is not None:
        read = gradient._indices()[0]
        ids[: len(read)] = read
        join(read, gradient._values(), last, sent[most:].view(most, -1)[: len(read)])
    sent[:most] = ids.view(torch.float32)


def _merged(got: Tensor, last: Tensor, most: int) -> Rows:
    """Return what the workers sent, [W, R + R d], rows of several added up in the order of the workers."""
    ids_WR = got[:, :most].view(torch.int32).long()
    values_WRd = got[:, most:].unflatten(1, (most, -1))
    if _by_kernels(values_WRd):
        from training import row_kernels

        row_kernels.merge(ids_WR, values_WRd, last)
    else:
        to_WR = _last_places(ids_WR.flatten(), last).view_as(ids_WR)
        sums_Nd = torch.zeros_like(values_WRd.flatten(0, 1))
        for to_R, values_Rd in zip(to_WR, values_WRd, strict=True):
            sums_Nd.index_add_(0, to_R, values_Rd)
        values_WRd = sums_Nd.view_as(values_WRd)
    return Rows(ids_WR, values_WRd)


def join(ids: Tensor, values: Tensor, last: Tensor, out: Tensor) -> Tensor:
    """Add the values of equal ids to `out`, which is 0, where the last of them stands; return it.

    Args:
        last: of the table, -1 everywhere.
    """
    if not len(ids):
        return out
    if _by_kernels(out):
        from training import row_kernels

        row_kernels.join(ids, values, last, out)
        return out
    return out.index_add_(0, _last_places(ids, last), values)


def _by_kernels(tensor: Tensor) -> bool:
    return fused.available(tensor) and not torch.are_deterministic_algorithms_enabled()


def _last_places(ids: Tensor, last: Tensor) -> Tensor:
    """Return for every id the last place that has it."""
    place = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    to = last.scatter_reduce_(0, ids, place, "amax")[ids]
    last.index_fill_(0, ids, -1)
    return to

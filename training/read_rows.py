"""Embedding tables of which a step reads few rows: gradients, their exchange and updates are of these rows alone.

A table of millions of rows has no gradient of its size: its part is the rows that the batch read and what each gets,
which workers exchange in place of the table. By AdamW every row moves in every step, read or not; by row-wise Adagrad
only rows that were read do (Duchi et al., 2011; one sum a row as in FBGEMM's row-wise Adagrad).

Legend: N rows that a worker's batch read, W workers, R the most rows of one of them, d width of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

READ_OFTEN = 2  # a table is summed as a whole if a step of all workers reads more than one of so many rows
EPSILON = 1e-8


def read_in_part(tables: list[nn.Embedding], rows_a_step: float) -> list[nn.Embedding]:
    """Return the tables of which a step of all workers, which reads about so many rows, reads a small part."""
    return [table for table in tables if len(table.weight) > READ_OFTEN * rows_a_step]


class Rows(NamedTuple):
    """Gradients of some rows of a table: ids int64 [N], values float32 [N, d]; of equal ids one has the sum, the
    others zeros."""

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
        # The place of each row among those that were read, of the rows that were: which of equal rows has the sum.
        self.place = [torch.zeros(len(table.weight), dtype=torch.int32, device=table.weight.device) for table in tables]

    def summed(self, found: list[Tensor | None], most: int, gather: Callable[[Tensor, Tensor], object]) -> list[Rows]:
        """Return the gradients of each table, summed over the workers, to the same bits on all of them.

        Args:
            found: autograd's gradients of this worker, None without a part of the batch.
            most: rows of any worker's part at most, the same on all of them.
            gather: writes the tensors of all workers, one after another, into its first argument.
        """
        parts = [self._once(number, gradient) for number, gradient in enumerate(found)]
        if self.world > 1:
            sent = torch.cat([F.pad(_packed(*part), (0, 0, 0, most - len(part[0]))) for part in parts], 1)
            got = sent.new_empty(self.world * most, sent.shape[1])
            gather(got, sent)
            widths = [1 + table.embedding_dim for table in self.tables]
            parts = [self._joined(number, part, most) for number, part in enumerate(got.split(widths, 1))]
        return parts

    def _once(self, number: int, gradient: Tensor | None) -> Rows:
        weight = self.tables[number].weight
        if gradient is None:
            return Rows(weight.new_zeros(0, dtype=torch.int64), weight.new_zeros(0, weight.shape[1]))
        ids, values = gradient._indices()[0], gradient._values()
        return Rows(ids, torch.zeros_like(values).index_add_(0, self._last(number, ids), values))

    def _joined(self, number: int, got: Tensor, most: int) -> Rows:
        """Return what all workers sent, added up in the order of the workers."""
        ids, values = got[:, 0].contiguous().view(torch.int32).long(), got[:, 1:]
        places, rows = self._last(number, ids), torch.zeros(values.shape, device=values.device)
        for place, value in zip(places.split(most), values.split(most), strict=True):
            rows.index_add_(0, place, value)  # of one worker a row is there once and else zero: no order of sums
        return Rows(ids, rows)

    def _last(self, number: int, ids: Tensor) -> Tensor:
        """Return the last of the places that have the same id, of each, int32 [N]."""
        place = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
        return self.place[number].scatter_reduce_(0, ids, place, "amax", include_self=False)[ids]


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
        for table, squares, (ids, rows) in zip(self.tables, self.sums, gradients, strict=True):
            square = rows.square().mean(1)
            squares.index_add_(0, ids, square)
            move = rows / (squares[ids].sqrt() + EPSILON)[:, None]
            move += self.decay * table.weight[ids] * (square > 0)[:, None]
            table.weight.index_add_(0, ids, move * -rate)

    def load(self, sums: list[Tensor]) -> None:
        """Go on from the sums of another one."""
        for mine, other in zip(self.sums, sums, strict=True):
            mine.copy_(other)


def _packed(ids: Tensor, rows: Tensor) -> Tensor:
    """Return ids (their bits) and rows in one array, float32 [N, 1 + d]."""
    return torch.cat([ids.int().view(torch.float32)[:, None], rows], 1)

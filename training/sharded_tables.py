"""Tables of ids whose rows are dealt out over the workers: each owns a part of them, with the optimizer's state of it.

Of N rows a worker owns one of W runs of neighbours, as DTensor's `Shard(0)` has them, which splits whole tables where a
training begins or goes on and joins the parts for a checkpoint and for the exported model. A step gets the rows that
its batch reads from their owners and sends their gradients back; the owner adds up what all workers sent. Nothing asks
the host for a size, so that steps can be recorded: every worker sends as many rows as any of them reads at most.

Legend: N rows of a table, W workers, R rows that any worker reads at most, d width of a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from training.read_rows import Rows, join, no_places
from training.vocabulary import ItemFeatures


class LookedUp(NamedTuple):
    """Rows of every table that came from their owners.

    Attributes:
        ids: int32 [W R, tables], what all workers asked for, one worker after another.
        rows: of each table those that this worker asked for, float32 [n, d]; n = 0 where it asked for none.
    """

    ids: Tensor
    rows: list[Tensor]

    def of(self, items: ItemFeatures, names: list[str]) -> ItemFeatures:
        """Return items with their rows of these tables."""
        return replace(items, vectors=dict(zip(names, self.rows, strict=True)))


class ShardedTables:
    """The parts that this worker owns of some tables; from now on their `weight` is this part.

    All workers make one at once, each from the same whole tables in its host's memory, and all of them call whatever
    exchanges with others.

    Args:
        tables: by the item field whose rows they are.
    """

    def __init__(self, tables: dict[str, nn.Embedding], rank: int, world: int) -> None:
        self.names, self.tables = list(tables), list(tables.values())
        self.rank, self.world = rank, world
        # Whole tables are put together in the host's memory: no device has to hold one.
        self.hosts = DeviceMesh.from_group(dist.new_group(backend="gloo"), "cpu")
        for table in self.tables:
            table.weight = nn.Parameter(self.part_of(table.weight.detach()))
        self.last: list[Tensor] = []
        self.width = sum(table.embedding_dim for table in self.tables)

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this worker's rows of a whole tensor [N, ...] of the host, which all workers have; a copy."""
        return distribute_tensor(whole, self.hosts, [Shard(0)], src_data_rank=None).to_local().clone()

    def whole_of(self, part: Tensor, rows: int) -> Tensor:
        """Return on every worker the whole tensor of these parts, in the host's memory."""
        shape = torch.Size((rows, *part.shape[1:]))
        stride, part = torch.empty(shape, device="meta").stride(), part.detach().cpu()
        parts = DTensor.from_local(part, self.hosts, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return parts.full_tensor()

    def rows_of(self, parameter: Tensor) -> int | None:
        """Return the rows of the whole table of which a parameter is a part; None if it is of none."""
        found = (table.num_embeddings for table in self.tables if table.weight is parameter)
        return next(found, None)

    @torch.no_grad()
    def looked_up(self, items: ItemFeatures | None, most: int) -> LookedUp:
        """Return the rows of some items from their owners.

        Args:
            items: what this worker wants, None for nothing.
            most: items of any worker at most, the same on all of them.
        """
        count = 0 if items is None else items.count
        device = self.tables[0].weight.device
        place_R = torch.arange(most, dtype=torch.int32, device=device)
        # What is left over asks for rows of all the table: one row's gradients would be added up in turn.
        wanted = torch.stack([place_R % table.num_embeddings for table in self.tables], 1)
        if items is not None:
            wanted[:count] = torch.stack([items.rows[name] for name in self.names], 1)
        ids = wanted.new_empty(self.world * most, len(self.tables))
        dist.all_gather_into_tensor(ids, wanted)
        # A worker that does not own a row sends any other: who asked knows the owner.
        sent = [table.weight.index_select(0, self._local(number, ids)) for number, table in enumerate(self.tables)]
        got = sent[0].new_empty(self.world * most, self.width)
        dist.all_to_all_single(got, torch.cat(sent, 1))
        parts = got.view(self.world, most, self.width).split([table.embedding_dim for table in self.tables], 2)
        owners = [column // self._each(number) for number, column in enumerate(wanted[:count].unbind(1))]
        rows = [part[owner.long(), place_R[:count].long()] for part, owner in zip(parts, owners, strict=True)]
        return LookedUp(ids, rows)

    def with_rows(self, items: ItemFeatures | None) -> ItemFeatures | None:
        """Return items with their rows from their owners; the host asks all workers how many they want."""
        wanted = torch.tensor(0 if items is None else items.count, device=self.tables[0].weight.device)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        found = self.looked_up(items, int(wanted))
        return None if items is None else found.of(items, self.names)

    @torch.no_grad()
    def summed(self, looked: LookedUp, found: list[Tensor | None]) -> list[Rows]:
        """Return the gradients of the rows that this worker owns, summed over the workers.

        Args:
            looked: what the step read. found: gradients of `looked.rows`, None without a part of the batch.
        """
        if not self.last:
            self.last = [no_places(table.weight) for table in self.tables]
        most, widths = len(looked.ids) // self.world, [table.embedding_dim for table in self.tables]
        sent = self.tables[0].weight.new_zeros(most, self.width)
        for part, gradient in zip(sent.split(widths, 1), found, strict=True):
            if gradient is not None:
                part[: len(gradient)] = gradient
        got = sent.new_empty(len(looked.ids), self.width)
        dist.all_gather_into_tensor(got, sent)
        return [self._own(number, looked.ids, part) for number, part in enumerate(got.split(widths, 1))]

    def length(self, values: list[Tensor]) -> Tensor:
        """Return the length of the gradients of whole tables, of which every worker has those of its rows."""
        square = torch.stack([some.square().sum() for some in values]).sum()
        dist.all_reduce(square)
        return square.sqrt()

    def _own(self, number: int, ids: Tensor, values: Tensor) -> Rows:
        local = self._local(number, ids)
        others = ids[:, number] // self._each(number) != self.rank
        values = values.masked_fill(others[:, None], 0)
        # One worker alone adds a row up: no other has to come to the same bits.
        out = torch.zeros(values.shape, device=values.device)
        return Rows(local[None], join(local, values, self.last[number], out)[None])

    def _each(self, number: int) -> int:
        return -(-self.tables[number].num_embeddings // self.world)

    def _local(self, number: int, ids: Tensor) -> Tensor:
        """Return which of this worker's rows the ids are, int64; of rows of others any."""
        begin, own = self.rank * self._each(number), len(self.tables[number].weight)
        return (ids[:, number] - begin).remainder(own).long()


def to_be_sharded(tables: dict[str, nn.Embedding], least: int | None, world: int) -> dict[str, nn.Embedding]:
    """Return the tables of at least so many rows, if any are to be sharded and there are several workers.

    Every worker has to own a row.
    """
    if least is None or world == 1:
        return {}
    return {name: table for name, table in tables.items() if len(table.weight) >= max(least, world**2)}

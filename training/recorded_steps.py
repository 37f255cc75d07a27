"""Training steps recorded once as CUDA graphs and replayed: one launch a step instead of hundreds of small ones.

A graph reads fixed addresses and runs what was run when it was recorded, so a batch has one of a few fixed sizes, and
what Python decides by is part of a recording's name. The step is the very function that runs without recording; batches
are padded as `training.data.Chosen.padded` says, which changes no result beyond rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

from training.data import Batch, Chosen
from training.device_batches import DeviceRows, Sizes, table_of
from training.model import fused

STEPS_AHEAD = 3  # that the host prepares while the device works


class RecordedSteps:
    """Runs a step on the batches of one worker, without the host ever waiting for the device but to stay near it.

    Args:
        users: of a batch at most.
        heads: of the attention.
        step: what a step does with a batch, on the device alone.
    """

    def __init__(self, rows: DeviceRows, users: int, heads: int, step: Callable[[Batch], None]) -> None:
        self.rows, self.users, self.heads, self.step = rows, users, heads, step
        self.recordings: dict[Hashable, tuple[Tensor, torch.cuda.CUDAGraph]] = {}
        self.seen: set[Hashable] = set()
        self.stream, self.pool = torch.cuda.Stream(rows.device), torch.cuda.graph_pool_handle()
        self.ahead: deque[torch.cuda.Event] = deque()

    def __call__(self, chosen: Chosen, phase: Hashable) -> None:
        """Take a step: as it is where such a batch comes for the first time, recorded where it comes again.

        Args:
            phase: what else the step's Python code decides by.
        """
        sizes = budget(chosen, self.users)
        padded = chosen.padded(self.users, sizes.events, sizes.targets)
        work = work_tables(padded, sizes, self.heads)
        sent = np.concatenate([part.ravel() for part in (*table_of(padded, Sizes.of(chosen)), *work)])
        shapes = [table.shape for table in work]
        bound = bool(chosen.shared_from.any())
        name = sizes, bound, phase
        self._stay_near()
        table = fused.on_device(sent, self.rows.device)
        if name not in self.seen:
            self.seen.add(name)
            self._beside(lambda: self.step(self._batch(table, sizes, shapes, bound)))
            return
        if name not in self.recordings:
            self.recordings[name] = self._recorded(table, sizes, shapes, bound)
        held, graph = self.recordings[name]
        held.copy_(table)
        graph.replay()

    def _recorded(
        self, table: Tensor, sizes: Sizes, shapes: list[tuple[int, ...]], bound: bool
    ) -> tuple[Tensor, torch.cuda.CUDAGraph]:
        """Record a step that reads the table that is returned; nothing runs."""
        held, graph = torch.empty_like(table), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            self.step(self._batch(held, sizes, shapes, bound))
        return held, graph

    def _batch(self, table: Tensor, sizes: Sizes, shapes: list[tuple[int, ...]], bound: bool) -> Batch:
        told, *tables = table.split([sum(sizes.lengths), *(int(np.prod(shape)) for shape in shapes)])
        work = fused.Work(*(part.view(shape) for part, shape in zip(tables, shapes, strict=True)))
        # A list that the step reads would be that of the recorded batch for ever: there is none to be read.
        lists = {"event_start": None, "target_start": None, "cut_offs": None, "shared_from": [int(bound)]}
        return self.rows.gathered(told, sizes, lists, padded=True, work=work)

    def _beside(self, run: Callable[[], None]) -> None:
        """Run on the stream that is recorded, so that what autograd keeps between steps is of one stream."""
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            run()
        now.wait_stream(self.stream)

    def _stay_near(self) -> None:
        """Wait until no more than a few steps are under way: tables wait in memory, and a report would come late."""
        if len(self.ahead) == STEPS_AHEAD:
            self.ahead.popleft().synchronize()
        event = torch.cuda.Event(blocking=True)
        event.record()
        self.ahead.append(event)


def budget(chosen: Chosen, users: int) -> Sizes:
    """Return the sizes that a batch of at most so many users is padded to: few for many batches."""
    real = Sizes.of(chosen)
    return Sizes(users + 2, rounded_up(real.events), rounded_up(real.targets))


def rounded_up(count: int) -> int:
    """Round up to one of eight sizes between two powers of two: at most 1/8 is padding, and sizes repeat."""
    unit = max(64, 1 << max(0, (count - 1).bit_length() - 4))
    return max(1, -(-count // unit)) * unit


def work_tables(padded: Chosen, sizes: Sizes, heads: int) -> list[np.ndarray]:
    """Return the tables of `fused.Work` for a padded batch, with idle rows up to what such sizes may need."""
    work = fused.Work.of(padded.event_start.tolist(), padded.target_start.tolist(), heads, torch.device("cpu"))
    tiles = -(-sizes.targets // fused.TILE) + sizes.users
    # A chunk is at least so long that pieces beyond the first of a tile are PIECES in all, and their rounding.
    pieces = tiles + -(-fused.PIECES // heads) + 8
    blocks = -(-sizes.events // fused.BLOCK) + sizes.users
    # A block of no event: its program reads the row before its first one.
    idle = [[0] * 5, [0] * 4, [1, 0, 0, 0, 0]]
    tables = [table.numpy() for table in (work.pieces_W5, work.tiles_X4, work.blocks_N5)]
    return [
        np.concatenate([table, np.tile(np.array(row, np.int64), (count - len(table), 1))])
        for table, row, count in zip(tables, idle, (pieces, tiles, blocks), strict=True)
    ]

"""Training steps recorded once as CUDA graphs and replayed: one launch a step instead of hundreds of small ones.

A graph reads fixed addresses and runs what was run when it was recorded, so a batch has one of a few fixed sizes, and
what Python decides by is part of a recording's name. The step is the very function that runs without recording; batches
are padded as `training.data.Chosen.padded` says, which changes no result beyond rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data import Batch, Chosen
from training.device_batches import DeviceRows, Sizes, table_of
from training.model import fused, fused_codes
from training.model.fused_codes import CodeWork
from training.model.interests.interface import Interest

STEPS_AHEAD = 3  # that the host prepares while the device works


class StepPlan(NamedTuple):
    """What a step knows of a batch in the device's memory, and what its Python code decides by.

    Attributes:
        sizes: of the batch. bound: some targets do not see their user's events from the first on.
        shapes: of the tables of `fused.Work` and `fused_codes.CodeWork`, () for a pass that does not run.
        segments: of the pass over codes. whole: it is the only pass.
    """

    sizes: Sizes
    bound: bool
    shapes: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]
    segments: int
    whole: bool


class Prepared(NamedTuple):
    """All that the host makes of a step's batch: what it knows of it, and the table that the device is sent, int64."""

    plan: StepPlan
    sent: np.ndarray


class RecordedSteps:
    """Runs a step on the batches of one worker, without the host ever waiting for the device but to stay near it.

    Args:
        users: of a batch at most.
        interest: of the model that learns.
        step: what a step does with a batch, on the device alone.
    """

    def __init__(self, rows: DeviceRows, users: int, interest: Interest, step: Callable[[Batch], None]) -> None:
        self.rows, self.users, self.interest, self.step = rows, users, interest, step
        self.recordings: dict[Hashable, tuple[Tensor, torch.cuda.CUDAGraph]] = {}
        self.seen: set[Hashable] = set()
        self.stream, self.pool = torch.cuda.Stream(rows.device), torch.cuda.graph_pool_handle()
        self.ahead: deque[torch.cuda.Event] = deque()

    def prepared(self, chosen: Chosen) -> Prepared:
        """Return what a step on this batch takes; nothing runs on the device."""
        return planned(chosen, self.users, self.interest)

    def __call__(self, prepared: Prepared, phase: Hashable) -> None:
        """Take a step: as it is where such a batch comes for the first time, recorded where it comes again.

        Args:
            phase: what else the step's Python code decides by.
        """
        plan, sent = prepared
        self._stay_near()
        table, name = fused.on_device(sent, self.rows.device), (plan, phase)
        if name not in self.seen:
            self.seen.add(name)
            self._on_its_stream(lambda: self.step(self._batch(table, plan)))
            return
        if name not in self.recordings:
            self.recordings[name] = self._recorded(table, plan)
        held, graph = self.recordings[name]
        held.copy_(table)
        graph.replay()

    def _recorded(self, table: Tensor, plan: StepPlan) -> tuple[Tensor, torch.cuda.CUDAGraph]:
        """Record a step that reads the table that is returned; nothing runs."""
        held, graph = torch.empty_like(table), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            self.step(self._batch(held, plan))
        return held, graph

    def _batch(self, table: Tensor, plan: StepPlan) -> Batch:
        shapes = [shape for tables in plan.shapes for shape in tables]
        rows, *parts = table.split([sum(plan.sizes.lengths), *(int(np.prod(shape)) for shape in shapes)])
        tables = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        work = codes = None
        if plan.shapes[0]:
            pieces, tiles, blocks = tables[:3]
            work = fused.Work(pieces, tiles, blocks, whole=not plan.shapes[1])
        if plan.shapes[1]:
            of_users, blocks, tiles = tables[-3:]
            codes = CodeWork(of_users, blocks, tiles, plan.segments, plan.whole)
        # A list that the step reads would be that of the recorded batch for ever: there is none to be read.
        lists = {"event_start": None, "target_start": None, "cut_offs": None, "shared_from": [int(plan.bound)]}
        batch = self.rows.gathered(rows, plan.sizes, lists, padded=True)
        assert batch.padding is not None
        return replace(batch, padding=replace(batch.padding, work=work, codes=codes))

    def _on_its_stream(self, run: Callable[[], None]) -> None:
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


def planned(chosen: Chosen, users: int, interest: Interest) -> Prepared:
    """Return what a step knows of a batch, padded to a budget of at most so many users, and its table."""
    real, bound, heads = Sizes.of(chosen), bool(chosen.shared_from.any()), interest.config.heads
    none = np.zeros(len(chosen.users), bool)
    coded_U = none if bound else interest.by_codes(chosen.event_start, chosen.target_start, chosen.cut_offs)
    whole, some = bool(coded_U.all()), bool(coded_U.any())
    # Segments that are left over go to the user of the targets that see nothing, who has one target at least.
    sizes = budget(chosen, users, more_targets=fused.TILE if some else 0)
    padded = chosen.padded(users, sizes.events, sizes.targets)
    coded_U = np.concatenate([coded_U, np.full(sizes.users - len(coded_U), whole)])
    coded_U[-1] = some
    segments = int(padded.cut_offs[coded_U].sum())
    padded.cut_offs[-1] = rounded_up(segments) - segments if some else 0
    work = () if some and whole else work_tables(padded, sizes, heads, ~coded_U)
    codes = code_tables(padded, sizes, coded_U) if some else ()
    sent = np.concatenate([part.ravel() for part in (*table_of(padded, real), *work, *codes)])
    shapes = tuple(table.shape for table in work), tuple(table.shape for table in codes)
    return Prepared(StepPlan(sizes, bound, shapes, rounded_up(segments) if some else 0, some and whole), sent)


def budget(chosen: Chosen, users: int, more_targets: int = 0) -> Sizes:
    """Return the sizes that a batch of at most so many users is padded to: few for many batches."""
    real = Sizes.of(chosen)
    return Sizes(users + 2, rounded_up(real.events), rounded_up(real.targets) + more_targets)


def rounded_up(count: int) -> int:
    """Round up to one of eight sizes between two powers of two: at most 1/8 is padding, and sizes repeat."""
    unit = max(64, 1 << max(0, (count - 1).bit_length() - 4))
    return max(1, -(-count // unit)) * unit


def work_tables(padded: Chosen, sizes: Sizes, heads: int, chosen_U: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the tables of `fused.Work` for a padded batch, with idle rows up to what such sizes may need."""
    starts = padded.event_start.tolist(), padded.target_start.tolist()
    work = fused.Work.of(*starts, heads, torch.device("cpu"), chosen_U)
    tiles = -(-sizes.targets // fused.TILE) + sizes.users
    # A chunk is at least so long that pieces beyond the first of a tile are PIECES in all, and their rounding.
    pieces = tiles + -(-fused.PIECES // heads) + 8
    blocks = -(-sizes.events // fused.BLOCK) + sizes.users
    # A block of no event: its program reads the row before its first one.
    idle = [[0] * 5, [0] * 4, [1, 0, 0, 0, 0]]
    return _filled([work.pieces_W5, work.tiles_X4, work.blocks_N5], idle, [pieces, tiles, blocks])


def code_tables(padded: Chosen, sizes: Sizes, chosen_U: np.ndarray) -> list[np.ndarray]:
    """Return the tables of `fused_codes.CodeWork` for a padded batch, with idle rows."""
    lists = padded.event_start.tolist(), padded.target_start.tolist(), padded.cut_offs.tolist()
    work = CodeWork.of(*lists, chosen_U, torch.device("cpu"))
    blocks = -(-sizes.events // fused_codes.BLOCK) + sizes.users
    tiles = -(-sizes.targets // fused_codes.BY_TARGET["P"]) + sizes.users
    idle = [[0] * 5, [0] * 3, [0] * 3]
    return _filled([work.users_V5, work.blocks_N3, work.tiles_X3], idle, [sizes.users, blocks, tiles])


def _filled(tables: list[Tensor], idle: list[list[int]], counts: list[int]) -> list[np.ndarray]:
    """Return tables with idle rows up to their counts."""
    return [
        np.concatenate([table.numpy(), np.tile(np.array(row, np.int64), (count - len(table), 1))])
        for table, row, count in zip(tables, idle, counts, strict=True)
    ]

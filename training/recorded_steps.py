"""Training steps recorded once as CUDA graphs and replayed: one launch a step instead of hundreds of small ones.

A graph reads fixed addresses and runs what was run when it was recorded, so a batch has one of a few fixed sizes, and
what Python decides by is part of a recording's name. The step is the very function that runs without recording; batches
are padded as `training.data.Chosen.padded` says, which changes no result beyond rounding.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data import Batch, Chosen
from training.device_batches import DeviceRows, Sizes
from training.model import fused, fused_codes
from training.model.fused_codes import CodeWork
from training.model.interests.interface import Interest

STEPS_AHEAD = 8  # that the host prepares while the device works: reviving codes takes it as long as some steps do
POLL_S = 1e-4


class StepTakesTooLong(RuntimeError):
    """A step did not end in time."""


class StepPlan(NamedTuple):
    """What a step knows of a batch in the device's memory, and what its Python code decides by.

    Attributes:
        sizes: of the batch. bound: some targets do not see their user's events from the first on.
        shapes: of the tables of `fused.Work` and `fused_codes.CodeWork`, () for a pass that does not run.
        segments: of the pass over codes. whole: it is the only pass.
        most_rows: of items that any worker's part of the global batch reads at most; 0: no step asks for it.
    """

    sizes: Sizes
    bound: bool
    shapes: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]
    segments: int
    whole: bool
    most_rows: int


class Prepared(NamedTuple):
    """All that the host makes of a step's batch: what it knows of it, and the table that the device is sent, int64."""

    plan: StepPlan
    sent: np.ndarray


class RecordedSteps:
    """Runs a step on the batches of one worker, without the host ever waiting for the device but to stay near it.

    Args:
        users: of a batch at most.
        interest: of the model that learns.
        step: what a step does with a batch, and with the rows that any worker's part reads at most, on the device
            alone; exchanges with other GPUs are recorded with it.
        by_rows: the step exchanges rows of items with other GPUs.
        patience_s: the longest that a step may take; None: it is waited for as long as it takes.
    """

    def __init__(
        self,
        rows: DeviceRows,
        users: int,
        interest: Interest,
        step: Callable[[Batch, int], None],
        by_rows: bool = False,
        patience_s: float | None = None,
    ) -> None:
        self.rows, self.users, self.interest, self.step = rows, users, interest, step
        self.by_rows, self.patience_s = by_rows, patience_s
        self.recordings: dict[Hashable, tuple[Tensor, torch.cuda.CUDAGraph]] = {}
        self.seen: set[Hashable] = set()
        self.stream, self.pool = torch.cuda.Stream(rows.device), torch.cuda.graph_pool_handle()
        self.ahead: deque[torch.cuda.Event] = deque()

    def prepared(self, chosen: Chosen, shares_W2: np.ndarray | None = None) -> Prepared:
        """Return what a step on this batch takes; nothing runs on the device.

        Args:
            shares_W2: targets and events of every worker's part; None: there is no other worker.
        """
        return planned(chosen, self.users, self.interest, self.rows, shares_W2, self.by_rows)

    def __call__(self, prepared: Prepared, phase: Hashable, begins: Callable[[], None] = lambda: None) -> None:
        """Take a step: as it is where such a batch comes for the first time, recorded where it comes again.

        Args:
            phase: what else the step's Python code decides by.
            begins: called when all that is left to do is to launch the step.

        Raises:
            StepTakesTooLong: longer than `patience_s`.
        """
        plan, sent = prepared
        self._stay_near()
        table, name = fused.on_device(sent, self.rows.device), (plan, phase)
        if name not in self.seen:
            self.seen.add(name)
            begins()
            self._on_its_stream(lambda: self.step(self._batch(table, plan), plan.most_rows))
            return
        if name not in self.recordings:
            self.recordings[name] = self._recorded(table, plan)
        held, graph = self.recordings[name]
        held.copy_(table)
        begins()
        graph.replay()

    def _recorded(self, table: Tensor, plan: StepPlan) -> tuple[Tensor, torch.cuda.CUDAGraph]:
        """Record a step that reads the table that is returned; nothing runs."""
        held, graph = torch.empty_like(table), torch.cuda.CUDAGraph()
        # What other threads ask the device (NCCL's watchdog does) is no part of it.
        with _no_collection(), torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            self.step(self._batch(held, plan), plan.most_rows)
        return held, graph

    def _batch(self, table: Tensor, plan: StepPlan) -> Batch:
        shapes = [shape for tables in plan.shapes for shape in tables]
        rows, *parts = table.split([sum(self.rows.lengths(plan.sizes)), *(int(np.prod(shape)) for shape in shapes)])
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
            self._wait_for(self.ahead.popleft())
        event = torch.cuda.Event(blocking=True)
        event.record()
        self.ahead.append(event)

    def _wait_for(self, event: torch.cuda.Event) -> None:
        if self.patience_s is None:
            event.synchronize()
            return
        end = time.monotonic() + self.patience_s
        while not event.query():
            if time.monotonic() > end:
                raise StepTakesTooLong(f"a step has not ended within {self.patience_s:.0f} s")
            time.sleep(POLL_S)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage: an older recording among it would be freed, which ends the one that is made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def planned(
    chosen: Chosen,
    users: int,
    interest: Interest,
    rows: DeviceRows,
    shares_W2: np.ndarray | None = None,
    by_rows: bool = False,
) -> Prepared:
    """Return what a step knows of a batch, padded to a budget of at most so many users, and its table.

    Args:
        shares_W2: targets and events of every worker's part; None: there is no other worker.
        by_rows: the step exchanges rows of items.
    """
    real, bound, heads = Sizes.of(chosen), bool(chosen.shared_from.any()), interest.config.heads
    mine = np.array([real.targets, real.events], np.int64)
    shares_W2 = mine[None] if shares_W2 is None else shares_W2
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
    counts = np.concatenate([mine, shares_W2.sum(0)])
    sent = np.concatenate([part.ravel() for part in (*rows.table_of(padded, counts), *work, *codes)])
    shapes = tuple(table.shape for table in work), tuple(table.shape for table in codes)
    segments = rounded_up(segments) if some else 0
    most = most_rows(shares_W2) if by_rows else 0
    return Prepared(StepPlan(sizes, bound, shapes, segments, some and whole, most), sent)


def most_rows(shares_W2: np.ndarray) -> int:
    """Return the rows of items that any worker's part of a batch reads at most, padding included.

    Args:
        shares_W2: targets and events of every worker's part.
    """
    targets, events = shares_W2.max(0).tolist()
    most = rounded_up(events) + rounded_up(targets) + fused.TILE
    unit = 1 << max(6, most.bit_length() - 3)  # few sizes: a step is recorded anew for each
    return -(-most // unit) * unit


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
    tiles = -(-sizes.targets // fused.TILE) + sizes.users
    # A chunk is at least so long that pieces beyond the first of a tile are PIECES in all, and their rounding.
    pieces = tiles + -(-fused.PIECES // heads) + 8
    blocks = -(-sizes.events // fused.BLOCK) + sizes.users
    rows = pieces, tiles, blocks
    return fused.work_tables(padded.event_start, padded.target_start, heads, chosen_U, rows)


def code_tables(padded: Chosen, sizes: Sizes, chosen_U: np.ndarray) -> list[np.ndarray]:
    """Return the tables of `fused_codes.CodeWork` for a padded batch, with idle rows."""
    blocks = -(-sizes.events // fused_codes.BLOCK) + sizes.users
    tiles = -(-sizes.targets // fused_codes.BY_TARGET["P"]) + sizes.users
    rows = sizes.users, blocks, tiles
    return fused_codes.code_tables(padded.event_start, padded.target_start, padded.cut_offs, chosen_U, rows)

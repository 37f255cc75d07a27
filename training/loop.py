"""Train one model: the loop knows torch.distributed when it is there, and neither Ray, MLflow nor Airflow."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from etl.warehouse.schemas import TRAIN
from training.config import TrainConfig
from training.data import Batch, Chosen, Joined, Sequences, Split, split_targets, trained_rows
from training.device_batches import Asked, DeviceRows, ahead
from training.device_time import DeviceTime
from training.floor import Counts, card_of, least_ms
from training.model.fused import on_device
from training.model.probe import probe_by_length, probe_warnings, shared_information
from training.model.ranker import FieldSizes, Ranker
from training.package import inherit
from training.read_rows import RowGradients, Rows, RowwiseAdagrad, put, read_in_part, take_back
from training.recorded_steps import Prepared, RecordedSteps, StepTakesTooLong, most_rows
from training.sharded_tables import LookedUp, ShardedTables, to_be_sharded
from training.user_batches import Epoch, UserBatches
from training.vocabulary import ItemFeatures, Vocabulary

T = TypeVar("T")
# Each worker records its exchanges at steps of its own; NCCL would have all of them agree on buffers whenever one does.
os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
# Exchanges follow each other on one stream, recorded or not; letting them overlap would cost 2 % of a step.
os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")
# A pass over the targets begins with dealing out those of many users: with 256 targets a visit it takes as long as
# 100 steps.
TABLES_AHEAD = 128  # that a thread makes before they are asked for; one is 20 kB to 1 MB
BATCHES_AHEAD = 24  # the same of tables with their rows, 2 to 20 MB each with 32 or 64 users
LONGEST_STEP_S = 600.0  # of a recorded step whose exchange waits for another worker, which nothing else watches


@dataclass(frozen=True)
class TrainingData:
    """What every model of a run is trained on."""

    joined: Joined
    vocabulary: Vocabulary
    split: Split

    @staticmethod
    def of(sequences: Sequences, items: pa.Table, config: TrainConfig, known: Vocabulary | None = None) -> TrainingData:
        """Return the data of a partition with its vocabulary, or with a warm start's, which the partition
        appends to."""
        train = np.flatnonzero(sequences.target_split == TRAIN)
        trained = np.unique(np.searchsorted(sequences.target_start, train, side="right") - 1)
        fields = [np.array(values, dtype=object)[trained] for values in zip(*sequences.user_fields, strict=True)]
        contexts = sequences.target_context[train]
        make = Vocabulary.build if known is None else known.appended
        vocabulary = make(items, fields, contexts, config.vocabulary)
        split = split_targets(sequences, config.validation_share, config.seed)
        return TrainingData(Joined.of(sequences, items, vocabulary), vocabulary, split)

    def hashed_event_share(self) -> float:
        """Return the share of the history events whose items share hashed rows."""
        rare = self.vocabulary.item_ids.is_hashed(self.joined.items.rows["item_id"])
        history = self.joined.sequences.history_item
        return float(rare[history].mean()) if len(history) else 0.0


@dataclass(frozen=True)
class Worker:
    """This process among the data-parallel workers."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"


class WorkerLostError(RuntimeError):
    """Another worker of the group no longer answers: no fault of this one, and the same command may succeed."""


@dataclass
class EpochResult:
    """What an epoch came to, the same on every worker.

    Attributes:
        metrics: of the epoch.
        best_logloss, best_epoch: the best validation log loss so far.
        finished: no further epoch follows.
        warnings: what the probe of the codebooks finds wrong, in words.
    """

    epoch: int
    metrics: dict[str, float]
    best_logloss: float
    best_epoch: int
    finished: bool
    warnings: list[str] = field(default_factory=list)


@dataclass
class TrainingState:
    """Where a training stands between two steps: with it, it goes on to the bits that it would have come to.

    No generator belongs to it: order and draws are functions of seed, epoch and user, every other stream of seed, step
    and rank.

    Attributes:
        step: steps of all epochs; epoch, position: the next batch.
        totals: of the epoch so far, of all workers, as `_StepSums.totals`.
        model, optimizer: their states; codebook statistics and the end of the warm-up are buffers of the model.
        row_sums: of the tables that row-wise Adagrad moves, as `RowwiseAdagrad.sums`.
        best_model: at the best validation log loss so far, None before the first that counts.
    """

    step: int
    epoch: int
    position: int
    totals: Tensor
    model: dict
    optimizer: dict
    row_sums: list[Tensor]
    best_model: dict | None
    best_logloss: float
    best_epoch: int


@dataclass(frozen=True)
class Start:
    """What a training begins with; by default nothing.

    Attributes:
        resume: a state of this very training; the number of workers may be another.
        warm_start: an older model and its vocabulary: this one begins with its weights, and its codebooks need no
            warm-up.
    """

    resume: TrainingState | None = None
    warm_start: tuple[Ranker, Vocabulary] | None = None


COLD = Start()


class _Ready(NamedTuple):
    """What the host makes of a step.

    Attributes:
        order: of the epoch that it is a step of.
        read: what it is to read, None without a part of the batch.
        shares_W2: targets and events of every worker's part.
        items: some of the whole global batch, where dead codes are revived behind the step.
        least_ms: the floor of this worker's part, 0 where none is counted.
    """

    order: Epoch
    read: Batch | Asked | Prepared | None
    shares_W2: np.ndarray
    items: np.ndarray | None
    least_ms: float


class Taken(NamedTuple):
    """What the steps of this process came to, of all workers but for the times.

    Attributes:
        loss: of the task, summed over the targets; codebook_loss: commitment and codebook loss, summed over the events.
        targets, events: that the steps read; an event of the history counts once for each step that reads it.
        working_ms, waiting_ms: of this worker's CUDA device, as `DeviceTime` has them; 0 on a CPU.
        least_ms: the floor of this worker's steps, as `training.floor` counts it; 0 where it does not.
    """

    loss: float
    codebook_loss: float
    targets: float
    events: float
    working_ms: float = 0.0
    waiting_ms: float = 0.0
    least_ms: float = 0.0


def train_model(
    name: str,
    data: TrainingData,
    config: TrainConfig,
    worker: Worker,
    on_epoch: Callable[[EpochResult], None],
    on_step: Callable[[Training], None] | None = None,
    start: Start = COLD,
) -> tuple[Ranker, EpochResult]:
    """Train `config.models[name]` with early stop; every worker ends with the same best weights.

    The gradient of a step is that of the loss over the whole global batch, whoever computes which part of it. On a CPU
    the same command comes to the same bits every time; other numbers of workers come to the same weights within
    rounding, dropout aside.

    Args:
        on_epoch: called on every worker after each epoch.
        on_step: called on every worker after each step, with the training as it stands.

    Raises:
        FloatingPointError: the loss is not finite.
        WorkerLostError: another worker no longer answers.
    """
    run = Training(name, data, config, worker, start)
    try:
        for _epoch in range(run.epoch, config.epochs):
            result = run.run_epoch(on_step)
            on_epoch(result)
            if result.finished:
                break
    finally:
        run.close()
    if run.best_model is None:
        raise FloatingPointError(f"the validation loss of {name} is not finite")
    run.model.load_state_dict(run.best_model)
    run.join_tables()
    if start.warm_start is None:  # rows that this partition does not show were trained by an earlier one
        _fill_unseen_rows(run.model, data)
    return run.model.eval(), result


class Training:
    """A training of one model on this worker, between two steps of it.

    Attributes:
        step: steps of all epochs; epoch, position: the next batch.
        totals: of the epoch so far, of all workers, as `_StepSums.totals`.
        before: the same of the epochs before it that this process took part in, on the CPU.
        card: what the device can do, None where its datasheet is not known; moved: parameters that AdamW moves.
        least_ms: the floor of the steps that this process took.
    """

    def __init__(self, name: str, data: TrainingData, config: TrainConfig, worker: Worker, start: Start) -> None:
        self.name, self.data, self.config, self.worker = name, data, config, worker
        _make_repeatable(config, worker)
        self.model = Ranker(FieldSizes.of(data.vocabulary), config.models[name])
        if start.warm_start is not None:
            inherit(self.model, data.vocabulary, *start.warm_start)
        self.sharded = self._sharded()
        self.model.to(worker.device)
        if config.compiled:
            self.model.compile()
        in_part = _read_in_part(self.model, data.joined, config)
        self.sums = _StepSums(self.model, worker, in_part, self.sharded)
        self.row_wise = None
        if config.table_learning_rate is not None:
            self.row_wise = RowwiseAdagrad(self.sums.tables, config.weight_decay)
        else:
            self.sums.keep_whole_gradients()
        groups = _parameter_groups(self.model, config)
        self.optimizer = torch.optim.AdamW(groups, fused=worker.device != "cpu")
        self._fit_optimizer()
        self.batches = UserBatches(data.joined, worker.rank, worker.world, config.users_per_step, config.seed)
        self.rows = DeviceRows.on_gpu(data.joined, torch.device(worker.device))
        if self.rows is not None:
            self.batches.make = self.rows.make_batch
        self.recorded = self._recorded()
        self.totals = torch.zeros_like(self.sums.totals)
        self.before = torch.zeros_like(self.totals, device="cpu")
        self.device_time = DeviceTime() if worker.device != "cpu" else None
        self.card, self.least_ms = card_of(worker.device), 0.0
        self.moved = sum(p.numel() for group in groups for p in group["params"])
        self.best_model: dict | None = None
        self.best_logloss, self.best_epoch = float("inf"), -1
        self.step = self.epoch = self.position = 0
        self._order = epoch_of(self.batches, data, config, 0)
        self._ready: Generator[_Ready, None, None] | None = None  # what the steps to come are to read
        if start.resume is not None:
            self._go_on_from(start.resume)

    def _sharded(self) -> ShardedTables | None:
        """Deal out the rows of the large tables over the workers, where the configuration wants it."""
        tables = zip(self.data.vocabulary.items, self.model.items.tables, strict=True)
        of_ids = {name: table for name, table in tables if table in self.model.items.of_ids()}
        chosen = to_be_sharded(of_ids, self.config.sharded_from_rows, self.worker.world)
        return ShardedTables(chosen, self.worker.rank, self.worker.world) if chosen else None

    def join_tables(self) -> None:
        """Have whole tables in the model, which is then the host's, where they were sharded."""
        if self.sharded is None:
            return
        self.model.cpu()
        with _answered(self.worker):
            for table in self.sharded.tables:
                table.weight = nn.Parameter(self.sharded.whole_of(table.weight, table.num_embeddings))

    def _recorded(self) -> RecordedSteps | None:
        """Return what records steps, where that is possible: on a GPU, if nothing is compiled and no bit has to be the
        same in every run."""
        config, model, rows = self.config, self.model, self.rows
        if rows is None or config.compiled or config.deterministic or not model.interest.reads_tensors_alone():
            return None
        several = self.worker.world > 1
        by_rows, patience_s = several and bool(self.sums.tables), LONGEST_STEP_S if several else None
        return RecordedSteps(rows, config.users_per_step, model.interest, self._learn, by_rows, patience_s)

    def _fit_optimizer(self) -> None:
        """Let the optimizer's groups, which may be of another kind of device, suit this one; its rate is set anew."""
        on_gpu = self.worker.device != "cpu"
        self.rate = torch.zeros((), device=self.worker.device)
        for group in self.optimizer.param_groups:
            group["fused"] = group["capturable"] = on_gpu
            group["lr"] = self.rate if on_gpu else 0.0

    def _set_rate(self, rate: float) -> None:
        """Set the learning rate, on a GPU in its memory: a recorded step reads it there."""
        self.rate.fill_(rate)
        if self.worker.device != "cpu":
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _go_on_from(self, state: TrainingState) -> None:
        if self.sharded is not None:
            part_of = self.sharded.part_of
            state = self._of_tables(state, lambda tensor, _rows: part_of(tensor))
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        self._fit_optimizer()
        if self.row_wise is not None:
            self.row_wise.load(state.row_sums)
        self.totals.copy_(state.totals)
        self.best_model, self.best_logloss, self.best_epoch = state.best_model, state.best_logloss, state.best_epoch
        self.step, self.epoch, self.position = state.step, state.epoch, state.position

    def close(self) -> None:
        """Make no further batches, and free what was recorded: a group of workers is not left before, and waits for it
        for ever.
        """
        if self._ready is not None:
            self._ready.close()
            self._ready = None
        if self.recorded is not None:
            self.recorded.recordings.clear()

    def state(self) -> TrainingState:
        """Copy the state to the CPU; where tables are sharded, all workers do at once, and only the first one gets
        whole tables.

        Raises:
            WorkerLostError: another worker no longer answers.
        """
        model, optimizer = _on_cpu(self.model.state_dict()), _on_cpu(self.optimizer.state_dict())
        row_sums = _on_cpu(self.row_wise.sums) if self.row_wise is not None else []
        best = self.best_model, self.best_logloss, self.best_epoch
        where = self.step, self.epoch, self.position
        state = TrainingState(*where, _on_cpu(self.totals), model, optimizer, row_sums, *best)
        if self.sharded is None:
            return state
        with _answered(self.worker):
            return self._of_tables(state, self._joined)

    def _joined(self, part: Tensor, rows: int) -> Tensor:
        assert self.sharded is not None
        whole = self.sharded.whole_of(part, rows)
        return whole if self.worker.rank == 0 else whole[:0].clone()

    def _of_tables(self, state: TrainingState, change: Callable[[Tensor, int], Tensor]) -> TrainingState:
        """Return a state whose tensors of sharded tables are changed; `change` is told the rows of each table."""
        assert self.sharded is not None
        rows = {name: self.sharded.rows_of(weight) for name, weight in self.model.named_parameters()}
        moved = [self.sharded.rows_of(p) for group in self.optimizer.param_groups for p in group["params"]]
        sums = [self.sharded.rows_of(table.weight) for table in self.sums.tables]

        def changed(tensor: Tensor, whole: int | None) -> Tensor:
            return tensor if whole is None or tensor.dim() == 0 else change(tensor, whole)

        def of_model(model: dict) -> dict:
            return {name: changed(tensor, rows.get(name)) for name, tensor in model.items()}

        moments = {
            number: {name: changed(moment, moved[number]) for name, moment in each.items()}
            for number, each in state.optimizer["state"].items()
        }
        return replace(
            state,
            model=of_model(state.model),
            optimizer=state.optimizer | {"state": moments},
            row_sums=[changed(tensor, whole) for tensor, whole in zip(state.row_sums, sums, strict=False)],
            best_model=None if state.best_model is None else of_model(state.best_model),
        )

    def taken(self) -> Taken:
        """Return what the steps so far came to: only differences between two calls mean anything in a training that
        goes on. Waits for the device."""
        sums = (self.before + self.totals.cpu()).tolist()
        if self.device_time is not None:
            sums += self.device_time.spent_ms()
        return Taken(*sums)._replace(least_ms=self.least_ms)

    def order(self, epoch: int) -> Epoch:
        """Return the batches of an epoch."""
        return self._order.of(epoch)

    @property
    def planned_steps(self) -> int:
        """Steps of all epochs, if none of them is the last one before its time."""
        return self.config.epochs * len(self._order)

    def warmup_steps(self) -> int:
        return min(self.config.warmup_steps, self.planned_steps // 2)

    def run_epoch(self, on_step: Callable[[Training], None] | None) -> EpochResult:
        """Take the steps that the epoch still has, and judge it.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        began, before = time.perf_counter(), Taken(*self.totals.tolist())
        waited = 0.0
        self.model.train()
        if self.device_time is not None:
            self.device_time.pause()
        if self._ready is None:
            self._ready = self._upcoming()
        while self.position < len(self._order):
            mark = time.perf_counter()
            ready = next(self._ready)
            waited += time.perf_counter() - mark
            self._take_step(ready)
            if on_step is not None:
                on_step(self)
        sums = Taken(*self.totals.tolist())
        train_loss = sums.loss / sums.targets if sums.targets else float("nan")
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss of {self.name} is not finite in epoch {self.epoch}")
        seconds = time.perf_counter() - began
        speed = {
            "samples_per_s": (sums.targets - before.targets) / seconds,
            "data_wait_share": waited / seconds,
            "epoch_seconds": seconds,
        }
        losses = {"train_loss": train_loss}
        if self.model.coded is not None:
            losses["train_codebook_loss"] = sums.codebook_loss / max(1.0, sums.events)
        return self._judged(losses, speed)

    def _upcoming(self) -> Generator[_Ready, None, None]:
        """Yield what the steps to come are to read, of this epoch and of all behind it.

        All that the host does for a step; where the rows lie on the device, nothing of what that does. Another thread
        makes it ahead of the steps: it has begun the next epoch when this one ends and is judged.
        """
        sequences, device = self.data.joined.sequences, self.worker.device

        def places() -> Iterator[tuple[Epoch, int, int]]:
            step, position = self.step, self.position
            for epoch in range(self.epoch, self.config.epochs):
                order = self.order(epoch)
                for number in range(position, len(order)):
                    step += 1
                    yield order, number, step
                position = 0

        def made(place: tuple[Epoch, int, int]) -> _Ready:
            order, number, step = place
            shares_W2 = order.shares(number)
            items = self._to_revive(order, number, step)
            if self.rows is None:
                batch = order[number]
                return _Ready(order, None if batch is None else batch.to(device), shares_W2, items, least_ms=0.0)
            users, targets = order.visited(number)
            chosen = Chosen.of(sequences, users, targets) if len(users) else None
            least_ms = self._least_ms(chosen)
            read: Asked | Prepared | None = None
            if chosen is not None and self.recorded is not None:
                read = self.recorded.prepared(chosen, shares_W2)
            elif chosen is not None:
                read = self.rows.asked(chosen)
            return _Ready(order, read, shares_W2, items, least_ms)

        if self.rows is None:  # a CPU's steps need its cores: what they read is read when it is wanted
            yield from map(made, places())
        else:
            yield from ahead(made, places(), TABLES_AHEAD if self.rows.resident else BATCHES_AHEAD)

    def _least_ms(self, chosen: Chosen | None) -> float:
        """Return the floor of a step on this worker's part of a batch; 0 where none is counted."""
        if self.card is None or chosen is None:
            return 0.0
        counts = Counts.of_chosen(chosen)
        of_products = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        precision = "bf16" if self.config.bf16 else of_products
        return least_ms(self.card, counts, self.model.interest.config, precision, self.moved) or 0.0

    def _take_step(self, ready: _Ready) -> None:
        begins = self.device_time.begin if self.device_time is not None else lambda: None
        # The stream of dropout: each worker's own, the same after a restart.
        _seed(_stream(self.config.seed, self.step, self.worker.rank), self.worker.device)
        self._set_rate(learning_rate(self.config, self.step, self.planned_steps))
        read = ready.read
        if isinstance(read, Prepared):
            assert self.recorded is not None
            try:
                started = self.model.coded is not None and self.model.coded.quantizer.is_started()
                self.recorded(read, started, begins)
            except StepTakesTooLong as error:  # it exchanges sums: another worker is gone, or hangs
                raise WorkerLostError(f"worker {self.worker.rank} waits for another one in vain: {error}") from error
        else:
            if isinstance(read, Asked):
                assert self.rows is not None
                table = on_device(read.table, self.rows.device)
                begins()
                read = self.rows.gathered(table, read.sizes, read.lists)
            else:
                begins()
            mine, counts = ready.shares_W2[self.worker.rank], ready.shares_W2.sum(0)
            count = on_device(np.concatenate([mine, counts]).astype(np.float32), self.rate.device)
            self._move(read, count, most_rows(ready.shares_W2))
        self.step += 1
        self.least_ms += ready.least_ms
        self._tend_codebooks(ready.order, ready.items)
        self.position += 1
        if self.device_time is not None:
            self.device_time.end()

    def _learn(self, batch: Batch, most: int) -> None:
        """Move the weights by a batch that says what counts of it, as a recorded step does."""
        assert batch.padding is not None
        self._move(batch, batch.padding.count, most)

    def _move(self, batch: Batch | None, count: Tensor, most: int) -> None:
        """Move the weights by this worker's part of a global batch; of the host nothing but the batch is read.

        Args:
            count: as `training.data.Padding` has it.
            most: rows of items that any worker's part reads at most.
        """
        self.sums.of(batch, count, most, self.config.bf16)
        self.totals += self.sums.totals
        self.sums.clip(self.config.gradient_clip)
        if self.row_wise is not None:
            assert self.config.table_learning_rate is not None
            ratio = self.config.table_learning_rate / self.config.learning_rate
            self.row_wise.step(self.sums.read, self.rate * ratio)
            self.optimizer.step()
        else:
            with self.sums.whole_gradients():
                self.optimizer.step()
        if self.model.coded is not None and self.model.coded.quantizer.is_started():
            self.model.coded.quantizer.move_averages()

    @torch.no_grad()
    def _tend_codebooks(self, order: Epoch, items: np.ndarray | None) -> None:
        """Start codebooks after warm-up, revive dead codes; all workers hold bit-identical codebooks.

        Starts and revivals draw from the items of the whole global batch, by a generator that all workers share.

        Args:
            items: of a revival behind this step, as `_to_revive` has them.
        """
        coded, worker = self.model.coded, self.worker
        if coded is None:
            return
        quantizer = coded.quantizer
        starting = not quantizer.is_started()
        if starting and self.step >= self.warmup_steps():
            items = order.items(self.position)
        elif starting or items is None:
            return
        seed = _stream(self.config.seed, self.step)
        _seed(seed, worker.device)
        generator = torch.Generator().manual_seed(seed)
        keys_NHd = coded.keys(self.model.items(self._features(items)))
        # Sums of a GPU differ in their last bits, from one to another too.
        if starting:
            quantizer.start_from_keys(keys_NHd, generator)
            averages = [] if quantizer.ema_decay is None else [quantizer.average_GCk]
            self._take_from_first(quantizer.codebook_GCw.data, quantizer.usage_GC, *averages)
        else:
            self._take_from_first(keys_NHd)
            quantizer.revive(keys_NHd, generator)

    def _take_from_first(self, *tensors: Tensor) -> None:
        """Have what the first worker has in some tensors."""
        if self.worker.world > 1:
            with _answered(self.worker):
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def _to_revive(self, order: Epoch, number: int, step: int) -> np.ndarray | None:
        """Return some of a global batch's items, to whose keys dead codes are moved behind so many steps; None: in no
        such step.

        As many as a group has codes at most: each is drawn from all, and keys of all would take as long as a step.
        """
        coded = self.model.coded
        if coded is None or step % self.config.revive_every_steps:
            return None
        items, most = order.items(number), coded.quantizer.codes
        draws = np.random.default_rng([self.config.seed, step])
        return draws.choice(items, most, replace=False) if len(items) > most else items

    def _features(self, items: np.ndarray) -> ItemFeatures:
        """Return the features of some of the partition's items on the device."""
        if self.rows is None:
            features = self.data.joined.items.take(items).to(self.worker.device)
        else:
            features = self.rows.items.take(on_device(items, self.rows.device))
        if self.sharded is None:
            return features
        with _answered(self.worker):
            return self.sharded.looked_up(features, len(items)).of(features, self.sharded.names)

    def _with_rows(self, batch: Batch | None) -> Batch | None:
        """Return a batch on the device that has its rows of sharded tables, which all workers ask for at once."""
        batch = None if batch is None else batch.to(self.worker.device)
        if self.sharded is None:
            return batch
        with _answered(self.worker):
            items = self.sharded.with_rows(None if batch is None else batch.items)
        return None if batch is None or items is None else replace(batch, items=items)

    def _validated(self) -> Iterator[Batch]:
        """Yield this worker's batches of the validation targets."""
        batches = self.batches.all_of(self.data.split.validation)
        for _ in range(self.batches.most_of(self.data.split.validation)):
            if (batch := self._with_rows(next(batches, None))) is not None:
                yield batch

    def _judged(self, metrics: dict[str, float], speed: dict[str, float]) -> EpochResult:
        """Return the result of the epoch whose last step was taken, and go to the next one."""
        config, epoch, model = self.config, self.epoch, self.model
        validation = _validation_logloss(model, self._validated(), self.worker)
        # A model of the warm-up has exact keys: it is not what will be served, so it is never the best.
        ready = model.coded is None or bool(model.coded.quantizer.started)
        if ready and validation < self.best_logloss - 1e-5:
            # In the host's memory: a GPU's is for tables that are trained.
            self.best_model, self.best_logloss, self.best_epoch = _on_cpu(model.state_dict()), validation, epoch
        finished = epoch + 1 == config.epochs or (self.best_epoch >= 0 and epoch - self.best_epoch >= config.patience)
        metrics = metrics | {"validation_logloss": validation} | speed
        warnings: list[str] = []
        if model.coded is not None:
            some = self._with_rows(next(self.batches.all_of(self.data.split.validation), None))
            codebook, warnings = _codebook_metrics(model, some)
            metrics |= codebook
        self.before += self.totals.cpu()
        self.totals.zero_()
        self.epoch, self.position = epoch + 1, 0
        return EpochResult(epoch, metrics, self.best_logloss, self.best_epoch, finished, warnings)


def epoch_of(batches: UserBatches, data: TrainingData, config: TrainConfig, number: int) -> Epoch:
    """Return the batches of an epoch as the configuration has it."""
    bounds = config.min_epoch_steps, config.max_epoch_steps
    return batches.epoch(data.split.train, number, config.targets_per_visit, *bounds)


def learning_rate(config: TrainConfig, step: int, planned: int) -> float:
    """Return the rate of a step, which hangs on nothing else: a training that goes on needs no state for it.

    Args:
        step: from 0; planned: steps of all epochs.
    """
    rising = min(config.learning_rate_warmup_steps, planned // 2)  # else a short training never has its rate
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    gone = min(1.0, (step - rising) / max(1, planned - rising))
    share = config.learning_rate_end + (1 - config.learning_rate_end) * (1 + math.cos(math.pi * gone)) / 2
    return config.learning_rate * share


def _seed(seed: int, device: str) -> None:
    """Seed what dropout draws from on a device: `torch.manual_seed` seeks every kind of device, .3 ms a step."""
    if device == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.cuda.manual_seed(seed)


def _make_repeatable(config: TrainConfig, worker: Worker) -> None:
    """Let the same command come to the same bits: always on a CPU, on a GPU where the configuration asks for it."""
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's first product is made
    # Threads of a CPU add up the gradient of a gather in whatever order they come, unless asked not to.
    torch.use_deterministic_algorithms(config.deterministic or worker.device == "cpu")
    # It costs time, and nothing reads it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@torch.no_grad()
def _fill_unseen_rows(model: Ranker, data: TrainingData) -> None:
    """Give every embedding row that no training target read the mean of those that some did.

    What an unseen value means.
    """
    items, users, contexts = trained_rows(data.joined, data.split.train)
    tables = [*model.items.tables, *model.user_fields, model.context]
    for table, rows in zip(tables, [*items.values(), *users, contexts], strict=True):
        weight, read = table.weight, torch.from_numpy(np.ascontiguousarray(rows)).to(table.weight.device)
        read = read[read > 0] if table.padding_idx is not None else read  # no category at all is no value
        unread = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        unread[read] = False
        if table.padding_idx is not None:
            unread[table.padding_idx] = False
        if len(read):
            weight[unread] = weight[read].mean(0)


def _read_in_part(model: Ranker, joined: Joined, config: TrainConfig) -> list[nn.Embedding]:
    """Return the tables whose gradients are rows: large ones, and those that row-wise Adagrad moves."""
    if config.table_learning_rate is not None:
        return model.items.of_ids()
    rows = joined.sequences
    a_visit = len(rows.history_item) / max(1, rows.users) + config.targets_per_visit
    return read_in_part(model.items.of_ids(), config.users_per_step * a_visit)


def _parameter_groups(model: Ranker, config: TrainConfig) -> list[dict]:
    """Decay on embedding tables only: ids overfit, codebooks and norms must not shrink.

    Tables of ids are not AdamW's where row-wise Adagrad moves them.
    """
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    known = {id(p) for p in tables}
    if config.table_learning_rate is not None:
        others = {id(table.weight) for table in model.items.of_ids()}
        tables = [p for p in tables if id(p) not in others]
    return [
        {"params": tables, "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.0},
    ]


class _StepSums:
    """What a step sums over the workers, in one flat array: gradients, losses, and what the codebooks count.

    A parameter's gradient is a view into it, so one that a worker's part of the batch does not touch adds zeros, and a
    worker without a part takes part. Tables of which little is read are exchanged by the rows that were.

    Attributes:
        parameters: those that are trained but for the tables; their gradients are set by `of`.
        in_part: tables whose gradients are rows; tables: these, and those of which this worker has a part.
        read: their gradients of the last global batch.
        totals: of the last global batch, float64 [4]: the task's loss summed over targets, the codebooks' summed over
            events, targets, events.
    """

    def __init__(
        self, model: Ranker, worker: Worker, in_part: list[nn.Embedding], sharded: ShardedTables | None
    ) -> None:
        self.model, self.worker, self.sharded = model, worker, sharded
        of_others = [] if sharded is None else sharded.tables
        self.in_part = [table for table in in_part if table not in of_others]
        self.tables = [*self.in_part, *of_others]
        by_rows = {id(table.weight) for table in self.tables}
        self.parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in by_rows]
        self.by_rows = RowGradients(self.in_part, worker.world)
        self.read: list[Rows] = []
        self.whole: list[Tensor] = []
        self.quantizer = model.coded.quantizer if model.coded is not None else None
        counted = 0 if self.quantizer is None else self.quantizer.step_GCk.numel()
        sizes = [*(p.numel() for p in self.parameters), counted, 2]
        self.flat = torch.zeros(sum(sizes), device=worker.device)
        *gradients, self.counted, self.losses = self.flat.split(sizes)
        self.gradients = [gradient.view_as(p) for p, gradient in zip(self.parameters, gradients, strict=True)]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.totals = torch.zeros(4, dtype=torch.float64, device=worker.device)

    def of(self, batch: Batch | None, count: Tensor, most: int, bf16: bool) -> None:
        """Run forward and backward pass on this worker's part of the global batch, and sum over the workers.

        Args:
            count, most: as in `Training._move`.
        """
        quantizer, events, counts = self.quantizer, count[1], count[2:]
        found: list[Tensor | None] = [None] * len(self.tables)
        looked = self._looked_up(batch, most)
        if batch is None:
            self.flat.zero_()
        else:
            if looked is not None and self.sharded is not None:
                batch = replace(batch, items=looked.of(batch.items, self.sharded.names))
            with torch.autocast(self.flat.device.type, torch.bfloat16, enabled=bf16):
                logits, auxiliary = self.model(batch)
            weight = None if batch.padding is None else batch.padding.target_weight
            loss = F.binary_cross_entropy_with_logits(logits.float(), batch.target_label, weight, reduction="sum")
            # The auxiliary loss is a mean over the events of this part.
            loss_of_part = loss / counts[0] + auxiliary * (events / counts[1].clamp(min=1))
            found = self._differentiate(loss_of_part, [] if looked is None else looked.rows)
            self.losses.copy_(torch.stack([loss.detach(), auxiliary.detach().float() * events]))
            if quantizer is not None:
                self.counted.copy_(quantizer.step_GCk.flatten())
        with _answered(self.worker):
            sums = dist.all_reduce(self.flat, async_op=True) if self.worker.world > 1 else None
            # Which rows are sent is made out meanwhile.
            whole, own = found[: len(self.in_part)], found[len(self.in_part) :]
            self.read = self.by_rows.summed(whole, most, dist.all_gather_into_tensor) if self.in_part else []
            if self.sharded is not None and looked is not None:
                self.read += self.sharded.summed(looked, own)
            if sums is not None:
                sums.wait()
        if quantizer is not None:
            quantizer.step_GCk.copy_(self.counted.view_as(quantizer.step_GCk))
        self.totals = torch.cat([self.losses, counts]).double()

    def clip(self, longest: float) -> None:
        """Shorten all gradients together to this length, if they are longer."""
        whole, own = self.read[: len(self.in_part)], self.read[len(self.in_part) :]
        gradients = [*self.gradients, *(part for rows in whole for part in rows.values)]
        length = nn.utils.get_total_norm(gradients)
        if self.sharded is not None:
            own_values = [rows.values[0] for rows in own]
            with _answered(self.worker):
                length = torch.hypot(length, self.sharded.length(own_values))
            gradients += own_values
        torch._foreach_mul_(gradients, (longest / (length + 1e-6)).clamp(max=1.0))

    def keep_whole_gradients(self) -> None:
        """Let AdamW, which moves every row, find gradients of whole tables, zeros between two steps."""
        self.whole = [torch.zeros_like(table.weight) for table in self.tables]
        for table, whole in zip(self.tables, self.whole, strict=True):
            table.weight.grad = whole

    @contextmanager
    def whole_gradients(self) -> Iterator[None]:
        """Have the rows that were read in the gradients of the whole tables."""
        for rows, whole in zip(self.read, self.whole, strict=True):
            put(rows, whole)
        yield
        for rows, whole in zip(self.read, self.whole, strict=True):
            take_back(rows, whole)

    def _looked_up(self, batch: Batch | None, most: int) -> LookedUp | None:
        """Return the rows of sharded tables that this worker's part reads, which all workers ask for at once."""
        if self.sharded is None:
            return None
        with _answered(self.worker):
            looked = self.sharded.looked_up(None if batch is None else batch.items, most)
        for rows in looked.rows:
            rows.requires_grad_()
        return looked

    def _differentiate(self, loss: Tensor, rows: list[Tensor]) -> list[Tensor | None]:
        """Write the gradients of all parameters, by one launch where `backward` would add up each by one.

        Returns those of the tables that are read in part, and of rows that other workers own.
        """
        tables = [table.weight for table in self.in_part]
        found = torch.autograd.grad(loss, [*self.parameters, *tables, *rows], allow_unused=True)
        pairs = list(zip(self.gradients, found[: len(self.gradients)], strict=True))
        if unused := [view for view, gradient in pairs if gradient is None]:
            torch._foreach_zero_(unused)
        used = [(view, gradient.contiguous()) for view, gradient in pairs if gradient is not None]
        torch._foreach_copy_([view for view, _ in used], [gradient for _, gradient in used])
        return list(found[len(self.gradients) :])


def _summed(tensor: Tensor, worker: Worker) -> Tensor:
    """Sum a tensor over the workers, in place.

    Raises:
        WorkerLostError: another worker no longer answers.
    """
    if worker.world > 1:
        with _answered(worker):
            dist.all_reduce(tensor)
    return tensor


def from_first(value: T | None, worker: Worker) -> T:
    """Return to every worker the value that the first one has, tensors of it on the CPU."""
    box = [value]
    if worker.world > 1:
        with _answered(worker):
            dist.broadcast_object_list(box, src=0, device=torch.device(worker.device))
    assert box[0] is not None
    return box[0]


@contextmanager
def _answered(worker: Worker) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WorkerLostError(f"worker {worker.rank} waits for another one in vain: {error}") from error


def _stream(*key: int) -> int:
    """Return the seed of a random stream of its own for every key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def _on_cpu(tree):
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    return [_on_cpu(value) for value in tree] if isinstance(tree, list) else tree


@torch.no_grad()
def _codebook_metrics(model: Ranker, batch: Batch | None) -> tuple[dict[str, float], list[str]]:
    """Return how the codebook is used and, on a few users, how far attention over it is from exact attention; and
    warnings.

    Args:
        batch: of this worker's users, if it has any: figures to look at, which nothing is decided by.
    """
    assert model.coded is not None
    quantizer = model.coded.quantizer
    shares_G = quantizer.perplexity_share()
    metrics = {"perplexity_share": float(shares_G.mean()), "dead_share": float(quantizer.dead_share().mean())}
    if batch is None or not bool(quantizer.started):
        return metrics, []
    probes = probe_by_length(model.eval().probe(batch))
    if quantizer.groups > 1 and len(batch.event_item):
        codes_NG = quantizer.search(model.coded.keys(model.items(batch.items)))
        metrics["groups_shared_information"] = shared_information(
            codes_NG, torch.bincount(batch.event_item, minlength=len(codes_NG))
        )
    for probe in probes:
        span = f"probe_{probe.shortest}_to_{probe.longest - 1}_events"
        metrics |= {
            f"{span}/attention_error": probe.error,
            f"{span}/bound": probe.bound,
            f"{span}/key_error": probe.key_error,
        }
    warnings = probe_warnings(probes, shares_G.cpu())
    return metrics | {"probe_warnings": float(len(warnings))}, warnings


@torch.no_grad()
def _validation_logloss(model: Ranker, batches: Iterable[Batch], worker: Worker) -> float:
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=worker.device)
    for batch in batches:
        losses = F.binary_cross_entropy_with_logits(model(batch)[0].float(), batch.target_label, reduction="sum")
        total += torch.stack(
            [losses.double(), torch.tensor(float(len(batch.target_label)), dtype=torch.float64, device=worker.device)]
        )
    _summed(total, worker)
    return float(total[0] / total[1].clamp(min=1))

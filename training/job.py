"""One training of every model of a configuration on one published partition, in any number of workers, restarts and
processes.

A worker that calls `train_all` again goes on from the last checkpoint, when that is of the same training: `identity_of`
says which.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from etl.stage.commands import log
from etl.stage.errors import StageError
from etl.stage.folder import Folder
from etl.warehouse.store import TableStore, sha256_of
from training.config import TrainConfig
from training.data import Sequences
from training.loop import (
    EpochResult,
    Start,
    Training,
    TrainingData,
    TrainingState,
    Worker,
    epoch_of,
    from_first,
    train_model,
)
from training.model.ranker import Ranker
from training.pace import Pace
from training.package import Cutoff, load_package, save_package
from training.progress import Progress
from training.registry import CHAMPION, Registry
from training.resume import CHECKPOINTS, Checkpoint, Checkpoints, flat
from training.scoring import request_of
from training.system_metrics import system_metrics
from training.tracking import SYSTEM_METRICS_FILE, MetricsBuffer
from training.user_batches import UserBatches
from training.vocabulary import Vocabulary

STEPS_BETWEEN_QUESTIONS = 50  # a question takes as long as some steps of a GPU


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and where its files go.

    Addresses are URIs or absolute paths: workers of Ray work in folders of their own.

    Attributes:
        warehouse, dataset, dt: the published partition.
        attempt: names the run of Ray.
        run_dir: address of the attempt's folder; every worker reaches it.
        mlflow_run_id: takes the metrics that are of no single model.
        model_run_ids: model -> the run that takes its own; None where MLflow did not answer: metrics wait in the
            folder.
        warm_start: address of the package to begin with; None: begin cold.
        prints: the lines of progress are printed too, not only written to the run's folder.
    """

    warehouse: str
    dataset: str
    dt: str
    attempt: str
    run_dir: str
    config: TrainConfig
    mlflow_run_id: str
    model_run_ids: Mapping[str, str] | None
    warm_start: str | None
    prints: bool


def train_all(job: Job, worker: Worker) -> dict[str, dict]:
    """Train every model of the job on this worker, from where its run stands; rank 0 writes checkpoints, packages and
    metrics.

    Returns:
        name -> {"package", "epochs", "best_epoch", "train_seconds", "validation_logloss"}.

    Raises:
        StageError: the run stands elsewhere: its checkpoints are of another training; or the loss is not finite.
    """
    trainings = _Trainings(job, worker)
    if trainings.progress is None:
        return trainings.run()
    samples = MetricsBuffer(job.mlflow_run_id, trainings.run_dir, SYSTEM_METRICS_FILE, trainings.say)
    with closing(trainings.progress), system_metrics(samples):
        return trainings.run()


class _Trainings:
    """The trainings of a job on this worker, one model after the other."""

    def __init__(self, job: Job, worker: Worker) -> None:
        self.job, self.worker, self.config = job, worker, job.config
        self.run_dir = Folder(job.run_dir, "--runs")
        self.older = _package_at(job.warm_start) if job.warm_start else None
        known = self.older[1] if self.older else None
        self.data, self.items, self.cutoff, digests = load_training_data(
            job.warehouse, job.dataset, job.dt, job.config, known
        )
        self.progress = Progress(self.run_dir, job.prints) if worker.rank == 0 else None
        self.metrics = self._buffer() if worker.rank == 0 else None
        self.checkpoints = Checkpoints(
            self.run_dir.below(CHECKPOINTS),
            identity_of(job, digests, self.data.vocabulary),
            job.config.checkpoint_every_steps,
            job.config.checkpoint_every_seconds,
            self.say,
        )

    def _buffer(self) -> MetricsBuffer:
        models = self.job.model_run_ids
        run_id = None if models is None else self.job.mlflow_run_id
        return MetricsBuffer(run_id, self.run_dir, say=self.say, models=models)

    def say(self, line: str) -> None:
        if self.progress is not None:
            self.progress(line)

    def run(self) -> dict[str, dict]:
        self._introduce()
        reached = self._reached()
        summaries = dict(reached.done)
        if (state := reached.state) is not None:
            self.say(
                f"going on with {reached.name} after step {state.step}, batch {state.position} of epoch"
                f" {state.epoch + 1}"
            )
        for name in self.config.models:
            if name in summaries:
                continue
            summaries[name] = self._train(name, reached.state if reached.name == name else None, summaries)
            if self.worker.rank == 0:
                self.checkpoints.write(Checkpoint(dict(summaries)))
        if self.metrics is not None:
            self.metrics.flush()
        return summaries

    def _reached(self) -> Checkpoint:
        """Return where the run stands; each worker reads what it needs of it where the first one found it."""
        if self.worker.rank != 0:
            return self.checkpoints.read(from_first(None, self.worker) or "")
        reached = self.checkpoints.newest()
        from_first(reached.file, self.worker)
        return reached

    def _introduce(self) -> None:
        data, hashed = self.data, self.data.hashed_event_share()
        self.say(
            f"{data.joined.sequences.users} users, {len(data.joined.sequences.history_item):,} history events, "
            f"{len(data.split.train):,} training targets, {len(data.split.validation):,} for the early stop: "
            f"{data.split.held_out}; "
            f"{self.worker.world} worker(s) on {self.worker.device}"
        )
        rows = self.config.vocabulary.hashed_rows
        self.say(f"{hashed:.1%} of the history events are of rare items, which share {rows} embedding rows")
        if self.metrics is not None:
            self.metrics.log({"hashed_event_share": hashed}, 0)

    def _train(self, name: str, resume: TrainingState | None, done: Mapping[str, dict]) -> dict[str, Any]:
        """Train a model, from a state of it if there is one; return its summary.

        Args:
            done: summaries of the models before it, which a checkpoint keeps.
        """
        began = time.perf_counter()

        def on_epoch(result: EpochResult) -> None:
            self._log_epoch(name, result)

        # The first is the one that is registered, hence the one that the older model was.
        start = Start(resume, self.older if name == next(iter(self.config.models)) else None)
        sharded = self.config.sharded_from_rows is not None  # then a checkpoint is of all workers
        to_keep = self._on_step(name, done) if self.worker.rank == 0 or sharded else None
        try:
            model, result = train_model(name, self.data, self.config, self.worker, on_epoch, to_keep, start)
        except FloatingPointError as error:
            remedy = "lower the learning rate, or look for what the data has of the extreme"
            raise StageError(str(error), remedy) from error
        if self.worker.rank == 0:
            sequences = self.data.joined.sequences
            owner = np.searchsorted(sequences.target_start, self.data.split.evaluation[:1], side="right") - 1
            request = request_of(self.items, sequences, int(owner[0]) if len(owner) else 0)
            with self.run_dir.written_folder(f"models/{name}") as package:
                save_package(package, model.cpu(), self.data.vocabulary, self.cutoff, request)
        return {
            "package": self.run_dir.address_of(f"models/{name}"),
            "epochs": result.epoch + 1,
            "best_epoch": result.best_epoch,
            "validation_logloss": result.best_logloss,
            "train_seconds": round(time.perf_counter() - began, 1),
        }

    def _on_step(self, name: str, done: Mapping[str, dict]) -> Callable[[Training], None]:
        pace = self._pace(name) if self.worker.rank == 0 else None

        def on_step(now: Training) -> None:
            if pace is not None:
                pace.at(now.step, now.taken)
            if self._checkpoint_is_due(now):
                checkpoint = Checkpoint(dict(done), name, now.state())
                if self.worker.rank == 0:
                    self.checkpoints.begin(now.step, checkpoint)

        return on_step

    def _pace(self, name: str) -> Pace:
        config = self.config
        batches = UserBatches(self.data.joined, 0, 1, config.users_per_step, config.seed)
        planned = len(epoch_of(batches, self.data, config, 0)) * config.epochs
        assert self.metrics is not None  # this is the first worker
        return Pace(name, planned, self.worker.device, self.say, self.metrics.log)

    def _checkpoint_is_due(self, now: Training) -> bool:
        """Say whether this worker is to copy its state now: all workers where each has a part of it, as the first one
        says, which they ask every few steps."""
        first = self.worker.rank == 0
        if now.sharded is None:
            return first and self.checkpoints.due(now.step)
        if now.step % min(STEPS_BETWEEN_QUESTIONS, self.config.checkpoint_every_steps):
            return False
        return from_first(self.checkpoints.due(now.step) if first else None, self.worker)

    def _log_epoch(self, name: str, result: EpochResult) -> None:
        figures = "  ".join(f"{key} {value:.4g}" for key, value in result.metrics.items())
        self.say(f"{name} epoch {result.epoch + 1}/{self.config.epochs}  {figures}")
        for warning in result.warnings:
            self.say(f"{name} warning: {warning}")
        if self.metrics is not None:
            self.metrics.log({f"{name}/{key}": value for key, value in result.metrics.items()}, result.epoch)


def take_share_of_cores(workers: int) -> None:
    """Let torch use this process's share of the machine's cores, which so many workers share."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, workers)))


def identity_of(job: Job, digests: Mapping[str, str], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return all that decides the weights: a checkpoint of another training is refused by what differs.

    Args:
        digests: of the tables that were read.
    """
    older = Folder(job.warm_start, "--warm-start") if job.warm_start else None
    warm_start = sha256_of(older.fs, f"{older.root}/model.safetensors")[:16] if older else "none"
    return {
        **flat(job.config.deciding, "configuration"),
        **digests,
        "vocabulary": vocabulary.digest,
        "weights of the warm start": warm_start,
    }


def _package_at(address: str) -> tuple[Ranker, Vocabulary]:
    with Folder(address, "--warm-start").read_locally() as package:
        return load_package(package)[:2]


def load_training_data(
    warehouse: str, dataset: str, dt: str, config: TrainConfig, known: Vocabulary | None = None
) -> tuple[TrainingData, pa.Table, Cutoff, dict[str, str]]:
    """Read a published partition; return the data, its items table, the cut-off rule of its histories, and the digests
    of what was read.

    Args:
        known: the vocabulary of a warm start, which this partition appends to.
    """
    store = TableStore(warehouse, dataset)
    manifest, of_items = store.require("sequences", dt), store.require("items", dt)
    items, cutoff = store.read(of_items), Cutoff.of_settings(manifest.settings)
    sequences = Sequences.from_arrow(store.read(manifest), cutoff.max_events)
    digests = {"data of sequences": manifest.data_digest, "data of items": of_items.data_digest}
    return TrainingData.of(sequences, items, config, known), items, cutoff, digests


def champion_before(dataset: str, dt: str) -> str | None:
    """Return the version in service, to begin with; None: there is none, or it is of this day or later.

    Such a one would know what is to be predicted.
    """
    registry = Registry(dataset)
    version = registry.aliases().get(CHAMPION)
    if version is None:
        log("no champion to start from: starting cold")
        return None
    partition = registry.version(version).tags.get("pipeline.partition") or "9"
    if partition >= dt:
        log(f"the champion is of partition {partition}, not earlier than {dt}: starting cold")
        return None
    log(f"starting from champion version {version} of partition {partition}")
    return version

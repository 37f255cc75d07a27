"""Train VQL and its baselines on one partition.

With --workers N the models are trained by Ray Train, N data-parallel workers in one Ray start (GPUs when there are any);
--workers 0 trains in this very process, for a debugger, from the same modules.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from etl.cli import definition_of, log, partition_parser, run_stage, store_of
from etl.errors import StageError, TryAgainError
from etl.local_files import replace_text
from etl.store import TableStore, code_version
from training.checkpoint import Cutoff, load_package, save_package
from training.config import TrainConfig, load_config
from training.data import Sequences
from training.loop import EpochResult, TrainingData, Worker, train_model
from training.registry import CHAMPION, ArtifactGone, Registry
from training.run_folder import run_folder
from training.scoring import request_of
from training.tracking import MetricsBuffer, attempt_run
from training.vocabulary import Vocabulary

PROGRESS_FILE = "progress.log"


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument("--runs", required=True, help="folder of runs; this one writes <runs>/<attempt>/")
    parser.add_argument("--config", default="default", help="name of a file in training/configs/")
    parser.add_argument(
        "--workers", type=int, default=2, help="Ray Train workers; 0 = train in this process, without Ray"
    )
    parser.add_argument("--models", default=None, help="comma list: train only these models of the configuration")
    parser.add_argument(
        "--warm-start",
        default="none",
        help="none; champion: begin with the weights of the model in service when it is of an earlier partition; or the "
        "folder of a model package. New items get rows of their own behind the known ones",
    )
    parser.add_argument("--seed", type=int, default=None, help="override the configuration's seed")
    args = parser.parse_args()
    definition_of(args)
    store_of(args)
    config = _narrowed(load_config(args.config), args.models, args.seed)
    run_dir = run_folder(args.runs, args.definition, args.dt, args.attempt, config.digest)
    tags = _tags(args, config)
    job = {
        "warehouse": args.warehouse,
        "dataset": args.dataset,
        "dt": args.dt,
        "attempt": args.attempt,
        "run_dir": str(run_dir),
        "config_name": args.config,
        "ray": args.workers > 0,
        "models": args.models,
        "seed": args.seed,
    }
    with attempt_run(args.definition, args.dt, args.attempt, tags, required=False) as run:
        job |= {"mlflow_run_id": run.info.run_id, "warm_start": _warm_start(args.warm_start, args.dataset, args.dt)}
        if args.workers == 0:
            summaries = train_all(job, Worker(), on_report=None, resume=None)
        else:
            summaries = _train_with_ray(job, args.workers)
    summary = {
        "config": asdict(config),
        "config_digest": config.digest,
        "models": summaries,
        "primary": next(iter(config.models)),
        "seed": config.seed,
        "mlflow_run_id": job["mlflow_run_id"],
        "mlflow_experiment_id": run.info.experiment_id,
    }
    replace_text(run_dir / "training.json", json.dumps(summary, indent=1))
    log(f"trained {', '.join(summaries)}; packages in {run_dir / 'models'}")


def train_all(job: dict, worker: Worker, on_report, resume: dict | None) -> dict[str, dict]:
    """Train every model of the job on this worker; rank 0 writes packages and metrics.

    Args:
        on_report: called on every worker after each epoch with (metrics, state or None when no checkpoint is due).
        resume: {"done": summaries of finished models, "name": model, "epoch": EpochResult as dict} from a checkpoint.

    Returns:
        name -> {"package", "epochs", "best_epoch", "train_seconds", "validation_logloss"}.
    """
    config = _narrowed(load_config(job["config_name"]), job["models"], job["seed"])
    older = load_package(Path(job["warm_start"]))[:2] if job["warm_start"] else None
    data, items, cutoff = load_training_data(job["warehouse"], job["dataset"], job["dt"], config, older[1] if older else None)
    run_dir = Path(job["run_dir"])
    say = _progress(job)
    if worker.rank == 0:
        say(
            f"{data.joined.sequences.users} users, {len(data.joined.sequences.history_item):,} history events, {len(data.split.train):,} training targets, "
            f"{len(data.split.validation):,} for the early stop; {worker.world} worker(s) on {worker.device}"
        )
    hashed = data.hashed_event_share()
    if worker.rank == 0:
        say(f"{hashed:.1%} of the history events are of rare items, which share {config.vocabulary.hashed_rows} embedding rows")
    metrics_log = MetricsBuffer(job["mlflow_run_id"], run_dir / "metrics.jsonl") if worker.rank == 0 else None
    if metrics_log is not None:
        metrics_log.log({"hashed_event_share": hashed}, 0)
    summaries: dict[str, dict] = dict(resume["done"]) if resume else {}
    for name in config.models:
        if name in summaries:
            continue
        started = time.perf_counter()

        def on_epoch(result: EpochResult, name: str = name) -> None:
            if metrics_log is not None:
                figures = "  ".join(f"{key} {value:.4g}" for key, value in result.metrics.items())
                say(f"{name} epoch {result.epoch + 1}/{config.epochs}  {figures}")
                for warning in result.warnings:
                    say(f"{name} warning: {warning}")
                metrics_log.log({f"{name}/{key}": value for key, value in result.metrics.items()}, result.epoch)
            if on_report is not None:
                on_report(
                    result.metrics | {"epoch": result.epoch}, {"done": summaries, "name": name, "epoch": vars(result)}
                )

        mine = resume["epoch"] if resume and resume["name"] == name else None
        if mine and mine["finished"]:
            mine = mine | {"epoch": config.epochs}  # trained to the end before the restart: only the package is missing
        first = name == next(iter(config.models))  # the one that is registered, hence the one that the older model was
        model, result = train_model(name, data, config, worker, on_epoch, resume=mine, warm_start=older if first else None)
        package = run_dir / "models" / name
        if worker.rank == 0:
            sequences = data.joined.sequences
            owner = np.searchsorted(sequences.target_start, data.split.evaluation[:1], side="right") - 1
            user = int(owner[0]) if len(owner) else 0
            save_package(package, model.cpu(), data.vocabulary, cutoff, request_of(items, sequences, user))
        summaries[name] = {
            "package": str(package),
            "epochs": result.epoch + 1,
            "best_epoch": result.best_epoch,
            "validation_logloss": result.best_logloss,
            "train_seconds": round(time.perf_counter() - started, 1),
        }
    if metrics_log is not None:
        metrics_log.flush()
    return summaries


def _progress(job: dict) -> Callable[[str], None]:
    """Return what prints a line here, and keeps it for whoever follows the run (shared storage, any node)."""

    def say(message: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {message}"
        with (Path(job["run_dir"]) / PROGRESS_FILE).open("a") as stream:
            stream.write(line + "\n")
        if not job["ray"]:
            print(line, flush=True)

    return say


def load_training_data(
    warehouse: str, dataset: str, dt: str, config: TrainConfig, known: Vocabulary | None = None
) -> tuple[TrainingData, pa.Table, Cutoff]:
    """Read a published partition; return the data, its items table and the cut-off rule of its histories.

    Args:
        known: the vocabulary of a warm start, which this partition appends to.
    """
    store = TableStore(warehouse, dataset)
    items, manifest = store.read(store.require("items", dt)), store.require("sequences", dt)
    settings = manifest.settings
    cutoff = Cutoff(str(settings["cutoff"]), int(settings["availability_lag_ms"]), int(settings["max_events"]))
    sequences = Sequences.from_arrow(store.read(manifest), cutoff.max_events)
    return TrainingData.of(sequences, items, config, known), items, cutoff


def _warm_start(wanted: str, dataset: str, dt: str) -> str | None:
    """Return the folder of the package to begin with; a champion of this day or later would know what is to be predicted."""
    if wanted == "none":
        return None
    if wanted != "champion":
        return wanted
    registry = Registry(dataset)
    version = registry.aliases().get(CHAMPION)
    if version is None:
        log("no champion to start from: starting cold")
        return None
    partition = registry.version(version).tags.get("pipeline.partition") or "9"
    if partition >= dt:
        log(f"the champion is of partition {partition}, not earlier than {dt}: starting cold")
        return None
    try:
        package = registry.package(version)
    except ArtifactGone as error:
        raise StageError(f"no warm start from the champion: {error}", "train with --warm-start none, or promote another version") from error
    log(f"starting from champion version {version} of partition {partition}")
    return str(package)


def _train_with_ray(job: dict, workers: int) -> dict[str, dict]:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    gpus = torch.cuda.is_available()
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    else:
        # Logical CPUs to spare: a controller or a reader that waits for a CPU for ever is the classic deadlock.
        ray.init(
            num_cpus=workers + 2,
            include_dashboard=False,
            log_to_driver=False,
            namespace=job["attempt"],
            object_store_memory=256 << 20,
        )
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
        run_config=RunConfig(
            # The name is the attempt: a retry resumes from its checkpoint, a reprocess starts clean.
            name=job["attempt"],
            storage_path=str(Path(job["run_dir"]) / "ray"),
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    # Ray's forwarded logs drown ours (a watcher complains each second without the dashboard): follow rank 0's progress.
    following = threading.Event()
    follower = threading.Thread(target=_follow, args=(Path(job["run_dir"]) / PROGRESS_FILE, following), daemon=True)
    follower.start()
    try:
        trainer.fit()
    except WorkerGroupError as error:
        told = _told_of_workers(error.worker_failures)
        if told is None:
            raise
        raise told from error
    finally:
        following.set()
        follower.join()
        ray.shutdown()
    done = Path(job["run_dir"]) / "models" / "summaries.json"
    return json.loads(done.read_text())


def _told_of_workers(failures: Mapping[int, Exception]) -> StageError | None:
    """Return what workers that failed have to say to a user; None: they crashed in code of ours."""
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    of_code = [failure._base_exc for failure in failures.values() if isinstance(failure, UserExceptionWithTraceback)]
    for error in of_code:
        if isinstance(error, StageError):
            return error
    lost = [rank for rank, failure in failures.items() if not isinstance(failure, UserExceptionWithTraceback)]
    if not lost:
        return None
    reason = str(failures[lost[0]]).splitlines()[0][:300]
    return TryAgainError(f"training lost worker {', '.join(map(str, lost))}: {reason}", "run the same command again: it goes on from the last checkpoint")


def _follow(path: Path, finished: threading.Event) -> None:
    """Print lines that are added to a file until `finished` is set and the file is read to its end."""
    position = path.stat().st_size if path.exists() else 0
    while True:
        last = finished.wait(0.5)
        if path.exists():
            with path.open() as stream:
                stream.seek(position)
                sys.stdout.write(stream.read())
                sys.stdout.flush()
                position = stream.tell()
        if last:
            return


def _ray_worker(job: dict) -> None:
    import tempfile

    import ray.train

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = str(ray.train.torch.get_device())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, context.get_local_world_size())))
    checkpoint = ray.train.get_checkpoint()
    resume = None
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            resume = torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu")

    def report(metrics: dict, state: dict) -> None:
        if rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / "state.pt")
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    summaries = train_all(job, Worker(rank, world, device), report, resume)
    if rank == 0:
        replace_text(Path(job["run_dir"]) / "models" / "summaries.json", json.dumps(summaries))


def _tags(args: argparse.Namespace, config: TrainConfig) -> dict[str, str]:
    """Return what the run was made from; refuse a partition that holds nothing to train on."""
    store = TableStore(args.warehouse, args.dataset)
    sequences = store.require("sequences", args.dt)
    if not sequences.counts.get("train_targets"):
        raise StageError(
            f"partition dt={args.dt} of {args.dataset} has no training target on a day before {args.dt}",
            "choose a later --dt, or build sequences with more --target-days",
        )
    return {
        "data.snapshot_digest": sequences.data_digest,
        "data.items_digest": store.require("items", args.dt).data_digest,
        "mlflow.source.git.commit": code_version(),
        "config_digest": config.digest,
    }


def _narrowed(config: TrainConfig, models: str | None, seed: int | None) -> TrainConfig:
    from dataclasses import replace

    if models is not None:
        wanted = models.split(",")
        unknown = [name for name in wanted if name not in config.models]
        if unknown:
            raise StageError(f"unknown model {unknown[0]!r} in --models", f"use some of: {', '.join(config.models)}")
        config = replace(config, models={name: config.models[name] for name in wanted})
    return config if seed is None else replace(config, seed=seed)


if __name__ == "__main__":
    run_stage(main)

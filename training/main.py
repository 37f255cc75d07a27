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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import torch

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError, TryAgainError
from etl.stage.local_files import replace_text
from etl.warehouse.store import TableStore, code_version, sha256_of
from training.checkpoint import Cutoff, load_package, save_package
from training.config import TrainConfig, load_config
from training.data import Sequences
from training.loop import EpochResult, TrainingData, TrainingState, Worker, WorkerLostError, from_first, train_model
from training.registry import CHAMPION, ArtifactGone, Registry
from training.resume import Checkpoint, Checkpoints, flat
from training.run_folder import run_folder
from training.scoring import request_of
from training.tracking import MetricsBuffer, attempt_run
from training.vocabulary import Vocabulary

PROGRESS_FILE = "progress.log"
WORKER_LOSSES = 4  # the group of workers is started again so often before the stage gives up
PLACEMENT_SECONDS = 50


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
        "config": config,
        "ray": args.workers > 0,
    }
    with attempt_run(args.definition, args.dt, args.attempt, tags, required=False) as run:
        job |= {"mlflow_run_id": run.info.run_id, "warm_start": _warm_start(args.warm_start, args.dataset, args.dt)}
        if args.workers == 0:
            summaries = train_all(job, Worker())
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


def train_all(job: dict, worker: Worker) -> dict[str, dict]:
    """Train every model of the job on this worker, from where its run stands; rank 0 writes checkpoints, packages and metrics.

    Returns:
        name -> {"package", "epochs", "best_epoch", "train_seconds", "validation_logloss"}.

    Raises:
        StageError: the run stands elsewhere: its checkpoints are of another training; or the loss is not finite.
    """
    config: TrainConfig = job["config"]
    older = load_package(Path(job["warm_start"]))[:2] if job["warm_start"] else None
    data, items, cutoff, digests = load_training_data(job["warehouse"], job["dataset"], job["dt"], config, older[1] if older else None)
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
    warm_start = sha256_of(pafs.LocalFileSystem(), f"{job['warm_start']}/model.safetensors")[:16] if older else "none"
    identity = {**flat(config.deciding, "configuration"), **digests, "vocabulary": data.vocabulary.digest, "weights of the warm start": warm_start}
    checkpoints = Checkpoints(run_dir / "checkpoints", identity, config.checkpoint_every_steps, config.checkpoint_every_seconds, say)
    reached = from_first(checkpoints.newest() if worker.rank == 0 else None, worker)
    summaries = dict(reached.done)
    if worker.rank == 0 and reached.state is not None:
        say(f"going on with {reached.name} after step {reached.state.step}, batch {reached.state.position} of epoch {reached.state.epoch + 1}")
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

        def on_step(step: int, state: Callable[[], TrainingState], name: str = name) -> None:
            checkpoints.offer(step, lambda: Checkpoint(dict(summaries), name, state()))

        mine = reached.state if reached.name == name else None
        first = name == next(iter(config.models))  # the one that is registered, hence the one that the older model was
        try:
            model, result = train_model(
                name, data, config, worker, on_epoch, on_step if worker.rank == 0 else None, resume=mine, warm_start=older if first else None
            )
        except FloatingPointError as error:
            raise StageError(str(error), "lower the learning rate, or look for what the data has of the extreme") from error
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
        if worker.rank == 0:
            checkpoints.write(Checkpoint(dict(summaries)))
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
) -> tuple[TrainingData, pa.Table, Cutoff, dict[str, str]]:
    """Read a published partition; return the data, its items table, the cut-off rule of its histories, and the digests of what was read.

    Args:
        known: the vocabulary of a warm start, which this partition appends to.
    """
    store = TableStore(warehouse, dataset)
    manifest, of_items = store.require("sequences", dt), store.require("items", dt)
    items, settings = store.read(of_items), manifest.settings
    cutoff = Cutoff(str(settings["cutoff"]), int(settings["availability_lag_ms"]), int(settings["max_events"]))
    sequences = Sequences.from_arrow(store.read(manifest), cutoff.max_events)
    digests = {"data of sequences": manifest.data_digest, "data of items": of_items.data_digest}
    return TrainingData.of(sequences, items, config, known), items, cutoff, digests


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
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    run_dir = Path(job["run_dir"])
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
    # Ray's forwarded logs drown ours (a watcher complains each second without the dashboard): follow rank 0's progress.
    following = threading.Event()
    follower = threading.Thread(target=_follow, args=(run_dir / PROGRESS_FILE, following), daemon=True)
    follower.start()
    try:
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        for number in range(WORKER_LOSSES + 1):
            _wait_for_workers(workers, gpus)
            trainer = TorchTrainer(
                _ray_worker,
                train_loop_config=job,
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
                # Ray's own retries would repeat errors of ours, too.
                run_config=RunConfig(
                    name=job["attempt"], storage_path=str(run_dir / "ray"), failure_config=FailureConfig(max_failures=0), checkpoint_config=CheckpointConfig(num_to_keep=2)
                ),
            )
            try:
                trainer.fit()
                break
            except (TrainingFailedError, ray.exceptions.RayActorError) as error:
                told = _told_of_workers(error)
                if not isinstance(told, TryAgainError) or number == WORKER_LOSSES:
                    raise told from error
                log(f"warning: {told.what}; starting the workers again, from the last checkpoint")
    finally:
        following.set()
        follower.join()
        ray.shutdown()
    done = run_dir / "models" / "summaries.json"
    return json.loads(done.read_text())


def _wait_for_workers(workers: int, gpus: bool) -> None:
    """Wait until the cluster has room for every worker, at most a minute.

    Raises:
        StageError: it never will have; what was asked for, what it has and what of that is free is named.
        TryAgainError: others use it.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    one = {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 1.0}
    room = placement_group([one] * workers)
    try:
        if room.wait(PLACEMENT_SECONDS):
            return
    finally:
        remove_placement_group(room)
    has, free = ray.cluster_resources(), ray.available_resources()
    missing = next((name for name in reversed(one) if has.get(name, 0) < workers), None)
    what = f"no room for {workers} worker(s) of {_counted(one, one)} each within {PLACEMENT_SECONDS} s: the cluster has {_counted(has, one)}, free {_counted(free, one)}"
    if missing:
        raise StageError(what, f"train with --workers {max(1, int(has.get(missing, 0)))} (WORKERS in make run), or add nodes")
    raise TryAgainError(what, "run the same command again once others have ended, or with fewer --workers (WORKERS in make run)")


def _counted(resources: Mapping[str, float], of: Iterable[str]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in of)


def _told_of_workers(error: Exception) -> Exception:
    """Return what a failed group of workers comes to: the first error of our own code, or TryAgainError for a lost worker."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    causes = {rank: getattr(failure, "_base_exc", None) for rank, failure in failures.items()}  # Ray's UserExceptionWithTraceback has it
    for rank, cause in sorted(causes.items()):
        if isinstance(cause, StageError):
            return cause
        if cause is not None and not isinstance(cause, WorkerLostError):
            return RuntimeError(f"worker {rank} failed:\n{failures[rank]}")
    lost = [rank for rank, cause in causes.items() if cause is None]
    reason = (str(failures[lost[0]] if lost else error).splitlines() or [type(error).__name__])[0][:300]
    return TryAgainError(f"training lost {f'worker {lost[0]}' if lost else 'its workers'}: {reason}", "run the same command again: it goes on from the last checkpoint")


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
    import ray.train

    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), str(ray.train.torch.get_device()))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, context.get_local_world_size())))
    summaries = train_all(job, worker)
    if worker.rank == 0:
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

"""Trains a job in the data-parallel workers of Ray Train, started again when one is lost."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from etl.stage.commands import log
from etl.stage.errors import StageError, TryAgainError, first_line
from etl.stage.folder import Folder
from infra import settings
from training.job import Job, take_share_of_cores, train_all
from training.loop import Worker, WorkerLostError
from training.progress import PROGRESS_FILE
from training.ray_cluster import HEAD_CHECK_SECONDS, HeadWatch, start_ray, wait_for_workers
from training.resume import CHECKPOINTS
from training.run_folder import result_of

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

WORKER_LOSSES = 4  # the group of workers is started again so often before the stage gives up
FOLLOWING_SECONDS = 2.0  # between looks at lines of progress in an object store
SUMMARIES_FILE = "models/summaries.json"


def train_with_ray(job: Job, least: int, most: int) -> dict[str, dict]:
    """Train in the workers of one Ray start, as many of `least` to `most` as there is room for whenever they are
    started; return what `train_all` returns.

    Raises:
        StageError: a worker failed of something to correct, or the cluster has no room.
        TryAgainError: Ray did not start, or workers were lost again and again.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    run_dir = Folder(job.run_dir, "--runs")
    most = start_ray(job.attempt, least, most)
    # Ray's forwarded logs drown ours (a watcher complains each second without the dashboard): follow rank 0's progress.
    following = threading.Event()
    follower = threading.Thread(target=_follow, args=(run_dir, following), daemon=True)
    follower.start()
    try:
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        for number in range(WORKER_LOSSES + 1):
            # Ray's own elastic policy counts what the cluster has, not what of it is free, and ends steps to grow.
            had_room = number > 0 or bool(run_dir.names(CHECKPOINTS))
            workers = wait_for_workers(least, most, gpus, had_room)
            trainer = TorchTrainer(
                _ray_worker,
                train_loop_config={"job": job, "on_cluster": bool(settings.ray_address())},
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
                # Ray's own retries would repeat errors of ours, too.
                run_config=RunConfig(
                    name=job.attempt,
                    storage_path=f"{run_dir.root}/ray",
                    storage_filesystem=None if run_dir.is_local else run_dir.fs,
                    failure_config=FailureConfig(max_failures=0),
                    checkpoint_config=CheckpointConfig(num_to_keep=2),
                ),
            )
            try:
                _fit(trainer)
                break
            except (TrainingFailedError, ray.exceptions.RayActorError) as error:
                cause = _cause_of(error)
                if not isinstance(cause, TryAgainError) or number == WORKER_LOSSES:
                    raise cause from error
                log(f"warning: {cause.what}; starting the workers again, from the last checkpoint")
    finally:
        following.set()
        follower.join()
        ray.shutdown()
    return result_of(run_dir, SUMMARIES_FILE, "run the same command again")


def _fit(trainer: TorchTrainer) -> None:
    """Train, for as long as the head of the cluster answers.

    This thread watches it, and another one trains.

    Raises:
        TryAgainError: the head is gone.
    """
    watch = HeadWatch()
    outcome: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=fit, name="ray train", daemon=True).start()
    while True:
        with suppress(TimeoutError):
            return outcome.result(HEAD_CHECK_SECONDS)
        if outcome.done():  # the training's own TimeoutError
            return outcome.result()
        watch.look("run the same command again: it goes on from the last checkpoint")


def _cause_of(error: Exception) -> Exception:
    """Return what a failed group of workers comes to.

    The first error of our own code, or TryAgainError for a lost worker.
    """
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError

    # What a worker raised comes as `_ray_worker` lets it; what became of a worker that is gone is an error of Ray's.
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        if isinstance(failure, StageError):
            return failure
        if not isinstance(failure, (RayError, RayTrainError, WorkerLostError)):
            return RuntimeError(f"worker {rank} failed: {failure}")
    lost = [rank for rank, failure in failures.items() if not isinstance(failure, WorkerLostError)]
    reason = first_line(failures[lost[0]] if lost else error)[:300]
    return TryAgainError(
        f"training lost {f'worker {lost[0]}' if lost else 'its workers'}: {reason}",
        "run the same command again: it goes on from the last checkpoint",
    )


def _follow(run_dir: Folder, finished: threading.Event) -> None:
    """Print the lines of progress that are added until `finished` is set and they are read to their end."""
    position = run_dir.bytes_of(PROGRESS_FILE)
    while True:
        last = finished.wait(0.5 if run_dir.is_local else FOLLOWING_SECONDS)
        with suppress(OSError):  # of a store that does not answer now
            if run_dir.bytes_of(PROGRESS_FILE) > position:
                added = (run_dir.read_text(PROGRESS_FILE) or "").encode()[position:]
                sys.stdout.write(added.decode(errors="replace"))
                sys.stdout.flush()
                position += len(added)
        if last:
            return


def _ray_worker(config: dict[str, Any]) -> None:
    """Train as one worker of the group.

    Raises:
        StageError, WorkerLostError: as they are.
        RuntimeError: names any other error. One whose class does not come back by pickle, as it takes two arguments or
            is of a module that only workers have, would be a lost worker to Ray, and be trained again.
    """
    try:
        _train_in_group(config["job"], config["on_cluster"])
    except (StageError, WorkerLostError):
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _train_in_group(job: Job, on_cluster: bool) -> None:
    import ray.train

    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), str(ray.train.torch.get_device()))
    if on_cluster and worker.device == "cpu":
        # How many cores share a sum decides its last bit: a group that has lost a node goes on elsewhere, to the same.
        torch.set_num_threads(1)
    else:
        take_share_of_cores(context.get_local_world_size())
    summaries = train_all(job, worker)
    if worker.rank == 0:
        Folder(job.run_dir, "--runs").write_text(SUMMARIES_FILE, json.dumps(summaries))

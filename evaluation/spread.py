"""Work over the buckets of a partition's `sequences`, in this process or spread over workers of Ray.

A bucket is worked on by itself, so that what comes of it does not depend on who does it. Workers read and write files;
what comes back here is what describes them.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

import torch

from etl.stage.errors import StageError, TryAgainError, first_line
from etl.stage.worker_counts import worker_range
from etl.warehouse.manifests import DataFile, Manifest
from training.ray_cluster import HEAD_CHECK_SECONDS, HeadWatch, start_ray, wait_for_workers
from training.scoring import AUTO, CPU, CUDA, DEVICES, device_of

Made = TypeVar("Made", covariant=True)
Bucket = Sequence[DataFile]
LOSSES = 4  # workers that one bucket, and all starts together, may cost before the stage gives up
REPLACEMENT_SECONDS = 120  # in which nobody is at work, since those that replace lost workers wait for room


class Work(Protocol[Made]):
    """What is done with each bucket; it travels to the workers."""

    def begin(self, device: str) -> Callable[[Bucket], Made]:
        """Read what all buckets need; return what makes something of a bucket's files."""


@dataclass(frozen=True)
class Spread:
    """Who does the work.

    Attributes:
        least, most: workers of Ray, as many as there is room for; 0: this process.
        device: of `training.scoring.DEVICES`; auto: GPUs, where this machine or the cluster has any.
    """

    least: int = 0
    most: int = 0
    device: str = AUTO

    @staticmethod
    def of(args: argparse.Namespace) -> Spread:
        """Return what the arguments of `add_arguments` say. Raises: StageError: they say nothing that is allowed."""
        if args.workers == "0":
            return Spread(device=args.device)
        try:
            return Spread(*worker_range(args.workers), args.device)
        except ValueError as error:
            raise StageError(f"--workers {error}", "correct it, or give 0 to work in this process") from None


IN_THIS_PROCESS = Spread()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `Spread.of` reads."""
    parser.add_argument(
        "--workers",
        default="0",
        help="Ray workers that share the buckets; MIN:MAX: as many as there is room for; 0: this process, without Ray",
    )
    parser.add_argument(
        "--device", choices=DEVICES, default=AUTO, help="what models are run on (default: a GPU where there is one)"
    )


def each_bucket(work: Work[Made], manifest: Manifest, spread: Spread, attempt: str) -> list[Made]:
    """Return what comes of every bucket of a partition, in the order in which `TableStore.read` reads them.

    Args:
        attempt: names what is started.

    Raises:
        StageError: a bucket's work failed of something to correct; names its file, as every error does.
        TryAgainError: workers were lost again and again, or others use the cluster.
    """
    files = sorted(manifest.files, key=lambda file: (file.bucket, file.path))
    buckets = [list(of_one) for _, of_one in groupby(files, key=lambda file: file.bucket)]
    if spread.most and buckets:
        return _over_ray(work, buckets, spread, attempt)
    worker = _Worker(work, device_of(spread.device))
    return [worker.made_of(bucket) for bucket in buckets]


class _Worker(Generic[Made]):
    """Does the work of one bucket after the other."""

    def __init__(self, work: Work[Made], device: str) -> None:
        self.work, self.device = work, device
        self.do: Callable[[Bucket], Made] | None = None

    def starts(self) -> None:
        """Return once it has room and runs."""

    def made_of(self, bucket: Bucket) -> Made:
        if self.do is None:
            self.do = self.work.begin(self.device)
        try:
            with _one_thread():
                return self.do(bucket)
        except StageError as error:
            raise type(error)(f"{bucket[0].path}: {error.what}", error.remedy) from error
        except Exception as error:
            raise RuntimeError(f"{bucket[0].path}: {type(error).__name__}: {error}") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one core within the body: how many share a sum decides its last bit, so that others would make
    other scores and caches of the same day. More cores are more workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _over_ray(work: Work[Made], buckets: Sequence[Bucket], spread: Spread, attempt: str) -> list[Made]:
    import ray

    # Workers without a bucket would have nothing to do.
    least, most = (min(count, len(buckets)) for count in (spread.least, spread.most))
    most = start_ray(attempt, least, most)
    try:
        gpus = spread.device != CPU and ray.cluster_resources().get("GPU", 0) > 0
        if spread.device == CUDA and not gpus:
            raise StageError("--device cuda: no node of Ray has a GPU", "give --device auto, or add nodes")
        count = wait_for_workers(least, most, gpus)
        actor = ray.remote(_Worker).options(num_cpus=1, num_gpus=int(gpus))
        return _Dealing(lambda: actor.remote(work, CUDA if gpus else CPU), count, buckets).run()
    finally:
        ray.shutdown()


class _Dealing:
    """Buckets and the workers that they are dealt to, each the next one as soon as it is done with one.

    A worker that is lost is replaced where there is room. Whoever is free next has its bucket again, and writes the
    same bytes of it.

    Args:
        start: starts a worker, which may wait for room.
    """

    def __init__(self, start: Callable[[], Any], count: int, buckets: Sequence[Bucket]) -> None:
        self.start, self.buckets = start, buckets
        self.waiting = deque(range(len(buckets)))
        self.made: list[Any] = [None] * len(buckets)
        self.losses: Counter[int | None] = Counter()
        self.awaited: dict[Any, tuple[Any, int | None]] = {}  # worker and its bucket, none while it starts
        for _ in range(count):
            self._add_worker()

    def run(self) -> list[Any]:
        """Return what comes of every bucket."""
        import ray

        watch, worked_at = HeadWatch(), time.monotonic()
        while self.waiting or self._anyone_at_work():
            done, _ = ray.wait(list(self.awaited), timeout=HEAD_CHECK_SECONDS)
            watch.look("run the same command again", heard=bool(done))
            for reference in done:
                self._take(reference)
            if done or self._anyone_at_work() or not self.losses:
                worked_at = time.monotonic()
            elif time.monotonic() > worked_at + REPLACEMENT_SECONDS:
                raise TryAgainError(
                    f"no worker had room for {REPLACEMENT_SECONDS} s: nodes were lost, or others use the cluster",
                    "run the same command again once nodes are back or others have ended, or with fewer --workers",
                )
        return self.made

    def _anyone_at_work(self) -> bool:
        return any(place is not None for _, place in self.awaited.values())

    def _add_worker(self) -> None:
        worker = self.start()
        self.awaited[worker.starts.remote()] = worker, None

    def _take(self, reference: Any) -> None:
        """Take what a worker is done with, and give it the next bucket."""
        import ray

        worker, place = self.awaited.pop(reference)
        try:
            made = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            self._lose(place, error)
            return
        if place is not None:
            self.made[place] = made
        if self.waiting:
            place = self.waiting.popleft()
            self.awaited[worker.made_of.remote(self.buckets[place])] = worker, place

    def _lose(self, place: int | None, error: Exception) -> None:
        """Put the bucket of a lost worker back, and start another worker."""
        self.losses[place] += 1
        if self.losses[place] > LOSSES:
            named = None if place is None else self.buckets[place][0].path
            what = "workers were lost as they started" if named is None else f"{named}: the worker that had it was lost"
            raise TryAgainError(
                f"{what}, {self.losses[place]} times: {first_line(error)[:300]}",
                "run the same command again, or with fewer --workers where memory is short",
            ) from error
        if place is not None:
            self.waiting.appendleft(place)
        self._add_worker()

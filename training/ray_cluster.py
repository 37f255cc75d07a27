"""The Ray that workers run in: the cluster of RAY_ADDRESS, or one of this process's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from etl.stage.errors import StageError, TryAgainError
from infra import settings

PLACEMENT_SECONDS = 50
SETTLING_SECONDS = 10  # until what an ended group held is free again, and a lost node is known to be
ROOT = Path(__file__).resolve().parents[1]
# What a worker imports: nodes of a cluster need the packages of requirements.txt.
CODE = ("etl", "evaluation", "infra", "training")
HEAD_CHECK_SECONDS = 5.0
HEAD_SILENCES = 3  # checks in a row without an answer: well before the 60 s after which Ray ends this process by itself


def start_ray(name: str, least: int, most: int) -> int:
    """Join the cluster of RAY_ADDRESS, which gets this code, or start one in this machine that ends with this process;
    return the most workers that it may have.

    Args:
        name: of the attempt that they work for.

    Raises:
        StageError, TryAgainError: as `join_cluster`; or a machine with too much to do starts none in time.
    """
    import ray

    if address := settings.ray_address():
        join_cluster(address)
        return most
    most = max(least, min(most, os.cpu_count() or 1))
    try:
        # Logical CPUs to spare: a controller or a reader that waits for a CPU for ever is the classic deadlock.
        ray.init(
            num_cpus=most + 2,
            include_dashboard=False,
            log_to_driver=False,
            namespace=name,
            object_store_memory=256 << 20,
        )
    except Exception as error:
        # Where its node is not there after 30 s Ray raises an Exception, no kind of it.
        if type(error) is not Exception and not isinstance(error, (ConnectionError, TimeoutError)):
            raise
        raise TryAgainError(
            f"Ray did not start in this machine: {error}", "run the same command again once the machine has less to do"
        ) from error
    return most


def join_cluster(address: str) -> None:
    """Join a cluster; its workers get the code of this checkout.

    Raises:
        StageError: the address is that of Ray Client, not of a head.
        TryAgainError: no cluster answers there.
    """
    import ray

    if "://" in address:
        raise StageError(
            f"RAY_ADDRESS {address} is an address of Ray Client", "set HOST:PORT of the cluster's head, as HOST:6379"
        )
    remedy = "start it, or correct RAY_ADDRESS or the cluster's RAY_AUTH_TOKEN, and run the same command again"
    if address != "auto" and not answers(address):
        raise TryAgainError(f"no Ray cluster answers at RAY_ADDRESS {address}", remedy)
    code = [str(ROOT / name) for name in CODE]
    try:
        ray.init(log_to_driver=False, runtime_env={"py_modules": code, "excludes": ["__pycache__"]})
    except ConnectionError as error:
        raise TryAgainError(f"the Ray cluster at RAY_ADDRESS {address} lets nobody in: {error}", remedy) from error


def answers(address: str) -> bool:
    """Return whether anything listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_CHECK_SECONDS):
            return True
    except OSError:
        return False


class HeadWatch:
    """Notices that the head of the cluster is gone.

    Without a head Ray waits, and after a minute ends the process from within, with neither a message nor an exit code
    of ours.
    """

    def __init__(self) -> None:
        import ray

        self.address = ray.get_runtime_context().gcs_address
        self.silences = 0

    def look(self, remedy: str, heard: bool = False) -> None:
        """Look once, some HEAD_CHECK_SECONDS after the last time.

        Args:
            heard: something else has shown that the cluster works.

        Raises:
            TryAgainError: the head is gone.
        """
        self.silences = 0 if heard or answers(self.address) else self.silences + 1
        if self.silences == HEAD_SILENCES:
            raise TryAgainError(f"the head of the Ray cluster, {self.address}, no longer answers", remedy)


def wait_for_workers(least: int, most: int, gpus: bool, had_room: bool = False) -> int:
    """Wait until the cluster has room for as many workers as it can have at most, and about a minute for the fewest;
    return how many.

    Args:
        had_room: there was room for them before: nodes that are missing may come back.

    Raises:
        StageError: it never will have; what was asked for, what it has and what of that is free is named.
        TryAgainError: others use it, or nodes were lost.
    """
    import ray

    one = {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 1.0}

    def fitting(resources: Mapping[str, float], most: int) -> int:
        return max(least, min(most, *(int(resources.get(name, 0)) for name in one)))

    workers = fitting(ray.cluster_resources(), most)
    while workers > least:
        if _has_room(one, workers, SETTLING_SECONDS):
            return workers
        workers = fitting(ray.available_resources(), workers - 1)
    if _has_room(one, least, PLACEMENT_SECONDS):
        return least
    has, free = ray.cluster_resources(), ray.available_resources()
    missing = next((name for name in reversed(one) if has.get(name, 0) < least), None)
    what = (
        f"no room for {least} worker(s) of {_counted(one, one)} each within {PLACEMENT_SECONDS} s: the cluster has"
        f" {_counted(has, one)}, free {_counted(free, one)}"
    )
    if missing and not had_room:
        raise StageError(what, f"take --workers {max(1, int(has.get(missing, 0)))} (WORKERS in make run), or add nodes")
    raise TryAgainError(
        what,
        f"run the same command again once {'lost nodes are back' if missing else 'others have ended'}, or with fewer"
        " --workers (WORKERS in make run)",
    )


def _has_room(one: Mapping[str, float], workers: int, seconds: float) -> bool:
    """Return whether so many workers, each with what `one` needs, find room within so many seconds."""
    from ray.util.placement_group import placement_group, remove_placement_group

    room = placement_group([dict(one)] * workers)
    try:
        return room.wait(seconds)
    finally:
        remove_placement_group(room)


def _counted(resources: Mapping[str, float], of: Iterable[str]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in of)

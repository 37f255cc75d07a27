"""Local files that more than one process reads or writes: replaced as a whole, changed by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a text so that a reader sees the old file or the whole new one.

    Args:
        durable: wait until it would survive a loss of power.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    if durable:
        sync(temporary)
    os.replace(temporary, path)
    if durable:
        sync(path.parent)


@contextmanager
def one_at_a_time(lock: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file, whose folder is made: partitions of a backfill end side by side.

    Args:
        waiting: called once where somebody else holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def sync(path: Path | str) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk: after a loss of power they are still there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

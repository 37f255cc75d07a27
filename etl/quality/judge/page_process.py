"""Has the page of an attempt written by a process of its own: `etl.quality.report` draws it, and the gate does not
wait."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etl.stage.errors import StageError
from etl.warehouse.store import TableStore


@contextmanager
def written_after(
    definition: str, store: TableStore, dt: str, attempt: str, reports: Path, only_stopped: bool = False
) -> Iterator[None]:
    """Have the page written when the body ends, also when it raises; the page's own failure is logged and costs
    nothing else.

    A process of its own writes it, and nobody waits for that: it loads its libraries while the gate is at work, goes
    on when its input ends, which says what stopped the gate, and logs where the page is a second after the gate has
    ended.

    Args:
        definition: what the gate was given as --dataset.
        only_stopped: write it only when the body raises.
    """
    command = [
        sys.executable,
        "-m",
        "etl.quality.report.write",
        "--dataset",
        definition,
        "--warehouse",
        store.warehouse,
        "--dt",
        dt,
        "--attempt",
        attempt,
        "--reports",
        str(reports),
        "--stopped-by",
        "-",
    ]
    writer = None if only_stopped else subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    stopped_by = ""
    try:
        yield
    except Exception as error:
        stopped_by = str(error) if isinstance(error, StageError) else f"{type(error).__name__}: {error}"
        writer = writer or subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        raise
    finally:
        if writer is not None and writer.stdin is not None:
            sys.stdout.flush()  # before what the other process has to say
            with contextlib.suppress(OSError):  # it has failed, and said so
                writer.stdin.write(stopped_by)
                writer.stdin.close()

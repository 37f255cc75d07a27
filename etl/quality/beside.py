"""Gates in the process of the job whose work they judge: Great Expectations is imported while Spark starts, not after.

A job that is given --reports judges the raw files before it reads them, and what it has staged when it is done. Its gate, a
command of its own, then publishes or stops without judging the same bytes again.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from etl.datasets import DatasetDefinition
from etl.errors import StageError
from etl.quality.audit import Audit
from etl.quality.gx import great_expectations
from etl.raw import RawLocation
from etl.store import TableStore


@contextmanager
def judging(stage: str, store: TableStore, definition: DatasetDefinition, raw: RawLocation, dt: str, attempt: str, reports: Path) -> Iterator[Callable[[bool], object]]:
    """Judge around the job of a stage (events or sequences).

    Yields:
        what the job asks whether the raw files may be used: it raises when they do not pass. Asked not to wait, it says
        nothing of a judgement that is still under way.

    Raises:
        StageError: a gate could not judge, or the raw files did not pass.
    """
    audit = Audit(store, definition, dt, attempt, reports, raw)
    over = threading.Event()

    def first() -> None:
        _once_java_runs(over)
        if stage == "events":
            audit.publish("raw")
        else:
            great_expectations()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        gate = pool.submit(first)
        try:
            yield lambda wait: gate.result() if wait or gate.done() else None
        except StageError:
            over.set()
            gate.result()  # what it says of the file is nearer to the cause
            raise
        finally:
            over.set()
    audit.judge_ahead(stage)


def _once_java_runs(over: threading.Event) -> None:
    """Wait until this process waits for Spark, so that the import does not keep it from starting it; or until it is over."""
    from pyspark import SparkContext

    while SparkContext._gateway is None and not over.wait(0.05):
        pass

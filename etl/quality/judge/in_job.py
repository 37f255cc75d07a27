"""Gates in the process of the job whose work they judge: Great Expectations is imported while Spark starts, not after.

A job that is given --reports judges the raw files before it reads them, and what it has staged when it is done. Its
gate, a command of its own, then publishes or stops without judging the same bytes again.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from etl.datasets.definition import DatasetDefinition
from etl.ingest.raw import RawLocation
from etl.quality.judge.audit import Audit
from etl.quality.judge.gx import great_expectations
from etl.quality.measure.partition import Partition
from etl.quality.measure.sequences import Bucket
from etl.stage.errors import StageError
from etl.warehouse.store import TableStore


@contextmanager
def judging_events(
    store: TableStore, definition: DatasetDefinition, raw: RawLocation, dt: str, attempt: str, reports: Path
) -> Iterator[Callable[[bool], object]]:
    """Judge the raw files before, and the staged days after the events job.

    Yields:
        what the job asks whether the raw files may be used: it raises when they do not pass. Asked not to wait, it says
        nothing of a judgement that is still under way.

    Raises:
        StageError: a gate could not judge, or the raw files did not pass.
    """
    audit = Audit(Partition(store, definition, dt, attempt, raw), reports)
    with _while_spark_starts(lambda: audit.publish("raw")) as (gate, over):

        def asked(wait: bool) -> object:
            if wait:
                over.set()  # Spark does not start where nothing is left to build
            return gate.result() if wait or gate.done() else None

        yield asked
    audit.judge_ahead("events")


@contextmanager
def judging_sequences(
    store: TableStore, definition: DatasetDefinition, dt: str, attempt: str, reports: Path
) -> Iterator[Callable[[Sequence[Bucket]], None]]:
    """Judge what the sequences job has staged.

    Yields:
        what takes the measures that the job's tasks have made of the files that they staged.

    Raises:
        StageError: the gate could not judge.
    """
    audit = Audit(Partition(store, definition, dt, attempt), reports)

    def take(buckets: Sequence[Bucket]) -> None:
        audit.partition.buckets = buckets

    with _while_spark_starts(great_expectations):
        yield take
    audit.judge_ahead("sequences")


@contextmanager
def _while_spark_starts(work: Callable[[], object]) -> Iterator[tuple[concurrent.futures.Future, threading.Event]]:
    over = threading.Event()

    def later() -> object:
        _once_java_runs(over)
        return work()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(later)
        try:
            yield future, over
        except StageError:
            over.set()
            future.result()  # what it says of the file is nearer to the cause
            raise
        finally:
            over.set()


def _once_java_runs(over: threading.Event) -> None:
    """Wait until this process waits for Spark, so that the import does not keep it from starting it; or until it is
    over."""
    from pyspark import SparkContext

    while SparkContext._gateway is None and not over.wait(0.05):
        pass

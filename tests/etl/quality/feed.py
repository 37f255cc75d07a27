"""A small simulated feed with one log file a UTC day, and its chain of real stages and gates in one Spark session."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from etl.datasets.definition import DatasetDefinition, dataset
from etl.datasets.simulate import Simulation, write_simulation
from etl.ingest.build_events import Build
from etl.ingest.raw import RawLocation
from etl.jobs import events as events_job
from etl.jobs import sequences as sequences_job
from etl.quality.judge.audit import Audit
from etl.quality.judge.outcomes import StageOutcome, read_outcomes
from etl.quality.measure.partition import Partition
from etl.quality.measure.scores import Scores
from etl.stage.errors import StageError
from etl.stage.spark import spark_session
from etl.warehouse.partitions import MS_PER_DAY, Window, add_days, day_number, days_between
from etl.warehouse.store import TableStore

FIRST, DAYS = "2022-04-08", 12
DT = add_days(FIRST, DAYS - 1)
BUCKETS, TARGET_DAYS, LOOKBACK_DAYS = 2, 3, 5
ROWS_A_DAY = 6_000
WEEK = (0.86, 0.84, 0.85, 0.88, 0.92, 1.0, 0.98)  # share of the users who come on Monday .. Sunday
DEFINITION = r"""
extends: kuairand_simulated
name: feed
first_day: 2022-04-08
logs:
  files: [log_*.csv]
  days_in_name: {pattern: 'log_(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)', zone: UTC, late_minutes: 0}
window: {target_days: 3, lookback_days: 5}
"""


def write_feed(folder: Path) -> DatasetDefinition:
    """Write the definition and the raw files of all days, with ordinary noise.

    Weekdays, and days that differ by chance.
    """
    simulation = Simulation(
        users=400, first_dt=FIRST, days=DAYS, length_scale=ROWS_A_DAY * DAYS / 400 / 12_450 * 1.1, items=600, seed=11
    )
    raw = folder / "raw"
    write_simulation(simulation, folder / "simulated")
    raw.mkdir()
    rng = np.random.default_rng(5)
    other_id = rng.permutation(simulation.items)  # else an item's id would be its rank of popularity
    table = pa.concat_tables([pacsv.read_csv(path) for path in sorted((folder / "simulated").glob("log_*.csv"))])
    table = table.set_column(1, "video_id", pa.array(other_id[table["video_id"].to_numpy()])).sort_by("time_ms")
    day = table["time_ms"].to_numpy() // MS_PER_DAY
    for dt in days_between(FIRST, DT):
        number = day_number(dt)
        here = rng.random(simulation.users) < WEEK[(number + 3) % 7] * rng.uniform(0.97, 1.0)
        write_log(raw / log_name(dt), table.filter(pa.array((day == number) & here[table["user_id"].to_numpy()])))
    items = pacsv.read_csv(folder / "simulated" / "video_features_basic_sim.csv")
    write_log(
        raw / "video_features_basic_sim.csv",
        items.set_column(0, "video_id", pa.array(other_id[items["video_id"].to_numpy()])),
    )
    shutil.copy(folder / "simulated" / "user_features_sim.csv", raw)
    (raw / "SIMULATED.json").write_text(json.dumps({"simulated": True}))
    path = folder / "feed.yaml"
    path.write_text(DEFINITION)
    return dataset(str(path))


def log_name(dt: str) -> str:
    return f"log_{dt}.csv"


def read_log(path: Path) -> pa.Table:
    return pacsv.read_csv(path)


def write_log(path: Path, table: pa.Table) -> None:
    path.unlink(missing_ok=True)  # it may be a hard link into the clean feed
    with path.open("wb") as stream:
        stream.write((",".join(table.column_names) + "\n").encode())
        pacsv.write_csv(table, stream, pacsv.WriteOptions(include_header=False, quoting_style="needed"))


class _Shared:
    """A Spark session that stages may stop as often as they like."""

    def __init__(self, spark) -> None:
        self._spark = spark

    def __getattr__(self, name: str):
        return getattr(self._spark, name)

    def stop(self) -> None:
        pass


@contextmanager
def one_spark_session() -> Iterator[None]:
    """Let both jobs use one session."""
    spark = spark_session("gates")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("etl.ingest.build_events", "etl.sequences.build_sequences"):
            patch.setattr(import_module(module), "spark_session", lambda name: _Shared(spark))
        try:
            yield
        finally:
            spark.stop()


class Feed:
    """One warehouse and raw folder; stages run in it as their command lines run them."""

    def __init__(self, folder: Path, definition: DatasetDefinition, reports: Path) -> None:
        self.folder, self.definition, self.reports = folder, definition, reports
        self.store = TableStore(str(folder / "warehouse"), definition.name)
        self.raw = folder / "raw"

    def copy(self, folder: Path) -> Feed:
        """Return the same feed elsewhere: hard links, since no stage ever writes into a file that is there."""
        for name in ("warehouse", "raw"):
            shutil.copytree(self.folder / name, folder / name, copy_function=os.link)
        return Feed(folder, self.definition, self.reports)

    def audit(self, attempt: str, dt: str = DT, scores: Scores | None = None) -> Audit:
        raw = RawLocation(str(self.raw))
        return Audit(Partition(self.store, self.definition, dt, attempt, raw, scores), self.reports)

    def build_events(self, attempt: str, dt: str = DT, lookback_days: int = LOOKBACK_DAYS) -> None:
        build = Build(dt, attempt, lookback_days, BUCKETS, 0.01)
        events_job.build_events(self.store, self.definition, RawLocation(str(self.raw)), build)

    def build_sequences(self, attempt: str, dt: str = DT) -> None:
        sequences_job.build_sequences(
            self.store, self.definition, RawLocation(str(self.raw)), Window(dt, TARGET_DAYS, LOOKBACK_DAYS), attempt
        )

    def run(self, attempt: str, dt: str = DT) -> StageError | None:
        """Run the chain of a day up to the training; return what stopped it."""
        steps: list[Callable[[], object]] = [
            lambda: self.audit(attempt, dt).publish("raw"),
            lambda: self.build_events(attempt, dt),
            lambda: self.audit(attempt, dt).publish("events"),
            lambda: self.build_sequences(attempt, dt),
            lambda: self.audit(attempt, dt).publish("sequences"),
            lambda: self.audit(attempt, dt).publish("training_input"),
        ]
        try:
            for step in steps:
                step()
        except StageError as error:
            return error
        return None

    def outcomes(self, attempt: str, dt: str = DT) -> dict[str, StageOutcome]:
        return {outcome.stage: outcome for outcome in read_outcomes(self.store, dt, attempt)}

    def change_log(self, change: Callable[[pa.Table], pa.Table], dt: str = DT) -> None:
        """Rewrite a day's log file."""
        path = self.raw / log_name(dt)
        write_log(path, change(read_log(path)))

    def restage(self, attempt: str, table: str, change: Callable[[pa.Table], pa.Table], dt: str = DT) -> None:
        """Stage a table as a job with a bug would: other rows, a manifest that fits them."""
        staged = self.store.staged(attempt, table, dt)
        assert staged is not None
        files = tuple(
            self.store.write_file(staged.work, table, dt, file.bucket, change(self.store.read_file(file)))
            for file in staged.manifest.files
        )
        self.store.write_staged_manifest(staged.work, replace(staged.manifest, files=files))

"""What the gates keep of a partition: its statistics, for the days that follow, and the outcome of each stage's gate.

    <warehouse>/<dataset>/quality/stats/stage=S/dt=D.parquet                      of days that passed: what trailing days are
    <warehouse>/<dataset>/quality/stats_rejected/stage=S/dt=D/<attempt>.parquet   of attempts that a gate stopped
    <warehouse>/<dataset>/quality/outcomes/dt=D/<attempt>/<stage>.json            every expectation that was evaluated

Nothing else knows these paths. A later attempt that passes replaces the statistics of its day.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from etl.partitions import add_days, days_between
from etl.store import TableStore

SEVERITIES = ("critical", "warning", "info")  # the worst first
STAGES = ("raw", "events", "items", "sequences", "training_input", "model_output")

# One row is one metric of one day; a vector is several metrics with a suffix (hour_share_00 .. hour_share_23).
STATS = pa.schema(
    [
        pa.field("dt", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),  # null: not measurable, a rate of an empty day
        pa.field("attempt", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Outcome:
    """One evaluated expectation.

    Attributes:
        column: the metric or column that it is about.
        observed, expected: what was found (day -> value for statistics) and the bounds, as JSON values.
        message: one sentence that names the thing, the value and the bound.
        data_docs: path of the Data Docs page that shows it, None where no page was written.
    """

    suite: str
    expectation: str
    column: str
    severity: str
    success: bool
    observed: Any
    expected: Any
    remedy: str
    message: str
    data_docs: str | None


@dataclass(frozen=True)
class StageOutcome:
    """What one gate found in one attempt at one partition.

    Attributes:
        finished_at_ms: Unix milliseconds.
        max_severity: the worst severity that failed: info, warning or critical; None when all held.
    """

    dataset: str
    simulated: bool
    dt: str
    attempt: str
    stage: str
    finished_at_ms: int
    max_severity: str | None
    outcomes: tuple[Outcome, ...]

    def failed(self, severity: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.success and outcome.severity == severity]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> StageOutcome:
        return StageOutcome.from_dict(json.loads(text))

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> StageOutcome:
        return StageOutcome(**{**raw, "outcomes": tuple(Outcome(**outcome) for outcome in raw["outcomes"])})


def write_stats(store: TableStore, stage: str, dt: str, attempt: str, metrics: Mapping[str, float | None], rejected: bool = False) -> str:
    """Keep the statistics of a day; return the path below the data set's folder.

    Args:
        metrics: name -> value; None and nan are not measurable.
        rejected: the gate stopped this attempt: trailing days never show it.
    """
    names = sorted(metrics)
    values = [None if (value := metrics[name]) is None or math.isnan(value) else float(value) for name in names]
    table = pa.table([[dt] * len(names), [stage] * len(names), names, values, [attempt] * len(names)], schema=STATS)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    path = _stats_path(stage, dt, attempt if rejected else None)
    store.write_bytes(path, sink.getvalue())
    return path


def read_stats(store: TableStore, stage: str, last_dt: str, days: int) -> pa.Table:
    """Return the kept statistics of the `days` days that end on `last_dt`, oldest first; days without any are left out.

    For the trailing days of a partition, ask up to the day before it.
    """
    tables = []
    for dt in days_between(add_days(last_dt, 1 - days), last_dt):
        path = f"{store.root}/{_stats_path(stage, dt)}"
        if store.fs.get_file_info(path).type == pafs.FileType.File:
            tables.append(pq.read_table(path, filesystem=store.fs, partitioning=None, schema=STATS))
    return pa.concat_tables(tables) if tables else STATS.empty_table()


def read_rejected(store: TableStore, stage: str, dt: str) -> pa.Table:
    """Return the statistics of every attempt at a day that a gate stopped, one block of rows an attempt."""
    folder = f"{store.root}/quality/stats_rejected/stage={stage}/dt={dt}"
    infos = store.fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    paths = sorted(info.path for info in infos if info.base_name.endswith(".parquet"))
    tables = [pq.read_table(path, filesystem=store.fs, partitioning=None, schema=STATS) for path in paths]
    return pa.concat_tables(tables) if tables else STATS.empty_table()


def write_outcome(store: TableStore, outcome: StageOutcome) -> str:
    """Keep what a gate found; return the path below the data set's folder. A retry of the attempt replaces it."""
    path = _outcome_path(outcome.dt, outcome.attempt, outcome.stage)
    store.write_text(path, outcome.to_json())
    return path


def read_outcomes(store: TableStore, dt: str, attempt: str) -> list[StageOutcome]:
    """Return what the gates found in an attempt at a partition, in the order of the stages."""
    texts = [store.read_text(_outcome_path(dt, attempt, stage)) for stage in STAGES]
    return [StageOutcome.from_json(text) for text in texts if text is not None]


def outcome_attempts(store: TableStore) -> list[tuple[str, str]]:
    """Return every (day, attempt) of which an outcome is kept, by day and name of the attempt."""
    found = []
    for day in store.fs.get_file_info(pafs.FileSelector(f"{store.root}/quality/outcomes", allow_not_found=True)):
        for attempt in store.fs.get_file_info(pafs.FileSelector(day.path, allow_not_found=True)):
            if attempt.type == pafs.FileType.Directory:
                found.append((day.base_name.removeprefix("dt="), attempt.base_name))
    return sorted(found)


def _stats_path(stage: str, dt: str, rejected_attempt: str | None = None) -> str:
    if rejected_attempt is None:
        return f"quality/stats/stage={stage}/dt={dt}.parquet"
    return f"quality/stats_rejected/stage={stage}/dt={dt}/{rejected_attempt}.parquet"


def _outcome_path(dt: str, attempt: str, stage: str) -> str:
    return f"quality/outcomes/dt={dt}/{attempt}/{stage}.json"

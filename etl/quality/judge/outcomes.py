"""What the gates keep of a partition: its statistics, for the days that follow, and the outcome of each stage's gate.

    <warehouse>/<dataset>/quality/stats/stage=S/dt=D.parquet                      of days that passed: what trailing days are
    <warehouse>/<dataset>/quality/stats_rejected/stage=S/dt=D/<attempt>.parquet   of attempts that a gate stopped
    <warehouse>/<dataset>/quality/outcomes/dt=D/<attempt>/<stage>.json            every expectation that was evaluated
    <warehouse>/<dataset>/quality/passes/dt=D/<stage>.<when>.json                 a person's decision to let a stopped partition through once

Nothing else knows these paths. A later attempt that passes replaces the statistics of its day.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from etl.warehouse.partitions import add_days, days_between
from etl.warehouse.store import TableStore

SEVERITIES = ("critical", "warning", "info")  # the worst first
GATES = ("raw", "events", "sequences", "training_input", "model_output")
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
        rows: every day (or file) on which it failed; `observed` shows some. Not told by outcomes of earlier versions.
        passable: a person can let its failure through; what breaks the tables' contract nobody can.
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
    rows: tuple[str, ...] = ()
    passable: bool = True

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Outcome:
        return Outcome(**{**raw, "rows": tuple(raw.get("rows", ()))})


@dataclass(frozen=True)
class Failing:
    """One critical expectation that a person lets through, on the days (or files) that they have seen fail."""

    suite: str
    expectation: str
    column: str
    rows: tuple[str, ...]
    message: str

    @staticmethod
    def of(outcome: Outcome) -> Failing:
        rows = outcome.rows or (outcome.observed if isinstance(outcome.observed, Mapping) else ())
        return Failing(outcome.suite, outcome.expectation, outcome.column, tuple(sorted(rows)), outcome.message)

    def covers(self, outcome: Outcome) -> bool:
        """Whether it is this expectation that failed, nowhere else than seen, and one that may be let through."""
        other = Failing.of(outcome)
        return outcome.passable and (self.suite, self.expectation, self.column) == (other.suite, other.expectation, other.column) and set(other.rows) <= set(self.rows)


@dataclass(frozen=True)
class Decision:
    """A person's decision to let a stopped partition through one gate, once.

    Attributes:
        attempt: the attempt that was stopped.
        by, at_ms, reason: who, when (Unix milliseconds) and why.
        failing: what may fail; anything else still stops.
        used_by: the attempt that it has let through, '' before.
    """

    dt: str
    stage: str
    attempt: str
    by: str
    at_ms: int
    reason: str
    failing: tuple[Failing, ...]
    used_by: str = ""

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Decision:
        return Decision(**{**raw, "failing": tuple(Failing(**{**one, "rows": tuple(one["rows"])}) for one in raw["failing"])})


@dataclass(frozen=True)
class StageOutcome:
    """What one gate found in one attempt at one partition.

    Attributes:
        finished_at_ms: Unix milliseconds.
        max_severity: the worst severity that failed: info, warning or critical; None when all held.
        bounds: what the definition sets of the bounds that this gate looks at: name -> value, default, reason.
        passed: the decision that has let it through although it is critical.
    """

    dataset: str
    simulated: bool
    dt: str
    attempt: str
    stage: str
    finished_at_ms: int
    max_severity: str | None
    outcomes: tuple[Outcome, ...]
    bounds: Mapping[str, Any] = field(default_factory=dict)
    passed: Decision | None = None

    @property
    def stopped(self) -> bool:
        return self.max_severity == "critical" and self.passed is None

    @property
    def passable(self) -> bool:
        """Whether a person can let through what has stopped it."""
        return self.stopped and all(outcome.passable for outcome in self.failed("critical"))

    def failed(self, severity: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.success and outcome.severity == severity]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> StageOutcome:
        return StageOutcome.from_dict(json.loads(text))

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> StageOutcome:
        passed = Decision.from_dict(raw["passed"]) if raw.get("passed") else None
        return StageOutcome(**{**raw, "outcomes": tuple(map(Outcome.from_dict, raw["outcomes"])), "passed": passed})


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


def write_decision(store: TableStore, decision: Decision) -> str:
    """Keep a decision; return the path below the data set's folder."""
    path = f"{_passes_folder(decision.dt)}/{decision.stage}.{decision.at_ms}.json"
    store.write_text(path, json.dumps(asdict(decision), indent=1, ensure_ascii=False))
    return path


def read_decisions(store: TableStore, dt: str, stage: str) -> list[Decision]:
    """Return the decisions about a partition at a gate, the newest first."""
    infos = store.fs.get_file_info(pafs.FileSelector(f"{store.root}/{_passes_folder(dt)}", allow_not_found=True))
    names = [info.base_name for info in infos if info.base_name.startswith(f"{stage}.") and info.base_name.endswith(".json")]
    texts = [store.read_text(f"{_passes_folder(dt)}/{name}") for name in names]
    return sorted((Decision.from_dict(json.loads(text)) for text in texts if text), key=lambda decision: -decision.at_ms)


def let_through(store: TableStore, outcome: StageOutcome) -> StageOutcome:
    """Use the decision that covers all that is critical in an outcome, if there is one; a retry of its attempt may use it again."""
    failed = outcome.failed("critical")
    for decision in read_decisions(store, outcome.dt, outcome.stage):
        if decision.used_by in ("", outcome.attempt) and failed and all(any(one.covers(failure) for one in decision.failing) for failure in failed):
            used = replace(decision, used_by=outcome.attempt)
            write_decision(store, used)
            return replace(outcome, passed=used)
    return outcome


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


def _passes_folder(dt: str) -> str:
    return f"quality/passes/dt={dt}"


def _outcome_path(dt: str, attempt: str, stage: str) -> str:
    return f"quality/outcomes/dt={dt}/{attempt}/{stage}.json"

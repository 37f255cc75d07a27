"""What the gates found in a partition, and what persons decided about it.

    <warehouse>/<dataset>/quality/outcomes/dt=D/<attempt>/<stage>.json            every expectation that was evaluated
    <warehouse>/<dataset>/quality/passes/dt=D/<stage>.<when>.json   who let a stopped partition through, once

Nothing else knows these paths. The statistics that were judged are in `etl.quality.measure.statistics`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow.fs as pafs

from etl.warehouse.store import TableStore

SEVERITIES = ("critical", "warning", "info")  # the worst first
STAGES = (
    "raw",
    "events",
    "items",
    "sequences",
    "training_input",
    "model_output",
)  # of statistics; items are judged with sequences


@dataclass(frozen=True)
class Outcome:
    """One evaluated expectation.

    Attributes:
        column: the metric or column that it is about.
        observed, expected: what was found (day -> value for statistics) and the bounds, as JSON values.
        message: one sentence that names the thing, the value and the bound.
        data_docs: path of the Data Docs page that shows it, None where no page was written.
        rows: every day (or file) on which it failed; `observed` shows some. Outcomes of earlier versions do not say.
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
        return (
            outcome.passable
            and (self.suite, self.expectation, self.column) == (other.suite, other.expectation, other.column)
            and set(other.rows) <= set(self.rows)
        )


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
        return Decision(
            **{**raw, "failing": tuple(Failing(**{**one, "rows": tuple(one["rows"])}) for one in raw["failing"])}
        )


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


def write_outcome(store: TableStore, outcome: StageOutcome) -> str:
    """Write what a gate found; return the path below the data set's folder. A retry of the attempt replaces it."""
    path = _outcome_path(outcome.dt, outcome.attempt, outcome.stage)
    store.write_text(path, outcome.to_json())
    return path


def read_outcomes(store: TableStore, dt: str, attempt: str) -> list[StageOutcome]:
    """Return what the gates found in an attempt at a partition, in the order of the stages."""
    texts = [store.read_text(_outcome_path(dt, attempt, stage)) for stage in STAGES]
    return [StageOutcome.from_json(text) for text in texts if text is not None]


def write_decision(store: TableStore, decision: Decision) -> str:
    """Write a decision; return the path below the data set's folder."""
    path = f"{_passes_folder(decision.dt)}/{decision.stage}.{decision.at_ms}.json"
    store.write_text(path, json.dumps(asdict(decision), indent=1, ensure_ascii=False))
    return path


def read_decisions(store: TableStore, dt: str, stage: str) -> list[Decision]:
    """Return the decisions about a partition at a gate, the newest first."""
    infos = store.fs.get_file_info(pafs.FileSelector(f"{store.root}/{_passes_folder(dt)}", allow_not_found=True))
    names = [
        info.base_name for info in infos if info.base_name.startswith(f"{stage}.") and info.base_name.endswith(".json")
    ]
    texts = [store.read_text(f"{_passes_folder(dt)}/{name}") for name in names]
    return sorted(
        (Decision.from_dict(json.loads(text)) for text in texts if text), key=lambda decision: -decision.at_ms
    )


def let_through(store: TableStore, outcome: StageOutcome) -> StageOutcome:
    """Use the decision that covers all that is critical in an outcome, if there is one; a retry of its attempt may
    use it again."""
    failed = outcome.failed("critical")
    for decision in read_decisions(store, outcome.dt, outcome.stage):
        if (
            decision.used_by in ("", outcome.attempt)
            and failed
            and all(any(one.covers(failure) for one in decision.failing) for failure in failed)
        ):
            used = replace(decision, used_by=outcome.attempt)
            write_decision(store, used)
            return replace(outcome, passed=used)
    return outcome


def outcome_attempts(store: TableStore) -> list[tuple[str, str]]:
    """Return every (day, attempt) of which there is an outcome, by day and name of the attempt."""
    found = []
    for day in store.fs.get_file_info(pafs.FileSelector(f"{store.root}/quality/outcomes", allow_not_found=True)):
        for attempt in store.fs.get_file_info(pafs.FileSelector(day.path, allow_not_found=True)):
            if attempt.type == pafs.FileType.Directory:
                found.append((day.base_name.removeprefix("dt="), attempt.base_name))
    return sorted(found)


def _passes_folder(dt: str) -> str:
    return f"quality/passes/dt={dt}"


def _outcome_path(dt: str, attempt: str, stage: str) -> str:
    return f"quality/outcomes/dt={dt}/{attempt}/{stage}.json"

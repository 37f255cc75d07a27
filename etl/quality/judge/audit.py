"""Gate between build and use: validate what an attempt has staged, then publish it, or stop and publish nothing.

    python -m etl.quality.judge.audit --dataset D --warehouse W --dt YYYY-MM-DD --attempt A --stage S [--reports DIR]
    [--raw R]

raw              validates the raw files that may hold the day (--raw), before anything is built from them
events           validates every staged day of `events`; publishes `quarantine` and `events`, the partition's day last
sequences        validates staged `items` and `sequences`; publishes `items`, then `sequences`
training_input   validates that published `sequences` are complete and made of what is published now; publishes nothing

The gate model_output is the evaluation's: it hands the scores in and asks for the judgement before it ends.

A failed critical expectation stops the stage, whatever else holds; warnings are logged and publication goes on.
Statistics and outcomes are written below the warehouse (`etl.quality.measure.statistics`,
`etl.quality.judge.outcomes`). `etl.quality.judge.check` looks and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.datasets.quality_rules import stated_bounds
from etl.ingest.raw import RawLocation
from etl.metrics.record import NAN
from etl.metrics.registry import GATES
from etl.quality.judge.gx import built, import_early, validate
from etl.quality.judge.outcomes import SEVERITIES, Outcome, StageOutcome, let_through, write_outcome
from etl.quality.judge.page_process import written_after
from etl.quality.judge.pass_once import pass_command
from etl.quality.measure.measured import Evidence, numbers
from etl.quality.measure.partition import Partition
from etl.quality.measure.statistics import write_stats
from etl.stage.commands import log, run_stage
from etl.stage.errors import GateError, TryAgainError
from etl.warehouse.store import Staged, TableStore, require_one_day

STAGED_TABLES = {
    "events": ("quarantine", "events"),
    "sequences": ("items", "sequences"),
}  # items first: sequences point into it
BY_EVALUATION = "model_output"  # the gate that has no command line: it judges what the evaluation hands in
CONSEQUENCES = {
    "raw": "nothing was built",
    "training_input": "training must not start",
    "model_output": "the model must not be registered",
}
NAMED_METRICS = 4  # in the first line of a stop: as many as the note of a run, which shows that line, has room for

Statistics = tuple[str, str, dict[str, float]]  # stage, day, metrics


@dataclass
class Audit:
    """One gate run at one partition.

    Attributes:
        partition: what is judged; without an attempt, what is published.
        reports: local folder for Data Docs; None: no pages.
    """

    partition: Partition
    reports: Path | None = None

    def __post_init__(self) -> None:
        for expectation in self.partition.definition.quality.expectations:
            built(expectation)  # wrong arguments are refused before anything is read
        if (attempt := self.partition.attempt) is not None:
            require_one_day(attempt, self.partition.dt, self.store.tries(attempt))

    @property
    def store(self) -> TableStore:
        return self.partition.store

    @property
    def attempt(self) -> str:
        assert self.partition.attempt is not None
        return self.partition.attempt

    def publish(self, gate: str) -> StageOutcome | None:
        """Validate, write down what was found, and publish; None when this attempt has published already.

        Raises:
            GateError: a critical expectation failed.
            StageError: nothing to audit, or an unreadable table.
        """
        if self._published_already(gate):
            log(f"{gate} dt={self.partition.dt}: already published by attempt {self.attempt}, nothing to do")
            return None
        staged = self._staged(gate)
        ahead = self._judged_ahead(staged)
        outcome, statistics = ahead or self._judged_now(gate)
        if self._staged(gate) != staged:
            raise TryAgainError(
                f"stage {gate}, dt={self.partition.dt}: attempt {self.attempt} began a new try while its gate judged"
                " the one before, nothing was published",
                "run the gate again when the stage that builds it has ended",
            )
        if outcome.stopped:
            outcome = let_through(self.store, outcome)
        write_outcome(self.store, outcome)
        for stage, day, metrics in statistics:
            write_stats(self.store, stage, day, self.attempt, metrics, rejected=outcome.stopped)
        _log(outcome)
        if outcome.stopped:
            raise self._critical(outcome)
        if staged and ahead is None:
            self._write_judgement(staged, outcome, statistics)
        self.store.publish_all(
            staged,
            lambda m: log(f"published {m.table} dt={m.dt}: {m.rows} rows, data digest {m.data_digest[:16]}"),
        )
        if staged:
            self.store.forget(_judgement_path(staged))
        return outcome

    def judge_ahead(self, gate: str) -> None:
        """Judge, in the process of the job that has staged it, what the gate will then publish or stop: it takes that
        over.

        The gate does so only for the very try that was judged, and publishes only, byte for byte, what was judged.
        """
        staged = self._staged(gate)
        self._write_judgement(staged, *self._judged_now(gate))
        log(f"{gate} dt={self.partition.dt}: judged in the job's process; its gate reports and decides")

    def judge(self, gate: str, evidence: Evidence) -> StageOutcome:
        """Validate measured metrics; writes Data Docs, nothing else."""
        of, definition = self.partition, self.partition.definition
        run_name = f"{of.attempt or 'published'}-{gate}"
        outcomes = validate(evidence.checks, run_name, self.reports, of.thresholds)
        failed = {outcome.severity for outcome in outcomes if not outcome.success}
        return StageOutcome(
            definition.name,
            definition.simulated,
            of.dt,
            of.attempt or "",
            gate,
            round(time.time() * 1_000),
            next((severity for severity in SEVERITIES if severity in failed), None),
            tuple(outcomes),
            stated_bounds(definition.quality.bounds, gate),
        )

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _judged_now(self, gate: str) -> tuple[StageOutcome, list[Statistics]]:
        import_early()
        evidence = self.partition.measure(gate)
        outcome = self.judge(gate, evidence)
        return outcome, [(stage, day, numbers(metrics)) for stage, day, metrics in evidence.statistics]

    def _judged_ahead(self, staged: Sequence[Staged]) -> tuple[StageOutcome, list[Statistics]] | None:
        """Return what was judged of what is staged now, of this very try, None when it was not."""
        text = self.store.read_text(_judgement_path(staged)) if staged else None
        if text is None:
            return None
        ahead = json.loads(text)
        if ahead["judged"] != _judged(staged) or ahead["quality"] != self.partition.definition.quality.digest:
            return None
        statistics = [
            (stage, day, {name: NAN if value is None else value for name, value in metrics.items()})
            for stage, day, metrics in ahead["statistics"]
        ]
        return StageOutcome.from_dict(ahead["outcome"]), statistics

    def _write_judgement(
        self, staged: Sequence[Staged], outcome: StageOutcome, statistics: Sequence[Statistics]
    ) -> None:
        """Record, in the try's folder, which files of it were judged and how: these are what may be published."""
        record = {
            "judged": _judged(staged),
            "quality": self.partition.definition.quality.digest,
            "outcome": asdict(outcome),
            "statistics": statistics,
        }
        self.store.write_text(_judgement_path(staged), json.dumps(record))

    def _staged(self, gate: str) -> list[Staged]:
        """Return every partition that this attempt has staged for a gate, in the order of publication: the newest
        try."""
        if self.partition.attempt is None:
            return []
        dt = self.partition.dt
        tables = {table: self.store.staged_partitions(self.attempt, table) for table in STAGED_TABLES.get(gate, ())}
        days = {day for staged in tables.values() for day in staged} if gate == "events" else {dt}
        ordered = sorted(days, key=lambda day: (day == dt, day))
        return [staged[day] for day in ordered for staged in tables.values() if day in staged]

    def _critical(self, outcome: StageOutcome) -> GateError:
        failed = outcome.failed("critical")
        lines = "".join(
            f"\n  {o.message} [{o.expectation} of suite {o.suite}]\n    see {o.data_docs or 'no page'}" for o in failed
        )
        remedy = "; ".join(dict.fromkeys(o.remedy for o in failed))
        if outcome.passable:
            command = pass_command(self.store.warehouse, outcome)
            remedy += f". Once looked at, a person can let exactly this through, once: {command}, then clear the task"
        return GateError(
            f"stage {outcome.stage}, dt={outcome.dt}, attempt {self.attempt}: {len(failed)} critical expectation(s)"
            f" failed ({_named(failed)}), {CONSEQUENCES.get(outcome.stage, 'nothing was published')}{lines}",
            remedy,
        )

    def _published_already(self, gate: str) -> bool:
        """Whether this attempt has staged nothing more of what the gate publishes."""
        dt, own = self.partition.dt, self.partition.own
        if gate == "events":
            return not self.store.staged_days(self.attempt, "events") and own("events", dt) is not None
        if gate == "sequences":
            tables = STAGED_TABLES[gate]
            staged = any(self.store.staged_manifest(self.attempt, name, dt) for name in tables)
            return all(own(name, dt) for name in tables) and not staged
        return False


def _named(failed: Sequence[Outcome]) -> str:
    """Return the metrics that failed, each once; of many the first ones and how many more."""
    names = list(dict.fromkeys(outcome.column for outcome in failed))
    more = len(names) - NAMED_METRICS
    return ", ".join(names[:NAMED_METRICS]) + (f" and {more} more" if more > 0 else "")


def _log(outcome: StageOutcome) -> None:
    """Log warnings and the sum."""
    for severity in SEVERITIES[1:]:
        for failed in outcome.failed(severity):
            log(f"{severity}: stage {outcome.stage} dt={outcome.dt}: {failed.message}")
    counts = ", ".join(f"{len(outcome.failed(severity))} {severity}" for severity in SEVERITIES)
    pages = ", ".join(dict.fromkeys(o.data_docs for o in outcome.outcomes if o.data_docs)) or "not written"
    log(f"{outcome.stage} dt={outcome.dt}: {len(outcome.outcomes)} expectations, failed: {counts}; Data Docs {pages}")
    if outcome.passed is not None:
        let = ", ".join(one.column for one in outcome.passed.failing)
        log(
            f"{outcome.stage} dt={outcome.dt}: let through once by {outcome.passed.by}: {outcome.passed.reason} ({let})"
        )


def _judged(staged: Sequence[Staged]) -> dict[str, dict[str, Any]]:
    """Return what identifies the staged files that a gate judges: each partition's try, and path, size, sha256 of its
    files."""
    return {
        f"{one.manifest.table}/dt={one.manifest.dt}": {
            "try": one.work.name,
            "data_digest": one.manifest.data_digest,
            "files": {file.path: [file.bytes, file.digest] for file in one.manifest.files},
        }
        for one in staged
    }


def _judgement_path(staged: Sequence[Staged]) -> str:
    """Path below the dataset's folder: with what the try has staged of the partition's own day, which is the last."""
    return f"{staged[-1].work.folder}/judged.json"


def audit_parser(description: str | None, attempt_required: bool = True) -> argparse.ArgumentParser:
    """Return a parser of what every gate takes."""
    parser = partition_parser(description, attempt_required)
    gates = [gate for gate in GATES if gate != BY_EVALUATION]
    parser.add_argument("--stage", required=True, choices=gates, help="which gate to run")
    parser.add_argument("--raw", help="stage raw: folder or URI of the raw logs")
    return parser


def audit_of(args: argparse.Namespace, reports: Path | None) -> Audit:
    """Return the gate that a command line names."""
    raw = RawLocation(args.raw) if args.raw else None
    return Audit(Partition(store_of(args), definition_of(args), args.dt, args.attempt, raw), reports)


def main(argv: list[str] | None = None) -> None:
    """Audit one stage of one partition."""
    parser = audit_parser(__doc__)
    parser.add_argument("--reports", default="var/reports", help="local folder for Data Docs (default: %(default)s)")
    args = parser.parse_args(argv)
    audit = audit_of(args, Path(args.reports))
    with written_after(args.dataset_given, audit.store, args.dt, args.attempt, Path(args.reports)):
        audit.publish(args.stage)


if __name__ == "__main__":
    run_stage(main)

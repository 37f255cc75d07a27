"""Gate between build and use: validate what an attempt has staged, then publish it, or stop and publish nothing.

    python -m etl.quality.judge.audit --dataset D --warehouse W --dt YYYY-MM-DD --attempt A --stage S [--reports DIR] [--raw R] [--runs RUNS]

raw              validates the raw files that may hold the day (--raw), before anything is built from them
events           validates every staged day of `events`; publishes `quarantine` and `events`, the partition's day last
sequences        validates staged `items` and `sequences`; publishes `items`, then `sequences`
training_input   validates that published `sequences` are complete and made of what is published now; publishes nothing
model_output     validates the scores of the attempt's primary model (--runs); the evaluation calls it before it ends

A failed critical expectation stops the stage, whatever else holds; warnings are logged and publication goes on. Statistics
and outcomes are kept below the warehouse (`etl.quality.judge.outcomes`). `etl.quality.judge.check` looks and changes nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.datasets.definition import DatasetDefinition, History
from etl.datasets.quality_rules import STATISTICS, Condition, stated_bounds
from etl.datasets.thresholds import Thresholds
from etl.ingest.freshness import rows_to_keep, same_rows
from etl.ingest.raw import RawLocation
from etl.quality.judge import outcomes as kept
from etl.quality.judge.gx import import_early
from etl.quality.judge.outcomes import GATES, SEVERITIES, StageOutcome
from etl.quality.judge.pass_once import pass_command
from etl.quality.judge.validate import EVERY_ROW, Check, OwnCheck, validate
from etl.quality.measure import own_rules as own
from etl.quality.measure import profile, stats
from etl.quality.measure import raw_files as raw_stats
from etl.quality.measure.drift import NAN, event_drift, median_of, vocabulary_drift
from etl.quality.measure.model_output import model_output_row
from etl.quality.report.write import written_after
from etl.stage.commands import log, run_stage
from etl.stage.errors import GateError, StageError, TryAgainError
from etl.warehouse.partitions import Window, add_days
from etl.warehouse.schemas import EVENTS
from etl.warehouse.store import DataFile, Manifest, Staged, TableStore, require_one_day

STAGED_TABLES = {"events": ("quarantine", "events"), "sequences": ("items", "sequences")}  # items first: sequences point into it
MAX_THREADS = 4  # that measure buckets of sequences


Statistics = tuple[str, str, dict[str, float]]  # stage, day, metrics


@dataclass(frozen=True)
class Evidence:
    """What a gate has measured.

    Attributes:
        checks: the rows of metrics and their suites.
        statistics: (stage, day, metrics) to keep for the days that follow.
    """

    checks: Sequence[Check | OwnCheck]
    statistics: Sequence[tuple[str, str, Mapping[str, Any]]]


@dataclass
class Audit:
    """One gate run at one partition.

    Attributes:
        store: the data set's tables.
        definition: the data set.
        dt: the partition.
        attempt: the attempt whose staged tables are judged; None: what is published.
        reports: local folder for Data Docs; None: no pages.
        raw: the raw logs, for gate raw.
        run_dir: the attempt's folder of runs, for gate model_output.
        buckets: what the job's tasks have measured of the sequences that they staged.
    """

    store: TableStore
    definition: DatasetDefinition
    dt: str
    attempt: str | None
    reports: Path | None = None
    raw: RawLocation | None = None
    run_dir: Path | None = None
    buckets: Sequence[stats.Bucket] | None = None
    thresholds: Thresholds = field(init=False)

    def __post_init__(self) -> None:
        self.thresholds = self.definition.quality.thresholds()
        for expectation in self.definition.quality.expectations:
            own.built(expectation)  # wrong arguments are told before anything is read
        if self.attempt is not None:
            require_one_day(self.attempt, self.dt, self.store.tries(self.attempt))

    # ---- one gate, two ways --------------------------------------------------------------------------------------

    def publish(self, stage: str) -> StageOutcome | None:
        """Validate, keep what was found, and publish; None when this attempt has published already.

        Raises:
            GateError: a critical expectation failed.
            StageError: nothing to audit, or an unreadable table.
        """
        assert self.attempt is not None
        if self._published_already(stage):
            log(f"{stage} dt={self.dt}: already published by attempt {self.attempt}, nothing to do")
            return None
        staged = self._staged(stage)
        ahead = self._judged_ahead(staged)
        outcome, statistics = ahead or self._judged_now(stage)
        if self._staged(stage) != staged:
            raise TryAgainError(f"stage {stage}, dt={self.dt}: attempt {self.attempt} began a new try while its gate judged the one before, nothing was published",
                             "run the gate again when the stage that builds it has ended")  # fmt: skip
        if outcome.stopped:
            outcome = kept.let_through(self.store, outcome)
        stopped = outcome.stopped
        kept.write_outcome(self.store, outcome)
        for of_stage, day, metrics in statistics:
            kept.write_stats(self.store, of_stage, day, self.attempt, metrics, rejected=stopped)
        self._tell(outcome)
        if outcome.passed is not None:
            log(f"{stage} dt={self.dt}: let through once by {outcome.passed.by}: {outcome.passed.reason} ({', '.join(one.column for one in outcome.passed.failing)})")
        if stopped:
            raise self._critical(outcome)
        if staged and ahead is None:
            self._keep_judgement(staged, outcome, statistics)
        self.store.publish_all(staged, lambda m: log(f"published {m.table} dt={m.dt}: {m.rows} rows, data digest {m.data_digest[:16]}"))
        if staged:
            self.store.forget(_judgement_path(staged))
        return outcome

    def judge_ahead(self, stage: str) -> None:
        """Judge, in the process of the job that has staged it, what the gate will then publish or stop: the gate takes it over.

        The gate does so only for the very try that was judged, and publishes only, byte for byte, what was judged.
        """
        staged = self._staged(stage)
        self._keep_judgement(staged, *self._judged_now(stage))
        log(f"{stage} dt={self.dt}: judged beside the job; its gate tells and decides")

    def judge(self, stage: str, evidence: Evidence) -> StageOutcome:
        """Validate measured metrics; writes Data Docs, nothing else."""
        outcomes = validate(evidence.checks, f"{self.attempt or 'published'}-{stage}", self.reports, self.thresholds)
        failed = {outcome.severity for outcome in outcomes if not outcome.success}
        worst = next((severity for severity in SEVERITIES if severity in failed), None)
        return StageOutcome(self.definition.name, self.definition.simulated, self.dt, self.attempt or "", stage, round(time.time() * 1_000), worst, tuple(outcomes),
                            stated_bounds(self.definition.quality.bounds, stage))  # fmt: skip

    def measure(self, stage: str) -> Evidence:
        """Return the metrics of a stage.

        Raises:
            StageError: nothing to audit, or an unreadable table.
        """
        measures = {"raw": self._raw, "events": self._events, "sequences": self._sequences, "training_input": self._training_input, "model_output": self._model_output}
        evidence = measures[stage]()
        return replace(evidence, checks=[*evidence.checks, *self._own_checks(stage, evidence)])

    # ---- the gates -----------------------------------------------------------------------------------------------

    def _raw(self) -> Evidence:
        if self.raw is None:
            raise StageError("the gate of raw files needs to know where they are", "give their folder or URI with --raw")
        files = self.raw.logs(self.definition)
        mine = [file for file in files if file.may_hold(self.dt)]
        found = [raw_stats.file_findings(self.raw, file, files, self.definition, self.thresholds.raw) for file in mine]
        details: dict[str, dict[str, str]] = {}
        for findings in found:
            for name, text in findings.details.items():
                details.setdefault(name, {})[str(findings.metrics["file"])] = text
        day = raw_stats.day_row(self.dt, files, self.thresholds.drift)
        checks = [Check("raw_day", [day], details={"files": {EVERY_ROW: f"no log file in {self.raw.uri} covers dt={self.dt}"}})]
        if found:
            checks.append(Check("raw_files", [findings.metrics for findings in found], key="file", details=details))
        worst = {name: max((value for f in found if isinstance(value := f.metrics[name], int | float) and not np.isnan(value)), default=NAN)
                 for name in ("refused_share", "outside_named_days_share", "sampled_lines")}  # fmt: skip
        return Evidence(checks, [("raw", self.dt, {**day, **worst})])

    def _events(self) -> Evidence:
        staged = {day: manifest for day in self._days("events") if (manifest := self._own("events", day))}
        if self.dt not in staged:
            raise self._nothing_staged("events", "etl.jobs.events")
        definition, limits, drift = self.definition, self.thresholds.events, self.thresholds.drift
        fields = {name: rule.kind for name, rule in definition.events.item_fields.items()}
        vocabularies = ["context", *(name for name, kind in fields.items() if kind == "category")]
        first = min(staged)
        known_days = dict(zip(self._days_before(first), self._statistics("events", first, drift.trailing_days), strict=True))
        tables: dict[str, pa.Table] = {}
        rows: list[stats.Row] = []
        details: dict[str, dict[str, str]] = {}
        for day, manifest in sorted(staged.items()):
            self._check_files(manifest)
            table = self.store.read(manifest, [*EVENTS.names, *(name for name in vocabularies if name != "context")], empty=own.contract(self.definition, "events"))
            quarantine = self._own("quarantine", day)
            if quarantine is not None:
                self._check_files(quarantine)
            row = stats.events_row(
                day, day == self.dt, table, manifest.counts, quarantine.rows if quarantine else 0, self._trailing_rows(day),
                definition.label_bit, len(definition.feedback_fields), limits, drift, definition.logs.repeats == "keep",
                rows_to_keep(manifest, self.store.manifest("events", day)))  # fmt: skip
            memory = profile.memory_of(self._memory_days(day, tables)) if table.num_rows else None
            row |= profile.events_profile(table, definition.feedback_fields, fields, memory, limits)
            today = numbers(row)
            before = [known for back in self._days_before(day) if (known := known_days.get(back))]
            found, told = event_drift(today, before, definition.feedback_fields, vocabularies, limits, drift)
            if row["largest_user_share"] > limits.max_user_share_critical:  # type: ignore[operator]
                told["largest_user_share"] = told["bot_user_share"] = f"it is user {_most_frequent(table['user_id'])}"
            for name, text in told.items():
                details.setdefault(name, {})[day] = f"{day}: {text}"
            rows.append({**row, **found})
            known_days[day] = today
            tables[day] = table.select(profile.MEMORY_COLUMNS)
            for old in sorted(tables)[: -drift.memory_days]:
                del tables[old]
        return Evidence([Check("events_days", _filled(rows), details=details)], [("events", str(row["dt"]), row) for row in rows])

    def _sequences(self) -> Evidence:
        items, sequences = self._own("items", self.dt), self._own("sequences", self.dt)
        if items is None or sequences is None:
            raise self._nothing_staged("items and sequences", "etl.jobs.sequences")
        sequence_row, item_row, details = self._sequence_rows(items, sequences)
        checks = [Check("items", [item_row], details=details), Check("sequences", [sequence_row])]
        return Evidence(checks, [("items", self.dt, item_row), ("sequences", self.dt, sequence_row)])

    def _training_input(self) -> Evidence:
        items, sequences = self.store.require("items", self.dt), self.store.require("sequences", self.dt)
        for manifest in (items, sequences):
            self._check_files(manifest)
        days = _window(sequences).event_days
        inputs = {day: sequences.inputs[name] for day in days if (name := f"events/dt={day}") in sequences.inputs}
        published = {day: m for day in days if (m := self.store.manifest("events", day)) is not None}
        current = {day: inputs[day] if inputs.get(day) in same_rows(m) else m.data_digest for day, m in published.items()}
        # Published files never change: what gate sequences measured of this attempt still holds.
        measured = kept.read_stats(self.store, "sequences", self.dt, 1).to_pylist()
        if measured and all(row["attempt"] == sequences.attempt for row in measured):
            row: Mapping[str, Any] = {m["metric"]: NAN if m["value"] is None else m["value"] for m in measured}
        else:
            row = self._sequence_rows(items, sequences)[0]
        found = stats.training_input_row(row, self.dt, items.attempt != sequences.attempt, self.thresholds.training_input.min_judged_targets)
        window = stats.window_rows(days, inputs, current)
        return Evidence([Check("training_window", window), Check("training_input", [found])], [("training_input", self.dt, found)])

    def _model_output(self) -> Evidence:
        if self.run_dir is None or not (self.run_dir / "evaluation.json").exists():
            raise StageError(f"no evaluation of attempt {self.attempt} to judge: {self.run_dir or 'no folder of runs'}", "give --runs, and run evaluation.evaluate with the same --attempt first")
        evaluation = json.loads((self.run_dir / "evaluation.json").read_text())
        primary = json.loads((self.run_dir / "training.json").read_text())["primary"]
        scores = pq.read_table(self.run_dir / "scores.parquet", columns=["label", primary])
        [auc] = [row["auc"] for row in evaluation["models"] if row["name"] == primary]
        trailing = [day for day in self._statistics("model_output", self.dt, self.thresholds.drift.trailing_days) if day]
        row = model_output_row(self.dt, scores["label"].to_numpy(), scores[primary].to_numpy(), NAN if auc is None else auc, trailing, self.thresholds.model_output, self.thresholds.drift)
        return Evidence([Check("model_output", [row])], [("model_output", self.dt, row)])

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _judged_now(self, stage: str) -> tuple[StageOutcome, list[Statistics]]:
        import_early()
        evidence = self.measure(stage)
        outcome = self.judge(stage, evidence)
        return outcome, [(of_stage, day, numbers(metrics)) for of_stage, day, metrics in evidence.statistics]

    def _judged_ahead(self, staged: Sequence[Staged]) -> tuple[StageOutcome, list[Statistics]] | None:
        """Return what was judged of what is staged now, of this very try, None when it was not."""
        text = self.store.read_text(_judgement_path(staged)) if staged else None
        if text is None:
            return None
        ahead = json.loads(text)
        if ahead["judged"] != _judged(staged) or ahead["quality"] != self.definition.quality.digest:
            return None
        statistics = [(of_stage, day, {name: NAN if value is None else value for name, value in metrics.items()}) for of_stage, day, metrics in ahead["statistics"]]
        return StageOutcome.from_dict(ahead["outcome"]), statistics

    def _keep_judgement(self, staged: Sequence[Staged], outcome: StageOutcome, statistics: Sequence[Statistics]) -> None:
        """Record, beside the try, which files of it were judged and how: these are what may be published."""
        record = {"judged": _judged(staged), "quality": self.definition.quality.digest, "outcome": asdict(outcome), "statistics": statistics}
        self.store.write_text(_judgement_path(staged), json.dumps(record))

    def _staged(self, stage: str) -> list[Staged]:
        """Return every partition that this attempt has staged for a gate, in the order of publication: of each the newest try."""
        if self.attempt is None:
            return []
        tables = {table: self.store.staged_partitions(self.attempt, table) for table in STAGED_TABLES.get(stage, ())}
        days = {day for staged in tables.values() for day in staged} if stage == "events" else {self.dt}
        return [staged[day] for day in sorted(days, key=lambda day: (day == self.dt, day)) for staged in tables.values() if day in staged]

    def _sequence_rows(self, items: Manifest, sequences: Manifest) -> tuple[stats.Row, stats.Row, dict[str, dict[str, str]]]:
        """Return the metrics of a partition's sequences and of its items, and what more to say about them."""
        for manifest in (items, sequences):
            self._check_files(manifest)
        definition, drift = self.definition, self.thresholds.drift
        fields = {name: rule.kind for name, rule in definition.item_fields.items()}
        categories = [name for name, kind in fields.items() if kind == "category"]
        item_table = self.store.read_files(items.files, ["item_index", "item_id", "train_occurrences", *categories])
        window = _window(sequences)
        row = stats.sequences_row(self.dt, self._buckets_of(sequences, window, item_table["train_occurrences"].to_numpy()), item_table, sequences.counts, self.thresholds.sequences.min_judged_targets)
        event_days = [day for day in window.event_days if (m := self.store.manifest("events", day)) is not None and m.rows]
        row["event_days"] = len(event_days)
        # Histories grow while the first days of a feed come in: like is compared with like.
        trailing = [day for day in self._statistics("sequences", self.dt, drift.trailing_days) if day.get("event_days") == len(event_days)]
        for name in ("users", "targets", "train_label_rate", *(f"history_length_p{q}" for q in (50, 90, 99))):
            usual = median_of(trailing, name, drift)
            judged = row["targets"] >= drift.min_rows  # type: ignore[operator]
            row[f"{name}_to_trailing"] = float(row[name]) / usual if judged and usual > 0 else NAN
        described = any(not rule.optional for rule in definition.items) or (bool(definition.items) and items.counts.get("item_files", 1) > 0)
        item_row = stats.items_row(self.dt, item_table, items.counts.get("without_fields", 0), fields, described)
        before = [day for day in self._statistics("items", self.dt, drift.trailing_days) if day]
        usual_items = median_of([day for day in before if day.get("event_days") == len(event_days)], "items", drift)
        item_row |= {"event_days": len(event_days), "new_category_share": NAN, "field_psi": NAN,
                     "without_fields_share_rise": float(item_row["without_fields_share"]) - median_of(before, "without_fields_share", drift),
                     "items_to_trailing": float(item_row["items"]) / usual_items if usual_items > 0 else NAN}  # fmt: skip
        details: dict[str, str] = {}
        if len(before) >= drift.min_trailing_days and item_table.num_rows >= self.thresholds.events.min_judged_rows:
            item_row["new_category_share"], item_row["field_psi"], details = vocabulary_drift(numbers(item_row), before, categories)
        return row, item_row, {name: {self.dt: text} for name, text in details.items()}

    def _buckets_of(self, sequences: Manifest, window: Window, train_occurrences: np.ndarray) -> Sequence[stats.Bucket]:
        """Return what is measured of each staged file: by the job's tasks, else here."""
        if self.buckets is not None:
            return self.buckets
        rules = stats.SequenceRules.of(window, self.definition.targets.positions is not None, _history(sequences))

        def measured(file: DataFile) -> stats.Bucket:
            return stats.measured_bucket(self.store.read_file(file, stats.SEQUENCE_COLUMNS), train_occurrences, rules)

        # numpy and Arrow work outside the interpreter's lock; as many buckets are in memory as there are threads.
        with concurrent.futures.ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            return list(pool.map(measured, sequences.files))

    def _tell(self, outcome: StageOutcome) -> None:
        """Log warnings and the sum."""
        for severity in SEVERITIES[1:]:
            for failed in outcome.failed(severity):
                log(f"{severity}: stage {outcome.stage} dt={self.dt}: {failed.message}")
        counts = ", ".join(f"{len(outcome.failed(severity))} {severity}" for severity in SEVERITIES)
        pages = ", ".join(dict.fromkeys(o.data_docs for o in outcome.outcomes if o.data_docs)) or "not written"
        log(f"{outcome.stage} dt={self.dt}: {len(outcome.outcomes)} expectations, failed: {counts}; Data Docs {pages}")

    def _critical(self, outcome: StageOutcome) -> GateError:
        failed = outcome.failed("critical")
        lines = "".join(f"\n  {o.message} [{o.expectation} of suite {o.suite}]\n    see {o.data_docs or 'no page'}" for o in failed)
        consequence = {"raw": "nothing was built", "training_input": "training must not start", "model_output": "the model must not be registered"}
        return GateError(f"stage {outcome.stage}, dt={self.dt}, attempt {self.attempt}: {len(failed)} critical expectation(s) failed, "
                          f"{consequence.get(outcome.stage, 'nothing was published')}{lines}",
                          "; ".join(dict.fromkeys(o.remedy for o in failed)) + (
                              f". Once looked at, a person can let exactly this through, once: {pass_command(self.store.warehouse, outcome)}, then clear the task"
                              if outcome.passable else ""))  # fmt: skip

    def _published_already(self, stage: str) -> bool:
        """Whether this attempt has staged nothing more of what the gate publishes."""
        assert self.attempt is not None
        if stage == "events":
            return not self.store.staged_days(self.attempt, "events") and self._own("events", self.dt) is not None
        if stage == "sequences":
            tables = STAGED_TABLES[stage]
            return all(self._own(name, self.dt) for name in tables) and not any(self.store.staged_manifest(self.attempt, name, self.dt) for name in tables)
        return False

    def _days(self, table: str) -> list[str]:
        return self.store.staged_days(self.attempt, table) if self.attempt and self.store.staged_days(self.attempt, table) else [self.dt]

    def _own(self, table: str, day: str) -> Manifest | None:
        """Return what this attempt has staged, else what it has published, else None; without an attempt what is published.

        A publication that was cut short has moved some files already; their paths are given where they are now.
        """
        if self.attempt is None:
            return self.store.manifest(table, day)
        staged = self.store.staged_manifest(self.attempt, table, day)
        if staged is None:
            current = self.store.manifest(table, day)
            return current if current is not None and current.attempt == self.attempt else None
        files = []
        for file in staged.files:
            gone = self.store.fs.get_file_info(f"{self.store.root}/{file.path}").type != pafs.FileType.File
            files.append(replace(file, path=self.store.published_path(table, day, file)) if gone else file)
        return replace(staged, files=tuple(files))

    def _staged_or_published(self, day: str) -> Manifest | None:
        """Return a day of events as this attempt has staged it, else as it is published."""
        staged = self.store.staged_manifest(self.attempt, "events", day) if self.attempt else None
        return staged or self.store.manifest("events", day)

    def _trailing_rows(self, day: str) -> list[int]:
        """Return the row counts of the days before `day` that are known."""
        return [manifest.rows for before in self._days_before(day) if (manifest := self._staged_or_published(before)) is not None]

    def _memory_days(self, day: str, read: Mapping[str, pa.Table]) -> list[pa.Table]:
        """Return the last days with events before `day`, oldest first; `read` holds some of them already."""
        tables: list[pa.Table] = []
        for before in reversed(self._days_before(day)):
            manifest = self._staged_or_published(before)
            if manifest is not None and manifest.rows and len(tables) < self.thresholds.drift.memory_days:
                tables.append(read[before] if before in read else self.store.read(manifest, profile.MEMORY_COLUMNS))
        return tables[::-1]

    def _statistics(self, stage: str, dt: str, days: int) -> list[dict[str, float]]:
        """Return the kept metrics of the `days` days before `dt`, oldest first; an empty one where none are kept."""
        found: dict[str, dict[str, float]] = {day: {} for day in self._days_before(dt)}
        for row in kept.read_stats(self.store, stage, add_days(dt, -1), days).to_pylist():
            found[row["dt"]][row["metric"]] = NAN if row["value"] is None else row["value"]
        return list(found.values())

    def _days_before(self, dt: str) -> list[str]:
        """Return the trailing days of a day, oldest first."""
        return [add_days(dt, -back) for back in range(self.thresholds.drift.trailing_days, 0, -1)]

    def _own_checks(self, stage: str, evidence: Evidence) -> list[Check | OwnCheck]:
        """Return the checks of the definition's own conditions and expectations that a gate judges, on the days that it judges."""
        quality = self.definition.quality
        checks: list[Check | OwnCheck] = []
        for table in dict.fromkeys(rule.table for rule in (*quality.conditions, *quality.expectations) if rule.gate == stage):
            conditions = [condition for condition in quality.conditions if condition.table == table]
            expectations = [expectation for expectation in quality.expectations if expectation.table == table]
            if table.startswith(STATISTICS):
                days = [(day, metrics) for of_stage, day, metrics in evidence.statistics if of_stage == table.removeprefix(STATISTICS)]
                counted = own.counted_statistics(days, conditions)
                samples = [own.sampled_statistics(table.removeprefix(STATISTICS), days)] if days else []
            else:
                of_table = self._days("events") if table == "events" else [self.dt]
                manifests = [manifest for day in of_table if (manifest := self._own(table, day))]
                by_day = [own.counted(self.store, self.definition, manifest, conditions) for manifest in manifests]
                counted = {condition.name: [day[condition.name] for day in by_day] for condition in conditions}
                samples = (own.sampled(self.store, self.definition, manifest) for manifest in manifests) if expectations else []  # type: ignore[assignment]
            if conditions:
                checks.append(_condition_check(table, conditions, counted))
            if expectations:
                checks += [OwnCheck(sample, expectations) for sample in samples]
        return checks

    def _check_files(self, manifest: Manifest) -> None:
        """Compare every file with its table's contract: columns, types and number of rows.

        Raises:
            StageError: a file is missing (and was not moved by a publication meanwhile), unreadable or differs.
        """
        for file in manifest.files:
            where = f"file {self.store.root}/{file.path} of table {manifest.table} dt={manifest.dt}"
            remedy = "rebuild the partition with a new attempt; nothing was published"
            try:
                parquet = self.store.open_parquet(file)
            except pa.ArrowInvalid as error:
                raise StageError(f"{where} cannot be read: {error}", remedy) from error
            with parquet:
                found, rows = parquet.schema_arrow, parquet.metadata.num_rows
            contract = own.contract(self.definition, manifest.table)
            for column in contract:
                if column.name not in found.names:
                    raise StageError(f"{where} has no column {column.name} ({column.type})", remedy)
                if found.field(column.name).type != column.type:
                    raise StageError(f"{where}: column {column.name} is {found.field(column.name).type}, not {column.type}", remedy)
            if extra := set(found.names) - set(contract.names):
                raise StageError(f"{where} has columns that the contract does not know: {', '.join(sorted(extra))}", remedy)
            if rows != file.rows:
                raise StageError(f"{where} has {rows} rows, its manifest says {file.rows}", remedy)

    def _nothing_staged(self, tables: str, job: str) -> StageError:
        if self.attempt is None:
            return StageError(f"{tables} of dt={self.dt} are not published under {self.store.warehouse}", "name the attempt that has staged them with --attempt, or run the stage first")
        return StageError(
            f"attempt {self.attempt} has no completely staged {tables} of dt={self.dt} under {self.store.warehouse}",
            f"run `python -m {job}` with the same --dt and --attempt first",
        )


def _judged(staged: Sequence[Staged]) -> dict[str, dict[str, Any]]:
    """Return what identifies the staged files that a gate judges: the try of each partition, and path, size and sha256 of each file."""
    return {f"{one.manifest.table}/dt={one.manifest.dt}": {"try": one.work.name, "data_digest": one.manifest.data_digest,
                                                           "files": {file.path: [file.bytes, file.digest] for file in one.manifest.files}}
            for one in staged}  # fmt: skip


def _judgement_path(staged: Sequence[Staged]) -> str:
    """Path below the dataset's folder: beside what the try has staged of the partition's own day, which is the last."""
    return f"{staged[-1].work.folder}/judged.json"


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a row that are numbers."""
    return {name: float(value) for name, value in metrics.items() if not isinstance(value, str)}


def _condition_check(table: str, conditions: Sequence[Condition], counted: Mapping[str, Sequence[own.Counted]]) -> Check:
    """Return the check of the shares of rows, day by day, that fail each condition."""
    rows: dict[str, stats.Row] = {}
    details: dict[str, dict[str, str]] = {}
    for condition in conditions:
        for one in counted[condition.name]:
            rows.setdefault(one.dt, {"dt": one.dt})[condition.name] = one.share
            details.setdefault(condition.name, {})[one.dt] = f"{one.dt}: {one.failed:,} of {one.rows:,} rows of {table} fail `{' '.join(condition.sql.split())}`" + (f", such as {one.example}" if one.example else "")
    return Check(f"conditions_{table.replace('.', '_')}", list(rows.values()), details=details, conditions=conditions)


def _filled(rows: Sequence[stats.Row]) -> list[stats.Row]:
    """Give every row every metric: days differ in the values of their fields."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, NAN) for name in names} for row in rows]


def _most_frequent(values: pa.ChunkedArray) -> int:
    distinct, counts = np.unique(values.to_numpy(), return_counts=True)
    return int(distinct[np.argmax(counts)])


def _window(sequences: Manifest) -> Window:
    """Return the window that the manifest's settings say."""
    try:
        return Window(sequences.dt, *(int(sequences.settings[name]) for name in ("target_days", "lookback_days", "evaluation_days")))
    except KeyError as error:
        raise StageError(f"the manifest of sequences dt={sequences.dt} lacks the setting {error}",
                         "build sequences again with a new attempt") from error  # fmt: skip


def _history(sequences: Manifest) -> History:
    """Return what a target may see, as the manifest's settings say."""
    settings = sequences.settings
    return History.model_validate({"cutoff": settings["cutoff"], "availability_lag_ms": settings["availability_lag_ms"], "max_events": settings["max_events"]})


def audit_parser(description: str | None, attempt_required: bool = True) -> argparse.ArgumentParser:
    """Return a parser of what every gate takes."""
    parser = partition_parser(description, attempt_required)
    parser.add_argument("--stage", required=True, choices=GATES, help="which gate to run")
    parser.add_argument("--raw", help="stage raw: folder or URI of the raw logs")
    parser.add_argument("--runs", help="stage model_output: folder of runs")
    return parser


def audit_of(args: argparse.Namespace, reports: Path | None) -> Audit:
    """Return the gate that a command line names."""
    run_dir = Path(args.runs).absolute() / (args.attempt or "") if args.runs else None
    return Audit(store_of(args), definition_of(args), args.dt, args.attempt, reports, RawLocation(args.raw) if args.raw else None, run_dir)


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

"""Measures what a gate judges of one partition: reads the tables, hands their facts to the records, returns the
evidence."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from etl.datasets.definition import DatasetDefinition, History
from etl.datasets.quality_rules import STATISTICS
from etl.ingest.freshness import rows_to_keep, same_rows
from etl.ingest.raw import RawLocation
from etl.metrics.record import NAN
from etl.metrics.registry import SUITES
from etl.metrics.thresholds import Thresholds
from etl.quality.measure import own_rules, statistics
from etl.quality.measure.drift import Compared, EventsCompared, ItemsCompared, Vocabulary, vocabulary_drift
from etl.quality.measure.events import MEMORY_COLUMNS, EventsDay, memory_of
from etl.quality.measure.items import ItemsFacts
from etl.quality.measure.measured import EVERY_ROW, Check, Evidence, Row, measured, numbers, same_metrics
from etl.quality.measure.own_rules import OwnCheck
from etl.quality.measure.raw_files import DayOfFiles, file_facts
from etl.quality.measure.scores import Scores, ScoresFacts
from etl.quality.measure.sequences import (
    SEQUENCE_COLUMNS,
    Bucket,
    SequenceRules,
    SequencesFacts,
    measured_bucket,
)
from etl.quality.measure.training_input import InputFacts, WindowDay
from etl.stage.errors import StageError
from etl.warehouse.partitions import Window, add_days
from etl.warehouse.schemas import EVENTS
from etl.warehouse.store import DataFile, Manifest, TableStore

MAX_THREADS = 4  # that measure buckets of sequences
Details = dict[str, dict[str, str]]


@dataclass
class Partition:
    """One partition, as one attempt has staged it.

    Attributes:
        store: the data set's tables.
        definition: the data set.
        dt: the partition.
        attempt: the attempt whose staged tables are measured; None: what is published.
        raw: the raw logs, for gate raw.
        scores: what the evaluation hands in, for gate model_output.
        buckets: what the job's tasks have measured of the sequences that they staged.
    """

    store: TableStore
    definition: DatasetDefinition
    dt: str
    attempt: str | None
    raw: RawLocation | None = None
    scores: Scores | None = None
    buckets: Sequence[Bucket] | None = None
    thresholds: Thresholds = field(init=False)

    def __post_init__(self) -> None:
        self.thresholds = self.definition.quality.thresholds()

    def measure(self, gate: str) -> Evidence:
        """Return what a gate judges.

        Raises:
            StageError: nothing to judge, or an unreadable table.
        """
        measures = {
            "raw": self._raw,
            "events": self._events,
            "sequences": self._sequences,
            "training_input": self._training_input,
            "model_output": self._model_output,
        }
        evidence = measures[gate]()
        return replace(evidence, checks=[*evidence.checks, *self._own_checks(gate, evidence)])

    # ---- the gates -----------------------------------------------------------------------------------------------

    def _raw(self) -> Evidence:
        if self.raw is None:
            raise StageError(
                "the gate of raw files needs to know where they are", "give their folder or URI with --raw"
            )
        files = self.raw.logs(self.definition)
        rows: list[Row] = []
        details: Details = {}
        for file in files:
            if file.may_hold(self.dt):
                facts = file_facts(self.raw, file, files, self.definition, self.thresholds.raw)
                row, more = measured(SUITES["raw_files"].metrics, facts)
                rows.append({"file": file.name, **row})
                _add(details, file.name, more)
        of_day = DayOfFiles(self.dt, self.raw.uri, files, rows, self.thresholds.drift)
        day, more = measured(SUITES["raw_day"].metrics, of_day)
        day = {"dt": self.dt, **day}
        checks = [Check("raw_day", [day], details={name: {EVERY_ROW: text} for name, text in more.items()})]
        if rows:
            checks.append(Check("raw_files", rows, key="file", details=details))
        return Evidence(checks, [("raw", self.dt, day)])

    def _events(self) -> Evidence:
        staged = {day: manifest for day in self.days("events") if (manifest := self.own("events", day))}
        if self.dt not in staged:
            raise self._nothing_staged("events", "etl.jobs.events")
        drift, suite, first = self.thresholds.drift, SUITES["events_days"], min(staged)
        before = self._statistics("events", first, drift.trailing_days)
        known_days = dict(zip(self._days_before(first), before, strict=True))
        tables: dict[str, pa.Table] = {}
        rows: list[Row] = []
        details: Details = {}
        fields = self._vocabularies
        for day, manifest in sorted(staged.items()):
            facts = self._events_day(day, manifest, tables)
            row, more = measured(suite.metrics, facts)
            known_days[day] = today = numbers(row)
            trailing = [known for back in self._days_before(day) if (known := known_days.get(back))]
            compared = EventsCompared.of(today, trailing, facts.signals, ("context", *fields), drift)
            found, more_of_drift = measured(suite.compared, compared)
            _add(details, day, {name: f"{day}: {text}" for name, text in (more | more_of_drift).items()})
            rows.append({"dt": day, **row, **found})
            tables[day] = facts.table.select(MEMORY_COLUMNS)
            for old in sorted(tables)[: -drift.memory_days]:
                del tables[old]
        return Evidence(
            [Check(suite.name, same_metrics(rows), details=details)], [("events", str(row["dt"]), row) for row in rows]
        )

    def _sequences(self) -> Evidence:
        items, sequences = self.own("items", self.dt), self.own("sequences", self.dt)
        if items is None or sequences is None:
            raise self._nothing_staged("items and sequences", "etl.jobs.sequences")
        of_sequences, of_items = self._sequence_checks(items, sequences)
        return Evidence(
            [of_items, of_sequences],
            [("items", self.dt, of_items.rows[0]), ("sequences", self.dt, of_sequences.rows[0])],
        )

    def _training_input(self) -> Evidence:
        items, sequences = self.store.require("items", self.dt), self.store.require("sequences", self.dt)
        for manifest in (items, sequences):
            self._check_files(manifest)
        window = []
        for day in _window(sequences).event_days:
            read, now = sequences.inputs.get(f"events/dt={day}"), self.store.manifest("events", day)
            published = None if now is None else read if read in same_rows(now) else now.data_digest
            window.append({"dt": day, **measured(SUITES["training_window"].metrics, WindowDay(read, published))[0]})
        # Published files never change: what gate sequences measured of this attempt still holds.
        known = statistics.read_stats(self.store, "sequences", self.dt, 1).to_pylist()
        of: Mapping[str, Any]
        if known and all(row["attempt"] == sequences.attempt for row in known):
            of = {row["metric"]: NAN if row["value"] is None else row["value"] for row in known}
        else:
            of = numbers(self._sequence_checks(items, sequences)[0].rows[0])
        facts = InputFacts(of, items.attempt != sequences.attempt, self.thresholds.training_input.min_judged_targets)
        row = {"dt": self.dt, **measured(SUITES["training_input"].metrics, facts)[0]}
        checks = [Check("training_window", window), Check("training_input", [row])]
        return Evidence(checks, [("training_input", self.dt, row)])

    def _model_output(self) -> Evidence:
        if self.scores is None:
            raise StageError(
                f"no scores of dt={self.dt} are at hand to judge",
                "run evaluation.evaluate: it hands them to gate model_output",
            )
        trailing = [
            day for day in self._statistics("model_output", self.dt, self.thresholds.drift.trailing_days) if day
        ]
        facts = ScoresFacts(self.scores, trailing, self.thresholds)
        row = {"dt": self.dt, **measured(SUITES["model_output"].metrics, facts)[0]}
        return Evidence([Check("model_output", [row])], [("model_output", self.dt, row)])

    # ---- parts ---------------------------------------------------------------------------------------------------

    @property
    def _vocabularies(self) -> list[str]:
        """Fields of the log whose values are categories."""
        fields = self.definition.events.item_fields
        return [name for name, rule in fields.items() if rule.kind == "category"]

    def _events_day(self, day: str, manifest: Manifest, tables: Mapping[str, pa.Table]) -> EventsDay:
        """Read one staged day; `tables` holds some of the days before it already."""
        definition, fields = self.definition, self._vocabularies
        self._check_files(manifest)
        empty = own_rules.contract(definition, "events")
        table = self.store.read(manifest, [*EVENTS.names, *fields], empty=empty)
        quarantine = self.own("quarantine", day)
        if quarantine is not None:
            self._check_files(quarantine)
        return EventsDay(
            day,
            day == self.dt,
            table,
            manifest.counts,
            quarantine.rows if quarantine else 0,
            self._trailing_rows(day),
            self.thresholds,
            definition.feedback_fields,
            definition.label_bit,
            fields,
            memory_of(self._memory_days(day, tables)) if table.num_rows else None,
            definition.logs.repeats == "keep",
            rows_to_keep(manifest, self.store.manifest("events", day)),
        )

    def _sequence_checks(self, items: Manifest, sequences: Manifest) -> tuple[Check, Check]:
        """Return what is measured of a partition's sequences, and of its items."""
        for manifest in (items, sequences):
            self._check_files(manifest)
        drift = self.thresholds.drift
        categories = [name for name, rule in self.definition.item_fields.items() if rule.kind == "category"]
        table = self.store.read_files(items.files, ["item_index", "item_id", "train_occurrences", *categories])
        window, days = _window(sequences), 0
        for day in window.event_days:
            days += (of_day := self.store.manifest("events", day)) is not None and of_day.rows > 0
        facts = SequencesFacts(
            self._buckets_of(sequences, window, table["train_occurrences"].to_numpy()),
            table["item_index"].to_numpy(),
            table["item_id"].to_numpy(),
            sequences.counts,
            days,
            self.thresholds.sequences.min_judged_targets,
        )
        row, _ = measured(SUITES["sequences"].metrics, facts)
        # Histories grow while the first days of a feed come in: like is compared with like.
        before = self._statistics("sequences", self.dt, drift.trailing_days)
        like = [day for day in before if day.get("event_days") == days]
        compared = Compared(numbers(row), like, drift, judged=facts.targets >= drift.min_rows)
        row |= measured(SUITES["sequences"].compared, compared)[0]
        return Check("sequences", [{"dt": self.dt, **row}]), self._items_check(items, table, categories, days)

    def _items_check(self, items: Manifest, table: pa.Table, categories: Sequence[str], event_days: int) -> Check:
        drift, rules = self.thresholds.drift, self.definition.items
        described = any(not rule.optional for rule in rules) or (bool(rules) and items.counts.get("item_files", 1) > 0)
        facts = ItemsFacts(table, items.counts.get("without_fields", 0), categories, described, event_days)
        row, _ = measured(SUITES["items"].metrics, facts)
        today = numbers(row)
        before = [day for day in self._statistics("items", self.dt, drift.trailing_days) if day]
        enough = len(before) >= drift.min_trailing_days and facts.rows >= self.thresholds.events.min_judged_rows
        vocabulary = vocabulary_drift(today, before, categories) if enough else Vocabulary()
        like = Compared(today, [day for day in before if day.get("event_days") == event_days], drift)
        compared = ItemsCompared(today, before, drift, like=like, vocabulary=vocabulary)
        found, more = measured(SUITES["items"].compared, compared)
        return Check(
            "items",
            [{"dt": self.dt, **row, **found}],
            details={name: {self.dt: text} for name, text in more.items()},
        )

    def _buckets_of(self, sequences: Manifest, window: Window, train_occurrences: np.ndarray) -> Sequence[Bucket]:
        """Return what is measured of each staged file: by the job's tasks, else here."""
        if self.buckets is not None:
            return self.buckets
        by_position = self.definition.targets.positions is not None
        rules = SequenceRules.of(window, by_position, _history(sequences))

        def measured_file(file: DataFile) -> Bucket:
            return measured_bucket(self.store.read_file(file, SEQUENCE_COLUMNS), train_occurrences, rules)

        # numpy and Arrow work outside the interpreter's lock; as many buckets are in memory as there are threads.
        with concurrent.futures.ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            return list(pool.map(measured_file, sequences.files))

    def _own_checks(self, gate: str, evidence: Evidence) -> list[Check | OwnCheck]:
        """Return the checks of the definition's own conditions and expectations, on the days that the gate judges."""
        quality = self.definition.quality
        checks: list[Check | OwnCheck] = []
        own = [rule for rule in (*quality.conditions, *quality.expectations) if rule.gate == gate]
        for table in dict.fromkeys(rule.table for rule in own):
            conditions = [condition for condition in quality.conditions if condition.table == table]
            expectations = [expectation for expectation in quality.expectations if expectation.table == table]
            if table.startswith(STATISTICS):
                stage = table.removeprefix(STATISTICS)
                days = [(day, metrics) for of_stage, day, metrics in evidence.statistics if of_stage == stage]
                counted = own_rules.counted_statistics(days, conditions)
                samples = [own_rules.sampled_statistics(stage, days)] if days else []
            else:
                of_table = self.days("events") if table == "events" else [self.dt]
                manifests = [manifest for day in of_table if (manifest := self.own(table, day))]
                by_day = [own_rules.counted(self.store, self.definition, one, conditions) for one in manifests]
                counted = {condition.name: [day[condition.name] for day in by_day] for condition in conditions}
                # One at a time: a sample of a large table takes memory.
                sampled = (own_rules.sampled(self.store, self.definition, manifest) for manifest in manifests)
                samples = sampled if expectations else []  # type: ignore[assignment]
            if conditions:
                checks.append(own_rules.condition_check(table, conditions, counted))
            if expectations:
                checks += [OwnCheck(sample, expectations) for sample in samples]
        return checks

    # ---- what is staged and what is published --------------------------------------------------------------------

    def days(self, table: str) -> list[str]:
        """Return the days of a table that the attempt has staged, else the partition's own."""
        return (self.attempt and self.store.staged_days(self.attempt, table)) or [self.dt]

    def own(self, table: str, day: str) -> Manifest | None:
        """Return what this attempt has staged, else what it has published, else None; without an attempt what is
        published.

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
        manifests = (self._staged_or_published(before) for before in self._days_before(day))
        return [manifest.rows for manifest in manifests if manifest is not None]

    def _memory_days(self, day: str, read: Mapping[str, pa.Table]) -> list[pa.Table]:
        """Return the last days with events before `day`, oldest first; `read` holds some of them already."""
        tables: list[pa.Table] = []
        for before in reversed(self._days_before(day)):
            manifest = self._staged_or_published(before)
            if manifest is not None and manifest.rows and len(tables) < self.thresholds.drift.memory_days:
                tables.append(read[before] if before in read else self.store.read(manifest, MEMORY_COLUMNS))
        return tables[::-1]

    def _statistics(self, stage: str, dt: str, days: int) -> list[dict[str, float]]:
        """Return the metrics of the `days` days before `dt`, oldest first; an empty one where none are known."""
        found: dict[str, dict[str, float]] = {day: {} for day in self._days_before(dt)}
        for row in statistics.read_stats(self.store, stage, add_days(dt, -1), days).to_pylist():
            found[row["dt"]][row["metric"]] = NAN if row["value"] is None else row["value"]
        return list(found.values())

    def _days_before(self, dt: str) -> list[str]:
        """Return the trailing days of a day, oldest first."""
        return [add_days(dt, -back) for back in range(self.thresholds.drift.trailing_days, 0, -1)]

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
            contract = own_rules.contract(self.definition, manifest.table)
            for column in contract:
                if column.name not in found.names:
                    raise StageError(f"{where} has no column {column.name} ({column.type})", remedy)
                if (of_type := found.field(column.name).type) != column.type:
                    raise StageError(f"{where}: column {column.name} is {of_type}, not {column.type}", remedy)
            if extra := set(found.names) - set(contract.names):
                names = ", ".join(sorted(extra))
                raise StageError(f"{where} has columns that the contract does not know: {names}", remedy)
            if rows != file.rows:
                raise StageError(f"{where} has {rows} rows, its manifest says {file.rows}", remedy)

    def _nothing_staged(self, tables: str, job: str) -> StageError:
        if self.attempt is None:
            return StageError(
                f"{tables} of dt={self.dt} are not published under {self.store.warehouse}",
                "name the attempt that has staged them with --attempt, or run the stage first",
            )
        return StageError(
            f"attempt {self.attempt} has no completely staged {tables} of dt={self.dt} under {self.store.warehouse}",
            f"run `python -m {job}` with the same --dt and --attempt first",
        )


def _add(details: Details, row: str, more: Mapping[str, str]) -> None:
    for name, text in more.items():
        details.setdefault(name, {})[row] = text


def _window(sequences: Manifest) -> Window:
    """Return the window that the manifest's settings say."""
    try:
        lengths = (int(sequences.settings[name]) for name in ("target_days", "lookback_days", "evaluation_days"))
        return Window(sequences.dt, *lengths)
    except KeyError as error:
        raise StageError(
            f"the manifest of sequences dt={sequences.dt} lacks the setting {error}",
            "build sequences again with a new attempt",
        ) from error


def _history(sequences: Manifest) -> History:
    """Return what a target may see, as the manifest's settings say."""
    names = ("cutoff", "availability_lag_ms", "max_events")
    return History.model_validate({name: sequences.settings[name] for name in names})

"""Gate between build and publication: validate what an attempt has staged, then publish it, or stop and publish nothing.

    python -m etl.quality.audit --dataset D --warehouse W --dt YYYY-MM-DD --attempt A \\
        --stage events|sequences|training_input [--reports DIR]

events           validates every staged day of `events`; publishes `quarantine` and `events`, the partition's day last
sequences        validates staged `items` and `sequences`; publishes `items`, then `sequences`
training_input   validates that published `sequences` are complete and made of what is published now; publishes nothing

A failed critical expectation stops the stage, whatever else holds; warnings are logged and publication goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from etl.cli import definition_of, log, partition_parser, run_stage, store_of
from etl.datasets import DatasetDefinition, History
from etl.errors import StageError
from etl.partitions import MS_PER_DAY, Window, add_days, day_number
from etl.quality import stats
from etl.quality.report import written_after
from etl.quality.thresholds import THRESHOLDS
from etl.schemas import EVENTS, TABLES, event_field_type, item_field_type
from etl.store import Manifest, TableStore

if TYPE_CHECKING:
    from etl.quality.validate import Check, Report

STAGES = ("events", "sequences", "training_input")
_EVENT_KEY_COLUMNS = ("user_id", "item_id", "event_time_ms", "feedback")


class Audit:
    """One gate run: an attempt at one partition.

    Args:
        store: the data set's tables.
        definition: the data set.
        dt: the partition.
        attempt: the attempt whose staged tables are judged.
        reports: local folder for Data Docs and results.
    """

    def __init__(self, store: TableStore, definition: DatasetDefinition, dt: str, attempt: str, reports: Path) -> None:
        self.store = store
        self.definition = definition
        self.dt = dt
        self.attempt = attempt
        self.reports = reports

    # ---- the three gates -----------------------------------------------------------------------------------------

    def events(self) -> None:
        """Validate and publish the staged days of `events`.

        Raises:
            StageError: nothing to audit, an unreadable table, or a failed critical expectation.
        """
        staged = {day: manifest for day in self.store.staged_days(self.attempt, "events") if (manifest := self._own("events", day))}
        if self._own("events", self.dt) is None:
            raise self._nothing_staged("events", "etl.jobs.events")
        if not staged:
            log(f"events dt={self.dt}: already published by attempt {self.attempt}, nothing to do")
            return
        rows: list[stats.Row] = []
        frame: pa.Table | None = None
        about: dict[str, Any] = {}
        limits = THRESHOLDS.events
        for day, manifest in staged.items():
            self._check_files(manifest)
            day_columns = None if day == self.dt else _EVENT_KEY_COLUMNS
            table = self.store.read(manifest, day_columns)
            quarantine = self._own("quarantine", day)
            if quarantine is not None:
                self._check_files(quarantine)
            rows.append(
                stats.events_row(
                    day, day == self.dt, table, manifest.counts, quarantine.rows if quarantine else 0, self._trailing_rows(day),
                    self.definition.label_bit, len(self.definition.feedback_fields), limits, self.definition.logs.repeats == "keep")
            )  # fmt: skip
            if day == self.dt:
                step = -(-max(table.num_rows, 1) // limits.frame_max_rows)
                table = table.select(EVENTS.names)
                frame = table.take(np.arange(0, table.num_rows, step)) if step > 1 else table
                about = {"frame_rows": frame.num_rows, "frame_every_nth_row": step}
                if step > 1:
                    log(f"events dt={day}: the row-wise suite sees every {step}th of {table.num_rows} rows")
        checks = [_stats_check("events_days", rows)]
        if frame is not None:
            checks.append(_frame_check("events_frame", frame))
        self._gate("events", checks, about)
        days = {day for table_name in ("quarantine", "events") for day in self.store.staged_days(self.attempt, table_name)}
        for day in sorted(days, key=lambda day: (day == self.dt, day)):
            for table_name in ("quarantine", "events"):
                if self.store.staged_manifest(self.attempt, table_name, day) is not None:
                    self._publish(table_name, day)

    def sequences(self) -> None:
        """Validate and publish the staged `items` and `sequences` of the partition.

        Raises:
            StageError: nothing to audit, an unreadable table, or a failed critical expectation.
        """
        items, sequences = self._own("items", self.dt), self._own("sequences", self.dt)
        if items is None or sequences is None:
            raise self._nothing_staged("items and sequences", "etl.jobs.sequences")
        staged = [name for name in ("items", "sequences") if self.store.staged_manifest(self.attempt, name, self.dt) is not None]
        if not staged:
            log(f"sequences dt={self.dt}: already published by attempt {self.attempt}, nothing to do")
            return
        row, _ = self._sequences_row(items, sequences)
        self._gate("sequences", [_stats_check("sequences", [row])], {})
        for table_name in staged:  # items first: sequences point into it
            self._publish(table_name, self.dt)

    def training_input(self) -> None:
        """Validate what a training of the partition is about to read.

        Raises:
            StageError: not published, stale, or a failed critical expectation.
        """
        items, sequences = self.store.require("items", self.dt), self.store.require("sequences", self.dt)
        row, unseen = self._sequences_row(items, sequences)
        days = _window(sequences).event_days
        current = {day: m.data_digest for day in days if (m := self.store.manifest("events", day)) is not None}
        inputs = {day: sequences.inputs[name] for day in days if (name := f"events/dt={day}") in sequences.inputs}
        checks = [
            _stats_check("training_window", stats.window_rows(days, inputs, current)),
            _stats_check("training_input", [stats.training_input_row(row, unseen, items.attempt != sequences.attempt)]),
        ]
        self._gate("training_input", checks, {"sequences": sequences.data_digest, "sequences_attempt": sequences.attempt})

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _sequences_row(self, items: Manifest, sequences: Manifest) -> tuple[stats.Row, int]:
        """Return the metrics of a partition, and its evaluation targets of items that no training day showed."""
        for manifest in (items, sequences):
            self._check_files(manifest)
        columns = ["user_id", *stats.HISTORY_LISTS, *stats.TARGET_LISTS]
        item_table = self.store.read(items, ["item_index", "item_id", "train_occurrences"])
        files = sorted(sequences.files, key=lambda file: (file.bucket, file.path))
        parts = (self.store.read_file(file, columns) for file in files)
        window, by_position = _window(sequences), self.definition.targets.positions is not None
        row = stats.sequences_row(self.dt, parts, item_table, sequences.counts, window.lookback_days if by_position else window.target_days,
                                  None if by_position else day_number(window.first_evaluation_dt) * MS_PER_DAY, _history(sequences))
        if row["item_index_out_of_range_count"] or row["unequal_length_count"]:
            return row, 0
        occurrences = item_table["train_occurrences"].to_numpy()
        short = (self.store.read_file(file, ["target_item_index", "target_split"]) for file in files)
        return row, sum(stats.unseen_eval_targets(part, occurrences) for part in short)

    def _gate(self, stage: str, checks: list[Check], about: dict[str, Any]) -> None:
        """Validate and raise on the worst severity; Great Expectations' own `success` ignores severities.

        Raises:
            StageError: a critical expectation failed.
        """
        from etl.quality.suites import CRITICAL, INFO, WARNING
        from etl.quality.validate import validate

        about = {"dataset": self.definition.name, "simulated": self.definition.simulated, "dt": self.dt, **about}
        report = validate(checks, stage, self.attempt, self.reports, about)
        for severity in (WARNING, INFO):
            for outcome in report.failed(severity):
                log(f"{severity}: stage {stage} dt={self.dt}: {outcome}")
        log(f"{stage} dt={self.dt}: {_summary(report)}; Data Docs {self._page(report)}; results {report.path}")
        if report.max_severity_failure == CRITICAL:
            failed = report.failed(CRITICAL)
            lines = "".join(f"\n  {outcome}\n    see {outcome.page}" for outcome in failed)
            remedies = "; ".join(dict.fromkeys(outcome.remedy for outcome in failed))
            published = "training must not start" if stage == "training_input" else "nothing was published"
            raise StageError(
                f"stage {stage}, dt={self.dt}, attempt {self.attempt}: {len(failed)} critical expectation(s) failed, {published}{lines}",
                remedies,
            )

    @staticmethod
    def _page(report: Report) -> str:
        return ", ".join(dict.fromkeys(outcome.page for outcome in report.outcomes))

    def _publish(self, table: str, day: str) -> None:
        manifest = self.store.publish(self.attempt, table, day)
        log(f"published {table} dt={day}: {manifest.rows} rows, data digest {manifest.data_digest[:16]}")

    def _own(self, table: str, day: str) -> Manifest | None:
        """Return what this attempt has staged, else what it has published, else None.

        A publication that was cut short has moved some files already; their paths are given where they are now.
        """
        staged = self.store.staged_manifest(self.attempt, table, day)
        if staged is None:
            current = self.store.manifest(table, day)
            return current if current is not None and current.attempt == self.attempt else None
        files = []
        for file in staged.files:
            gone = self.store.fs.get_file_info(f"{self.store.root}/{file.path}").type != pafs.FileType.File
            files.append(replace(file, path=self.store.published_path(table, day, file)) if gone else file)
        return replace(staged, files=tuple(files))

    def _trailing_rows(self, day: str) -> list[int]:
        """Return the row counts of the days before `day`: as staged by this attempt, else as published."""
        before = [add_days(day, -back) for back in range(1, THRESHOLDS.events.trailing_days + 1)]
        manifests = [self.store.staged_manifest(self.attempt, "events", d) or self.store.manifest("events", d) for d in before]
        return [manifest.rows for manifest in manifests if manifest is not None]

    def _check_files(self, manifest: Manifest) -> None:
        """Compare every file with its table's contract: columns, types and number of rows.

        Raises:
            StageError: a file is missing, unreadable or differs.
        """
        for file in manifest.files:
            where = f"file {self.store.root}/{file.path} of table {manifest.table} dt={manifest.dt}"
            remedy = "rebuild the partition with a new attempt; nothing was published"
            try:
                parquet = pq.ParquetFile(f"{self.store.root}/{file.path}", filesystem=self.store.fs)
            except (OSError, pa.ArrowInvalid) as error:
                raise StageError(f"{where} cannot be read: {error}", remedy) from error
            with parquet:
                found, rows = parquet.schema_arrow, parquet.metadata.num_rows
            contract = self._contract(manifest.table)
            for field in contract:
                if field.name not in found.names:
                    raise StageError(f"{where} has no column {field.name} ({field.type})", remedy)
                if found.field(field.name).type != field.type:
                    raise StageError(f"{where}: column {field.name} is {found.field(field.name).type}, not {field.type}", remedy)
            if extra := set(found.names) - set(contract.names):
                raise StageError(f"{where} has columns that the contract does not know: {', '.join(sorted(extra))}", remedy)
            if rows != file.rows:
                raise StageError(f"{where} has {rows} rows, its manifest says {file.rows}", remedy)

    def _contract(self, table: str) -> pa.Schema:
        """Return the schema of a table with the fields of this data set."""
        rules = {"events": self.definition.events.item_fields, "items": self.definition.item_fields}.get(table, {})
        kind = event_field_type if table == "events" else item_field_type
        return pa.schema([*TABLES[table], *[pa.field(name, kind(rule.kind)) for name, rule in rules.items()]])

    def _nothing_staged(self, tables: str, job: str) -> StageError:
        return StageError(
            f"attempt {self.attempt} has no completely staged {tables} of dt={self.dt} under {self.store.warehouse}",
            f"run `python -m {job}` with the same --dt and --attempt first",
        )


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


def _stats_check(suite: str, rows: list[stats.Row]) -> Check:
    import pandas as pd

    from etl.quality.validate import Check

    return Check(suite, pd.DataFrame(rows))


def _frame_check(suite: str, table: pa.Table) -> Check:
    from etl.quality.validate import Check

    return Check(suite, table.to_pandas(), per_day=False)


def _summary(report: Report) -> str:
    failed = {severity: len(report.failed(severity)) for severity in ("critical", "warning", "info")}
    return f"{len(report.outcomes)} expectations, failed: " + ", ".join(f"{count} {name}" for name, count in failed.items())


def main(argv: list[str] | None = None) -> None:
    """Audit one stage of one partition."""
    parser: argparse.ArgumentParser = partition_parser(__doc__)
    parser.add_argument("--stage", required=True, choices=STAGES, help="which gate to run")
    parser.add_argument("--reports", default="var/reports", help="local folder for Data Docs and results (default: %(default)s)")
    args = parser.parse_args(argv)
    audit = Audit(store_of(args), definition_of(args), args.dt, args.attempt, Path(args.reports))
    with written_after(args.dataset_given, audit.store, args.dt, args.attempt, audit.reports):
        getattr(audit, args.stage)()


if __name__ == "__main__":
    run_stage(main)

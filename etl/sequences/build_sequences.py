"""Build `items` and `sequences` of a partition from the published events of its window.

One task a bucket: the window's sorted days are concatenated and stably sorted by user, so no history is ever shuffled.
A target sees the events strictly earlier than itself: exposures of one page share one timestamp and never see each
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.datasets.definition import DatasetDefinition
from etl.ingest.features import read_features
from etl.ingest.raw import RawLocation
from etl.sequences.items import counted, feature_ids, item_rows, merged
from etl.sequences.sequence_rows import sequence_rows
from etl.stage.commands import log
from etl.stage.errors import StageError
from etl.stage.spark import spark_session
from etl.warehouse.buckets import Layout, Part, common_layout, parts_by_bucket, read_bucket
from etl.warehouse.partitions import MS_PER_DAY, Window, add_days, day_number
from etl.warehouse.schemas import SEQUENCES, schema_fingerprint
from etl.warehouse.store import DataFile, Manifest, TableStore, Try, code_version

if TYPE_CHECKING:
    from pyspark import Broadcast, SparkContext


@dataclass(frozen=True)
class Measuring:
    """What is measured of a staged file of `sequences` while it is at hand, read back: a gate then reads no file again.

    Attributes:
        columns: that are read.
        measured: from these columns and the training events of each item (int64, by index) to a measure; runs in tasks.
        take: takes the measures of all files.
    """

    columns: Sequence[str]
    measured: Callable[[pa.Table, np.ndarray], Any]
    take: Callable[[Sequence[Any]], None]


def build_sequences(
    store: TableStore,
    definition: DatasetDefinition,
    raw: RawLocation,
    window: Window,
    attempt: str,
    measuring: Measuring | None = None,
) -> dict[str, int]:
    """Stage `items` and `sequences` of a partition; return the counts of `sequences`.

    Args:
        measuring: what each task measures of the file that it staged; None: nothing.

    Raises:
        StageError: a day of the window is not published.
    """
    dt = window.dt
    staging = store.begin_try(attempt, ("items", "sequences"), [dt], dt)
    manifests = [store.require("events", day) for day in window.event_days]
    if not manifests[-1].rows:
        raise StageError(f"events of dt={dt} are empty", "build events for that day first")
    if definition.targets.positions is None:
        _require_training_day(manifests, window)
    layout, parts = _buckets(store, manifests)
    users, item_files = _user_fields(raw, definition), _item_files(raw, definition)
    task = _Task(store.warehouse, store.dataset, layout, window, definition)
    spark = spark_session(attempt)
    try:
        log(
            f"window {window.event_days[0]} .. {dt}: {sum(m.rows for m in manifests):,} events in {len(parts)}"
            f" bucket(s), {sum(map(len, parts.values())):,} file(s)"
        )
        buckets = spark.sparkContext.parallelize(sorted(parts.items()), len(parts))
        # Two passes: an item's index is its place among all items, so a bucket's rows wait for every bucket's items.
        counted_of = buckets.map(lambda bucket: _counted(task, *bucket)).collect()
        totals = merged([{name: _from_ipc(body) for name, body in part.items()} for part in counted_of])
        items = item_rows(totals, item_files, definition, raw.uri)
        item_file = store.write_file(staging, "items", dt, 0, items)
        known = _Known.sent(spark.sparkContext, items, users)
        measures = (measuring.columns, measuring.measured) if measuring is not None else None
        built = buckets.map(lambda bucket: _built(task, *bucket, known, staging, measures)).collect()
    finally:
        spark.stop()
    counts = {name: sum(of_bucket[name] for _, of_bucket, _ in built) for name in built[0][1]}
    if measuring is not None:
        measuring.take([measure for _, _, measure in built if measure is not None])
    if counts["negatives_missing"]:
        log(f"{counts['negatives_missing']:,} negatives could not be drawn: their users had met nearly every item")
    inputs, settings = {store.input_name(m): m.data_digest for m in manifests}, _settings(window, definition)
    for name, schema, files, figures in (
        ("items", items.schema, (item_file,), _item_counts(items, item_files, definition)),
        ("sequences", SEQUENCES, tuple(file for file, _, _ in built if file is not None), counts),
    ):
        made_by = (schema_fingerprint(schema), code_version())
        manifest = Manifest(store.dataset, name, dt, attempt, *made_by, files, figures, inputs, settings)
        store.write_staged_manifest(staging, manifest)
    return counts


def _buckets(store: TableStore, manifests: list[Manifest]) -> tuple[Layout, dict[int, list[Part]]]:
    """Return the layout that the days are read in, and the parts of files of each of its buckets."""
    layout = common_layout(manifests)
    parts = parts_by_bucket(store.compacted(manifests), layout)
    if any(part.mixed for found in parts.values() for part in found):
        log(
            "days are cut into different buckets: some files are read more than once until `python -m"
            f" etl.jobs.rebucket --buckets {layout.buckets}` has run"
        )
    return layout, parts


@dataclass(frozen=True)
class _Task:
    """What every task is of; it goes to the executors."""

    warehouse: str
    dataset: str
    layout: Layout
    window: Window
    definition: DatasetDefinition

    @property
    def store(self) -> TableStore:
        return TableStore(self.warehouse, self.dataset)

    def read(self, bucket: int, parts: list[Part], columns: list[str] | None = None) -> pa.Table:
        return read_bucket(self.store, parts, bucket, self.layout, columns)


@dataclass(frozen=True)
class _Known:
    """What the second pass knows, sent to each executor once.

    Attributes:
        item_ids: int64 [N], sorted. trained: int64 [N], events of each item before the evaluation days.
        users: user id -> field values.
    """

    item_ids: Broadcast[np.ndarray]
    trained: Broadcast[np.ndarray]
    users: Broadcast[dict[int, list[str]]]

    @staticmethod
    def sent(context: SparkContext, items: pa.Table, users: dict[int, list[str]]) -> _Known:
        return _Known(
            context.broadcast(items["item_id"].to_numpy()),
            context.broadcast(items["train_occurrences"].to_numpy()),
            context.broadcast(users),
        )


def _counted(task: _Task, bucket: int, parts: list[Part]) -> dict[str, bytes]:
    """Return what a bucket's events say of each item, as `counted` has it, packed."""
    window, fields = task.window, task.definition.events.item_fields
    # Positions of a leave-last protocol are of no day: every event counts as seen in training.
    by_day = task.definition.targets.positions is None
    first_evaluation_ms = day_number(window.first_evaluation_dt if by_day else "2200-01-01") * MS_PER_DAY
    events = task.read(bucket, parts, ["item_id", "event_time_ms", *fields])
    return {name: _to_ipc(part) for name, part in counted(events, first_evaluation_ms, fields).items()}


def _built(
    task: _Task,
    bucket: int,
    parts: list[Part],
    known: _Known,
    staging: Try,
    measures: tuple[Sequence[str], Callable[[pa.Table, np.ndarray], Any]] | None,
) -> tuple[DataFile | None, dict[str, int], Any]:
    """Write a bucket's rows of `sequences`; return the file, None without a row, their counts and their measure."""
    trained = known.trained.value
    rows, counts = sequence_rows(
        task.read(bucket, parts), known.item_ids.value, trained, known.users.value, task.window, task.definition
    )
    if not rows.num_rows:
        return None, counts, None
    file = task.store.write_file(staging, "sequences", task.window.dt, bucket, rows)
    if measures is None:
        return file, counts, None
    columns, measured = measures
    return file, counts, measured(task.store.read_file(file, columns), trained)


def _settings(window: Window, definition: DatasetDefinition) -> dict[str, Any]:
    """Return what the rows depend on besides their events: a manifest has it."""
    return {
        "target_days": window.target_days,
        "lookback_days": window.lookback_days,
        "evaluation_days": window.evaluation_days,
        **definition.history.model_dump(include={"cutoff", "availability_lag_ms", "max_events"}),
        "user_fields": ",".join(definition.user_fields),
        "signals": ",".join(definition.feedback_fields),
    }


def _item_counts(
    items: pa.Table, item_files: Sequence[pa.Table | None], definition: DatasetDefinition
) -> dict[str, int]:
    known = [name for name in definition.item_fields if items[name].null_count < items.num_rows]
    return {
        "items": items.num_rows,
        "item_files": sum(table is not None for table in item_files),
        "without_fields": items.num_rows - (_with_any(items, known) if known else 0),
    }


def _require_training_day(manifests: list[Manifest], window: Window) -> None:
    """Stop where no day for training has an event: a feed on its first days, or after a gap.

    Raises:
        StageError: it names the first day that can be trained.
    """
    first = min(m.dt for m in manifests if m.rows and m.dt >= window.first_target_dt)
    if first >= window.first_evaluation_dt:
        raise StageError(
            f"there is nothing to train dt={window.dt} on: the events of its {window.target_days} target days begin on"
            f" {first}, and the last {window.evaluation_days} of these days are for evaluation",
            f"run dt={add_days(first, window.evaluation_days)} once its logs are there: it is the first day that can be"
            f" trained; the events of dt={window.dt} are published and stay",
        )


def _with_any(items: pa.Table, fields: list[str]) -> int:
    """Return how many items have a value in any field."""
    known = np.zeros(items.num_rows, dtype=bool)
    for name in fields:
        column = items[name].combine_chunks()
        there = pc.greater(pc.list_value_length(column), 0) if pa.types.is_list(column.type) else pc.is_valid(column)
        known |= there.to_numpy(zero_copy_only=False)
    return int(known.sum())


def _item_files(raw: RawLocation, definition: DatasetDefinition) -> list[pa.Table | None]:
    """Return the item file of each rule, None where none matches."""
    files = [read_features(raw, rule) for rule in definition.items]
    for rule, table in zip(definition.items, files, strict=True):
        if table is None:
            log(f"no item file matches {rule.files} in {raw.uri}: its fields are empty")
    return files


def _user_fields(raw: RawLocation, definition: DatasetDefinition) -> dict[int, list[str]]:
    """Return user id -> values in the definition's order, '' = not known; the first row of a user counts."""
    fields: dict[int, list[str]] = {}
    width, done = len(definition.user_fields), 0
    for rule in definition.users:
        table = read_features(raw, rule)
        if table is None:
            log(f"no user file matches {rule.files} in {raw.uri}: its fields are empty")
        else:
            kind = definition.logs.columns[definition.events.user].type
            ids = feature_ids(table[rule.key], rule.key, kind, f"the file {rule.files} in {raw.uri}").tolist()
            columns = [table[field.column].to_pylist() for field in rule.fields.values()]
            for user, values in reversed(list(zip(ids, zip(*columns, strict=True), strict=True))):
                fields.setdefault(user, [""] * width)[done : done + len(values)] = values
        done += len(rule.fields)
    return fields


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_ipc(body: bytes) -> pa.Table:
    return pa.ipc.open_stream(body).read_all()

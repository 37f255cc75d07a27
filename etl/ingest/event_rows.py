"""From a split of a raw file to rows of `events` and `quarantine`, and to one bucket of one day as it is staged.

What a task does with the rows that it is given: no Spark here. Each row that was read becomes an event, a refused line
or a count.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.datasets.definition import MILLISECONDS, DatasetDefinition, Events, FieldRule, Span
from etl.ingest.compression import BREAKS
from etl.ingest.raw import (
    MISSING,
    REPEATED,
    Chunk,
    RawFile,
    RawLocation,
    Refused,
    Split,
    bound,
    day_of,
    hashed_ids,
)
from etl.warehouse.buckets import Layout
from etl.warehouse.partitions import MS_PER_DAY, day_number, dt_of_day_number
from etl.warehouse.schemas import EVENTS, QUARANTINE, event_field_type, table_schema
from etl.warehouse.store import TableStore, Try

EVENT, REFUSED, COUNTED, ELSEWHERE = 0, 1, 2, 3  # ELSEWHERE: refused lines that are filed under days not built now
CLOCK_CHANGES = {"repeated_times": REPEATED, "missing_times": MISSING}  # counts of a day


def events_schema(definition: DatasetDefinition) -> pa.Schema:
    """Return the schema of `events` of this data set: the contract, then the item fields of its log."""
    fields = [pa.field(name, event_field_type(rule.kind)) for name, rule in definition.events.item_fields.items()]
    return table_schema("events", pa.schema([*EVENTS, *fields]))


def parsed_schema(definition: DatasetDefinition) -> pa.Schema:
    """Return the schema of what the parsing tasks send to the writing ones: events, refused lines and counts."""
    return pa.schema(
        [
            pa.field("kind", pa.int8()),
            pa.field("day", pa.int32()),
            pa.field("bucket", pa.int32()),
            pa.field("row_hash", pa.int64()),
            *[pa.field(f.name, f.type) for f in events_schema(definition)],
            *[pa.field(f.name, f.type) for f in QUARANTINE],
        ]
    )


def parse_split(
    raw: RawLocation,
    split: Split,
    definition: DatasetDefinition,
    needed: frozenset[int],
    fallback_dt: str,
    layout: Layout,
) -> Iterator[pa.Table]:
    """Yield tables with the parsed schema.

    The needed days' events, their refused lines, and one row of counts a day.
    """
    schema = parsed_schema(definition)
    for chunk in raw.read(split, definition):
        yield _event_rows(chunk, definition, needed, layout, schema)
        refused = [(_filed(r, split.file, fallback_dt), r) for r in chunk.refused]
        yield _refused_rows(refused, split.file, needed, schema)
        yield _elsewhere_rows(refused, split.file, needed, schema)
        # Rows of other days are counted, too: what was read has to be what was written, refused or left out.
        days = np.concatenate([chunk.time_ms // MS_PER_DAY, np.array([day for day, _ in refused], dtype=np.int64)])
        yield _count_rows(days, split.file, schema)
        for what, code in CLOCK_CHANGES.items():
            if (local_days := chunk.time_ms[chunk.clock == code] // MS_PER_DAY).size:
                yield _count_rows(local_days, split.file, schema, what)


def write_day_bucket(
    rows: pa.Table, store: TableStore, definition: DatasetDefinition, work: Try, day: int, bucket: int
) -> dict:
    """Sort one bucket of one day, drop exact duplicates, write its files; return the figures for the manifests."""
    dt, schema = dt_of_day_number(day), events_schema(definition)
    kind = rows["kind"].to_numpy()
    refused = (
        rows.filter(pa.array(kind == REFUSED))
        .select(QUARANTINE.names)
        .sort_by([("source_file", "ascending"), ("row_number", "ascending")])
    )
    order = ["user_id", "event_time_ms", "item_id", "row_hash"]
    events = rows.filter(pa.array(kind == EVENT)).select([*schema.names, "row_hash"])
    # The hash comes last: the order of a file does not hang on raw columns that are in no table.
    keys = [*order[:3], *[name for name in schema.names if name not in order], "row_hash"]
    events = events.take(pc.sort_indices(events, [(name, "ascending") for name in keys])).combine_chunks()
    read = events.num_rows
    if read > 1 and definition.logs.repeats == "drop":
        # Sorted, equal rows are neighbours; the hash speaks for the raw columns that the table does not have.
        same = np.ones(read - 1, dtype=bool)
        for name in order:
            values = events[name].to_numpy()
            same &= values[1:] == values[:-1]
        events = events.filter(pa.array(np.concatenate([[True], ~same])))
    result: dict = {
        "day": day,
        "rows_read": read + refused.num_rows,
        "events": events.num_rows,
        "duplicates": read - events.num_rows,
        "quarantined": refused.num_rows,
        "users": len(pc.unique(events["user_id"])),
    }
    if events.num_rows:
        result["events_file"] = asdict(store.write_file(work, "events", dt, bucket, events.select(schema.names)))
    if refused.num_rows:
        result["quarantine_file"] = asdict(store.write_file(work, "quarantine", dt, bucket, refused))
        result["reasons"] = collections.Counter(
            f"{file}: {reason.split(':')[0]}"
            for file, reason in zip(refused["source_file"].to_pylist(), refused["reason"].to_pylist(), strict=True)
        )
    return result


def write_rows(
    rows: pa.Table, store: TableStore, definition: DatasetDefinition, work: Try, later: Try | None, layout: Layout
) -> list[dict]:
    """Write what one task got of the parsed rows, every bucket of a day whole; return the figures for the manifests.

    Args:
        work, later: where the days of the lookback are staged, and those that wait.
    """
    buckets, waiting = layout.buckets, frozenset(later.days if later else ())
    counted = rows.filter(pc.equal(rows["kind"], COUNTED))
    results = [
        {"day": row["day"], "file": row["source_file"], row["reason"] or "counted": row["row_number"]}
        for row in counted.select(["day", "source_file", "reason", "row_number"]).to_pylist()
    ]
    for row in (
        rows.filter(pc.equal(rows["kind"], ELSEWHERE)).select(["source_file", "reason", "row_number"]).to_pylist()
    ):
        results.append({"elsewhere": row["row_number"], "where": f"{row['source_file']}: {row['reason']}"})
    rows = rows.filter(pc.less(rows["kind"], COUNTED))
    # One sort for all days and buckets of the task; a filter for each would read all rows as many times.
    keys = rows["day"].to_numpy().astype(np.int64) * buckets + rows["bucket"].to_numpy()
    rows = rows.take(pa.array(np.argsort(keys, kind="stable")))
    distinct, counts = np.unique(keys, return_counts=True)
    for key, start, count in zip(
        distinct.tolist(), (np.cumsum(counts) - counts).tolist(), counts.tolist(), strict=True
    ):
        day, bucket = divmod(key, buckets)
        staging = later if later and dt_of_day_number(day) in waiting else work
        results.append(write_day_bucket(rows.slice(start, count), store, definition, staging, day, bucket))
    return results


def _event_rows(
    chunk: Chunk, definition: DatasetDefinition, needed: frozenset[int], layout: Layout, schema: pa.Schema
) -> pa.Table:
    day = chunk.time_ms // MS_PER_DAY
    here = np.isin(day, np.fromiter(needed, np.int64, len(needed)))
    rows, day = chunk.rows.filter(pa.array(here)), day[here]
    time_ms, row_hash = chunk.time_ms[here], chunk.row_hash[here]
    events = definition.events
    feedback = np.zeros(rows.num_rows, dtype=np.int16)
    for bit, condition in enumerate(events.signals.values()):
        feedback |= (_holds(rows[condition.column], condition).astype(np.int16) << bit).astype(np.int16)
    user = hashed_ids(rows[events.user])
    zeros = np.zeros(rows.num_rows, np.int64)
    columns = {
        "kind": np.full(len(day), EVENT, np.int8),
        "day": day.astype(np.int32),
        "bucket": layout.bucket_of(user),
        "row_hash": row_hash,
        "user_id": user,
        "item_id": hashed_ids(rows[events.item]),
        "event_time_ms": time_ms,
        "feedback": feedback,
        "watch_time_ms": _watch_time_ms(rows, events),
        "duration_ms": _milliseconds(rows, events.duration),
        "context": np.clip(rows[events.context].fill_null(-1).to_numpy(), -1, 32_767).astype(np.int16)
        if events.context
        else zeros.astype(np.int16) - 1,
        "is_random": rows[events.is_random].fill_null(0).to_numpy() == 1 if events.is_random else zeros.astype(bool),
        **{name: _field_values(rows[rule.column], rule) for name, rule in events.item_fields.items()},
    }
    return _parsed(columns, len(day), schema)


def _holds(values: pa.ChunkedArray, condition) -> np.ndarray:
    """Return which values meet a condition; an empty one does not."""
    met = pc.is_valid(values)
    if condition.equals is not None:
        wanted = condition.equals if isinstance(condition.equals, tuple) else (condition.equals,)
        text = pa.types.is_string(values.type)
        met = pc.and_(met, pc.is_in(values, value_set=pa.array([str(w) if text else w for w in wanted], values.type)))
    for limit, compare, whole in (
        (condition.above, pc.greater, math.floor),
        (condition.at_least, pc.greater_equal, math.ceil),
        (condition.below, pc.less, math.ceil),
        (condition.at_most, pc.less_equal, math.floor),
    ):
        if limit is not None:
            met = pc.and_(met, compare(values, bound(values.type, limit, whole)).fill_null(False))
    return met.combine_chunks().to_numpy(zero_copy_only=False)


def _watch_time_ms(rows: pa.Table, events: Events) -> np.ndarray:
    span = events.watch_time
    if span is None or span.unit != "percent":
        return _milliseconds(rows, span)
    share = rows[span.column].fill_null(0).to_numpy() / 100
    return np.rint(share * _milliseconds(rows, events.duration)).clip(-(2**53), 2**53).astype(np.int64)


def _milliseconds(rows: pa.Table, span: Span | None) -> np.ndarray:
    if span is None:
        return np.zeros(rows.num_rows, np.int64)
    values = rows[span.column].fill_null(0).to_numpy()
    factor = MILLISECONDS[span.unit]
    # Clipped, as a cast of what does not fit into int64 gives any number; beyond 2**53 a float
    # cannot tell neighbours apart.
    return (
        values
        if factor == 1 and values.dtype == np.int64
        else np.rint(values.astype(np.float64) * factor).clip(-(2**53), 2**53).astype(np.int64)
    )


def _field_values(values: pa.ChunkedArray, rule: FieldRule) -> pa.ChunkedArray:
    kind = event_field_type(rule.kind)
    if pa.types.is_floating(values.type) and pa.types.is_string(kind):
        # Codes that a column with gaps turned into fractions: "2661.0" is the code 2661.
        whole = pc.equal(pc.floor(values), values)
        return pc.if_else(
            whole,
            pc.if_else(whole, values, 0.0).cast(pa.int64(), safe=False).cast(pa.string()),
            values.cast(pa.string()),
        )
    if pa.types.is_string(values.type):
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
    return values.cast(kind)


def _filed(refused: Refused, file: RawFile, fallback_dt: str) -> int:
    # A break of an archive is filed under dt, which is always built: filed under a day that is not, it would go unseen.
    return day_number(fallback_dt) if refused.reason.partition(":")[0] in BREAKS else day_of(refused, file, fallback_dt)


def _refused_rows(
    refused: list[tuple[int, Refused]], file: RawFile, needed: frozenset[int], schema: pa.Schema
) -> pa.Table:
    mine = [(day, r) for day, r in refused if day in needed]
    return _parsed(
        {
            "kind": [REFUSED] * len(mine),
            "day": [day for day, _ in mine],
            "bucket": [0] * len(mine),  # its user may be what is wrong with the line
            "source_file": [file.name] * len(mine),
            "row_number": [r.row_number for _, r in mine],
            "reason": [r.reason for _, r in mine],
            "raw_text": [r.raw_text.decode("utf-8", "backslashreplace").replace("\x00", "\\x00") for _, r in mine],
        },
        len(mine),
        schema,
    )


def _elsewhere_rows(
    refused: list[tuple[int, Refused]], file: RawFile, needed: frozenset[int], schema: pa.Schema
) -> pa.Table:
    codes = collections.Counter(r.reason.split(":")[0] for day, r in refused if day not in needed)
    return _parsed(
        {
            "kind": [ELSEWHERE] * len(codes),
            "day": [-1] * len(codes),
            "bucket": [-1] * len(codes),
            "source_file": [file.name] * len(codes),
            "reason": list(codes),
            "row_number": list(codes.values()),
        },
        len(codes),
        schema,
    )


def _count_rows(days: np.ndarray, file: RawFile, schema: pa.Schema, what: str | None = None) -> pa.Table:
    numbers, counts = np.unique(days, return_counts=True)
    return _parsed(
        {
            "kind": [COUNTED] * len(numbers),
            "day": numbers.astype(np.int32),
            "bucket": [-1] * len(numbers),
            "source_file": [file.name] * len(numbers),
            "reason": [what] * len(numbers),
            "row_number": counts,
        },
        len(numbers),
        schema,
    )


def _parsed(columns: dict, rows: int, schema: pa.Schema) -> pa.Table:
    return pa.table(
        [
            pa.array(columns[f.name], f.type)
            if f.name in columns and not isinstance(columns[f.name], pa.ChunkedArray)
            else columns.get(f.name, pa.nulls(rows, f.type))
            for f in schema
        ],
        schema=schema,
    )

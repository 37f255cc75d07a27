"""Build `events` and `quarantine` of a day from raw logs, and of every earlier day of the lookback that is not there yet.

A day is a function of the raw rows whose event time (UTC) lies in it, of nothing else: days built together, apart, in any
order or twice have the same bytes. Every raw row read is counted as an event, a duplicate, quarantined, or outside.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.cli import definition_of, log, partition_parser, run_stage, store_of
from etl.datasets import DatasetDefinition
from etl.errors import StageError
from etl.partitions import MS_PER_DAY, add_days, day_number, days_between, dt_of_day_number
from etl.raw import RawFile, RawLocation, Split, day_of_refused, parse_lines, reason_for, refusals
from etl.schemas import EVENTS, QUARANTINE, schema_fingerprint
from etl.spark import spark_session
from etl.store import DataFile, Manifest, TableStore, code_version

# Raw columns that no table keeps, but that tell an exact duplicate from a row that only looks like one.
REST = ("date", "hourmin", "profile_stay_time", "comment_stay_time")
EVENT, REFUSED, COUNTED, ELSEWHERE = 0, 1, 2, 3  # ELSEWHERE: refused lines that are filed under days not built now
PARSED = pa.schema(
    [
        pa.field("kind", pa.int8()),
        pa.field("day", pa.int32()),
        pa.field("bucket", pa.int32()),
        *[pa.field(f.name, f.type) for f in EVENTS],
        *[pa.field(name, pa.int64()) for name in REST],
        *[pa.field(f.name, f.type) for f in QUARANTINE],
    ]
)
BYTES_PER_TASK = 128 << 20
HASHED_BYTES = 512 << 20  # larger raw files are identified by name and size


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument("--raw", required=True, help="folder or URI of the raw logs, as published")
    parser.add_argument("--lookback-days", type=int, default=30, help="days, dt included, that must be there afterwards")
    parser.add_argument("--buckets", type=int, default=8, help="user buckets of a day")
    parser.add_argument("--max-bad-share", type=float, default=0.01, help="stop when more than this share of the rows is refused")
    args = parser.parse_args()
    definition, store = definition_of(args), store_of(args)
    if args.lookback_days < 1 or args.buckets < 1 or not 0 <= args.max_bad_share <= 1:
        raise StageError("--lookback-days and --buckets must be at least 1 and --max-bad-share between 0 and 1", "correct them")
    summary = build_events(store, definition, RawLocation(args.raw), args.dt, args.attempt, args.lookback_days, args.buckets, args.max_bad_share)
    log("rows in the files read: {rows_read:,} = {events:,} events + {duplicates:,} duplicates + {quarantined:,} quarantined"
        " + {outside_days:,} outside the lookback + {already_published:,} of days already published".format(**summary))


def build_events(store: TableStore, definition: DatasetDefinition, raw: RawLocation, dt: str, attempt: str, lookback_days: int, buckets: int,
                 max_bad_share: float) -> dict[str, int]:
    """Stage all missing days and `dt` itself; return the reconciliation of the rows that were read.

    Raises:
        StageError: files or columns are missing, too many rows are refused, or `dt` has no row.
    """
    files = raw.logs(definition)
    lookback = days_between(add_days(dt, 1 - lookback_days), dt)
    listing = {day: _listing(files, day) for day in lookback}
    needed = [day for day in lookback if day == dt or not _is_there(store, day, raw, listing[day], buckets)]
    relevant = [file for file in files if any(file.may_hold(day) for day in needed)]
    if not any(file.may_hold(dt) for file in relevant):
        raise StageError(f"no log file in {raw.uri} covers dt={dt}: their names promise {_promised(files)}", "deliver that day's file, or choose another DT")
    for file in relevant:
        raw.check_header(file, definition.log_columns)
    log(f"building {len(needed)} day(s) {needed[0]} .. {needed[-1]} from {len(relevant)} file(s), {sum(f.size for f in relevant):,} bytes")
    for day in needed:
        store.clear_staging(attempt, "events", day)
        store.clear_staging(attempt, "quarantine", day)
    spark = spark_session(attempt)
    try:
        stats = _run(spark, store, definition, raw, relevant, needed, dt, attempt, buckets)
    finally:
        spark.stop()
    return _conclude(store, raw, dt, attempt, needed, relevant, listing, buckets, lookback_days, max_bad_share, stats)


def bucket_of(user_id: np.ndarray, buckets: int) -> np.ndarray:
    """Return the bucket of each user: a mix of the id's bits, stable over versions and machines, int32."""
    mixed = user_id.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(33)) % np.uint64(buckets)).astype(np.int32)


def parse_split(raw: RawLocation, split: Split, definition: DatasetDefinition, needed: frozenset[int], fallback_dt: str, buckets: int) -> Iterator[pa.Table]:
    """Yield tables with the PARSED schema: the needed days' events, their refused lines, and one row of counts a day."""
    columns = definition.log_columns
    for body, first_row, broken in raw.chunks(split):
        table, refused_lines = parse_lines(body, first_row, columns)
        bad, reasons = refusals(table, definition)
        refused = [(day_of_refused(line, columns, split.file, fallback_dt), row, reason_for(line, columns), line) for row, line in refused_lines]
        if bad.any():
            wrong = table.filter(pa.array(bad))
            texts = [",".join(str(v) for v in cells.values()).encode() for cells in wrong.select(list(columns)).to_pylist()]
            refused += [(day_of_refused(text, columns, split.file, fallback_dt), row, reason, text)
                        for row, reason, text in zip(wrong["row_number"].to_pylist(), reasons, texts, strict=True)]
            table = table.filter(pa.array(~bad))
        if broken is not None:
            row = first_row + table.num_rows + len(refused)
            # Filed under dt, which is always built: filed under a day that is not, the break would go unseen.
            refused.append((day_number(fallback_dt), row, broken, b""))
        yield _event_rows(table, definition, needed, buckets)
        yield _refused_rows(refused, split.file, needed)
        yield _elsewhere_rows(refused, split.file, needed)
        days = np.concatenate([table["time_ms"].to_numpy() // MS_PER_DAY, np.array([r[0] for r in refused], dtype=np.int64)])
        yield _count_rows(days, needed)


def write_day_bucket(rows: pa.Table, store: TableStore, attempt: str, day: int, bucket: int) -> dict:
    """Sort one bucket of one day, drop exact duplicates, write its files; return the figures for the manifests."""
    dt = dt_of_day_number(day)
    kind = rows["kind"].to_numpy()
    events = rows.filter(pa.array(kind == EVENT))
    refused = rows.filter(pa.array(kind == REFUSED)).select(QUARANTINE.names).sort_by([("source_file", "ascending"), ("row_number", "ascending")])
    order = ["user_id", "event_time_ms", "item_id", "feedback", "watch_time_ms", "duration_ms", "tab", "is_random", *REST]
    events = events.select(order).sort_by([(name, "ascending") for name in order]).combine_chunks()
    read = events.num_rows
    if read > 1:
        same = np.ones(read - 1, dtype=bool)
        for name in order:
            values = events[name].to_numpy()
            same &= values[1:] == values[:-1]
        events = events.filter(pa.array(np.concatenate([[True], ~same])))
    result: dict = {"day": day, "rows_read": read + refused.num_rows, "events": events.num_rows, "duplicates": read - events.num_rows,
                    "quarantined": refused.num_rows, "users": len(pc.unique(events["user_id"])),
                    "clicks": int(pc.sum(pc.bit_wise_and(events["feedback"], pa.scalar(1, pa.int16()))).as_py() or 0)}
    if events.num_rows:
        result["events_file"] = asdict(store.write_file(attempt, "events", dt, bucket, events))
    if refused.num_rows:
        result["quarantine_file"] = asdict(store.write_file(attempt, "quarantine", dt, bucket, refused))
        result["reasons"] = collections.Counter(
            f"{file}: {reason.split(':')[0]}" for file, reason in zip(refused["source_file"].to_pylist(), refused["reason"].to_pylist(), strict=True))
    return result


def _run(spark, store: TableStore, definition: DatasetDefinition, raw: RawLocation, files: list[RawFile], needed: list[str], dt: str, attempt: str, buckets: int) -> list[dict]:
    context = spark.sparkContext

    def count_lines(ranges: list[tuple[RawFile, int, int]]) -> list[int]:
        return context.parallelize(ranges, len(ranges)).map(lambda r: RawLocation(raw_uri).count_newlines(*r)).collect()

    raw_uri, warehouse, dataset = raw.uri, store.warehouse, store.dataset
    splits = raw.splits(files, count_lines)
    days = frozenset(day_number(day) for day in needed)
    rows = spark.createDataFrame([(json.dumps(asdict(split)),) for split in splits], "split string").repartition(len(splits))

    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        location = RawLocation(raw_uri)
        for batch in batches:
            for text in batch.column(0).to_pylist():
                fields = json.loads(text)
                split = Split(**{**fields, "file": RawFile(**fields["file"])})
                for table in parse_split(location, split, definition, days, dt, buckets):
                    yield from table.to_batches(max_chunksize=65_536)

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        mine = pa.Table.from_batches(batches, PARSED)
        here = TableStore(warehouse, dataset)
        counted = mine.filter(pc.equal(mine["kind"], COUNTED))
        results = [{"day": day, "counted": count} for day, count in zip(counted["day"].to_pylist(), counted["row_number"].to_pylist(), strict=True)]
        for row in mine.filter(pc.equal(mine["kind"], ELSEWHERE)).select(["source_file", "reason", "row_number"]).to_pylist():
            results.append({"elsewhere": row["row_number"], "where": f"{row['source_file']}: {row['reason']}"})
        mine = mine.filter(pc.less(mine["kind"], COUNTED))
        keys = mine["day"].to_numpy().astype(np.int64) * buckets + mine["bucket"].to_numpy()
        for key in np.unique(keys):
            day, bucket = divmod(int(key), buckets)
            results.append(write_day_bucket(mine.filter(pa.array(keys == key)), here, attempt, day, bucket))
        yield pa.RecordBatch.from_pydict({"result": [json.dumps(r) for r in results]}, pa.schema([("result", pa.string())]))

    tasks = max(context.defaultParallelism, -(-sum(f.size for f in files) // BYTES_PER_TASK))
    parsed = rows.mapInArrow(parse, _spark_schema(PARSED)).repartition(min(tasks, len(needed) * buckets), "day", "bucket")
    return [json.loads(row[0]) for row in parsed.mapInArrow(write, "result string").collect()]


def _conclude(store, raw, dt, attempt, needed, files, listing, buckets, lookback_days, max_bad_share, stats) -> dict[str, int]:
    by_day: dict[str, list[dict]] = collections.defaultdict(list)
    summary = dict.fromkeys(("rows_read", "events", "duplicates", "quarantined", "outside_days", "already_published"), 0)
    reasons: collections.Counter = collections.Counter()
    days_seen = set()
    first_day = add_days(dt, 1 - lookback_days)
    elsewhere: collections.Counter = collections.Counter()
    for stat in stats:
        if "elsewhere" in stat:
            elsewhere[stat["where"]] += stat["elsewhere"]
            continue
        day = dt_of_day_number(stat["day"])
        if "counted" in stat:
            summary["rows_read"] += stat["counted"]
            days_seen.add(day)
            if day not in needed:
                summary["already_published" if first_day <= day <= dt else "outside_days"] += stat["counted"]
            continue
        by_day[day].append(stat)
        for name in ("events", "duplicates", "quarantined"):
            summary[name] += stat[name]
        reasons.update(stat.get("reasons", {}))
    # Of the rows of the days built now; and of all rows read, for a line without a readable day may belong to any of them.
    built = summary["events"] + summary["duplicates"] + summary["quarantined"]
    for refused, rows, where_refused, what in (
        (summary["quarantined"], built, reasons, "rows of the days to build"),
        (summary["quarantined"] + elsewhere.total(), summary["rows_read"], reasons + elsewhere, "raw rows read"),
    ):
        if refused > max_bad_share * rows:
            (where, count), *_ = where_refused.most_common(1)
            raise StageError(f"{refused:,} of {rows:,} {what} ({refused / rows:.2%}) were refused, more than {max_bad_share:.2%}; "
                             f"most often {where} ({count:,} rows)", "mend the raw file and run again, or raise --max-bad-share after looking at it")
    if cut := [where for where in reasons if where.endswith((": truncated_gzip", ": broken_gzip"))]:
        # One refused row stands for everything behind the break: no share of refused rows can tell how much is missing.
        raise StageError(f"an archive in {raw.uri} is damaged: {', '.join(sorted(cut))}", "deliver the file again")
    if not any(stat["events"] for stat in by_day[dt]):
        span = f"{min(days_seen)} .. {max(days_seen)}" if days_seen else "no day at all"
        raise StageError(f"no row for dt={dt} in {raw.uri}: the files that may hold it ({', '.join(f.name for f in files)}) hold {span}", "choose a DT in that span, or deliver the day's file")
    version, inputs = code_version(), {file.name: _file_digest(raw, file) for file in files}
    for day in needed:
        counts = {name: sum(s[name] for s in by_day[day]) for name in ("rows_read", "events", "duplicates", "quarantined", "users", "clicks")}
        settings = {"raw": raw.uri, "listing": listing[day], "buckets": buckets}
        for table, schema, key in (("quarantine", QUARANTINE, "quarantine_file"), ("events", EVENTS, "events_file")):
            found = tuple(sorted((DataFile(**s[key]) for s in by_day[day] if key in s), key=lambda f: f.bucket))
            store.write_staged_manifest(Manifest(store.dataset, table, day, attempt, schema_fingerprint(schema), version, found, counts, inputs, settings))
    store._write_text(f"_staging/{attempt}/ingest_summary.json", json.dumps(summary))
    return summary


def _event_rows(table: pa.Table, definition: DatasetDefinition, needed: frozenset[int], buckets: int) -> pa.Table:
    day = table["time_ms"].to_numpy() // MS_PER_DAY
    kept = np.isin(day, list(needed))
    table, day = table.filter(pa.array(kept)), day[kept]
    feedback = np.zeros(table.num_rows, dtype=np.int16)
    for bit, name in enumerate(definition.feedback_fields):
        feedback |= (table[name].to_numpy() << bit).astype(np.int16)
    user = table["user_id"].to_numpy()
    columns = {
        "kind": np.full(len(day), EVENT, np.int8), "day": day.astype(np.int32), "bucket": bucket_of(user, buckets), "user_id": user,
        "item_id": table["video_id"], "event_time_ms": table["time_ms"], "feedback": feedback, "watch_time_ms": table["play_time_ms"],
        "duration_ms": table["duration_ms"], "tab": table["tab"].cast(pa.int16()), "is_random": table["is_rand"].to_numpy().astype(bool),
        **{name: table[name] for name in REST},
    }  # fmt: skip
    return _parsed(columns, len(day))


def _refused_rows(refused: list[tuple[int, int, str, bytes]], file: RawFile, needed: frozenset[int]) -> pa.Table:
    kept = [r for r in refused if r[0] in needed]
    return _parsed({"kind": [REFUSED] * len(kept), "day": [r[0] for r in kept], "bucket": [0] * len(kept), "source_file": [file.name] * len(kept),
                    "row_number": [r[1] for r in kept], "reason": [r[2] for r in kept],
                    "raw_text": [r[3].decode("utf-8", "backslashreplace").replace("\x00", "\\x00") for r in kept]}, len(kept))


def _elsewhere_rows(refused: list[tuple[int, int, str, bytes]], file: RawFile, needed: frozenset[int]) -> pa.Table:
    codes = collections.Counter(r[2].split(":")[0] for r in refused if r[0] not in needed)
    return _parsed({"kind": [ELSEWHERE] * len(codes), "day": [-1] * len(codes), "bucket": [-1] * len(codes), "source_file": [file.name] * len(codes),
                    "reason": list(codes), "row_number": list(codes.values())}, len(codes))


def _count_rows(days: np.ndarray, needed: frozenset[int]) -> pa.Table:
    numbers, counts = np.unique(days, return_counts=True)
    return _parsed({"kind": [COUNTED] * len(numbers), "day": numbers.astype(np.int32), "bucket": [-1] * len(numbers), "row_number": counts}, len(numbers))


def _parsed(columns: dict, rows: int) -> pa.Table:
    return pa.table([pa.array(columns[f.name], f.type) if f.name in columns and not isinstance(columns[f.name], pa.ChunkedArray)
                     else columns.get(f.name, pa.nulls(rows, f.type)) for f in PARSED], schema=PARSED)


def _is_there(store: TableStore, day: str, raw: RawLocation, listing: str, buckets: int) -> bool:
    """Whether a published day can be used as it is: same raw place and buckets, and no file added or delivered again since.

    A day of which a file is gone stays as it is, unless it is empty: built again, it would hold less.
    """
    manifest = store.manifest("events", day)
    if manifest is None or manifest.settings.get("raw") != raw.uri or manifest.settings.get("buckets") != buckets:
        return False
    before = str(manifest.settings.get("listing"))
    gone = {_file_name(line) for line in before.splitlines()} - {_file_name(line) for line in listing.splitlines()}
    return before == listing or (manifest.rows > 0 and bool(gone))


def _listing(files: list[RawFile], day: str) -> str:
    """Return name and size of every file that may hold a day, one a line."""
    return "\n".join(f"{f.name} {f.size}" for f in files if f.may_hold(day))


def _file_name(line: str) -> str:
    return line.rsplit(" ", 1)[0]


def _promised(files: list[RawFile]) -> str:
    return "; ".join(f"{f.name}: {f.first_local_dt} .. {f.last_local_dt}" for f in files)


def _file_digest(raw: RawLocation, file: RawFile) -> str:
    if file.size > HASHED_BYTES:
        return f"size:{file.size}"
    digest = hashlib.sha256()
    with raw.fs.open_input_stream(file.path, compression=None) as stream:
        while block := stream.read(8 << 20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _spark_schema(schema: pa.Schema):
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)


if __name__ == "__main__":
    run_stage(main)

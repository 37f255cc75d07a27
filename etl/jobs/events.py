"""Build `events` and `quarantine` of a day from raw logs, and of every earlier day of the lookback that is not there yet.

A day is a function of the raw rows whose event time (UTC) lies in it, of nothing else: days built together, apart, in any
order or twice have the same bytes. Every raw row read is counted as an event, a duplicate, quarantined, or outside.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.cli import definition_of, log, partition_parser, run_stage, store_of
from etl.compression import BREAKS, promised_compression
from etl.datasets import MILLISECONDS, DatasetDefinition, Events, FieldRule, Span
from etl.errors import StageError
from etl.partitions import MS_PER_DAY, add_days, day_number, days_between, dt_of_day_number
from etl.raw import Chunk, RawFile, RawLocation, Refused, Split, bound, day_of, hashed_ids, promised
from etl.schemas import EVENTS, QUARANTINE, event_field_type, schema_fingerprint, table_schema
from etl.spark import spark_session
from etl.store import DataFile, Manifest, TableStore, Try, code_version, sha256_of

EVENT, REFUSED, COUNTED, ELSEWHERE = 0, 1, 2, 3  # ELSEWHERE: refused lines that are filed under days not built now
BYTES_PER_TASK = 128 << 20
BUCKET_BYTES = 128 << 20  # raw bytes of the lookback that one bucket holds: what one task of the sequences job reads
MAX_BUCKETS = 4_096
GZIP_RATIO = 5  # raw bytes in a byte of an archive, roughly
HASHED_BYTES = 512 << 20  # larger raw files are identified by name and size


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument("--raw", required=True, help="folder or URI of the raw logs, as published")
    parser.add_argument("--lookback-days", type=int, default=None, help="days, dt included, that must be there afterwards (default: the definition's)")
    parser.add_argument("--buckets", type=int, default=None,
                        help=f"user buckets of a day (default: those of the days that are there, else one for each {BUCKET_BYTES >> 20} MiB of raw logs)")
    parser.add_argument("--max-bad-share", type=float, help="stop when more than this share of the rows is refused (default: the data set's quality bound raw.max_refused_share)")
    parser.add_argument("--reports", help="folder of reports: judge the raw files first and the staged days last, in this process, and write the pages there")
    args = parser.parse_args()
    definition, store, raw = definition_of(args), store_of(args), RawLocation(args.raw)
    lookback_days = args.lookback_days if args.lookback_days is not None else definition.window.lookback_days
    max_bad_share = args.max_bad_share if args.max_bad_share is not None else definition.quality.thresholds().raw.max_refused_share
    if lookback_days < 1 or (args.buckets is not None and not 1 <= args.buckets <= MAX_BUCKETS) or not 0 <= max_bad_share <= 1:
        raise StageError(f"--lookback-days must be at least 1, --buckets between 1 and {MAX_BUCKETS} and --max-bad-share between 0 and 1", "correct them")
    with contextlib.ExitStack() as around:
        raw_gate: Callable[[bool], object] = lambda wait: None  # noqa: E731
        if args.reports:
            from etl.quality.beside import judging_events
            from etl.quality.report import written_after

            around.enter_context(written_after(args.dataset_given, store, args.dt, args.attempt, Path(args.reports), only_stopped=True))
            raw_gate = around.enter_context(judging_events(store, definition, raw, args.dt, args.attempt, Path(args.reports)))
        summary = build_events(store, definition, raw, args.dt, args.attempt, lookback_days, args.buckets, max_bad_share, raw_gate)
    log("rows in the files read: {rows_read:,} = {events:,} events + {duplicates:,} duplicates + {quarantined:,} quarantined"
        " + {outside_days:,} outside the lookback + {already_published:,} of days already published".format(**summary))


def build_events(store: TableStore, definition: DatasetDefinition, raw: RawLocation, dt: str, attempt: str, lookback_days: int, buckets: int | None,
                 max_bad_share: float, raw_gate: Callable[[bool], object] = lambda wait: None) -> dict[str, int]:
    """Stage all missing days and `dt` itself; return the reconciliation of the rows that were read.

    Args:
        raw_gate: raises when the files must not be used; asked before the files are read, when it may have no answer yet, and,
            told to wait for one, before anything counts as staged.
        buckets: user buckets of a day; None takes those of the published days, else sizes them by the raw bytes.

    Raises:
        StageError: files or columns are missing, too many rows are refused, or `dt` has no row.
    """
    files = raw.logs(definition)
    for note in raw.notes(files, definition):
        log(f"note: {note}")
    lookback = days_between(add_days(dt, 1 - lookback_days), dt)
    work = store.begin_try(attempt, ("quarantine", "events"), lookback)
    published = {day: manifest for day in lookback if (manifest := store.manifest("events", day)) is not None}
    listing = {day: _listing(files, day) for day in lookback}
    if buckets is None:
        buckets = _buckets(published, [file for file in files if any(file.may_hold(day) for day in lookback)])
    settings = {"raw": raw.uri, "buckets": buckets, "definition": definition_digest(definition)}
    needed = [day for day in lookback if day == dt or not _is_there(published.get(day), listing[day], settings)]
    if definition.logs.days_in_name and (undated := [file.name for file in files if file.first_utc_dt is None]):
        log(f"note: logs.days_in_name finds no days in {len(undated)} name(s), such as {undated[0]}: they are opened for every day")
    relevant = [file for file in files if any(file.may_hold(day) for day in needed)]
    if not any(file.may_hold(dt) for file in relevant):
        raise StageError(f"no log file in {raw.uri} covers dt={dt}: their names promise {promised(files)}", "deliver that day's file, or choose another DT")
    log(f"building {len(needed)} day(s) {needed[0]} .. {needed[-1]} in {buckets} bucket(s) from {len(relevant)} file(s), {sum(f.size for f in relevant):,} bytes")
    spark = spark_session(attempt)
    try:
        raw_gate(False)
        stats = _run(spark, store, definition, raw, relevant, needed, dt, work, buckets)
    finally:
        spark.stop()
    by_day, summary = _reconciled(definition, raw, dt, needed, relevant, add_days(dt, 1 - lookback_days), max_bad_share, stats)
    raw_gate(True)
    _write_manifests(store, definition, raw, work, relevant, by_day, needed, {day: {**settings, "listing": listing[day]} for day in needed})
    return summary


def why_stale(manifest: Manifest, definition: DatasetDefinition, raw: RawLocation, files: list[RawFile], dt: str) -> str | None:
    """Return why a published day is no longer what the job would build, None when it is."""
    settings = {"raw": raw.uri, "buckets": manifest.settings["buckets"], "definition": definition_digest(definition)}
    if _is_there(manifest, _listing(files, dt), settings):
        return None
    if manifest.settings.get("definition") != settings["definition"]:
        return "the definition changed"
    return "raw files came or changed" if manifest.settings.get("raw") == raw.uri else f"built from another raw folder: {manifest.settings.get('raw')}"


def bucket_of(user_id: np.ndarray, buckets: int) -> np.ndarray:
    """Return the bucket of each user: a mix of the id's bits, stable over versions and machines, int32."""
    mixed = user_id.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(33)) % np.uint64(buckets)).astype(np.int32)


def definition_digest(definition: DatasetDefinition) -> str:
    """Return the digest of what shapes events: the logs, and the parts of their columns."""
    return hashlib.sha256(definition.model_dump_json(include={"logs", "events"}).encode()).hexdigest()[:16]


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


def parse_split(raw: RawLocation, split: Split, definition: DatasetDefinition, needed: frozenset[int], fallback_dt: str, buckets: int) -> Iterator[pa.Table]:
    """Yield tables with the parsed schema: the needed days' events, their refused lines, and one row of counts a day."""
    schema = parsed_schema(definition)
    for chunk in raw.read(split, definition):
        yield _event_rows(chunk, definition, needed, buckets, schema)
        refused = [(_filed(r, split.file, fallback_dt), r) for r in chunk.refused]
        yield _refused_rows(refused, split.file, needed, schema)
        yield _elsewhere_rows(refused, split.file, needed, schema)
        days = np.concatenate([chunk.time_ms // MS_PER_DAY, np.array([day for day, _ in refused], dtype=np.int64)])
        yield _count_rows(days, schema)


def write_day_bucket(rows: pa.Table, store: TableStore, definition: DatasetDefinition, work: Try, day: int, bucket: int) -> dict:
    """Sort one bucket of one day, drop exact duplicates, write its files; return the figures for the manifests."""
    dt, schema = dt_of_day_number(day), events_schema(definition)
    kind = rows["kind"].to_numpy()
    refused = rows.filter(pa.array(kind == REFUSED)).select(QUARANTINE.names).sort_by([("source_file", "ascending"), ("row_number", "ascending")])
    order = ["user_id", "event_time_ms", "item_id", "row_hash"]
    events = rows.filter(pa.array(kind == EVENT)).select([*schema.names, "row_hash"])
    # The hash comes last: the order of a file does not hang on raw columns that no table keeps.
    keys = [*order[:3], *[name for name in schema.names if name not in order], "row_hash"]
    events = events.take(pc.sort_indices(events, [(name, "ascending") for name in keys])).combine_chunks()
    read = events.num_rows
    if read > 1 and definition.logs.repeats == "drop":
        same = np.ones(read - 1, dtype=bool)
        for name in order:
            values = events[name].to_numpy()
            same &= values[1:] == values[:-1]
        events = events.filter(pa.array(np.concatenate([[True], ~same])))
    result: dict = {"day": day, "rows_read": read + refused.num_rows, "events": events.num_rows, "duplicates": read - events.num_rows,
                    "quarantined": refused.num_rows, "users": len(pc.unique(events["user_id"]))}
    if events.num_rows:
        result["events_file"] = asdict(store.write_file(work, "events", dt, bucket, events.select(schema.names)))
    if refused.num_rows:
        result["quarantine_file"] = asdict(store.write_file(work, "quarantine", dt, bucket, refused))
        result["reasons"] = collections.Counter(
            f"{file}: {reason.split(':')[0]}" for file, reason in zip(refused["source_file"].to_pylist(), refused["reason"].to_pylist(), strict=True))
    return result


def _run(spark, store: TableStore, definition: DatasetDefinition, raw: RawLocation, files: list[RawFile], needed: list[str], dt: str, work: Try, buckets: int) -> list[dict]:
    context = spark.sparkContext

    def count_lines(ranges: list[tuple[RawFile, int, int]]) -> list[int]:
        return context.parallelize(ranges, len(ranges)).map(lambda r: RawLocation(raw_uri).count_newlines(*r)).collect()

    raw_uri, warehouse, dataset = raw.uri, store.warehouse, store.dataset
    splits = raw.splits(files, definition.logs, count_lines)
    days = frozenset(day_number(day) for day in needed)
    schema = parsed_schema(definition)
    rows = spark.createDataFrame([(json.dumps(asdict(split)),) for split in splits], "split string").repartition(len(splits))

    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        location = RawLocation(raw_uri)
        for batch in batches:
            for text in batch.column(0).to_pylist():
                fields = json.loads(text)
                split = Split(**{**fields, "file": RawFile(**fields["file"]), "header": tuple(fields["header"])})
                for table in parse_split(location, split, definition, days, dt, buckets):
                    yield from table.to_batches(max_chunksize=65_536)

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        mine = pa.Table.from_batches(batches, schema)
        here = TableStore(warehouse, dataset)
        counted = mine.filter(pc.equal(mine["kind"], COUNTED))
        results = [{"day": day, "counted": count} for day, count in zip(counted["day"].to_pylist(), counted["row_number"].to_pylist(), strict=True)]
        for row in mine.filter(pc.equal(mine["kind"], ELSEWHERE)).select(["source_file", "reason", "row_number"]).to_pylist():
            results.append({"elsewhere": row["row_number"], "where": f"{row['source_file']}: {row['reason']}"})
        mine = mine.filter(pc.less(mine["kind"], COUNTED))
        keys = mine["day"].to_numpy().astype(np.int64) * buckets + mine["bucket"].to_numpy()
        mine = mine.take(pa.array(np.argsort(keys, kind="stable")))
        distinct, counts = np.unique(keys, return_counts=True)
        for key, start, count in zip(distinct.tolist(), (np.cumsum(counts) - counts).tolist(), counts.tolist(), strict=True):
            day, bucket = divmod(key, buckets)
            results.append(write_day_bucket(mine.slice(start, count), here, definition, work, day, bucket))
        yield pa.RecordBatch.from_pydict({"result": [json.dumps(r) for r in results]}, pa.schema([("result", pa.string())]))

    tasks = max(context.defaultParallelism, -(-sum(_raw_bytes(f) for f in files) // BYTES_PER_TASK))
    parsed = rows.mapInArrow(parse, _spark_schema(schema)).repartition(min(tasks, len(needed) * buckets), "day", "bucket")
    return [json.loads(row[0]) for row in parsed.mapInArrow(write, "result string").collect()]


def _reconciled(definition: DatasetDefinition, raw: RawLocation, dt: str, needed: list[str], files: list[RawFile], first_day: str, max_bad_share: float,
                stats: list[dict]) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """Return the figures of each day's buckets and the summary of the run.

    Raises:
        StageError: too many rows are refused, an archive is damaged, or `dt` has no row.
    """
    by_day: dict[str, list[dict]] = collections.defaultdict(list)
    summary = dict.fromkeys(("rows_read", "events", "duplicates", "quarantined", "outside_days", "already_published"), 0)
    reasons: collections.Counter = collections.Counter()
    elsewhere: collections.Counter = collections.Counter()
    days_seen, built_days = set(), set(needed)
    for stat in stats:
        if "elsewhere" in stat:
            elsewhere[stat["where"]] += stat["elsewhere"]
            continue
        day = dt_of_day_number(stat["day"])
        if "counted" in stat:
            summary["rows_read"] += stat["counted"]
            days_seen.add(day)
            if day not in built_days:
                summary["already_published" if first_day <= day <= dt else "outside_days"] += stat["counted"]
            continue
        by_day[day].append(stat)
        for name in ("events", "duplicates", "quarantined"):
            summary[name] += stat[name]
        reasons.update(stat.get("reasons", {}))
    # Of the rows of the days built now; and of all rows read, for a line without a readable day may belong to any of them.
    built = summary["events"] + summary["duplicates"] + summary["quarantined"]
    for where_refused, rows, what in ((_unexpected(reasons, definition), built, "rows of the days to build"),
                                      (_unexpected(reasons + elsewhere, definition), summary["rows_read"], "raw rows read")):
        if where_refused.total() > max_bad_share * rows:
            (where, count), *_ = where_refused.most_common(1)
            raise StageError(f"{where_refused.total():,} of {rows:,} {what} ({where_refused.total() / rows:.2%}) were refused, more than {max_bad_share:.2%}; "
                             f"most often {where} ({count:,} rows)", "mend the raw file and run again; where such rows are ordinary, set the bound raw.max_refused_share with a reason "
                             "in the section quality of the definition, or name their reason in logs.expected_refusals")
    if cut := [where for where in reasons if where.rpartition(": ")[2] in BREAKS]:
        # One refused row stands for everything behind the break: no share of refused rows can tell how much is missing.
        raise StageError(f"an archive in {raw.uri} is damaged: {', '.join(sorted(cut))}", "deliver the file again")
    if not any(stat["events"] for stat in by_day[dt]):
        span = f"{min(days_seen)} .. {max(days_seen)}" if days_seen else "no day at all"
        raise StageError(f"no row for dt={dt} in {raw.uri}: the files that may hold it ({', '.join(f.name for f in files)}) hold {span}", "choose a DT in that span, or deliver the day's file")
    refused = reasons + elsewhere
    for where, count in refused.most_common(5):
        log(f"refused: {where} ({count:,} rows)")
    if len(refused) > 5:
        log(f"refused: {len(refused) - 5} more kinds; the table quarantine has every row with its value")
    return by_day, summary


def _write_manifests(store: TableStore, definition: DatasetDefinition, raw: RawLocation, work: Try, files: list[RawFile], by_day: dict[str, list[dict]],
                     needed: list[str], settings: dict[str, dict]) -> None:
    version, inputs = code_version(), {file.name: _file_digest(raw, file) for file in files}
    fingerprint = schema_fingerprint(events_schema(definition))
    for day in needed:
        counts = {name: sum(s[name] for s in by_day[day]) for name in ("rows_read", "events", "duplicates", "quarantined", "users")}
        tables = [("events", fingerprint, "events_file")]
        # A day without refused rows has no quarantine, unless one that was published has to be emptied.
        if counts["quarantined"] or store.manifest("quarantine", day) is not None:
            tables.insert(0, ("quarantine", schema_fingerprint(QUARANTINE), "quarantine_file"))
        for table, schema, key in tables:
            found = tuple(sorted((DataFile(**s[key]) for s in by_day[day] if key in s), key=lambda f: f.bucket))
            store.write_staged_manifest(work, Manifest(store.dataset, table, day, work.attempt, schema, version, found, counts, inputs, settings[day]))


def _unexpected(reasons: collections.Counter, definition: DatasetDefinition) -> collections.Counter:
    expected = tuple(f": {code}" for code in definition.logs.expected_refusals)
    return collections.Counter({where: count for where, count in reasons.items() if not where.endswith(expected)}) if expected else reasons


def _event_rows(chunk: Chunk, definition: DatasetDefinition, needed: frozenset[int], buckets: int, schema: pa.Schema) -> pa.Table:
    day = chunk.time_ms // MS_PER_DAY
    kept = np.isin(day, np.fromiter(needed, np.int64, len(needed)))
    rows, day, time_ms, row_hash = chunk.rows.filter(pa.array(kept)), day[kept], chunk.time_ms[kept], chunk.row_hash[kept]
    events = definition.events
    feedback = np.zeros(rows.num_rows, dtype=np.int16)
    for bit, condition in enumerate(events.signals.values()):
        feedback |= (_holds(rows[condition.column], condition).astype(np.int16) << bit).astype(np.int16)
    user = hashed_ids(rows[events.user])
    zeros = np.zeros(rows.num_rows, np.int64)
    columns = {
        "kind": np.full(len(day), EVENT, np.int8), "day": day.astype(np.int32), "bucket": bucket_of(user, buckets), "row_hash": row_hash, "user_id": user,
        "item_id": hashed_ids(rows[events.item]), "event_time_ms": time_ms, "feedback": feedback,
        "watch_time_ms": _watch_time_ms(rows, events), "duration_ms": _milliseconds(rows, events.duration),
        "context": np.clip(rows[events.context].fill_null(-1).to_numpy(), -1, 32_767).astype(np.int16) if events.context else zeros.astype(np.int16) - 1,
        "is_random": rows[events.is_random].fill_null(0).to_numpy() == 1 if events.is_random else zeros.astype(bool),
        **{name: _field_values(rows[rule.column], rule) for name, rule in events.item_fields.items()},
    }  # fmt: skip
    return _parsed(columns, len(day), schema)


def _holds(values: pa.ChunkedArray, condition) -> np.ndarray:
    """Return which values meet a condition; an empty one does not."""
    met = pc.is_valid(values)
    if condition.equals is not None:
        wanted = condition.equals if isinstance(condition.equals, tuple) else (condition.equals,)
        text = pa.types.is_string(values.type)
        met = pc.and_(met, pc.is_in(values, value_set=pa.array([str(w) if text else w for w in wanted], values.type)))
    for limit, compare, whole in ((condition.above, pc.greater, math.floor), (condition.at_least, pc.greater_equal, math.ceil),
                                  (condition.below, pc.less, math.ceil), (condition.at_most, pc.less_equal, math.floor)):
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
    return values if factor == 1 and values.dtype == np.int64 else np.rint(values.astype(np.float64) * factor).clip(-(2**53), 2**53).astype(np.int64)


def _field_values(values: pa.ChunkedArray, rule: FieldRule) -> pa.ChunkedArray:
    kind = event_field_type(rule.kind)
    if pa.types.is_floating(values.type) and pa.types.is_string(kind):
        # Codes that a column with gaps turned into fractions: "2661.0" is the code 2661.
        whole = pc.equal(pc.floor(values), values)
        return pc.if_else(whole, pc.if_else(whole, values, 0.0).cast(pa.int64(), safe=False).cast(pa.string()), values.cast(pa.string()))
    if pa.types.is_string(values.type):
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
    return values.cast(kind)


def _filed(refused: Refused, file: RawFile, fallback_dt: str) -> int:
    # A break of an archive is filed under dt, which is always built: filed under a day that is not, it would go unseen.
    return day_number(fallback_dt) if refused.reason.partition(":")[0] in BREAKS else day_of(refused, file, fallback_dt)


def _refused_rows(refused: list[tuple[int, Refused]], file: RawFile, needed: frozenset[int], schema: pa.Schema) -> pa.Table:
    kept = [(day, r) for day, r in refused if day in needed]
    return _parsed({"kind": [REFUSED] * len(kept), "day": [day for day, _ in kept], "bucket": [0] * len(kept), "source_file": [file.name] * len(kept),
                    "row_number": [r.row_number for _, r in kept], "reason": [r.reason for _, r in kept],
                    "raw_text": [r.raw_text.decode("utf-8", "backslashreplace").replace("\x00", "\\x00") for _, r in kept]}, len(kept), schema)


def _elsewhere_rows(refused: list[tuple[int, Refused]], file: RawFile, needed: frozenset[int], schema: pa.Schema) -> pa.Table:
    codes = collections.Counter(r.reason.split(":")[0] for day, r in refused if day not in needed)
    return _parsed({"kind": [ELSEWHERE] * len(codes), "day": [-1] * len(codes), "bucket": [-1] * len(codes), "source_file": [file.name] * len(codes),
                    "reason": list(codes), "row_number": list(codes.values())}, len(codes), schema)


def _count_rows(days: np.ndarray, schema: pa.Schema) -> pa.Table:
    numbers, counts = np.unique(days, return_counts=True)
    return _parsed({"kind": [COUNTED] * len(numbers), "day": numbers.astype(np.int32), "bucket": [-1] * len(numbers), "row_number": counts}, len(numbers), schema)


def _parsed(columns: dict, rows: int, schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(columns[f.name], f.type) if f.name in columns and not isinstance(columns[f.name], pa.ChunkedArray)
                     else columns.get(f.name, pa.nulls(rows, f.type)) for f in schema], schema=schema)


def _buckets(published: dict[str, Manifest], files: list[RawFile]) -> int:
    """Return the buckets of the latest published day, else a power of two by the raw bytes."""
    for day in sorted(published, reverse=True):
        if published[day].rows:
            return int(published[day].settings["buckets"])
    wanted = -(-sum(_raw_bytes(file) for file in files) // BUCKET_BYTES)
    return min(1 << max(0, wanted - 1).bit_length(), MAX_BUCKETS)


def _raw_bytes(file: RawFile) -> int:
    return file.size * (GZIP_RATIO if promised_compression(file.name) or file.name.endswith(".parquet") else 1)


def _is_there(manifest: Manifest | None, listing: str, settings: dict) -> bool:
    """Whether a published day can be used as it is: same raw place, buckets and definition, and no file added or delivered again since.

    A day of which a file is gone stays as it is, unless it is empty: built again, it would hold less.
    """
    if manifest is None or any(manifest.settings.get(name) != value for name, value in settings.items()):
        return False
    before = str(manifest.settings.get("listing"))
    gone = {_file_name(line) for line in before.splitlines()} - {_file_name(line) for line in listing.splitlines()}
    return before == listing or (manifest.rows > 0 and bool(gone))


def _listing(files: list[RawFile], day: str) -> str:
    """Return name, size and time of change of every file that may hold a day, one a line."""
    return "\n".join(f"{f.name} {f.size} {f.modified_ns}" for f in files if f.may_hold(day))


def _file_name(line: str) -> str:
    return line.rsplit(" ", 2)[0]


def _file_digest(raw: RawLocation, file: RawFile) -> str:
    if file.size > HASHED_BYTES:
        return f"size:{file.size}"
    return f"sha256:{sha256_of(raw.fs, file.path)}"


def _spark_schema(schema: pa.Schema):
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)


if __name__ == "__main__":
    run_stage(main)

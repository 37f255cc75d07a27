"""Build `events` and `quarantine` of a day from raw logs, and of every earlier day of the lookback that is not there yet.

A day is a function of the raw rows whose event time (UTC) lies in it, of nothing else: days built together, apart, in any
order or twice have the same bytes. Every raw row read is counted as an event, a duplicate, quarantined, or outside.

A published day whose raw files are gone is never built again; `etl.ingest.freshness` decides. A file whose name promises no days is
read once for all the days that it holds: those that nobody has asked for yet wait in the staging of the attempt AHEAD, which
no gate publishes, until a partition needs them.
"""

from __future__ import annotations

import collections
import datetime as dtm
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.datasets.definition import MILLISECONDS, DatasetDefinition, Events, FieldRule, Span
from etl.datasets.rows_digest import rows_digest
from etl.ingest.compression import BREAKS, promised_compression
from etl.ingest.freshness import Action, Published, Verdict, judged
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
    promised,
)
from etl.stage.commands import log
from etl.stage.errors import StageError, TryAgainError
from etl.stage.spark import spark_session
from etl.warehouse.buckets import MAX_BUCKETS, Layout
from etl.warehouse.partitions import MS_PER_DAY, add_days, day_number, days_between, dt_of_day_number
from etl.warehouse.schemas import EVENTS, QUARANTINE, event_field_type, schema_fingerprint, table_schema
from etl.warehouse.store import DataFile, Manifest, TableStore, Try, code_version, sha256_of

EVENT, REFUSED, COUNTED, ELSEWHERE = 0, 1, 2, 3  # ELSEWHERE: refused lines that are filed under days not built now
CLOCK_CHANGES = {"repeated_times": REPEATED, "missing_times": MISSING}  # counts of a day
BYTES_PER_TASK = 128 << 20
BUCKET_BYTES = 128 << 20  # raw bytes of the lookback that one bucket holds: what one task of the sequences job reads
GROWTH = 4  # new days get more buckets than the published ones when the lookback asks for so many times their number
AHEAD = "ahead"  # the attempt under which days wait that no partition has asked for yet
AHEAD_DAYS = 400  # at most so many of them at a time
GZIP_RATIO = 5  # raw bytes in a byte of an archive, roughly
HASHED_BYTES = 512 << 20  # larger raw files are identified by name and size


def build_events(store: TableStore, definition: DatasetDefinition, raw: RawLocation, dt: str, attempt: str, lookback_days: int, buckets: int | None,
                 max_bad_share: float, raw_gate: Callable[[bool], object] = lambda wait: None, accept_loss: Collection[str] = ()) -> dict[str, int]:
    """Stage all missing days and `dt` itself; return the reconciliation of the rows that were read.

    Args:
        raw_gate: raises when the files must not be used; asked before the files are read, when it may have no answer yet, and,
            told to wait for one, before anything counts as staged.
        buckets: user buckets of a day; None takes those of the published days, else sizes them by the raw bytes.
        accept_loss: days that may be built from less than what is published was built from.

    Raises:
        StageError: files or columns are missing, a day cannot be built again without loss, too many rows are refused, or `dt` has no row.
    """
    files = raw.logs(definition)
    for note in raw.notes([file for file in files if file.may_hold(dt)], definition):
        log(f"note: {note}")
    lookback = days_between(add_days(dt, 1 - lookback_days), dt)
    if strangers := sorted(set(accept_loss) - set(lookback)):
        raise StageError(f"--accept-loss names {strangers[0]}, which is no day of the lookback {lookback[0]} .. {dt}", "name days that this partition reads")
    found = store.published(("quarantine", "events"), lookback)
    work = store.begin_try(attempt, ("quarantine", "events"), lookback, dt, found)
    published = {day: manifest for day in lookback if (manifest := found.get(("events", day))) is not None}
    layout = Layout(buckets or _buckets(published, files, definition, lookback))
    judge = Judge(definition, raw, files)
    verdicts = [judge(day, published.get(day), wanted=day == dt, accept_loss=day in accept_loss) for day in lookback]
    _tell(verdicts, raw)
    needed = [verdict.dt for verdict in verdicts if verdict.action is Action.BUILD]
    if definition.logs.days_in_name and (undated := [file.name for file in files if file.first_utc_dt is None]):
        log(f"note: logs.days_in_name finds no days in {len(undated)} name(s), such as {undated[0]}: they are opened for every day")
    if not any(file.may_hold(dt) for file in files):
        raise StageError(f"no log file in {raw.uri} covers dt={dt}: their names promise {promised(files)}", "deliver that day's file, or choose another DT")
    there = store.staged_partitions(AHEAD, "events")
    waiting = {day for day, staged in there.items() if store.manifest("events", day) is None and _is_made(staged.manifest, judge, layout)}
    if there and not waiting:
        store.drop_staging(AHEAD)
    # A whole file is not read for a day of it that is there.
    made = dt not in accept_loss and any(file.first_utc_dt is None for file in files if file.may_hold(dt)) and _is_made(published.get(dt), judge, layout)
    taken = [day for day in needed if (day in waiting or (day == dt and made)) and _take(store, work, day, day in waiting, empty=day != dt)]
    to_build = [day for day in needed if day not in taken]
    relevant = [file for file in files if any(file.may_hold(day) for day in to_build)]
    ahead = _days_ahead(store, definition, lookback, waiting) if any(file.first_utc_dt is None for file in relevant) else []
    ahead = [day for day in ahead if all(file in relevant for file in files if file.may_hold(day))]
    later = store.begin_try(AHEAD, ("quarantine", "events"), ahead) if ahead else None
    log(f"building {len(to_build)} day(s){f' {to_build[0]} .. {to_build[-1]}' if to_build else ''} in {layout.buckets} bucket(s) from {len(relevant)} file(s), "
        f"{sum(f.size for f in relevant):,} bytes{f'; taking {len(taken)} day(s) that were built before' if taken else ''}")
    if to_build:
        spark = spark_session(attempt)
        try:
            raw_gate(False)
            stats = _run(spark, store, definition, raw, relevant, to_build, dt, work, later, layout)
        finally:
            spark.stop()
    else:
        stats = []
    by_day, summary = _reconciled(definition, raw, dt, to_build, ahead, relevant, lookback[0], max_bad_share, stats)
    _tell_losses(verdicts, by_day, {day: published[day].rows for day in accept_loss if day in published and day in to_build})
    raw_gate(True)
    settings = {"raw": raw.uri, "definition": judge.digest, "signals": ",".join(definition.feedback_fields), **layout.settings()}
    _write_manifests(store, definition, judge, by_day, [*((work, day, {**settings, "accepted_loss": "yes"} if day in accept_loss else settings) for day in to_build),
                                                        *((later, day, settings) for day in ahead if later)])
    return summary


class Judge:
    """Judges the days of one data set by the raw files that are there now.

    Attributes:
        digest: `rows_digest` of the definition.
        files: the raw files.
    """

    def __init__(self, definition: DatasetDefinition, raw: RawLocation, files: list[RawFile]) -> None:
        self.digest, self.raw, self.files = rows_digest(definition), raw, files
        self._digests: dict[str, str] = {}

    def __call__(self, dt: str, manifest: Manifest | None, wanted: bool = False, accept_loss: bool = False) -> Verdict:
        """Return what is to be done with a day of which `manifest` is published."""
        published = None if manifest is None else Published.of(manifest)
        return judged(dt, published, self.files, self.digest, self.file_digest, wanted=wanted, accept_loss=accept_loss)

    def file_digest(self, file: RawFile) -> str:
        """Return the digest of a file as manifests have it; large files are known by their size alone.

        Raises:
            TryAgainError: it is no longer the file that was listed.
        """
        if file.name not in self._digests:
            self._digests[file.name] = f"size:{file.size}" if file.size > HASHED_BYTES else f"sha256:{sha256_of(self.raw.fs, file.path)}"
            now = self.raw.fs.get_file_info(file.path)
            if (now.size, now.mtime_ns or 0) != (file.size, file.modified_ns):
                raise TryAgainError(f"{file.name} in {self.raw.uri} changed while it was read", "run again once it has been delivered whole")
        return self._digests[file.name]


def _tell(verdicts: list[Verdict], raw: RawLocation) -> None:
    """Log what is remarkable about the days of the lookback.

    Raises:
        StageError: days would have to be built again, and cannot be.
    """
    for verdict in verdicts:
        if verdict.action is Action.KEEP:
            log(f"warning: dt={verdict.dt}: {verdict.reason}; it stays as it is published")
    if archived := [v for v in verdicts if v.action is Action.FRESH and v.reason != "unchanged"]:
        log(f"{len(archived)} published day(s) {archived[0].dt} .. {archived[-1].dt} stay as they are: {archived[0].reason}")
    if stopped := [v for v in verdicts if v.action is Action.STOP]:
        days = "".join(f"\n  dt={v.dt}: {v.reason}" for v in stopped)
        adopt = ("or keep the published rows of days whose definition changed: python -m etl.jobs.rebucket --adopt-definition (docs/operations.md); "
                 if any("definition" in v.reason for v in stopped) else "")  # fmt: skip
        raise StageError(f"{len(stopped)} published day(s) would have to be built again, but from less than they were built from:{days}",
                         f"bring the files back to {raw.uri}; {adopt}or build them from what is left, which loses rows: --accept-loss DAY")


def _tell_losses(verdicts: Sequence[Verdict], by_day: dict[str, list[dict]], accepted: dict[str, int]) -> None:
    """Log what is not published: rows of days that stay as they are, and rows whose loss was accepted.

    Args:
        accepted: day -> events that are published of it.
    """
    for dt in (v.dt for v in verdicts if v.action is Action.KEEP):
        if rows := sum(stat.get("counted", 0) for stat in by_day.get(dt, [])):
            log(f"warning: dt={dt}: {rows:,} raw rows of it were read and are not published anew: the day can no longer be rebuilt whole")
    for dt, before in accepted.items():
        log(f"warning: dt={dt}: {before:,} published events become {sum(stat.get('events', 0) for stat in by_day.get(dt, [])):,}: the loss was accepted")


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


def parse_split(raw: RawLocation, split: Split, definition: DatasetDefinition, needed: frozenset[int], fallback_dt: str, layout: Layout) -> Iterator[pa.Table]:
    """Yield tables with the parsed schema: the needed days' events, their refused lines, and one row of counts a day."""
    schema = parsed_schema(definition)
    for chunk in raw.read(split, definition):
        yield _event_rows(chunk, definition, needed, layout, schema)
        refused = [(_filed(r, split.file, fallback_dt), r) for r in chunk.refused]
        yield _refused_rows(refused, split.file, needed, schema)
        yield _elsewhere_rows(refused, split.file, needed, schema)
        days = np.concatenate([chunk.time_ms // MS_PER_DAY, np.array([day for day, _ in refused], dtype=np.int64)])
        yield _count_rows(days, split.file, schema)
        for what, code in CLOCK_CHANGES.items():
            if (told := chunk.time_ms[chunk.clock == code] // MS_PER_DAY).size:
                yield _count_rows(told, split.file, schema, what)


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


def write_rows(rows: pa.Table, store: TableStore, definition: DatasetDefinition, work: Try, later: Try | None, layout: Layout) -> list[dict]:
    """Write what one task got of the parsed rows, every bucket of a day whole; return the figures for the manifests.

    Args:
        work, later: where the days of the lookback are staged, and those that wait.
    """
    buckets, waiting = layout.buckets, frozenset(later.days if later else ())
    counted = rows.filter(pc.equal(rows["kind"], COUNTED))
    results = [{"day": row["day"], "file": row["source_file"], row["reason"] or "counted": row["row_number"]}
               for row in counted.select(["day", "source_file", "reason", "row_number"]).to_pylist()]
    for row in rows.filter(pc.equal(rows["kind"], ELSEWHERE)).select(["source_file", "reason", "row_number"]).to_pylist():
        results.append({"elsewhere": row["row_number"], "where": f"{row['source_file']}: {row['reason']}"})
    rows = rows.filter(pc.less(rows["kind"], COUNTED))
    keys = rows["day"].to_numpy().astype(np.int64) * buckets + rows["bucket"].to_numpy()
    rows = rows.take(pa.array(np.argsort(keys, kind="stable")))
    distinct, counts = np.unique(keys, return_counts=True)
    for key, start, count in zip(distinct.tolist(), (np.cumsum(counts) - counts).tolist(), counts.tolist(), strict=True):
        day, bucket = divmod(key, buckets)
        staging = later if later and dt_of_day_number(day) in waiting else work
        results.append(write_day_bucket(rows.slice(start, count), store, definition, staging, day, bucket))
    return results


def _run(spark, store: TableStore, definition: DatasetDefinition, raw: RawLocation, files: list[RawFile], needed: list[str], dt: str, work: Try, later: Try | None,
         layout: Layout) -> list[dict]:
    context = spark.sparkContext

    def count_lines(ranges: list[tuple[RawFile, int, int]]) -> list[int]:
        return context.parallelize(ranges, len(ranges)).map(lambda r: RawLocation(raw_uri).count_newlines(*r)).collect()

    raw_uri, warehouse, dataset = raw.uri, store.warehouse, store.dataset
    splits = raw.splits(files, definition.logs, count_lines)
    days = frozenset(day_number(day) for day in [*needed, *(later.days if later else ())])
    schema = parsed_schema(definition)
    rows = spark.createDataFrame([(json.dumps(asdict(split)),) for split in splits], "split string").repartition(len(splits))

    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        location = RawLocation(raw_uri)
        for batch in batches:
            for text in batch.column(0).to_pylist():
                fields = json.loads(text)
                split = Split(**{**fields, "file": RawFile(**fields["file"]), "header": tuple(fields["header"])})
                for table in parse_split(location, split, definition, days, dt, layout):
                    yield from table.to_batches(max_chunksize=65_536)

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        results = write_rows(pa.Table.from_batches(batches, schema), TableStore(warehouse, dataset), definition, work, later, layout)
        yield pa.RecordBatch.from_pydict({"result": [json.dumps(r) for r in results]}, pa.schema([("result", pa.string())]))

    tasks = max(context.defaultParallelism, -(-sum(_raw_bytes(f) for f in files) // BYTES_PER_TASK))
    parsed = rows.mapInArrow(parse, _spark_schema(schema)).repartition(min(tasks, len(days) * layout.buckets), "day", "bucket")
    return [json.loads(row[0]) for row in parsed.mapInArrow(write, "result string").collect()]


def _reconciled(definition: DatasetDefinition, raw: RawLocation, dt: str, needed: list[str], ahead: list[str], files: list[RawFile], first_day: str, max_bad_share: float,
                stats: list[dict]) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """Return the figures of each day's buckets and files, and the summary of the run.

    Raises:
        StageError: too many rows are refused, an archive is damaged, or `dt` has no row.
    """
    by_day: dict[str, list[dict]] = collections.defaultdict(list)
    summary = dict.fromkeys(("rows_read", "events", "duplicates", "quarantined", "outside_days", "built_ahead", "already_published"), 0)
    reasons: collections.Counter = collections.Counter()
    elsewhere: collections.Counter = collections.Counter()
    clock: collections.Counter = collections.Counter()
    days_seen, built_days, days_ahead = set(), set(needed), set(ahead)
    for stat in stats:
        if "elsewhere" in stat:
            elsewhere[stat["where"]] += stat["elsewhere"]
            continue
        day = dt_of_day_number(stat["day"])
        if "counted" in stat:
            summary["rows_read"] += stat["counted"]
            days_seen.add(day)
            by_day[day].append(stat)
            if day not in built_days:
                summary["built_ahead" if day in days_ahead else "already_published" if first_day <= day <= dt else "outside_days"] += stat["counted"]
            continue
        by_day[day].append(stat)
        if "file" in stat:  # clock changes
            if day in built_days:
                clock.update({what: stat[what] for what in CLOCK_CHANGES if what in stat})
            continue
        if day in days_ahead:
            elsewhere.update(stat.get("reasons", {}))
            continue
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
    if dt in built_days and not any(stat.get("events") for stat in by_day[dt]):
        span = f"{min(days_seen)} .. {max(days_seen)}" if days_seen else "no day at all"
        raise StageError(f"no row for dt={dt} in {raw.uri}: the files that may hold it ({', '.join(f.name for f in files)}) hold {span}", "choose a DT in that span, or deliver the day's file")
    if clock:
        log(f"clock changes: {clock['repeated_times']:,} event(s) have a local time that occurs twice on the day and is read as its second pass, "
            f"{clock['missing_times']:,} one that does not occur and is read by the clock before the change")
    refused = reasons + elsewhere
    for where, count in refused.most_common(5):
        log(f"refused: {where} ({count:,} rows)")
    if len(refused) > 5:
        log(f"refused: {len(refused) - 5} more kinds; the table quarantine has every row with its value")
    return by_day, summary


def _write_manifests(store: TableStore, definition: DatasetDefinition, judge: Judge, by_day: dict[str, list[dict]],
                     days: Sequence[tuple[Try, str, dict]]) -> None:
    """Write the manifests of days, each with its settings and where it is staged."""
    version, fingerprint = code_version(), schema_fingerprint(events_schema(definition))
    for work, day, settings in days:
        buckets = [stat for stat in by_day[day] if "file" not in stat]
        rows: collections.Counter = collections.Counter()
        for stat in by_day[day]:
            if "counted" in stat:
                rows[stat["file"]] += stat["counted"]
        files = [file for file in judge.files if file.may_hold(day)]
        known = json.dumps({file.name: [file.size, file.modified_ns, rows[file.name]] for file in files}, sort_keys=True)
        inputs = {file.name: judge.file_digest(file) for file in files}
        counts = {name: sum(s[name] for s in buckets) for name in ("rows_read", "events", "duplicates", "quarantined", "users")}
        counts |= {what: sum(stat.get(what, 0) for stat in by_day[day]) for what in CLOCK_CHANGES}
        tables = [("events", fingerprint, "events_file")]
        # A day without refused rows has no quarantine, unless one that was published has to be emptied.
        if counts["quarantined"] or work.expected[f"quarantine/dt={day}"]:
            tables.insert(0, ("quarantine", schema_fingerprint(QUARANTINE), "quarantine_file"))
        for table, schema, key in tables:
            found = tuple(sorted((DataFile(**s[key]) for s in buckets if key in s), key=lambda f: f.bucket))
            store.write_staged_manifest(work, Manifest(store.dataset, table, day, work.attempt, schema, version, found, counts, inputs, {**settings, "raw_files": known}))


def _days_ahead(store: TableStore, definition: DatasetDefinition, lookback: list[str], waiting: set[str]) -> list[str]:
    """Return the days that partitions of the data set read and that are neither published, waiting nor of this lookback, the next ones first."""
    last = definition.last_day or dtm.datetime.now(dtm.UTC).date() - dtm.timedelta(days=1)
    there = {*store.days("events"), *waiting}
    first = add_days(definition.first_day.isoformat(), 1 - len(lookback))  # the lookback of the first day
    later, earlier = days_between(add_days(lookback[-1], 1), last.isoformat()), days_between(first, add_days(lookback[0], -1))
    return [day for day in [*later, *reversed(earlier)] if day not in there][:AHEAD_DAYS]


def _is_made(manifest: Manifest | None, judge: Judge, layout: Layout) -> bool:
    """Whether a day is what this code would build now, byte for byte."""
    return (manifest is not None and manifest.code_version == code_version() and Layout.of(manifest) == layout and "accepted_loss" not in manifest.settings
            and judge(manifest.dt, manifest).action is Action.FRESH)


def _take(store: TableStore, work: Try, day: str, waiting: bool, empty: bool) -> bool:
    """Stage a day that waits, or is published; False where its files are not what its manifests say, or it is empty and may not be."""
    found = [store.staged_manifest(AHEAD, table, day) if waiting else store.manifest(table, day) for table in ("quarantine", "events")]
    manifests = [manifest for manifest in found if manifest is not None]
    if not empty and not manifests[-1].rows:
        return False
    try:
        if any(sha256_of(store.fs, f"{store.root}/{file.path}") != file.digest for manifest in manifests for file in manifest.files):
            return False
    except OSError:
        return False
    for manifest in manifests:
        files = tuple(store.write_file(work, manifest.table, day, file.bucket, store.read_file(file)) for file in manifest.files)
        store.write_staged_manifest(work, replace(manifest, attempt=work.attempt, files=files))
    return True


def _unexpected(reasons: collections.Counter, definition: DatasetDefinition) -> collections.Counter:
    expected = tuple(f": {code}" for code in definition.logs.expected_refusals)
    return collections.Counter({where: count for where, count in reasons.items() if not where.endswith(expected)}) if expected else reasons


def _event_rows(chunk: Chunk, definition: DatasetDefinition, needed: frozenset[int], layout: Layout, schema: pa.Schema) -> pa.Table:
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
        "kind": np.full(len(day), EVENT, np.int8), "day": day.astype(np.int32), "bucket": layout.bucket_of(user), "row_hash": row_hash, "user_id": user,
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


def _count_rows(days: np.ndarray, file: RawFile, schema: pa.Schema, what: str | None = None) -> pa.Table:
    numbers, counts = np.unique(days, return_counts=True)
    return _parsed({"kind": [COUNTED] * len(numbers), "day": numbers.astype(np.int32), "bucket": [-1] * len(numbers), "source_file": [file.name] * len(numbers),
                    "reason": [what] * len(numbers), "row_number": counts}, len(numbers), schema)


def _parsed(columns: dict, rows: int, schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(columns[f.name], f.type) if f.name in columns and not isinstance(columns[f.name], pa.ChunkedArray)
                     else columns.get(f.name, pa.nulls(rows, f.type)) for f in schema], schema=schema)


def _buckets(published: dict[str, Manifest], files: list[RawFile], definition: DatasetDefinition, lookback: list[str]) -> int:
    """Return the buckets of new days: those of the latest published day, until a whole lookback asks for many more.

    A feed that begins with one day is sized by the lookback that it will have: so many days like its largest one.
    """
    span = len(lookback) if definition.last_day is None else max(len(lookback), (definition.last_day - definition.first_day).days + 1)
    undated = sum(_raw_bytes(file) for file in files if file.first_utc_dt is None or file.last_utc_dt is None) / span
    dated = [(file, _raw_bytes(file) / len(days_between(file.first_utc_dt, file.last_utc_dt))) for file in files if file.first_utc_dt and file.last_utc_dt]
    largest = max(sum(size for file, size in dated if file.may_hold(day)) for day in lookback)
    wanted = min(1 << max(0, math.ceil((undated + largest) * len(lookback) / BUCKET_BYTES) - 1).bit_length(), MAX_BUCKETS)
    current = next((Layout.of(published[day]).buckets for day in sorted(published, reverse=True) if published[day].rows), None)
    if current is None:
        return wanted
    if wanted < GROWTH * current:
        return current
    log(f"note: published days have {current} bucket(s), a lookback of the size of its largest day asks for {wanted}: new days get {wanted}; "
        "python -m etl.jobs.rebucket gives them to the others")
    return wanted


def _raw_bytes(file: RawFile) -> int:
    return file.size * (GZIP_RATIO if promised_compression(file.name) or file.name.endswith(".parquet") else 1)


def _spark_schema(schema: pa.Schema):
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)

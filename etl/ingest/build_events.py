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

import pyarrow as pa

from etl.datasets.definition import DatasetDefinition
from etl.datasets.rows_digest import rows_digest
from etl.ingest.compression import BREAKS, promised_compression
from etl.ingest.event_rows import CLOCK_CHANGES, events_schema, parse_split, parsed_schema, write_rows
from etl.ingest.freshness import Action, Published, Verdict, judged
from etl.ingest.raw import (
    RawFile,
    RawLocation,
    Split,
    promised,
)
from etl.stage.commands import log
from etl.stage.errors import StageError, TryAgainError
from etl.stage.spark import spark_session
from etl.warehouse.buckets import MAX_BUCKETS, Layout
from etl.warehouse.partitions import add_days, day_number, days_between, dt_of_day_number
from etl.warehouse.schemas import QUARANTINE, schema_fingerprint
from etl.warehouse.store import DataFile, Manifest, TableStore, Try, code_version, sha256_of

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

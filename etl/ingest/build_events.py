"""Build `events` and `quarantine` of a day from raw logs, and of every earlier day of the lookback that is not there
yet.

A day is a function of the raw rows whose event time (UTC) lies in it, of nothing else: days built together, apart, in
any order or twice have the same bytes. Every raw row read is counted as an event, a duplicate, quarantined, or outside.

A published day whose raw files are gone is never built again; `etl.ingest.freshness` decides. A file whose name
promises no days is read once for all the days that it holds: those that nobody has asked for yet wait in the staging of
the attempt AHEAD, which no gate publishes, until a partition needs them.
"""

from __future__ import annotations

import collections
import datetime as dtm
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from etl.datasets.definition import DatasetDefinition
from etl.datasets.rows_digest import rows_digest
from etl.ingest.compression import promised_compression
from etl.ingest.event_rows import CLOCK_CHANGES, events_schema, parse_split, parsed_schema, write_rows
from etl.ingest.freshness import Action, Published, Verdict, judged
from etl.ingest.raw import RawFile, RawLocation, Split, promised
from etl.ingest.reconciliation import Tally, check_refusals, log_tally, require_rows
from etl.stage.commands import log
from etl.stage.errors import StageError, TryAgainError
from etl.stage.spark import spark_session
from etl.warehouse.buckets import MAX_BUCKETS, Layout
from etl.warehouse.partitions import add_days, day_number, days_between
from etl.warehouse.schemas import QUARANTINE, schema_fingerprint
from etl.warehouse.store import DataFile, Manifest, TableStore, Try, code_version, sha256_of

TABLES = ("quarantine", "events")  # in the order of publication: who sees a day's events finds its refused lines
BYTES_PER_TASK = 128 << 20
BUCKET_BYTES = 128 << 20  # raw bytes of the lookback that one bucket holds: what one task of the sequences job reads
GROWTH = 4  # new days get more buckets than the published ones when the lookback asks for so many times their number
AHEAD = "ahead"  # the attempt under which days wait that no partition has asked for yet
AHEAD_DAYS = 400  # at most so many of them at a time
GZIP_RATIO = 5  # raw bytes in a byte of an archive, roughly
HASHED_BYTES = 512 << 20  # larger raw files are identified by name and size


@dataclass(frozen=True)
class Build:
    """What is asked of one run of the job.

    Attributes:
        dt: the partition: this day is built whether it is fresh or not.
        attempt: the name under which days are staged.
        lookback_days: days, `dt` included, that must be there afterwards.
        buckets: user buckets of a day; None takes those of the published days, else sizes them by the raw bytes.
        max_bad_share: the run stops when a larger share of the rows is refused, in [0, 1].
        accept_loss: days that may be built from less than what is published was built from.
    """

    dt: str
    attempt: str
    lookback_days: int
    buckets: int | None
    max_bad_share: float
    accept_loss: Collection[str] = ()

    def lookback(self) -> list[str]:
        """Return the days that must be there afterwards, `dt` last.

        Raises:
            StageError: the loss of another day is accepted.
        """
        days = days_between(add_days(self.dt, 1 - self.lookback_days), self.dt)
        if strangers := sorted(set(self.accept_loss) - set(days)):
            raise StageError(
                f"--accept-loss names {strangers[0]}, which is no day of the lookback {days[0]} .. {self.dt}",
                "name days that this partition reads",
            )
        return days


@dataclass(frozen=True)
class Plan:
    """What a run reads and writes.

    Attributes:
        dt, first_day: the partition, and the first day of its lookback.
        days: days of the lookback that are built.
        files: the raw files that may hold one of them.
        staging: where they are staged.
        later: where the days are staged that are built ahead, all of its `days`; None: no day is.
        layout: how days are cut.
    """

    dt: str
    first_day: str
    days: list[str]
    files: list[RawFile]
    staging: Try
    later: Try | None
    layout: Layout

    @property
    def ahead(self) -> tuple[str, ...]:
        """Days that are built ahead."""
        return self.later.days if self.later else ()


def build_events(
    store: TableStore,
    definition: DatasetDefinition,
    raw: RawLocation,
    build: Build,
    raw_gate: Callable[[bool], object] = lambda wait: None,
) -> dict[str, int]:
    """Stage all missing days and the partition itself; return the reconciliation of the rows that were read.

    Args:
        raw_gate: raises when the files must not be used; asked before the files are read, when it may have no answer
            yet, and, asked to wait for one, before anything counts as staged.

    Raises:
        StageError: files or columns are missing, a day cannot be built again without loss, too many rows are refused,
            or the partition has no row.
    """
    files = raw.logs(definition)
    for note in raw.notes([file for file in files if file.may_hold(build.dt)], definition):
        log(f"note: {note}")
    lookback = build.lookback()
    found = store.published(TABLES, lookback)
    staging = store.begin_try(build.attempt, TABLES, lookback, build.dt, found)
    published = {day: manifest for day in lookback if (manifest := found.get(("events", day))) is not None}
    layout = Layout(build.buckets or _buckets(published, files, definition, lookback))
    judge = Judge(definition, raw, files)
    verdicts = [
        judge(day, published.get(day), wanted=day == build.dt, accept_loss=day in build.accept_loss) for day in lookback
    ]
    _tell(verdicts, raw)
    _require_files(definition, raw, files, build.dt)
    needed = [verdict.dt for verdict in verdicts if verdict.action is Action.BUILD]
    waiting = _waiting(store, judge, layout)
    is_made = build.dt not in build.accept_loss and _is_whole_file_made(
        judge, published.get(build.dt), build.dt, layout
    )
    taken = _taken(store, staging, needed, waiting, is_made)
    plan = _planned(store, definition, files, staging, [day for day in needed if day not in taken], waiting, layout)
    _log_plan(plan, taken)
    stats = []
    if plan.days:
        spark = spark_session(build.attempt)
        try:
            raw_gate(False)
            stats = _run(spark, store, definition, raw, plan)
        finally:
            spark.stop()
    tally = Tally.of(stats, plan.dt, plan.first_day, plan.days, plan.ahead)
    check_refusals(tally, definition, raw.uri, build.max_bad_share)
    if build.dt in plan.days:
        require_rows(tally, raw.uri, build.dt, [file.name for file in plan.files])
    log_tally(tally)
    losses = {day: published[day].rows for day in build.accept_loss if day in published and day in plan.days}
    _tell_losses(verdicts, tally.by_day, losses)
    raw_gate(True)
    _write_manifests(store, definition, judge, plan, tally.by_day, build.accept_loss)
    return tally.summary


class Judge:
    """Judges the days of one data set by the raw files that are there now.

    Attributes:
        digest: `rows_digest` of the definition.
        raw, files: the raw location, and the log files in it.
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
            self._digests[file.name] = (
                f"size:{file.size}" if file.size > HASHED_BYTES else f"sha256:{sha256_of(self.raw.fs, file.path)}"
            )
            now = self.raw.fs.get_file_info(file.path)
            if (now.size, now.mtime_ns or 0) != (file.size, file.modified_ns):
                raise TryAgainError(
                    f"{file.name} in {self.raw.uri} changed while it was read",
                    "run again once it has been delivered whole",
                )
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
        log(
            f"{len(archived)} published day(s) {archived[0].dt} .. {archived[-1].dt} stay as they are:"
            f" {archived[0].reason}"
        )
    if stopped := [v for v in verdicts if v.action is Action.STOP]:
        days = "".join(f"\n  dt={v.dt}: {v.reason}" for v in stopped)
        adopt = (
            "or keep the published rows of days whose definition changed: python -m etl.jobs.rebucket"
            " --adopt-definition (docs/operations.md); "
            if any("definition" in v.reason for v in stopped)
            else ""
        )
        raise StageError(
            f"{len(stopped)} published day(s) would have to be built again, but from less than they were built"
            f" from:{days}",
            f"bring the files back to {raw.uri}; {adopt}or build them from what is left, which loses rows:"
            " --accept-loss DAY",
        )


def _tell_losses(verdicts: Sequence[Verdict], by_day: Mapping[str, list[dict]], accepted: dict[str, int]) -> None:
    """Log what is not published: rows of days that stay as they are, and rows whose loss was accepted.

    Args:
        accepted: day -> events that are published of it.
    """
    for dt in (v.dt for v in verdicts if v.action is Action.KEEP):
        if rows := sum(stat.get("counted", 0) for stat in by_day.get(dt, [])):
            log(
                f"warning: dt={dt}: {rows:,} raw rows of it were read and are not published anew: the day can no longer"
                " be rebuilt whole"
            )
    for dt, before in accepted.items():
        log(
            f"warning: dt={dt}: {before:,} published events become"
            f" {sum(stat.get('events', 0) for stat in by_day.get(dt, [])):,}: the loss was accepted"
        )


def _require_files(definition: DatasetDefinition, raw: RawLocation, files: list[RawFile], dt: str) -> None:
    """Stop where no file may hold the partition.

    Raises:
        StageError: it says which days the names of the files promise.
    """
    undated = [file.name for file in files if file.first_utc_dt is None]
    if definition.logs.days_in_name and undated:
        log(
            f"note: logs.days_in_name finds no days in {len(undated)} name(s), such as {undated[0]}: they are opened"
            " for every day"
        )
    if not any(file.may_hold(dt) for file in files):
        raise StageError(
            f"no log file in {raw.uri} covers dt={dt}: their names promise {promised(files)}",
            "deliver that day's file, or choose another DT",
        )


def _waiting(store: TableStore, judge: Judge, layout: Layout) -> set[str]:
    """Return the days that were built ahead and are what this code would build now; where there are none, clear up."""
    there = store.staged_partitions(AHEAD, "events")
    waiting = {
        day
        for day, staged in there.items()
        if store.manifest("events", day) is None and _is_made(staged.manifest, judge, layout)
    }
    if there and not waiting:
        store.drop_staging(AHEAD)
    return waiting


def _is_whole_file_made(judge: Judge, published: Manifest | None, dt: str, layout: Layout) -> bool:
    """Whether `dt` is there as it would be built now, and lies in a file that is read whole.

    Not worth it for a day that is there.
    """
    undated = any(file.first_utc_dt is None for file in judge.files if file.may_hold(dt))
    return undated and _is_made(published, judge, layout)


def _taken(
    store: TableStore, staging: Try, needed: Sequence[str], waiting: Collection[str], is_made: bool
) -> list[str]:
    """Stage those of the needed days that were built before; return them.

    Args:
        needed: days to stage, the partition last if it is among them.
        is_made: the partition is published as it would be built now.
    """
    dt = staging.days[-1]
    return [
        day
        for day in needed
        if (day in waiting or (day == dt and is_made)) and _take(store, staging, day, day in waiting, empty=day != dt)
    ]


def _planned(
    store: TableStore,
    definition: DatasetDefinition,
    files: Sequence[RawFile],
    staging: Try,
    days: list[str],
    waiting: set[str],
    layout: Layout,
) -> Plan:
    """Return how the days that are left are built; the days that are built ahead with them begin a try of their own."""
    lookback = list(staging.days)
    relevant = [file for file in files if any(file.may_hold(day) for day in days)]
    # A file that names no days costs the same whether one day of it is wanted or all: read it once for every day that
    # will be asked for. A day counts only where all of its files are read now, for else it would lack rows.
    ahead: list[str] = []
    if any(file.first_utc_dt is None for file in relevant):
        ahead = _days_ahead(store, definition, lookback, waiting)
        ahead = [day for day in ahead if all(file in relevant for file in files if file.may_hold(day))]
    later = store.begin_try(AHEAD, TABLES, ahead) if ahead else None
    return Plan(lookback[-1], lookback[0], days, relevant, staging, later, layout)


def _log_plan(plan: Plan, taken: Sequence[str]) -> None:
    span = f" {plan.days[0]} .. {plan.days[-1]}" if plan.days else ""
    before = f"; taking {len(taken)} day(s) that were built before" if taken else ""
    log(
        f"building {len(plan.days)} day(s){span} in {plan.layout.buckets} bucket(s) from {len(plan.files)} file(s), "
        f"{sum(file.size for file in plan.files):,} bytes{before}"
    )


def _run(spark, store: TableStore, definition: DatasetDefinition, raw: RawLocation, plan: Plan) -> list[dict]:
    """Read, parse and write the days of the plan in tasks of Spark; return the figures of all tasks."""
    context = spark.sparkContext

    def count_lines(ranges: list[tuple[RawFile, int, int]]) -> list[int]:
        return context.parallelize(ranges, len(ranges)).map(lambda r: RawLocation(raw_uri).count_newlines(*r)).collect()

    # The tasks get what they need and no more: neither a file system nor a list of thousands of files is sent to them.
    raw_uri, warehouse, dataset = raw.uri, store.warehouse, store.dataset
    dt, staging, later, layout = plan.dt, plan.staging, plan.later, plan.layout
    splits = raw.splits(plan.files, definition.logs, count_lines)
    days = frozenset(day_number(day) for day in [*plan.days, *plan.ahead])
    schema = parsed_schema(definition)
    rows = spark.createDataFrame([(json.dumps(asdict(split)),) for split in splits], "split string").repartition(
        len(splits)
    )

    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        location = RawLocation(raw_uri)
        for batch in batches:
            for text in batch.column(0).to_pylist():
                fields = json.loads(text)
                split = Split(**{**fields, "file": RawFile(**fields["file"]), "header": tuple(fields["header"])})
                for table in parse_split(location, split, definition, days, dt, layout):
                    yield from table.to_batches(max_chunksize=65_536)

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        results = write_rows(
            pa.Table.from_batches(batches, schema), TableStore(warehouse, dataset), definition, staging, later, layout
        )
        yield pa.RecordBatch.from_pydict(
            {"result": [json.dumps(r) for r in results]}, pa.schema([("result", pa.string())])
        )

    tasks = max(context.defaultParallelism, -(-sum(_raw_bytes(f) for f in plan.files) // BYTES_PER_TASK))
    # By day and bucket: a task gets every bucket of a day whole, so that it alone sorts and writes its file.
    parsed = rows.mapInArrow(parse, _spark_schema(schema)).repartition(
        min(tasks, len(days) * layout.buckets), "day", "bucket"
    )
    return [json.loads(row[0]) for row in parsed.mapInArrow(write, "result string").collect()]


def _write_manifests(
    store: TableStore,
    definition: DatasetDefinition,
    judge: Judge,
    plan: Plan,
    by_day: Mapping[str, list[dict]],
    accept_loss: Collection[str],
) -> None:
    """Write the manifests of the days that were built, for the lookback and ahead."""
    version, fingerprint = code_version(), schema_fingerprint(events_schema(definition))
    settings = {
        "raw": judge.raw.uri,
        "definition": judge.digest,
        "signals": ",".join(definition.feedback_fields),
        **plan.layout.settings(),
    }
    staged = [(plan.staging, day) for day in plan.days]
    staged += [(plan.later, day) for day in plan.ahead if plan.later]
    for work, day in staged:
        stats = by_day.get(day, [])
        buckets = [stat for stat in stats if "file" not in stat]
        counts = {
            name: sum(s[name] for s in buckets)
            for name in ("rows_read", "events", "duplicates", "quarantined", "users")
        }
        counts |= {what: sum(stat.get(what, 0) for stat in stats) for what in CLOCK_CHANGES}
        files = [file for file in judge.files if file.may_hold(day)]
        inputs = {file.name: judge.file_digest(file) for file in files}
        of_day = {**settings, "raw_files": _known_files(files, stats)}
        if work is plan.staging and day in accept_loss:
            of_day["accepted_loss"] = "yes"
        tables = [("events", fingerprint, "events_file")]
        # A day without refused rows has no quarantine, unless one that was published has to be emptied.
        if counts["quarantined"] or work.expected[f"quarantine/dt={day}"]:
            tables.insert(0, ("quarantine", schema_fingerprint(QUARANTINE), "quarantine_file"))
        for table, schema, key in tables:
            found = tuple(sorted((DataFile(**s[key]) for s in buckets if key in s), key=lambda f: f.bucket))
            store.write_staged_manifest(
                work, Manifest(store.dataset, table, day, work.attempt, schema, version, found, counts, inputs, of_day)
            )


def _known_files(files: Sequence[RawFile], stats: Sequence[dict]) -> str:
    """Return what a manifest says of the files that could hold a day.

    Size, time of change and the day's rows of each, JSON.
    """
    rows: collections.Counter = collections.Counter()
    for stat in stats:
        if "counted" in stat:
            rows[stat["file"]] += stat["counted"]
    return json.dumps({file.name: [file.size, file.modified_ns, rows[file.name]] for file in files}, sort_keys=True)


def _days_ahead(store: TableStore, definition: DatasetDefinition, lookback: list[str], waiting: set[str]) -> list[str]:
    """Return the days that partitions of the data set read and that are neither published, waiting nor of this
    lookback, the next ones first.
    """
    last = definition.last_day or dtm.datetime.now(dtm.UTC).date() - dtm.timedelta(days=1)
    there = {*store.days("events"), *waiting}
    first = add_days(definition.first_day.isoformat(), 1 - len(lookback))  # the lookback of the first day
    later, earlier = (
        days_between(add_days(lookback[-1], 1), last.isoformat()),
        days_between(first, add_days(lookback[0], -1)),
    )
    return [day for day in [*later, *reversed(earlier)] if day not in there][:AHEAD_DAYS]


def _is_made(manifest: Manifest | None, judge: Judge, layout: Layout) -> bool:
    """Whether a day is what this code would build now, byte for byte."""
    return (
        manifest is not None
        and manifest.code_version == code_version()
        and Layout.of(manifest) == layout
        and "accepted_loss" not in manifest.settings
        and judge(manifest.dt, manifest).action is Action.FRESH
    )


def _take(store: TableStore, work: Try, day: str, waiting: bool, empty: bool) -> bool:
    """Stage a day that waits, or is published.

    False where its files are not what its manifests say, or it is empty and may not be.
    """
    found = [
        store.staged_manifest(AHEAD, table, day) if waiting else store.manifest(table, day)
        for table in ("quarantine", "events")
    ]
    manifests = [manifest for manifest in found if manifest is not None]
    if not empty and not manifests[-1].rows:
        return False
    try:
        if any(
            sha256_of(store.fs, f"{store.root}/{file.path}") != file.digest
            for manifest in manifests
            for file in manifest.files
        ):
            return False
    except OSError:
        return False
    for manifest in manifests:
        files = tuple(
            store.write_file(work, manifest.table, day, file.bucket, store.read_file(file)) for file in manifest.files
        )
        store.write_staged_manifest(work, replace(manifest, attempt=work.attempt, files=files))
    return True


def _buckets(
    published: dict[str, Manifest], files: list[RawFile], definition: DatasetDefinition, lookback: list[str]
) -> int:
    """Return the buckets of new days: those of the latest published day, until a whole lookback asks for many more.

    A feed that begins with one day is sized by the lookback that it will have: so many days like its largest one.
    """
    span = (
        len(lookback)
        if definition.last_day is None
        else max(len(lookback), (definition.last_day - definition.first_day).days + 1)
    )
    undated = sum(_raw_bytes(file) for file in files if file.first_utc_dt is None or file.last_utc_dt is None) / span
    dated = [
        (file, _raw_bytes(file) / len(days_between(file.first_utc_dt, file.last_utc_dt)))
        for file in files
        if file.first_utc_dt and file.last_utc_dt
    ]
    largest = max(sum(size for file, size in dated if file.may_hold(day)) for day in lookback)
    wanted = min(
        1 << max(0, math.ceil((undated + largest) * len(lookback) / BUCKET_BYTES) - 1).bit_length(), MAX_BUCKETS
    )
    current = next(
        (Layout.of(published[day]).buckets for day in sorted(published, reverse=True) if published[day].rows), None
    )
    if current is None:
        return wanted
    if wanted < GROWTH * current:
        return current
    log(
        f"note: published days have {current} bucket(s), a lookback of the size of its largest day asks for {wanted}:"
        f" new days get {wanted}; python -m etl.jobs.rebucket gives them to the others"
    )
    return wanted


def _raw_bytes(file: RawFile) -> int:
    return file.size * (GZIP_RATIO if promised_compression(file.name) or file.name.endswith(".parquet") else 1)


def _spark_schema(schema: pa.Schema):
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)

"""Cut published days of `events` into another number of buckets, from what is published: no raw file is read.

Days of different numbers of buckets are read together rightly; some files are then read more than once, until this job
has run. A day has the same rows afterwards, and the bytes that a build with so many buckets would give.

With --adopt-definition days keep their rows although the definition changed: for days whose raw files are gone, which
cannot be built by the new one. Signals go to the bits that they have now, new signals have not happened, new fields are
not known, and the manifest says which definition the rows were built by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from etl.datasets.arguments import dataset_parser, definition_of
from etl.datasets.definition import DatasetDefinition
from etl.datasets.rows_digest import rows_digest
from etl.ingest.event_rows import events_schema
from etl.ingest.freshness import same_rows
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError, TryAgainError
from etl.stage.spark import spark_session
from etl.warehouse.buckets import MAX_BUCKETS, Layout, common_layout, files_by_remainder
from etl.warehouse.partitions import days_between, parse_dt
from etl.warehouse.schemas import EVENTS, schema_fingerprint
from etl.warehouse.store import DataFile, Manifest, TableStore, Try, code_version


@dataclass(frozen=True)
class Conform:
    """How rows of one definition become rows of another.

    Attributes:
        bits: (bit of `feedback` before, bit now).
        schema: the columns that they get.
        definition: digest of the definition that they conform to. signals: its signals, as a manifest has them.
    """

    bits: tuple[tuple[int, int], ...]
    schema: pa.Schema
    definition: str
    signals: str

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return rows with the columns of the schema: fields that they lack are null."""
        before = rows["feedback"].to_numpy()
        now = np.zeros(rows.num_rows, np.int16)
        for old, new in self.bits:
            now |= ((before >> old) & 1).astype(np.int16) << np.int16(new)
        rows = rows.set_column(rows.column_names.index("feedback"), "feedback", pa.array(now))
        return pa.table(
            [rows[f.name] if f.name in rows.column_names else pa.nulls(rows.num_rows, f.type) for f in self.schema],
            names=self.schema.names,
        )


def main() -> None:
    parser = dataset_parser(__doc__)
    parser.add_argument("--first-dt", required=True, help="first UTC day")
    parser.add_argument(
        "--last-dt", required=True, help="last UTC day; days in between that are not published are left out"
    )
    parser.add_argument("--attempt", required=True, help="name of this attempt")
    parser.add_argument(
        "--buckets", type=int, help="buckets that the days get (default: those in which most of their rows lie)"
    )
    parser.add_argument(
        "--adopt-definition",
        action="store_true",
        help="keep the rows of days that another definition made, as rows of this one",
    )
    args = parser.parse_args()
    definition = definition_of(args)
    store = TableStore(args.warehouse, definition.name)
    days = days_between(parse_dt(args.first_dt), parse_dt(args.last_dt))
    if args.buckets is not None and not 1 <= args.buckets <= MAX_BUCKETS:
        raise StageError(f"--buckets must be between 1 and {MAX_BUCKETS}", "correct it")
    done = rebucket(store, definition, days, args.attempt, args.buckets, args.adopt_definition)
    log(
        f"{len(done)} day(s) published anew with the same rows"
        + (f", {done[0].dt} .. {done[-1].dt}: {sum(m.rows for m in done):,} events" if done else "")
    )


def rebucket(
    store: TableStore,
    definition: DatasetDefinition,
    days: list[str],
    attempt: str,
    buckets: int | None = None,
    adopt: bool = False,
) -> list[Manifest]:
    """Publish days anew from what is published of them; return their manifests, without days that need nothing.

    Raises:
        StageError: no day is published, a day was made by another definition that cannot be adopted, or it was
            published anew meanwhile.
    """
    published = _published(store, days)
    layout = Layout(buckets or common_layout(published).buckets)
    digest = rows_digest(definition)
    adopting = {
        m.dt: _conform(store, m, definition) for m in published if adopt and m.settings.get("definition") != digest
    }
    work = [m for m in published if m.dt in adopting or Layout.of(m) != layout]
    if not work:
        return []
    log(f"cutting {len(work)} day(s) of {sum(m.rows for m in work):,} events into {layout.buckets} bucket(s)")
    staging = store.begin_try(attempt, ["events"], [m.dt for m in work])
    files = _cut_days(store, staging, work, layout, adopting)
    for manifest in work:
        staged = _staged_again(manifest, files[manifest.dt], layout, adopting.get(manifest.dt))
        store.write_staged_manifest(staging, replace(staged, attempt=attempt))
    return [_published_anew(store, attempt, manifest) for manifest in work]


def _published(store: TableStore, days: list[str]) -> list[Manifest]:
    """Return the manifests of the days that are published.

    Raises:
        StageError: there is none.
    """
    published = [manifest for day in days if (manifest := store.manifest("events", day)) is not None]
    if not published:
        raise StageError(
            (
                f"no day of {store.dataset}/events from {days[0]} to {days[-1]} is published under {store.warehouse}"
                if days
                else "--first-dt is after --last-dt"
            ),
            "correct --first-dt, --last-dt or --warehouse",
        )
    return published


def cut(rows: pa.Table, layout: Layout) -> list[tuple[int, pa.Table]]:
    """Return (bucket, its rows) of rows of one day, buckets ascending, each sorted by user as a build sorts it."""
    bucket = layout.bucket_of(rows["user_id"].to_numpy())
    # Stable: a user lies in one file, whose order is that of a day.
    order = np.lexsort((rows["user_id"].to_numpy(), bucket))
    rows, bucket = rows.take(pa.array(order)), bucket[order]
    distinct, start, count = np.unique(bucket, return_index=True, return_counts=True)
    return [(b, rows.slice(s, c)) for b, s, c in zip(distinct.tolist(), start.tolist(), count.tolist(), strict=True)]


def _cut_days(
    store: TableStore, staging: Try, work: list[Manifest], layout: Layout, adopting: dict[str, Conform]
) -> dict[str, tuple[DataFile, ...]]:
    """Write the rows of days into files of a layout, one Spark task a group of files; return each day's, by bucket."""
    warehouse, dataset = store.warehouse, store.dataset
    # No two groups of a day hold users of the same new bucket.
    tasks = [(m.dt, found) for m in work for found in files_by_remainder(m, Layout.of(m).nested_in(layout)).values()]
    files: dict[str, list[DataFile]] = {m.dt: [] for m in work}
    if not tasks:  # days without events
        return {dt: () for dt in files}

    def write(task: tuple[str, list[DataFile]]) -> tuple[str, list[DataFile]]:
        dt, found = task
        here = TableStore(warehouse, dataset)
        rows = here.read_files(found)
        rows = adopting[dt](rows) if dt in adopting else rows
        return dt, [here.write_file(staging, "events", dt, bucket, part) for bucket, part in cut(rows, layout)]

    spark = spark_session(staging.attempt)
    try:
        for dt, written in spark.sparkContext.parallelize(tasks, len(tasks)).map(write).collect():
            files[dt] += written
    finally:
        spark.stop()
    return {dt: tuple(sorted(found, key=lambda file: file.bucket)) for dt, found in files.items()}


def _staged_again(manifest: Manifest, files: tuple[DataFile, ...], layout: Layout, adopted: Conform | None) -> Manifest:
    """Return the manifest of a day that was cut into these files, and perhaps adopted.

    Raises:
        StageError: they hold more or fewer rows than the day.
    """
    if (rows := sum(file.rows for file in files)) != manifest.rows:
        raise StageError(
            f"dt={manifest.dt} has {manifest.rows:,} events, and {rows:,} after cutting",
            "this is a bug: report it; the days are untouched",
        )
    settings = {**manifest.settings, **layout.settings()}
    if adopted is None:
        settings["same_rows_as"] = ",".join(sorted(same_rows(manifest)))
    else:
        settings |= {
            "definition": adopted.definition,
            "signals": adopted.signals,
            "adopted_from": str(manifest.settings.get("definition")),
        }
        settings.pop("same_rows_as", None)  # bits and fields may have changed
    return replace(
        manifest,
        files=files,
        settings=settings,
        code_version=code_version(),
        schema=manifest.schema if adopted is None else schema_fingerprint(adopted.schema),
    )


def _published_anew(store: TableStore, attempt: str, manifest: Manifest) -> Manifest:
    """Publish a staged day in place of what its rows were read from; return its manifest.

    Raises:
        TryAgainError: somebody else has published the day since.
    """
    current = store.require("events", manifest.dt)
    if current.data_digest != manifest.data_digest:
        raise TryAgainError(
            f"dt={manifest.dt} was published anew by attempt {current.attempt} meanwhile; it stays as it is",
            "run again",
        )
    return store.publish(attempt, "events", manifest.dt)


def _conform(store: TableStore, manifest: Manifest, definition: DatasetDefinition) -> Conform:
    """Return how the rows of a day become rows of a definition; say which signals are lost and which are new.

    Raises:
        StageError: the manifest does not say which signals its bits are, or a field has another type now.
    """
    if "signals" not in manifest.settings:
        raise StageError(
            f"the manifest of dt={manifest.dt} does not say which signals its bits are",
            "build the day again from its raw files",
        )
    before, now = str(manifest.settings["signals"]).split(","), definition.feedback_fields
    schema = events_schema(definition)
    found = store.read_file(manifest.files[0]).schema if manifest.files else EVENTS
    for field in schema:
        if field.name in found.names and found.field(field.name).type != field.type:
            raise StageError(
                f"dt={manifest.dt}: the field {field.name} is {found.field(field.name).type} in what is published, and"
                f" {field.type} by the definition",
                f"keep its kind, or call the new field otherwise: rows of these days have no {field.name} then",
            )
    if lost := [name for name in before if name not in now]:
        log(
            f"warning: dt={manifest.dt}: the signal(s) {', '.join(lost)} are not in the definition any more, and are"
            " dropped"
        )
    if new := [name for name in now if name not in before]:
        label = f"; the label {definition.targets.label} is 0 on all of them" if definition.targets.label in new else ""
        log(f"warning: dt={manifest.dt}: the signal(s) {', '.join(new)} have not happened in its rows{label}")
    bits = tuple((bit, now.index(name)) for bit, name in enumerate(before) if name in now)
    return Conform(bits, schema, rows_digest(definition), ",".join(now))


if __name__ == "__main__":
    run_stage(main)

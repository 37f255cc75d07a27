"""Cut published days of `events` into another number of buckets, from what is published: no raw file is read.

Days of different numbers of buckets are read together rightly; some files are then read more than once, until this job
has run. A day has the same rows afterwards, and the bytes that a build with so many buckets would give.

With --adopt-definition days keep their rows although the definition changed: for days whose raw files are gone, which
cannot be built by the new one. Signals go to the bits that they have now, new signals have not happened, new fields are
not known, and the manifest says which definition the rows were built by.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

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
from etl.warehouse.store import DataFile, Manifest, TableStore, code_version


@dataclass(frozen=True)
class Conform:
    """How rows of one definition become rows of another.

    Attributes:
        bits: (bit of `feedback` before, bit now).
        schema: the columns that they get.
    """

    bits: tuple[tuple[int, int], ...]
    schema: pa.Schema

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
    layout = Layout(buckets or common_layout(published).buckets)
    digest, schema = rows_digest(definition), events_schema(definition)
    adopting = {
        m.dt: _conform(store, m, definition, schema)
        for m in published
        if adopt and m.settings.get("definition") != digest
    }
    work = [m for m in published if m.dt in adopting or Layout.of(m) != layout]
    if not work:
        return []
    log(f"cutting {len(work)} day(s) of {sum(m.rows for m in work):,} events into {layout.buckets} bucket(s)")
    warehouse, dataset = store.warehouse, store.dataset
    staging = store.begin_try(attempt, ["events"], [m.dt for m in work])
    # No two groups of a day hold users of the same new bucket.
    tasks = [(m.dt, found) for m in work for found in files_by_remainder(m, Layout.of(m).nested_in(layout)).values()]
    spark = spark_session(attempt)
    try:

        def cut(task: tuple[str, list[DataFile]]) -> str:
            dt, files = task
            here = TableStore(warehouse, dataset)
            rows = here.read_files(files)
            if dt in adopting:
                rows = adopting[dt](rows)
            bucket = layout.bucket_of(rows["user_id"].to_numpy())
            # Stable: a user lies in one file, whose order is that of a day.
            order = np.lexsort((rows["user_id"].to_numpy(), bucket))
            rows, bucket = rows.take(pa.array(order)), bucket[order]
            distinct, start, count = np.unique(bucket, return_index=True, return_counts=True)
            written = [
                here.write_file(staging, "events", dt, b, rows.slice(s, c))
                for b, s, c in zip(distinct.tolist(), start.tolist(), count.tolist(), strict=True)
            ]
            return json.dumps([dt, [asdict(file) for file in written]])

        context = spark.sparkContext
        results = (
            [json.loads(text) for text in context.parallelize(tasks, len(tasks)).map(cut).collect()] if tasks else []
        )
    finally:
        spark.stop()
    for manifest in work:
        found = tuple(
            sorted(
                (DataFile(**file) for dt, files in results if dt == manifest.dt for file in files),
                key=lambda file: file.bucket,
            )
        )
        if sum(file.rows for file in found) != manifest.rows:
            raise StageError(
                f"dt={manifest.dt} has {manifest.rows:,} events, and {sum(f.rows for f in found):,} after cutting",
                "this is a bug: report it; the days are untouched",
            )
        settings = {**manifest.settings, **layout.settings()}
        if manifest.dt in adopting:
            settings |= {
                "definition": digest,
                "signals": ",".join(definition.feedback_fields),
                "adopted_from": str(manifest.settings.get("definition")),
            }
            settings.pop("same_rows_as", None)  # bits and fields may have changed
        else:
            settings["same_rows_as"] = ",".join(sorted(same_rows(manifest)))
        store.write_staged_manifest(
            staging,
            replace(
                manifest,
                attempt=attempt,
                files=found,
                settings=settings,
                code_version=code_version(),
                schema=schema_fingerprint(schema) if manifest.dt in adopting else manifest.schema,
            ),
        )
    done = []
    for manifest in work:
        current = store.require("events", manifest.dt)
        if current.data_digest != manifest.data_digest:
            raise TryAgainError(
                f"dt={manifest.dt} was published anew by attempt {current.attempt} meanwhile; it stays as it is",
                "run again",
            )
        done.append(store.publish(attempt, "events", manifest.dt))
    return done


def _conform(store: TableStore, manifest: Manifest, definition: DatasetDefinition, schema: pa.Schema) -> Conform:
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
    return Conform(tuple((bit, now.index(name)) for bit, name in enumerate(before) if name in now), schema)


if __name__ == "__main__":
    run_stage(main)

"""Compact published days of `events` into one block, so that later partitions open one file a bucket instead of one a
day.

Days stay as they are and stay what counts: a block names the digests of its days, and the sequences job reads it in
their place only while every one of them is still the published one. A day that is built again makes its block unused,
until this job runs again. A partition has the same bytes with blocks and without.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from etl.datasets.arguments import dataset_parser, definition_of
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError
from etl.stage.spark import spark_session
from etl.warehouse.buckets import Part, common_layout, parts_by_bucket, read_bucket
from etl.warehouse.partitions import days_between, parse_dt
from etl.warehouse.store import DataFile, Manifest, TableStore, code_version


def main() -> None:
    parser = dataset_parser(__doc__)
    parser.add_argument("--first-dt", required=True, help="first UTC day of the block")
    parser.add_argument(
        "--last-dt",
        required=True,
        help="last UTC day of the block; it should be older than what late files still change",
    )
    parser.add_argument("--attempt", required=True, help="name of this attempt")
    args = parser.parse_args()
    store = TableStore(args.warehouse, definition_of(args).name)
    days = days_between(parse_dt(args.first_dt), parse_dt(args.last_dt))
    if len(days) < 2:
        raise StageError(
            f"a block of {args.first_dt} .. {args.last_dt} is no more than a day", "give a --last-dt after --first-dt"
        )
    block = compact(store, days, args.attempt)
    log(
        f"block {days[0]} .. {days[-1]}: {block.rows:,} events, {block.counts['files_before']:,} files became"
        f" {len(block.files)}, data digest {block.data_digest[:16]}"
    )


def compact(store: TableStore, days: list[str], attempt: str) -> Manifest:
    """Build and publish the block of some consecutive days; return its manifest.

    Raises:
        StageError: a day is not published.
    """
    manifests = [store.require("events", day) for day in days]
    layout = common_layout(manifests)
    parts = parts_by_bucket(manifests, layout)
    warehouse, dataset, first = store.warehouse, store.dataset, days[0]
    staging = store.begin_try(attempt, ["event_blocks"], [first])
    spark = spark_session(attempt)
    try:

        def join(task: tuple[int, list[Part]]) -> str:
            bucket, work = task
            here = TableStore(warehouse, dataset)
            events = read_bucket(here, work, bucket, layout)
            # Stable: a user's events stay in the order of days and of the rows within each, as reading the days would
            # give.
            order = np.argsort(events["user_id"].to_numpy(), kind="stable")
            return json.dumps(
                asdict(here.write_file(staging, "event_blocks", first, bucket, events.take(pa.array(order))))
            )

        context = spark.sparkContext
        found = [
            DataFile(**json.loads(text))
            for text in context.parallelize(sorted(parts.items()), max(len(parts), 1)).map(join).collect()
        ]
    finally:
        spark.stop()
    rows = sum(m.rows for m in manifests)
    if sum(file.rows for file in found) != rows:
        raise StageError(
            f"the block of {days[0]} .. {days[-1]} has {sum(f.rows for f in found):,} rows, its days have {rows:,}",
            "this is a bug: report it; the days are untouched",
        )
    store.write_staged_manifest(
        staging,
        Manifest(
            dataset,
            "event_blocks",
            first,
            attempt,
            manifests[-1].schema,
            code_version(),
            tuple(found),
            {"events": rows, "files_before": sum(len(m.files) for m in manifests)},
            {store.input_name(m): m.data_digest for m in manifests},
            {"last_dt": days[-1], **layout.settings()},
        ),
    )
    return store.publish(attempt, "event_blocks", first)


if __name__ == "__main__":
    run_stage(main)

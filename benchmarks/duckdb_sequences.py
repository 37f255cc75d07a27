"""Builds `sequences` of a partition with DuckDB from the published events: the yardstick of the Spark job.

    python -m benchmarks.duckdb_sequences FIGURES.json OUT.parquet --warehouse W --raw R --dt YYYY-MM-DD

The fastest of the formulations that were tried (4 M rows): one list of structs a user, ordered once, taken apart and
cut afterwards. One ordered list a column costs 1.3 to 2 times as much, list_sort over the structs 1.1 to 2 times.
Unordered lists over a sorted subquery are faster and wrong: with several threads their order is not the subquery's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import duckdb

from etl.datasets.definition import DatasetDefinition, dataset
from etl.stage.commands import log
from etl.warehouse.partitions import MS_PER_DAY, Window, day_number
from etl.warehouse.schemas import EVALUATION, TRAIN, WATCH_RATIO_EDGES
from etl.warehouse.store import TableStore

TIES = "event_time_ms, item_id, feedback, watch_time_ms, duration_ms, context, is_random"  # the order of a day's file


def items_sql(events: str, window: Window) -> str:
    """Return the query of the item index, with the counts that `items` holds."""
    first_evaluation_ms = day_number(window.first_evaluation_dt) * MS_PER_DAY
    return f"""SELECT item_id, (row_number() OVER (ORDER BY item_id) - 1)::INT AS item_index, train_occurrences
        FROM (SELECT item_id, count(*) FILTER (event_time_ms < {first_evaluation_ms}) AS train_occurrences
            FROM {events} GROUP BY item_id)"""


def sequences_sql(events: str, items: str, users: str, definition: DatasetDefinition, window: Window) -> str:
    """Return the query of `sequences`: every event is history and may be a target, as in the KuaiRand definitions.

    A target sees as many events as its user has strictly earlier ones: its rank by time, less one.
    """
    if (
        definition.history.of
        or definition.targets.of
        or definition.targets.positions
        or definition.history.cutoff != "event"
        or definition.label_bit is None
    ):
        raise ValueError(f"the query does not stand for the definition of {definition.name}")
    first_target_ms, first_evaluation_ms = (
        day_number(day) * MS_PER_DAY for day in (window.first_target_dt, window.first_evaluation_dt)
    )
    passed = " + ".join(
        f"(watch_time_ms::DOUBLE / duration_ms >= {edge}::DOUBLE)::TINYINT" for edge in WATCH_RATIO_EDGES
    )
    watch = f"(CASE WHEN duration_ms <= 0 THEN 0 WHEN watch_time_ms <= 0 THEN 1 ELSE 2 + {passed} END)::TINYINT"
    event = f"{{i: item_index, t: event_time_ms, f: feedback, w: {watch}, c: context, r: is_random, e: earlier}}"
    apart = ", ".join(f"list_transform(events, lambda x: x.{name}) AS {name}" for name in "itfwcre")
    fields = ", ".join(f"coalesce({name}, '')" for name in definition.user_fields)
    none = ", ".join("''" for _ in definition.user_fields)
    return f"""
        WITH ranked AS (SELECT *, (rank() OVER (PARTITION BY user_id ORDER BY event_time_ms) - 1)::INT AS earlier
            FROM {events} JOIN {items} USING (item_id)),
        listed AS (SELECT user_id, list({event} ORDER BY {TIES}) AS events FROM ranked GROUP BY user_id),
        lists AS (SELECT user_id, {apart} FROM listed),
        -- before: events before the first target; trimmed: seen by no target; seen: by the last one
        placed AS (SELECT *, len(list_filter(t, lambda x: x < {first_target_ms})) AS before FROM lists),
        cut AS (SELECT *, greatest(0, e[before + 1] - {definition.history.max_events})::INT AS trimmed, e[-1] AS seen
            FROM placed WHERE before < len(t))
        SELECT user_id, coalesce(user_fields, list_value({none})) AS user_fields,
            i[trimmed + 1 : seen] AS history_item_index, t[trimmed + 1 : seen] AS history_time_ms,
            f[trimmed + 1 : seen] AS history_feedback, w[trimmed + 1 : seen] AS history_watch_bucket,
            i[before + 1 :] AS target_item_index, t[before + 1 :] AS target_time_ms,
            list_transform(f[before + 1 :], lambda x: ((x >> {definition.label_bit}) & 1)::TINYINT) AS target_label,
            c[before + 1 :] AS target_context, r[before + 1 :] AS target_is_random,
            list_transform(t[before + 1 :], lambda x: (
                CASE WHEN x >= {first_evaluation_ms} THEN {EVALUATION} ELSE {TRAIN} END)::TINYINT) AS target_split,
            list_transform(e[before + 1 :], lambda x: x - trimmed) AS target_history_end
        FROM cut LEFT JOIN (SELECT user_id, list_value({fields}) AS user_fields FROM {users}) USING (user_id)"""


def build(store: TableStore, definition: DatasetDefinition, raw: Path, window: Window, out: Path) -> dict[str, float]:
    """Write `sequences`; return the seconds of the item index and of all, and the processor's."""
    files = [f"{store.root}/{file.path}" for day in window.event_days for file in store.require("events", day).files]
    events = f"read_parquet({files!r})"
    users = f"read_csv('{raw}/user_features_*.csv', header = true, all_varchar = true, types = {{'user_id': 'BIGINT'}})"
    with duckdb.connect() as connection:
        connection.execute(f"SET threads = {len(os.sched_getaffinity(0))}")
        began, before = time.perf_counter(), time.process_time()
        connection.execute(f"CREATE TEMP TABLE items AS {items_sql(events, window)}")
        counted = time.perf_counter()
        # Users have long lists: row groups of 2,048 of them are what DuckDB writes in parallel.
        connection.execute(
            f"COPY ({sequences_sql(events, 'items', users, definition, window)}) TO '{out}'"
            " (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 3, ROW_GROUP_SIZE 2048, PARQUET_VERSION v2)"
        )
        return {
            "items_s": counted - began,
            "work_s": time.perf_counter() - began,
            "work_cpu_s": time.process_time() - before,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures")
    parser.add_argument("out")
    parser.add_argument("--dataset", default="kuairand_simulated")
    parser.add_argument("--warehouse", required=True)
    parser.add_argument("--raw", required=True)
    parser.add_argument("--dt", required=True)
    args = parser.parse_args()
    definition = dataset(args.dataset)
    figures = build(
        TableStore(args.warehouse, definition.name),
        definition,
        Path(args.raw),
        Window(args.dt, **definition.window.model_dump()),
        Path(args.out),
    )
    Path(args.figures).write_text(json.dumps(figures))
    log(f"DuckDB: {figures['work_s']:.1f} s, {figures['items_s']:.1f} s of it the item index")


if __name__ == "__main__":
    main()

"""Stored bytes of an impression: `sequences`, where a user's history stands once, against one row per sample.

Every user has as many events as it takes for their first target to see LENGTH of them, so that each fat row repeats
exactly LENGTH. The fat rows are a sample, written with the encodings of `sequences` and with plain values, in three
orders: zstd finds some repeats of a history where a user's rows are neighbours. The smallest file of all counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.logs import DATASET, Pages, Plan, draw_pages, log_rows
from etl.datasets.definition import DatasetDefinition, dataset
from etl.sequences.sequence_rows import sequence_rows
from etl.warehouse.partitions import MS_PER_DAY, Window, day_number
from etl.warehouse.schemas import EVENTS
from etl.warehouse.store import TableStore

LENGTH = 10_000
SPARE = 900  # users differ in what chance puts before their first target
HISTORY = ("history_item_index", "history_time_ms", "history_feedback", "history_watch_bucket")
TARGET = ("target_item_index", "target_time_ms", "target_label", "target_context", "target_is_random", "target_split")
DELTA = {
    "history_time_ms.list.element": "DELTA_BINARY_PACKED",
    "target_time_ms": "DELTA_BINARY_PACKED",
    "user_id": "DELTA_BINARY_PACKED",
}
CODES = [
    "history_item_index.list.element",
    "history_feedback.list.element",
    "history_watch_bucket.list.element",
    "user_fields.list.element",
    "target_item_index",
    "target_label",
    "target_context",
    "target_is_random",
    "target_split",
]


def measure(users: int, samples: int, folder: Path, log: Callable[[str], None]) -> dict[str, float]:
    """Return bytes per impression of both layouts for some users, and their ratio."""
    base = dataset(DATASET)
    definition = base.model_copy(update={"history": base.history.model_copy(update={"max_events": LENGTH})})
    days, target_days = definition.window.lookback_days, definition.window.target_days
    events_of_user = -(-(LENGTH + SPARE) * days // (days - target_days))
    plan = Plan(rows=users * events_of_user, users=users, days=days, length_sd=0.0)
    window = Window(plan.last_dt, **definition.window.model_dump())
    events = _events(plan, definition)
    items, occurrences = np.arange(plan.items), np.zeros(plan.items, np.int64)
    rows, counts = sequence_rows(events, items, occurrences, {}, window, definition)
    store = TableStore(str(folder / "stored"), DATASET)
    file = store.write_file(store.begin_try("bytes", ["sequences"], [window.dt]), "sequences", window.dt, 0, rows)
    compact = file.bytes / counts["targets"]
    result = {
        "length": LENGTH,
        "users": users,
        "targets_per_user": counts["targets"] / counts["users"],
        "events_per_user_row": counts["history_events"] / counts["users"],
        "bytes_per_impression": compact,
    }
    for order, chosen in _samples(rows, samples).items():
        fat = _fat_rows(rows, chosen)
        for name, codes in (("encoded", True), ("plain", False)):
            path = folder / f"fat_{order}_{name}.parquet"
            pq.write_table(
                fat,
                path,
                compression="zstd",
                compression_level=3,
                use_dictionary=CODES if codes else CODES[3:],
                column_encoding=DELTA if codes else None,
            )
            result[f"fat_{order}_{name}_bytes"] = path.stat().st_size / len(chosen)
            log(
                f"one row per sample, {order} order, {name}: {result[f'fat_{order}_{name}_bytes']:,.0f} bytes an"
                f" impression, {compact:.1f} in user rows"
            )
            path.unlink()
    result["fat_bytes_per_impression"] = min(value for name, value in result.items() if name.startswith("fat_"))
    result["ratio"] = compact / result["fat_bytes_per_impression"]
    return result


def _events(plan: Plan, definition: DatasetDefinition) -> pa.Table:
    """Return events of the UTC days as the job makes them, in one table; the simulated signals are 0 or 1."""
    pages = draw_pages(plan)
    days = (pages.time_ms // MS_PER_DAY) < day_number(plan.last_dt) + 1
    rows = log_rows(
        plan,
        Pages(pages.user[days], pages.time_ms[days], pages.size[days]),
        np.random.default_rng(plan.seed),
        duplicates=0,
    )
    feedback = np.zeros(rows.num_rows, np.int16)
    for bit, condition in enumerate(definition.events.signals.values()):
        feedback |= rows[condition.column].to_numpy().astype(np.int16) << bit
    table = pa.table(
        {
            "user_id": rows["user_id"],
            "item_id": rows["video_id"],
            "event_time_ms": rows["time_ms"],
            "feedback": feedback,
            "watch_time_ms": rows["play_time_ms"],
            "duration_ms": rows["duration_ms"],
            "context": rows["tab"].cast(pa.int16()),
            "is_random": np.zeros(rows.num_rows, bool),
        },
        schema=EVENTS,
    )
    return table.sort_by([(name, "ascending") for name in ("user_id", "event_time_ms", "item_id")])


def _samples(rows: pa.Table, samples: int) -> dict[str, np.ndarray]:
    """Return positions among all targets: neighbours of the same users, neighbours in time, and any."""
    rng = np.random.default_rng(1)
    time_ms = rows["target_time_ms"].combine_chunks().flatten().to_numpy()
    runs = min(8, rows.num_rows)
    start = rng.integers(0, len(time_ms) - samples // runs, runs)
    middle = (len(time_ms) - samples) // 2
    return {
        "user": (np.sort(start)[:, None] + np.arange(samples // runs)).ravel(),
        "time": np.argsort(time_ms, kind="stable")[middle : middle + samples],
        "shuffled": rng.choice(len(time_ms), samples, replace=False),
    }


def _fat_rows(rows: pa.Table, chosen: np.ndarray) -> pa.Table:
    """Return one row per chosen target, with the LENGTH events before it."""
    target_start = rows["target_time_ms"].combine_chunks().offsets.to_numpy()
    owner = np.searchsorted(target_start, chosen, side="right") - 1
    end = rows["target_history_end"].combine_chunks().flatten().to_numpy()[chosen]
    assert end.min() >= LENGTH, f"a target sees {end.min()} events only"
    first = rows["history_time_ms"].combine_chunks().offsets.to_numpy()[owner] + end - LENGTH
    place = pa.array((first[:, None] + np.arange(LENGTH)).ravel())
    offsets = pa.array(np.arange(len(chosen) + 1) * LENGTH, pa.int32())
    columns = {name: rows[name].combine_chunks().take(pa.array(owner)) for name in ("user_id", "user_fields")}
    columns |= {
        name: pa.ListArray.from_arrays(offsets, rows[name].combine_chunks().flatten().take(place)) for name in HISTORY
    }
    columns |= {name: rows[name].combine_chunks().flatten().take(pa.array(chosen)) for name in TARGET}
    return pa.table(columns)

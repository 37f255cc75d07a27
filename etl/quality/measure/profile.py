"""What a day of events looks like: the distributions that later days are compared with, and what it shares with the days before.

Pure functions from Arrow tables to metrics. Vectors are metrics with a suffix: `hour_share_00` .. `hour_share_23`,
`action_rate_<signal>`, `<field>_share_<value>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.datasets.thresholds import EventThresholds
from etl.quality.measure.drift import HOURS, NAN
from etl.warehouse.partitions import MS_PER_DAY

MS_PER_HOUR = 3_600_000
MAX_VALUES = 100  # a field with more distinct values is no vocabulary, and is not kept value by value
MAX_POPULAR_ITEMS = 5_000
MIN_POPULAR_ITEMS = 30
MIN_POPULAR_COUNT = 5  # occurrences in the memory; rarer items have no popularity to speak of
COLUMNS = ("user_id", "item_id", "event_time_ms", "feedback", "watch_time_ms", "duration_ms", "context")
MEMORY_COLUMNS = ("user_id", "item_id", "event_time_ms", "duration_ms")
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Memory:
    """What the last days showed.

    Attributes:
        user_id, item_id: int64, distinct and ascending.
        item_rows: int64, rows of each item.
        item_duration_ms: int64, the largest duration that each item had; 0 where none is known.
        last_day_keys: uint64, ascending; see `row_keys`, of the latest day.
    """

    user_id: np.ndarray
    item_id: np.ndarray
    item_rows: np.ndarray
    item_duration_ms: np.ndarray
    last_day_keys: np.ndarray


def row_keys(events: pa.Table) -> np.ndarray:
    """Return uint64 keys of (user, item, time of day): a row that comes again on another day has the same one."""
    time_ms = events["event_time_ms"].to_numpy() % MS_PER_DAY
    return _keys(events["user_id"].to_numpy(), events["item_id"].to_numpy(), time_ms)


def event_keys(events: pa.Table) -> np.ndarray:
    """Return uint64 keys of (user, item, time)."""
    return _keys(*(events[name].to_numpy() for name in ("user_id", "item_id", "event_time_ms")))


def memory_of(days: Sequence[pa.Table]) -> Memory | None:
    """Return what days (oldest first, columns MEMORY_COLUMNS) showed, None when they have no row."""
    days = [day for day in days if day.num_rows]
    if not days:
        return None
    rows = pa.concat_tables([day.select(["user_id", "item_id", "duration_ms"]) for day in days])
    items = rows.group_by("item_id").aggregate([("duration_ms", "max"), ("item_id", "count")]).sort_by("item_id")
    users = np.sort(pc.unique(rows["user_id"]).to_numpy())
    return Memory(users, items["item_id"].to_numpy(), items["item_id_count"].to_numpy(), items["duration_ms_max"].to_numpy(), np.sort(row_keys(days[-1])))


def events_profile(events: pa.Table, signals: Sequence[str], fields: Mapping[str, str], memory: Memory | None, limits: EventThresholds) -> dict[str, float]:
    """Return the distributions of one day of events.

    Args:
        events: the columns COLUMNS, and the fields' own.
        signals: name of each bit of `feedback`.
        fields: name -> kind of the item fields in the log.
        memory: what the days before showed; None: nothing is known of them.
        limits: how many rows it takes to judge.
    """
    rows = events.num_rows
    time_ms, feedback = events["event_time_ms"].to_numpy(), events["feedback"].to_numpy()
    hours = np.bincount(time_ms % MS_PER_DAY // MS_PER_HOUR, minlength=24)
    odd = (hours == 0) & (np.minimum(np.roll(hours, 1), np.roll(hours, -1)) >= limits.min_hour_neighbour_rows)
    odd[[0, 23]] = False  # the other neighbour is of another day
    metrics: dict[str, float] = {name: _share(count, rows) for name, count in zip(HOURS, hours.tolist(), strict=True)}
    metrics["odd_empty_hour_count"] = int(odd.sum())
    metrics |= {f"action_rate_{name}": _share(int(((feedback >> bit) & 1).sum()), rows) for bit, name in enumerate(signals)}
    for name in ("watch_time_ms", "duration_ms"):
        values = np.percentile(events[name].to_numpy(), (50, 90)).tolist() if rows else (NAN, NAN)
        metrics |= {f"{name}_p{q}": value for q, value in zip((50, 90), values, strict=True)}
    metrics |= value_shares("context", events["context"])
    for name, kind in fields.items():
        if kind == "category":
            metrics |= value_shares(name, events[name])
    return metrics | _shared_with(events, memory, limits)


def value_shares(field: str, values: pa.ChunkedArray) -> dict[str, float]:
    """Return the share of each value of a field as `<field>_share_<value>`; nothing for a field with too many values."""
    found = pc.value_counts(values.drop_null())
    total = len(values) - values.null_count
    if not 0 < len(found) <= MAX_VALUES:
        return {}
    return {f"{field}_share_{str(entry['values'].as_py())[:60]}": entry["counts"].as_py() / total for entry in found}


def _shared_with(events: pa.Table, memory: Memory | None, limits: EventThresholds) -> dict[str, float]:
    names = ("known_user_share", "known_item_share", "item_popularity_correlation", "duration_mismatch_share", "repeated_day_share")
    metrics = dict.fromkeys(names, NAN)
    if memory is None or events.num_rows < limits.min_judged_rows:
        return metrics
    user, item, duration = (events[name].to_numpy() for name in ("user_id", "item_id", "duration_ms"))
    place, known = _places(memory.item_id, item)
    metrics["known_user_share"] = float(_places(memory.user_id, user)[1].mean())
    metrics["known_item_share"] = float(known.mean())
    if len(np.unique(events["event_time_ms"].to_numpy())) >= limits.min_judged_rows:  # times of whole days tell nothing apart
        metrics["repeated_day_share"] = float(_places(memory.last_day_keys, row_keys(events))[1].mean())
    popular = np.argsort(-memory.item_rows, kind="stable")[:MAX_POPULAR_ITEMS]
    popular = popular[memory.item_rows[popular] >= MIN_POPULAR_COUNT]
    if len(popular) >= MIN_POPULAR_ITEMS:
        today = np.bincount(place[known], minlength=len(memory.item_id))[popular]
        if today.std() and memory.item_rows[popular].std():
            metrics["item_popularity_correlation"] = float(np.corrcoef(np.log1p(memory.item_rows[popular]), np.log1p(today))[0, 1])
        else:
            metrics["item_popularity_correlation"] = 0.0
    before = memory.item_duration_ms[place[known]]
    comparable = (before > 0) & (duration[known] > 0)
    if comparable.sum() >= limits.min_judged_rows:
        metrics["duration_mismatch_share"] = float((before != duration[known])[comparable].mean())
    return metrics


def _places(ascending: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each value stands among distinct ascending ones, and whether it does."""
    place = np.searchsorted(ascending, values)
    place[place == len(ascending)] = 0
    return place, ascending[place] == values


def _keys(*columns: np.ndarray) -> np.ndarray:
    mixed = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        mixed = (mixed ^ column.astype(np.uint64)) * _MIX
        mixed ^= mixed >> np.uint64(31)
    return mixed


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0

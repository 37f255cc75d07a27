"""What a day of events is measured by: the facts that the records of `etl.metrics.events` ask for.

Pure, from Arrow tables; nothing here loops over rows. Each fact is worked out once, when the first record asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.metrics.record import NAN, share
from etl.metrics.thresholds import Thresholds
from etl.quality.measure.drift import HOURS
from etl.warehouse.partitions import MS_PER_DAY, day_number
from etl.warehouse.schemas import EVENTS

MS_PER_HOUR = 3_600_000
NEVER_NEGATIVE = ("user_id", "item_id", "watch_time_ms", "duration_ms")
MAX_VALUES = 100  # a field with more distinct values is no vocabulary, and is not measured value by value
MAX_POPULAR_ITEMS = 5_000
MIN_POPULAR_ITEMS = 30
MIN_POPULAR_COUNT = 5  # occurrences in the memory; rarer items have no popularity to speak of
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


@dataclass(frozen=True)
class EventsDay:
    """One day of events, and what is known about it; what an empty day cannot have is not a number.

    Attributes:
        is_partition_day: the day is the partition itself, not a day of its lookback.
        table: the day, all columns of the contract and the data set's own fields.
        counts: the reconciliation figures of its manifest.
        quarantine_rows: rows of the day's quarantine table.
        trailing_rows: row counts of the known days before it.
        settings: how many rows, users and trailing days it takes to judge.
        signals: name of each bit of `feedback` that is in use.
        label_bit: bit of `feedback` that is the label; None where negatives are sampled: no label rate.
        vocabularies: fields of the log whose values are categories.
        memory: what the days before showed; None: nothing is known of them.
        repeats_kept: the data set keeps repeated rows, so they are no sign of a fault.
        rows_to_keep: rows that are published of the day.
    """

    dt: str
    is_partition_day: bool
    table: pa.Table
    counts: Mapping[str, int]
    quarantine_rows: int
    trailing_rows: Sequence[int]
    settings: Thresholds
    signals: Sequence[str]
    label_bit: int | None
    vocabularies: Sequence[str] = ()
    memory: Memory | None = None
    repeats_kept: bool = False
    rows_to_keep: int = 0

    # ---- counts

    @property
    def rows(self) -> int:
        return self.table.num_rows

    rows_read = property(lambda self: self.counts.get("rows_read", 0))
    duplicates = property(lambda self: self.counts.get("duplicates", 0))
    quarantined = property(lambda self: self.counts.get("quarantined", 0))

    def enough(self, rows: int) -> bool:
        """Whether so many rows can be judged by their shares."""
        return rows >= self.settings.events.min_judged_rows

    @cached_property
    def judged(self) -> bool:
        """Whether the day can be judged by its shares."""
        return self.enough(self.rows) and self.users >= self.settings.events.min_judged_users

    # ---- the days before

    @cached_property
    def _filled(self) -> list[int]:
        return [count for count in self.trailing_rows if count > 0]

    @property
    def usual_rows(self) -> float:
        """Median rows of the days before that have any; not a number where none has."""
        return float(np.median(self._filled)) if self._filled else NAN

    @property
    def median_rows(self) -> float:
        """The same where the days before are enough to compare with."""
        return self.usual_rows if len(self._filled) >= self.settings.drift.min_trailing_days else NAN

    @property
    def dense(self) -> bool:
        """Whether the days before are large enough for a day to be judged by what is missing from it."""
        return self.median_rows >= self.settings.events.min_judged_rows

    # ---- columns

    @cached_property
    def user(self) -> np.ndarray:
        return self.table["user_id"].to_numpy()

    @cached_property
    def time_ms(self) -> np.ndarray:
        return self.table["event_time_ms"].to_numpy()

    @cached_property
    def feedback(self) -> np.ndarray:
        return self.table["feedback"].to_numpy()

    @property
    def nulls(self) -> int:
        return sum(self.table[name].null_count for name in EVENTS.names)

    @property
    def negatives(self) -> int:
        return sum(self.below(name, 0) for name in NEVER_NEGATIVE)

    def below(self, column: str, bound: int) -> int:
        """Count the values of a column below a bound."""
        return int(pc.sum(pc.less(self.table[column], bound)).as_py() or 0)

    @property
    def outside_day(self) -> int:
        return int((self.time_ms // MS_PER_DAY != day_number(self.dt)).sum())

    @property
    def unknown_feedback(self) -> int:
        return int(((self.feedback < 0) | (self.feedback >= 1 << len(self.signals))).sum())

    def percentile(self, column: str, q: int) -> float:
        return float(np.percentile(self.table[column].to_numpy(), q)) if self.rows else NAN

    # ---- hours

    @cached_property
    def _hours(self) -> np.ndarray:
        """Rows of each of the 24 UTC hours."""
        return np.bincount(self.time_ms % MS_PER_DAY // MS_PER_HOUR, minlength=24)

    @property
    def hour_shares(self) -> dict[str, float]:
        return {name[-2:]: share(count, self.rows) for name, count in zip(HOURS, self._hours.tolist(), strict=True)}

    @property
    def hours_covered(self) -> float:
        """Hours with an event; not a number where times are of day resolution: all of a day's are one."""
        in_day = self.time_ms % MS_PER_DAY
        if not self.judged or not (in_day != in_day[0]).any():
            return NAN
        return len(np.unique(self.time_ms // MS_PER_HOUR))

    @property
    def odd_empty_hours(self) -> int:
        neighbours = np.minimum(np.roll(self._hours, 1), np.roll(self._hours, -1))
        odd = (self._hours == 0) & (neighbours >= self.settings.events.min_hour_neighbour_rows)
        odd[[0, 23]] = False  # the other neighbour is of another day
        return int(odd.sum())

    # ---- repeats

    @cached_property
    def _first_of_key(self) -> np.ndarray:
        """Where each (user, item, time) stands first."""
        return np.unique(_event_keys(self.table), return_index=True)[1]

    @property
    def repeated_key_share(self) -> float:
        if self.repeats_kept or not self.judged:
            return 0.0
        return share(self.rows - len(self._first_of_key), self.rows)

    @property
    def worst_hour_repeated_key_share(self) -> float:
        if self.repeats_kept:
            return 0.0
        hours, rows = np.unique(self.time_ms // MS_PER_HOUR, return_counts=True)
        first = np.searchsorted(hours, self.time_ms[self._first_of_key] // MS_PER_HOUR)
        repeated = 1 - np.bincount(first, minlength=len(hours)) / rows
        return float(repeated[rows >= self.settings.events.min_hour_rows].max(initial=0))

    # ---- signals and fields

    @property
    def label_rate(self) -> float:
        if not self.judged or self.label_bit is None:
            return NAN
        return share(int(((self.feedback >> self.label_bit) & 1).sum()), self.rows)

    @property
    def action_rates(self) -> dict[str, float]:
        return {
            name: share(int(((self.feedback >> bit) & 1).sum()), self.rows) for bit, name in enumerate(self.signals)
        }

    @property
    def vocabulary_shares(self) -> dict[str, float]:
        fields = ("context", *self.vocabularies)
        return {name: value for field in fields for name, value in value_shares(field, self.table[field]).items()}

    # ---- users

    @cached_property
    def _user_rows(self) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(self.user, return_counts=True)

    @property
    def users(self) -> int:
        return len(self._user_rows[0])

    @property
    def largest_user_share(self) -> float:
        return share(int(self._user_rows[1].max(initial=0)), self.rows)

    @property
    def largest_user(self) -> int:
        return int(self._user_rows[0][np.argmax(self._user_rows[1])])

    # ---- what the day shares with the days before

    @cached_property
    def _known(self) -> Memory | None:
        return self.memory if self.enough(self.rows) else None

    @cached_property
    def _item_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each row's item stands in the memory, and whether it does."""
        assert self._known is not None
        return _places(self._known.item_id, self.table["item_id"].to_numpy())

    @property
    def known_user_share(self) -> float:
        return float(_places(self._known.user_id, self.user)[1].mean()) if self._known else NAN

    @property
    def known_item_share(self) -> float:
        return float(self._item_places[1].mean()) if self._known else NAN

    @property
    def repeated_day_share(self) -> float:
        # Times of whole days separate nothing.
        if self._known is None or not self.enough(len(np.unique(self.time_ms))):
            return NAN
        return float(_places(self._known.last_day_keys, row_keys(self.table))[1].mean())

    @property
    def item_popularity_correlation(self) -> float:
        if self._known is None:
            return NAN
        before = self._known.item_rows
        popular = np.argsort(-before, kind="stable")[:MAX_POPULAR_ITEMS]
        popular = popular[before[popular] >= MIN_POPULAR_COUNT]
        if len(popular) < MIN_POPULAR_ITEMS:
            return NAN
        place, known = self._item_places
        today = np.bincount(place[known], minlength=len(before))[popular]
        if not today.std() or not before[popular].std():
            return 0.0
        return float(np.corrcoef(np.log1p(before[popular]), np.log1p(today))[0, 1])

    @property
    def duration_mismatch_share(self) -> float:
        if self._known is None:
            return NAN
        place, known = self._item_places
        duration, before = self.table["duration_ms"].to_numpy()[known], self._known.item_duration_ms[place[known]]
        comparable = (before > 0) & (duration > 0)
        return float((before != duration)[comparable].mean()) if self.enough(int(comparable.sum())) else NAN


def memory_of(days: Sequence[pa.Table]) -> Memory | None:
    """Return what days (oldest first, columns MEMORY_COLUMNS) showed, None when they have no row."""
    days = [day for day in days if day.num_rows]
    if not days:
        return None
    rows = pa.concat_tables([day.select(["user_id", "item_id", "duration_ms"]) for day in days])
    items = rows.group_by("item_id").aggregate([("duration_ms", "max"), ("item_id", "count")]).sort_by("item_id")
    users = np.sort(pc.unique(rows["user_id"]).to_numpy())
    item, rows_of, duration = (items[name].to_numpy() for name in ("item_id", "item_id_count", "duration_ms_max"))
    return Memory(users, item, rows_of, duration, np.sort(row_keys(days[-1])))


def value_shares(field: str, values: pa.ChunkedArray) -> dict[str, float]:
    """Return the share of each value of a field as `<field>_share_<value>`; nothing for a field with too many
    values."""
    found = pc.value_counts(values.drop_null())
    total = len(values) - values.null_count
    if not 0 < len(found) <= MAX_VALUES:
        return {}
    return {f"{field}_share_{str(entry['values'].as_py())[:60]}": entry["counts"].as_py() / total for entry in found}


def row_keys(events: pa.Table) -> np.ndarray:
    """Return uint64 keys of (user, item, time of day): a row that comes again on another day has the same one."""
    time_ms = events["event_time_ms"].to_numpy() % MS_PER_DAY
    return _keys(events["user_id"].to_numpy(), events["item_id"].to_numpy(), time_ms)


def _event_keys(events: pa.Table) -> np.ndarray:
    """Return uint64 keys of (user, item, time)."""
    return _keys(*(events[name].to_numpy() for name in ("user_id", "item_id", "event_time_ms")))


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

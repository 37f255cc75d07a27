"""What a partition's sequences are measured by: the facts that the records of `etl.metrics.sequences` ask for.

Lists are handled through their offsets: nothing here loops over rows. A bucket of users is measured where it is read,
by a task of the job or by the gate; what is measured of buckets adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.datasets.definition import History
from etl.metrics.record import NAN, Metric, share
from etl.metrics.registry import SUITES
from etl.quality.measure.drift import psi
from etl.quality.measure.events import MS_PER_HOUR
from etl.sequences.sequence_rows import cut_offs_ms
from etl.warehouse.partitions import MS_PER_DAY, Window, day_number
from etl.warehouse.schemas import EVALUATION, TRAIN, VALIDATION, WATCH_BUCKETS, history_first

SPLITS = 1 + max(TRAIN, VALIDATION, EVALUATION)
# Targets are counted by these, each in so many bins.
SPECTRA = {"hour": 24, "context": 66, "history_length": 24}
Spectra = dict[tuple[str, int], np.ndarray]

HISTORY_LISTS = ("history_item_index", "history_time_ms", "history_feedback", "history_watch_bucket")
TARGET_LISTS = (
    "target_item_index",
    "target_time_ms",
    "target_label",
    "target_context",
    "target_is_random",
    "target_split",
    "target_history_end",
)
SEQUENCE_COLUMNS = ("user_id", *HISTORY_LISTS, *TARGET_LISTS)
RECONCILED = ("users", "targets", "train_targets", "validation_targets", "eval_targets", "history_events")


@dataclass(frozen=True)
class SequenceRules:
    """What sequences of a partition must keep to.

    Attributes:
        target_days: length of the target window, `dt` included.
        first_evaluation_ms: from here on targets are for evaluation; None where positions decide, not days.
        history: the rule that decides what a target may see.
    """

    dt: str
    target_days: int
    first_evaluation_ms: int | None
    history: History

    @staticmethod
    def of(window: Window, by_position: bool, history: History) -> SequenceRules:
        if by_position:
            return SequenceRules(window.dt, window.lookback_days, None, history)
        first_ms = day_number(window.first_evaluation_dt) * MS_PER_DAY
        return SequenceRules(window.dt, window.target_days, first_ms, history)


@dataclass(frozen=True)
class Bucket:
    """What is measured of one bucket of users; buckets add up.

    Attributes:
        user_id, history_length: int64 [users].
        sums: metrics that are sums.
        spectra: targets counted by split and value.
    """

    user_id: np.ndarray
    history_length: np.ndarray
    sums: Mapping[str, int]
    spectra: Spectra


@dataclass(frozen=True)
class UserLists:
    """The lists of one bucket of users.

    Attributes:
        table: the columns SEQUENCE_COLUMNS.
        train_occurrences: int64, of each item of the partition.
    """

    table: pa.Table
    train_occurrences: np.ndarray
    rules: SequenceRules

    @cached_property
    def _lists(self) -> dict[str, pa.Array]:
        return {name: self.table[name].combine_chunks() for name in (*HISTORY_LISTS, *TARGET_LISTS)}

    @cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        return {name: _numpy(pc.list_value_length(column)) for name, column in self._lists.items()}

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        return {name: _numpy(pc.list_flatten(column)) for name, column in self._lists.items()}

    @cached_property
    def unequal(self) -> np.ndarray:
        """Users whose lists of one side differ in length."""
        found = np.zeros(self.table.num_rows, dtype=bool)
        for names in (HISTORY_LISTS, TARGET_LISTS):
            for name in names[1:]:
                found |= self.lengths[name] != self.lengths[names[0]]
        return found

    @cached_property
    def aligned(self) -> bool:
        """Whether the lists line up; else what joins them has no meaning."""
        return not self.unequal.any()

    time_ms = property(lambda self: self.values["history_time_ms"])
    history_length = property(lambda self: self.lengths["history_time_ms"])
    target_time_ms = property(lambda self: self.values["target_time_ms"])
    split = property(lambda self: self.values["target_split"])
    train = property(lambda self: self.split == TRAIN)
    validation = property(lambda self: self.split == VALIDATION)
    evaluation = property(lambda self: self.split == EVALUATION)

    @property
    def wrong_split(self) -> int:
        wrong = ~(self.train | self.validation | self.evaluation)
        first_ms = self.rules.first_evaluation_ms
        if first_ms is not None and len(self.split) == len(self.target_time_ms):
            wrong |= self.evaluation != (self.target_time_ms >= first_ms)
        return int(wrong.sum())

    @property
    def targets_outside_window(self) -> int:
        day, last = self.target_time_ms // MS_PER_DAY, day_number(self.rules.dt)
        return int(((day > last) | (day <= last - self.rules.target_days)).sum())

    def disorder(self, name: str) -> int:
        """Count the elements of a list that are smaller than the one before them."""
        value, lengths = self.values[name], self.lengths[name]
        falls = np.diff(value) < 0
        first = np.cumsum(lengths)[:-1]  # where a new list starts; empty lists repeat one or point past the end
        falls[first[(first > 0) & (first < len(value))] - 1] = False
        return int(falls.sum())

    @property
    def unknown_items(self) -> int:
        sides = (self.values[name] for name in ("history_item_index", "target_item_index"))
        return sum(int(((index < 0) | (index >= len(self.train_occurrences))).sum()) for index in sides)

    @property
    def labels_not_binary(self) -> int:
        label = self.values["target_label"]
        return int(((label != 0) & (label != 1)).sum())

    @property
    def unknown_watch_buckets(self) -> int:
        bucket = self.values["history_watch_bucket"]
        return int(((bucket < 0) | (bucket >= WATCH_BUCKETS)).sum())

    # ---- what joins lists

    def positives(self, where: np.ndarray) -> int:
        return int((self.values["target_label"][where] == 1).sum()) if self.aligned else 0

    @cached_property
    def _end(self) -> np.ndarray:
        return self.values["target_history_end"]

    @cached_property
    def _target_user(self) -> np.ndarray:
        return np.repeat(np.arange(self.table.num_rows), self.lengths["target_time_ms"])

    @cached_property
    def _in_range(self) -> np.ndarray:
        return (self._end >= 0) & (self._end <= self.history_length[self._target_user])

    @property
    def ends_out_of_range(self) -> int:
        return int((~self._in_range).sum()) if self.aligned else 0

    @property
    def eval_empty_histories(self) -> int:
        return int(((self._end == 0) & self.evaluation).sum()) if self.aligned else 0

    @property
    def leaks(self) -> int:
        """Count the targets that see an event of their cut-off or later."""
        if not self.aligned:
            return 0
        visible = self._in_range & (self._end > 0)
        start = np.concatenate([[0], np.cumsum(self.history_length)])[:-1]  # of each user's history
        # Every visible event counts, not the last alone: the running maximum holds even where a history is unsorted.
        latest_ms = _running_max(self.time_ms, self.history_length)
        last = (start[self._target_user] + self._end - 1)[visible]
        return int((latest_ms[last] >= cut_offs_ms(self.target_time_ms, self.rules.history)[visible]).sum())

    @property
    def unseen_eval_targets(self) -> int:
        """Count the evaluation targets whose item no training day showed."""
        if not self.aligned or self.unknown_items:
            return 0
        return int((self.train_occurrences[self.values["target_item_index"][self.evaluation]] == 0).sum())

    @property
    def spectra(self) -> Spectra:
        """Targets by split and, each on its own, UTC hour, context and length of the visible history."""
        if not self.aligned:
            return {}
        context = self.values["target_context"].astype(np.int32)
        visible = self._end - history_first(self._end, self.rules.history.max_events)
        bits = np.log2(np.arange(1, int(visible.max(initial=0)) + 2)).astype(np.int32)
        place = {
            "hour": self.target_time_ms // MS_PER_HOUR % SPECTRA["hour"],
            "context": context.clip(-1, SPECTRA["context"] - 2) + 1,
            "history_length": bits.clip(0, SPECTRA["history_length"] - 1)[visible.clip(0)],
        }
        known = (self.split >= 0) & (self.split < SPLITS)
        found: Spectra = {}
        for what, values in place.items():
            both = values * SPLITS + self.split if known.all() else values[known] * SPLITS + self.split[known]
            counted = np.bincount(both, minlength=SPECTRA[what] * SPLITS).reshape(-1, SPLITS)
            found |= {(what, side): counted[:, side] for side in (TRAIN, EVALUATION)}
        return found


def measured_bucket(users: pa.Table, train_occurrences: np.ndarray, rules: SequenceRules) -> Bucket:
    """Measure every list of one bucket of users.

    Args:
        users: the columns SEQUENCE_COLUMNS.
        train_occurrences: int64, of each item of the partition.
    """
    lists = UserLists(users, train_occurrences, rules)
    sums = {metric.name: int(metric.count(lists)) for metric in _counted() if metric.count is not None}
    return Bucket(_numpy(users["user_id"]), lists.history_length, sums, lists.spectra)


@dataclass(frozen=True)
class SequencesFacts:
    """A partition of sequences: its buckets added up, its items, and what its manifest says.

    Attributes:
        item_index, item_id: of `items`.
        counts: the reconciliation figures of the manifest of `sequences`.
        event_days: days of the window that have events.
        min_judged_targets: fewer evaluation targets are not judged by the share of empty histories.
    """

    buckets: Sequence[Bucket]
    item_index: np.ndarray
    item_id: np.ndarray
    counts: Mapping[str, int]
    event_days: int = 0
    min_judged_targets: int = 1

    @cached_property
    def counted(self) -> dict[str, int]:
        return {metric.name: sum(b.sums[metric.name] for b in self.buckets) for metric in _counted()}

    @cached_property
    def user_id(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(bucket.user_id for bucket in self.buckets)])

    @cached_property
    def _length(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(bucket.history_length for bucket in self.buckets)])

    @property
    def targets(self) -> int:
        return sum(self.counted[name] for name in ("train_targets", "validation_targets", "eval_targets"))

    @property
    def repeated_users(self) -> int:
        return len(self.user_id) - len(np.unique(self.user_id))

    @property
    def misplaced_items(self) -> int:
        return int((self.item_index != np.arange(len(self.item_index))).sum())

    @property
    def unordered_items(self) -> int:
        return int((np.diff(self.item_id) <= 0).sum())

    @property
    def unreconciled(self) -> int:
        found = {**self.counted, "users": len(self.user_id), "targets": self.targets}
        return sum(abs(self.counts.get(name, 0) - found[name]) for name in RECONCILED)

    @property
    def eval_empty_history_share(self) -> float:
        targets = self.counted["eval_targets"]
        return share(self.counted["eval_empty_history_share"], targets) if targets >= self.min_judged_targets else NAN

    def length_percentile(self, q: int) -> float:
        return float(np.percentile(self._length, q)) if len(self._length) else 0.0

    def skew(self, what: str) -> float:
        """Return the PSI of evaluation targets against training targets; nan where a side has none."""
        train, evaluation = (self._spectrum(what, side) for side in (TRAIN, EVALUATION))
        if not np.sum(train) or not np.sum(evaluation):
            return NAN
        return psi(train / train.sum(), evaluation / evaluation.sum())

    def _spectrum(self, what: str, side: int) -> np.ndarray:
        empty = np.zeros(SPECTRA[what], np.int64)
        return sum((bucket.spectra[what, side] for bucket in self.buckets if bucket.spectra), empty)


def _counted() -> list[Metric]:
    """Return the records that add up over buckets."""
    return [metric for metric in SUITES["sequences"].metrics if metric.count is not None]


def _numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()


def _running_max(value: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the maximum so far within each list."""
    if len(value) == 0:
        return value
    # Lists are lifted above each other, so that one running maximum over all of them never looks back into another.
    lift = np.repeat(np.arange(len(lengths)), lengths) * (int(value.max()) - int(value.min()) + 1)
    return np.maximum.accumulate(value + lift) - lift

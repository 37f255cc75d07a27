"""User rows as jagged arrays: every history once, all targets of a user beside it, no padding to the longest.

Legend: U users, E events (flat over users), T targets (flat), N distinct items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from etl.warehouse.partitions import MS_PER_DAY
from etl.warehouse.schemas import EVALUATION, TRAIN, VALIDATION, WATCH_BUCKETS, history_first
from training.vocabulary import Array, ItemFeatures, Vocabulary, moved

FEEDBACK_BITS = 8
INTERACTIONS = (1 << FEEDBACK_BITS) * WATCH_BUCKETS  # every (feedback, watch bucket) pair


@dataclass(frozen=True)
class Sequences:
    """Rows of the `sequences` table as flat arrays.

    Attributes:
        user_id: int64 [U]; user_fields: one list of strings a user.
        history_start, target_start: int64 [U + 1], offsets into the flat arrays.
        history_item: int32 [E], index into the partition's items; history_time_ms: int64 [E].
        history_interaction: int32 [E], feedback * WATCH_BUCKETS + watch bucket.
        target_item: int32 [T]; target_time_ms: int64 [T]; target_label: int8 [T]; target_context: int16 [T].
        target_split: int8 [T], TRAIN, VALIDATION or EVALUATION.
        target_first, target_end: int32 [T]; of the user's history the target may see the events [first, end).
    """

    user_id: np.ndarray
    user_fields: list[list[str]]
    history_start: np.ndarray
    history_item: np.ndarray
    history_time_ms: np.ndarray
    history_interaction: np.ndarray
    target_start: np.ndarray
    target_item: np.ndarray
    target_time_ms: np.ndarray
    target_label: np.ndarray
    target_context: np.ndarray
    target_split: np.ndarray
    target_first: np.ndarray
    target_end: np.ndarray

    @staticmethod
    def from_arrow(rows: pa.Table, max_events: int | None = None) -> Sequences:
        """Read a table with the SEQUENCES schema without copying a list per user.

        Args:
            max_events: of the events before its cut-off a target sees so many at most, the latest; None: all that are
                stored.
        """

        def flat(name: str) -> np.ndarray:
            return rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)

        def offsets(name: str) -> np.ndarray:
            lists = rows[name].combine_chunks()
            raw = lists.offsets.to_numpy().astype(np.int64) if len(lists) else np.zeros(1, np.int64)
            return raw - raw[0]

        watch, end = flat("history_watch_bucket").astype(np.int32), flat("target_history_end")
        return Sequences(
            user_id=rows["user_id"].to_numpy(),
            user_fields=rows["user_fields"].to_pylist(),
            history_start=offsets("history_item_index"),
            history_item=flat("history_item_index"),
            history_time_ms=flat("history_time_ms"),
            history_interaction=flat("history_feedback").astype(np.int32) * WATCH_BUCKETS + watch,
            target_start=offsets("target_item_index"),
            target_item=flat("target_item_index"),
            target_time_ms=flat("target_time_ms"),
            target_label=flat("target_label"),
            target_context=flat("target_context"),
            target_split=flat("target_split"),
            target_first=np.zeros_like(end) if max_events is None else history_first(end, max_events),
            target_end=end,
        )

    @property
    def users(self) -> int:
        return len(self.user_id)

    def targets_of(self, user: int) -> slice:
        return slice(int(self.target_start[user]), int(self.target_start[user + 1]))


def target_is_random(rows: pa.Table) -> np.ndarray:
    """Return which targets of rows of `sequences` random traffic exposed, bool [T]: none, in a partition that was
    published before it could say so.
    """
    if "target_is_random" not in rows.column_names:
        return np.zeros(len(rows["target_label"].combine_chunks().flatten()), bool)
    return rows["target_is_random"].combine_chunks().flatten().to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Padding:
    """Which part of a batch of a fixed size is real, as tensors: a recorded step reads them anew, and no list.

    Attributes:
        count: float32 [4], the targets and the events that count, which come first, and those of the global batch.
        event_weight: float32 [E], target_weight: float32 [T]; 1, or 0 for padding.
        event_begin: int64 [T], the place among the E events of each target's user's first one.
        work, codes: what the fused passes work on (`Work`, `CodeWork` of training/model/), None where they do not run.
    """

    count: Array
    event_weight: Array
    target_weight: Array
    event_begin: Array
    work: Any = None
    codes: Any = None


@dataclass(frozen=True)
class Batch:
    """What one step reads; numpy here, tensors after `Batch.to`.

    Attributes:
        items: features of the N distinct items of the batch.
        event_item: int64 [E] and target_item: int64 [T], positions among the N distinct items.
        event_interaction: int64 [E]; event_time_ms: int64 [E].
        event_start, target_start: python lists [U + 1]; cut_offs: python list [U], distinct target_end of each user.
        target_time_ms, target_context, target_first, target_end: int64 [T]; target_label: float32 [T]; the context as
            its row. A target sees the events [first, end) of its user's part.
        shared_from: python list [U], the largest target_first of each user; 0: all of them see the user's part from its
            beginning.
        user_rows: int64 [T, F].
        padding: of a batch of a fixed size.
    """

    items: ItemFeatures
    event_item: Array
    event_interaction: Array
    event_time_ms: Array
    event_start: list[int]
    target_item: Array
    target_time_ms: Array
    target_context: Array
    target_first: Array
    target_end: Array
    target_label: Array
    user_rows: Array
    target_start: list[int]
    cut_offs: list[int]
    shared_from: list[int]
    padding: Padding | None = None

    def to(self, device: str) -> Batch:
        """Return the same batch as tensors on `device`."""
        rest = {name: moved(getattr(self, name), device) for name in self.__dataclass_fields__ if name != "items"}
        return Batch(items=self.items.to(device), **rest)


@dataclass(frozen=True)
class Joined:
    """A partition's rows joined to a model's vocabulary.

    Attributes:
        items: features of the partition's N items; user_rows: int64 [U, F]; context_row: int64 [T].
    """

    sequences: Sequences
    items: ItemFeatures
    user_rows: np.ndarray
    context_row: np.ndarray

    @staticmethod
    def of(sequences: Sequences, items: pa.Table | ItemFeatures, vocabulary: Vocabulary) -> Joined:
        """Join rows of a partition.

        Args:
            items: of the partition; their features, where several parts of its rows are joined one after another.
        """
        return Joined(
            sequences,
            vocabulary.item_features(items) if isinstance(items, pa.Table) else items,
            vocabulary.user_rows(sequences.user_fields),
            vocabulary.context_rows(sequences.target_context),
        )


@dataclass(frozen=True)
class Spans:
    """Targets of some users laid out one user after another, and the events that any of them may see.

    Attributes:
        target: int64 [T]; count: int64 [U], targets of each user.
        target_first, target_end: int64 [T]: events that each target sees, counted in its user's history.
        first, end: int64 [U]: events of the user's history; last_first: the largest of the targets' first ones.
    """

    target: np.ndarray
    count: np.ndarray
    target_first: np.ndarray
    target_end: np.ndarray
    first: np.ndarray
    last_first: np.ndarray
    end: np.ndarray

    @staticmethod
    def of(sequences: Sequences, target_T: np.ndarray, count_U: np.ndarray) -> Spans:
        """Lay out targets (positions in the flat target arrays, one user after another, so many of each)."""
        first_T, end_T = sequences.target_first[target_T], sequences.target_end[target_T]
        some_U, begins = count_U > 0, (count_U.cumsum() - count_U)[count_U > 0]
        first_U, last_first_U, end_U = (np.zeros(len(count_U), np.int64) for _ in range(3))
        if len(begins):
            first_U[some_U] = np.minimum.reduceat(first_T, begins)
            last_first_U[some_U] = np.maximum.reduceat(first_T, begins)
            end_U[some_U] = np.maximum.reduceat(end_T, begins)
        return Spans(target_T, count_U, first_T, end_T, first_U, last_first_U, end_U)


@dataclass(frozen=True)
class Chosen:
    """Users of a batch and the targets drawn for each, one after another.

    A history is cut to the events that any of the chosen targets may see.

    Attributes:
        users: int64 [U]; target: int64 [T], positions in the flat target arrays.
        target_start, event_start: int64 [U + 1], offsets into the batch's targets and events.
        first: int64 [U], the first event of each user that the batch holds, counted in the user's history.
        source: int64 [U], the same event's position in the flat history arrays.
        cut_offs, shared_from: int64 [U], as in `Batch`.
        pairs: of a target and an event that it sees.
    """

    users: np.ndarray
    target: np.ndarray
    target_start: np.ndarray
    event_start: np.ndarray
    first: np.ndarray
    source: np.ndarray
    cut_offs: np.ndarray
    shared_from: np.ndarray
    pairs: int

    @staticmethod
    def of(sequences: Sequences, users: np.ndarray, targets: list[np.ndarray]) -> Chosen:
        """Lay out users with the given targets (positions in the flat target arrays, one array a user)."""
        counts = np.array([len(chosen) for chosen in targets], np.int64)
        spans = Spans.of(sequences, np.concatenate(targets) if targets else np.zeros(0, np.int64), counts)
        width = int(spans.end.max(initial=0)) + 1
        cut_off_T = np.repeat(np.arange(len(users)) * width, spans.count) + spans.target_end
        cut_off_T.sort(kind="stable")  # targets in order of time are sorted already, which this sort makes use of
        another_T = np.ones(len(cut_off_T), bool)
        another_T[1:] = cut_off_T[1:] != cut_off_T[:-1]
        distinct = cut_off_T[another_T] // width
        return Chosen(
            users=users,
            target=spans.target,
            target_start=np.concatenate([[0], spans.count.cumsum()]),
            event_start=np.concatenate([[0], (spans.end - spans.first).cumsum()]),
            first=spans.first,
            source=sequences.history_start[users] + spans.first,
            cut_offs=np.bincount(distinct, minlength=len(users)),
            shared_from=spans.last_first - spans.first,
            pairs=int(spans.target_end.sum() - spans.target_first.sum()),
        )

    def padded(self, users: int, events: int, targets: int) -> Chosen:
        """Return the same with empty users up to `users`, and two more, up to `events` and `targets` of all users.

        One has events that no target sees, one has targets (number 0, whatever that is) that may see no event.
        """
        more = users - len(self.users) + 2
        ends = self.event_start[-1:], self.target_start[-1:]
        empty = np.zeros(more, np.int64)
        return Chosen(
            users=np.concatenate([self.users, empty]),
            target=np.concatenate([self.target, np.zeros(targets - len(self.target), np.int64)]),
            target_start=np.concatenate([self.target_start, ends[1].repeat(more - 1), [targets]]),
            event_start=np.concatenate([self.event_start, ends[0].repeat(more - 2), [events, events]]),
            first=np.concatenate([self.first, empty]),
            source=np.concatenate([self.source, empty]),
            cut_offs=np.concatenate([self.cut_offs, empty]),
            shared_from=np.concatenate([self.shared_from, empty]),
            pairs=self.pairs,
        )

    def events(self) -> np.ndarray:
        """Return the positions of the batch's events in the flat history arrays, int64 [E]."""
        return consecutive(self.source, np.diff(self.event_start))


def consecutive(first_X: np.ndarray | int, count_X: np.ndarray) -> np.ndarray:
    """Return `count` whole numbers from each `first` on, one run after another, int64."""
    return np.arange(count_X.sum()) + (first_X - (count_X.cumsum() - count_X)).repeat(count_X)


def make_batch(joined: Joined, users: np.ndarray, targets: list[np.ndarray]) -> Batch:
    """Gather the rows of `users` with the given targets (positions in the flat target arrays, one array a user)."""
    sequences = joined.sequences
    chosen = Chosen.of(sequences, users, targets)
    events, target, counts = chosen.events(), chosen.target, np.diff(chosen.target_start)
    distinct, inverse = _distinct(items_read(sequences, events, target), joined.items.count)
    begin = np.repeat(chosen.first, counts)
    return Batch(
        items=joined.items.take(distinct),
        event_item=inverse[: len(events)],
        event_interaction=sequences.history_interaction[events].astype(np.int64),
        event_time_ms=sequences.history_time_ms[events],
        event_start=chosen.event_start.tolist(),
        target_item=inverse[len(events) :],
        target_time_ms=sequences.target_time_ms[target],
        target_context=joined.context_row[target],
        target_first=sequences.target_first[target].astype(np.int64) - begin,
        target_end=sequences.target_end[target].astype(np.int64) - begin,
        target_label=sequences.target_label[target].astype(np.float32),
        user_rows=np.repeat(joined.user_rows[users], counts, axis=0),
        target_start=chosen.target_start.tolist(),
        cut_offs=chosen.cut_offs.tolist(),
        shared_from=chosen.shared_from.tolist(),
    )


def items_read(sequences: Sequences, events: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the items of some events and targets, int32 [E + T]."""
    return np.concatenate([sequences.history_item[events], sequences.target_item[targets]])


def _distinct(read: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct of some of a partition's `items`, in order, and the place of each among them."""
    is_read = marked(read, items)
    if is_read is None:
        distinct, place = np.unique(read, return_inverse=True)
        return distinct, place.astype(np.int64)
    return np.flatnonzero(is_read), (is_read.cumsum() - 1)[read]


def distinct_of(values: np.ndarray) -> np.ndarray:
    """Return what `np.unique` does: that has a hash table, and takes 20 times as long where most values differ."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]


def marked(read: np.ndarray, items: int) -> np.ndarray | None:
    """Return which of a partition's items are read, bool [N]; None where a table of all would be most of the work."""
    if items > 8 * len(read):
        return None
    is_read = np.zeros(items, np.bool_)
    is_read[read] = True
    return is_read


@dataclass(frozen=True)
class Split:
    """Positions of targets in the flat target arrays.

    Attributes:
        held_out: how the validation targets were chosen, in words.
    """

    train: np.ndarray
    validation: np.ndarray
    evaluation: np.ndarray
    held_out: str


def split_targets(sequences: Sequences, validation_share: float, seed: int) -> Split:
    """Split as the partition says.

    Where it has no validation targets, those of the last training day are held out, as the evaluation's are of a later
    day than all others.

    Args:
        validation_share: held out at random where all training targets are of one UTC day.
        seed: of that draw.
    """
    split = sequences.target_split
    train, validation = np.flatnonzero(split == TRAIN), np.flatnonzero(split == VALIDATION)
    held_out = "those that the partition holds out"
    if not len(validation) and len(train):
        day = sequences.target_time_ms[train] // MS_PER_DAY
        last, name = day.max(), f"{np.datetime64(int(day.max()), 'D')}"
        held, held_out = day == last, f"those of the last training day, {name}"
        if held.all():
            held = np.random.default_rng(seed).random(len(train)) < validation_share
            held_out = f"a random {validation_share:.0%}, since {name} is the only training day"
        train, validation = train[~held], train[held]
    return Split(train, validation, np.flatnonzero(split == EVALUATION), held_out)


def trained_rows(joined: Joined, targets: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray], np.ndarray]:
    """Return the embedding rows that some of these targets read.

    Of each item field, of each user field, and of contexts.
    """
    sequences = joined.sequences
    owner = np.searchsorted(sequences.target_start, targets, side="right") - 1
    seen_U = np.zeros(sequences.users, np.int64)
    np.maximum.at(seen_U, owner, sequences.target_end[targets].astype(np.int64))
    length_U = np.diff(sequences.history_start)
    events = sequences.history_item[consecutive(0, length_U) < seen_U.repeat(length_U)]
    items = distinct_of(np.concatenate([events, sequences.target_item[targets]]))
    users = joined.user_rows[np.unique(owner)]
    fields = {name: distinct_of(rows[items].ravel()) for name, rows in joined.items.rows.items()}
    return fields, [np.unique(column) for column in users.T], np.unique(joined.context_row[targets])

"""User rows as jagged arrays: every history once, all targets of a user beside it, no padding to the longest.

Legend: U users, E events (flat over users), T targets (flat), N distinct items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from etl.warehouse.partitions import MS_PER_DAY
from etl.warehouse.schemas import EVALUATION, TRAIN, VALIDATION, WATCH_BUCKETS, history_first
from training.vocabulary import Array, ItemFeatures, Vocabulary

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

    def to(self, device: str) -> Batch:
        """Return the same batch as tensors on `device`."""
        import torch

        def move(value):
            return (
                torch.from_numpy(np.ascontiguousarray(value)).to(device, non_blocking=True)
                if isinstance(value, np.ndarray)
                else value
            )

        rest = {name: move(getattr(self, name)) for name in self.__dataclass_fields__ if name != "items"}
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
    def of(sequences: Sequences, items: pa.Table, vocabulary: Vocabulary) -> Joined:
        return Joined(
            sequences,
            vocabulary.item_features(items),
            vocabulary.user_rows(sequences.user_fields),
            vocabulary.context_rows(sequences.target_context),
        )


def make_batch(joined: Joined, users: np.ndarray, targets: list[np.ndarray]) -> Batch:
    """Gather the rows of `users` with the given targets (positions in the flat target arrays, one array a user).

    A history is cut to the events that any of the chosen targets may see.
    """
    sequences = joined.sequences
    firsts = [int(sequences.target_first[chosen].min()) if len(chosen) else 0 for chosen in targets]
    ends = [int(sequences.target_end[chosen].max(initial=0)) for chosen in targets]
    spans = [
        np.arange(sequences.history_start[user] + first, sequences.history_start[user] + end)
        for user, first, end in zip(users, firsts, ends, strict=True)
    ]
    events = np.concatenate(spans) if spans else np.zeros(0, np.int64)
    chosen = np.concatenate(targets)
    history_items = sequences.history_item[events]
    distinct, inverse = np.unique(np.concatenate([history_items, sequences.target_item[chosen]]), return_inverse=True)
    counts = [len(c) for c in targets]
    begin = np.repeat(firsts, counts).astype(np.int64)
    return Batch(
        items=joined.items.take(distinct),
        event_item=inverse[: len(events)].astype(np.int64),
        event_interaction=sequences.history_interaction[events].astype(np.int64),
        event_time_ms=sequences.history_time_ms[events],
        event_start=[0, *np.cumsum([len(span) for span in spans]).tolist()],
        target_item=inverse[len(events) :].astype(np.int64),
        target_time_ms=sequences.target_time_ms[chosen],
        target_context=joined.context_row[chosen],
        target_first=sequences.target_first[chosen].astype(np.int64) - begin,
        target_end=sequences.target_end[chosen].astype(np.int64) - begin,
        target_label=sequences.target_label[chosen].astype(np.float32),
        user_rows=np.repeat(joined.user_rows[users], counts, axis=0),
        target_start=[0, *np.cumsum(counts).tolist()],
        cut_offs=[len(np.unique(sequences.target_end[c])) for c in targets],
        shared_from=[
            int(sequences.target_first[c].max(initial=0)) - first for c, first in zip(targets, firsts, strict=True)
        ],
    )


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
    place_E = np.arange(len(sequences.history_item)) - np.repeat(
        sequences.history_start[:-1], np.diff(sequences.history_start)
    )
    events = sequences.history_item[place_E < np.repeat(seen_U, np.diff(sequences.history_start))]
    items = np.union1d(events, sequences.target_item[targets])
    users = joined.user_rows[np.unique(owner)]
    fields = {name: np.unique(rows[items]) for name, rows in joined.items.rows.items()}
    return fields, [np.unique(column) for column in users.T], np.unique(joined.context_row[targets])


class UserBatches:
    """Batches of one worker: its part of global batches that do not depend on how many workers share them.

    Args:
        users_per_step: visits of users in a global batch, of all workers together.
        seed: of the order of visits, and of the parts of a user's targets.
    """

    def __init__(self, joined: Joined, rank: int, world: int, users_per_step: int, seed: int) -> None:
        self.joined = joined
        self.rank, self.world, self.users_per_step, self.seed = rank, world, users_per_step, seed

    def by_user(self, targets: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Group sorted target positions by user: the users that have any, and their positions."""
        owner = np.searchsorted(self.joined.sequences.target_start, targets, side="right") - 1
        users, first = np.unique(owner, return_index=True)
        return users, np.split(targets, first[1:])

    def epoch(self, targets: np.ndarray, epoch: int, targets_per_visit: int, min_steps: int = 1) -> Epoch:
        """Return the batches of an epoch: passes over the targets until there are `min_steps`."""
        return Epoch(self, *self.by_user(targets), epoch, targets_per_visit, min_steps)

    def all_of(self, targets: np.ndarray) -> Iterator[Batch]:
        """Yield batches that hold every target of this worker's share of the users once, in (user, target) order."""
        users, positions = self.by_user(targets)
        mine = np.arange(len(users))[self.rank :: self.world]
        at_once = -(-self.users_per_step // self.world)
        for start in range(0, len(mine), at_once):
            part = mine[start : start + at_once]
            yield make_batch(self.joined, users[part], [positions[i] for i in part])


class Epoch:
    """This worker's batches of one epoch, by their number; None where the global batch has no visit for this worker.

    A pass over the targets has each of them once: a user with more than `targets_per_visit` is visited several times,
    with random parts of nearly equal size. The parts are keyed by seed, epoch, pass and user, the order of all visits
    by seed, epoch and pass: any number of workers sees the same global batches, and a training that goes on in the
    middle of an epoch sees those that it had not seen.
    """

    def __init__(
        self,
        batches: UserBatches,
        users: np.ndarray,
        positions: list[np.ndarray],
        number: int,
        targets_per_visit: int,
        min_steps: int,
    ) -> None:
        self.batches, self.users, self.positions = batches, users, positions
        self.visits = np.array([-(-len(targets) // targets_per_visit) for targets in positions], np.int64)  # a user
        self.steps_per_pass = -(-int(self.visits.sum()) // batches.users_per_step)
        self.passes = max(1, -(-min_steps // max(1, self.steps_per_pass)))
        self.key = [batches.seed, number]
        self._ordered = -1, np.zeros((0, 2), np.int64)  # the last pass that was asked for, and its order

    def __len__(self) -> int:
        return self.passes * self.steps_per_pass

    def __getitem__(self, number: int) -> Batch | None:
        users, targets = self._visited(number, self.batches.rank, self.batches.world)
        return make_batch(self.batches.joined, users, targets) if len(users) else None

    def items(self, number: int) -> ItemFeatures:
        """Return the features of the distinct items of the whole global batch, in the partition's order."""
        return make_batch(self.batches.joined, *self._visited(number, 0, 1)).items

    def _visited(self, number: int, rank: int, world: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the users of a worker's part of a global batch, and the target positions of each visit."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        turn, place = divmod(number, self.steps_per_pass)
        start = place * self.batches.users_per_step
        mine = self._order(turn)[start : start + self.batches.users_per_step][rank::world]
        return self.users[mine[:, 0]], [self._part(turn, int(index), int(part)) for index, part in mine]

    def _order(self, turn: int) -> np.ndarray:
        """Return the visits of a pass in their order: rows of (index of the user, number of the part)."""
        if self._ordered[0] != turn:
            index = np.repeat(np.arange(len(self.users)), self.visits)
            part = np.arange(len(index)) - np.repeat(np.cumsum(self.visits) - self.visits, self.visits)
            order = np.random.default_rng([*self.key, turn]).permutation(len(index))
            self._ordered = turn, np.stack([index, part], axis=1)[order]
        return self._ordered[1]

    def _part(self, turn: int, index: int, part: int) -> np.ndarray:
        positions, parts = self.positions[index], int(self.visits[index])
        if parts == 1:
            return positions
        # An id may be negative, a key may not.
        user = int(self.batches.joined.sequences.user_id[self.users[index]]) % 2**64
        shuffled = np.random.default_rng([*self.key, turn, user]).permutation(positions)
        return np.sort(shuffled[part::parts])

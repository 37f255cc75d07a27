"""Pure functions from one bucket's events to rows of `sequences`: histories once, every target with its cut-off.

Legend: U users with a target, E their events, T targets. A bucket's table has days in order, each sorted by user and
time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from etl.datasets.definition import DatasetDefinition, History, Positions
from etl.sequences.items import TABLE_ENTRIES_PER_EVENT
from etl.sequences.negatives import Met, Positives, Visible, sample_negatives
from etl.warehouse.partitions import MS_PER_DAY, Window, day_number
from etl.warehouse.schemas import EVALUATION, SEQUENCES, TRAIN, VALIDATION, WATCH_RATIO_EDGES, history_first


def sequence_rows(
    events: pa.Table,
    item_ids: np.ndarray,
    train_occurrences: np.ndarray,
    users: dict[int, list[str]],
    window: Window,
    definition: DatasetDefinition,
) -> tuple[pa.Table, dict[str, int]]:
    """Turn one bucket's events into rows with the SEQUENCES schema.

    Args:
        events: with the EVENTS schema.
        item_ids: int64 [N], sorted; an item's index is its position.
        train_occurrences: int64 [N], its events before the evaluation days.
        users: user id -> field values.

    Returns:
        the rows, sorted by user, and their counts.
    """
    owned = Owned.of(events, item_ids, window, definition)
    logged = np.flatnonzero(owned.split >= 0)
    histories, end = stored_histories(owned, logged, definition)
    targets = _logged_targets(events, owned, logged, end, definition)
    missing = 0
    if (rule := definition.targets.negatives) is not None:
        met = Met(owned.owner, owned.item, owned.time_ms)
        visible = Visible(
            owned.item[histories.event],
            histories.start[targets.owner] + history_first(end, definition.history.max_events),
            histories.start[targets.owner] + end,
        )
        drawn = sample_negatives(
            rule, day_number(window.dt), train_occurrences, met, _positives(targets, owned.user_id), visible
        )
        targets, missing = targets.with_negatives(drawn), int((drawn < 0).sum())
    sizes = np.bincount(targets.split, minlength=3) if len(targets.split) else np.zeros(3, int)
    counts = {
        "users": len(owned.user_id),
        "targets": len(targets.split),
        "train_targets": int(sizes[TRAIN]),
        "validation_targets": int(sizes[VALIDATION]),
        "eval_targets": int(sizes[EVALUATION]),
        "history_events": int(histories.start[-1]),
        "truncated_users": histories.truncated,
        "negatives": len(targets.split) - len(logged),
        "negatives_missing": missing,
    }
    return _table(events, owned, histories, targets, users, definition), counts


@dataclass(frozen=True)
class Owned:
    """The events of the users who have a target, by user and time: users without one have no row.

    Attributes:
        user_id: int64 [U], ascending.
        row: int64 [E], place of the event in the bucket's table. owner: int64 [E], position of its user.
        item: int32 [E], index of its item. time_ms: int64 [E]. feedback: int16 [E].
        split: int8 [E], as `target_splits` gives it.
    """

    user_id: np.ndarray
    row: np.ndarray
    owner: np.ndarray
    item: np.ndarray
    time_ms: np.ndarray
    feedback: np.ndarray
    split: np.ndarray

    @staticmethod
    def of(events: pa.Table, item_ids: np.ndarray, window: Window, definition: DatasetDefinition) -> Owned:
        user = events["user_id"].to_numpy()
        # Stable: days stand in order, and a day's rows of a user in the order of time.
        row = np.argsort(user, kind="stable")
        user = user[row]
        time_ms, feedback = events["event_time_ms"].to_numpy()[row], events["feedback"].to_numpy()[row]
        split = target_splits(user, time_ms, feedback, window, definition)
        user_id = np.unique(user[split >= 0])
        owner = np.minimum(np.searchsorted(user_id, user), max(len(user_id) - 1, 0))
        here = user_id[owner] == user if len(user_id) else np.zeros(len(user), dtype=bool)
        row = row[here]
        item = item_indices(events["item_id"].to_numpy()[row], item_ids)
        return Owned(user_id, row, owner[here], item, time_ms[here], feedback[here], split[here])


@dataclass(frozen=True)
class Histories:
    """What is stored of the users' histories.

    Attributes:
        event: int64, positions among the E events, user after user.
        start: int64 [U + 1], offsets of the users in `event`.
        truncated: users whose last target sees only the newest of the events before it.
    """

    event: np.ndarray
    start: np.ndarray
    truncated: int


def stored_histories(owned: Owned, target: np.ndarray, definition: DatasetDefinition) -> tuple[Histories, np.ndarray]:
    """Return the histories, and how many stored events lie before each target's cut-off, int64 [T].

    Stored is what any target of the user sees: from max_events before the first one on. `history_first` bounds the
    later ones.

    Args:
        target: int64 [T], positions of the targets among the E events.
    """
    of_history, users = definition.bits(definition.history.of), np.arange(len(owned.user_id) + 1)
    seen = np.arange(len(owned.owner)) if of_history is None else np.flatnonzero(owned.feedback & of_history)
    start, owner = np.searchsorted(owned.owner[seen], users), owned.owner[target]
    end = visible_ends(owned.owner[seen], owned.time_ms[seen], start, owner, owned.time_ms[target], definition.history)
    of_user, most = np.searchsorted(owner, users), definition.history.max_events
    first_end, last_end = end[of_user[:-1]], end[of_user[1:] - 1]
    trim = history_first(first_end, most)
    lengths = last_end - trim
    stored = np.concatenate([[0], np.cumsum(lengths)])
    event = seen[np.repeat(start[:-1] + trim - stored[:-1], lengths) + np.arange(stored[-1])]
    return Histories(event, stored, int((last_end > most).sum())), end - trim[owner]


@dataclass(frozen=True)
class Targets:
    """The targets of all users, one after another.

    Attributes:
        owner: int64 [T], position of its user, ascending. item: int32 [T]. time_ms: int64 [T]. split: int8 [T].
        context: int16 [T]. is_random: bool [T]. label: int8 [T].
        end: int64 [T], stored events of the user that lie before its cut-off.
    """

    owner: np.ndarray
    item: np.ndarray
    time_ms: np.ndarray
    split: np.ndarray
    context: np.ndarray
    is_random: np.ndarray
    label: np.ndarray
    end: np.ndarray

    def with_negatives(self, drawn: np.ndarray) -> Targets:
        """Return each target with label 1, and what was drawn for it behind it with label 0.

        Args:
            drawn: int32 [T, per_positive], -1 where nothing was found.
        """
        wide = np.concatenate([self.item[:, None], drawn], 1)
        there = wide >= 0
        label = (np.arange(wide.shape[1]) == 0).astype(np.int8) * np.ones((len(wide), 1), np.int8)
        owner, time_ms, split, context, is_random, end = (
            np.repeat(v, there.sum(1))
            for v in (self.owner, self.time_ms, self.split, self.context, self.is_random, self.end)
        )
        return Targets(owner, wide[there], time_ms, split, context, is_random, label[there], end)


def _logged_targets(
    events: pa.Table, owned: Owned, target: np.ndarray, end: np.ndarray, definition: DatasetDefinition
) -> Targets:
    feedback, bit = owned.feedback[target], definition.label_bit
    label = np.ones(len(target), np.int8) if bit is None else (feedback >> bit & 1).astype(np.int8)
    row = owned.row[target]
    context, is_random = (events[name].to_numpy()[row] for name in ("context", "is_random"))
    owner, item, time_ms = owned.owner[target], owned.item[target], owned.time_ms[target]
    return Targets(owner, item, time_ms, owned.split[target], context, is_random, label, end)


def _positives(targets: Targets, user_id: np.ndarray) -> Positives:
    start = np.searchsorted(targets.owner, np.arange(len(user_id) + 1))
    number = np.arange(len(targets.owner)) - start[targets.owner]
    return Positives(targets.owner, user_id[targets.owner], number, targets.item, targets.time_ms)


def _table(
    events: pa.Table,
    owned: Owned,
    histories: Histories,
    targets: Targets,
    users: dict[int, list[str]],
    definition: DatasetDefinition,
) -> pa.Table:
    """Return a row a user with the SEQUENCES schema."""

    def lists(values: np.ndarray, offsets: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))

    none = [""] * len(definition.user_fields)
    event, start = histories.event, histories.start
    target_start = np.searchsorted(targets.owner, np.arange(len(owned.user_id) + 1))
    row = owned.row[event]
    watch = watch_bucket(events["watch_time_ms"].to_numpy()[row], events["duration_ms"].to_numpy()[row])
    return pa.table(
        {
            "user_id": pa.array(owned.user_id, pa.int64()),
            "user_fields": pa.array([users.get(int(u), none) for u in owned.user_id], pa.list_(pa.string())),
            "history_item_index": lists(owned.item[event], start, pa.int32()),
            "history_time_ms": lists(owned.time_ms[event], start, pa.int64()),
            "history_feedback": lists(owned.feedback[event], start, pa.int16()),
            "history_watch_bucket": lists(watch, start, pa.int8()),
            "target_item_index": lists(targets.item, target_start, pa.int32()),
            "target_time_ms": lists(targets.time_ms, target_start, pa.int64()),
            "target_label": lists(targets.label, target_start, pa.int8()),
            "target_context": lists(targets.context, target_start, pa.int16()),
            "target_is_random": lists(targets.is_random, target_start, pa.bool_()),
            "target_split": lists(targets.split, target_start, pa.int8()),
            "target_history_end": lists(targets.end.astype(np.int32), target_start, pa.int32()),
        },
        schema=SEQUENCES,
    )


def target_splits(
    user: np.ndarray, time_ms: np.ndarray, feedback: np.ndarray, window: Window, definition: DatasetDefinition
) -> np.ndarray:
    """Return int8 [E]: TRAIN, VALIDATION or EVALUATION where the event is a target, else -1.

    Args:
        user: int64 [E], ascending; time_ms: int64 [E], ascending within a user; feedback: int16 [E].
    """
    rule = definition.targets
    of = definition.bits(rule.of)
    may = np.ones(len(user), dtype=bool) if of is None else (feedback & of) != 0
    candidate = np.flatnonzero(may)
    split = np.full(len(user), -1, dtype=np.int8)
    _, first, count = np.unique(user[candidate], return_index=True, return_counts=True)
    enough = np.repeat(count >= rule.min_events, count)
    if rule.positions is None:
        chosen = candidate[enough & (time_ms[candidate] >= day_number(window.first_target_dt) * MS_PER_DAY)]
        split[chosen] = np.where(
            time_ms[chosen] >= day_number(window.first_evaluation_dt) * MS_PER_DAY, EVALUATION, TRAIN
        )
        return split
    from_end = np.arange(len(candidate)) - np.repeat(first + count, count)  # -1 is the user's last
    split[candidate] = np.where(enough, _by_position(from_end, rule.positions), -1)
    return split


def _by_position(from_end: np.ndarray, positions: Positions) -> np.ndarray:
    deepest = -min(*positions.train, *positions.validation, *positions.evaluation, -1)
    table = np.full(deepest + 1, -1, dtype=np.int8)
    for code, places in (
        (TRAIN, positions.train),
        (VALIDATION, positions.validation),
        (EVALUATION, positions.evaluation),
    ):
        table[[-place for place in places]] = code
    return np.where(-from_end <= deepest, table[np.minimum(-from_end, deepest)], -1).astype(np.int8)


def item_indices(item: np.ndarray, item_ids: np.ndarray) -> np.ndarray:
    """Return int32 positions of items among `item_ids`, which is sorted and holds them all."""
    first, last = (int(item_ids[0]), int(item_ids[-1])) if len(item_ids) else (0, 0)
    if last - first >= TABLE_ENTRIES_PER_EVENT * len(item):
        return np.searchsorted(item_ids, item).astype(np.int32)
    table = np.zeros(last - first + 1, dtype=np.int32)  # dense ids: 20 times faster than searching
    table[item_ids - first] = np.arange(len(item_ids), dtype=np.int32)
    return table[item - first]


def cut_offs_ms(target_time_ms: np.ndarray, history: History) -> np.ndarray:
    """Return the times before which an event has to lie to be seen, int64 [T]."""
    start = target_time_ms // MS_PER_DAY * MS_PER_DAY if history.cutoff == "day_start" else target_time_ms
    return start - history.availability_lag_ms


def visible_ends(
    owner: np.ndarray,
    time_ms: np.ndarray,
    start: np.ndarray,
    target_owner: np.ndarray,
    target_time_ms: np.ndarray,
    history: History,
) -> np.ndarray:
    """Return, per target, how many events of its user's history it may see: those strictly before its cut-off.

    Args:
        owner: int64 [E], position of the event's user, ascending; time_ms: int64 [E], ascending within a user.
        start: int64 [U + 1], offsets of the users.
    """
    cut = cut_offs_ms(target_time_ms, history)
    # (user, time) as one ascending number, so that one search serves all users.
    base = int(min(time_ms.min(initial=0), cut.min(initial=0)))
    span = int(max(time_ms.max(initial=0), cut.max(initial=0))) - base + 1
    return (
        np.searchsorted(owner * span + (time_ms - base), target_owner * span + (cut - base), side="left")
        - start[target_owner]
    )


def watch_bucket(watch_time_ms: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
    """Return int8 buckets of watch_time / duration (see schemas.WATCH_RATIO_EDGES)."""
    ratio = watch_time_ms / np.maximum(duration_ms, 1)
    bucket = 2 + np.searchsorted(np.array(WATCH_RATIO_EDGES), ratio, side="right")
    bucket = np.where(watch_time_ms <= 0, 1, bucket)
    return np.where(duration_ms <= 0, 0, bucket).astype(np.int8)

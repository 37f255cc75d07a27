"""Pure functions from one bucket's events to rows of `sequences`: histories once, every target with its cut-off.

Legend: E events of the bucket (days in order, each sorted by user and time), U users with a target, T targets.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from etl.datasets.definition import DatasetDefinition, History, Positions
from etl.sequences.items import TABLE_ENTRIES_PER_EVENT
from etl.sequences.negatives import sample_negatives
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
    user = events["user_id"].to_numpy()
    order = np.argsort(user, kind="stable")
    user, time_ms, feedback = (
        user[order],
        events["event_time_ms"].to_numpy()[order],
        events["feedback"].to_numpy()[order],
    )
    split = target_splits(user, time_ms, feedback, window, definition)
    # Users without a target have no row.
    owners = np.unique(user[split >= 0])
    place = np.minimum(np.searchsorted(owners, user), max(len(owners) - 1, 0))
    keep = owners[place] == user if len(owners) else np.zeros(len(user), dtype=bool)
    order, owner, time_ms, feedback, split = order[keep], place[keep], time_ms[keep], feedback[keep], split[keep]
    index = item_indices(events["item_id"].to_numpy()[order], item_ids)

    of_history = definition.bits(definition.history.of)
    seen = np.arange(len(owner)) if of_history is None else np.flatnonzero(feedback & of_history)
    start = np.searchsorted(owner[seen], np.arange(len(owners) + 1))
    target = np.flatnonzero(split >= 0)
    target_owner = owner[target]
    target_start = np.searchsorted(target_owner, np.arange(len(owners) + 1))
    end = visible_ends(owner[seen], time_ms[seen], start, target_owner, time_ms[target], definition.history)
    # Stored is what any target of the user sees: from max_events before the first one on. `history_first` bounds the
    # later ones.
    most = definition.history.max_events
    first_end, last_end = end[target_start[:-1]], end[target_start[1:] - 1]
    trim = history_first(first_end, most)
    lengths = last_end - trim
    history_start = np.concatenate([[0], np.cumsum(lengths)])
    history = seen[np.repeat(start[:-1] + trim - history_start[:-1], lengths) + np.arange(history_start[-1])]
    end = end - trim[target_owner]

    target_item, target_time, target_split = index[target], time_ms[target], split[target]
    context = events["context"].to_numpy()[order][target]
    label = (
        np.ones(len(target), np.int8)
        if definition.label_bit is None
        else (feedback[target] >> definition.label_bit & 1).astype(np.int8)
    )
    negatives = missing = 0
    if definition.targets.negatives is not None:
        drawn = sample_negatives(
            definition.targets.negatives,
            day_number(window.dt),
            train_occurrences,
            owner,
            index,
            time_ms,
            target_owner,
            owners[target_owner],
            np.arange(len(target)) - target_start[target_owner],
            target_item,
            target_time,
            index[history],
            history_start[target_owner] + history_first(end, most),
            history_start[target_owner] + end,
        )
        wide = np.concatenate([target_item[:, None], drawn], 1)
        there = wide >= 0
        repeat = there.sum(1)
        negatives, missing = int((there[:, 1:]).sum()), int((~there).sum())
        label = (np.arange(wide.shape[1]) == 0).astype(np.int8) * np.ones((len(wide), 1), np.int8)
        target_item, label = wide[there], label[there]
        target_owner, target_time, target_split, context, end = (
            np.repeat(v, repeat) for v in (target_owner, target_time, target_split, context, end)
        )
        target_start = np.searchsorted(target_owner, np.arange(len(owners) + 1))

    def lists(values: np.ndarray, offsets: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))

    none = [""] * len(definition.user_fields)
    watch = watch_bucket(
        events["watch_time_ms"].to_numpy()[order[history]], events["duration_ms"].to_numpy()[order[history]]
    )
    rows = pa.table(
        {
            "user_id": pa.array(owners, pa.int64()),
            "user_fields": pa.array([users.get(int(u), none) for u in owners], pa.list_(pa.string())),
            "history_item_index": lists(index[history], history_start, pa.int32()),
            "history_time_ms": lists(time_ms[history], history_start, pa.int64()),
            "history_feedback": lists(feedback[history], history_start, pa.int16()),
            "history_watch_bucket": lists(watch, history_start, pa.int8()),
            "target_item_index": lists(target_item, target_start, pa.int32()),
            "target_time_ms": lists(target_time, target_start, pa.int64()),
            "target_label": lists(label, target_start, pa.int8()),
            "target_context": lists(context, target_start, pa.int16()),
            "target_split": lists(target_split, target_start, pa.int8()),
            "target_history_end": lists(end.astype(np.int32), target_start, pa.int32()),
        },
        schema=SEQUENCES,
    )
    sizes = np.bincount(target_split, minlength=3) if len(target_split) else np.zeros(3, int)
    counts = {
        "users": len(owners),
        "targets": len(target_split),
        "train_targets": int(sizes[TRAIN]),
        "validation_targets": int(sizes[VALIDATION]),
        "eval_targets": int(sizes[EVALUATION]),
        "history_events": int(history_start[-1]),
        "truncated_users": int((last_end > most).sum()),
        "negatives": negatives,
        "negatives_missing": missing,
    }
    return rows, counts


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

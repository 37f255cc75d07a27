"""Sampled negatives for logs that hold no exposures: items that stand as targets with label 0 beside each logged
target.

Every draw is a hash of (seed, partition, user, target, slot, round): no state, so buckets, re-runs and neighbours
agree.

Legend: P positives of one bucket, E its events, N items of the partition.
"""

from __future__ import annotations

import numpy as np

from etl.datasets.definition import Negatives

MAX_ROUNDS = 40  # of drawing again what was refused; a user who knows nearly every item gets fewer negatives


def sample_negatives(
    rule: Negatives,
    day: int,
    train_occurrences: np.ndarray,
    event_owner: np.ndarray,
    event_item: np.ndarray,
    event_time_ms: np.ndarray,
    owner: np.ndarray,
    user_id: np.ndarray,
    number: np.ndarray,
    item: np.ndarray,
    time_ms: np.ndarray,
    history_item: np.ndarray,
    visible_from: np.ndarray,
    visible_to: np.ndarray,
) -> np.ndarray:
    """Draw negatives for every positive.

    A drawn item is never one that the user met (any event of the window) at or before the target's time, nor the target
    itself. Items of `own_history` are of the user's past by their nature: for them only the target itself is excluded.

    Args:
        day: day number of the partition.
        train_occurrences: int64 [N], events of each item before the evaluation days; an item without any is never
            drawn, so that nothing of those days reaches the training.
        event_owner, event_item, event_time_ms: int64 [E], all events of the bucket's users.
        owner, user_id, number, item, time_ms: int64 [P]; `number` counts a user's positives from 0.
        history_item: int32, items of the histories, flat; visible_from, visible_to: int64 [P], each positive's part of
            it.

    Returns:
        int32 [P, per_positive] item indices, -1 where no item could be found.
    """
    positives, items = len(owner), len(train_occurrences)
    drawn = np.full((positives, rule.per_positive), -1, dtype=np.int32)
    drawable = np.flatnonzero(train_occurrences)
    if not positives or not len(drawable):
        return drawn
    # (user, item) -> when the user first met it.
    key = event_owner.astype(np.int64) * items + event_item
    order = np.lexsort((event_time_ms, key))
    met_key, first = np.unique(key[order], return_index=True)
    met_ms = event_time_ms[order][first]
    shares = np.array(
        [rule.draw.get("popularity", 0.0), rule.draw.get("uniform", 0.0), rule.draw.get("own_history", 0.0)]
    )
    cumulative_share = np.cumsum(shares) / shares.sum()
    cumulative_occurrences = np.cumsum(train_occurrences[drawable])
    base = _mixed(np.full(positives, rule.seed, dtype=np.int64), np.int64(day), user_id, number)
    for slot in range(rule.per_positive):
        open_ = np.arange(positives)
        for attempt in range(MAX_ROUNDS):
            seed = _mixed(base[open_], np.int64(slot), np.int64(attempt))
            way = np.searchsorted(cumulative_share, _uniform(_mixed(seed, np.int64(1))), side="right")
            u = _uniform(_mixed(seed, np.int64(2)))
            popular = np.searchsorted(cumulative_occurrences, u * cumulative_occurrences[-1], side="right")
            place = np.where(way == 0, popular, (u * len(drawable)).astype(np.int64))
            candidate = drawable[np.minimum(place, len(drawable) - 1)]
            span = visible_to[open_] - visible_from[open_]
            own = (way == 2) & (span > 0)
            position = visible_from[open_] + (u * span).astype(np.int64)
            if own.any():
                candidate[own] = history_item[position[own]]
            place = np.minimum(np.searchsorted(met_key, owner[open_] * items + candidate), len(met_key) - 1)
            met = (met_key[place] == owner[open_] * items + candidate) & (met_ms[place] <= time_ms[open_]) & ~own
            good = ~met & (candidate != item[open_])
            drawn[open_[good], slot] = candidate[good]
            open_ = open_[~good]
            if not len(open_):
                break
    return drawn


def _mixed(state: np.ndarray, *parts: np.ndarray | np.int64) -> np.ndarray:
    """Return int64 hashes (splitmix64) of a state and further numbers."""
    mixed = state.astype(np.int64).view(np.uint64).copy()
    for part in parts:
        mixed += np.atleast_1d(part).astype(np.int64).view(np.uint64) * np.uint64(0xD1342543DE82EF95) + np.uint64(
            0x9E3779B97F4A7C15
        )
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed.view(np.int64)


def _uniform(bits: np.ndarray) -> np.ndarray:
    """Return float64 in [0, 1) from the upper 53 bits."""
    return (bits.view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53

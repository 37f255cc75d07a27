"""Sampled negatives for logs that hold no exposures: items that stand as targets behind each logged target
with label 0.

Every draw is a hash of (seed, partition, user, target, slot, round): no state, so buckets, re-runs and neighbours
agree.

Legend: P positives of one bucket, E its events, N items of the partition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etl.datasets.definition import Negatives

MAX_ROUNDS = 40  # of drawing again what was refused; a user who knows nearly every item gets fewer negatives


@dataclass(frozen=True)
class Met:
    """All events of the bucket's users: which items they have met.

    Attributes:
        owner, item, time_ms: int [E]: position of the event's user, index of its item, Unix milliseconds.
    """

    owner: np.ndarray
    item: np.ndarray
    time_ms: np.ndarray


@dataclass(frozen=True)
class Positives:
    """The logged targets of the bucket.

    Attributes:
        owner, user_id, item, time_ms: int [P], as of `Met`; the user's id is what a draw hangs on, in whichever bucket.
        number: int64 [P], counts a user's positives from 0.
    """

    owner: np.ndarray
    user_id: np.ndarray
    number: np.ndarray
    item: np.ndarray
    time_ms: np.ndarray


@dataclass(frozen=True)
class Visible:
    """The histories that positives see.

    Attributes:
        item: int32, items of all histories, flat.
        first, end: int64 [P], each positive's part of it.
    """

    item: np.ndarray
    first: np.ndarray
    end: np.ndarray


def sample_negatives(
    rule: Negatives, day: int, train_occurrences: np.ndarray, met: Met, positives: Positives, visible: Visible
) -> np.ndarray:
    """Draw negatives for every positive.

    A drawn item is never one that the user met (any event of the window) at or before the target's time, nor the target
    itself. Items of `own_history` are of the user's past by their nature: for them only the target itself is excluded.

    Args:
        day: day number of the partition.
        train_occurrences: int64 [N], events of each item before the evaluation days; an item without any is never
            drawn, so that nothing of those days reaches the training.

    Returns:
        int32 [P, per_positive] item indices, -1 where no item could be found.
    """
    drawn = np.full((len(positives.owner), rule.per_positive), -1, dtype=np.int32)
    if not len(positives.owner) or not train_occurrences.any():
        return drawn
    first_met = _FirstMet.of(met, len(train_occurrences))
    draw = _Draw.of(rule, train_occurrences, visible)
    base = _mixed(np.full(len(drawn), rule.seed, dtype=np.int64), np.int64(day), positives.user_id, positives.number)
    for slot in range(rule.per_positive):
        open_ = np.arange(len(drawn))
        for attempt in range(MAX_ROUNDS):
            candidate, own = draw(_mixed(base[open_], np.int64(slot), np.int64(attempt)), open_)
            met_before = first_met.by(positives.owner[open_], candidate, positives.time_ms[open_])
            good = (own | ~met_before) & (candidate != positives.item[open_])
            drawn[open_[good], slot] = candidate[good]
            open_ = open_[~good]
            if not len(open_):
                break
    return drawn


@dataclass(frozen=True)
class _FirstMet:
    """When each user first met each item, as one sorted column of pairs to be searched.

    Attributes:
        items: N. pair: int64, owner * N + item, ascending. time_ms: int64, of each pair.
    """

    items: int
    pair: np.ndarray
    time_ms: np.ndarray

    @staticmethod
    def of(met: Met, items: int) -> _FirstMet:
        pair = met.owner.astype(np.int64) * items + met.item
        order = np.lexsort((met.time_ms, pair))
        distinct, first = np.unique(pair[order], return_index=True)
        return _FirstMet(items, distinct, met.time_ms[order][first])

    def by(self, owner: np.ndarray, item: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
        """Return whether each user had met an item by a time, that millisecond included."""
        pair = owner * self.items + item
        place = np.minimum(np.searchsorted(self.pair, pair), len(self.pair) - 1)
        return (self.pair[place] == pair) & (self.time_ms[place] <= time_ms)


@dataclass(frozen=True)
class _Draw:
    """The three ways to draw an item.

    Attributes:
        until: float64 [3], cumulative shares of the ways: popularity, uniform, own history.
        drawable: int64, items with events in training. popularity: int64, their events, summed up.
    """

    until: np.ndarray
    drawable: np.ndarray
    popularity: np.ndarray
    visible: Visible

    @staticmethod
    def of(rule: Negatives, train_occurrences: np.ndarray, visible: Visible) -> _Draw:
        shares = np.array([rule.draw.get(way, 0.0) for way in ("popularity", "uniform", "own_history")])
        drawable = np.flatnonzero(train_occurrences)
        return _Draw(np.cumsum(shares) / shares.sum(), drawable, np.cumsum(train_occurrences[drawable]), visible)

    def __call__(self, seed: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return an item for each of these positives, and whether it is of the user's own history."""
        way = np.searchsorted(self.until, _uniform(_mixed(seed, np.int64(1))), side="right")
        u = _uniform(_mixed(seed, np.int64(2)))
        popular = np.searchsorted(self.popularity, u * self.popularity[-1], side="right")
        place = np.where(way == 0, popular, (u * len(self.drawable)).astype(np.int64))
        item = self.drawable[np.minimum(place, len(self.drawable) - 1)]
        first, span = self.visible.first[positive], self.visible.end[positive] - self.visible.first[positive]
        # A user without a history gets what was drawn uniformly above.
        own = (way == 2) & (span > 0)
        if own.any():
            item[own] = self.visible.item[(first + (u * span).astype(np.int64))[own]]
        return item, own


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

"""Ranking and probability metrics in numpy, with paired bootstrap intervals that resample users.

Of all targets at once there is one sorted key, 8 bytes each, and what is asked for; all else is done a chunk at a time,
so that 100 million targets take less than 4 GB (benchmarks/evaluation.py).

Legend: T targets, U users, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

PROBABILITY_FLOOR = 1e-7
CALIBRATION_BINS = 10
CHUNK = 1 << 20  # targets
Rows = np.ndarray | None  # bool [T], the targets that count; None: all. A copy of them would take most of the memory
LEAST_USERS = 30  # resamples of fewer say nothing of other users: their intervals are unknown


@dataclass(frozen=True)
class Interval:
    """A value on all targets, and the percentile interval of its bootstrap; bounds of nan are unknown."""

    value: float
    low: float
    high: float


def auc(label: np.ndarray, score: np.ndarray, rows: Rows = None) -> float:
    """Return P(score of a positive > score of a negative), ties counted half; nan without both classes, or of a nan."""
    ranked = _RankedTargets(label, score, np.zeros(len(label), np.int32), rows)
    return float(ranked.auc(np.ones((1, 1), np.uint8))[0])


def user_aucs(
    user: np.ndarray, label: np.ndarray, score: np.ndarray, rows: Rows = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (auc, impressions), float64 [U], of users 0..max(user); nan for users without both classes, and for all
    where a score is nan."""
    users = int(user.max(initial=-1)) + 1
    key = _sorted_key(user, label, score, True, rows)
    pairs, positives, count = np.zeros((3, users))
    start = 0
    while start < len(key):
        # Whole users: the chunk ends before the user of the row behind it, or behind that user if it has but one.
        end = min(start + CHUNK, len(key))
        if end < len(key):
            border = (key[end] >> _USER) << _USER
            before = start + int(np.searchsorted(key[start:end], border))
            end = before if before > start else int(np.searchsorted(key, border + np.uint64(1 << _USER)))
        owner, positive, negative = _ties(key[start:end])
        below = np.cumsum(negative) - negative
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        below -= np.repeat(below[first], np.diff(first, append=len(owner)))
        low, high = int(owner[0]), int(owner[-1]) + 1
        for sums, values in (
            (pairs, positive * (below + negative / 2)),
            (positives, positive),
            (count, positive + negative),
        ):
            sums[low:high] += np.bincount(owner - low, weights=values, minlength=high - low)
        start = end
    both = positives * (count - positives)
    with np.errstate(invalid="ignore", divide="ignore"):
        result = pairs / both
    return np.where((both > 0) & ~_has_nan(score, rows), result, np.nan), count


def gauc(user: np.ndarray, label: np.ndarray, score: np.ndarray) -> tuple[float, int]:
    """Return (mean of the users' AUCs weighted by impressions, number of users with both classes)."""
    return _mean_auc(numbered(user)[1], label, score)


def _mean_auc(user: np.ndarray, label: np.ndarray, score: np.ndarray, rows: Rows = None) -> tuple[float, int]:
    values, count = user_aucs(user, label, score, rows)
    both = ~np.isnan(values)
    return (float(np.average(values[both], weights=count[both])) if both.any() else float("nan")), int(both.sum())


def target_logloss(label: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return float64 [T], -log of the probability given to what happened (clipped at 1e-7)."""
    p = np.clip(score.astype(np.float64), PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return -np.where(label > 0, np.log(p), np.log1p(-p))


def logloss(label: np.ndarray, score: np.ndarray, rows: Rows = None) -> float:
    """Return the mean of `target_logloss`; nan without targets."""
    total = sum(float(target_logloss(*part).sum()) for part in _parts(rows, label, score))
    count = len(label) if rows is None else int(rows.sum())
    return total / count if count else float("nan")


def normalised_entropy(label: np.ndarray, score: np.ndarray) -> float:
    """Return log loss over that of the labels' own rate for every target; nan where a class is missing."""
    rate = float(label.mean()) if len(label) else 0.0
    if not 0 < rate < 1:
        return float("nan")
    return logloss(label, score) / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def figures(user: np.ndarray, label: np.ndarray, score: np.ndarray, rows: Rows = None) -> dict[str, float]:
    """Return {"auc", "gauc", "logloss"}.

    Args:
        user: int32 [T], numbers from 0 on, as `numbered` gives them; some may have no target.
    """
    return {
        "auc": auc(label, score, rows),
        "gauc": _mean_auc(user, label, score, rows)[0],
        "logloss": logloss(label, score, rows),
    }


def calibration(label: np.ndarray, score: np.ndarray) -> dict:
    """Return {"ece", "expected_ratio", "bins"}.

    `expected_ratio` is sum of probabilities / number of positives (1 = calibrated in the mean). `bins` holds up to 10
    groups of equally many targets by score, {"predicted", "observed", "targets"}; `ece` is their mean absolute gap.
    """
    if not len(label):
        return {"ece": float("nan"), "expected_ratio": float("nan"), "bins": []}
    order = np.argsort(score, kind="stable")
    bins = [
        {
            "predicted": float(score[part].mean(dtype=np.float64)),
            "observed": float(label[part].mean()),
            "targets": len(part),
        }
        for part in np.array_split(order, CALIBRATION_BINS)
        if len(part)
    ]
    positives = float(label.sum())
    return {
        "ece": sum(abs(b["predicted"] - b["observed"]) * b["targets"] for b in bins) / len(label),
        "expected_ratio": float(score.sum(dtype=np.float64)) / positives if positives else float("nan"),
        "bins": bins,
    }


def thirds(length: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each third of history length, bool [T]; thirds that ties make empty are left out."""
    edges = np.unique(np.percentile(length, [100 / 3, 200 / 3], method="higher")) if len(length) else np.zeros(0)
    part_T = np.empty(len(length), np.int8)
    for rows in chunks(len(length)):
        part_T[rows] = np.searchsorted(edges, length[rows], side="left")
    masks = (part_T == number for number in range(len(edges) + 1))
    return [mask for mask in masks if mask.any()]


def distinct(user: np.ndarray, rows: Rows = None) -> int:
    """Return how many users some targets have.

    Args:
        user: [T], numbers from 0 on, as `numbered` gives them.
    """
    is_there = np.zeros(int(user.max(initial=-1)) + 1, bool)
    for (part,) in _parts(rows, user):
        is_there[part] = True
    return int(is_there.sum())


def numbered(user: np.ndarray) -> tuple[int, np.ndarray]:
    """Return (number of users, int32 [T] of 0..U-1: the place of each target's user among them in ascending order).

    Users that are numbered already are returned as they are.
    """
    most = int(user.max(initial=-1)) + 1
    if user.dtype == np.int32 and most <= len(user) and user.min(initial=0) >= 0 and distinct(user) == most:
        return most, user
    ids = np.unique(user)
    place = np.empty(len(user), np.int32)
    for part in chunks(len(user)):
        place[part] = np.searchsorted(ids, user[part])
    return len(ids), place


class Bootstrap:
    """The same resamples of users for every model, so that differences between models are paired.

    Args:
        user: int64 [T], the user of each target (any ids).
        label: [T], 0 or 1.
        scores: model -> [T], probabilities.
        resamples: R.
        seed: of the resampling.
        level: coverage of the intervals.
    """

    METRICS = ("auc", "gauc", "logloss")

    def __init__(
        self,
        user: np.ndarray,
        label: np.ndarray,
        scores: Mapping[str, np.ndarray],
        resamples: int = 200,
        seed: int = 0,
        level: float = 0.95,
    ) -> None:
        users, owner = numbered(user)
        rng, equal = np.random.default_rng(seed), np.full(users, 1 / max(users, 1))
        self.tail, self.users, self.users_with_both_classes = 100 * (1 - level) / 2, users, 0
        # Row 0 is the data as it is, rows 1..R are the resamples. Nobody is drawn 255 times.
        self.multiplicity = np.ones((1 + resamples, users), np.uint8)
        for row in self.multiplicity[1:]:
            row[:] = rng.multinomial(users, equal)
        self.values = {name: self._metrics(owner, label, score) for name, score in scores.items()}

    def _metrics(self, owner: np.ndarray, label: np.ndarray, score: np.ndarray) -> dict[str, np.ndarray]:
        per_user, count = user_aucs(owner, label, score)
        both = ~np.isnan(per_user)
        self.users_with_both_classes = max(self.users_with_both_classes, int(both.sum()))
        losses = np.zeros(len(count))
        for part in chunks(len(label)):
            low = int(owner[part].min())
            sums = np.bincount(owner[part] - low, weights=target_logloss(label[part], score[part]))
            losses[low : low + len(sums)] += sums
        of_users = np.stack([np.where(both, per_user * count, 0.0), np.where(both, count, 0.0), losses, count], axis=1)
        ranked, counted, lost, all_targets = np.array([row @ of_users for row in self.multiplicity]).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "auc": _RankedTargets(label, score, owner).auc(self.multiplicity),
                "gauc": ranked / counted,
                "logloss": lost / all_targets,
            }

    def interval(self, model: str, metric: str) -> Interval:
        """Return one of `METRICS` of a model."""
        return self._interval(self.values[model][metric])

    def difference(self, model: str, other: str, metric: str) -> Interval:
        """Return metric(model) - metric(other), paired over resamples."""
        return self._interval(self.values[model][metric] - self.values[other][metric])

    def _interval(self, values: np.ndarray) -> Interval:
        resampled = values[1:][~np.isnan(values[1:])]
        known = len(resampled) and self.users >= LEAST_USERS
        low, high = np.percentile(resampled, [self.tail, 100 - self.tail]) if known else (np.nan, np.nan)
        return Interval(float(values[0]), float(low), float(high))


# A key is the user, the score and the label of a target in one number: 31, 32 and 1 bits.
_USER, _SCORE = np.uint64(33), np.uint64(1)
_LAST = np.uint64(32)  # of a key that is ordered by score: what lies above user and label


class _RankedTargets:
    """Targets sorted by score once; AUC under any weights of the users is then one pass over them."""

    def __init__(self, label: np.ndarray, score: np.ndarray, owner: np.ndarray, rows: Rows = None) -> None:
        self.known = not _has_nan(score, rows)
        self.key = _sorted_key(owner, label, score, False, rows)

    def auc(self, user_weights: np.ndarray) -> np.ndarray:
        """Return float64 [R] for user weights [R, U]."""
        # Of each resample: pairs won, and the weights of positives and negatives so far; those of the last score's tie
        # apart, for it may go on in the next chunk.
        won, positives, negatives, tied_positive, tied_negative = np.zeros((5, len(user_weights)))
        last = -1
        for part in chunks(len(self.key)):
            key = self.key[part]
            label, owner = (key & _SCORE).astype(bool), ((key & np.uint64(0xFFFFFFFF)) >> _SCORE).astype(np.int64)
            score = key >> _LAST
            first = np.flatnonzero(np.concatenate([[True], score[1:] != score[:-1]]))
            goes_on = int(score[0]) == last
            last = int(score[-1])
            for row, weights in enumerate(user_weights):
                weight = weights[owner].astype(np.float64)
                both = np.add.reduceat(weight, first)
                positive = np.add.reduceat(np.where(label, weight, 0.0), first)
                negative = both - positive
                if goes_on:
                    positive[0] += tied_positive[row]
                    negative[0] += tied_negative[row]
                else:
                    won[row] += tied_positive[row] * (negatives[row] + tied_negative[row] / 2)
                    positives[row] += tied_positive[row]
                    negatives[row] += tied_negative[row]
                tied_positive[row], tied_negative[row] = positive[-1], negative[-1]
                below = np.cumsum(negative) - negative + negatives[row]
                won[row] += float(positive[:-1] @ (below[:-1] + negative[:-1] / 2))
                positives[row] += positive[:-1].sum()
                negatives[row] += negative[:-1].sum()
        won += tied_positive * (negatives + tied_negative / 2)
        pairs = (positives + tied_positive) * (negatives + tied_negative)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((pairs > 0) & self.known, won / pairs, np.nan)


def _sorted_key(user: np.ndarray, label: np.ndarray, score: np.ndarray, by_user: bool, rows: Rows) -> np.ndarray:
    """Return uint64 [T], ascending by user and score, or by score alone."""
    if score.dtype != np.float32:  # its order, in 32 bits
        score = np.unique(score, return_inverse=True)[1].astype(np.uint32)
    key, end = np.empty(len(score) if rows is None else int(rows.sum()), np.uint64), 0
    for users, labels, scores in _parts(rows, user, label, score):
        owner, positive = users.astype(np.uint64), (labels > 0).astype(np.uint64)
        rank = (_ordered(scores) if scores.dtype == np.float32 else scores).astype(np.uint64)
        part = (owner << _USER | rank << _SCORE if by_user else rank << _LAST | owner << _SCORE) | positive
        key[end : end + len(part)] = part
        end += len(part)
    key.sort()
    return key


def _ordered(score: np.ndarray) -> np.ndarray:
    """Return uint32 in the order of float32 scores, equal where they are equal."""
    bits = (score + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _ties(key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (user, positives, negatives) of each group of equal user and score, float64 but for the user."""
    group = key >> _SCORE
    first = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    positive = np.add.reduceat((key & _SCORE).astype(np.float64), first)
    return (key[first] >> _USER).astype(np.int64), positive, np.diff(first, append=len(key)) - positive


def _has_nan(score: np.ndarray, rows: Rows = None) -> bool:
    return any(bool(np.isnan(part).any()) for (part,) in _parts(rows, score))


def _parts(rows: Rows, *columns: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yield what is selected of some columns, of a chunk of all targets at a time."""
    for part in chunks(len(columns[0])):
        yield [column[part] if rows is None else column[part][rows[part]] for column in columns]


def chunks(targets: int) -> Iterator[slice]:
    """Yield the parts of so many targets that are worked on at once."""
    return (slice(start, min(start + CHUNK, targets)) for start in range(0, targets, CHUNK))

"""Ranking and probability metrics in numpy, with paired bootstrap intervals that resample users.

Legend: T targets, U users, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PROBABILITY_FLOOR = 1e-7
CALIBRATION_BINS = 10
LEAST_USERS = 30  # resamples of fewer say nothing of other users: their intervals are unknown


@dataclass(frozen=True)
class Interval:
    """A value on all targets, and the percentile interval of its bootstrap; bounds of nan are unknown."""

    value: float
    low: float
    high: float


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Return P(score of a positive > score of a negative), ties counted half; nan when a class is missing."""
    return float(_RankedTargets(label, score, np.zeros(len(label), np.int64)).auc(np.ones((1, 1)))[0])


def user_aucs(user: np.ndarray, label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (auc, impressions), float64 [U], of users 0..max(user); nan for users without both classes."""
    users = int(user.max(initial=-1)) + 1
    order = np.lexsort((score, user))
    u, s, y = user[order], score[order], label[order].astype(np.float64)
    count = np.bincount(u, minlength=users).astype(np.float64)
    start = np.concatenate([[0], np.cumsum(count)[:-1]])
    # Mid-ranks within the user: positions of a tie group are replaced by their mean.
    new_group = np.ones(len(u), dtype=bool)
    new_group[1:] = (u[1:] != u[:-1]) | (s[1:] != s[:-1])
    group = np.cumsum(new_group) - 1
    position = np.arange(1, len(u) + 1) - start[u]
    rank = (np.bincount(group, weights=position) / np.bincount(group))[group] if len(u) else position
    positives = np.bincount(u, weights=y, minlength=users)
    negatives = count - positives
    rank_sum = np.bincount(u, weights=rank * y, minlength=users)
    with np.errstate(invalid="ignore", divide="ignore"):
        result = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    return np.where(positives * negatives > 0, result, np.nan), count


def gauc(user: np.ndarray, label: np.ndarray, score: np.ndarray) -> tuple[float, int]:
    """Return (mean of the users' AUCs weighted by impressions, number of users with both classes)."""
    values, count = user_aucs(np.unique(user, return_inverse=True)[1], label, score)
    both = ~np.isnan(values)
    return (float(np.average(values[both], weights=count[both])) if both.any() else float("nan")), int(both.sum())


def target_logloss(label: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return float64 [T], -log of the probability given to what happened (clipped at 1e-7)."""
    p = np.clip(score.astype(np.float64), PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return -np.where(label > 0, np.log(p), np.log1p(-p))


def logloss(label: np.ndarray, score: np.ndarray) -> float:
    """Return the mean of `target_logloss`; nan without targets."""
    return float(target_logloss(label, score).mean()) if len(label) else float("nan")


def normalised_entropy(label: np.ndarray, score: np.ndarray) -> float:
    """Return log loss over that of the labels' own rate for every target; nan where a class is missing."""
    rate = float(label.mean()) if len(label) else 0.0
    if not 0 < rate < 1:
        return float("nan")
    return logloss(label, score) / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


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
    part = np.searchsorted(edges, length, side="left")
    return [part == number for number in np.unique(part)]


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
        ids, owner = np.unique(user, return_inverse=True)
        users = len(ids)
        rng = np.random.default_rng(seed)
        multiplicity = rng.multinomial(users, np.full(users, 1 / max(users, 1)), size=resamples).astype(np.float64)
        self.tail, self.users = 100 * (1 - level) / 2, users
        # Row 0 is the data as it is, rows 1..R are the resamples.
        self.multiplicity = np.vstack([np.ones((1, users)), multiplicity])
        self.values = {name: self._metrics(owner, label, score) for name, score in scores.items()}

    def _metrics(self, owner: np.ndarray, label: np.ndarray, score: np.ndarray) -> dict[str, np.ndarray]:
        per_user, count = user_aucs(owner, label, score)
        both = ~np.isnan(per_user)
        losses = np.bincount(owner, weights=target_logloss(label, score), minlength=len(count))
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "auc": _RankedTargets(label, score, owner).auc(self.multiplicity),
                "gauc": (self.multiplicity[:, both] @ (per_user * count)[both])
                / (self.multiplicity[:, both] @ count[both]),
                "logloss": (self.multiplicity @ losses) / (self.multiplicity @ count),
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


class _RankedTargets:
    """Targets sorted by score once; AUC under any weights of the users is then one pass over them."""

    def __init__(self, label: np.ndarray, score: np.ndarray, owner: np.ndarray) -> None:
        positive, negative = np.flatnonzero(label > 0), np.flatnonzero(label <= 0)
        positive, negative = (rows[np.argsort(score[rows], kind="stable")] for rows in (positive, negative))
        self.positive_owner, self.negative_owner = owner[positive], owner[negative]
        # Of each positive: negatives that score less, and negatives that score no more.
        self.below = np.searchsorted(score[negative], score[positive], side="left")
        self.not_above = np.searchsorted(score[negative], score[positive], side="right")

    def auc(self, user_weights: np.ndarray) -> np.ndarray:
        """Return float64 [R] for user weights [R, U]."""
        return np.array([self._auc(weights) for weights in user_weights])

    def _auc(self, weights: np.ndarray) -> float:
        weight_below = np.concatenate([[0.0], np.cumsum(weights[self.negative_owner])])
        positive = weights[self.positive_owner]
        pairs = positive.sum() * weight_below[-1]
        return (
            0.5 * float(positive @ (weight_below[self.below] + weight_below[self.not_above])) / pairs
            if pairs > 0
            else float("nan")
        )

"""What the scores of a model are measured by: the facts that the records of `etl.metrics.model_output` ask
for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from etl.metrics.thresholds import Thresholds
from etl.quality.measure.drift import NAN, mean_shares, psi

BINS = 20
SCORE_SHARES = tuple(f"score_share_{part:02d}" for part in range(BINS))  # of scores in [part / 20, (part + 1) / 20)
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Scores:
    """What an evaluation hands in of the model that would be registered.

    Attributes:
        label: int8 [T], 0 or 1: the targets of its evaluation day.
        score: float32 [T], probabilities.
        auc: as evaluated; None where it has none.
    """

    label: np.ndarray
    score: np.ndarray
    auc: float | None


@dataclass(frozen=True)
class ScoresFacts:
    """A model's scores; what so few targets cannot show is not a number.

    Attributes:
        trailing: statistics of earlier days' models.
    """

    scores: Scores
    trailing: Sequence[Mapping[str, float]]
    settings: Thresholds

    score = property(lambda self: self.scores.score)
    auc = property(lambda self: NAN if self.scores.auc is None else self.scores.auc)

    @cached_property
    def finite(self) -> np.ndarray:
        return self.score[np.isfinite(self.score)].astype(np.float64)

    @cached_property
    def _label(self) -> np.ndarray:
        """Labels of the targets whose score is a number."""
        return self.scores.label[np.isfinite(self.score)]

    @property
    def judged(self) -> bool:
        return len(self.finite) >= self.settings.model_output.min_judged_targets

    @property
    def out_of_range(self) -> int:
        return int(((self.finite < 0) | (self.finite > 1)).sum())

    @property
    def constant_share(self) -> float:
        return float(np.unique(self.finite, return_counts=True)[1].max() / len(self.finite)) if self.judged else NAN

    @property
    def sd(self) -> float:
        return float(self.finite.std()) if self.judged else NAN

    def percentile(self, q: int) -> float:
        return float(np.percentile(self.finite, q)) if len(self.finite) else NAN

    @property
    def expected_ratio(self) -> float:
        positives = int((self._label == 1).sum())
        return float(self.finite.sum() / positives) if self.judged and positives else NAN

    @property
    def calibration_error(self) -> float:
        """Mean absolute gap between predicted and observed over bins of equally many targets."""
        if not self.judged:
            return NAN
        parts = np.array_split(np.argsort(self.finite, kind="stable"), CALIBRATION_BINS)
        gaps = (
            abs(self.finite[part].mean() - (self._label[part] == 1).mean()) * len(part) for part in parts if len(part)
        )
        return float(sum(gaps) / len(self.finite))

    @cached_property
    def _shares(self) -> np.ndarray:
        return np.histogram(self.finite, bins=BINS, range=(0, 1))[0] / max(1, len(self.finite))

    @property
    def shares(self) -> dict[str, float]:
        return {name[-2:]: value for name, value in zip(SCORE_SHARES, self._shares.tolist(), strict=True)}

    @property
    def psi(self) -> float:
        few = len(self.trailing) < self.settings.drift.min_trailing_days
        usual = None if few else mean_shares(self.trailing, SCORE_SHARES)
        return psi(usual, self._shares) if self.judged and usual is not None else NAN

"""What the scores of a model look like: pure functions from scores and labels to one flat row of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from etl.datasets.thresholds import DriftThresholds, ModelOutputThresholds
from etl.quality.measure.drift import NAN, mean_shares, psi

SCORE_SHARES = tuple(f"score_share_{part:02d}" for part in range(20))  # of scores in [part / 20, (part + 1) / 20)
CALIBRATION_BINS = 10

Row = dict[str, float | str]


def model_output_row(
    dt: str, label: np.ndarray, score: np.ndarray, auc: float, trailing: Sequence[Mapping[str, float]], limits: ModelOutputThresholds, drift: DriftThresholds
) -> Row:
    """Return the metrics of a model's scores on the evaluation day; what so few targets cannot tell is not a number.

    Args:
        label: int8 [T], 0 or 1.
        score: float32 [T], probabilities.
        auc: the model's AUC, as evaluated.
        trailing: kept metrics of earlier days' models.
    """
    targets = len(score)
    finite = score[np.isfinite(score)].astype(np.float64)
    known = label[np.isfinite(score)]
    judged = len(finite) >= limits.min_judged_targets
    positives = int((known == 1).sum())
    quantiles = np.percentile(finite, (1, 50, 99)).tolist() if len(finite) else (NAN,) * 3
    shares = np.histogram(finite, bins=len(SCORE_SHARES), range=(0, 1))[0] / max(1, len(finite))
    usual = mean_shares(trailing, SCORE_SHARES) if len(trailing) >= drift.min_trailing_days else None
    return {
        "dt": dt,
        "targets": targets,
        "not_a_number_count": targets - len(finite),
        "out_of_range_count": int(((finite < 0) | (finite > 1)).sum()),
        "constant_share": float(np.unique(finite, return_counts=True)[1].max() / len(finite)) if judged else NAN,
        "score_sd": float(finite.std()) if judged else NAN,
        **{f"score_p{q:02d}": value for q, value in zip((1, 50, 99), quantiles, strict=True)},
        "expected_ratio": float(finite.sum() / positives) if judged and positives else NAN,
        "ece": _calibration_error(known, finite) if judged else NAN,
        "auc": auc,
        "score_psi": psi(usual, shares) if judged and usual is not None else NAN,
        **dict(zip(SCORE_SHARES, shares.tolist(), strict=True)),
    }


def _calibration_error(label: np.ndarray, score: np.ndarray) -> float:
    """Return the mean absolute gap between predicted and observed over bins of equally many targets."""
    parts = np.array_split(np.argsort(score, kind="stable"), CALIBRATION_BINS)
    return float(sum(abs(score[part].mean() - (label[part] == 1).mean()) * len(part) for part in parts if len(part)) / len(score))

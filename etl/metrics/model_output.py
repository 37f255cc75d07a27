"""The metrics of the scores that a model gives the targets of its evaluation day (`measure.scores.ScoresFacts`).

The evaluation hands them in and asks for the judgement: nothing here reads what an evaluation writes.
"""

from __future__ import annotations

from etl.metrics import panels
from etl.metrics.record import (
    CRITICAL,
    Bound,
    Limit,
    Metric,
    Suite,
    at_least_one,
    between,
    most,
    warn,
    zero,
)

_MODEL = "look at the training's metrics for a loss that diverged; train again with a new attempt"
_DATA = (
    "compare the label rates of training days and evaluation day (gate training_input), then train again with a new"
    " attempt"
)

SCORES = (
    Metric(
        "targets",
        lambda scores: len(scores.score),
        "There are scores.",
        _MODEL,
        at_least_one(),
        plant="SELECT * FROM t WHERE false",
    ),
    Metric(
        "not_a_number_count",
        lambda scores: len(scores.score) - len(scores.finite),
        "Every score is a number.",
        _MODEL,
        zero(contract=True),
        plant="SELECT * REPLACE (CASE WHEN label = 1 THEN 'nan'::FLOAT ELSE score END AS score) FROM t",
    ),
    Metric(
        "out_of_range_count",
        lambda scores: scores.out_of_range,
        "Every score is a probability.",
        _MODEL,
        zero(contract=True),
        plant="SELECT * REPLACE (ln(score / (1 - score)) AS score) FROM t",
    ),
    # Targets that share the one most frequent score.
    Metric(
        "constant_share",
        lambda scores: scores.constant_share,
        "Scores differ.",
        _MODEL,
        most(
            Bound("model_output.max_constant_share_warning", 0.2),
            Bound("model_output.max_constant_share_critical", 0.5),
        ),
        panel=panels.SCORES,
        plant="SELECT * REPLACE (0.4::FLOAT AS score) FROM t",
    ),
    # Below it the model says the same to everyone.
    Metric(
        "score_sd",
        lambda scores: scores.sd,
        "Scores differ by more than rounding.",
        _MODEL,
        (Limit(CRITICAL, low=Bound("model_output.min_score_sd", 0.001)),),
        panel=panels.SCORES,
        plant="SELECT * REPLACE (0.4 + score / 10000 AS score) FROM t",
    ),
    Metric("score_p01", lambda scores: scores.percentile(1), panel=panels.SCORES),
    Metric("score_p50", lambda scores: scores.percentile(50), panel=panels.SCORES),
    Metric("score_p99", lambda scores: scores.percentile(99), panel=panels.SCORES),
    # Sum of the probabilities over the number of positives: 1 is calibrated in the mean.
    Metric(
        "expected_ratio",
        lambda scores: scores.expected_ratio,
        "Probabilities add up to the positives (calibration in the mean).",
        _DATA,
        between(
            Bound("model_output.expected_ratio_warning", (0.7, 1.4)),
            Bound("model_output.expected_ratio_critical", (0.33, 3.0)),
        ),
        panel=panels.CALIBRATION,
        plant="SELECT * REPLACE (score / 5 AS score) FROM t",
    ),
    # Mean absolute gap between predicted and observed, over ten bins of equally many targets.
    Metric(
        "ece",
        lambda scores: scores.calibration_error,
        "Probabilities are those observed (calibration by bins).",
        _DATA,
        warn(high=Bound("model_output.max_ece", 0.15)),
        panel=panels.CALIBRATION,
        plant="SELECT * REPLACE (score / 5 AS score) FROM t",
    ),
    Metric(
        "auc",
        lambda scores: scores.auc,
        "The model orders targets better than chance.",
        _MODEL,
        warn(low=0.5),
    ),
    # Of twenty bins; models differ from day to day.
    Metric(
        "score_psi",
        lambda scores: scores.psi,
        "Scores are distributed as on the days before (PSI).",
        _DATA,
        warn(high=Bound("model_output.score_psi_warning", 0.5)),
    ),
    Metric("score_share_*", lambda scores: scores.shares),
)

SUITES = (Suite("model_output", "model_output", "model", SCORES),)

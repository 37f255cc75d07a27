"""The metrics of what a training is about to read: a row a day of its window (`measure.training_input.WindowDay`),
and one of the published partition (`InputFacts`), whose sequences were measured when they were published."""

from __future__ import annotations

from etl.metrics import panels
from etl.metrics.record import (
    CRITICAL,
    INFO,
    NAN,
    Bound,
    Limit,
    Metric,
    Suite,
    at_least_one,
    share,
    warn,
    zero,
)

_AGAIN = "build sequences of this partition again with a new attempt, then train"
_DRIFT = "look for a change of the product or of the logging between the training days and the evaluation day"

WINDOW = (
    Metric(
        "missing_count",
        lambda day: day.read is None or day.published is None,
        "Every day of the window is published and was read.",
        _AGAIN,
        zero(),
    ),
    Metric("stale_count", lambda day: day.stale, "What was read is what is published now.", _AGAIN, zero()),
)

INPUT = (
    Metric(
        "mixed_attempts_count",
        lambda facts: facts.mixed,
        "items and sequences come from one attempt.",
        _AGAIN,
        zero(contract=True),
    ),
    Metric("users", lambda facts: facts.of["users"]),
    Metric("items", lambda facts: facts.of["items"]),
    Metric(
        "train_targets",
        lambda facts: facts.of["train_targets"],
        "There is something to train on.",
        _AGAIN,
        at_least_one(),
    ),
    Metric(
        "eval_targets",
        lambda facts: facts.of["eval_targets"],
        "There is something to evaluate on.",
        _AGAIN,
        at_least_one(),
    ),
    Metric("train_label_rate", lambda facts: facts.train_rate),
    Metric("eval_label_rate", lambda facts: facts.eval_rate),
    Metric(
        "label_rate_difference",
        lambda facts: abs(facts.train_rate - facts.eval_rate),
        "Training days and evaluation day have about the same label rate.",
        _DRIFT,
        warn(high=Bound("training_input.max_label_rate_difference", 0.1)),
        panel=panels.SKEW,
    ),
    # Of the evaluation day over the training days, or the inverse.
    Metric(
        "label_rate_ratio",
        lambda facts: facts.rate_ratio,
        "Training days and evaluation day have comparable label rates.",
        _DRIFT,
        (Limit(CRITICAL, low=Bound("training_input.min_label_rate_ratio", 0.5)),),
    ),
    Metric("label_kl", lambda facts: facts.rate_kl, panel=panels.SKEW),
    Metric(
        "hour_skew_psi",
        lambda facts: facts.of["hour_skew_psi"] if facts.judged else NAN,
        "Targets of the evaluation day are of the hours of the training days (PSI).",
        _DRIFT,
        warn(high=Bound("training_input.max_hour_psi", 0.25)),
        panel=panels.SKEW,
    ),
    Metric(
        "context_skew_psi",
        lambda facts: facts.of["context_skew_psi"] if facts.judged else NAN,
        "Targets of the evaluation day are of the contexts of the training days (PSI).",
        _DRIFT,
        warn(high=Bound("training_input.max_context_psi", 0.25)),
        panel=panels.SKEW,
    ),
    # Recorded, since histories grow.
    Metric(
        "history_length_skew_psi",
        lambda facts: facts.of["history_length_skew_psi"] if facts.judged else NAN,
        "Recorded: how visible histories differ between training days and evaluation day (PSI).",
        _DRIFT,
        (Limit(INFO, high=Bound("training_input.max_history_length_psi", 0.5)),),
        panel=panels.SKEW,
    ),
    Metric(
        "unseen_eval_item_share",
        lambda facts: share(facts.of["unseen_eval_targets"], facts.of["eval_targets"]),
        "Recorded: evaluation targets whose item no training day showed.",
        _DRIFT,
        (Limit(INFO, high=Bound("training_input.max_unseen_item_share", 0.5)),),
    ),
)

SUITES = (
    Suite("training_window", "training_input", "day of the window", WINDOW),
    Suite("training_input", "training_input", "partition", INPUT),
)

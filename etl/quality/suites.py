"""The suites: what each gate expects, how severe a failure is, and what to do about it. Suite changes are code changes.

Severity decides what a failure does: `critical` stops the stage and nothing is published, `warning` is told and
published, `info` is recorded. Great Expectations is imported when a suite is built, never with this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from etl.quality.thresholds import EventThresholds, SequenceThresholds, Thresholds, TrainingInputThresholds
from etl.schemas import EVENTS

if TYPE_CHECKING:
    from great_expectations.core import ExpectationSuite
    from great_expectations.expectations import Expectation
    from great_expectations.expectations.metadata_types import FailureSeverity

CRITICAL, WARNING, INFO = "critical", "warning", "info"

_REBUILD = "rebuild the stage with a new attempt; if it fails again, the job that built it has a bug"
_PANDAS_TYPES = {"int64": "int64", "int16": "int16", "bool": "bool"}


def events_days(limits: EventThresholds) -> list[Expectation]:
    """Expect this of the stats table of events: one row a staged day."""
    arrived = "check that the raw logs of the day have arrived"
    raw = "look at the raw files of the day and at the reasons in table quarantine; then rebuild with a new attempt"
    return [
        *_zero_or_stop("unreconciled_count", "Raw rows read = events + duplicates + quarantined.", _REBUILD),
        *_zero_or_stop("manifest_rows_difference_count", "The manifest's count of events is the table's.", _REBUILD),
        *_zero_or_stop("quarantine_rows_difference_count", "Every quarantined row is in table quarantine.", _REBUILD),
        *_zero_or_stop("outside_day_count", "Every event is of its partition's UTC day.", _REBUILD),
        *_zero_or_stop("feedback_out_of_range_count", "No feedback bit is set that the data set does not define.", _REBUILD),
        *_zero_or_stop("lost_day_count", "The partition's day has events, and so has every day with raw rows.", arrived),
        _band("gap_count", WARNING, "No lookback day is empty after days with events.", arrived, low=0, high=0),
        _band("rows", INFO, "Recorded: lookback days that the raw logs do not cover.", arrived, low=1),
        _band("label_rate", CRITICAL, "The label is neither always 0 nor always 1.", raw, low=0, high=1, strict=True),
        _band("label_rate", WARNING, "The label rate is plausible.", raw, limits.min_label_rate, limits.max_label_rate),
        _band("quarantine_share", WARNING, "Few raw rows are refused.", raw, high=limits.max_quarantine_share_warning),
        *_stop("quarantine_share", "Most raw rows are usable.", raw, high=limits.max_quarantine_share_critical),
        _band("duplicate_share", WARNING, "Few raw rows are duplicates.", raw, high=limits.max_duplicate_share),
        _band("repeated_key_share", WARNING, "(user, item, time) is nearly unique.", raw, high=limits.max_repeated_key_share),
        _band("worst_hour_repeated_key_share", WARNING, "(user, item, time) is nearly unique in each hour.", raw,
              high=limits.max_hour_repeated_key_share_warning),
        *_stop("worst_hour_repeated_key_share", "No hour was delivered twice.", raw,
               high=limits.max_hour_repeated_key_share_critical),
        _band("hours_covered", WARNING, "Most hours of the day have events.", raw, low=limits.min_hours_covered),
        _band("largest_user_share", WARNING, "No user dominates the day.", raw, high=limits.max_user_share),
        _band("users", WARNING, "More than one user was active.", raw, low=limits.min_users),
        _band("rows_to_trailing_median", WARNING, "The day is about as large as the days before it.", raw,
              limits.min_rows_ratio, limits.max_rows_ratio),
    ]  # fmt: skip


def events_frame() -> list[Expectation]:
    """Expect this of the rows of the partition's own day."""
    import great_expectations.expectations as gxe

    meta = {"remedy": _REBUILD}
    return [
        gxe.ExpectTableColumnsToMatchOrderedList(
            column_list=EVENTS.names, severity=_severity(CRITICAL), meta=meta, notes="The contract's columns.",
            description=f"{CRITICAL}: the contract's columns, in its order."),
        *[gxe.ExpectColumnValuesToBeOfType(column=field.name, type_=_PANDAS_TYPES[str(field.type)], severity=_severity(CRITICAL),
                                           notes="The contract's type.", meta=meta) for field in EVENTS],
        *[gxe.ExpectColumnValuesToNotBeNull(column=name, severity=_severity(CRITICAL), notes="No column of events has nulls.",
                                            meta=meta) for name in EVENTS.names],
        _band("user_id", CRITICAL, "Identities are not negative.", _REBUILD, low=0),
        _band("item_id", CRITICAL, "Identities are not negative.", _REBUILD, low=0),
        _band("feedback", CRITICAL, "Feedback is a bit set.", _REBUILD, low=0),
        _band("watch_time_ms", CRITICAL, "Watch times are not negative.", _REBUILD, low=0),
        _band("duration_ms", CRITICAL, "Durations are not negative; 0 is no duration.", _REBUILD, low=0),
        _band("context", CRITICAL, "-1 is the unknown context.", _REBUILD, low=-1),
    ]  # fmt: skip


def sequences(limits: SequenceThresholds) -> list[Expectation]:
    """Expect this of the stats table of sequences and items: one row."""
    look = "compare with the partitions before it; the events of the window are the likely cause"
    empty = "check that events of every day of the window are published and that the target window covers them"
    return [
        *_zero_or_stop("leak_count", "No target sees an event of its own time or later.", _REBUILD),
        *_zero_or_stop("history_disorder_count", "History times never decrease.", _REBUILD),
        *_zero_or_stop("target_disorder_count", "Target times never decrease.", _REBUILD),
        *_zero_or_stop("unequal_length_count", "The lists of a side are equally long.", _REBUILD),
        *_zero_or_stop("history_end_out_of_range_count", "target_history_end lies within the history.", _REBUILD),
        *_zero_or_stop("item_index_out_of_range_count", "Every item index points into items.", _REBUILD),
        *_zero_or_stop("item_index_not_dense_count", "items.item_index is the row's position.", _REBUILD),
        *_zero_or_stop("item_id_not_increasing_count", "items is in strict item_id order.", _REBUILD),
        *_zero_or_stop("label_not_binary_count", "Labels are 0 or 1.", _REBUILD),
        *_zero_or_stop("watch_bucket_out_of_range_count", "Watch buckets are those of etl.schemas.", _REBUILD),
        *_zero_or_stop("target_outside_window_count", "Targets are of the target window.", _REBUILD),
        *_zero_or_stop("split_wrong_count", "Evaluation targets are those of the evaluation days, and no others.", _REBUILD),
        *_zero_or_stop("repeated_user_count", "A user is one row.", _REBUILD),
        *_zero_or_stop("unreconciled_count", "The manifest's counts are the table's.", _REBUILD),
        *_stop("train_targets", "There is something to train on.", empty, low=1),
        *_stop("eval_targets", "There is something to evaluate on.", empty, low=1),
        _band("train_label_rate", WARNING, "The label rate is plausible.", look, limits.min_label_rate, limits.max_label_rate),
        _band("eval_label_rate", WARNING, "The label rate is plausible.", look, limits.min_label_rate, limits.max_label_rate),
        _band("truncated_user_share", WARNING, "Most histories are complete.", "raise --max-history",
              high=limits.max_truncated_user_share),
        *[_band(f"history_length_p{q}", INFO, "Recorded: events in a user's history.", look, low=1) for q in (50, 90, 99)],
    ]  # fmt: skip


def training_window() -> list[Expectation]:
    """Expect this of the window of a published partition: one row a day of events."""
    again = "build sequences of this partition again with a new attempt, then train"
    return [
        *_zero_or_stop("missing_count", "Every day of the window is published and was read.", again),
        *_zero_or_stop("stale_count", "What was read is what is published now.", again),
    ]


def training_input(limits: TrainingInputThresholds) -> list[Expectation]:
    """Expect this of the published partition that a training reads: one row."""
    again = "build sequences of this partition again with a new attempt, then train"
    drift = "look for a change of the product or of the logging between the training days and the evaluation day"
    return [
        *_zero_or_stop("mixed_attempts_count", "items and sequences come from one attempt.", again),
        *_stop("train_targets", "There is something to train on.", again, low=1),
        *_stop("eval_targets", "There is something to evaluate on.", again, low=1),
        _band("label_rate_difference", WARNING, "Training days and evaluation day have about the same label rate.", drift,
              high=limits.max_label_rate_difference),
        _band("unseen_eval_item_share", INFO, "Recorded: evaluation targets whose item no training day showed.", drift,
              high=limits.max_unseen_item_share),
    ]  # fmt: skip


def build_suite(name: str, thresholds: Thresholds) -> ExpectationSuite:
    """Return a suite by name: events_days, events_frame, sequences, training_window or training_input."""
    import great_expectations as gx

    expectations = {
        "events_days": lambda: events_days(thresholds.events),
        "events_frame": lambda: events_frame(),
        "sequences": lambda: sequences(thresholds.sequences),
        "training_window": training_window,
        "training_input": lambda: training_input(thresholds.training_input),
    }
    return gx.ExpectationSuite(name=name, expectations=expectations[name]())


def _band(
    metric: str, severity: str, notes: str, remedy: str, low: float | None = None, high: float | None = None, strict: bool = False
) -> Expectation:
    import great_expectations.expectations as gxe

    # Words, not signs: Data Docs pages would read "<" as the start of a tag.
    signs = ("above", "below") if strict else ("at least", "at most")
    bounds = [f"{sign} {bound:g}" for sign, bound in zip(signs, (low, high), strict=True) if bound is not None]
    return gxe.ExpectColumnValuesToBeBetween(
        description=f"{severity}: {metric} is {' and '.join(bounds)}. {notes}",
        column=metric, min_value=low, max_value=high, strict_min=strict, strict_max=strict,
        severity=_severity(severity), notes=notes, meta={"remedy": remedy})  # fmt: skip


def _stop(
    metric: str, notes: str, remedy: str, low: float | None = None, high: float | None = None, strict: bool = False
) -> list[Expectation]:
    """Expect a metric within critical bounds, and known: a bound alone holds for a null."""
    import great_expectations.expectations as gxe

    known = gxe.ExpectColumnValuesToNotBeNull(
        column=metric, severity=_severity(CRITICAL), notes="The metric is known.", meta={"remedy": remedy},
        description=f"{CRITICAL}: {metric} is known.")  # fmt: skip
    return [known, _band(metric, CRITICAL, notes, remedy, low, high, strict)]


def _zero_or_stop(metric: str, notes: str, remedy: str) -> list[Expectation]:
    return _stop(metric, notes, remedy, low=0, high=0)


def _severity(name: str) -> FailureSeverity:
    from great_expectations.expectations.metadata_types import FailureSeverity

    return FailureSeverity(name)

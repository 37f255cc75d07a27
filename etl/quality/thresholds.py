"""Every number that a gate compares with, in one place. Shares and rates are fractions of 1."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EventThresholds:
    """Bounds on one day of `events`.

    Attributes:
        min_label_rate, max_label_rate: outside it a warning; exactly 0 or 1 is critical.
        min_judged_rows, min_judged_users: a day with fewer is too small to be judged by its shares, and so is a day after
            days that have a median of fewer rows by what is missing from it. One user's whim is no fault of the logs.
        max_quarantine_share_warning, max_quarantine_share_critical: of the raw rows read for the day.
        max_duplicate_share: raw rows dropped as duplicates; a warning, because the published rows are clean.
        max_repeated_key_share: rows of the published table whose (user, item, time) occurred before, with other feedback
            or watch time: exact duplicates never get into the table. The simulator plants 3 %.
        max_hour_repeated_key_share_warning, max_hour_repeated_key_share_critical: the same share of the worst UTC hour.
            An hour that was delivered twice has a share of 0.5 there, whatever its share of the day.
        min_hour_rows: an hour with fewer rows is not considered the worst.
        min_hours_covered: UTC hours of the day with at least one event.
        max_user_share: rows of the most active user.
        min_users: distinct users.
        min_rows_ratio, max_rows_ratio: rows over the median of the trailing days.
        trailing_days: days before the partition that make that median.
        min_trailing_days: fewer known days than this: no ratio is computed.
        frame_max_rows: rows of the partition's own day that the row-wise suite sees; a larger day is cut to every
            n-th row, and the result says so.
    """

    min_label_rate: float = 0.02
    max_label_rate: float = 0.98
    min_judged_rows: int = 200
    min_judged_users: int = 10
    max_quarantine_share_warning: float = 0.01
    max_quarantine_share_critical: float = 0.2
    max_duplicate_share: float = 0.02
    max_repeated_key_share: float = 0.06
    max_hour_repeated_key_share_warning: float = 0.15
    max_hour_repeated_key_share_critical: float = 0.3
    min_hour_rows: int = 30
    min_hours_covered: int = 12
    max_user_share: float = 0.4
    min_users: int = 2
    min_rows_ratio: float = 0.3
    max_rows_ratio: float = 3.0
    trailing_days: int = 7
    min_trailing_days: int = 3
    frame_max_rows: int = 2_000_000


@dataclass(frozen=True)
class SequenceThresholds:
    """Bounds on one partition of `sequences` and `items`; what is not here must be exactly zero.

    Attributes:
        min_label_rate, max_label_rate: of the training and of the evaluation targets; a warning.
        max_truncated_user_share: users whose history was cut at the limit; a warning.
    """

    min_label_rate: float = 0.02
    max_label_rate: float = 0.98
    max_truncated_user_share: float = 0.5


@dataclass(frozen=True)
class TrainingInputThresholds:
    """Bounds on what a training is about to read.

    Attributes:
        max_label_rate_difference: |training - evaluation day|; a warning.
        max_unseen_item_share: evaluation targets whose item no training day showed; recorded as info.
    """

    max_label_rate_difference: float = 0.1
    max_unseen_item_share: float = 0.5


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of the three gates."""

    events: EventThresholds = field(default_factory=EventThresholds)
    sequences: SequenceThresholds = field(default_factory=SequenceThresholds)
    training_input: TrainingInputThresholds = field(default_factory=TrainingInputThresholds)


THRESHOLDS = Thresholds()

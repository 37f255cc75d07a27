"""Every number that a gate compares with, in one place. Shares and rates are fractions of 1.

Absolute forms hold from the first day on. Relative forms (`DriftThresholds`) compare with trailing days and are not judged
before there are enough of them. Real exposure logs vary from day to day: KuaiRand-27K's rows by a quarter around their
median (weekends, a holiday), its click rate by 6 %; a band that those touch would teach people to ignore it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RawThresholds:
    """Bounds on the raw files of one day; files are judged by their header, their ends and a sample of their lines.

    Attributes:
        sample_bytes: read at the head, the middle and the tail of a file.
        max_refused_share: of all lines of a file or a day: beyond it the events job stops (its --max-bad-share).
        max_refused_share_warning, max_refused_share_critical: of the sampled lines, before a session is started.
        max_outside_share_warning, max_outside_share_critical: sampled rows whose time is not of the days that the file's
            name promises: a file of another day, or of another time zone.
        min_sampled_lines: fewer are not judged by their shares.
        min_bytes_ratio_warning, max_bytes_ratio_warning, min_bytes_ratio_critical: bytes of the files that may hold the day
            over the median of the trailing days. A coarse first look: rows are judged at the events gate.
    """

    sample_bytes: int = 256 << 10
    max_refused_share: float = 0.01
    max_refused_share_warning: float = 0.01
    max_refused_share_critical: float = 0.1
    max_outside_share_warning: float = 0.005
    max_outside_share_critical: float = 0.05
    min_sampled_lines: int = 50
    min_bytes_ratio_warning: float = 0.4
    max_bytes_ratio_warning: float = 3.0
    min_bytes_ratio_critical: float = 0.1


@dataclass(frozen=True)
class DriftThresholds:
    """Bounds relative to trailing days. A bound named `_warning` or `_critical` is of that severity.

    Attributes:
        trailing_days: days before the partition that are looked at.
        min_trailing_days: with fewer known days nothing is compared.
        min_rows: smaller days are neither compared nor compared with: chance alone moves their shares.
        memory_days: trailing days whose users and items count as known.
        min_hour_rows: an hour is missing (critical) or thin (warning) only where so many rows were due; 100 rows are
            some 25 pages, which chance does not lose.
        min_hour_ratio: a thin hour has less than this of what was due.
        hour_psi: of the hour profile; weekends move KuaiRand's by a few hundredths.
        min_shift_gain: correlation that a turned profile must gain before the day counts as shifted in time.
        label_rate_ratio_*: rate over the trailing median, judged where that median makes min_positives positives.
        label_kl_warning: nats.
        action_mix_psi_*: of the signals' shares.
        min_signal_rows: a signal that was due so often and never set has vanished; critical.
        new_category_share: of the rows, values of a field that no trailing day showed; a warning by its nature.
        field_psi_warning: of the values of a field.
        known_*_drop_*: share of rows of users or items that the memory knows, below its trailing median.
        item_popularity_drop_*: correlation of items' counts with the memory's, below its trailing median.
        duration_mismatch_rise_*: rows whose item had another duration before, above the trailing median: an id that means
            another item.
        repeated_day_share_*: rows that the day before has at the same time of day, (user, item, time).
        largest_user_share_rise: above the trailing median.
        length_ratio: history length quantiles over those of partitions with as many days of events.
        min_steady_days, max_steady_ratio, rows_to_extremes_*: rows below the smallest or above the largest trailing day,
            judged where so many trailing days lie within this ratio of each other.
    """

    trailing_days: int = 7
    min_trailing_days: int = 3
    min_rows: int = 2_000
    memory_days: int = 3
    min_hour_rows: int = 100
    min_hour_ratio: float = 0.2
    hour_psi_warning: float = 0.15
    hour_psi_critical: float = 0.5
    min_shift_gain: float = 0.5
    min_positives: int = 200
    label_rate_ratio_warning: tuple[float, float] = (0.75, 1.33)
    label_rate_ratio_critical: tuple[float, float] = (0.6, 1.67)
    label_kl_warning: float = 0.03
    action_mix_psi_warning: float = 0.1
    action_mix_psi_critical: float = 0.5
    min_signal_rows: int = 50
    new_category_share: float = 0.005
    field_psi_warning: float = 0.25
    known_user_drop_warning: float = 0.3
    known_user_drop_critical: float = 0.6
    known_item_drop_warning: float = 0.3
    known_item_drop_critical: float = 0.6
    item_popularity_drop_warning: float = 0.3
    item_popularity_drop_critical: float = 0.5
    duration_mismatch_rise_warning: float = 0.05
    duration_mismatch_rise_critical: float = 0.3
    repeated_day_share_warning: float = 0.02
    repeated_day_share_critical: float = 0.2
    largest_user_share_rise: float = 0.1
    watch_ratio: tuple[float, float] = (0.5, 2.0)
    length_ratio: tuple[float, float] = (0.5, 2.0)
    min_steady_days: int = 5
    max_steady_ratio: float = 2.0
    rows_to_extremes_critical: float = 0.6
    rows_to_extremes_warning: float = 1.67


@dataclass(frozen=True)
class EventThresholds:
    """Bounds on one day of `events`.

    Attributes:
        min_label_rate, max_label_rate: outside it a warning; exactly 0 or 1 is critical. Feeds with 1 % clicks are ordinary.
        min_judged_rows, min_judged_users: a day with fewer is too small to be judged by its shares, and so is a day after
            days that have a median of fewer rows by what is missing from it. One user's whim is no fault of the logs.
        max_quarantine_share_warning, max_quarantine_share_critical: of the raw rows read for the day.
        max_duplicate_share: raw rows dropped as duplicates; a warning, because the published rows are clean.
        max_repeated_key_share: rows of the published table whose (user, item, time) occurred before, with other feedback
            or watch time: exact duplicates never get into the table. The simulator plants 3 %.
        max_hour_repeated_key_share_warning, max_hour_repeated_key_share_critical: the same share of the worst UTC hour.
            An hour that was delivered twice has a share of 0.5 there, whatever its share of the day.
        min_hour_rows: an hour with fewer rows is not considered the worst.
        min_hours_covered: UTC hours of the day with at least one event; judged where times have hours.
        max_user_share, max_user_share_critical: rows of the most active user; critical where there are at least
            min_users_for_bots users, so that no ordinary one can have so many.
        min_users: distinct users.
        min_rows_ratio, max_rows_ratio: rows over the median of the trailing days.
        min_hour_neighbour_rows: an hour without events between two hours with so many rows each is odd; the form of a
            missing hour for days without trailing ones.
    """

    min_label_rate: float = 0.002
    max_label_rate: float = 0.998
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
    max_user_share_critical: float = 0.3
    min_users_for_bots: int = 50
    min_users: int = 2
    min_rows_ratio: float = 0.3
    max_rows_ratio: float = 3.0
    min_hour_neighbour_rows: int = 100


@dataclass(frozen=True)
class SequenceThresholds:
    """Bounds on one partition of `sequences` and `items`; what is not here must be exactly zero.

    Attributes:
        min_label_rate, max_label_rate: of the training and of the evaluation targets; a warning.
        max_empty_history_share_*: evaluation targets that see no event; judged where there are min_judged_targets of them.
        max_truncated_user_share: users of whom a target sees less than there is, by the limit; a warning.
        max_items_without_fields_share_*: items that no item file describes; judged where there are item files, or must be. Item files that
            describe few of the items are ordinary (a warning); critical only where they describe none.
        max_items_without_fields_rise_*: that share above its trailing median: an item file that no longer fits the logs.
        min_users_ratio, max_users_ratio: users and items over those of trailing partitions; warnings.
    """

    min_label_rate: float = 0.002
    max_label_rate: float = 0.998
    max_truncated_user_share: float = 0.5
    min_judged_targets: int = 100
    max_empty_history_share_warning: float = 0.5
    max_empty_history_share_critical: float = 0.99
    max_items_without_fields_share_warning: float = 0.2
    max_items_without_fields_share_critical: float = 0.999
    max_items_without_fields_rise_warning: float = 0.1
    max_items_without_fields_rise_critical: float = 0.3
    min_users_ratio: float = 0.5
    max_users_ratio: float = 2.0


@dataclass(frozen=True)
class TrainingInputThresholds:
    """Bounds on what a training is about to read.

    Attributes:
        max_label_rate_difference: |training - evaluation day|; a warning.
        max_unseen_item_share: evaluation targets whose item no training day showed; recorded as info.
        min_label_rate_ratio: of the evaluation day over the training days, or the inverse; critical where both sides
            have min_judged_targets.
        min_judged_targets: fewer targets on a side are not compared.
        max_context_psi, max_hour_psi: skew of where and when targets were shown, training days to evaluation day.
        max_history_length_psi: of the visible histories' lengths (powers of two); recorded, since histories grow.
    """

    max_label_rate_difference: float = 0.1
    max_unseen_item_share: float = 0.5
    min_label_rate_ratio: float = 0.5
    min_judged_targets: int = 1_000
    max_context_psi: float = 0.25
    max_hour_psi: float = 0.25
    max_history_length_psi: float = 0.5


@dataclass(frozen=True)
class ModelOutputThresholds:
    """Bounds on the scores of the model that would be registered, on the targets of its evaluation day.

    Attributes:
        min_judged_targets: fewer are not judged by their shares.
        max_constant_share_*: targets that share the one most frequent score.
        min_score_sd: standard deviation of the scores; below it the model says the same to everyone.
        expected_ratio_*: sum of the probabilities over the number of positives; 1 is calibrated in the mean.
        max_ece: mean absolute gap between predicted and observed, over ten bins of equally many targets.
        score_psi_*: of the score distribution (twenty bins) against trailing days; models differ from day to day.
    """

    min_judged_targets: int = 200
    max_constant_share_warning: float = 0.2
    max_constant_share_critical: float = 0.5
    min_score_sd: float = 0.001
    expected_ratio_warning: tuple[float, float] = (0.7, 1.4)
    expected_ratio_critical: tuple[float, float] = (0.33, 3.0)
    max_ece: float = 0.15
    score_psi_warning: float = 0.5


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of the gates, and those relative to trailing days."""

    raw: RawThresholds = field(default_factory=RawThresholds)
    drift: DriftThresholds = field(default_factory=DriftThresholds)
    events: EventThresholds = field(default_factory=EventThresholds)
    sequences: SequenceThresholds = field(default_factory=SequenceThresholds)
    training_input: TrainingInputThresholds = field(default_factory=TrainingInputThresholds)
    model_output: ModelOutputThresholds = field(default_factory=ModelOutputThresholds)


THRESHOLDS = Thresholds()

"""The suites: what each gate expects, how severe a failure is, and what to do about it. Suite changes are code changes.

Severity decides what a failure does: `critical` stops the stage and nothing is published, `warning` is told and
published, `info` is recorded. Great Expectations is imported when a suite is built, never with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from etl.datasets.quality_rules import Condition, reason_of
from etl.datasets.thresholds import (
    DriftThresholds,
    EventThresholds,
    ModelOutputThresholds,
    RawThresholds,
    SequenceThresholds,
    Thresholds,
    TrainingInputThresholds,
)

if TYPE_CHECKING:
    from great_expectations.core import ExpectationSuite
    from great_expectations.expectations import Expectation
    from great_expectations.expectations.metadata_types import FailureSeverity

CRITICAL, WARNING, INFO = "critical", "warning", "info"
# gate -> suite -> what a row of it is
SUITES = {"raw": {"raw_day": "day", "raw_files": "file"}, "events": {"events_days": "staged day"}, "sequences": {"items": "partition: items", "sequences": "partition: sequences"},
          "training_input": {"training_window": "day of the window", "training_input": "partition"}, "model_output": {"model_output": "model"}}
UNKNOWN = "unknown_count"  # metrics of a row that must be known and are not

_REBUILD = "rebuild the stage with a new attempt; if it fails again, the job that built it has a bug"
_RAW = "look at the raw files of the day and at the reasons in table quarantine; then rebuild with a new attempt"


def raw_files(limits: RawThresholds) -> list[Expectation]:
    """Expect this of each raw file that may hold the day: one row a file."""
    again = "have the file delivered again, whole and as agreed, then run again with a new attempt"
    columns = "have the file delivered with the columns of logs.columns, or, if the change is meant, change the definition"
    other = "have the day's own file delivered; if the file is right, correct the time zone in logs.days_in_name or events.time of the definition"
    return [
        *_zero_or_stop("empty_count", "No file is empty.", again),
        *_contract("unreadable_count", "Every file can be read.", again),
        *_contract("missing_column_count", "Every file has the declared columns.", columns),
        *_zero_or_stop("cut_count", "Every file ends with a whole line.", again),
        *_zero_or_stop("copy_count", "No two files hold the same bytes.", other),
        *_graded("refused_share", "Nearly all sampled lines are rows.", "correct the file, or events.time and logs.columns of the definition if the logs have changed",
                 (None, limits.max_refused_share_warning), (None, limits.max_refused_share_critical)),
        *_graded("outside_named_days_share", "Rows are of the days that the file's name promises.", other,
                 (None, limits.max_outside_share_warning), (None, limits.max_outside_share_critical)),
    ]  # fmt: skip


def raw_day(limits: RawThresholds) -> list[Expectation]:
    """Expect this of all raw files that may hold the day: one row."""
    arrived = "check that all files of the day have arrived whole, then run again with a new attempt"
    return [
        *_stop("files", "A raw file may hold the day.", "deliver the day's file, or choose another --dt", low=1),
        *_graded("bytes_to_trailing_median", "The day's files are about as large as those of the days before.", arrived,
                 (limits.min_bytes_ratio_warning, limits.max_bytes_ratio_warning), (limits.min_bytes_ratio_critical, None)),
    ]  # fmt: skip


def events_days(limits: EventThresholds, drift: DriftThresholds) -> list[Expectation]:
    """Expect this of the statistics of events: one row a staged day."""
    raw = _RAW
    arrived = "check that the raw logs of the day have arrived"
    return [
        *_contract("null_count", "No column of the contract has nulls.", _REBUILD),
        *_contract("negative_count", "Ids, watch times and durations are not negative.", _REBUILD),
        *_contract("context_out_of_range_count", "Contexts are -1 (unknown) or more.", _REBUILD),
        *_contract("unreconciled_count", "Raw rows read = events + duplicates + quarantined.", _REBUILD),
        *_contract("manifest_rows_difference_count", "The manifest's count of events is the table's.", _REBUILD),
        *_contract("quarantine_rows_difference_count", "Every quarantined row is in table quarantine.", _REBUILD),
        *_contract("outside_day_count", "Every event is of its partition's UTC day.", _REBUILD),
        *_contract("feedback_out_of_range_count", "No feedback bit is set that the data set does not define.", _REBUILD),
        *_zero_or_stop("lost_day_count", "The partition's day has events, and so has every day with raw rows.", arrived),
        *_contract("rows_lost_count", "A day has no fewer rows than what is published of it.",
                   "bring back the raw files that it was built from; or, if fewer rows are right, build it with a new attempt and --accept-loss DAY"),
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
        _band("bot_user_share", CRITICAL, "Among many users, none dominates the day.", "find out who it is; remove a bot's rows from the raw logs, then rebuild with a new attempt",
              high=limits.max_user_share_critical),
        _band("odd_empty_hour_count", WARNING, "No hour is empty between two full ones.", arrived, high=0),
        _band("users", WARNING, "More than one user was active.", raw, low=limits.min_users),
        _band("rows_to_trailing_median", WARNING, "The day is about as large as the days before it.", raw,
              limits.min_rows_ratio, limits.max_rows_ratio),
        *_events_drift(drift, arrived),
    ]  # fmt: skip


def _events_drift(drift: DriftThresholds, arrived: str) -> list[Expectation]:
    """Expect this of a day against the days before it; what cannot be judged is null and passes."""
    logging = "ask the makers of the logs what has changed; if the change is meant, raise the threshold, else have the day delivered again"
    zone = "check the clock and the time zone of the raw times (events.time of the definition), then have the day delivered again"
    ids = "check how user and item ids are made: they no longer mean what they meant the day before; then have the day delivered again"
    return [
        _band("missing_hour_count", CRITICAL, "No hour is without events that has them on other days.", arrived, high=0),
        _band("thin_hour_count", WARNING, "No hour has far fewer events than on other days.", arrived, high=0),
        _band("hour_shift", CRITICAL, "The hour profile is not another day's, turned round.", zone, low=0, high=0),
        *_graded("hour_psi", "The hour profile is that of the days before (PSI).", zone, (None, drift.hour_psi_warning), (None, drift.hour_psi_critical)),
        *_graded("label_rate_to_trailing", "The label rate is that of the days before.", logging, drift.label_rate_ratio_warning, drift.label_rate_ratio_critical),
        _band("label_kl", WARNING, "The label's distribution is that of the days before (KL).", logging, high=drift.label_kl_warning),
        _band("vanished_signal_count", CRITICAL, "Every signal of the days before still occurs.", logging, high=0),
        *_graded("action_mix_psi", "The mix of signals is that of the days before (PSI).", logging, (None, drift.action_mix_psi_warning), (None, drift.action_mix_psi_critical)),
        _band("new_category_share", WARNING, "Fields have the values of the days before.", logging, high=drift.new_category_share),
        _band("field_psi", WARNING, "Values of fields are as frequent as on the days before (PSI).", logging, high=drift.field_psi_warning),
        *_graded("known_user_share_drop", "As many rows as before are of known users.", ids, (None, drift.known_user_drop_warning), (None, drift.known_user_drop_critical)),
        *_graded("known_item_share_drop", "As many rows as before are of known items (novelty).", ids, (None, drift.known_item_drop_warning), (None, drift.known_item_drop_critical)),
        *_graded("item_popularity_drop", "Items that were popular still are.", ids, (None, drift.item_popularity_drop_warning), (None, drift.item_popularity_drop_critical)),
        *_graded("duration_mismatch_rise", "An item has the duration that it had.", ids, (None, drift.duration_mismatch_rise_warning), (None, drift.duration_mismatch_rise_critical)),
        *_graded("repeated_day_share", "The day is not the day before, delivered again.", arrived, (None, drift.repeated_day_share_warning), (None, drift.repeated_day_share_critical)),
        _band("largest_user_share_rise", WARNING, "No user takes far more of the day than before.", _RAW, high=drift.largest_user_share_rise),
        _band("watch_p50_to_trailing", WARNING, "The median watch time is that of the days before.", logging, *drift.watch_ratio),
        *_graded("rows_to_trailing_extremes", "The day is not smaller than the smallest of steady days, nor larger than the largest.", arrived,
                 (None, drift.rows_to_extremes_warning), (drift.rows_to_extremes_critical, None)),
    ]  # fmt: skip


def items(limits: SequenceThresholds, drift: DriftThresholds) -> list[Expectation]:
    """Expect this of the statistics of items: one row."""
    files = "check that the item files are those of the logs (their ids and their day), then build sequences again with a new attempt"
    look = "look for a change of the catalogue or of its export"
    return [
        *_stop("items", "The window shows items.", _REBUILD, low=1),
        *_graded("without_fields_share", "The item files describe the items.", files,
                 (None, limits.max_items_without_fields_share_warning), (None, limits.max_items_without_fields_share_critical)),
        *_graded("without_fields_share_rise", "The item files describe as many of the items as in the partitions before.", files,
                 (None, limits.max_items_without_fields_rise_warning), (None, limits.max_items_without_fields_rise_critical)),
        _band("train_unseen_share", INFO, "Recorded: items that no training day showed.", look, high=0.5),
        _band("items_to_trailing", WARNING, "About as many items as in the partitions before.", look, limits.min_users_ratio, limits.max_users_ratio),
        _band("new_category_share", WARNING, "Item fields have the values of the partitions before.", look, high=drift.new_category_share),
        _band("field_psi", WARNING, "Values of item fields are as frequent as in the partitions before (PSI).", look, high=drift.field_psi_warning),
    ]  # fmt: skip


def sequences(limits: SequenceThresholds, drift: DriftThresholds) -> list[Expectation]:
    """Expect this of the statistics of sequences: one row."""
    look = "compare with the partitions before it; the events of the window are the likely cause"
    empty = "check that events of every day of the window are published and that the target window covers them"
    return [
        *_contract("leak_count", "No target sees an event of its own time or later.", _REBUILD),
        *_contract("history_disorder_count", "History times never decrease.", _REBUILD),
        *_contract("target_disorder_count", "Target times never decrease.", _REBUILD),
        *_contract("unequal_length_count", "The lists of a side are equally long.", _REBUILD),
        *_contract("history_end_out_of_range_count", "target_history_end lies within the history.", _REBUILD),
        *_contract("item_index_out_of_range_count", "Every item index points into items.", _REBUILD),
        *_contract("item_index_not_dense_count", "items.item_index is the row's position.", _REBUILD),
        *_contract("item_id_not_increasing_count", "items is in strict item_id order.", _REBUILD),
        *_contract("label_not_binary_count", "Labels are 0 or 1.", _REBUILD),
        *_contract("watch_bucket_out_of_range_count", "Watch buckets are those of etl.warehouse.schemas.", _REBUILD),
        *_contract("target_outside_window_count", "Targets are of the target window.", _REBUILD),
        *_contract("split_wrong_count", "Evaluation targets are those of the evaluation days, and no others.", _REBUILD),
        *_contract("repeated_user_count", "A user is one row.", _REBUILD),
        *_contract("unreconciled_count", "The manifest's counts are the table's.", _REBUILD),
        *_stop("train_targets", "There is something to train on.", empty, low=1),
        *_stop("eval_targets", "There is something to evaluate on.", empty, low=1),
        _band("train_label_rate", WARNING, "The label rate is plausible.", look, limits.min_label_rate, limits.max_label_rate),
        _band("eval_label_rate", WARNING, "The label rate is plausible.", look, limits.min_label_rate, limits.max_label_rate),
        _band("truncated_user_share", WARNING, "Most histories are complete.", "raise --max-history",
              high=limits.max_truncated_user_share),
        *_graded("eval_empty_history_share", "Evaluation targets have a history.",
                 "compare the resolution of events.time with history.cutoff and history.of: what happens at one time never sees each other",
                 (None, limits.max_empty_history_share_warning), (None, limits.max_empty_history_share_critical)),
        *[_band(f"history_length_p{q}", INFO, "Recorded: events in a user's history.", look, low=1) for q in (50, 90, 99)],
        *[_band(f"history_length_p{q}_to_trailing", WARNING, "Histories are as long as in partitions with as many days.", look, *drift.length_ratio)
          for q in (50, 90, 99)],
        *[_band(f"{what}_to_trailing", WARNING, "About as many as in partitions with as many days.", look, limits.min_users_ratio, limits.max_users_ratio)
          for what in ("users", "targets")],
        *_graded("train_label_rate_to_trailing", "The label rate is that of the partitions before.", look, drift.label_rate_ratio_warning, drift.label_rate_ratio_critical),
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
        *_contract("mixed_attempts_count", "items and sequences come from one attempt.", again),
        *_stop("train_targets", "There is something to train on.", again, low=1),
        *_stop("eval_targets", "There is something to evaluate on.", again, low=1),
        _band("label_rate_difference", WARNING, "Training days and evaluation day have about the same label rate.", drift,
              high=limits.max_label_rate_difference),
        _band("label_rate_ratio", CRITICAL, "Training days and evaluation day have comparable label rates.", drift, low=limits.min_label_rate_ratio),
        _band("hour_skew_psi", WARNING, "Targets of the evaluation day are of the hours of the training days (PSI).", drift, high=limits.max_hour_psi),
        _band("context_skew_psi", WARNING, "Targets of the evaluation day are of the contexts of the training days (PSI).", drift, high=limits.max_context_psi),
        _band("history_length_skew_psi", INFO, "Recorded: how visible histories differ between training days and evaluation day (PSI).", drift,
              high=limits.max_history_length_psi),
        _band("unseen_eval_item_share", INFO, "Recorded: evaluation targets whose item no training day showed.", drift,
              high=limits.max_unseen_item_share),
    ]  # fmt: skip


def model_output(limits: ModelOutputThresholds) -> list[Expectation]:
    """Expect this of the scores of the model that would be registered: one row."""
    model = "look at the training's metrics for a loss that diverged; train again with a new attempt"
    data = "compare the label rates of training days and evaluation day (gate training_input), then train again with a new attempt"
    return [
        *_stop("targets", "There are scores.", model, low=1),
        *_contract("not_a_number_count", "Every score is a number.", model),
        *_contract("out_of_range_count", "Every score is a probability.", model),
        *_graded("constant_share", "Scores differ.", model, (None, limits.max_constant_share_warning), (None, limits.max_constant_share_critical)),
        _band("score_sd", CRITICAL, "Scores differ by more than rounding.", model, low=limits.min_score_sd),
        *_graded("expected_ratio", "Probabilities add up to the positives (calibration in the mean).", data, limits.expected_ratio_warning, limits.expected_ratio_critical),
        _band("ece", WARNING, "Probabilities are those observed (calibration by bins).", data, high=limits.max_ece),
        _band("auc", WARNING, "The model orders targets better than chance.", model, low=0.5),
        _band("score_psi", WARNING, "Scores are distributed as on the days before (PSI).", data, high=limits.score_psi_warning),
    ]  # fmt: skip


def conditions(own: Sequence[Condition]) -> list[Expectation]:
    """Expect that few rows fail the data set's own conditions: one row a day, the shares of rows that fail each."""
    return [_band(condition.name, condition.severity, condition.reason, condition.remedy, high=condition.tolerated_share) for condition in own]


def build_suite(name: str, thresholds: Thresholds, own: Sequence[Condition] = ()) -> ExpectationSuite:
    """Return a suite by name: that of the function that lists its expectations; with own conditions the suite of these."""
    import great_expectations as gx

    if own:
        return gx.ExpectationSuite(name=name, expectations=conditions(own))

    expectations = {
        "raw_files": lambda: raw_files(thresholds.raw),
        "raw_day": lambda: raw_day(thresholds.raw),
        "events_days": lambda: events_days(thresholds.events, thresholds.drift),
        "items": lambda: items(thresholds.sequences, thresholds.drift),
        "sequences": lambda: sequences(thresholds.sequences, thresholds.drift),
        "training_window": training_window,
        "training_input": lambda: training_input(thresholds.training_input),
        "model_output": lambda: model_output(thresholds.model_output),
    }
    found = expectations[name]()
    if any((expectation.meta or {}).get("must_be_known") for expectation in found):
        # One for all of them: an expectation costs more than a metric.
        found.append(_band(UNKNOWN, CRITICAL, "Every metric that decides is known.", _REBUILD, low=0, high=0, contract=True))
    return gx.ExpectationSuite(name=name, expectations=found)


def _band(
    metric: str, severity: str, notes: str, remedy: str, low: float | None = None, high: float | None = None, strict: bool = False,
    must_be_known: bool = False, contract: bool = False,
) -> Expectation:
    import great_expectations.expectations as gxe

    # Words, not signs: Data Docs pages would read "<" as the start of a tag.
    signs = ("above", "below") if strict else ("at least", "at most")
    bounds = [f"{sign} {bound:g}" for sign, bound in zip(signs, (low, high), strict=True) if bound is not None]
    if reason := next((reason for bound in (low, high) if (reason := reason_of(bound))), ""):
        notes = f"{notes} The definition sets this bound: {reason}"
    notes = as_words(notes)
    low, high = (None if bound is None else bound + 0 for bound in (low, high))  # plain numbers, which are written as JSON
    return gxe.ExpectColumnValuesToBeBetween(
        description=f"{severity}: {metric} is {' and '.join(bounds)}. {notes}",
        column=metric, min_value=low, max_value=high, strict_min=strict, strict_max=strict,
        severity=_severity(severity), notes=notes, meta={"remedy": remedy, "bounds": " and ".join(bounds), "must_be_known": must_be_known, "contract": contract})  # fmt: skip


def _graded(metric: str, notes: str, remedy: str, warning: tuple[float | None, float | None], critical: tuple[float | None, float | None]) -> list[Expectation]:
    """Expect a metric within (low, high), a warning beyond the one pair and critical beyond the other; an unknown one passes."""
    return [_band(metric, CRITICAL, notes, remedy, *critical), _band(metric, WARNING, notes, remedy, *warning)]


def _stop(
    metric: str, notes: str, remedy: str, low: float | None = None, high: float | None = None, strict: bool = False, contract: bool = False
) -> list[Expectation]:
    """Expect a metric within critical bounds, and known (see UNKNOWN): a bound alone holds for a null."""
    return [_band(metric, CRITICAL, notes, remedy, low, high, strict, must_be_known=True, contract=contract)]


def must_be_known(suite: ExpectationSuite) -> list[str]:
    """Return the metrics of a suite that must be known, too."""
    return [str(expectation.column) for expectation in suite.expectations if (expectation.meta or {}).get("must_be_known")]  # type: ignore[attr-defined]


def _zero_or_stop(metric: str, notes: str, remedy: str) -> list[Expectation]:
    return _stop(metric, notes, remedy, low=0, high=0)


def _contract(metric: str, notes: str, remedy: str) -> list[Expectation]:
    """Expect none of what breaks the tables' contract (columns, keys, counts, order): nobody can let that through."""
    return _stop(metric, notes, remedy, low=0, high=0, contract=True)


def as_words(text: str) -> str:
    """Return a text that Data Docs pages do not read as tags."""
    return text.replace("<", "\u2039").replace(">", "\u203a")


def _severity(name: str) -> FailureSeverity:
    from great_expectations.expectations.metadata_types import FailureSeverity

    return FailureSeverity(name)


def table() -> str:
    """Return every expectation as a page for people, with the default bounds: docs/expectations.md."""
    lines = ["# Every expectation", "", "Written by `python -m etl.quality.judge.suites > docs/expectations.md`, of the default bounds; `quality.bounds` of a definition sets others. What the",
             "metrics are for and which faults they were tried on: [validation.md](validation.md).", ""]  # fmt: skip
    for gate, suites in SUITES.items():
        lines += [f"## Gate {gate}", "", "| of each | metric | severity | must be | so that | else |", "|---|---|---|---|---|---|"]
        for suite, row in suites.items():
            for one in build_suite(suite, Thresholds()).expectations:
                meta = one.meta or {}
                severity = f"{one.severity.value}{', nobody lets it through' if meta['contract'] else ''}"
                bounds = meta["bounds"] if one.min_value != one.max_value else f"{one.min_value:g}"  # type: ignore[attr-defined]
                lines.append(f"| {row} | `{one.column}` | {severity} | {bounds} | {one.notes} | {meta['remedy'] if one.severity.value != INFO else ''} |")  # type: ignore[attr-defined]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), end="")

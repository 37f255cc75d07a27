"""Numbers of a partition that the suites judge: pure functions from Arrow tables to one flat row of metrics.

A metric named `*_count` counts offending rows, list elements or users and should be 0; `*_share` and `*_rate` are
fractions of 1. Lists are handled through their offsets: nothing here loops over rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.datasets.definition import History
from etl.datasets.thresholds import DriftThresholds, EventThresholds
from etl.quality.measure.drift import NAN, kl, psi
from etl.quality.measure.profile import MS_PER_HOUR, event_keys, value_shares
from etl.sequences.sequence_rows import cut_offs_ms
from etl.warehouse.partitions import MS_PER_DAY, Window, day_number
from etl.warehouse.schemas import EVALUATION, EVENTS, TRAIN, VALIDATION, WATCH_BUCKETS, history_first

NEVER_NEGATIVE = ("user_id", "item_id", "watch_time_ms", "duration_ms")

SPLITS = 1 + max(TRAIN, VALIDATION, EVALUATION)
# Targets are counted by these, each in so many bins.
SPECTRA = {"hour": 24, "context": 66, "history_length": 24}

Row = dict[str, float | str]
Spectra = dict[tuple[str, int], np.ndarray]

HISTORY_LISTS = ("history_item_index", "history_time_ms", "history_feedback", "history_watch_bucket")
TARGET_LISTS = ("target_item_index", "target_time_ms", "target_label", "target_context", "target_split", "target_history_end")

SEQUENCE_COLUMNS = ("user_id", *HISTORY_LISTS, *TARGET_LISTS)


def events_row(
    dt: str,
    is_partition_day: bool,
    events: pa.Table,
    counts: Mapping[str, int],
    quarantine_rows: int,
    trailing_rows: Sequence[int],
    label_bit: int | None,
    feedback_bits: int,
    limits: EventThresholds,
    drift: DriftThresholds,
    repeats_kept: bool = False,
    rows_to_keep: int = 0,
) -> Row:
    """Return the metrics of one day of events; what an empty day cannot have is not a number.

    Args:
        is_partition_day: the day is the partition itself, not a day of its lookback.
        events: the day, all columns of the contract.
        counts: the reconciliation figures of its manifest.
        quarantine_rows: rows of the day's quarantine table.
        trailing_rows: row counts of the known days before it.
        label_bit: bit of `feedback` that is the label; None where negatives are sampled: no label rate.
        feedback_bits: bits of `feedback` that are in use.
        limits, drift: how many rows, users and trailing days it takes to judge.
        repeats_kept: the data set keeps repeated rows, so they are no sign of a fault.
        rows_to_keep: rows that are published of the day.
    """
    rows = events.num_rows
    user, time_ms, feedback = (_numpy(events[name]) for name in ("user_id", "event_time_ms", "feedback"))
    rows_read, duplicates = counts.get("rows_read", 0), counts.get("duplicates", 0)
    quarantined = counts.get("quarantined", 0)
    first_of_key = np.unique(event_keys(events), return_index=True)[1]
    hours, hour_rows = np.unique(time_ms // MS_PER_HOUR, return_counts=True)
    hour_keys = np.bincount(np.searchsorted(hours, time_ms[first_of_key] // MS_PER_HOUR), minlength=len(hours))
    hour_repeated = (1 - hour_keys / hour_rows)[hour_rows >= limits.min_hour_rows]
    rows_by_user = np.unique(user, return_counts=True)[1]
    filled = [count for count in trailing_rows if count > 0]
    median = float(np.median(filled)) if len(filled) >= drift.min_trailing_days else NAN
    dense = median >= limits.min_judged_rows
    judged = rows >= limits.min_judged_rows and len(rows_by_user) >= limits.min_judged_users
    return {
        "dt": dt,
        "rows": rows,
        "rows_read": rows_read,
        "lost_day_count": int(rows == 0 and (is_partition_day or rows_read > 0)),
        "rows_lost_count": max(0, rows_to_keep - rows),
        "gap_count": int(rows == 0 and len(filled) > 0 and np.median(filled) >= limits.min_judged_rows),
        "unreconciled_count": abs(rows_read - rows - duplicates - quarantined),
        "manifest_rows_difference_count": abs(counts.get("events", 0) - rows),
        "quarantine_rows_difference_count": abs(quarantine_rows - quarantined),
        "duplicate_share": _share(duplicates, rows_read) if rows_read >= limits.min_judged_rows else 0.0,
        "quarantine_share": _share(quarantined, rows_read),
        "repeated_key_share": 0.0 if repeats_kept or not judged else _share(rows - len(first_of_key), rows),
        "worst_hour_repeated_key_share": 0.0 if repeats_kept else float(hour_repeated.max(initial=0)),
        "label_rate": _share(int(((feedback >> label_bit) & 1).sum()), rows) if judged and label_bit is not None else NAN,
        "null_count": sum(events[name].null_count for name in EVENTS.names),
        "negative_count": sum(int(pc.sum(pc.less(events[name], 0)).as_py() or 0) for name in NEVER_NEGATIVE),
        "context_out_of_range_count": int(pc.sum(pc.less(events["context"], -1)).as_py() or 0),
        "outside_day_count": int((time_ms // MS_PER_DAY != day_number(dt)).sum()),
        "feedback_out_of_range_count": int(((feedback < 0) | (feedback >= 1 << feedback_bits)).sum()),
        # Times of day resolution have no hours: all of a day's are one.
        "hours_covered": len(hour_rows) if judged and (time_ms % MS_PER_DAY != time_ms[0] % MS_PER_DAY).any() else NAN,
        "users": len(rows_by_user) if rows and (dense or judged) else NAN,
        "largest_user_share": (largest := _share(int(rows_by_user.max(initial=0)), rows)) if judged else NAN,
        "bot_user_share": largest if judged and len(rows_by_user) >= limits.min_users_for_bots else NAN,
        "rows_to_trailing_median": rows / median if rows and dense else NAN,
    }


@dataclass(frozen=True)
class SequenceRules:
    """What sequences of a partition must keep to.

    Attributes:
        target_days: length of the target window, `dt` included.
        first_evaluation_ms: from here on targets are for evaluation; None where positions decide, not days.
        history: the rule that decides what a target may see.
    """

    dt: str
    target_days: int
    first_evaluation_ms: int | None
    history: History

    @staticmethod
    def of(window: Window, by_position: bool, history: History) -> SequenceRules:
        if by_position:
            return SequenceRules(window.dt, window.lookback_days, None, history)
        return SequenceRules(window.dt, window.target_days, day_number(window.first_evaluation_dt) * MS_PER_DAY, history)


@dataclass(frozen=True)
class Bucket:
    """What is measured of one bucket of users; buckets add up.

    Attributes:
        user_id, history_length: int64 [users].
        sums: metrics that are sums.
        spectra: targets counted by split and value.
    """

    user_id: np.ndarray
    history_length: np.ndarray
    sums: Mapping[str, int]
    spectra: Spectra


def measured_bucket(users: pa.Table, train_occurrences: np.ndarray, rules: SequenceRules) -> Bucket:
    """Measure every list of one bucket of users.

    Args:
        users: the columns SEQUENCE_COLUMNS.
        train_occurrences: int64, of each item of the partition.
    """
    history_length, sums = _sequence_sums(users, len(train_occurrences), rules)
    aligned = not sums["unequal_length_count"]
    sums["unseen_eval_targets"] = unseen_eval_targets(users, train_occurrences) if aligned and not sums["item_index_out_of_range_count"] else 0
    return Bucket(_numpy(users["user_id"]), history_length, sums, target_spectra(users, rules.history.max_events) if aligned else {})


def sequences_row(dt: str, buckets: Sequence[Bucket], items: pa.Table, counts: Mapping[str, int], min_judged_targets: int = 1) -> Row:
    """Return the metrics of one partition of sequences and its items.

    Args:
        items: the item_index and item_id columns of `items`.
        counts: the reconciliation figures of the manifest of `sequences`.
        min_judged_targets: fewer evaluation targets are not judged by the share of empty histories.
    """
    item_index, item_id = _numpy(items["item_index"]), _numpy(items["item_id"])
    lengths = [np.zeros(0, np.int64), *(bucket.history_length for bucket in buckets)]
    user_ids = [np.zeros(0, np.int64), *(bucket.user_id for bucket in buckets)]
    sums: dict[str, int] = {}
    spectra: Spectra = {}
    for bucket in buckets:
        for name, value in bucket.sums.items():
            sums[name] = sums.get(name, 0) + value
        for key, counted in bucket.spectra.items():
            spectra[key] = spectra[key] + counted if key in spectra else counted
    length, user_id = np.concatenate(lengths), np.concatenate(user_ids)
    total = {name: sums.get(name, 0) for name in _SUMMED}
    targets = total["train_targets"] + total["validation_targets"] + total["eval_targets"]
    found = {**total, "users": len(user_id), "targets": targets}
    return {
        "dt": dt,
        "users": len(user_id),
        "items": len(item_index),
        "targets": targets,
        **{name: total[name] for name in _SUMMED if name not in ("train_positives", "eval_positives", "eval_empty_histories")},
        "repeated_user_count": len(user_id) - len(np.unique(user_id)),
        "item_index_not_dense_count": int((item_index != np.arange(len(item_index))).sum()),
        "item_id_not_increasing_count": int((np.diff(item_id) <= 0).sum()),
        "unreconciled_count": sum(
            abs(counts.get(name, 0) - found[name])
            for name in ("users", "targets", "train_targets", "validation_targets", "eval_targets", "history_events")
        ),
        "train_label_rate": _share(total["train_positives"], total["train_targets"]),
        "eval_label_rate": _share(total["eval_positives"], total["eval_targets"]),
        **{f"{what}_skew_psi": _skew(spectra.get((what, TRAIN)), spectra.get((what, EVALUATION))) for what in SPECTRA},
        "eval_empty_history_share": _share(total["eval_empty_histories"], total["eval_targets"]) if total["eval_targets"] >= min_judged_targets else NAN,
        "truncated_user_share": _share(counts.get("truncated_users", 0), len(user_id)),
        **{f"history_length_p{q}": float(np.percentile(length, q)) if len(length) else 0.0 for q in (50, 90, 99)},
    }


_SUMMED = (
    "unseen_eval_targets",
    "eval_empty_histories",
    "train_targets",
    "validation_targets",
    "eval_targets",
    "train_positives",
    "eval_positives",
    "history_events",
    "unequal_length_count",
    "history_disorder_count",
    "target_disorder_count",
    "history_end_out_of_range_count",
    "leak_count",
    "item_index_out_of_range_count",
    "label_not_binary_count",
    "watch_bucket_out_of_range_count",
    "target_outside_window_count",
    "split_wrong_count",
)


def _sequence_sums(part: pa.Table, items: int, rules: SequenceRules) -> tuple[np.ndarray, dict[str, int]]:
    """Return the history lengths and the summable metrics of one bucket of users."""
    lists = {name: part[name].combine_chunks() for name in (*HISTORY_LISTS, *TARGET_LISTS)}
    length = {name: _numpy(pc.list_value_length(column)) for name, column in lists.items()}
    value = {name: _numpy(pc.list_flatten(column)) for name, column in lists.items()}
    unequal = np.zeros(part.num_rows, dtype=bool)
    for names in (HISTORY_LISTS, TARGET_LISTS):
        for name in names[1:]:
            unequal |= length[name] != length[names[0]]

    time_ms, history_length = value["history_time_ms"], length["history_time_ms"]
    start = np.concatenate([[0], np.cumsum(history_length)])[:-1]  # of each user's history, in `time_ms`
    target_time_ms, end = value["target_time_ms"], value["target_history_end"]
    day = target_time_ms // MS_PER_DAY
    last_day = day_number(rules.dt)
    split = value["target_split"]
    wrong = (split != TRAIN) & (split != VALIDATION) & (split != EVALUATION)
    if rules.first_evaluation_ms is not None and len(split) == len(target_time_ms):
        wrong |= (split == EVALUATION) != (target_time_ms >= rules.first_evaluation_ms)
    metrics = {
        "history_events": len(time_ms),
        "train_targets": int((split == TRAIN).sum()),
        "validation_targets": int((split == VALIDATION).sum()),
        "eval_targets": int((split == EVALUATION).sum()),
        "split_wrong_count": int(wrong.sum()),
        "unequal_length_count": int(unequal.sum()),
        "history_disorder_count": _disorder(time_ms, history_length),
        "target_disorder_count": _disorder(target_time_ms, length["target_time_ms"]),
        "item_index_out_of_range_count": sum(
            int(((value[name] < 0) | (value[name] >= items)).sum()) for name in ("history_item_index", "target_item_index")
        ),
        "label_not_binary_count": int(((value["target_label"] != 0) & (value["target_label"] != 1)).sum()),
        "watch_bucket_out_of_range_count": int(
            ((value["history_watch_bucket"] < 0) | (value["history_watch_bucket"] >= WATCH_BUCKETS)).sum()
        ),
        "target_outside_window_count": int(((day > last_day) | (day <= last_day - rules.target_days)).sum()),
    }
    if unequal.any():  # the lists of a user do not line up: what joins them has no meaning
        return history_length, {**metrics, "train_positives": 0, "eval_positives": 0}
    user = np.repeat(np.arange(part.num_rows), length["target_time_ms"])
    in_range = (end >= 0) & (end <= history_length[user])
    visible = in_range & (end > 0)
    # Every visible event counts, not the last alone: the running maximum holds even where a history is unsorted.
    latest_ms = _running_max(time_ms, history_length)
    leaks = latest_ms[(start[user] + end - 1)[visible]] >= cut_offs_ms(target_time_ms, rules.history)[visible]
    return history_length, {
        **metrics,
        "train_positives": int((value["target_label"][split == TRAIN] == 1).sum()),
        "eval_positives": int((value["target_label"][split == EVALUATION] == 1).sum()),
        "eval_empty_histories": int(((end == 0) & (split == EVALUATION)).sum()),
        "history_end_out_of_range_count": int((~in_range).sum()),
        "leak_count": int(leaks.sum()),
    }


def target_spectra(part: pa.Table, max_events: int) -> Spectra:
    """Count the targets of a bucket by split and, each on its own, UTC hour, context and length of the visible history."""
    split, time_ms, context, end = (_numpy(pc.list_flatten(part[f"target_{name}"])) for name in ("split", "time_ms", "context", "history_end"))
    visible = end - history_first(end, max_events)
    bits = np.log2(np.arange(1, int(visible.max(initial=0)) + 2)).astype(np.int32).clip(0, SPECTRA["history_length"] - 1)
    place = {"hour": time_ms // MS_PER_HOUR % SPECTRA["hour"], "context": context.astype(np.int32).clip(-1, SPECTRA["context"] - 2) + 1, "history_length": bits[visible.clip(0)]}
    known = (split >= 0) & (split < SPLITS)
    found: Spectra = {}
    for what, values in place.items():
        both = values * SPLITS + split if known.all() else values[known] * SPLITS + split[known]
        counted = np.bincount(both, minlength=SPECTRA[what] * SPLITS).reshape(-1, SPLITS)
        found |= {(what, side): counted[:, side] for side in (TRAIN, EVALUATION)}
    return found


def _skew(train: np.ndarray | None, evaluation: np.ndarray | None) -> float:
    """Return the PSI of evaluation targets against training targets; nan where a side has none."""
    if train is None or evaluation is None or not train.sum() or not evaluation.sum():
        return NAN
    return psi(train / train.sum(), evaluation / evaluation.sum())


def items_row(dt: str, items: pa.Table, without_fields: int, fields: Mapping[str, str], judged: bool) -> Row:
    """Return the metrics of `items` of a partition.

    Args:
        items: the table with its fields.
        without_fields: items of which no field is known, as its manifest counts them.
        fields: name -> kind of the item fields.
        judged: there are item files that should describe them.
    """
    rows = items.num_rows
    return {
        "dt": dt, "items": rows, "without_fields_share": _share(without_fields, rows) if judged else NAN,
        "train_unseen_share": _share(int((_numpy(items["train_occurrences"]) == 0).sum()), rows),
        **{name: share for field, kind in fields.items() if kind == "category" for name, share in value_shares(field, items[field]).items()},
    }  # fmt: skip


def window_rows(days: Sequence[str], inputs: Mapping[str, str], current: Mapping[str, str]) -> list[Row]:
    """Return one row a day of the window: was it read, and is what was read still the current data?

    Args:
        days: the days of the window.
        inputs: day -> data digest of the events that the sequences were made from.
        current: day -> data digest of the events that are published now.
    """
    return [
        {
            "dt": day,
            "missing_count": int(day not in inputs or day not in current),
            "stale_count": int(day in inputs and day in current and inputs[day] != current[day]),
        }
        for day in days
    ]


def training_input_row(sequences_stats: Mapping[str, float], dt: str, mixed: bool, min_judged_targets: int) -> Row:
    """Return the metrics of a published partition that a training is about to read.

    Args:
        sequences_stats: the partition's `sequences_row` with `unseen_eval_targets`.
        mixed: `items` and `sequences` come from different attempts.
        min_judged_targets: sides with fewer targets are not compared.
    """
    kept = {name: float(sequences_stats[name]) for name in ("users", "items", "train_targets", "eval_targets", "train_label_rate", "eval_label_rate")}
    train, evaluation = kept["train_label_rate"], kept["eval_label_rate"]
    judged = min(kept["train_targets"], kept["eval_targets"]) >= min_judged_targets
    both = np.array([[1 - train, train], [1 - evaluation, evaluation]])
    return {
        "dt": dt,
        **kept,
        "mixed_attempts_count": int(mixed),
        "label_rate_difference": abs(train - evaluation),
        "label_rate_ratio": min(train, evaluation) / max(train, evaluation) if judged and max(train, evaluation) > 0 else NAN,
        "label_kl": kl(*both) if judged else NAN,
        **{f"{what}_skew_psi": float(sequences_stats[f"{what}_skew_psi"]) if judged else NAN for what in SPECTRA},
        "unseen_eval_item_share": _share(float(sequences_stats["unseen_eval_targets"]), kept["eval_targets"]),
    }


def unseen_eval_targets(part: pa.Table, train_occurrences: np.ndarray) -> int:
    """Return how many evaluation targets of a bucket show an item that no training day showed."""
    index = _numpy(pc.list_flatten(part["target_item_index"]))
    is_eval = _numpy(pc.list_flatten(part["target_split"])) == EVALUATION
    return int((train_occurrences[index[is_eval]] == 0).sum())


def _numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _disorder(value: np.ndarray, lengths: np.ndarray) -> int:
    """Count the elements that are smaller than the one before them in the same list."""
    falls = np.diff(value) < 0
    first = np.cumsum(lengths)[:-1]  # positions where a new list starts; empty lists repeat one or point past the end
    falls[first[(first > 0) & (first < len(value))] - 1] = False
    return int(falls.sum())


def _running_max(value: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the maximum so far within each list."""
    if len(value) == 0:
        return value
    # Lists are lifted above each other, so that one running maximum over all of them never looks back into another.
    lift = np.repeat(np.arange(len(lengths)), lengths) * (int(value.max()) - int(value.min()) + 1)
    return np.maximum.accumulate(value + lift) - lift

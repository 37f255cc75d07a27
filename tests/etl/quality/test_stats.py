"""Vectorised list metrics against the plainest possible loops.

.venv/bin/python -m pytest tests/etl/quality/test_stats.py -q
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.datasets.definition import History
from etl.metrics.registry import SUITES
from etl.metrics.thresholds import EventSettings, Thresholds
from etl.quality.measure import sequences
from etl.quality.measure.events import EventsDay
from etl.quality.measure.measured import Row, measured
from etl.warehouse.partitions import MS_PER_DAY, day_number
from etl.warehouse.schemas import EVALUATION, EVENTS, SEQUENCES, TRAIN, VALIDATION

DT = "2022-04-21"
DAY_MS = day_number(DT) * MS_PER_DAY

times = st.lists(st.integers(DAY_MS - 5, DAY_MS + 5), max_size=5)
targets = st.tuples(st.integers(DAY_MS - 5, DAY_MS + 5), st.integers(-1, 6), st.integers(-1, 3))  # time, end, split
users = st.lists(st.tuples(times, st.lists(targets, max_size=4)), max_size=5)


def table(rows: list) -> pa.Table:
    columns: dict[str, list] = {name: [] for name in SEQUENCES.names}
    for user, (history, targets) in enumerate(rows):
        columns["user_id"].append(user)
        columns["user_fields"].append([])
        columns["history_time_ms"].append(history)
        for name in ("history_item_index", "history_feedback", "history_watch_bucket"):
            columns[name].append([0] * len(history))
        for name, values in zip(
            ("target_time_ms", "target_history_end", "target_split"),
            zip(*targets, strict=True) if targets else [()] * 3,
            strict=True,
        ):
            columns[name].append(list(values))
        for name in ("target_item_index", "target_label", "target_context"):
            columns[name].append([0] * len(targets))
        columns["target_is_random"].append([False] * len(targets))
    return pa.table(columns, schema=SEQUENCES)


def falls(values: list[int]) -> int:
    return sum(second < first for first, second in itertools.pairwise(values))


@settings(max_examples=100)
@given(
    users, st.sampled_from([None, DAY_MS, DAY_MS - 3]), st.sampled_from(["event", "day_start"]), st.sampled_from([0, 2])
)
def test_list_metrics_equal_plain_loops(rows: list, first_evaluation_ms: int | None, cutoff: str, lag: int) -> None:
    items = pa.table({"item_index": [0], "item_id": [3], "train_occurrences": [1]})
    part = table(rows)
    # Two buckets, the second a slice with an offset: Arrow's offsets then do not start at 0.
    rules = sequences.SequenceRules(DT, 2, first_evaluation_ms, History(cutoff=cutoff, availability_lag_ms=lag))
    buckets = [
        sequences.measured_bucket(users, items["train_occurrences"].to_numpy(), rules)
        for users in (part.slice(0, 2), part.slice(2))
    ]
    facts = sequences.SequencesFacts(buckets, items["item_index"].to_numpy(), items["item_id"].to_numpy(), {})
    row, _ = measured(SUITES["sequences"].metrics, facts)
    in_range = [(h, t, end) for h, targets in rows for t, end, _ in targets if 0 <= end <= len(h)]
    assert row["leak_count"] == sum(
        any(time >= (t // MS_PER_DAY * MS_PER_DAY if cutoff == "day_start" else t) - lag for time in h[:end])
        for h, t, end in in_range
    )
    assert row["history_end_out_of_range_count"] == sum(len(targets) for _, targets in rows) - len(in_range)
    assert row["history_disorder_count"] == sum(falls(h) for h, _ in rows)
    assert row["target_disorder_count"] == sum(falls([t for t, *_ in targets]) for _, targets in rows)
    splits = [split for _, targets in rows for *_, split in targets]
    for name, code in (("train_targets", TRAIN), ("validation_targets", VALIDATION), ("eval_targets", EVALUATION)):
        assert row[name] == splits.count(code)
    assert row["targets"] == sum(split in (TRAIN, VALIDATION, EVALUATION) for split in splits)
    late = [first_evaluation_ms is not None and t >= first_evaluation_ms for _, targets in rows for t, *_ in targets]
    evaluated = [first_evaluation_ms is not None and split == EVALUATION for split in splits]
    unknown = [split not in (TRAIN, VALIDATION, EVALUATION) for split in splits]
    assert row["split_wrong_count"] == sum(
        u or one != other for u, one, other in zip(unknown, late, evaluated, strict=True)
    )
    labelled = [code for _, targets in rows for *_, code in targets if code == TRAIN]
    assert row["train_label_rate"] == 0 or not labelled  # all labels of the table are 0
    assert row["history_events"] == sum(len(h) for h, _ in rows)


def events_of(rows: int, users: int) -> pa.Table:
    """Return events of one day, of so many users, half of them with bit 0."""
    index = np.arange(rows)
    zeros = np.zeros(rows, np.int64)
    return pa.table(
        {
            "user_id": index % users,
            "item_id": index,
            "event_time_ms": DAY_MS + index,
            "feedback": index % 2,
            "watch_time_ms": zeros,
            "duration_ms": zeros,
            "context": zeros,
            "is_random": zeros.astype(bool),
        }
    ).cast(EVENTS)


SMALL = EventSettings(min_hour_rows=1, min_judged_rows=1, min_judged_users=1)
SIGNALS = tuple("abcdefgh")


def row_of(events: pa.Table, trailing: Sequence[int] = (10, 10, 10), limits: EventSettings = SMALL, **changes) -> Row:
    facts = {"counts": {"rows_read": events.num_rows}, "label_bit": 0, **changes}
    day = EventsDay(
        DT,
        True,
        events,
        quarantine_rows=0,
        trailing_rows=trailing,
        settings=Thresholds(events=limits),
        signals=SIGNALS,
        **facts,
    )
    return measured(SUITES["events_days"].metrics, day)[0]


def test_few_trailing_days_give_no_ratio() -> None:
    events = events_of(1, 1)
    assert np.isnan(row_of(events, [10, 10])["rows_to_trailing_median"])
    assert row_of(events, [10, 2, 0, 1])["rows_to_trailing_median"] == 0.5


@pytest.mark.parametrize(("rows", "users"), [(199, 20), (400, 9)])
def test_a_day_of_few_rows_or_users_is_not_judged_by_its_shares(rows: int, users: int) -> None:
    limits = EventSettings(min_judged_rows=200, min_judged_users=10)
    shares = ("label_rate", "hours_covered", "largest_user_share")
    small, judged = row_of(events_of(rows, users), limits=limits), row_of(events_of(400, 20), limits=limits)
    assert all(np.isnan(small[name]) for name in shares)
    assert [judged[name] for name in shares] == [0.5, 1, 0.05]
    twice = pa.concat_tables([events_of(rows, users)] * 2).slice(0, rows)
    assert row_of(twice, limits=limits)["repeated_key_share"] == 0
    # What is wrong whatever the size is found in any day.
    outside = events_of(rows, users).set_column(2, "event_time_ms", pa.array(np.full(rows, DAY_MS - 1)))
    assert row_of(outside, limits=limits)["outside_day_count"] == rows


def test_a_day_after_sparse_days_is_not_judged_by_what_is_missing() -> None:
    limits = EventSettings(min_judged_rows=200, min_judged_users=10)
    none, one = events_of(0, 1), events_of(1, 1)
    assert row_of(none, [199, 199, 199], limits)["gap_count"] == 0
    assert row_of(none, [200, 200, 200], limits)["gap_count"] == 1
    assert np.isnan(row_of(one, [199, 199, 199], limits)["rows_to_trailing_median"])
    assert row_of(one, [200, 200, 200], limits)["rows_to_trailing_median"] == 1 / 200
    assert np.isnan(row_of(one, [199, 199, 199], limits)["users"])
    assert row_of(one, [200, 200, 200], limits)["users"] == 1


def test_a_share_of_duplicates_needs_rows() -> None:
    limits = EventSettings(min_judged_rows=200)

    def share(read: int) -> float:
        counts = {"rows_read": read, "duplicates": 50}
        return row_of(events_of(1, 1), [], limits, counts=counts)["duplicate_share"]

    assert share(199) == 0
    assert share(200) == 0.25


def test_sampled_negatives_have_no_label_rate_and_kept_repeats_are_no_fault() -> None:
    events = pa.concat_tables([events_of(40, 4)] * 2)
    row, repeating = row_of(events), row_of(events, label_bit=None, repeats_kept=True)
    assert (row["repeated_key_share"], row["worst_hour_repeated_key_share"], row["label_rate"]) == (0.5, 0.5, 0.5)
    assert (repeating["repeated_key_share"], repeating["worst_hour_repeated_key_share"]) == (0, 0)
    assert np.isnan(repeating["label_rate"])

"""Vectorised list metrics against the plainest possible loops.

    .venv/bin/python -m pytest tests/etl/quality/test_stats.py -q
"""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.partitions import MS_PER_DAY, day_number
from etl.quality import stats
from etl.schemas import SEQUENCES

DT = "2022-04-21"
DAY_MS = day_number(DT) * MS_PER_DAY

times = st.lists(st.integers(DAY_MS - 5, DAY_MS + 5), max_size=5)
users = st.lists(st.tuples(times, st.lists(st.tuples(st.integers(DAY_MS - 5, DAY_MS + 5), st.integers(-1, 6)), max_size=4)), max_size=5)


def table(rows: list) -> pa.Table:
    columns: dict[str, list] = {name: [] for name in SEQUENCES.names}
    for user, (history, targets) in enumerate(rows):
        columns["user_id"].append(user)
        columns["user_fields"].append([])
        columns["history_time_ms"].append(history)
        for name in ("history_item_index", "history_feedback", "history_watch_bucket"):
            columns[name].append([0] * len(history))
        columns["target_time_ms"].append([time for time, _ in targets])
        columns["target_history_end"].append([end for _, end in targets])
        for name in ("target_item_index", "target_label", "target_tab"):
            columns[name].append([0] * len(targets))
    return pa.table(columns, schema=SEQUENCES)


def falls(values: list[int]) -> int:
    return sum(second < first for first, second in itertools.pairwise(values))


@settings(max_examples=200, deadline=None)
@given(users)
def test_list_metrics_equal_plain_loops(rows: list) -> None:
    items = pa.table({"item_index": [0], "item_id": [3], "train_occurrences": [1]})
    part = table(rows)
    # Two buckets, the second a slice with an offset: Arrow's offsets then do not start at 0.
    row = stats.sequences_row(DT, [part.slice(0, 2), part.slice(2)], items, {}, target_days=2)
    in_range = [(h, t, end) for h, targets in rows for t, end in targets if 0 <= end <= len(h)]
    assert row["leak_count"] == sum(any(time >= t for time in h[:end]) for h, t, end in in_range)
    assert row["history_end_out_of_range_count"] == sum(len(targets) for _, targets in rows) - len(in_range)
    assert row["history_disorder_count"] == sum(falls(h) for h, _ in rows)
    assert row["target_disorder_count"] == sum(falls([t for t, _ in targets]) for _, targets in rows)
    assert row["eval_targets"] == sum(t >= DAY_MS for _, targets in rows for t, _ in targets)
    assert row["targets"] == sum(len(targets) for _, targets in rows)
    assert row["history_events"] == sum(len(h) for h, _ in rows)


def test_few_trailing_days_give_no_ratio() -> None:
    events = pa.table({"user_id": [1], "item_id": [1], "event_time_ms": [DAY_MS], "feedback": pa.array([1], pa.int16())})
    arguments = {"label_bit": 0, "feedback_bits": 8, "min_trailing_days": 3, "min_hour_rows": 1}
    assert np.isnan(stats.events_row(DT, True, events, {}, 0, [10, 10], **arguments)["rows_to_trailing_median"])
    assert stats.events_row(DT, True, events, {}, 0, [10, 2, 0, 1], **arguments)["rows_to_trailing_median"] == 0.5

"""What gates keep: trailing days never hold a rejected day, and outcomes survive the way to disk and back.

.venv/bin/python -m pytest tests/etl/quality/test_outcomes.py -q
"""

from __future__ import annotations

from pathlib import Path

import pytest

from etl.quality.judge.outcomes import Outcome, StageOutcome, outcome_attempts, read_outcomes, write_outcome
from etl.quality.measure.statistics import read_rejected, read_stats, write_stats
from etl.warehouse.store import TableStore

DAYS = ("2022-04-08", "2022-04-09", "2022-04-11")


@pytest.fixture
def store(tmp_path: Path) -> TableStore:
    return TableStore(str(tmp_path), "kuairand_simulated")


def test_trailing_statistics_are_of_passed_days_only(store: TableStore) -> None:
    for value, dt in enumerate(DAYS):
        write_stats(store, "events", dt, "a", {"rows": value, "label_rate": float("nan")})
    write_stats(store, "events", "2022-04-10", "stopped", {"rows": 99}, rejected=True)
    write_stats(store, "sequences", "2022-04-10", "a", {"rows": 98})
    stored = read_stats(store, "events", "2022-04-11", 3).to_pylist()
    assert [(row["dt"], row["value"]) for row in stored if row["metric"] == "rows"] == [
        ("2022-04-09", 1.0),
        ("2022-04-11", 2.0),
    ]
    assert [row["value"] for row in stored if row["metric"] == "label_rate"] == [None, None]
    assert read_rejected(store, "events", "2022-04-10").to_pylist() == [
        {"dt": "2022-04-10", "stage": "events", "metric": "rows", "value": 99.0, "attempt": "stopped"}
    ]
    assert read_stats(store, "raw", "2022-04-11", 30).num_rows == 0


def test_a_passing_attempt_replaces_the_statistics_of_its_day(store: TableStore) -> None:
    write_stats(store, "events", DAYS[0], "first", {"rows": 1, "users": 2})
    write_stats(store, "events", DAYS[0], "second", {"rows": 3})
    assert [
        (row["metric"], row["value"], row["attempt"]) for row in read_stats(store, "events", DAYS[0], 1).to_pylist()
    ] == [("rows", 3.0, "second")]


def test_outcomes_are_read_in_the_order_of_the_stages(store: TableStore) -> None:
    failed = Outcome(
        "events_days",
        "expect_column_values_to_be_between",
        "label_rate",
        "critical",
        False,
        {"2022-04-08": 0.0},
        {"min_value": 0},
        "look at the raw files",
        "label_rate ist 0 \N{EM DASH} für alle",
        None,
    )
    written = [
        StageOutcome(store.dataset, True, DAYS[0], "a", stage, 1, "critical", (failed,))
        for stage in ("sequences", "events")
    ]
    for outcome in written:
        write_outcome(store, outcome)
    assert read_outcomes(store, DAYS[0], "a") == written[::-1]
    assert written[0].failed("critical") == [failed]
    assert written[0].failed("warning") == []
    assert read_outcomes(store, DAYS[0], "other") == []
    assert outcome_attempts(store) == [(DAYS[0], "a")]

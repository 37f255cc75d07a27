"""Measures of drift: their definitions, and what is not judged.

.venv/bin/python -m pytest tests/etl/quality/test_drift.py -q
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.metrics.events import COMPARED
from etl.metrics.thresholds import DriftSettings
from etl.quality.measure.drift import HOURS, EventsCompared, kl, psi, shifted_hours, vocabulary_drift
from etl.quality.measure.measured import measured

DRIFT = DriftSettings()
PROFILE = 1.2 + np.cos((np.arange(24) - 12) / 24 * 2 * np.pi)
shares = st.lists(st.floats(0.01, 1), min_size=2, max_size=8).map(lambda values: np.array(values) / sum(values))


def test_psi_and_kl_are_the_textbooks() -> None:
    expected, found = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    assert kl(expected, found) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert psi(expected, found) == pytest.approx(kl(expected, found) + kl(found, expected))


@given(shares)
def test_no_difference_is_no_drift(distribution: np.ndarray) -> None:
    assert psi(distribution, distribution) == 0
    assert psi(distribution, np.roll(distribution, 1)) >= 0


@pytest.mark.parametrize("hours", [8, -5, 12, 3])
def test_a_turned_day_says_by_how_many_hours(hours: int) -> None:
    assert shifted_hours(PROFILE, np.roll(PROFILE, hours), 0.2) == hours


def test_a_day_that_is_not_turned_or_has_no_profile_is_not_shifted() -> None:
    assert shifted_hours(PROFILE, PROFILE * np.linspace(0.9, 1.1, 24), DRIFT.min_shift_gain) == 0
    assert shifted_hours(PROFILE, np.roll(PROFILE, 1), DRIFT.min_shift_gain) == 0  # as summer time does
    assert shifted_hours(np.ones(24), PROFILE, DRIFT.min_shift_gain) == 0


def day(rows: float = 5_000, rate: float = 0.4, **more: float) -> dict[str, float]:
    hours = dict(zip(HOURS, PROFILE / PROFILE.sum(), strict=True))
    return {
        "rows": rows,
        "label_rate": rate,
        "action_rate_click": rate,
        "action_rate_like": 0.02,
        "known_user_share": 0.9,
        "known_item_share": 0.9,
        "item_popularity_correlation": 0.8,
        "duration_mismatch_share": 0.0,
        "largest_user_share": 0.05,
        "watch_time_ms_p50": 4_000.0,
        "context_share_1": 0.7,
        "context_share_2": 0.3,
        **hours,
        **more,
    }


def drift_of(today: dict[str, float], trailing: list[dict[str, float]]) -> dict[str, float]:
    return measured(COMPARED, EventsCompared.of(today, trailing, ("click", "like"), ("context",), DRIFT))[0]


@pytest.mark.parametrize(
    ("today", "trailing"),
    [
        (day(), [day()] * (DRIFT.min_trailing_days - 1)),
        (day(rows=DRIFT.min_rows - 1), [day()] * 7),
        (day(), [day(rows=DRIFT.min_rows - 1)] * 7),
        (day(), []),
    ],
)
def test_first_days_and_small_days_are_not_compared(today: dict[str, float], trailing: list[dict[str, float]]) -> None:
    found = drift_of(today, trailing)
    assert [
        name for name, value in found.items() if not math.isnan(value) and name != "rows_to_trailing_extremes"
    ] == []


def test_a_rare_label_is_not_judged_by_its_rate() -> None:
    rare = 0.9 * DRIFT.min_positives / 5_000
    assert math.isnan(drift_of(day(rate=rare / 2), [day(rate=rare)] * 7)["label_rate_to_trailing"])
    assert drift_of(day(rate=0.2), [day(rate=0.4)] * 7)["label_rate_to_trailing"] == pytest.approx(0.5)


def test_rows_are_compared_with_the_extremes_of_steady_days_only() -> None:
    steady, unsteady = [day(rows=5_000)] * 6 + [day(rows=6_000)], [day(rows=5_000)] * 6 + [day(rows=15_000)]
    assert drift_of(day(rows=2_500), steady)["rows_to_trailing_extremes"] == 0.5
    assert drift_of(day(rows=12_000), steady)["rows_to_trailing_extremes"] == 2
    assert drift_of(day(rows=5_500), steady)["rows_to_trailing_extremes"] == 1
    assert math.isnan(drift_of(day(rows=2_500), unsteady)["rows_to_trailing_extremes"])


def test_a_thin_hour_is_told_apart_from_a_missing_one() -> None:
    found = drift_of(day(hour_share_12=0.005, hour_share_13=0.0), [day()] * 7)
    assert (found["thin_hour_count"], found["missing_hour_count"]) == (1, 1)
    night = drift_of(day(hour_share_00=0.0), [day()] * 7)  # 35 rows were due: chance may lose them
    assert night["missing_hour_count"] == 0


def test_new_values_are_told_by_field() -> None:
    found = vocabulary_drift(
        {"tab_share_a": 0.9, "tab_share_b": 0.1, "kind_share_x": 1.0},
        [{"tab_share_a": 1.0, "kind_share_x": 1.0}],
        ("tab", "kind"),
    )
    assert found.new_share == pytest.approx(0.1)
    assert "tab has the new value(s) b (10.00%)" in found.new

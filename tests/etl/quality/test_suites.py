"""Each expectation of each suite finds what it names, and the docs have it: both follow from its line in `etl.quality.judge.suites`.

    .venv/bin/python -m pytest tests/etl/quality/test_suites.py -q
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from etl.datasets.thresholds import Thresholds
from etl.quality.judge import suites
from etl.quality.judge.validate import Check, validate

EXPECTATIONS = Path(__file__).parents[3] / "docs" / "expectations.md"


def within(bounds: list[tuple[float | None, float | None, bool]]) -> float:
    """Return a value that every bound on a metric allows."""
    low = max((low for low, _, _ in bounds if low is not None), default=None)
    high = min((high for _, high, _ in bounds if high is not None), default=None)
    if low is None or high is None:
        return low + 1 if low is not None else high - 1 if high is not None else 0
    return (low + high) / 2


def beyond(low: float | None, high: float | None, strict: bool) -> list[float]:
    """Return the nearest values that a bound does not allow."""
    step: Callable[[float, float], float] = (lambda bound, side: bound) if strict else math.nextafter
    return [step(bound, side) for bound, side in ((low, -math.inf), (high, math.inf)) if bound is not None]


@pytest.mark.parametrize("suite", [suite for of_gate in suites.SUITES.values() for suite in of_gate])
def test_each_expectation_finds_what_is_just_beyond_its_bound_and_nothing_else(suite: str) -> None:
    expectations = [one for one in suites.build_suite(suite, Thresholds()).expectations if one.column != suites.UNKNOWN]
    bounds: dict[str, list] = {}
    for one in expectations:
        bounds.setdefault(one.column, []).append((one.min_value, one.max_value, one.strict_min or one.strict_max))
    good = {metric: within(found) for metric, found in bounds.items()}
    planted = [(one.column, value) for one in expectations for value in beyond(one.min_value, one.max_value, one.strict_min or one.strict_max)]
    rows = [{**good, "dt": "good"}, *({**good, metric: value, "dt": f"{place}"} for place, (metric, value) in enumerate(planted))]
    outcomes = {(o.column, o.severity, json.dumps(o.expected, sort_keys=True)): o for o in validate([Check(suite, rows)], "t", None, Thresholds()) if o.column != suites.UNKNOWN}
    assert len(outcomes) == len(expectations)
    found: dict[str, set[str]] = {}
    for (metric, severity, _), outcome in outcomes.items():
        assert not outcome.success, f"{metric} ({severity}) finds nothing"
        assert {planted[int(row)][0] for row in outcome.rows} == {metric}
        assert severity == suites.INFO or outcome.remedy
        for row in outcome.rows:
            found.setdefault(row, set()).add(severity)
    assert found.keys() == {row["dt"] for row in rows[1:]}, "each planted value is found by some expectation, and the good row by none"


@pytest.mark.parametrize("suite", [suite for of_gate in suites.SUITES.values() for suite in of_gate])
def test_what_must_be_known_stops_when_it_is_not(suite: str) -> None:
    built = suites.build_suite(suite, Thresholds())
    names = suites.must_be_known(built)
    columns = {one.column for one in built.expectations} - {suites.UNKNOWN}
    rows = [dict.fromkeys(columns, 0.0) | {name: math.nan, "dt": name} for name in names]
    if rows:
        [unknown] = [o for o in validate([Check(suite, rows)], "t", None, Thresholds()) if o.column == suites.UNKNOWN]
        assert set(unknown.rows) == set(names)
        assert (unknown.severity, unknown.passable) == ("critical", False)


def test_the_page_of_expectations_is_of_these_suites() -> None:
    assert EXPECTATIONS.read_text() == suites.table(), "run python -m etl.quality.judge.suites > docs/expectations.md"

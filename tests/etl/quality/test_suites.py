"""Each record of `etl.metrics` is expected, listed, and finds its fault: all of that follows from the record.

.venv/bin/python -m pytest tests/etl/quality/test_suites.py -q
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from etl.datasets.definition import History
from etl.datasets.quality_rules import Bound, thresholds_with
from etl.metrics import record, registry
from etl.metrics.record import INFO, Metric
from etl.metrics.registry import SUITES
from etl.metrics.thresholds import EventSettings, Thresholds
from etl.quality.judge import suites
from etl.quality.judge.gx import validate
from etl.quality.measure.events import EventsDay
from etl.quality.measure.items import ItemsFacts
from etl.quality.measure.measured import Check, measured
from etl.quality.measure.scores import Scores, ScoresFacts
from etl.quality.measure.sequences import SequenceRules, SequencesFacts, measured_bucket
from etl.warehouse.schemas import SEQUENCES
from tests.etl.quality.test_audit import DT, ITEM_COUNT, USERS, events_table, items_table, user_rows

CONTRIBUTING = Path(__file__).parents[3] / "CONTRIBUTING.md"
EXPECTATIONS = Path(__file__).parents[3] / "docs" / "expectations.md"
SETTINGS = Thresholds(events=EventSettings(min_hour_neighbour_rows=20, min_users_for_bots=10))


def within(bounds: list[suites.Expected]) -> float:
    """Return a value that every bound on a metric allows."""
    low = max((one.low for one in bounds if one.low is not None), default=None)
    high = min((one.high for one in bounds if one.high is not None), default=None)
    if low is None or high is None:
        return low + 1 if low is not None else high - 1 if high is not None else 0
    return (low + high) / 2


def beyond(one: suites.Expected) -> list[float]:
    """Return the nearest values that an expectation does not allow."""
    step: Callable[[float, float], float] = (lambda bound, side: bound) if one.strict else math.nextafter
    return [step(bound, side) for bound, side in ((one.low, -math.inf), (one.high, math.inf)) if bound is not None]


def outcomes_of(suite: str, rows: list[dict[str, Any]]) -> list:
    return validate([Check(suite, rows)], "t", None, Thresholds())


def require_found_beyond_bounds(suite: str) -> None:
    """Require that each expectation of a suite finds what is just beyond its bound, and nothing else."""
    expectations = [one for one in suites.expected(suite, Thresholds()) if one.metric != suites.UNKNOWN]
    bounds: dict[str, list] = {}
    for one in expectations:
        bounds.setdefault(one.metric, []).append(one)
    good = {metric: within(found) for metric, found in bounds.items()}
    planted = [(one.metric, value) for one in expectations for value in beyond(one)]
    rows = [
        {**good, "dt": "good"},
        *({**good, metric: value, "dt": f"{place}"} for place, (metric, value) in enumerate(planted)),
    ]
    outcomes = {
        (o.column, o.severity, json.dumps(o.expected, sort_keys=True)): o
        for o in outcomes_of(suite, rows)
        if o.column != suites.UNKNOWN
    }
    assert len(outcomes) == len(expectations)
    found: dict[str, set[str]] = {}
    for (metric, severity, _), outcome in outcomes.items():
        assert not outcome.success, f"{metric} ({severity}) finds nothing"
        assert {planted[int(row)][0] for row in outcome.rows} == {metric}
        assert severity == INFO or outcome.remedy
        for row in outcome.rows:
            found.setdefault(row, set()).add(severity)
    assert found.keys() == {row["dt"] for row in rows[1:]}, "each planted value is found, and the good row is not"


@pytest.mark.parametrize("suite", SUITES)
def test_each_expectation_finds_what_is_just_beyond_its_bound_and_nothing_else(suite: str) -> None:
    require_found_beyond_bounds(suite)


@pytest.mark.parametrize("suite", SUITES)
def test_what_must_be_known_stops_when_it_is_not(suite: str) -> None:
    names = suites.must_be_known(suite)
    columns = {one.metric for one in suites.expected(suite, Thresholds())} - {suites.UNKNOWN}
    rows = [dict.fromkeys(columns, 0.0) | {name: math.nan, "dt": name} for name in names]
    if rows:
        [unknown] = [o for o in outcomes_of(suite, rows) if o.column == suites.UNKNOWN]
        assert set(unknown.rows) == set(names)
        assert (unknown.severity, unknown.passable) == ("critical", False)


def test_the_page_of_expectations_is_of_these_records() -> None:
    assert EXPECTATIONS.read_text() == suites.table(), "run python -m etl.quality.judge.suites > docs/expectations.md"


def test_every_record_has_a_name_of_its_own_and_every_bound_one_default() -> None:
    for suite in SUITES.values():
        names = [metric.name for metric in suite.records]
        assert len(names) == len(set(names)), suite.name
    defaults: dict[str, set] = {}
    for suite in SUITES.values():
        for metric in suite.records:
            for limit in metric.limits:
                for bound in (limit.low, limit.high):
                    if hasattr(bound, "key"):
                        defaults.setdefault(bound.key, set()).add(bound.default)
    assert {key: found for key, found in defaults.items() if len(found) > 1} == {}
    assert registry.bounds().keys() == defaults.keys()


# ---- faults in data, planted by the records' SQL --------------------------------------------------------------------


def events_facts(table: pa.Table) -> EventsDay:
    clean = events_table().num_rows
    counts = {"rows_read": clean, "events": clean, "duplicates": 0, "quarantined": 0}
    signals = ("click", "like")
    return EventsDay(DT, True, table, counts, 0, [clean] * 3, SETTINGS, signals, 0, rows_to_keep=clean)


def sequences_facts(table: pa.Table) -> SequencesFacts:
    rules = SequenceRules(DT, 2, 1650499200000, History())
    items = items_table()
    bucket = measured_bucket(table, np.arange(1, ITEM_COUNT + 1), rules)
    counts = {
        "users": USERS,
        "targets": 3 * USERS,
        "train_targets": USERS,
        "eval_targets": 2 * USERS,
        "history_events": 4 * USERS,
    }
    return SequencesFacts([bucket], items["item_index"].to_numpy(), items["item_id"].to_numpy(), counts)


def scores_facts(table: pa.Table) -> ScoresFacts:
    return ScoresFacts(Scores(table["label"].to_numpy(), table["score"].to_numpy(), 0.7), [], Thresholds())


def scores_table() -> pa.Table:
    rng = np.random.default_rng(4)
    score = rng.beta(2, 3, 3_000)
    return pa.table({"label": (rng.random(3_000) < score).astype(np.int8), "score": score.astype(np.float32)})


# suite -> the clean table `t`, and what measures it
FACTS: dict[str, tuple[Callable[[], pa.Table], Callable[[pa.Table], Any]]] = {
    "events_days": (events_table, events_facts),
    "items": (items_table, lambda table: ItemsFacts(table, 0, (), True, 4)),
    "sequences": (lambda: pa.table(user_rows(), schema=SEQUENCES), sequences_facts),
    "model_output": (scores_table, scores_facts),
}


def planted(table: pa.Table, sql: str) -> pa.Table:
    """Return the rows of a table with a record's fault in them, in the table's own types."""
    with duckdb.connect() as connection:
        connection.register("t", table)
        found = connection.execute(sql).arrow()
        found = found if isinstance(found, pa.Table) else found.read_all()
    names = table.schema.names
    types = pa.schema([pa.field(field.name, field.type) for field in table.schema])
    return found.select(names).cast(types)


def failing(suite: str, row: dict[str, Any]) -> set[str]:
    """Return the metrics of a row that break an expectation."""
    found = set()
    for one in suites.expected(suite, Thresholds()):
        value = row.get(one.metric, math.nan)
        below = one.low is not None and (value < one.low or (one.strict and value == one.low))
        above = one.high is not None and (value > one.high or (one.strict and value == one.high))
        if below or above:
            found.add(one.metric)
    return found


def require_plant_found(suite: str, metric: Metric) -> None:
    """Require that a record passes on the clean table of its suite, and fails on that with its fault in it."""
    table, facts = FACTS[suite]
    assert failing(suite, measured([metric], facts(table()))[0]) == set()
    row, _ = measured([metric], facts(planted(table(), metric.plant)))
    assert failing(suite, row) == {metric.name}, f"{metric.name} is {row[metric.name]} with its fault planted"


PLANTED = [(suite, metric) for suite in FACTS for metric in SUITES[suite].records if metric.plant]


@pytest.mark.parametrize(("suite", "metric"), PLANTED, ids=[f"{suite}-{metric.name}" for suite, metric in PLANTED])
def test_a_record_finds_the_fault_that_it_says_and_not_a_clean_table(suite: str, metric: Metric) -> None:
    require_plant_found(suite, metric)


def test_only_suites_with_a_table_plant_in_it() -> None:
    assert {suite.name for suite in SUITES.values() if any(m.plant for m in suite.records)} == set(FACTS)
    assert len(PLANTED) > 40


# ---- the walk-through -----------------------------------------------------------------------------------------------


def test_the_documented_record_is_all_that_a_new_expectation_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    section = CONTRIBUTING.read_text().partition("## Add an expectation")[2].partition("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    [metric] = eval(f"[{textwrap.dedent(code)}]", {**vars(record)})
    suite = SUITES["events_days"]
    monkeypatch.setitem(SUITES, suite.name, dataclasses.replace(suite, metrics=(*suite.metrics, metric)))

    found = [one for one in suites.expected(suite.name, Thresholds()) if one.metric == metric.name]
    assert {(one.severity, one.high) for one in found} == {("warning", 0.8), ("critical", 0.99)}
    rows = [line for line in suites.table().splitlines() if f"`{metric.name}`" in line]
    assert len(rows) == 2
    assert all(metric.so_that in line and metric.remedy in line for line in rows)
    key = "events.max_zero_watch_share_warning"
    assert thresholds_with({key: Bound(value=0.9, reason="short clips")}).bounds[key] == 0.9
    require_plant_found(suite.name, metric)
    require_found_beyond_bounds(suite.name)

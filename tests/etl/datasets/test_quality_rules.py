"""The section `quality` of a definition: what is wrong in it is refused when it is read, by name; what is right is what
judges.

.venv/bin/python -m pytest tests/etl/datasets/test_quality_rules.py -q
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from etl.datasets.definition import dataset
from etl.datasets.quality_rules import expectation_names, reason_of
from etl.metrics.thresholds import Thresholds
from etl.stage.errors import StageError

CONDITION = {"name": "c", "table": "events", "sql": "watch_time_ms >= 0", "reason": "r"}
EXPECTATION = {
    "name": "e",
    "table": "events",
    "expectation": "ExpectColumnValuesToBeInSet",
    "arguments": {"column": "context", "value_set": [1]},
    "reason": "r",
}


def read(folder: Path, quality: dict):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"extends": "kuairand_simulated", "name": "own", "quality": quality}))
    return dataset(str(path))


def bounds(**values) -> dict:
    return {
        "bounds": {
            name.replace("__", "."): {"value": value, "reason": "an ordinary feed of ours"}
            for name, value in values.items()
        }
    }


def test_a_bound_is_set_with_its_reason_and_all_others_stay(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        bounds(events__min_label_rate=0.0005, drift__label_rate_ratio_critical=[0.3, 3.5], events__min_hours_covered=2),
    ).quality.thresholds()
    names = ("events.min_label_rate", "drift.label_rate_ratio_critical", "events.min_hours_covered")
    assert [found.bounds[name] for name in names] == [0.0005, (0.3, 3.5), 2]
    assert {reason_of(found.bounds[name]) for name in names} == {"an ordinary feed of ours"}
    assert reason_of(found.bounds["events.max_label_rate"]) == ""
    assert {name: value for name, value in found.known().items() if name not in names} == {
        name: value for name, value in Thresholds().known().items() if name not in names
    }
    json.dumps(dataclasses.asdict(found))


@pytest.mark.parametrize(
    ("quality", "says"),
    [
        (
            bounds(events__min_label_rat=0.1),
            "bounds.events.min_label_rat: no such bound; events has, for example, min_label_rate",
        ),
        (
            bounds(event__min_label_rate=0.1),
            "bounds.event.min_label_rate: no such bound; it begins with one of raw, drift, events",
        ),
        (bounds(min_label_rate=0.1), "bounds.min_label_rate: no such bound"),
        (bounds(events__min_label_rate="low"), "bounds.events.min_label_rate.value: must be a number"),
        (bounds(events__min_label_rate=True), "bounds.events.min_label_rate.value: must be a number"),
        (bounds(events__min_label_rate=float("nan")), "bounds.events.min_label_rate.value: must be a number"),
        (bounds(events__min_label_rate=[0.1, 2]), "bounds.events.min_label_rate: give one number"),
        (bounds(events__min_users=2.5), "bounds.events.min_users: 2.5 must be a whole number"),
        (bounds(drift__label_rate_ratio_critical=0.5), "bounds.drift.label_rate_ratio_critical: give two numbers"),
        (
            bounds(drift__label_rate_ratio_critical=[0.0, 9.0]),
            "bounds.drift.label_rate_ratio_critical: [0.0, 9.0] must be",
        ),
        (
            bounds(events__max_quarantine_share_critical=1.0),
            "bounds.events.max_quarantine_share_critical: 1 must be below 1",
        ),
        (
            bounds(sequences__max_items_without_fields_share_critical=1),
            "must be below 1: a critical bound that nothing breaks",
        ),
        (bounds(drift__hour_psi_critical=100), "bounds.drift.hour_psi_critical: 100 must be at most 5"),
        (bounds(drift__rows_to_extremes_critical=0), "must be above 0"),
        (bounds(model_output__min_score_sd=0), "bounds.model_output.min_score_sd: 0 must be above 0"),
        (bounds(events__min_judged_rows=10**9), "beyond it nothing would be judged"),
        (bounds(drift__trailing_days=2), "bounds.drift.min_trailing_days is 3, more than drift.trailing_days (2)"),
        ({"bounds": {"events.min_label_rate": {"value": 0.1}}}, "quality.bounds.events.min_label_rate.reason"),
        (
            {"bounds": {"events.min_label_rate": {"value": 0.1, "reason": " "}}},
            "quality.bounds.events.min_label_rate.reason",
        ),
        ({"threshold": {}}, "unknown field 'threshold'; allowed: bounds, expectations, conditions"),
        (
            {"conditions": [{**CONDITION, "sql": "watch_tim_ms >= 0"}]},
            'quality.conditions.0 (c): sql: Binder Error: Referenced column "watch_tim_ms" not found',
        ),
        (
            {"conditions": [{**CONDITION, "sql": "watch_time_ms"}]},
            "quality.conditions.0 (c): sql: must be true or false, and is of type BIGINT",
        ),
        ({"conditions": [{**CONDITION, "sql": "count(*) > 5"}]}, "cannot contain aggregates"),
        ({"conditions": [{**CONDITION, "sql": "watch_time_ms >"}]}, "quality.conditions.0 (c): sql: Parser Error"),
        (
            {"conditions": [{**CONDITION, "sql": "true); DROP TABLE t; SELECT (true"}]},
            "quality.conditions.0 (c): sql: give one expression",
        ),
        (
            {"conditions": [{**CONDITION, "sql": "user_id IN (SELECT 1 FROM read_csv('/etc/passwd'))"}]},
            "quality.conditions.0 (c): sql:",
        ),
        ({"conditions": [{**CONDITION, "table": "caches"}]}, "quality.conditions.0.table"),
        ({"conditions": [{**CONDITION, "tolerated_share": 1.0}]}, "quality.conditions.0.tolerated_share"),
        ({"conditions": [{**CONDITION, "severity": "fatal"}]}, "quality.conditions.0.severity"),
        ({"conditions": [CONDITION, CONDITION]}, "the name 'c' is given twice"),
        (
            {"expectations": [{**EXPECTATION, "expectation": "ExpectColumnValuesToBeInSets"}]},
            "Great Expectations has no ExpectColumnValuesToBeInSets; it has, for example, ExpectColumnValuesToBeInSet",
        ),
        ({"expectations": [{**EXPECTATION, "expectation": "os.system"}]}, "quality.expectations.0.expectation"),
        (
            {"expectations": [{**EXPECTATION, "expectation": "ExpectTableRowCountToEqual"}]},
            "expect their number of column `rows` of table statistics.events instead",
        ),
        (
            {"expectations": [{**EXPECTATION, "arguments": {"column": "contxt", "value_set": [1]}}]},
            "quality.expectations.0 (e): arguments.column: events has no column 'contxt'",
        ),
        (
            {"expectations": [{**EXPECTATION, "arguments": {"column": "context", "meta": {}}}]},
            "'meta' is no argument here",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name_when_the_definition_is_read(tmp_path: Path, quality: dict, says: str) -> None:
    with pytest.raises(StageError) as error:
        read(tmp_path, quality)
    assert says in str(error.value)


def test_every_bound_can_be_set_to_its_default(tmp_path: Path) -> None:
    everything = {
        name: {"value": list(value) if isinstance(value, tuple) else value, "reason": "as it is"}
        for name, value in Thresholds().known().items()
    }
    assert len(everything) > 80
    assert read(tmp_path, {"bounds": everything}).quality.thresholds() == Thresholds()


def test_the_names_of_expectations_are_those_of_the_library() -> None:
    import great_expectations.expectations as gxe

    names = expectation_names()
    assert len(names) > 40
    assert all(isinstance(getattr(gxe, name), type) for name in names)

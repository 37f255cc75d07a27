"""Definitions of data sets.

The ones that come along read their makers' layouts; a wrong one says which field and what is allowed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from etl.datasets.definition import BUILT_IN, built_in_names, dataset, definition_name
from etl.stage.errors import StageError

OWN = Path(__file__).resolve().parents[3] / "docs" / "definitions"

SMALL = """
name: shop
title: A shop
first_day: 2024-01-01
logs:
  files: [clicks.csv]
  columns: {user: integer, item: text, at: integer, what: {type: text, one_of: [view, buy]}}
events:
  user: user
  item: item
  time: {column: at, unit: seconds}
  signals: {view: {column: what, equals: view}, buy: {column: what, equals: buy}}
targets: {label: buy}
"""


def write(folder: Path, text: str, name: str = "shop") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", built_in_names())
def test_every_built_in_definition_reads(name):
    definition = dataset(name)
    assert definition.name == name
    assert definition.feedback_fields
    assert (definition.label_bit is None) == (definition.targets.negatives is not None)


@pytest.mark.parametrize("path", sorted(OWN.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_documented_examples_read(path):
    assert dataset(str(path)).name == path.stem == definition_name(str(path))


def test_a_definition_takes_over_what_it_extends():
    base, simulated = dataset("kuairand"), dataset("kuairand_simulated")
    assert simulated.simulated
    assert simulated.model_dump(exclude={"name", "title", "simulated"}) == base.model_dump(
        exclude={"name", "title", "simulated"}
    )


def test_a_small_definition_reads(tmp_path):
    definition = dataset(write(tmp_path, SMALL))
    assert definition.bits(("buy",)) == 2
    assert definition.label_bit == 1
    assert definition.bits(None) is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("title: A shop", "titel: A shop", r"unknown field 'titel'; allowed: name, title"),
        (
            "unit: seconds",
            "unit: hours",
            r"events\.time\.unit: .*'seconds', 'milliseconds', 'microseconds' or 'nanoseconds'.*given: 'hours'",
        ),
        (
            "user: user\n",
            "user: customer\n",
            r"events\.user: 'customer' is not among logs\.columns: user, item, at, what",
        ),
        ("{label: buy}", "{label: bought}", r"targets\.label: 'bought' is not among events\.signals: view, buy"),
        ("{label: buy}", "{}", r"targets: give either label .* or negatives"),
        ("user: integer", "user: decimal", r"events\.user: column 'user' is of type decimal; allowed: integer, text"),
        ("user: integer", "user: whole", r"logs\.columns\.user\.type: .*'integer', 'decimal', 'text' or 'timestamp'"),
        (
            "equals: view",
            "equal: view",
            r"events\.signals\.view: unknown field 'equal'; allowed: column, equals, above",
        ),
        ("equals: view", "above: null", r"events\.signals\.view: give at least one of equals"),
        ("first_day: 2024-01-01", "first_day: 2024-13-01", r"first_day: .*given: '2024-13-01'"),
        (
            "equals: view",
            "equals: views",
            r"events\.signals\.view: 'views' is not among logs\.columns\.what\.one_of: view, buy",
        ),
        ("unit: seconds", "format: YYYY-MM-DD", r"events\.time: format 'YYYY-MM-DD' has no directive"),
        ("unit: seconds", "format: seconds", r"format 'seconds' .*a number takes unit \(such as seconds\)"),
        (
            "first_day: 2024-01-01",
            "first_day: 2024-01-01\nlast_day: 2023-01-01",
            r"last_day 2023-01-01 is before first_day",
        ),
        (
            "title: A shop",
            "title: A shop\nwindow: {target_days: 30, lookback_days: 5}",
            r"window: needs evaluation_days < target_days <= lookback_days",
        ),
        ("files: [clicks.csv]", "files: clicks.csv", r"logs\.files: Input should be a list, such as"),
        ("first_day: 2024-01-01", "", r"first_day: Field required"),
        ("files: [clicks.csv]", "files: []", r"logs\.files: .*at least 1 item"),
        (
            "at: integer",
            "at: {type: integer, optional: true}",
            r"logs\.columns\.at: user, item and time cannot be optional",
        ),
        ("unit: seconds}", "unit: seconds, zone: Mars/Olympus}", r"events\.time: zone 'Mars/Olympus' is not known"),
        (
            "files: [clicks.csv]",
            "files: [c]\n  days_in_name: {pattern: '(?P<day>', year: 2024}",
            r"logs\.days_in_name: pattern is not a regular expression",
        ),
        ("name: shop", "name: Shop", r"name: .*given: 'Shop'"),
        ("name: shop", "name: bazaar", r"has the name 'bazaar'.*rename the file to bazaar\.yaml"),
        ("name: shop", "extends: shopping\nname: shop", r"extends 'shopping', which does not exist"),
        ("name: shop", "name: [shop", r"is not YAML"),
    ],
)
def test_a_wrong_definition_names_the_field_and_what_is_allowed(tmp_path, old, new, says):
    assert old in SMALL
    path = write(tmp_path, SMALL.replace(old, new, 1))
    with pytest.raises(StageError) as caught:
        dataset(path)
    assert re.search(says, str(caught.value), re.DOTALL), str(caught.value)
    assert path in str(caught.value)
    assert "remedy" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [("kuairnd", "unknown data set 'kuairnd'"), ("/nowhere/x.yaml", "cannot be read"), ("x.yaml", "cannot be read")],
)
def test_an_unknown_data_set_is_named(name, says):
    with pytest.raises(StageError, match=re.escape(says)):
        dataset(name)


def test_too_many_signals_are_refused(tmp_path):
    raw = yaml.safe_load(SMALL)
    raw["events"]["signals"] |= {f"s{i}": {"column": "what", "equals": "view"} for i in range(7)}
    with pytest.raises(StageError, match=r"events\.signals: .*at most 8"):
        dataset(write(tmp_path, yaml.safe_dump(raw)))


def test_a_definition_is_no_code():
    """Definitions come from users: they are data, whatever tags they hold."""
    assert all("!!" not in path.read_text() for path in BUILT_IN.glob("*.yaml"))


def test_a_tag_that_would_run_code_is_refused(tmp_path):
    with pytest.raises(StageError, match="is not YAML"):
        dataset(write(tmp_path, "name: !!python/object/apply:os.system ['true']"))

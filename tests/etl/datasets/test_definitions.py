"""Wrong definitions of every kind are refused as they are read, in one line that names the field.

None fails later in a task.
"""

from __future__ import annotations

import copy
import datetime as dtm
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from etl.datasets.definition import BUILT_IN, Time, dataset
from etl.datasets.definition_checks import EVENT_COLUMNS, ITEM_COLUMNS
from etl.ingest.event_rows import parsed_schema
from etl.ingest.raw import times_ms
from etl.stage.errors import StageError
from etl.warehouse.schemas import ITEMS

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = [
    *(BUILT_IN / f"{name}.yaml" for name in ("kuairand", "kuairec_big", "movielens", "tmall")),
    *sorted((ROOT / "docs" / "definitions").glob("*.yaml")),
]

SHOP = """
name: shop
title: A shop
first_day: 2024-03-01
last_day: 2024-04-01
logs:
  files: [clicks.csv]
  quoting: false
  days_in_name: {pattern: 'shop-(?P<month>[0-9]+)-(?P<day>[0-9]+)', year: 2024}
  columns:
    user: {type: integer, min: 0, max: 99}
    item: text
    at: text
    what: text
    how: {type: text, one_of: [view, buy]}
    seen: {type: decimal, optional: true, min: 0.5, max: 60}
    place: integer
events:
  user: user
  item: item
  time: {column: at, format: '%Y-%m-%d %H:%M:%S', zone: Europe/Berlin}
  watch_time: {column: seen, unit: seconds}
  context: place
  signals: {view: {column: what, equals: view}, buy: {column: what, equals: [buy, order]},
    long: {column: seen, above: 10}}
  item_fields: {place_of: place}
items:
  - {files: items.csv, key: id, columns: [id, title, tags], 
     fields: {title: title, tags: {column: tags, kind: categories, split: '|'}}}
users:
  - {files: users.csv, key: id, fields: {city: city}}
history: {of: [view, buy], max_events: 100}
targets: {of: [view, buy], label: buy, positions: {train: [-2, -3], evaluation: [-1]}}
window: {target_days: 5, lookback_days: 9, evaluation_days: 2}
run: {hour: 6, workers: 3, raw: /data/shop}
"""


def refusal(folder: Path, text: str | bytes, name: str = "shop") -> str:
    """Return what is said of a definition, which must be one line; the remedy is another."""
    path = folder / f"{name}.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StageError) as caught:
        dataset(str(path))
    assert "\n" not in caught.value.what
    assert caught.value.remedy
    assert str(path) in caught.value.what
    return caught.value.what


def test_the_definition_that_is_changed_below_reads(tmp_path):
    (tmp_path / "shop.yaml").write_text(SHOP)
    assert dataset(str(tmp_path / "shop.yaml")).name == "shop"


# ---- every field of every definition that comes along
# ---------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the place of every field, and of every value of a list."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield (*path, name)
        yield from places(child, (*path, name))


def changed(raw: dict, path: tuple, change) -> dict:
    raw = copy.deepcopy(raw)
    inner = raw
    for name in path[:-1]:
        inner = inner[name]
    change(inner, path[-1])
    return raw


def misspell(inner: Any, name: Any) -> None:
    inner[f"{name[:-1]}_{name[-1]}"] = inner.pop(name)


# Names that the definition's writer chooses: a changed one is seen by what refers to it, not by itself.
OWN_NAMES = {("logs", "columns"), ("events", "signals"), ("events", "item_fields"), ("targets", "negatives", "draw")}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda p: p.stem)
def test_any_field_of_a_wrong_type_or_name_is_told_by_its_name(tmp_path, sample):
    raw = yaml.load(sample.read_text(), Loader=yaml.BaseLoader)
    typed = yaml.safe_load(sample.read_text())
    definitions = 0
    for turn, path in enumerate(places(raw)):
        field = ".".join(str(part) for part in path)
        wrong = [{"nonsense": 1}, [["nonsense"]], True][turn % (2 if isinstance(_at(typed, path), bool) else 3)]
        said = refusal(
            tmp_path,
            json.dumps(
                changed(typed, path, lambda inner, name, wrong=wrong: inner.__setitem__(name, wrong)), default=str
            ),
            sample.stem,
        )
        # A value of a list of values, such as `equals`, is named by the field that it stands in.
        assert field in said or (isinstance(path[-1], int) and field.rpartition(".")[0] in said), (field, said)
        definitions += 1
        own = path[:-1] in OWN_NAMES or path[-2:-1] == ("fields",)
        if isinstance(path[-1], str) and not own:
            said = refusal(tmp_path, json.dumps(changed(typed, path, misspell), default=str), sample.stem)
            assert f"unknown field '{path[-1][:-1]}_{path[-1][-1]}'" in said
            assert f"did you mean '{path[-1]}'?" in said or "did you mean" not in said
            definitions += 1
    assert definitions > 50


def _at(raw: Any, path: tuple) -> Any:
    for name in path:
        raw = raw[name]
    return raw


@pytest.mark.parametrize(
    "field",
    [
        "name",
        "title",
        "first_day",
        "logs",
        "logs.files",
        "logs.columns",
        "logs.columns.user.type",
        "logs.days_in_name.pattern",
        "events",
        "events.user",
        "events.item",
        "events.time",
        "events.time.column",
        "events.watch_time.column",
        "events.signals",
        "events.signals.view.column",
        "items.0.files",
        "items.0.key",
        "items.0.fields",
        "items.0.fields.tags.column",
        "users.0.files",
        "users.0.key",
        "users.0.fields",
        "targets",
        "targets.positions.train",
    ],
)
def test_a_field_that_is_missing_is_named(tmp_path, field):
    path = tuple(int(part) if part.isdigit() else part for part in field.split("."))
    raw = changed(yaml.safe_load(SHOP), path, lambda inner, name: inner.pop(name))
    assert f"{field}: Field required" in refusal(tmp_path, yaml.safe_dump(raw))


def test_several_mistakes_are_told_together(tmp_path):
    said = refusal(
        tmp_path,
        SHOP.replace("title:", "titel:")
        .replace("unit: seconds", "unit: hours")
        .replace("max_events: 100", "max_events: 0"),
    )
    assert all(
        field in said
        for field in (
            "unknown field 'titel'",
            "did you mean 'title'?",
            "title: Field required",
            "events.watch_time.unit",
            "history.max_events",
        )
    )
    said = refusal(
        tmp_path,
        SHOP.replace("label: buy", "label: bought")
        .replace("above: 10", "above: 70")
        .replace("key: id, columns", "key: sku, columns"),
    )
    assert all(field in said for field in ("targets.label", "events.signals.long", "items.0.key"))


# ---- values and references that would fail or match nothing later
# ----------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        # of another type than the column
        ("equals: view}", "equals: 1}", ["events.signals.view.equals", "1 is no text", "quotes"]),
        ("equals: view}", "equals: 1e3}", ["events.signals.view.equals", "quotes"]),
        ("equals: view}", "equals: true}", ["events.signals.view.equals", "true", "quotes"]),
        ("equals: view}", "equals: [view, null]}", ["events.signals.view.equals", "null", "quotes"]),
        ("equals: view}", "equals: ~}", ["events.signals.view", "equals"]),
        ("equals: view}", "equals: ''}", ["events.signals.view.equals", "empty value"]),
        ("equals: view}", "equals: []}", ["events.signals.view.equals", "empty list"]),
        ("equals: view}", "equals: {a: b}}", ["events.signals.view.equals"]),
        ("equals: view}", 'equals: "a\\nb"}', ["events.signals.view.equals", "line break"]),
        ("equals: view}", "equals: 'a,b'}", ["events.signals.view.equals", "delimiter"]),
        (
            "{column: what, equals: view}",
            "{column: place, equals: '1'}",
            ["events.signals.view.equals", "'1' is text", "without quotes"],
        ),
        (
            "{column: what, equals: view}",
            "{column: place, equals: yes}",
            ["events.signals.view.equals", "'yes' is text"],
        ),
        ("{column: what, equals: view}", "{column: place, equals: 01}", ["events.signals.view.equals", "'01' is text"]),
        (
            "{column: what, equals: view}",
            "{column: place, equals: 12:30}",
            ["events.signals.view.equals", "'12:30' is text"],
        ),
        (
            "{column: what, equals: view}",
            "{column: place, equals: 0x1F}",
            ["events.signals.view.equals", "'0x1F' is text"],
        ),
        (
            "{column: what, equals: view}",
            "{column: place, equals: 1_000}",
            ["events.signals.view.equals", "'1_000' is text"],
        ),
        (
            "{column: what, equals: view}",
            "{column: place, equals: 1.5}",
            ["events.signals.view.equals", "whole number"],
        ),
        (
            "{column: what, equals: view}",
            "{column: place, equals: 9223372036854775808}",
            ["events.signals.view.equals", "64 bits"],
        ),
        ("{column: what, equals: view}", "{column: what, above: 3}", ["events.signals.view.above", "no order"]),
        ("{column: what, equals: view}", "{column: place, above: 1e30}", ["events.signals.view.above", "64 bits"]),
        ("{column: what, equals: view}", "{column: place, above: .inf}", ["events.signals.view.above", "finite"]),
        ("{column: what, equals: view}", "{column: place, above: '3'}", ["events.signals.view.above", "number"]),
        ("one_of: [view, buy]", "one_of: [1, 2]", ["logs.columns.how.one_of", "no text"]),
        ("one_of: [view, buy]", "one_of: [yes, on, true]", ["logs.columns.how.one_of", "true"]),
        ("one_of: [view, buy]", "one_of: []", ["logs.columns.how.one_of"]),
        ("one_of: [view, buy]", "one_of: view", ["logs.columns.how.one_of"]),
        ("one_of: [view, buy]", "min: 3", ["logs.columns.how.min", "no bounds"]),
        ("min: 0, max: 99", "min: 0, max: 1e30", ["logs.columns.user.max", "64 bits"]),
        ("min: 0, max: 99", "min: 100, max: 99", ["logs.columns.user", "no value"]),
        ("min: 0, max: 99", "min: 0, max: 99, one_of: [1, 100]", ["logs.columns.user.one_of", "100"]),
        ("min: 0, max: 99", "min: 0, max: 99, one_of: ['1']", ["logs.columns.user.one_of", "'1' is text"]),
        ("min: 0, max: 99", "min: true", ["logs.columns.user.min"]),
        # conditions that never hold
        ("above: 10", "above: 60", ["events.signals.long", "never hold"]),
        ("above: 10", "below: 0.5", ["events.signals.long", "never hold"]),
        ("above: 10", "above: 10, below: 10", ["events.signals.long", "never hold"]),
        ("above: 10", "above: 10, at_most: 9", ["events.signals.long", "never hold"]),
        ("above: 10", "equals: 61", ["events.signals.long.equals", "never holds"]),
        ("above: 10", "equals: [5, 6], above: 7", ["events.signals.long", "never hold"]),
        ("{column: what, equals: view}", "{column: place, above: 5, below: 6}", ["events.signals.view", "never hold"]),
        (
            "{column: what, equals: view}",
            "{column: how, equals: viewed}",
            ["events.signals.view", "'viewed' is not among logs.columns.how.one_of"],
        ),
        # times
        ("'%Y-%m-%d %H:%M:%S'", "'%F %T'", ["events.time", "format", "%F, %T"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%H:%M:%S'", ["events.time", "format", "lacks the year"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%Y-%m %H:%M'", ["events.time", "format", "lacks the day"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%Y-%m-%d %I:%M:%S'", ["events.time", "format", "%I and %p"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%Y-%m-%d %M:%S'", ["events.time", "format", "minute without the hour"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%Y-%m-%d %Y'", ["events.time", "format", "year twice"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%Y-%m-%d %'", ["events.time", "format"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%Y-%m-%d, %H:%M'", ["events.time.format", "delimiter"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%Y-%m-%d', year: 2024", ["events.time", "year: 2024 must go"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%m-%d', year: 2199", ["events.time", "year 2199 is not within"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%m%d', year: 2024, digits: 8", ["events.time", "digits 8", "4 characters"]),
        ("'%Y-%m-%d %H:%M:%S'", "'%m%d', year: 99999", ["events.time.year"]),
        ("zone: Europe/Berlin", "zone: America", ["events.time", "zone 'America'"]),
        ("zone: Europe/Berlin", "zone: ''", ["events.time", "zone ''"]),
        ("zone: Europe/Berlin", "earliest: 2024-05-01, latest: 2024-04-30", ["events.time", "latest", "earliest"]),
        ("zone: Europe/Berlin", "earliest: 2024-03-02", ["first_day", "earliest"]),
        ("zone: Europe/Berlin", "latest: 2024-03-30", ["last_day", "latest"]),
        ("zone: Europe/Berlin", "earliest: 20240302", ["events.time.earliest", "YYYY-MM-DD"]),
        ("first_day: 2024-03-01", "first_day: 2024-03-01T00:00:00", ["first_day", "YYYY-MM-DD"]),
        ("first_day: 2024-03-01", "first_day: '86400'", ["first_day", "YYYY-MM-DD"]),
        ("first_day: 2024-03-01", "first_day: 0001-01-01", ["first_day", "YYYY-MM-DD"]),
        ("year: 2024}", "year: 0}", ["logs.days_in_name.year"]),
        ("(?P<day>[0-9]+)", "(?P<day>", ["logs.days_in_name", "pattern"]),
        ("year: 2024}", "year: 2024, zone: Nowhere}", ["logs.days_in_name", "zone 'Nowhere'"]),
        # names, places, files
        ("files: [clicks.csv]", "files: [/data/clicks.csv]", ["logs.files.0", "absolute"]),
        ("files: [clicks.csv]", "files: ['~/clicks.csv']", ["logs.files.0", "absolute"]),
        ("files: [clicks.csv]", "files: [s3://b/clicks.csv]", ["logs.files.0", "absolute"]),
        ("files: [clicks.csv]", "files: [../clicks.csv]", ["logs.files.0", "leaves"]),
        ("files: [clicks.csv]", "files: ['']", ["logs.files.0", "empty"]),
        ("files: items.csv", "files: /items.csv", ["items.0.files", "absolute"]),
        ("files: items.csv", "files: clicks.csv", ["items.0.files", "logs.files"]),
        ("files: users.csv", "files: a/../../users.csv", ["users.0.files", "leaves"]),
        ("quoting: false", "quoting: no", ["logs.quoting", "true or false"]),
        ("quoting: false", "delimiter: '5'", ["logs.delimiter", "cannot be distinguished"]),
        ("quoting: false", "delimiter: e", ["logs.delimiter", "cannot be distinguished"]),
        ("quoting: false", "delimiter: §", ["logs.delimiter", "ASCII"]),
        ("quoting: false", "delimiter: 1", ["logs.delimiter", "quotes"]),
        ("key: id, columns", "delimiter: '\"', key: id, columns", ["items.0.delimiter", "cannot be distinguished"]),
        ("key: id, columns", 'delimiter: "\\n", key: id, columns', ["items.0.delimiter", "cannot be distinguished"]),
        (
            "key: id, columns",
            "missing: [-1, null], key: id, columns",
            ["items.0.missing.0", "items.0.missing.1", "quotes"],
        ),
        ("key: id, columns", "key: sku, columns", ["items.0.key", "'sku' is not among items.0.columns"]),
        ("[id, title, tags]", "[id, title, title, tags]", ["items.0.columns", "'title' is named twice"]),
        ("[id, title, tags]", "[id, title]", ["items.0.fields.tags.column", "'tags' is not among"]),
        ("[id, title, tags]", "[]", ["items.0.columns"]),
        ("key: id, fields", "key: '', fields", ["users.0.key"]),
        ("{title: title,", "{Title: title,", ["items.0.fields.Title", "a-z"]),
        ("{title: title,", "{'../x': title,", ["items.0.fields.../x", "a-z"]),
        ("{title: title,", "{item_id: title,", ["items.0.fields.item_id", "taken"]),
        ("{title: title,", "{place_of: title,", ["items.0.fields.place_of", "events.item_fields"]),
        ("{title: title,", "{title: {column: title, split: ';'},", ["items.0.fields.title", "split"]),
        ("{place_of: place}", "{feedback: place}", ["events.item_fields.feedback", "taken"]),
        (
            "{place_of: place}",
            "{place_of: {column: item, kind: number}}",
            ["events.item_fields.place_of.column", "of type text"],
        ),
        (
            "fields: {city: city}}",
            "fields: {city: city}}\n  - {files: more.csv, key: id, fields: {city: town}}",
            ["users.1.fields.city", "taken"],
        ),
        (
            "fields: {city: city}}",
            "fields: {city: {column: city, kind: number}}}",
            ["users.0.fields.city.kind", "category"],
        ),
        ("{view: {", "{'a,b': {", ["events.signals.a,b", "letters"]),
        ("{view: {", "{'': {", ["events.signals", "letters"]),
        ("{view: {", "{View: {column: what, equals: v}, view: {", ["events.signals.view", "only in case"]),
        ("title: A shop", "title: ''", ["title"]),
        ("title: A shop", "title: 12", ["title", "quotes"]),
        ("name: shop", "name: true", ["name", "quotes"]),
        # sets that hold nothing, or something twice
        ("history: {of: [view, buy]", "history: {of: []", ["history.of"]),
        ("history: {of: [view, buy]", "history: {of: [view, view]", ["history.of", "'view' is named twice"]),
        ("targets: {of: [view, buy]", "targets: {of: [buy]", ["targets.of", "every target has the label"]),
        ("train: [-2, -3]", "train: [-1, -3]", ["targets.positions.evaluation", "-1 is already a place of train"]),
        ("train: [-2, -3]", "train: [-2, -2]", ["targets.positions.train", "-2 is already"]),
        ("train: [-2, -3]", "train: [2]", ["targets.positions.train.0"]),
        ("evaluation: [-1]}", "evaluation: []}", ["targets.positions.evaluation"]),
        ("label: buy, ", "negatives: {per_positive: 1, draw: {}}, ", ["targets.negatives.draw"]),
        (
            "label: buy, ",
            "negatives: {per_positive: 1, draw: {uniform: .inf}}, ",
            ["targets.negatives.draw.uniform", "finite"],
        ),
        ("label: buy, ", "negatives: {per_positive: 1, seed: -1}, ", ["targets.negatives.seed"]),
        ("max_events: 100", "max_events: -1", ["history.max_events"]),
        ("max_events: 100", "availability_lag_ms: 99999999999999999999", ["history.availability_lag_ms"]),
        ("max_events: 100", "max_events: 1e2", ["history.max_events"]),
        ("max_events: 100", "max_events: 1_00", ["history.max_events", "'1_00'"]),
        ("lookback_days: 9", "lookback_days: 999999999", ["window.lookback_days"]),
        ("lookback_days: 9", "lookback_days: '9'", ["window.lookback_days"]),
        ("  item: item", "  item: user", ["events.item", "already events.user"]),
        ("hour: 6", "hour: 24", ["run.hour"]),
        ("hour: 6", "hour: '6'", ["run.hour"]),
        ("hour: 6", "hours: 6", ["unknown field 'hours'", "did you mean 'hour'"]),
        ("hour: 6", "hour: 6, wait_hours: 24", ["run.wait_hours"]),
        ("hour: 6", "hour: 6, config: ../x", ["run.config"]),
        ("hour: 6", "hour: 6, on_warning: ask", ["run.on_warning", "'continue' or 'approve'"]),
        ("workers: 3", "workers: 0", ["run.workers"]),
        ("workers: 3", "workers: 4:2", ["run.workers", "4:2 is not", "the first is greater"]),
        ("workers: 3", "workers: true", ["run.workers"]),
        ("raw: /data/shop", "raw: data/shop", ["run.raw", "'data/shop' is relative"]),
        ("raw: /data/shop", "raw: '/data/shop; id'", ["run.raw"]),
        # YAML
        ("title: A shop", "title: A shop\ntitle: B", ["title: given twice, in lines 3 and 4"]),
        ("    item: text", "    item: text\n    item: integer", ["logs.columns.item: given twice"]),
        ("equals: view}", "equals: view, equals: buy}", ["events.signals.view.equals: given twice"]),
        ("title: A shop", "title: A shop\n? [a, b]\n: c", ["line 4", "a key must be a name"]),
        ("title: A shop", "title: &a [*a]", ["title", "holds itself"]),
        ("title: A shop", "title: A shop\n<<: {simulated: true}", ["<<", "merge keys"]),
        ("title: A shop", "title: !!binary x", ["is not YAML"]),
        ("title: A shop", "title: 'A shop", ["is not YAML"]),
        ("title: A shop", "\ttitle: A shop", ["is not YAML"]),
    ],
)
def test_what_would_fail_or_match_nothing_later_is_refused(tmp_path, old, new, says):
    assert old in SHOP
    said = refusal(tmp_path, SHOP.replace(old, new, 1))
    assert all(text in said for text in says), said


def test_a_folder_with_a_key_in_its_address_is_refused_without_repeating_it(tmp_path):
    said = refusal(tmp_path, SHOP.replace("/data/shop", "'s3://key:s3cret@bucket'"))
    assert "run.raw" in said
    assert "s3cret" not in said


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"- a",
        b"a",
        b"\xff\xfe\x00",
        b"name: \xff",
        SHOP.encode("utf-16"),
        b"a: \x00",
        b"[" * 5_000,
        b"--- a\n--- b\n",
    ],
)
def test_a_file_that_is_no_definition_is_refused(tmp_path, body):
    assert "the data set definition" in refusal(tmp_path, body)


@pytest.mark.parametrize("body", [SHOP.encode("utf-8-sig"), SHOP.replace("\n", "\r\n").encode()])
def test_definitions_of_windows_editors_read(tmp_path, body):
    (tmp_path / "shop.yaml").write_bytes(body)
    assert dataset(str(tmp_path / "shop.yaml")).title == "A shop"


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "no",
        "on",
        "off",
        "y",
        "N",
        "01",
        "007",
        "12:30",
        "1_000",
        "0x1F",
        "0o7",
        "2024-03-01",
        "2024-03-01 12:00:00",
        "=",
        "+1",
        ".5",
        "1.",
        "1e",
        "-",
    ],
)
def test_what_yaml_changes_is_the_text_that_stands_there(tmp_path, text):
    """Nothing matches less than it says: the label of a log with yes and no is yes, not True."""
    if text in ("-", "="):
        text = f"'{text}'"
    (tmp_path / "shop.yaml").write_text(
        SHOP.replace("equals: view}", f"equals: {text}}}")
        .replace("one_of: [view, buy]", f"one_of: [{text}, buy]")
        .replace("A shop", text)
    )
    definition = dataset(str(tmp_path / "shop.yaml"))
    text = text.strip("'")
    assert definition.events.signals["view"].equals == text
    assert definition.logs.columns["how"].one_of == (text, "buy")
    assert definition.title == text


def test_keys_are_text_whatever_yaml_makes_of_them(tmp_path):
    (tmp_path / "shop.yaml").write_text(
        SHOP.replace(
            "    place: integer", "    place: integer\n    on: text\n    1: text\n    null: text\n    2024-03-01: text"
        )
    )
    assert set(dataset(str(tmp_path / "shop.yaml")).logs.columns) >= {"on", "1", "null", "2024-03-01"}


def test_names_of_the_warehouse_are_no_fields():
    assert set(EVENT_COLUMNS) == set(parsed_schema(dataset("kuairand")).names)
    assert set(ITEM_COLUMNS) == set(ITEMS.names)


# ---- formats of times
# -------------------------------------------------------------------------------------------------------

DATES = [
    "%Y-%m-%d",
    "%Y%m%d",
    "%d/%m/%Y",
    "%d %b %Y",
    "%B %d %Y",
    "%a %d %b %Y",
    "%A %d %B %y",
    "%y%m%d",
    "%Y %j",
    "%m.%d.%y",
    "%%%Y/%m/%d",
]
CLOCKS = ["", " %H:%M:%S", "T%H:%M", " %H", " %H:%M:%S.%f", " %I:%M:%S %p", " %I %p", "%H%M%S", "-%H%M"]


@pytest.mark.parametrize(("date", "clock"), list(itertools.product(DATES, CLOCKS)))
def test_a_format_that_is_allowed_reads_what_it_writes(date, clock):
    time = Time(column="at", format=date + clock)
    moment = dtm.datetime(2024, 11, 23, 21, 45, 56, 789_000, tzinfo=dtm.UTC)
    finest = {"%f": 1, "%S": 1_000, "%M": 60_000, "%H": 3_600_000, "%I": 3_600_000}
    step = next((ms for directive, ms in finest.items() if directive in clock), 86_400_000)
    [ms], [there] = times_ms(pa.array([moment.strftime(time.format)]), time)
    assert there
    assert ms == round(moment.timestamp() * 1_000) // step * step


@pytest.mark.parametrize("directive", [chr(code) for code in range(33, 127)])
@pytest.mark.parametrize("form", ["%Y-%m-%d {}", "{} %m-%d", "%Y {}", "{}"])
def test_a_format_is_refused_or_never_crashes(directive, form):
    try:
        time = Time(column="at", format=form.format(f"%{directive}"))
    except ValueError as error:
        assert "format" in str(error)
        return
    moment = dtm.datetime(2024, 11, 23, 21, 45, 56, tzinfo=dtm.UTC)
    [ms, *_], [there, wrong] = times_ms(pa.array([moment.strftime(time.format), "nonsense"]), time)
    assert there
    assert not wrong
    assert ms // 86_400_000 == int(moment.timestamp()) // 86_400


def test_a_definition_is_checked_alone_and_the_page_shows_the_message_of_a_wrong_one(tmp_path):
    page = (ROOT / "docs" / "datasets.md").read_text()
    right = (ROOT / "docs" / "definitions" / "buildroot.yaml").read_text()
    wrong = tmp_path / "shop.yaml"
    for old, new in {
        "unit: seconds": "unit: hours",
        "max_events: 100000": "max_events: 0",
        "name: b": "name: shop #",
    }.items():
        assert right.count(old) == 1
        right = right.replace(old, new)
    wrong.write_text(right)
    said = {}
    for path in (ROOT / "docs" / "definitions" / "buildroot.yaml", wrong):
        ended = subprocess.run(
            [sys.executable, "-m", "etl.datasets.check", str(path)], capture_output=True, text=True, cwd=ROOT
        )
        said[path.stem] = ended.returncode, ended.stdout + ended.stderr
    assert said["buildroot"][0] == 0 and "the definition is right" in said["buildroot"][1]
    [example] = re.findall(r"^error: the data set definition shop\.yaml is wrong: .*$", page, re.MULTILINE)
    assert said["shop"][0] == 2 and example in said["shop"][1].replace(str(tmp_path) + "/", "")

"""Inputs that people brought and that once failed: each is read as the table below says, or refused by one line that
names the way out.

A folder has its definition and its input. What is expected of it stands in `EXPECTED`, and a folder without a row there
fails.
"""

from __future__ import annotations

import datetime as dtm
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from etl.datasets.definition import dataset
from etl.ingest.event_rows import COUNTED, EVENT, REFUSED, parse_split, write_day_bucket
from etl.ingest.features import read_features
from etl.ingest.raw import RawLocation
from etl.stage.errors import StageError
from etl.warehouse.buckets import Layout
from etl.warehouse.partitions import day_number
from etl.warehouse.store import TableStore

FIELD = Path(__file__).resolve().parents[3] / "shared" / "field"
FOLDERS = sorted(path.parent.name for path in FIELD.glob("*/input"))

pytestmark = pytest.mark.skipif(not FOLDERS, reason=f"the inputs are not at {FIELD}")


@dataclass(frozen=True)
class Expected:
    """What must come of a folder.

    Attributes:
        days: UTC days that are built.
        events, duplicates, quarantined: rows of these days.
        instants: UTC times of the events in their order, for folders whose times were the fault.
        feedback: bits of the events' signals in their order, where signals were the fault.
        refused: what the one line of the refusal must hold; nothing is built then.
        definition: name of a built-in definition, or text of an own one, where the folder has none.
    """

    days: tuple[str, ...] = ("2024-03-01",)
    events: int = 0
    duplicates: int = 0
    quarantined: int = 0
    instants: tuple[str, ...] = ()
    feedback: tuple[int, ...] = ()
    refused: tuple[str, ...] = ()
    definition: str = ""


TEACHING_TMALL = """
name: tmall_teaching
title: A teaching copy of TMALL
first_day: 2014-05-01
logs:
  files: [user_log.csv]
  repeats: keep
  columns: {user_id: integer, item_id: integer, month: text, day: text, action: integer}
events:
  user: user_id
  item: item_id
  time: {column: [month, day], format: '%m %d', year: 2014}
  signals: {click: {column: action, equals: 0}, buy: {column: action, equals: 2}}
targets: {label: buy}
"""

EXPECTED = {
    "blank_lines_stop_small_days": Expected(events=6),
    "compressed_but_not_gz": Expected(events=6),
    "csv_and_gz_of_the_same_file": Expected(
        ("2014-08-29",),
        refused=("user_log_format1.csv and user_log_format1.csv.gz", "hold the same rows", "remove one of them"),
        definition="tmall",
    ),
    "definition_passes_then_crashes_equals": Expected(
        refused=("events.signals.click.equals", "'1' is text", "without quotes")
    ),
    "definition_passes_then_crashes_format": Expected(refused=("events.time", "%F, %T", "is no directive")),
    "delimiter_of_two_characters": Expected(
        ("2000-12-31",), events=2, instants=("2000-12-31 22:12:40", "2000-12-31 22:35:09")
    ),
    "empty_day_with_category_field": Expected(("2024-02-29", "2024-03-01"), events=6),
    "folders_of_days": Expected(events=6),
    "integer_ids_of_19_digits": Expected(events=2),
    "one_bad_parquet_value_stops_all": Expected(events=1, quarantined=1),
    "item_file_open_quote": Expected(refused=("items.tsv", "quoting: false")),
    "max_events_is_no_cap": Expected(("2024-03-01", "2024-03-02"), events=19, duplicates=1),
    "one_user_is_promoted": Expected(("2024-03-01", "2024-03-02"), events=560),
    "teaching_copies_of_tmall": Expected(
        ("2014-08-29",), events=2, instants=("2014-08-29 00:00:00",) * 2, definition=TEACHING_TMALL
    ),
    "time_in_two_columns": Expected(("1999-06-24",), events=2, instants=("1999-06-24 10:06:37", "1999-06-24 10:07:17")),
    "time_with_offset": Expected(events=2, instants=("2024-03-01 00:00:00", "2024-03-01 07:00:00")),
    "yaml_boolean_label": Expected(events=6, feedback=(0, 1) * 3),
}


def definition_of(folder: Path, expected: Expected, here: Path):
    if expected.definition and "\n" not in expected.definition:
        return dataset(expected.definition)
    text = expected.definition or (folder / "definition.yaml").read_text()
    name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("name:"))
    (here / f"{name}.yaml").write_text(text)
    return dataset(str(here / f"{name}.yaml"))


def built(definition, folder: Path, days: tuple[str, ...], warehouse: Path) -> tuple[dict[str, int], list[dict]]:
    """Build days as the job's tasks do, without Spark; return the counts of rows and the events."""
    place = RawLocation(str(folder))
    numbers = frozenset(day_number(day) for day in days)
    splits = place.splits(
        place.logs(definition), definition.logs, lambda ranges: [place.count_newlines(*r) for r in ranges]
    )
    rows = pa.concat_tables(
        [table for split in splits for table in parse_split(place, split, definition, numbers, days[-1], Layout(1))]
    )
    kind = rows["kind"].to_numpy()
    counted = rows.filter(pa.array(kind == COUNTED))
    counts = {
        "read": sum(
            n
            for day, n in zip(counted["day"].to_pylist(), counted["row_number"].to_pylist(), strict=True)
            if day in numbers
        )
    }
    for rule in (*definition.items, *definition.users):
        read_features(place, rule)
    store = TableStore(str(warehouse), definition.name)
    work = store.begin_try("field", ["events", "quarantine"], list(days))
    written = rows.filter(pa.array((kind == EVENT) | (kind == REFUSED)))
    for day in numbers:
        figures = write_day_bucket(
            written.filter(pa.array(written["day"].to_numpy() == day)), store, definition, work, day, 0
        )
        counts = {
            name: counts.get(name, 0) + figures.get(name, 0) for name in ("read", "events", "duplicates", "quarantined")
        }
    return counts, [row for row in rows.to_pylist() if row["kind"] == EVENT]


@pytest.mark.parametrize("name", FOLDERS)
def test_an_input_of_the_field_is_read_or_refused_as_the_table_says(name, tmp_path):
    assert name in EXPECTED, f"say in EXPECTED what must come of {name}"
    expected, folder = EXPECTED[name], FIELD / name
    try:
        counts, events = built(
            definition_of(folder, expected, tmp_path), folder / "input", expected.days, tmp_path / "warehouse"
        )
    except StageError as error:
        assert expected.refused, error
        assert all(text in str(error) for text in expected.refused), error
        assert len(error.what.splitlines()) == len(error.remedy.splitlines()) == 1
        return
    assert not expected.refused, "it should have been refused"
    assert counts == {
        "read": expected.events + expected.duplicates + expected.quarantined,
        "events": expected.events,
        "duplicates": expected.duplicates,
        "quarantined": expected.quarantined,
    }
    assert not expected.feedback or tuple(event["feedback"] for event in events) == expected.feedback
    if expected.instants:
        assert (
            tuple(str(dtm.datetime.fromtimestamp(e["event_time_ms"] / 1000, dtm.UTC))[:19] for e in events)
            == expected.instants
        )

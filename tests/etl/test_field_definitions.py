"""Real definitions that once were accepted and then failed, or silently matched nothing."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from etl.datasets import dataset
from etl.errors import StageError
from etl.jobs.events import EVENT, REFUSED, parse_split
from etl.partitions import day_number
from etl.raw import RawLocation

FIELD = Path(__file__).resolve().parents[2].parent / "shared" / "field"
pytestmark = pytest.mark.skipif(not FIELD.exists(), reason=f"the inputs are not at {FIELD}")


def definition_of(folder: str, tmp_path: Path) -> str:
    path = tmp_path / "shop.yaml"
    path.write_text((FIELD / folder / "definition.yaml").read_text())
    return str(path)


def parsed(folder: str, tmp_path: Path) -> tuple[list[dict], list[dict]]:
    """Return events and refused rows of the folder's day, through the reader that the job uses."""
    definition, place = dataset(definition_of(folder, tmp_path)), RawLocation(str(FIELD / folder / "input"))
    days = frozenset({day_number("2024-03-01")})
    tables = [table for split in place.splits(place.logs(definition), definition.logs, None) for table in parse_split(place, split, definition, days, "2024-03-01", 1)]
    rows = pa.concat_tables(tables).to_pylist()
    return [r for r in rows if r["kind"] == EVENT], [r for r in rows if r["kind"] == REFUSED]


@pytest.mark.parametrize(("folder", "says"), [
    ("definition_passes_then_crashes_equals", ["events.signals.click.equals", "'1' is text", "without quotes"]),
    ("definition_passes_then_crashes_format", ["events.time", "%F, %T"]),
])  # fmt: skip
def test_a_definition_that_crashed_a_task_is_refused_when_it_is_read(tmp_path, folder, says):
    with pytest.raises(StageError) as caught:
        dataset(definition_of(folder, tmp_path))
    assert all(text in caught.value.what for text in says)


def test_a_label_that_yaml_takes_for_true_matches_the_text_that_stands_there(tmp_path):
    events, refused = parsed("yaml_boolean_label", tmp_path)
    assert [event["feedback"] for event in events] == [0, 1] * 3
    assert refused == []

"""The documented ways to read a table with other engines give the rows of the manifest, also after a day was published
twice.

.venv/bin/python -m pytest tests/etl/test_readers.py -q
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from etl.datasets.definition import dataset
from etl.datasets.definition_checks import _fields
from etl.warehouse.schemas import EVENTS, schema_fingerprint
from etl.warehouse.store import Manifest, TableStore

DOCS = (
    (Path(__file__).resolve().parents[2] / "docs" / "data.md")
    .read_text()
    .split("## Reading the tables with other engines")[1]
    .split("\n## ")[0]
)
DT, USERS = "2022-04-21", (7, 5)  # rows of the first and of the second publication


def events(rows: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            field.name: rng.integers(0, 2, rows)
            if field.name == "is_random"
            else np.sort(rng.integers(0, 30_000, rows))
            for field in EVENTS
        }
    ).cast(EVENTS)


@pytest.fixture
def published(tmp_path) -> pa.Table:
    store = TableStore(str(tmp_path), "kuairand")
    for attempt, rows in zip(("first", "second"), USERS, strict=True):
        work = store.begin_try(attempt, ["events"], [DT])
        files = tuple(store.write_file(work, "events", DT, bucket, events(rows, bucket)) for bucket in (0, 1))
        store.write_staged_manifest(
            work, Manifest("kuairand", "events", DT, attempt, schema_fingerprint(EVENTS), "v", files)
        )
        store.publish(attempt, "events", DT)
    return store.read(store.require("events", DT))


def as_pandas(rows: Any) -> pd.DataFrame:
    if isinstance(rows, pd.DataFrame):
        return rows
    if hasattr(rows, "toPandas"):
        return rows.toPandas()
    return (rows.read_all() if hasattr(rows, "read_all") else rows).to_pandas()


def assert_same(found: Any, wanted: pa.Table, more: set[str] = frozenset()) -> None:
    frame = as_pandas(found)
    assert set(frame.columns) == {*wanted.column_names, *more}
    keys = ["user_id", "item_id", "event_time_ms"]
    left = frame[wanted.column_names].sort_values(keys).reset_index(drop=True)
    pd.testing.assert_frame_equal(left, wanted.to_pandas().sort_values(keys).reset_index(drop=True), check_dtype=False)


@pytest.mark.spark
def test_the_documented_recipes_read_exactly_what_the_manifest_lists(published, tmp_path):
    # A Spark that other tests have started does not follow into another working folder.
    docs = DOCS.replace("var/warehouse", str(tmp_path))
    prepare, *snippets = re.findall(r"```python\n(.*?)```", docs, re.DOTALL)
    assert [re.search(r"import (duckdb|SparkSession|pandas)", text).group(1) for text in snippets] == [
        "duckdb",
        "SparkSession",
        "pandas",
    ]
    for snippet in snippets:
        names: dict[str, Any] = {}
        exec(prepare + snippet, names)
        assert_same(names["rows"], published)
    plain = re.findall(r"`((?:duckdb|spark|pd)\.read[^`]*)`", docs)
    assert len(plain) == 3
    import duckdb

    for text in plain:
        found = eval(text, {"duckdb": duckdb, "spark": names.get("spark") or _spark(), "pd": pd})
        assert_same(found.arrow() if text.startswith("duckdb") else found, published, {"dt", "bucket"})
    _spark().stop()


@pytest.mark.parametrize("name", ["dt", "bucket"])
@pytest.mark.parametrize("part", ["events", "items"])
def test_no_field_has_the_name_of_a_partition_folder(part, name):
    """Engines that read the folders' names as columns would show the one and hide the other."""
    definition = dataset("kuairand")
    rule = next(iter(definition.items[0].fields.values()))
    changes = {
        "events": {"events": definition.events.model_copy(update={"item_fields": {name: rule}})},
        "items": {"items": (definition.items[0].model_copy(update={"fields": {name: rule}}),)},
    }
    assert any(
        f"{name}: " in what and "column of the warehouse" in what
        for what in _fields(definition.model_copy(update=changes[part]))
    )


def _spark():
    from pyspark.sql import SparkSession

    return SparkSession.builder.getOrCreate()

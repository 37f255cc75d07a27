"""Parquet logs obey the rules of text logs.

A bad value refuses its row, never the file; the same rows give the same events.
"""

from __future__ import annotations

import collections
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.datasets.definition import DatasetDefinition, dataset
from etl.ingest.event_rows import COUNTED, REFUSED, parse_split
from etl.ingest.raw import RawLocation
from etl.stage.errors import StageError
from etl.warehouse.buckets import Layout
from etl.warehouse.partitions import day_number

DAY, SECONDS = "2024-03-01", 1_709_280_000
SHOP = """
name: shop
title: A shop
first_day: 2024-03-01
logs:
  files: [log.FORMAT]
  format: FORMAT
  missing: ['', 'nan', 'NULL', '-1']
  columns:
    user: {type: integer, min: 0}
    item: text
    act: {type: text, one_of: [view, buy], optional: true}
    score: {type: decimal, optional: true, max: 100}
    place: {type: integer, optional: true}
    at: integer
events:
  user: user
  item: item
  time: {column: at, unit: seconds}
  context: place
  signals: {buy: {column: act, equals: buy}, high: {column: score, above: 5}}
  item_fields: {shelf: {column: place}}
targets: {label: buy}
"""
GOOD = {"user": 1, "item": "x", "act": "buy", "score": 7.5, "place": 3, "at": SECONDS}


def definition(folder: Path, kind: str) -> DatasetDefinition:
    (folder / "shop.yaml").write_text(SHOP.replace("FORMAT", kind))
    return dataset(str(folder / "shop.yaml"))


def parsed(folder: Path, kind: str) -> list[dict]:
    """Return all that a day's tasks get from the log of one format."""
    rules, place = definition(folder, kind), RawLocation(str(folder))
    days = frozenset({day_number(DAY)})
    splits = place.splits(place.logs(rules), rules.logs, lambda ranges: [place.count_newlines(*r) for r in ranges])
    return pa.concat_tables(
        [t for split in splits for t in parse_split(place, split, rules, days, DAY, Layout(2))]
    ).to_pylist()


def refused(rows: list[dict]) -> list[dict]:
    return sorted((r for r in rows if r["kind"] == REFUSED), key=lambda r: r["row_number"])


def write(folder: Path, column: str, values: pa.Array) -> None:
    """Write good rows of which one column holds these values."""
    table = {name: pa.array([value] * len(values)) for name, value in GOOD.items()} | {column: values}
    pq.write_table(pa.table(table), folder / "log.parquet")


def text_of(bodies: list[bytes]) -> pa.Array:
    """Return bytes under the name of text, which nothing has checked."""
    return pa.Array.from_buffers(pa.string(), len(bodies), pa.array(bodies, pa.binary()).buffers())


@pytest.mark.parametrize(
    ("column", "values", "reasons"),
    [
        ("user", pa.array([1, 2.5, 3]), {2: "not_an_integer: user='2.5'"}),
        (
            "user",
            pa.array([1, float("nan"), float("inf")]),
            {2: "missing_value: user='nan'", 3: "not_an_integer: user='inf'"},
        ),
        ("user", pa.array([1.0, 1e19], pa.float32()), {2: "not_an_integer: user="}),
        ("user", pa.array([1, 2**63 + 5], pa.uint64()), {2: "too_large: user='9223372036854775813'"}),
        ("user", pa.array([1, None, -3]), {2: "missing_value: user", 3: "out_of_range: user=-3"}),
        (
            "user",
            pa.array(["1", "", "x", None]),
            {2: "missing_value: user", 3: "not_an_integer: user='x'", 4: "missing_value: user"},
        ),
        ("user", pa.array([b"1", b"\xff"], pa.large_binary()), {2: "not_utf8"}),
        ("user", pa.array(["1", "two"]).dictionary_encode(), {2: "not_an_integer: user='two'"}),
        ("user", pa.array([decimal.Decimal("1.000"), decimal.Decimal("2.500")]), {2: "not_an_integer: user='2.500'"}),
        (
            "user",
            pa.array([decimal.Decimal(1), decimal.Decimal(10**30)], pa.decimal128(38, 0)),
            {2: "too_large: user='1000"},
        ),
        ("user", pa.array([1, 2], pa.int8()), {}),
        ("user", pa.array([True, False, None]), {3: "missing_value: user"}),
        ("user", pa.nulls(2), {1: "missing_value: user", 2: "missing_value: user"}),
        ("item", pa.array(["x", "", None], pa.large_string()), {2: "missing_value: item", 3: "missing_value: item"}),
        ("item", text_of([b"x", b"a\xffb", b"\xc3\xbc"]), {2: "not_utf8"}),
        ("item", pa.array([b"x", b"\xff\xfe"], pa.binary()), {2: "not_utf8"}),
        ("item", pa.array(["x", "a\0b"]), {2: "nul_byte"}),
        ("item", pa.array([1, None, 3]), {2: "missing_value: item"}),
        ("item", pa.array([1.5, float("nan")]), {2: "missing_value: item"}),
        ("act", pa.array(["buy", "", None, "look"]), {4: "not_allowed: act='look'"}),
        (
            "score",
            pa.array([1.0, float("nan"), float("inf"), None, 101.0]),
            {3: "not_a_decimal: score='inf'", 5: "out_of_range: score=101.0"},
        ),
        ("score", pa.array([1.5, np.inf], pa.float16()), {2: "not_a_decimal"}),
        ("user", pa.array([3, -1, 4], pa.int32()), {2: "missing_value: user='-1'"}),
        ("score", pa.array(["1.5", "1,5", ""]), {2: "not_a_decimal: score='1,5'"}),
        ("score", pa.array([2**60 + 1]), {1: "out_of_range"}),
        ("score", pa.array([decimal.Decimal("1.25"), None]), {}),
        ("score", pa.array([True, False]), {}),
        ("place", pa.array([1.5, None]), {1: "not_an_integer: place='1.5'"}),
        ("at", pa.array([SECONDS, 12, None]), {2: "time_out_of_range: at=12", 3: "missing_value: at"}),
        ("at", pa.array([float(SECONDS), SECONDS + 0.5]), {2: f"not_an_integer: at='{SECONDS}.5'"}),
    ],
)
def test_a_value_that_cannot_be_its_columns_refuses_its_row_alone(tmp_path, column, values, reasons):
    write(tmp_path, column, values)
    rows = parsed(tmp_path, "parquet")
    found = {r["row_number"]: r["reason"] for r in refused(rows)}
    assert list(found) == list(reasons)
    assert all(found[row].startswith(reason) for row, reason in reasons.items()), found
    assert sum(r["row_number"] for r in rows if r["kind"] == COUNTED) == len(values)
    for row in refused(rows):
        assert set(json.loads(row["raw_text"])) == set(GOOD)


def test_a_refused_row_shows_its_bytes_and_is_filed_under_its_own_day(tmp_path):
    table = {name: [value] * 2 for name, value in GOOD.items()} | {
        "item": pa.array([b"\xff\0", b"x"], pa.binary()),
        "at": [SECONDS - 86_400, SECONDS],
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    rows = parsed(tmp_path, "parquet")
    assert refused(rows) == []  # of the day before, which is not built here
    table["at"] = [SECONDS, SECONDS]
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    [row] = refused(parsed(tmp_path, "parquet"))
    assert json.loads(row["raw_text"])["item"] == "\\xff\\x00"


@pytest.mark.parametrize(
    ("column", "values", "wanted"),
    [
        ("user", pa.array([[1], [2]]), "several values"),
        ("item", pa.array([{"a": 1}]), "several values"),
        ("score", pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "several values"),
        ("place", pa.array([0], pa.time32("s")), "integer"),
        ("at", pa.array([0], pa.date32()), "integer"),
    ],
)
def test_a_type_that_can_hold_no_such_value_is_told_of_the_file(tmp_path, column, values, wanted):
    write(tmp_path, column, values)
    with pytest.raises(StageError) as caught:
        parsed(tmp_path, "parquet")
    assert all(
        text in caught.value.what
        for text in ("log.parquet", f"column {column}", str(values.type).split("<")[0].split("[")[0], wanted)
    )


INTEGERS = st.one_of(st.none(), st.integers(-3, 100))
TEXTS = st.one_of(st.none(), st.sampled_from(["", "view", "buy", "a,b", 'a"b', "ü", " "]))
KINDS: dict[str, list[tuple[pa.DataType, Any]]] = {
    "user": [
        (pa.int8(), INTEGERS),
        (pa.int64(), INTEGERS),
        (pa.float64(), st.one_of(INTEGERS, st.sampled_from([2.5, -0.5]))),
        (pa.decimal128(12, 2), st.one_of(INTEGERS, st.just(decimal.Decimal("2.50")))),
        (pa.uint64(), st.one_of(st.none(), st.integers(0, 9), st.just(2**63 + 1))),
        (pa.string(), st.sampled_from(["1", "22", "-1", "x", "", None, "1.5", "0x1"])),
        (pa.large_binary(), st.sampled_from([b"1", b"", b"x", None, b"\xff"])),
        (pa.dictionary(pa.int32(), pa.string()), st.sampled_from(["1", "x", None])),
    ],
    "item": [
        (pa.string(), TEXTS),
        (pa.large_string(), TEXTS),
        (pa.dictionary(pa.int32(), pa.string()), TEXTS),
        (pa.int32(), INTEGERS),
        (pa.binary(), st.sampled_from([b"x", b"", b"\xff", b"a\0b", None, "ü".encode()])),
    ],
    "act": [(pa.string(), TEXTS), (pa.large_string(), TEXTS)],
    "score": [
        (pa.float64(), st.one_of(st.none(), st.sampled_from([0.5, 7.25, 200.0, float("inf"), float("nan")]))),
        (pa.int16(), INTEGERS),
        (pa.string(), st.sampled_from(["1.5", "1e2", "x", "", None, "nan"])),
        (pa.decimal128(9, 3), st.sampled_from([None, decimal.Decimal("5.125")])),
    ],
    "place": [
        (pa.int16(), INTEGERS),
        (pa.float32(), st.one_of(INTEGERS, st.just(0.5))),
        (pa.string(), st.sampled_from(["1", "", "b"])),
    ],
    "at": [
        (pa.int64(), st.sampled_from([SECONDS, SECONDS + 5, SECONDS - 86_400, 12, None])),
        (pa.float64(), st.sampled_from([float(SECONDS), SECONDS + 0.5, None])),
        (pa.string(), st.sampled_from([str(SECONDS), "now", ""])),
    ],
}


def cell(value: Any) -> bytes:
    """Return a value as its writer puts it into a text file."""
    if value is None:
        return b""
    if isinstance(value, bytes | str):
        body = value if isinstance(value, bytes) else value.encode()
        return b'"' + body.replace(b'"', b'""') + b'"' if body else b""
    if isinstance(value, float | decimal.Decimal) and value == value and abs(value) < 1e18 and value == int(value):
        value = int(value)
    return str(value).encode()


@st.composite
def logs(draw) -> tuple[pa.Table, bytes]:
    rows = draw(st.integers(1, 12))
    columns, cells = {}, {}
    for name, kinds in KINDS.items():
        kind, values = draw(st.sampled_from(kinds))
        drawn = draw(st.lists(values, min_size=rows, max_size=rows))
        columns[name], cells[name] = pa.array(drawn, kind), [cell(value) for value in drawn]
    names = draw(st.permutations(list(KINDS)))
    lines = [",".join(names).encode(), *(b",".join(cells[name][row] for name in names) for row in range(rows))]
    return pa.table({name: columns[name] for name in names}), b"\n".join(lines) + b"\n"


@settings(max_examples=80)
@given(log=logs(), group=st.integers(1, 5))
def test_the_same_rows_as_text_and_as_parquet_give_the_same(tmp_path_factory, log, group):
    table, body = log
    folder = tmp_path_factory.mktemp("raw")
    (folder / "log.csv").write_bytes(body)
    pq.write_table(table, folder / "log.parquet", row_group_size=group)
    found: dict = {}
    for kind, header in (("csv", 1), ("parquet", 0)):
        rows = parsed(folder, kind)
        for row in rows:
            row.pop("raw_text"), row.pop("source_file")
            if row["kind"] == REFUSED:
                row["row_number"] -= header
            if str(row["reason"]).startswith(("not_utf8", "nul_byte")):
                row["reason"] = row["reason"].split(":")[0]  # the place is of the line, or of the value
        found[kind] = sorted(json.dumps(row, sort_keys=True) for row in rows if row["kind"] < COUNTED)
        counts: collections.Counter = (
            collections.Counter()
        )  # one row for each batch, which a file of row groups has more of
        for row in rows:
            if row["kind"] >= COUNTED:
                counts[row["kind"], row["day"], row["reason"]] += row["row_number"]
        found[f"{kind} counts"] = counts
    assert found["csv"] == found["parquet"]
    assert found["csv counts"] == found["parquet counts"]
    assert sum(count for (kind, _, _), count in found["csv counts"].items() if kind == COUNTED) == table.num_rows


def test_the_schema_of_a_file_is_read_once(tmp_path, monkeypatch):
    """On an object store it costs a request or two; a folder has thousands of files."""
    write(tmp_path, "user", pa.array([1, 2]))
    rules, place, read = definition(tmp_path, "parquet"), RawLocation(str(tmp_path)), []
    monkeypatch.setattr(
        pq, "read_schema", lambda *given, real=pq.read_schema, **names: read.append(given) or real(*given, **names)
    )
    assert "score" in place.header(place.logs(rules)[0], rules.logs)
    assert len(read) == 1

"""User and item files, as CSV and as Parquet.

Every row gets its fields, or the file is refused with its line or column.
"""

from __future__ import annotations

import bz2
import datetime as dtm
import decimal
import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.datasets.definition import FeatureFile, dataset
from etl.ingest.features import read_features
from etl.ingest.raw import RawLocation
from etl.sequences.items import item_rows
from etl.stage.errors import StageError

SHOP = """
name: shop
title: A shop
first_day: 2024-03-01
logs:
  files: [log.csv]
  columns: {user: integer, item: KEY, at: integer}
events:
  user: user
  item: item
  time: {column: at, unit: seconds}
  signals: {any: {column: user, at_least: 0}}
items:
  - files: items.*
    key: id
    missing: ['', none]
    fields: {maker: {column: maker, kind: id}, tags: {column: tags, kind: categories},
      price: {column: price, kind: number}, shelf: shelf}
targets: {label: any}
"""


def rows_of(folder: Path, key: str = "integer", items: tuple[int, ...] = (1, 2, 3)) -> list[dict]:
    """Return the rows of items 1, 2 and 3 with their fields."""
    (folder / "shop.yaml").write_text(SHOP.replace("KEY", key))
    definition = dataset(str(folder / "shop.yaml"))
    counts = {
        "": pa.table({"item_id": list(items), "occurrences": [1] * len(items), "train_occurrences": [1] * len(items)})
    }
    found = item_rows(counts, [read_features(RawLocation(str(folder)), definition.items[0])], definition).to_pylist()
    return [{name: row[name] for name in ("maker", "tags", "price", "shelf")} for row in found]


EXPECTED = [
    {"maker": 7, "tags": ["a", "b"], "price": 1.5, "shelf": "4"},
    {"maker": None, "tags": [], "price": None, "shelf": None},
    {"maker": 9, "tags": ["c"], "price": 2.0, "shelf": "x"},
]
LINES = 'id,maker,tags,price,shelf\n1,7,"a,b",1.5,4\n1,8,z,9,z\n2,,,,none\n3,9,c,2,x\n'
PARQUET = {
    "id": [1, 1, 2, 3],
    "maker": [7, 8, None, 9],
    "tags": [["a", "b"], ["z"], None, ["", "c", "none", None]],
    "price": [1.5, 9.0, None, 2.0],
    "shelf": ["4", "z", "none", "x"],
}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("items.csv", LINES.encode()),
        ("items.csv", LINES.encode("utf-8-sig")),
        ("items.csv", LINES.replace("\n", "\r\n").encode()),
        ("items.csv", LINES.replace("\n", "\r").encode()),
        ("items.csv", LINES.replace("\n2,", "\n\n2,").encode()),
        ("items.csv", LINES.rstrip("\n").encode()),
        ("items.csv.gz", gzip.compress(LINES.encode("utf-8-sig"))),
        ("items.csv.bz2", bz2.compress(LINES.encode())),
    ],
)
def test_text_files_of_any_writer_give_the_same_fields(tmp_path, name, body):
    (tmp_path / name).write_bytes(body)
    assert rows_of(tmp_path) == EXPECTED


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"id": pa.array([1.0, 1.0, 2.0, 3.0])},
        {"id": pa.array(["1", "1", "2", "3"], pa.large_string())},
        {"id": pa.array([b"1", b"1", b"2", b"3"])},
        {"id": pa.array(["1", "1", "2", "3"]).dictionary_encode()},
        {"id": pa.array([1, 1, 2, 3], pa.uint64())},
        {"maker": pa.array([7.0, 8.0, float("nan"), 9.0])},
        {"maker": pa.array([decimal.Decimal("7.00"), decimal.Decimal(8), None, decimal.Decimal(9)])},
        {"maker": pa.array(["7", "8", "", "9"])},
        {"tags": pa.array(["a,b", "z", None, "c"])},
        {"tags": pa.array(PARQUET["tags"], pa.large_list(pa.large_string()))},
        {"price": pa.array(["1.5", "9", "", "2"])},
        {"shelf": pa.array([b"4", b"z", None, b"x"], pa.large_binary())},
    ],
)
def test_parquet_of_any_type_gives_the_fields_of_the_text(tmp_path, changed):
    pq.write_table(pa.table(PARQUET | changed), tmp_path / "items.parquet", row_group_size=2)
    assert rows_of(tmp_path) == EXPECTED


def test_lists_of_numbers_and_days_are_categories(tmp_path):
    pq.write_table(
        pa.table({"id": [1], "maker": [1], "price": [1], "tags": [[3, 4]], "shelf": [dtm.date(2024, 3, 1)]}),
        tmp_path / "items.parquet",
    )
    assert rows_of(tmp_path, items=(1,)) == [{"maker": 1, "tags": ["3", "4"], "price": 1.0, "shelf": "2024-03-01"}]


def test_a_file_that_is_parquet_by_its_format_has_any_name(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "title": ["x"]}), tmp_path / "items.pq")
    rule = {"files": "items.pq", "key": "id", "fields": {"title": "title"}}
    assert read_features(
        RawLocation(str(tmp_path)), FeatureFile.model_validate(rule | {"format": "parquet"})
    ).to_pylist() == [{"id": "a", "title": "x"}]
    with pytest.raises(StageError, match=r"items\.pq .*Parquet.*\n.*format: parquet"):
        read_features(RawLocation(str(tmp_path)), FeatureFile.model_validate(rule))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"maker": [[1], [2], [3], [4]]}, ["column maker", "list<"]),
        ({"shelf": [{"a": 1}] * 4}, ["column shelf", "struct<"]),
        ({"tags": [[[1]]] * 4}, ["column tags", "list<"]),
        ({"shelf": pa.array([b"\xff"] * 4)}, ["column shelf", "no text"]),
        ({"shelf": None}, ["lacks the column shelf", "it has id"]),
        ({"id": [1, None, 2, 3]}, ["column id", "1 row(s) without a value"]),
        ({"id": [1.5, 1.0, 2.0, 3.0]}, ["column id", "'1.5'"]),
        ({"maker": ["bob"] * 4}, ["column maker", "'bob'"]),
    ],
)
def test_a_wrong_parquet_file_is_named_with_its_column(tmp_path, changed, says):
    pq.write_table(
        pa.table({name: values for name, values in (PARQUET | changed).items() if values is not None}),
        tmp_path / "items.parquet",
    )
    with pytest.raises(StageError) as caught:
        rows_of(tmp_path)
    assert all(text in caught.value.what for text in says), caught.value.what


QUOTED = {"files": "items.tsv", "key": "id", "delimiter": "\t", "fields": {"title": "title"}}


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ('1\t"Open film\n2\tb\n3\tc\n', 2),
        ('1\ta\n2\tb\n3\t"c', 4),
        ('1\ta\n2\t"Open\n3\t"whole"\n', 3),
        ('1\ta\n2\t"12" disk\n', 3),
        ('1\t"two\nlines"\n2\t"Open\n3\tc\n', 4),
        ('"1\ta\n2\tb\n', 2),
    ],
)
def test_a_quote_that_does_not_end_refuses_the_file_with_its_line(tmp_path, body, line):
    (tmp_path / "items.tsv").write_text("id\ttitle\n" + body)
    with pytest.raises(StageError) as caught:
        read_features(RawLocation(str(tmp_path)), FeatureFile.model_validate(QUOTED))
    assert f"items.tsv in {tmp_path}, line {line}: a quote opens" in caught.value.what
    assert "quoting: false" in caught.value.remedy


@pytest.mark.parametrize(
    ("body", "titles"),
    [
        ('1\t"two\nlines"\n2\t"a ""quote"", \t"\r\n3\t""\n', ["two\nlines", 'a "quote", \t', ""]),
        ('1\t12" disk\n2\ta "b" c\n3\tc', ['12" disk', 'a "b" c', "c"]),
    ],
)
def test_quotes_that_end_are_read(tmp_path, body, titles):
    (tmp_path / "items.tsv").write_bytes(b"id\ttitle\n" + body.encode())
    assert read_features(RawLocation(str(tmp_path)), FeatureFile.model_validate(QUOTED))["title"].to_pylist() == titles


def test_without_quoting_a_quote_is_part_of_the_value(tmp_path):
    (tmp_path / "items.tsv").write_text('"id"\ttitle\n1\t"Open film\n2\t"b"\n'.replace('"id"', "id"))
    rule = FeatureFile.model_validate(QUOTED | {"quoting": False})
    assert read_features(RawLocation(str(tmp_path)), rule)["title"].to_pylist() == ['"Open film', '"b"']


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path):
    (tmp_path / "items.tsv").write_bytes(b"id\ttitle\n1\ta\n2\tcaf\xe9\n")
    with pytest.raises(StageError, match=r"items\.tsv in .*, line 3 is no UTF-8"):
        read_features(RawLocation(str(tmp_path)), FeatureFile.model_validate(QUOTED))


FIELD = Path(__file__).resolve().parents[4] / "shared" / "field" / "item_file_open_quote"


@pytest.mark.skipif(not FIELD.exists(), reason=f"the input is not at {FIELD}")
def test_the_open_quote_of_the_field_is_refused_and_read_without_quoting(tmp_path):
    (tmp_path / "shop.yaml").write_text((FIELD / "definition.yaml").read_text())
    rule, place = dataset(str(tmp_path / "shop.yaml")).items[0], RawLocation(str(FIELD / "input"))
    with pytest.raises(
        StageError, match=r"items\.tsv in .*, line 2: a quote opens a value and does not end it.*\n.*quoting: false"
    ):
        read_features(place, rule)
    table = read_features(place, rule.model_copy(update={"quoting": False}))
    assert all(table["title"].to_pylist())
    assert table["title"][0].as_py() == '"Open film'

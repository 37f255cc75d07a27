"""A hundred thousand broken rows.

Each is read rightly, as a slow and plain reader of one line reads it, or refused with a reason.
"""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

import pytest

from etl.datasets.definition import DatasetDefinition, dataset
from etl.ingest.raw import RawLocation
from etl.warehouse.partitions import MS_PER_DAY, day_number

ROOT = Path(__file__).resolve().parents[3]
ROWS = 34_000  # of each of the three layouts
GOOD = {
    "kuairand": b"111,3199380,20220408,0,1649349856990,1,1,0,1,0,0,1,43454,14233,-1,27683,0,0,-1",
    "tmall": b"328862,323294,833,2882,2661.0,0829,0",
    "taobao": b'1,2268318,"a ""b"", c",pv,1511544070',
}
FILES = {"kuairand": "log_standard_4_08_to_4_21_x.csv", "tmall": "user_log_format1.csv", "taobao": "UserBehavior.csv"}
NUMBERS = [
    b"NULL",
    b"7.0",
    b"1234567890123456789",
    b"9" * 19,
    b"0",
    b"-1",
    b"7",
    b"1" * 17,
    b"9" * 30,
    b"1e5",
    b"1e999",
    b"nan",
    b"0x1A",
    b"1_000",
    b"+1",
    b" 1",
    b"1.5",
    b"-",
    b"",
]
BYTES = [b"\x00", b"\xff\xfe", b'"', b'""', b",", b"\r", b"\n", b"\xc3\xa9", b"\xef\xbb\xbf", b"'", b"\\", b"\t", b" "]


def mutated(line: bytes, rng: random.Random) -> bytes:
    cells = line.split(b",")
    kind = rng.randrange(8)
    if kind == 0:
        a, b = rng.randrange(len(cells)), rng.randrange(len(cells))
        cells[a], cells[b] = cells[b], cells[a]
    elif kind == 1:
        cells[rng.randrange(len(cells))] = rng.choice(NUMBERS)
    elif kind == 2:
        cells.insert(rng.randrange(len(cells)), rng.choice(NUMBERS))
    elif kind == 3:
        del cells[rng.randrange(len(cells))]
    text = bytearray(b",".join(cells))
    if kind >= 4:
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.choice([0, 1, 4])] = (
                rng.choice(BYTES) if kind == 4 else bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, 2])))
            )
    return line if kind == 7 and rng.random() < 0.5 else bytes(text)


def cells_of(line: str, quoting: bool) -> list[str] | None:
    """Return the cells of a line, None when its quotes are broken: character by character."""
    if not quoting:
        return line.split(",")
    cells, cell, at = [], "", 0
    while True:
        if line[at : at + 1] == '"':
            at += 1
            while True:
                end = line.find('"', at)
                if end < 0:
                    return None
                cell += line[at:end]
                at = end + 1
                if line[at : at + 1] != '"':
                    break
                cell += '"'
                at += 1
        else:
            end = line.find(",", at)
            end = len(line) if end < 0 else end
            cell = line[at:end]
            if '"' in cell:
                return None
            at = end
        cells.append(cell)
        cell = ""
        if at == len(line):
            return cells
        if line[at] != ",":
            return None
        at += 1


def plainly(line: bytes, definition: DatasetDefinition) -> dict | None:
    """Read one line with plain Python; None when it has to be refused."""
    if b"\x00" in line or b"\r" in line:
        return None
    try:
        cells = cells_of(line.decode("utf-8"), definition.logs.quoting)
    except UnicodeDecodeError:
        return None
    if cells is None or len(cells) != len(definition.logs.columns):
        return None
    row: dict = {}
    for (name, column), cell in zip(definition.logs.columns.items(), cells, strict=True):
        if cell == "" or cell in definition.logs.missing:
            if not column.optional:
                return None
            row[name] = None
        elif column.type == "integer":
            if not re.fullmatch(r"-?[0-9]+(\.0*)?", cell) or not -(2**63) <= int(cell.partition(".")[0]) < 2**63:
                return None
            row[name] = int(cell.partition(".")[0])
        elif column.type == "decimal":
            if not re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{0,30})?([eE][-+]?[0-9]{1,2})?", cell):
                return None
            row[name] = float(cell)
        else:
            row[name] = cell
        value = row[name]
        if value is not None and (
            (column.min is not None and value < column.min)
            or (column.max is not None and value > column.max)
            or (column.one_of is not None and value not in column.one_of)
        ):
            return None
    time = definition.events.time
    if time.unit is not None:
        row["time_ms"] = row[time.column] * {"seconds": 1000, "milliseconds": 1}[time.unit]
    else:
        text = row[time.column].zfill(4)
        if not re.fullmatch(r"[0-9]{4}", text):
            return None
        try:
            row["time_ms"] = day_number(f"2014-{text[:2]}-{text[2:]}") * MS_PER_DAY
        except ValueError:
            return None
    first, last = (day_number(day.isoformat()) * MS_PER_DAY for day in (time.earliest, time.latest))
    return row if first <= row["time_ms"] < last else None


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("how", ["plain", "gzip", "cut"])
def test_every_mutated_row_is_read_rightly_or_refused_with_a_reason(tmp_path, name, how):
    definition = dataset(name if name != "taobao" else str(ROOT / "docs" / "definitions" / "taobao.yaml"))
    rng = random.Random(f"{name} 1")
    body = b"\n".join(mutated(GOOD[name], rng) for _ in range(ROWS)) + b"\n"
    header = (",".join(definition.logs.columns) + "\n").encode() if definition.logs.header else GOOD[name] + b"\n"
    whole = header + body
    file = FILES[name] + ("" if how == "plain" else ".gz")
    if name == "taobao" and how != "plain":
        definition = definition.model_copy(update={"logs": definition.logs.model_copy(update={"files": ("*.csv.gz",)})})
    stored = whole if how == "plain" else gzip.compress(whole, mtime=0)
    (tmp_path / file).write_bytes(stored[: len(stored) // 2] if how == "cut" else stored)
    place = RawLocation(str(tmp_path))
    chunks = [
        chunk
        for split in place.splits(place.logs(definition), definition.logs, lambda parts: [])
        for chunk in place.read(split, definition)
    ]
    rows = [
        row | {"time_ms": int(time)}
        for chunk in chunks
        for row, time in zip(chunk.rows.to_pylist(), chunk.time_ms, strict=True)
    ]
    refused = {r.row_number: r for chunk in chunks for r in chunk.refused}
    lines = whole.replace(b"\r\n", b"\n").split(b"\n")[:-1]
    first = 2 if definition.logs.header else 1
    expected = {
        number: plainly(line, definition)
        for number, line in enumerate(lines[first - 1 :], first)
        if line.strip(b" \t\r")
    }
    if how == "cut":
        [last] = [number for number, r in refused.items() if r.reason.startswith("truncated_gzip")]
        assert last == max(refused)
        del refused[last]
        expected = {number: row for number, row in expected.items() if number < last}
    good = [row for row in expected.values() if row is not None]
    assert len(rows) + len(refused) == len(expected)
    assert refused.keys() == {number for number, row in expected.items() if row is None}
    assert rows == good
    assert len(good) > 1_000
    assert len(refused) > 3_000
    for number, r in refused.items():
        assert re.match(r"[a-z0-9_]+: \S", r.reason), r
        assert r.raw_text == lines[number - 1]

"""The layouts of logs that people have.

Each is read as the plain file would be, or refused by one line that names the way out.
"""

from __future__ import annotations

import bz2
import datetime as dtm
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import etl.ingest.raw
from etl.datasets.definition import DatasetDefinition
from etl.ingest.compression import BREAKS
from etl.ingest.raw import Chunk, RawLocation
from etl.stage.errors import StageError

AT = 1_709_280_000  # 2024-03-01 08:00 UTC
HEADER = b"user,item,act,at\n"
COLUMNS: dict[str, Any] = {"user": "text", "item": "integer", "act": "text", "at": "integer"}
ROWS = 2_000
BODY = HEADER + b"".join(
    b"u%d,%d,%s,%d\n" % (n * 7919 % 1_000, n, (b"view", b"buy")[n % 2], AT + n) for n in range(ROWS)
)


def definition(
    time: dict[str, Any] | None = None, columns: dict[str, Any] | None = None, **logs: Any
) -> DatasetDefinition:
    return DatasetDefinition.model_validate(
        {
            "name": "shop",
            "title": "Shop",
            "first_day": "2024-03-01",
            "logs": {"files": ["log*"], "columns": columns or COLUMNS, **logs},
            "events": {
                "user": "user",
                "item": "item",
                "time": time or {"column": "at", "unit": "seconds"},
                "signals": {"buy": {"column": "act", "equals": "buy"}},
            },
            "targets": {"label": "buy"},
        }
    )


def read(
    folder: Path, files: dict[str, bytes], shape: DatasetDefinition
) -> tuple[list[dict], list[int], list[tuple[int, str]]]:
    """Write files and read them as the job does.

    Return rows, times in ms and (row number, reason) of the refused, in file order.
    """
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    place = RawLocation(str(folder))
    splits = place.splits(place.logs(shape), shape.logs, lambda ranges: [place.count_newlines(*r) for r in ranges])
    chunks: list[Chunk] = [chunk for split in splits for chunk in place.read(split, shape)]
    refused = [(r.row_number, r.reason) for c in chunks for r in c.refused]
    return [row for c in chunks for row in c.rows.to_pylist()], [int(t) for c in chunks for t in c.time_ms], refused


def refusal(folder: Path, files: dict[str, bytes], shape: DatasetDefinition) -> str:
    with pytest.raises(StageError) as caught:
        read(folder, files, shape)
    assert len(str(caught.value).splitlines()) == 2  # what, and the remedy
    return str(caught.value)


# ---- packed files
# ------------------------------------------------------------------------------------------------------


def arrow_packed(codec: str, body: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(body)
    return sink.getvalue().to_pybytes()


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return stream.getvalue()


PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda body: arrow_packed("zstd", body),
    "lz4": lambda body: arrow_packed("lz4", body),
    "zip": lambda body: zipped({"folder/log.csv": body, "__MACOSX/folder/._log.csv": b"x"}),
}
IN_A_ROW = [kind for kind in PACK if kind != "zip"]  # an archive may follow an archive in one file


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("name", ["log.csv.{}", "LOG", "as_it_is"])
def test_a_packed_file_reads_as_the_plain_one(tmp_path, kind, name):
    plain = read(tmp_path / "plain", {"log.csv": BODY}, definition())
    file = {"log.csv.{}": f"log.csv.{kind}", "LOG": f"log.csv.{kind.upper()}", "as_it_is": "log.csv"}[name]
    assert read(tmp_path / "packed", {file: PACK[kind](BODY)}, definition()) == plain
    assert len(plain[0]) == ROWS


@pytest.mark.parametrize("kind", IN_A_ROW)
def test_several_archives_in_one_file_are_read_to_the_end(tmp_path, kind):
    middle = BODY.index(b"\n", len(BODY) // 2) - 3
    rows, _, refused = read(
        tmp_path, {f"log.csv.{kind}": PACK[kind](BODY[:middle]) + PACK[kind](BODY[middle:])}, definition()
    )
    assert (len(rows), refused) == (ROWS, [])


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_archive_gives_its_rows_and_says_where_it_breaks(tmp_path, kind, damage, monkeypatch):
    random = np.random.default_rng(5).integers(0, 10**9, 60_000)
    body = HEADER + b"".join(b"u%d,%d,view,%d\n" % (n, n, AT) for n in random)
    packed = PACK[kind](body)
    at = len(packed) * 3 // 4
    broken = packed[:at] if damage == "cut" else packed[:at] + b"\xff" * 300 + packed[at + 300 :]
    if damage == "cut" and kind == "zip":  # its list of files is at its end
        assert (
            "log.csv.zip in" in (said := refusal(tmp_path, {"log.csv.zip": broken}, definition()))
            and "cannot be read" in said
        )
        return
    rows, _, refused = read(tmp_path, {f"log.csv.{kind}": broken}, definition())
    ends = [(row, reason) for row, reason in refused if reason.split(":")[0] in BREAKS]
    if damage == "overwritten" and kind == "zst" and not ends:
        pytest.skip("this archive has no checksum: its wrong lines are judged one by one")
    [(row, reason)] = ends
    assert reason.startswith(("truncated_", "broken_")[damage == "overwritten"])
    # Behind the damage a few lines may be unpacked wrongly; blank ones among them are no rows.
    assert row == max(number for number, _ in refused) >= len(rows) + len(refused) + 1
    assert 0 < len(rows) < 60_000


@pytest.mark.parametrize(
    ("body", "name", "says"),
    [
        (BODY, "log.csv.gz", ["log.csv.gz", "its name promises gzip", "deliver the file again"]),
        (BODY, "log.csv.ZST", ["its name promises zstd"]),
        (
            zipped({"a.csv": BODY, "b.csv": BODY}),
            "log.zip",
            ["holds 2 files (a.csv, b.csv)", "only archives of one file are read"],
        ),
        (b"7z\xbc\xaf\x27\x1c....", "log.7z", ["a 7-Zip archive", "unpack it"]),
        (b"PAR1....PAR1", "log.csv", ["a Parquet file", "logs.format: parquet"]),
        (BODY.decode().encode("utf-16"), "log.csv", ["UTF-16", "iconv -f UTF-16"]),
        (
            b"log.csv".ljust(257, b"\0") + b"ustar\0" + b"\0" * 300 + BODY,
            "log.tar",
            ["a tar archive", "unpack it into the raw folder"],
        ),
        (
            gzip.compress(b"log.csv".ljust(257, b"\0") + b"ustar\0" + b"\0" * 300 + BODY),
            "log.tar.gz",
            ["a tar archive"],
        ),
        (b'{"user": 1, "at": 2}\n', "log.csv", ["holds objects of JSON", "logs.format: jsonl"]),
        (
            BODY.split(b"\n", 1)[1],
            "log.csv",
            ["the first line of log.csv", "holds values, not the names of columns: u0, 0, view", "header: false"],
        ),
        (b"\n\n", "log.csv", ["is empty"]),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_way_out(tmp_path, body, name, says):
    said = refusal(tmp_path, {name: body}, definition())
    assert all(text in said for text in [name, *says]), said


def test_a_first_line_of_names_in_a_file_without_header_is_no_row(tmp_path):
    assert "set header: true" in refusal(tmp_path, {"log.csv": BODY}, definition(header=False))


# ---- the same file twice
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["log.csv.gz", "log.csv.zst", "log-copy.csv", "LOG"])
@pytest.mark.parametrize("repeats", ["keep", "drop"])
def test_the_same_file_twice_is_said_and_stops(tmp_path, other, repeats):
    body = PACK[other.rpartition(".")[2]](BODY) if other.endswith(("gz", "zst")) else BODY
    said = refusal(tmp_path, {"log.csv": BODY, other: body}, definition(repeats=repeats, files=["log*", "LOG"]))
    assert all(text in said for text in ("log.csv", other, "hold the same rows", "remove one of them"))


def test_files_that_only_begin_alike_and_files_without_rows_are_no_copies(tmp_path):
    big = HEADER + b"u1,1,view,1709280000\n" * 10_000
    files = {
        "log-1.csv": big,
        "log-2.csv.gz": gzip.compress(big + b"u2,1,view,1709280000\n"),
        "log-3.csv": HEADER,
        "log-4.csv": HEADER,
        "log-5.csv": HEADER + b"\n",
    }
    assert len(read(tmp_path, files, definition())[0]) == 20_001


# ---- folders
# -------------------------------------------------------------------------------------------------------------


def test_folders_of_days_are_read_and_a_file_is_known_by_its_folder(tmp_path):
    days = {"pattern": r"dt=(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)/"}
    shape = definition(files=["dt=*/part-*.csv"], days_in_name=days)
    files = {
        f"dt=2024-03-0{day}/part-0.csv": HEADER + b"u%d,1,view,%d\n" % (day, AT + 86_400 * (day - 1))
        for day in (1, 2, 3)
    }
    files |= {
        "dt=2024-03-01/_SUCCESS": b"",
        "dt=2024-03-01/.part-0.csv.crc": b"crc",
        "dt=2024-03-01/._part-0.csv": b"\0\5",
        "dt=2024-03-01/deeper/part-9.csv": BODY,
        "part-7.csv": BODY,
        "dt=2024-03-01/_temporary/part-8.csv": BODY,
    }
    assert [row["user"] for row in read(tmp_path, files, shape)[0]] == ["u1", "u2", "u3"]
    found = RawLocation(str(tmp_path)).logs(shape)
    assert [file.name for file in found] == [f"dt=2024-03-0{day}/part-0.csv" for day in (1, 2, 3)]
    assert [file.name for file in found if file.may_hold("2024-03-02")] == ["dt=2024-03-02/part-0.csv"]
    assert not RawLocation(str(tmp_path)).hidden(shape.logs.files)  # beside them, but of no glob


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*.csv", ["a.csv"]),
        ("**/*.csv", ["2024/03/c.csv", "2024/b.csv", "a.csv"]),
        ("2024/*.csv", ["2024/b.csv"]),
        ("2024/**/*.csv", ["2024/03/c.csv", "2024/b.csv"]),
        ("*/*/*.csv", ["2024/03/c.csv"]),
        ("2024/0[1-3]/?.csv", ["2024/03/c.csv"]),
    ],
)
def test_globs_stop_at_slashes(tmp_path, glob, found):
    for name in ("a.csv", "2024/b.csv", "2024/03/c.csv", ".hidden/d.csv", "2024/._b.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(HEADER)
    assert [file.name for file in RawLocation(f"{tmp_path}/").matching([glob])] == found


def test_files_in_folders_that_no_glob_names_are_pointed_at(tmp_path):
    said = refusal(tmp_path, {"dt=2024-03-01/part-0001.csv": BODY}, definition(files=["part-*.csv"]))
    assert "dt=2024-03-01/part-0001.csv" in said and "'dt=*/part-*.csv'" in said


def test_a_column_of_the_folders_name_alone_is_pointed_at(tmp_path):
    shape = definition(files=["dt=*/*.csv"], columns={**COLUMNS, "dt": "text"})
    assert "it is part of its folder's name alone" in refusal(tmp_path, {"dt=2024-03-01/a.csv": BODY}, shape)


def test_hidden_files_are_said(tmp_path):
    read(tmp_path, {"log.csv": BODY, "._log.csv": b"\0\5\x16\x07"}, definition(files=["*.csv"]))
    place = RawLocation(str(tmp_path))
    [note] = place.notes(place.logs(definition(files=["*.csv"])), definition(files=["*.csv"]))
    assert "1 hidden file(s)" in note and "._log.csv" in note


# ---- lines
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_a_byte_order_mark_change_nothing(tmp_path, end, packed, header, bom):
    body = bom + (BODY if header else BODY[len(HEADER) :]).replace(b"\n", end)
    rows, times, refused = read(
        tmp_path, {"log.csv": gzip.compress(body) if packed else body}, definition(header=header)
    )
    assert (len(rows), refused, rows[0]["user"], times[-1]) == (ROWS, [], "u0", (AT + ROWS - 1) * 1_000)


@given(
    lines=st.lists(st.sampled_from(["row", "bad", "", " ", "\t", "\r"]), max_size=40),
    split_bytes=st.integers(60, 400),
    last=st.booleans(),
)
def test_blank_lines_are_no_rows_and_the_others_keep_their_numbers(tmp_path_factory, lines, split_bytes, last):
    texts = [{"row": f"u{n},{n},view,{AT}", "bad": f"u{n},x,view,{AT}"}.get(kind, kind) for n, kind in enumerate(lines)]
    before, etl.ingest.raw.SPLIT_BYTES = etl.ingest.raw.SPLIT_BYTES, split_bytes
    try:
        body = HEADER + "\n".join(texts).encode() + b"\n" * last
        rows, _, refused = read(tmp_path_factory.mktemp("raw"), {"log.csv": body}, definition())
    finally:
        etl.ingest.raw.SPLIT_BYTES = before
    assert [row["item"] for row in rows] == [n for n, kind in enumerate(lines) if kind == "row"]
    assert [number for number, _ in refused] == [n + 2 for n, kind in enumerate(lines) if kind == "bad"]


@pytest.mark.parametrize("delimiter", ["::", "||", "\t|\t", "<->", ";"])
def test_delimiters_of_several_characters(tmp_path, delimiter):
    cells = [
        ["u1", "1", "buy", str(AT)],
        ["u:|2", "2", "view", str(AT)],
        ["u3", "x", "view", str(AT)],
        ["u4", "4", "view"],
    ]
    body = "\n".join(delimiter.join(row) for row in [list(COLUMNS), *cells]).encode()
    rows, _, refused = read(tmp_path, {"log.csv": body}, definition(delimiter=delimiter))
    assert [row["user"] for row in rows] == ["u1", "u:|2"]
    assert refused == [(4, "not_an_integer: item='x'"), (5, "wrong_column_count: 3 instead of 4")]


def test_quoted_values_hold_a_delimiter_of_several_characters_and_its_stand_in(tmp_path):
    body = f'user::item::act::at\n"a::b"::1::"say ""hi"""::{AT}\n"\x1f::"::2::view::{AT}\n'.encode()
    rows, _, refused = read(tmp_path, {"log.csv": body}, definition(delimiter="::"))
    assert ([(row["user"], row["act"]) for row in rows], refused) == ([("a::b", 'say "hi"'), ("\x1f::", "view")], [])


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gbk", "用户"),
        ("big5", "用戶"),
        ("shift_jis", "ユーザー表"),
        ("latin-1", "Jürgen"),
        ("cp1252", "naïve €"),
        ("euc-kr", "사용자"),
        ("utf-8-sig", "ü"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_encodings(tmp_path, encoding, text, packed):
    body = f"user,item,act,at\n{text},1,view,{AT}\n".encode(encoding)
    rows, _, refused = read(
        tmp_path, {"log.csv": gzip.compress(body) if packed else body}, definition(encoding=encoding)
    )
    assert ([row["user"] for row in rows], refused) == ([text], [])


def test_a_line_of_another_encoding_is_refused_alone(tmp_path):
    lines = [
        b"user,item,act,at\n",
        f"用户,1,view,{AT}\n".encode("gbk"),
        b"\xff\xff,2,view,1709280000\n",
        f"u3,3,view,{AT}\n".encode(),
    ]
    rows, _, refused = read(tmp_path, {"log.csv": b"".join(lines)}, definition(encoding="gbk"))
    assert [row["user"] for row in rows] == ["用户", "u3"]
    assert refused == [(3, "not_of_the_encoding: byte 0 of the line is no gbk")]
    assert "logs.encoding names another encoding" in read(tmp_path, {}, definition())[2][0][1]


@pytest.mark.parametrize("wrong", ["utf-16", "utf-7", "rot13", "klingon", "iso2022_jp"])
def test_an_encoding_that_cannot_be_cut_into_lines_is_refused_with_the_definition(wrong):
    with pytest.raises(ValueError, match="encoding"):
        definition(encoding=wrong)


# ---- values
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("1234567890123456789", 1234567890123456789),
        ("7123456789012345678", 7123456789012345678),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("000000000000000000000007", 7),
        ("266079.0", 266079),
        ("266079.", 266079),
        ("-3.000", -3),
        ("9223372036854775808", None),
        ("-9223372036854775809", None),
        ("18446744073709551615", None),
        ("9" * 400, None),
        ("266079.5", None),
        ("1e5", None),
        ("+1", None),
    ],
)
@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_integers_are_all_of_64_bits_or_refused_with_the_reason(tmp_path, cell, value, format):
    line = (
        json.dumps({"user": "u", "item": cell, "act": "view", "at": AT})
        if format == "jsonl"
        else f"user,item,act,at\nu,{cell},view,{AT}"
    )
    rows, _, refused = read(tmp_path, {"log": line.encode()}, definition(format=format))
    if value is not None:
        assert ([row["item"] for row in rows], refused) == ([value], [])
    else:
        [(_, reason)] = refused
        assert reason.startswith("too_large: item=" if cell.lstrip("-").isdigit() else "not_an_integer: item=")


WORDS = ["", "NULL", "null", "\\N", "NaN", "nan", "NA", "N/A", "<NA>", "None"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_a_word_for_a_missing_value_is_none_in_any_column(tmp_path, word, format):
    columns = {
        **COLUMNS,
        "category": {"type": "text", "optional": True},
        "price": {"type": "decimal", "optional": True},
        "seller": {"type": "integer", "optional": True},
    }
    good = {"user": "u", "item": "1", "act": "view", "at": str(AT), "category": "c", "price": "1.5", "seller": "3"}
    lines = [good, *[good | {name: word} for name in columns]]
    text = "\n".join(json.dumps(line) if format == "jsonl" else ",".join(line.values()) for line in lines)
    body = text if format == "jsonl" else ",".join(columns) + "\n" + text
    rows, _, refused = read(tmp_path, {"log": body.encode()}, definition(columns=columns, format=format))
    assert [(row["category"], row["price"], row["seller"]) for row in rows] == [
        ("c", 1.5, 3),
        (None, 1.5, 3),
        ("c", None, 3),
        ("c", 1.5, None),
    ]
    first = 2 if format == "csv" else 1
    assert refused == [
        (first + n, f"missing_value: {name}" + (f"={word!r}" if word else "")) for n, name in enumerate(COLUMNS, 1)
    ]


def test_other_words_are_named_by_the_definition(tmp_path):
    body = HEADER + b"NA,1,view,1709280000\n-1,1,view,1709280000\n"
    rows, _, refused = read(tmp_path, {"log.csv": body}, definition(missing=["-1"]))
    assert ([row["user"] for row in rows], refused) == (["NA"], [(3, "missing_value: user='-1'")])


def test_a_word_for_a_missing_value_cannot_be_a_signals_value():
    with pytest.raises(ValueError, match=r"events\.signals\.buy\.equals: 'buy' is among logs\.missing"):
        definition(missing=["buy"])


def test_json_lines(tmp_path):
    good = {"user": "u\n1", "item": 5, "act": "buy", "at": AT, "more": {"a": [1]}}
    lines = [
        good,
        good | {"item": 7.0, "user": 12},
        good | {"item": "8"},
        good | {"item": [1, 2]},
        good | {"item": 2**63},
        good | {"user": None},
        good | {"item": 1.5},
    ]
    texts = [
        *map(json.dumps, lines),
        "[1]",
        "{",
        "",
        '{"user": "\\ud800", "item": 1, "act": "buy", "at": 1}',
        '{"item": 1, "act": "buy", "at": 1709280000, "user": NaN}',
    ]
    rows, times, refused = read(tmp_path, {"log.jsonl": "\n".join(texts).encode()}, definition(format="jsonl"))
    assert [(row["user"], row["item"], row["act"]) for row in rows] == [
        ("u\n1", 5, "buy"),
        ("12", 7, "buy"),
        ("u\n1", 8, "buy"),
    ]
    assert times == [AT * 1_000] * 3
    assert [(number, reason.partition(":")[0]) for number, reason in refused] == [
        (4, "list_in_a_cell"),
        (5, "too_large"),
        (6, "missing_value"),
        (7, "not_an_integer"),
        (8, "not_an_object"),
        (9, "not_json"),
        (11, "not_utf8"),
        (12, "missing_value"),
    ]


JSON_VALUES = st.one_of(
    st.sampled_from(
        [
            '"a"',
            '"b c"',
            '"\u00e9"',
            '"\\u0041"',
            '"\\n"',
            '"a\tb"',
            '""',
            '"NULL"',
            '"5"',
            '"5.0"',
            '"1e3"',
            "5",
            "-5",
            "0",
            "-0",
            "007",
            "5.0",
            "-0.0",
            "0.00001",
            "1e5",
            "1E-3",
            "1234567890123456789",
            "12345678901234567890",
            "123456789.123456789",
            "1.10",
            "0.1000",
            "true",
            "null",
            "NaN",
            "[1]",
            "{}",
            "",
            '"\xff"',
            "+1",
            ".5",
            "5.",
        ]
    ),
    st.integers(-(10**6), 10**6).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.decimals(-1000, 1000, places=3).map(str),
    st.text(max_size=5).map(json.dumps),
)


@st.composite
def json_log(draw) -> bytes:
    """Lines of one writer, of which some have other values, other keys, another order or other blanks."""
    keys = draw(st.permutations(["user", "item", "act", "at", "price", "other"]))
    plain = {"user": '"u"', "item": "7", "act": '"buy"', "at": str(AT), "price": "1.5", "other": "false"}
    lines = []
    for _ in range(draw(st.integers(1, 6))):
        cells = {
            key: plain[key]
            for key in (keys if draw(st.booleans()) else draw(st.permutations(keys))[: draw(st.integers(3, 6))])
        }
        for key in draw(st.lists(st.sampled_from(keys), max_size=2)):
            cells[key] = draw(JSON_VALUES)
        comma, colon = draw(st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")]))
        more = draw(st.sampled_from(["", "", "", " ", f'{comma}"user"{colon}"twice"', "}"]))
        lines.append(
            draw(st.sampled_from(["", "", "", " "]))
            + "{"
            + comma.join(f'"{key}"{colon}{value}' for key, value in cells.items())
            + more
            + "}"
            + draw(st.sampled_from(["", "", "\r", " "]))
        )
    return "\n".join(lines).encode("utf-8", "surrogatepass").replace(b"\xc3\xbf", b"\xff")


@settings(max_examples=400)
@given(json_log(), st.sampled_from([(), ("-5",), ("5.0", "NULL")]))
def test_json_lines_read_at_once_are_those_read_one_by_one(body, missing):
    logs = definition(
        format="jsonl",
        columns={**COLUMNS, "price": {"type": "decimal", "optional": True}, "act": {"type": "text", "optional": True}},
        missing=missing,
    ).logs
    rows, numbers, lines, refused = etl.ingest.raw.parse_lines(body, 1, (), logs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(etl.ingest.raw, "plain_object_pattern", lambda line, logs: None)
        one_by_one = etl.ingest.raw.parse_lines(body, 1, (), logs)
    assert [row | {"price": repr(row["price"])} for row in rows.to_pylist()] == [
        row | {"price": repr(row["price"])} for row in one_by_one[0].to_pylist()
    ]
    assert rows.schema == one_by_one[0].schema
    assert (numbers.tolist(), lines.to_pylist(), refused) == (
        one_by_one[1].tolist(),
        one_by_one[2].to_pylist(),
        one_by_one[3],
    )


def test_plain_json_lines_are_not_read_one_by_one(tmp_path, monkeypatch):
    """One by one they took 24 times the processor time of CSV."""
    read_alone = []
    monkeypatch.setattr(
        etl.ingest.raw,
        "_line_cells",
        lambda line, *more, real=etl.ingest.raw._line_cells: read_alone.append(line) or real(line, *more),
    )
    lines = [
        json.dumps(
            {"at": AT + n, "user": "\u00e9", "item": n, "more": None, "act": "buy", "score": n / 8}, ensure_ascii=False
        )
        for n in range(1_000)
    ]
    rows, _, refused = read(
        tmp_path,
        {"log.jsonl": "\n".join([*lines, lines[0].replace('"buy"', '"\\n"')]).encode()},
        definition(format="jsonl"),
    )
    assert (len(rows), refused) == (1_001, [])
    assert len(read_alone) == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'[{"user": 1}]', ["an array of JSON", "jq -c"]),
        (b"user,item\n1,2\n", ["no object of JSON in its first lines"]),
        (
            b'{"user": 1, "item": 2, "action": "buy", "at": 3}\n',
            ["lacks the column act; it has user, item, action, at"],
        ),
    ],
)
def test_what_is_no_file_of_json_lines_is_named(tmp_path, body, says):
    said = refusal(tmp_path, {"log.jsonl": body}, definition(format="jsonl"))
    assert all(text in said for text in says)


@pytest.mark.parametrize(
    ("item", "looks"),
    [("N1-1 N2-0", True), ("[3, 4]", True), ("3|4|5", True), ("The Matrix", False), ("B00X-12", False), ("tt1", False)],
)
def test_ids_that_look_like_lists_are_said(tmp_path, item, looks):
    shape = definition(columns={**COLUMNS, "item": "text"})
    read(tmp_path, {"log.csv": HEADER + f'u1,"{item}",view,{AT}\n'.encode()}, shape)
    place = RawLocation(str(tmp_path))
    notes = place.notes(place.logs(shape), shape)
    assert [("look like lists" in note, repr(item) in note) for note in notes] == [(True, True)] * looks


# ---- times
# ---------------------------------------------------------------------------------------------------------------


def instants(
    folder: Path, cells: list[str], time: dict[str, Any], names: tuple[str, ...] = ("at",), kind: str = "text"
) -> tuple[list[str], list[str]]:
    columns = {"user": "text", "item": "integer", "act": "text", **dict.fromkeys(names, kind)}
    body = ";".join(columns) + "\n" + "\n".join(f"u;1;view;{cell}" for cell in cells)
    _, times, refused = read(folder, {"log.csv": body.encode()}, definition(time=time, columns=columns, delimiter=";"))
    return [str(np.datetime64(t, "ms")).replace("T", " ").removesuffix(".000") for t in times], [
        reason for _, reason in refused
    ]


def test_offsets_of_each_text_count(tmp_path):
    cells = [
        "2024-03-01T08:00:00+08:00",
        "2024-03-01T09:00:00+0530",
        "2024-03-01T09:00:00Z",
        "2024-03-01T09:00:00-08:00",
        "2024-03-01T00:00:00+14:00",
        "2024-03-01T09:00:00",
        "soon",
    ]
    found, refused = instants(tmp_path, cells, {"column": "at", "format": "%Y-%m-%dT%H:%M:%S%z"})
    assert found == [
        "2024-03-01 00:00:00",
        "2024-03-01 03:30:00",
        "2024-03-01 09:00:00",
        "2024-03-01 17:00:00",
        "2024-02-29 10:00:00",
    ]
    assert [reason.partition(":")[0] for reason in refused] == ["not_a_time"] * 2


def test_offsets_with_fractions_and_month_names(tmp_path):
    assert instants(
        tmp_path,
        ["2024-03-01 09:00:00.25 +0530", "2024-03-01 09:00:00.123456 Z"],
        {"column": "at", "format": "%Y-%m-%d %H:%M:%S.%f %z"},
    )[0] == ["2024-03-01 03:30:00.250", "2024-03-01 09:00:00.123"]
    (tmp_path / "log.csv").unlink()
    assert instants(tmp_path, ["01/Mar/2024:08:00:00 +0800"], {"column": "at", "format": "%d/%b/%Y:%H:%M:%S %z"})[
        0
    ] == ["2024-03-01 00:00:00"]


def test_one_offset_and_a_zone_contradict():
    with pytest.raises(ValueError, match="leave out zone"):
        definition(
            time={"column": "at", "format": "%Y-%m-%d %H:%M:%S%z", "zone": "Asia/Shanghai"},
            columns={**COLUMNS, "at": "text"},
        )


@pytest.mark.parametrize(
    ("cells", "names", "kind", "time", "expected"),
    [
        (["1999-06-24;10:06:37"], ("date", "time"), "text", {"format": "%Y-%m-%d %H:%M:%S"}, "1999-06-24 10:06:37"),
        (["08;29"], ("month", "day"), "text", {"format": "%m %d", "year": 2014}, "2014-08-29 00:00:00"),
        (["8;29"], ("month", "day"), "integer", {"format": "%m %d", "year": 2014}, "2014-08-29 00:00:00"),
        (["2;29"], ("month", "day"), "integer", {"format": "%m %d", "year": 2016}, "2016-02-29 00:00:00"),
        (["2024;3;1;8"], ("y", "m", "d", "h"), "integer", {"format": "%Y %m %d %H"}, "2024-03-01 08:00:00"),
        (["2024-03-01;08:00;+0800"], ("d", "t", "z"), "text", {"format": "%Y-%m-%d %H:%M %z"}, "2024-03-01 00:00:00"),
    ],
)
def test_time_in_several_columns(tmp_path, cells, names, kind, time, expected):
    assert instants(tmp_path, cells, {"column": list(names), **time}, names, kind) == ([expected], [])


def test_a_wrong_time_in_several_columns_is_told_with_both(tmp_path):
    found, refused = instants(
        tmp_path,
        ["02;30", ";1", "13;1"],
        {"column": ["month", "day"], "format": "%m %d", "year": 2014},
        ("month", "day"),
    )
    assert (found, sorted(refused)) == (
        [],
        ["missing_value: month", "not_a_time: month+day='02 30'", "not_a_time: month+day='13 1'"],
    )


@pytest.mark.parametrize(
    ("time", "says"),
    [
        ({"column": ["at", "act"], "unit": "seconds"}, "several columns need format"),
        ({"column": ["at", "act"], "format": "%Y%m%d"}, "no blank between the texts"),
        ({"column": ["at", "gone"], "format": "%Y %m%d"}, "gone"),
        ({"column": "at"}, "give either unit"),
        ({"column": "at", "format": "%Y%m%d", "origin": "2024-01-01"}, "origin belongs to unit"),
    ],
)
def test_a_wrong_time_of_the_definition_is_named(time, says):
    with pytest.raises(ValueError, match=says):
        definition(time=time)


@pytest.mark.parametrize(
    ("unit", "factor"), [("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)]
)
@pytest.mark.parametrize("origin", [None, "2024-01-01"])
def test_units_and_origins_of_numbers(tmp_path, unit, factor, origin):
    start = 1_704_067_200 if origin else 0
    time = {"column": "at", "unit": unit} | ({"origin": origin} if origin else {})
    assert (
        instants(tmp_path, [str((AT - start) * factor), "-1" * bool(origin) or str(10**19)], time, kind="integer")[0][0]
        == "2024-03-01 08:00:00"
    )


def test_a_millisecond_between_decimal_seconds_is_kept(tmp_path):
    found, _ = instants(
        tmp_path, ["1709280000.001", "1709280000.002"], {"column": "at", "unit": "seconds"}, kind="decimal"
    )
    assert found == ["2024-03-01 08:00:00.001", "2024-03-01 08:00:00.002"]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Shanghai", "America/New_York"])
def test_native_timestamps_of_parquet(tmp_path, unit, zone):
    moments = [dtm.datetime(2024, 3, 1, 8), dtm.datetime(2024, 3, 1, 23, 59, 59), dtm.datetime(1970, 1, 1)]
    local = pa.array(moments, pa.timestamp(unit))
    if zone is not None:
        local = local.cast(pa.timestamp(unit, zone))  # the same instants
    table = pa.table({"user": ["a", "b", "c"], "item": [1, 2, 3], "act": ["buy"] * 3, "at": local})
    pq.write_table(table, tmp_path / "log.parquet")
    columns = {**COLUMNS, "at": "timestamp"}
    rows, times, refused = read(tmp_path, {}, definition(time={"column": "at"}, columns=columns, format="parquet"))
    assert times == [round(m.replace(tzinfo=dtm.UTC).timestamp() * 1000) for m in moments[:2]]
    assert [row["user"] for row in rows] == ["a", "b"]
    assert [(n, reason.partition(":")[0]) for n, reason in refused] == [(3, "time_out_of_range")]
    if zone is None:
        shanghai = definition(time={"column": "at", "zone": "Asia/Shanghai"}, columns=columns, format="parquet")
        assert read(tmp_path, {}, shanghai)[1][0] == times[0] - 8 * 3_600_000


@pytest.mark.parametrize(
    ("at", "kind", "says"),
    [
        (
            pa.array([dtm.datetime(2024, 3, 1)], pa.timestamp("us")),
            "integer",
            ["timestamp[us]", "set logs.columns.at: timestamp"],
        ),
        (pa.array([dtm.date(2024, 3, 1)]), "integer", ["date32", "set logs.columns.at: timestamp"]),
        (pa.array([AT]), "timestamp", ["int64, no timestamp", "events.time.unit"]),
        (pa.array([[1]]), "integer", ["several values in one cell", "explode"]),
    ],
)
def test_a_column_of_parquet_of_another_kind_is_named_before_a_row_is_read(tmp_path, at, kind, says):
    pq.write_table(pa.table({"user": ["a"], "item": [1], "act": ["buy"], "at": at}), tmp_path / "log.parquet")
    time = {"column": "at"} if kind == "timestamp" else {"column": "at", "unit": "seconds"}
    said = refusal(tmp_path, {}, definition(time=time, columns={**COLUMNS, "at": kind}, format="parquet"))
    assert all(text in said for text in ["log.parquet", "column at", *says]), said


def test_a_day_of_parquet_is_one_instant(tmp_path):
    pq.write_table(
        pa.table({"user": ["a"], "item": [1], "act": ["buy"], "at": pa.array([dtm.date(2024, 3, 1)])}),
        tmp_path / "log.parquet",
    )
    assert read(
        tmp_path, {}, definition(time={"column": "at"}, columns={**COLUMNS, "at": "timestamp"}, format="parquet")
    )[1] == [AT * 1_000 - 8 * 3_600_000]


@pytest.mark.parametrize(
    ("format", "time"),
    [("csv", {"column": "at"}), ("jsonl", {"column": "at"}), ("parquet", {"column": "at", "unit": "seconds"})],
)
def test_a_timestamp_is_of_parquet_and_says_its_unit_itself(format, time):
    with pytest.raises(ValueError, match="timestamp"):
        definition(time=time, columns={**COLUMNS, "at": "timestamp"}, format=format)

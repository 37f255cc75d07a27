"""Every raw line is read rightly or refused with its row number and a reason; nothing crashes and nothing vanishes."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import etl.ingest.raw
from etl.datasets.definition import SIMULATED_MARKER, NamedDays, dataset
from etl.ingest.compression import BLOCK_BYTES
from etl.ingest.raw import RawLocation, Split, named_days
from etl.stage.errors import StageError

KUAIRAND = dataset("kuairand")
COLUMNS = tuple(KUAIRAND.logs.columns)
HEADER = ",".join(COLUMNS).encode()
GOOD = b"111,3199380,20220408,0,1649349856990,1,1,0,1,0,0,1,43454,14233,-1,27683,0,0,-1"
LOG = "log_standard_4_08_to_4_21_x.csv"


def with_cell(name: str, value: bytes) -> bytes:
    cells = GOOD.split(b",")
    cells[COLUMNS.index(name)] = value
    return b",".join(cells)


def read(lines: list[bytes], folder: Path) -> tuple[int, dict[int, str]]:
    """Return the number of good rows and row number -> reason of the refused ones."""
    (folder / LOG).write_bytes(HEADER + b"\n" + b"\n".join(lines) + b"\n")
    location = RawLocation(str(folder))
    [file] = location.logs(KUAIRAND)
    [chunk] = location.read(Split(file, 0, file.size, 2, COLUMNS), KUAIRAND)
    assert chunk.rows.num_rows == len(chunk.time_ms) == len(chunk.row_hash)
    return chunk.rows.num_rows, {refused.row_number: refused.reason for refused in chunk.refused}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (with_cell("play_time_ms", b"abc"), "not_an_integer: play_time_ms='abc'"),
        (with_cell("user_id", b""), "missing_value: user_id"),
        (with_cell("tab", b"1.5"), "not_an_integer: tab='1.5'"),
        (with_cell("video_id", b"0x1A"), "not_an_integer: video_id='0x1A'"),
        (with_cell("video_id", b"9" * 30), "too_large: video_id='999"),
        (
            with_cell("video_id", b"9223372036854775808"),
            "too_large: video_id='9223372036854775808' does not fit in 64 bits",
        ),
        (with_cell("video_id", b"9" * 5_000), "too_large: video_id='999"),
        (with_cell("video_id", b"NULL"), "missing_value: video_id='NULL'"),
        (GOOD[:40], "wrong_column_count: "),
        (GOOD + b",7", "wrong_column_count: 20 instead of 19"),
        (with_cell("tab", b"1\x00"), "nul_byte"),
        (with_cell("tab", b"\xff\xfe"), "not_utf8"),
        (with_cell("tab", b'"1"'), "not_an_integer: tab="),
        (with_cell("tab", b"1\r2"), "not_an_integer: tab="),
        (with_cell("time_ms", b"1649349856"), "time_out_of_range: time_ms=1649349856"),
        (with_cell("time_ms", b"1649349856990123"), "time_out_of_range"),
        (with_cell("is_click", b"2"), "not_allowed: is_click=2"),
        (with_cell("is_rand", b"-1"), "not_allowed: is_rand=-1"),
        (with_cell("user_id", b"-5"), "out_of_range: user_id=-5"),
        (with_cell("duration_ms", b"-1"), "out_of_range: duration_ms=-1"),
        (with_cell("tab", b"40000"), "out_of_range: tab=40000"),
    ],
)
def test_a_broken_row_is_refused_alone_with_its_row_number(tmp_path, line, reason):
    good, refused = read([GOOD, GOOD, line, GOOD], tmp_path)
    assert good == 3
    assert list(refused) == [4]  # the header is row 1
    assert refused[4].startswith(reason)


def test_windows_line_ends_are_read(tmp_path):
    assert read([GOOD + b"\r", GOOD + b"\r"], tmp_path) == (2, {})


def test_mutated_rows_are_read_or_refused_and_never_crash_or_vanish(tmp_path):
    rng = random.Random(5)
    lines = []
    for _ in range(20_000):
        line = bytearray(with_cell(rng.choice(COLUMNS), str(rng.choice([0, 1, -1, 10**17, 10**30])).encode()))
        for _ in range(rng.choice([0, 0, 1, 3])):
            position = rng.randrange(len(line))
            line[position : position + rng.choice([0, 1, 5])] = bytes(
                rng.randrange(256) for _ in range(rng.choice([0, 1, 2]))
            )
        lines.append(bytes(line).replace(b"\n", b"?"))
    # A trailing CR belongs to the line end, as everywhere.
    good, refused = read(lines, tmp_path)
    assert good + len(refused) == len(lines)
    assert good > 1_000
    assert len(refused) > 1_000
    assert all(reason.split(":")[0].replace("_", "").isalnum() for reason in refused.values())


def rows_of(
    folder: Path, split_bytes: int, name: str = LOG, block_bytes: int = BLOCK_BYTES
) -> tuple[list[int], list[int]]:
    """Read a file through its splits: users of its good rows, row numbers of the refused ones."""
    location = RawLocation(str(folder))
    file = next(f for f in location.logs(KUAIRAND) if f.name == name)
    with mock.patch.multiple(etl.ingest.raw, SPLIT_BYTES=split_bytes, BLOCK_BYTES=block_bytes):
        splits = location.splits([file], KUAIRAND.logs, lambda ranges: [location.count_newlines(*r) for r in ranges])
        chunks = [chunk for split in splits for chunk in location.read(split, KUAIRAND)]
    return [u for c in chunks for u in c.rows["user_id"].to_pylist()], [r.row_number for c in chunks for r in c.refused]


def good_and_bad(rows: int) -> list[bytes]:
    """Every third line is broken."""
    return [with_cell("user_id", b"?" if user % 3 == 2 else str(user).encode()) for user in range(rows)]


@settings(max_examples=30)
@given(
    rows=st.integers(1, 60),
    split_bytes=st.integers(200, 2_000),
    block_bytes=st.integers(1, 2_500),
    last_newline=st.booleans(),
)
def test_splits_cover_a_file_once_with_right_row_numbers(
    tmp_path_factory, rows, split_bytes, block_bytes, last_newline
):
    folder = tmp_path_factory.mktemp("raw")
    (folder / LOG).write_bytes(HEADER + b"\n" + b"\n".join(good_and_bad(rows)) + (b"\n" if last_newline else b""))
    assert rows_of(folder, split_bytes, block_bytes=block_bytes) == (
        [u for u in range(rows) if u % 3 != 2],
        [u + 2 for u in range(rows) if u % 3 == 2],
    )


def test_a_compressed_file_reads_as_the_plain_one(tmp_path):
    body = HEADER + b"\n" + b"\n".join(good_and_bad(500)) + b"\n"
    (tmp_path / f"{LOG}.gz").write_bytes(gzip.compress(body))
    assert rows_of(tmp_path, 64 << 20, f"{LOG}.gz") == (
        [u for u in range(500) if u % 3 != 2],
        [u + 2 for u in range(500) if u % 3 == 2],
    )


def test_a_cut_compressed_file_gives_its_readable_rows_and_says_where_it_broke(tmp_path):
    rng = random.Random(1)
    lines = [with_cell("user_id", str(rng.randrange(10**9)).encode()) for _ in range(5_000)]
    whole = gzip.compress(HEADER + b"\n" + b"\n".join(lines) + b"\n")
    (tmp_path / f"{LOG}.gz").write_bytes(whole[: len(whole) // 2])
    location = RawLocation(str(tmp_path))
    [file] = location.logs(KUAIRAND)
    chunks = list(location.read(Split(file, 0, file.size, 2, COLUMNS), KUAIRAND))
    assert chunks[-1].refused[-1].reason.startswith("truncated_gzip")
    assert 0 < sum(chunk.rows.num_rows for chunk in chunks) < 5_000


@pytest.mark.parametrize(
    ("files", "name", "says"),
    [
        (None, "kuairand", ["does not exist", "--raw"]),
        ({}, "kuairand", ["no log file", "log_standard_*.csv"]),
        ({LOG: HEADER, SIMULATED_MARKER: b"{}"}, "kuairand", ["simulated", "--dataset kuairand_simulated"]),
        ({LOG: HEADER}, "kuairand_simulated", ["not simulated", "--dataset kuairand"]),
    ],
)
def test_a_wrong_raw_folder_is_named_with_the_remedy(tmp_path, files, name, says):
    folder = tmp_path / "raw"
    if files is not None:
        folder.mkdir()
        for file, body in files.items():
            (folder / file).write_bytes(body)
    with pytest.raises(StageError) as caught:
        RawLocation(str(folder)).logs(dataset(name))
    assert all(text in str(caught.value) for text in [str(folder), *says])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "is empty"),
        (HEADER.replace(b",is_click", b""), "lacks the column is_click"),
        (HEADER.replace(b"is_click", b"clicked"), "lacks the column is_click; it has user_id"),
        (HEADER + b",user_id", "has a column twice"),
    ],
)
def test_a_wrong_header_is_named_with_the_file_and_the_column(tmp_path, body, says):
    (tmp_path / LOG).write_bytes(body)
    location = RawLocation(str(tmp_path))
    [file] = location.logs(KUAIRAND)
    with pytest.raises(StageError) as caught:
        location.header(file, KUAIRAND.logs)
    assert LOG in str(caught.value)
    assert says in str(caught.value)


def test_columns_that_nobody_asked_for_and_another_order_change_nothing(tmp_path):
    moved = [COLUMNS[-1], "new_column", *COLUMNS[:-1]]
    cells = dict(zip(COLUMNS, GOOD.split(b","), strict=True)) | {"new_column": b"any, thing"[:3]}
    (tmp_path / LOG).write_bytes(",".join(moved).encode() + b"\n" + b",".join(cells[name] for name in moved) + b"\n")
    location = RawLocation(str(tmp_path))
    [file] = location.logs(KUAIRAND)
    [chunk] = location.read(Split(file, 0, file.size, 2, location.header(file, KUAIRAND.logs)), KUAIRAND)
    assert chunk.refused == []
    assert chunk.rows.to_pylist() == [{name: int(cells[name]) for name in COLUMNS}]


@pytest.mark.parametrize(
    ("name", "rule", "first", "last"),
    [
        ("log_standard_4_08_to_4_21_1k.csv", KUAIRAND.logs.days_in_name, "2022-04-07", "2022-04-21"),
        (
            "log_12_30_to_1_02.csv",
            NamedDays(pattern=r"_(?P<month>\d+)_(?P<day>\d+)_to_(?P<last_month>\d+)_(?P<last_day>\d+)", year=2021),
            "2021-12-30",
            "2022-01-02",
        ),
        (
            "events-2024-03-01.csv",
            NamedDays(pattern=r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)"),
            "2024-03-01",
            "2024-03-01",
        ),
        (
            "events-2024-03-01.csv",
            NamedDays(pattern=r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)", zone="America/New_York"),
            "2024-03-01",
            "2024-03-02",
        ),
        ("events-2024-13-01.csv", NamedDays(pattern=r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)"), None, None),
    ],
)
def test_the_days_that_a_name_promises(name, rule, first, last):
    assert named_days(name, rule)[2:] == (first, last)


def test_a_file_is_read_only_for_days_that_it_may_hold(tmp_path):
    (tmp_path / LOG).write_bytes(HEADER)
    [file] = RawLocation(str(tmp_path)).logs(KUAIRAND)
    assert [day for day in ("2022-04-06", "2022-04-07", "2022-04-21", "2022-04-22") if file.may_hold(day)] == [
        "2022-04-07",
        "2022-04-21",
    ]

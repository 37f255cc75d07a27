"""Every raw line is read rightly or refused with its row number and a reason; nothing crashes and nothing vanishes."""

from __future__ import annotations

import gzip
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import etl.raw
from etl.datasets import DATASETS, KUAIRAND, KUAIRAND_LOG_COLUMNS, SIMULATED_MARKER
from etl.errors import StageError
from etl.raw import RawLocation, Split, parse_lines, reason_for, refusals

HEADER = ",".join(KUAIRAND_LOG_COLUMNS).encode()
GOOD = b"111,3199380,20220408,0,1649349856990,1,1,0,1,0,0,1,43454,14233,-1,27683,0,0,-1"
LOG = "log_standard_4_08_to_4_21_x.csv"


def with_cell(name: str, value: bytes) -> bytes:
    cells = GOOD.split(b",")
    cells[KUAIRAND_LOG_COLUMNS.index(name)] = value
    return b",".join(cells)


def read(lines: list[bytes]) -> tuple[int, dict[int, str]]:
    """Return the number of good rows and row number -> reason of the refused ones."""
    table, refused = parse_lines(b"\n".join(lines) + b"\n", 2, KUAIRAND_LOG_COLUMNS)
    bad, reasons = refusals(table, KUAIRAND)
    found = {row: reason_for(line, KUAIRAND_LOG_COLUMNS) for row, line in refused}
    wrong_rows = table["row_number"].to_numpy()[bad]
    return int((~bad).sum()), found | dict(zip(wrong_rows.tolist(), reasons, strict=True))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (with_cell("play_time_ms", b"abc"), "not_an_integer: play_time_ms='abc'"),
        (with_cell("user_id", b""), "not_an_integer: user_id=''"),
        (with_cell("tab", b"1.5"), "not_an_integer: tab='1.5'"),
        (with_cell("video_id", b"0x1A"), "not_an_integer: video_id='0x1A'"),
        (with_cell("video_id", b"9" * 30), "not_an_integer: video_id='999"),
        (GOOD[:40], "wrong_column_count: "),
        (GOOD + b",7", "wrong_column_count: 20 instead of 19"),
        (b"", "empty_line"),
        (with_cell("tab", b"1\x00"), "nul_byte"),
        (with_cell("tab", b"\xff\xfe"), "not_utf8"),
        (with_cell("tab", b'"1"'), "not_an_integer: tab="),
        (with_cell("tab", b"1\r2"), "not_an_integer: tab="),
        (with_cell("time_ms", b"1649349856"), "time_out_of_range: time_ms=1649349856"),
        (with_cell("time_ms", b"1649349856990123"), "time_out_of_range"),
        (with_cell("is_click", b"2"), "not_a_flag: is_click=2"),
        (with_cell("is_rand", b"-1"), "not_a_flag: is_rand=-1"),
        (with_cell("user_id", b"-5"), "negative_id: user_id=-5"),
        (with_cell("duration_ms", b"-1"), "negative_duration: duration_ms=-1"),
        (with_cell("tab", b"40000"), "tab_out_of_range: tab=40000"),
    ],
)
def test_a_broken_row_is_refused_alone_with_its_row_number(line, reason):
    good, refused = read([GOOD, GOOD, line, GOOD])
    assert good == 3
    assert list(refused) == [4]  # the header is row 1
    assert refused[4].startswith(reason)


def test_windows_line_ends_are_read():
    table, refused = parse_lines(GOOD + b"\r\n" + GOOD + b"\r\n", 2, KUAIRAND_LOG_COLUMNS)
    assert (table.num_rows, refused) == (2, [])


def test_mutated_rows_are_read_or_refused_and_never_crash_or_vanish():
    rng = random.Random(5)
    lines = []
    for _ in range(20_000):
        line = bytearray(with_cell(rng.choice(KUAIRAND_LOG_COLUMNS), str(rng.choice([0, 1, -1, 10**17, 10**30])).encode()))
        for _ in range(rng.choice([0, 0, 1, 3])):
            position = rng.randrange(len(line))
            line[position : position + rng.choice([0, 1, 5])] = bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, 2])))
        lines.append(bytes(line).replace(b"\n", b"?"))
    # A trailing CR belongs to the line end, as everywhere.
    good, refused = read(lines)
    assert good + len(refused) == len(lines)
    assert good > 1_000
    assert len(refused) > 1_000
    assert all(reason.split(":")[0].replace("_", "").isalnum() for reason in refused.values())


def rows_of(folder, split_bytes: int, name: str = LOG) -> list[tuple[int, int]]:
    """Read a file through its splits: (row number, user id) of every row."""
    location = RawLocation(str(folder))
    file = next(f for f in location.logs(KUAIRAND) if f.name == name)
    original, etl.raw.SPLIT_BYTES = etl.raw.SPLIT_BYTES, split_bytes
    try:
        splits = location.splits([file], lambda ranges: [location.count_newlines(*r) for r in ranges])
    finally:
        etl.raw.SPLIT_BYTES = original
    found = []
    for split in splits:
        for body, first_row, _ in location.chunks(split):
            table, refused = parse_lines(body, first_row, KUAIRAND_LOG_COLUMNS)
            assert refused == []
            found += zip(table["row_number"].to_pylist(), table["user_id"].to_pylist(), strict=True)
    return found


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 60), split_bytes=st.integers(200, 2_000), last_newline=st.booleans())
def test_splits_cover_a_file_once_with_right_row_numbers(tmp_path_factory, rows, split_bytes, last_newline):
    folder = tmp_path_factory.mktemp("raw")
    lines = [with_cell("user_id", str(user).encode()) for user in range(rows)]
    (folder / LOG).write_bytes(HEADER + b"\n" + b"\n".join(lines) + (b"\n" if last_newline else b""))
    assert rows_of(folder, split_bytes) == [(user + 2, user) for user in range(rows)]


def test_a_compressed_file_reads_as_the_plain_one(tmp_path):
    body = HEADER + b"\n" + b"\n".join(with_cell("user_id", str(u).encode()) for u in range(500)) + b"\n"
    (tmp_path / f"{LOG}.gz").write_bytes(gzip.compress(body))
    assert rows_of(tmp_path, 64 << 20, f"{LOG}.gz") == [(u + 2, u) for u in range(500)]


def test_a_cut_compressed_file_gives_its_readable_rows_and_says_where_it_broke(tmp_path):
    rng = random.Random(1)
    lines = [with_cell("user_id", str(rng.randrange(10**9)).encode()) for _ in range(5_000)]
    whole = gzip.compress(HEADER + b"\n" + b"\n".join(lines) + b"\n")
    (tmp_path / f"{LOG}.gz").write_bytes(whole[: len(whole) // 2])
    location = RawLocation(str(tmp_path))
    [file] = location.logs(KUAIRAND)
    chunks = list(location.chunks(Split(file, 0, file.size, 2)))
    assert chunks[-1][2].startswith("truncated_gzip")
    assert 0 < sum(body.count(b"\n") for body, _, _ in chunks) < 5_000


@pytest.mark.parametrize(
    ("files", "dataset", "says"),
    [
        (None, "kuairand", ["does not exist", "--raw"]),
        ({}, "kuairand", ["no log file", "log_standard_*.csv"]),
        ({LOG: HEADER, SIMULATED_MARKER: b"{}"}, "kuairand", ["simulated", "--dataset kuairand_simulated"]),
        ({LOG: HEADER}, "kuairand_simulated", ["not simulated", "--dataset kuairand"]),
    ],
)
def test_a_wrong_raw_folder_is_named_with_the_remedy(tmp_path, files, dataset, says):
    folder = tmp_path / "raw"
    if files is not None:
        folder.mkdir()
        for name, body in files.items():
            (folder / name).write_bytes(body)
    with pytest.raises(StageError) as caught:
        RawLocation(str(folder)).logs(DATASETS[dataset])
    assert all(text in str(caught.value) for text in [str(folder), *says])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "is empty"),
        (HEADER.replace(b",is_click", b""), "lacks the column is_click"),
        (HEADER.replace(b"is_click", b"clicked"), "lacks the column is_click (and has the unknown column clicked)"),
        (HEADER + b",more", "unknown more"),
    ],
)
def test_a_wrong_header_is_named_with_the_file_and_the_column(tmp_path, body, says):
    (tmp_path / LOG).write_bytes(body)
    location = RawLocation(str(tmp_path))
    [file] = location.logs(KUAIRAND)
    with pytest.raises(StageError) as caught:
        location.check_header(file, KUAIRAND_LOG_COLUMNS)
    assert LOG in str(caught.value)
    assert says in str(caught.value)


def test_a_file_is_read_only_for_days_that_it_may_hold(tmp_path):
    (tmp_path / LOG).write_bytes(HEADER)
    [file] = RawLocation(str(tmp_path)).logs(KUAIRAND)
    assert [day for day in ("2022-04-06", "2022-04-07", "2022-04-21", "2022-04-22") if file.may_hold(day)] == ["2022-04-07", "2022-04-21"]

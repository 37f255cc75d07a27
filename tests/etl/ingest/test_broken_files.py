"""Broken archives, item files and user files.

Nothing is taken for whole that is not, and messages name file and column.
"""

from __future__ import annotations

import gzip
import random

import pyarrow as pa
import pytest

from etl.datasets.definition import dataset
from etl.ingest.event_rows import COUNTED, EVENT, REFUSED, parse_split
from etl.ingest.features import read_features
from etl.ingest.raw import RawLocation, Split, parse_lines
from etl.sequences.build_sequences import _user_fields
from etl.sequences.items import item_rows
from etl.stage.errors import StageError
from etl.warehouse.buckets import Layout
from etl.warehouse.partitions import day_number

KUAIRAND = dataset("kuairand")
COLUMNS = tuple(KUAIRAND.logs.columns)
HEADER = ",".join(COLUMNS).encode()
GOOD = b"%d,3199380,20220408,0,1649349856990,1,1,0,1,0,0,1,43454,14233,-1,27683,0,0,12"  # 2022-04-07 UTC
DAYS = frozenset({day_number("2022-04-07"), day_number("2022-04-08")})
ARCHIVE = "log_standard_4_08_to_4_21_x.csv.gz"
ITEM_FILE, USER_FILE = "video_features_basic_x.csv", "user_features_x.csv"
ITEM_HEADER = b"video_id,author_id,video_type,upload_type,video_duration,tag\n"


def location(folder, name: str, body: bytes) -> RawLocation:
    (folder / name).write_bytes(body)
    return RawLocation(str(folder))


def parsed(place: RawLocation) -> tuple[list[int], list[tuple[int, str]], int]:
    """Return the users of the events, (row number, code) of the refused rows, and the rows counted."""
    [file] = place.logs(KUAIRAND)
    rows = pa.concat_tables(
        parse_split(place, Split(file, 0, file.size, 2, COLUMNS), KUAIRAND, DAYS, "2022-04-08", Layout(2))
    ).to_pylist()
    refused = [(r["row_number"], r["reason"].split(":")[0]) for r in rows if r["kind"] == REFUSED]
    return (
        [r["user_id"] for r in rows if r["kind"] == EVENT],
        refused,
        sum(r["row_number"] for r in rows if r["kind"] == COUNTED),
    )


def archive(rows: int) -> tuple[bytes, list[int]]:
    rng = random.Random(3)
    users = [rng.randrange(10**9) for _ in range(rows)]
    return gzip.compress(HEADER + b"\n" + b"".join(GOOD % user + b"\n" for user in users), mtime=0), users


@pytest.mark.parametrize("share", [0.2, 0.5, 0.77, 0.9, 0.99])
def test_a_cut_archive_gives_whole_rows_and_refuses_the_one_that_the_cut_is_in(tmp_path, share):
    body, users = archive(3_000)
    found, refused, counted = parsed(location(tmp_path, ARCHIVE, body[: int(len(body) * share)]))
    assert found == users[: len(found)]
    assert refused == [(len(found) + 2, "truncated_gzip")]
    assert counted == len(found) + 1
    assert len(found) > 0.9 * share * len(users) - 100


def test_a_line_that_a_cut_shortens_into_a_valid_one_is_not_taken_for_it(tmp_path):
    # Stored blocks: the cut falls where we say, after the 1 of tab 12.
    whole = gzip.compress(HEADER + b"\n" + GOOD % 1 + b"\n" + GOOD % 2 + b"\n", compresslevel=0, mtime=0)
    end = whole.rindex(GOOD % 2) + len(GOOD % 2) - 1
    found, refused, _ = parsed(location(tmp_path, ARCHIVE, whole[:end]))
    assert (found, refused) == ([1], [(3, "truncated_gzip")])


def test_an_archive_that_breaks_in_the_middle_keeps_the_rows_before(tmp_path):
    body, users = archive(20_000)
    at = len(body) * 3 // 4
    found, refused, counted = parsed(location(tmp_path, ARCHIVE, body[:at] + b"\xff" * 400 + body[at + 400 :]))
    # Before the damage is noticed a few lines may be inflated wrongly; those before it are all there.
    assert found[: len(users) * 7 // 10] == users[: len(users) * 7 // 10]
    assert refused[-1][1] == "broken_gzip"
    assert counted == len(found) + len(refused)


def test_an_archive_of_several_members_is_read_to_its_end(tmp_path):
    members = [gzip.compress(HEADER + b"\n"), *(gzip.compress(GOOD % user + b"\n") for user in range(5))]
    assert parsed(location(tmp_path, ARCHIVE, b"".join(members))) == ([0, 1, 2, 3, 4], [], 5)


@pytest.mark.parametrize("body", [b"hello, world\n", gzip.compress(HEADER, mtime=0)[:25]], ids=["text", "cut"])
def test_an_archive_without_a_readable_header_is_named(tmp_path, body):
    place = location(tmp_path, ARCHIVE, body)
    [file] = place.logs(KUAIRAND)
    with pytest.raises(StageError, match=f"{ARCHIVE}.*cannot be read"):
        place.header(file, KUAIRAND.logs)


@pytest.mark.parametrize("lines", [1, 2, 5])
def test_empty_lines_alone_are_no_rows(lines):
    rows, _, _, refused = parse_lines(b"\n" * lines, 2, COLUMNS, KUAIRAND.logs)
    assert (rows.num_rows, refused) == (0, [])


def test_a_file_whose_name_holds_no_days_is_read_for_every_day(tmp_path):
    [file] = location(tmp_path, "log_standard_13_45_to_14_99_x.csv", HEADER).logs(KUAIRAND)
    assert file.may_hold("2022-04-21")


def items(folder, row: bytes) -> dict:
    counts = {"": pa.table({"item_id": [2], "occurrences": [1], "train_occurrences": [1]})}
    return item_rows(
        counts, [read_features(location(folder, ITEM_FILE, ITEM_HEADER + row + b"\n"), KUAIRAND.items[0])], KUAIRAND
    ).to_pylist()[0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b'2,7,NORMAL,a,10.0,"1,2"', (7, 10, ["1", "2"])),
        (b'2.0,7.,NORMAL,a,10,"1, 2 "', (7, 10, ["1", "2"])),
        (b"2,7,NORMAL,a,10.0,1\n2,8,AD,b,20.0,2", (7, 10, ["1"])),  # twice: the first counts
        (b"2,9007199254740993,NORMAL,a,,food", (9007199254740993, None, ["food"])),  # no float holds that id
        (b'2,,NORMAL,a,0.0,"3,,4,"', (None, 0, ["3", "4"])),
        (b"3,7,NORMAL,a,10.0,1", (None, None, [])),
        (b"", (None, None, [])),
    ],
)
def test_item_fields_are_read_as_published(tmp_path, row, expected):
    item = items(tmp_path, row)
    assert (item["author_id"], item["duration_ms"], item["categories"]) == expected


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b"abc,7,NORMAL,a,10.0,1", "video_id of the file video_features_basic_* in the raw folder holds 'abc'"),
        (
            b",7,NORMAL,a,10.0,1",
            "the column video_id of the file video_features_basic_* in the raw folder has 1 row(s) without a value",
        ),
        (
            b"9999999999999999999,7,NORMAL,a,10.0,1",
            "video_id of the file video_features_basic_* in the raw folder holds '9999999999999999999'",
        ),
        (b"2,bob,NORMAL,a,10.0,1", "author_id of the file video_features_basic_* in the raw folder holds 'bob'"),
        (
            b"2,7,NORMAL,a,long,1",
            "video_duration of the file video_features_basic_* in the raw folder holds what is no number",
        ),
        (b"2,7,NORMAL", f"{ITEM_FILE} in "),
        (b"2,7,\xff,a,10.0,1", f"{ITEM_FILE} in "),
    ],
)
def test_a_wrong_item_file_is_named_with_column_and_value(tmp_path, row, says):
    with pytest.raises(StageError) as caught:
        items(tmp_path, row)
    assert says in str(caught.value)
    assert "remedy:" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (ITEM_HEADER.replace(b",tag", b""), "lacks the column tag"),
        (b"\xff" + ITEM_HEADER, ITEM_FILE),
        (b"", ITEM_FILE),
        (b"tag," + ITEM_HEADER, "a column name occurs twice"),
    ],
)
def test_a_wrong_header_of_the_item_file_is_named(tmp_path, body, says):
    with pytest.raises(StageError, match=says):
        read_features(location(tmp_path, ITEM_FILE, body), KUAIRAND.items[0])


def test_user_fields_take_the_first_row_and_name_an_id_that_is_none(tmp_path):
    header = ("user_id," + ",".join(KUAIRAND.user_fields) + "\n").encode()
    place = location(tmp_path, USER_FILE, header + b"5,a,b,c,d,e,f,g,h\n5,x,x,x,x,x,x,x,x\n6,,,,,,,,\n")
    assert _user_fields(place, KUAIRAND) == {5: list("abcdefgh"), 6: [""] * 8}
    place = location(tmp_path, USER_FILE, header + b"bob,a,b,c,d,e,f,g,h\n")
    with pytest.raises(StageError, match=r"user_id of the file user_features_\* in .* holds 'bob'"):
        _user_fields(place, KUAIRAND)

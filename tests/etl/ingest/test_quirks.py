"""The quirks of the published data sets and of own logs, on rows that show them: read through the definitions alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.datasets.definition import DatasetDefinition, dataset
from etl.ingest.event_rows import EVENT, REFUSED, parse_split, write_day_bucket
from etl.ingest.features import read_features
from etl.ingest.raw import RawLocation, hashed_ids
from etl.sequences.sequence_rows import sequence_rows
from etl.warehouse.buckets import Layout
from etl.warehouse.partitions import Window, day_number
from etl.warehouse.schemas import EVENTS
from etl.warehouse.store import TableStore

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data"


def parsed(definition: DatasetDefinition, folder: Path, days: list[str]) -> tuple[list[dict], list[dict]]:
    """Return events and refused rows of the days, through the reader that the job uses."""
    place = RawLocation(str(folder))
    numbers = frozenset(day_number(day) for day in days)
    files = place.logs(definition)
    tables = [
        table
        for split in place.splits(files, definition.logs, None)
        for table in parse_split(place, split, definition, numbers, days[-1], Layout(1))
    ]
    rows = pa.concat_tables(tables).to_pylist()
    return [r for r in rows if r["kind"] == EVENT], [r for r in rows if r["kind"] == REFUSED]


# ---- KuaiRand
# ----------------------------------------------------------------------------------------------------------


KUAIRAND_HEADER = ",".join(dataset("kuairand").logs.columns)


def test_kuairand_time_ms_counts_and_not_the_servers_clock(tmp_path):
    # 2022-04-08 23:55 in Shanghai; the server logged it an hour and a day later.
    time_ms = 1_649_433_300_000
    row = f"1,2,20220409,0,{time_ms},1,0,0,0,0,0,0,5,0,-1,-1,0,0,1"
    (tmp_path / "log_standard_4_08_to_4_21_x.csv").write_text(f"{KUAIRAND_HEADER}\n{row}\n")
    [event], refused = parsed(dataset("kuairand"), tmp_path, ["2022-04-08"])
    assert (event["event_time_ms"], event["duration_ms"], event["watch_time_ms"], refused) == (time_ms, 0, 5, [])


def test_kuairands_random_log_is_read_beside_the_standard_one_and_its_targets_say_so(tmp_path):
    at = 1_650_600_000_000  # 2022-04-22 04:00 UTC
    for name, video, random in (("standard_4_22_to_5_08_1k", 2, 0), ("random_4_22_to_5_08_1k", 3, 1)):
        row = f"1,{video},20220422,1200,{at + video},1,0,0,0,0,0,0,5,0,-1,-1,0,{random},1"
        (tmp_path / f"log_{name}.csv").write_text(f"{KUAIRAND_HEADER}\n{row}\n")
    rows, refused = parsed(dataset("kuairand"), tmp_path, ["2022-04-22"])
    assert len(rows) == 2 and not refused
    rows.sort(key=lambda row: row["event_time_ms"])
    events = pa.Table.from_pylist([{name: row[name] for name in EVENTS.names} for row in rows], schema=EVENTS)
    window = Window("2022-04-22", 2, 2)
    [user] = sequence_rows(events, np.array([2, 3]), np.ones(2, np.int64), {}, window, dataset("kuairand"))[
        0
    ].to_pylist()
    assert (user["target_item_index"], user["target_is_random"]) == ([0, 1], [False, True])


# ---- KuaiRec
# -----------------------------------------------------------------------------------------------------------

KUAIREC_HEADER = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio"


def test_kuairec_rows_without_time_are_quarantined_and_expected(tmp_path):
    rows = [
        "14,148,4381,6067,2020-07-05 05:27:48.378,20200705.0,1593898068.378,0.72",
        "14,7162,100,200,,,,0.5",
        "14,149,9,6067,2020-07-05 05:28:00,20200705.0,1593898080.0,2.5",
    ]
    (tmp_path / "small_matrix.csv").write_text("\n".join([KUAIREC_HEADER, *rows]) + "\n")
    definition = dataset("kuairec_small")
    events, refused = parsed(definition, tmp_path, ["2020-07-04"])
    assert [e["event_time_ms"] for e in events] == [1_593_898_068_378, 1_593_898_080_000]
    assert [e["feedback"] for e in events] == [0, 0b011]  # like and complete, by the published ratio
    assert [r["reason"] for r in refused] == ["missing_value: timestamp"]
    assert "missing_value" in definition.logs.expected_refusals


def test_kuairec_repeated_pairs_stay_and_repeated_rows_go(tmp_path):
    row = "7175,10360,4381,6067,2020-07-05 05:27:48.378,20200705,1593898068.378,0.72"
    later = row.replace("1593898068.378", "1593998068.378")
    (tmp_path / "big_matrix.csv").write_text("\n".join([KUAIREC_HEADER, row, later, row]) + "\n")
    definition = dataset("kuairec_big")
    place = RawLocation(str(tmp_path))
    days = frozenset({day_number("2020-07-04"), day_number("2020-07-06")})
    [split] = place.splits(place.logs(definition), definition.logs, None)
    rows = pa.concat_tables(parse_split(place, split, definition, days, "2020-07-04", Layout(1)))
    rows = rows.filter(pa.array(np.isin(rows["kind"].to_numpy(), [EVENT, REFUSED])))
    store = TableStore(str(tmp_path / "w"), definition.name)
    by_day = {day: rows.filter(pa.array(rows["day"].to_numpy() == day)) for day in days}
    work = store.begin_try("a", ["events", "quarantine"], ["2020-07-04", "2020-07-06"])
    found = [write_day_bucket(by_day[day], store, definition, work, day, 0) for day in sorted(days)]
    assert [(f["events"], f["duplicates"]) for f in found] == [(1, 1), (1, 0)]


def test_kuairec_captions_with_line_breaks_and_lists_in_brackets_are_read(tmp_path):
    (tmp_path / "item_categories.csv").write_text('video_id,feat\n0,[8]\n1,"[27, 9]"\n2,[]\n')
    table = read_features(RawLocation(str(tmp_path)), dataset("kuairec_big").items[0])
    from etl.sequences.items import item_rows

    counts = {"": pa.table({"item_id": [0, 1, 2, 3], "occurrences": [1] * 4, "train_occurrences": [1] * 4})}
    rows = item_rows(counts, [table, None], dataset("kuairec_big")).to_pylist()
    assert [r["categories"] for r in rows] == [["8"], ["27", "9"], [], []]
    (tmp_path / "captions.csv").write_text('video_id,caption,topic\n0,"two\nlines, and a ""quote""",[a]\n1,plain,[b]\n')
    from etl.datasets.definition import FeatureFile

    rule = FeatureFile(files="captions.csv", key="video_id", fields={"caption": "caption"})
    assert read_features(RawLocation(str(tmp_path)), rule)["caption"].to_pylist() == [
        'two\nlines, and a "quote"',
        "plain",
    ]


@pytest.mark.skipif(not REAL.exists(), reason=f"the real rows are not at {REAL}")
@pytest.mark.parametrize(
    ("name", "file", "events"),
    [
        ("kuairec_big", "big_matrix_official_sample15.csv", 15),
        ("kuairec_small", "small_matrix_official_sample10.csv", None),
    ],
)
def test_kuairec_official_rows(tmp_path, name, file, events):
    (tmp_path / file).write_bytes((REAL / "kuairec" / file).read_bytes())
    from etl.warehouse.partitions import days_between

    found, refused = parsed(dataset(name), tmp_path, days_between("2020-07-04", "2020-09-06"))
    lines = len((REAL / "kuairec" / file).read_text().splitlines()) - 1
    assert len(found) + len(refused) == lines
    assert {r["reason"].split(":")[0] for r in refused} <= {"missing_value"}
    if events is not None:
        assert (len(found), refused) == (events, [])
    else:
        assert refused  # the rows without time at the end of a user


# ---- TMALL
# -------------------------------------------------------------------------------------------------------------

TMALL_HEADER = "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type"


def test_tmall_days_without_year_or_leading_zero_empty_brands_and_action_codes(tmp_path):
    rows = [
        "328862,323294,833,2882,2661.0,0829,0",
        "328862,844400,1271,2882,,829,3",
        "1,2,3,4,5,1112,2",
        "1,2,3,4,5,0230,0",
        "1,2,3,4,5,1111,4",
        "1,2,3,4,5,,0",
    ]
    (tmp_path / "user_log_format1.csv").write_text("\n".join([TMALL_HEADER, *rows]) + "\n")
    events, refused = parsed(dataset("tmall"), tmp_path, ["2014-08-29", "2014-11-12"])
    assert [e["event_time_ms"] // 86_400_000 for e in events] == [day_number("2014-08-29")] * 2 + [
        day_number("2014-11-12")
    ]
    assert [e["feedback"] for e in events] == [1, 8, 4]
    assert [e["brand"] for e in events] == ["2661", None, "5"]
    assert [e["seller_id"] for e in events] == [2882, 2882, 4]
    reasons = sorted(r["reason"] for r in refused)
    # The row of 1111 is refused, too, but filed under its own day, which is not built here.
    assert reasons == ["missing_value: time_stamp", "not_a_time: time_stamp='0230'"]


def test_tmall_same_day_clicks_are_kept_and_never_each_others_history(tmp_path):

    tmall = dataset("tmall")
    tmall = tmall.model_copy(update={"targets": tmall.targets.model_copy(update={"min_events": 3})})
    lines = [
        f"1,{item},1,1,1,{day},0"
        for day, item in [("1101", 5), ("1101", 5), ("1102", 6), ("1102", 7), ("1103", 8), ("1103", 9)]
    ]
    (tmp_path / "user_log_format1.csv").write_text("\n".join([TMALL_HEADER, *lines]) + "\n")
    days = ["2014-11-01", "2014-11-02", "2014-11-03"]
    rows, refused = parsed(tmall, tmp_path, days)
    assert (len(rows), refused) == (6, [])
    schema = pa.schema(
        [
            ("user_id", pa.int64()),
            ("item_id", pa.int64()),
            ("event_time_ms", pa.int64()),
            ("feedback", pa.int16()),
            ("watch_time_ms", pa.int64()),
            ("duration_ms", pa.int64()),
            ("context", pa.int16()),
            ("is_random", pa.bool_()),
        ]
    )
    rows.sort(key=lambda r: (r["event_time_ms"], r["item_id"]))
    table = pa.Table.from_pylist([{name: r[name] for name in schema.names} for r in rows], schema=schema)
    items = np.unique(table["item_id"].to_numpy())
    [row] = sequence_rows(table, items, np.ones(len(items), np.int64), {}, Window("2014-11-03", 2, 3), tmall)[
        0
    ].to_pylist()
    day = 86_400_000
    positives = [
        (t // day - day_number("2014-11-01"), end)
        for t, end, label in zip(row["target_time_ms"], row["target_history_end"], row["target_label"], strict=True)
        if label
    ]
    # Positions -3 (train), -2 (validation) and -1 (evaluation): of the day before, only what is of an earlier day is
    # seen.
    assert positives == [(1, 2), (2, 4), (2, 4)]
    assert row["target_split"] == sorted(row["target_split"])


# ---- own logs
# ----------------------------------------------------------------------------------------------------------


def test_a_log_without_header_with_text_codes_and_stray_seconds(tmp_path):
    lines = [
        "1,2268318,2520377,pv,1511544070",
        "1,2333346,2520771,buy,1511561733",
        "1,5,5,pv,-1",
        "1,5,5,pv,1480550400",
        "1,5,5,look,1511561733",
        '2,"7","a ""b"", c",cart,1511561733',
    ]
    (tmp_path / "UserBehavior.csv").write_text("\n".join(lines) + "\n")
    taobao = dataset(str(ROOT / "docs" / "definitions" / "taobao.yaml"))
    events, refused = parsed(taobao, tmp_path, ["2017-11-24", "2017-11-25"])
    assert [(e["user_id"], e["item_id"], e["feedback"], e["category"]) for e in events] == [
        (1, 2268318, 1, "2520377"),
        (1, 2333346, 2, "2520771"),
        (2, 7, 4, 'a "b", c'),
    ]
    assert sorted(r["reason"].split(":")[0] for r in refused) == [
        "not_allowed",
        "time_out_of_range",
        "time_out_of_range",
    ]
    assert [r["row_number"] for r in sorted(refused, key=lambda r: r["row_number"])] == [3, 4, 5]


def test_text_ids_are_hashed_alike_in_logs_and_files():
    texts = pa.array(["u-1", "u-2", "u-1", "ü"])
    ids = hashed_ids(texts)
    assert ids[0] == ids[2] != ids[1]
    assert (ids >= 0).all()
    assert ids.tolist() == hashed_ids(pa.array(["u-1", "u-2", "u-1", "ü"])).tolist()
    assert ids[0] == 7_412_408_520_282_046_469  # of the text alone: no seed of the process, no version
    assert set(Layout(4).bucket_of(ids)) <= {0, 1, 2, 3}


def test_parquet_logs_with_nulls_and_wrong_values_keep_row_numbers(tmp_path):
    definition = dataset(str(ROOT / "docs" / "definitions" / "buildroot.yaml"))
    rows = {
        "committer_id": [1, None, 3, 4],
        "item_id": [1, 2, 3, 4],
        "cat_id": [0] * 4,
        "action_type": [0, 0, 9, 1],
        "time_s": [1_600_000_000] * 4,
        "more": ["x"] * 4,
    }
    pq.write_table(pa.table(rows), tmp_path / "events.parquet", row_group_size=1)
    events, refused = parsed(definition, tmp_path, ["2020-09-13"])
    assert [e["user_id"] for e in events] == [1, 4]
    assert [(r["row_number"], r["reason"]) for r in refused] == [
        (2, "missing_value: committer_id"),
        (3, "not_allowed: action_type=9"),
    ]
    assert json.loads(refused[0]["raw_text"])["item_id"] == 2


def test_files_of_local_days_are_opened_for_every_utc_day_that_they_hold(tmp_path):
    """Berlin's 3 March begins on the 2nd of UTC.

    The zone of the times is the zone of the names unless said otherwise.
    """
    (tmp_path / "shop.yaml").write_text("""
name: shop
title: A shop
first_day: 2024-03-01
logs:
  files: [shop-*.csv]
  delimiter: ";"
  days_in_name: {pattern: 'shop-(?P<year>\\d{4})-(?P<month>\\d\\d)-(?P<day>\\d\\d)'}
  columns: {user: text, item: text, at: text}
events:
  user: user
  item: item
  time: {column: at, format: '%Y-%m-%d %H:%M:%S', zone: Europe/Berlin}
  signals: {any: {column: user, equals: a}}
targets: {label: any}
""")
    for day in ("02", "03", "04"):
        (tmp_path / f"shop-2024-03-{day}.csv").write_text(
            f"user;item;at\na;x;2024-03-{day} 00:30:00\na;y;2024-03-{day} 12:00:00\n"
        )
    files = RawLocation(str(tmp_path)).logs(dataset(str(tmp_path / "shop.yaml")))
    assert [f.name for f in files if f.may_hold("2024-03-03")] == ["shop-2024-03-03.csv", "shop-2024-03-04.csv"]
    from etl.stage.errors import StageError

    comma = dataset(str(tmp_path / "shop.yaml")).logs.model_copy(update={"delimiter": ","})
    with pytest.raises(StageError, match=r"has one column, 'user;item;at', when it is split at ','.*"):
        RawLocation(str(tmp_path)).header(files[0], comma)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Shanghai", "America/New_York"])
def test_texts_as_times_in_their_zone(tmp_path, zone):
    import datetime as dtm
    import zoneinfo

    text = """
name: shop
title: A shop
first_day: 2024-01-01
logs:
  files: [clicks.csv.gz]
  delimiter: "\\t"
  columns: {user: text, item: text, at: text, seen: decimal}
events:
  user: user
  item: item
  time: {column: at, format: '%Y-%m-%d %H:%M:%S.%f', zone: ZONE}
  watch_time: {column: seen, unit: seconds}
  signals: {long: {column: seen, at_least: 10}}
targets: {label: long}
"""
    (tmp_path / "shop.yaml").write_text(text.replace("ZONE", zone))
    lines = [
        "user\titem\tat\tseen",
        "a\tx\t2024-03-10 12:00:00.25\t12.5",
        "b\tx\t2024-13-10 12:00:00.25\t1",
        "c\tx\tsoon\t1",
    ]
    with gzip.open(tmp_path / "clicks.csv.gz", "wt") as stream:
        stream.write("\n".join(lines))
    [event], refused = parsed(dataset(str(tmp_path / "shop.yaml")), tmp_path, ["2024-03-10"])
    moment = dtm.datetime(2024, 3, 10, 12, 0, 0, 250_000, tzinfo=zoneinfo.ZoneInfo(zone))
    assert event["event_time_ms"] == round(moment.timestamp() * 1000)
    assert (event["watch_time_ms"], event["feedback"]) == (12_500, 1)
    assert [r["reason"].split(":")[0] for r in refused] == ["not_a_time", "not_a_time"]

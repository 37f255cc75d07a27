"""Random logs, without Spark.

Every row is counted once, and days cut, ordered, repeated or built apart have the same bytes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import given, settings
from hypothesis import strategies as st

import etl.ingest.raw
from etl.datasets.definition import dataset
from etl.ingest.event_rows import COUNTED, ELSEWHERE, parse_split, parsed_schema, write_day_bucket
from etl.ingest.raw import RawLocation
from etl.warehouse.buckets import Layout
from etl.warehouse.partitions import MS_PER_DAY, day_number, dt_of_day_number
from etl.warehouse.store import TableStore

KUAIRAND = dataset("kuairand")
COLUMNS = tuple(KUAIRAND.logs.columns)
FIRST, DAYS, BUCKETS = day_number("2022-04-08"), 4, 3
LOG = "log_standard_4_08_to_4_12_x.csv"

row = st.tuples(
    st.integers(0, 5),
    st.integers(0, 3),
    st.integers(0, 24 * DAYS - 1),
    st.sampled_from(["", "", "", "", "flag", "text", "time", "short"]),
    st.booleans(),
)


def line(user: int, item: int, hour: int, fault: str, clicked: bool) -> str:
    cells = dict.fromkeys(COLUMNS, "0") | {
        "user_id": str(user),
        "video_id": str(item),
        "time_ms": str(FIRST * MS_PER_DAY + hour * 3_600_000),
        "is_click": str(int(clicked)),
    }
    cells |= {"": {}, "short": {}, "flag": {"is_like": "2"}, "text": {"tab": "x"}, "time": {"time_ms": "12"}}[fault]
    values = list(cells.values())
    return ",".join(values[:-1] if fault == "short" else values)


def built(folder, store: TableStore, attempt: str, days: list[int], split_bytes: int) -> dict:
    """Parse and write some days as the job's tasks do; return the figures and the digests of the files."""
    place = RawLocation(str(folder))
    before, etl.ingest.raw.SPLIT_BYTES = etl.ingest.raw.SPLIT_BYTES, split_bytes
    try:
        splits = place.splits(
            place.logs(KUAIRAND), KUAIRAND.logs, lambda ranges: [place.count_newlines(*r) for r in ranges]
        )
    finally:
        etl.ingest.raw.SPLIT_BYTES = before
    tables = [
        t
        for split in splits
        for t in parse_split(place, split, KUAIRAND, frozenset(days), dt_of_day_number(days[-1]), Layout(BUCKETS))
    ]
    rows = pa.concat_tables(tables) if tables else parsed_schema(KUAIRAND).empty_table()
    kind = rows["kind"].to_numpy()
    counted = rows.filter(pa.array(kind == COUNTED))
    found: dict = {
        "read": sum(counted["row_number"].to_pylist()),
        "events": 0,
        "duplicates": 0,
        "quarantined": 0,
        "files": {},
        "built": sum(
            n
            for day, n in zip(counted["day"].to_pylist(), counted["row_number"].to_pylist(), strict=True)
            if day in days
        ),
        "elsewhere": sum(rows.filter(pa.array(kind == ELSEWHERE))["row_number"].to_pylist()),
    }
    rows = rows.filter(pa.array(kind < COUNTED))
    work = store.begin_try(attempt, ["events", "quarantine"], [dt_of_day_number(day) for day in days])
    for day in days:
        for bucket in range(BUCKETS):
            mine = rows.filter(pc.and_(pc.equal(rows["day"], day), pc.equal(rows["bucket"], bucket)))
            mine = mine.take(
                pa.array(np.random.default_rng(len(days)).permutation(mine.num_rows))
            )  # a shuffle promises no order
            result = write_day_bucket(mine, store, KUAIRAND, work, day, bucket)
            for name in ("events", "duplicates", "quarantined"):
                found[name] += result[name]
            found["files"][day, bucket] = result.get("events_file", {}).get("digest")
    return found


@settings(max_examples=25)
@given(rows=st.lists(row, max_size=60), split_bytes=st.integers(120, 2_000), order=st.permutations(range(DAYS)))
def test_rows_are_counted_once_and_days_built_in_any_way_have_the_same_bytes(
    tmp_path_factory, rows, split_bytes, order
):
    folder = tmp_path_factory.mktemp("raw")
    (folder / LOG).write_text("\n".join([",".join(COLUMNS), *[line(*r) for r in rows]]) + "\n")
    store = TableStore(str(folder / "w"), "kuairand")
    days = [FIRST + d for d in range(DAYS)]
    together = built(folder, store, "together", days, 64 << 20)
    assert together["read"] == len(rows)
    assert together["built"] == together["events"] + together["duplicates"] + together["quarantined"]
    assert together["elsewhere"] == 0  # a line without a time is filed under the first day of its file's name
    apart: dict = {}
    for place in order:
        one = built(folder, store, f"apart{place}", [days[place]], split_bytes)
        assert one["read"] == len(rows)
        assert one["built"] == one["events"] + one["duplicates"] + one["quarantined"]
        apart |= one["files"]
    assert apart == together["files"]

"""Yambda's layout, on generated rows of exactly its columns and types.

Events and sequences are built by the real jobs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.datasets.definition import dataset
from etl.ingest.build_events import Build, build_events
from etl.ingest.raw import RawLocation
from etl.sequences.build_sequences import build_sequences
from etl.warehouse.partitions import Window
from etl.warehouse.store import TableStore

LONGEST = 27_738  # events of the longest published history
DAY = 86_400
STEP = 5  # seconds
KINDS = ["listen", "like", "dislike", "unlike", "undislike"]
SCHEMA = pa.schema(
    [
        ("uid", pa.uint32()),
        ("timestamp", pa.uint32()),
        ("item_id", pa.uint32()),
        ("is_organic", pa.uint8()),
        ("event_type", pa.dictionary(pa.int8(), pa.string())),
        ("played_ratio_pct", pa.uint16()),
        ("track_length_seconds", pa.uint32()),
    ]
)
YAMBDA = dataset("yambda")


def write_yambda(folder: Path, days: int) -> pa.Table:
    """Write flat/50m/multi_event.parquet, sorted by user and time as it is published.

    User 0 has the longest history.
    """
    rng = np.random.default_rng(11)
    uid = np.repeat(np.arange(5, dtype=np.uint32) * 100, [LONGEST, 300, 200, 100, 50])
    timestamp = np.concatenate(
        [np.sort(rng.integers(0, days * DAY // STEP, np.sum(uid == user))) * STEP for user in np.unique(uid)]
    )
    kind = rng.choice(5, len(uid), p=[0.9, 0.06, 0.02, 0.01, 0.01])
    listen = kind == 0
    table = pa.table(
        [
            pa.array(uid),
            pa.array(timestamp.astype(np.uint32)),
            pa.array(rng.integers(1, 3_000, len(uid)).astype(np.uint32)),
            pa.array(rng.integers(0, 2, len(uid)).astype(np.uint8)),
            pa.DictionaryArray.from_arrays(pa.array(kind.astype(np.int8)), KINDS),
            pa.array(rng.integers(0, 101, len(uid)).astype(np.uint16), mask=~listen),
            pa.array(rng.integers(30, 400, len(uid)).astype(np.uint32), mask=~listen),
        ],
        schema=SCHEMA,
    )
    (folder / "flat" / "50m").mkdir(parents=True)
    pq.write_table(table, folder / "flat" / "50m" / "multi_event.parquet", row_group_size=10_000)
    for kind in ("artist", "album"):
        mapping = pa.table(
            {f"{kind}_id": pa.array([7, 8, 9], pa.uint32()), "item_id": pa.array([1, 1, 2], pa.uint32())}
        )  # item 1 has two of them
        pq.write_table(mapping, folder / f"{kind}_item_mapping.parquet")
    return table


@pytest.mark.spark
def test_events_and_sequences_of_yambda(tmp_path):
    days, dt = 3, "2024-01-03"
    table = write_yambda(tmp_path / "raw", days)
    raw, store = RawLocation(str(tmp_path / "raw")), TableStore(str(tmp_path / "w"), "yambda")
    summary = build_events(store, YAMBDA, raw, Build(dt, "a", days, 1, 0.0))
    assert (summary["rows_read"], summary["events"], summary["duplicates"], summary["quarantined"]) == (
        table.num_rows,
        table.num_rows,
        0,
        0,
    )
    for day in store.staged_days("a", "events"):
        store.publish("a", "events", day)
    events = pa.concat_tables([store.read(store.require("events", day)) for day in Window(dt, 2, days).event_days])
    listen = events["feedback"].to_numpy() & 1 == 1
    share = events["watch_time_ms"].to_numpy()[listen] / events["duration_ms"].to_numpy()[listen]
    assert (events["feedback"].to_numpy()[listen] >> 1 & 1).tolist() == (share >= 0.499999).tolist()
    raw_ratio = np.sort(table["played_ratio_pct"].drop_null().to_numpy())
    assert np.rint(np.sort(share) * 100).astype(int).tolist() == raw_ratio.tolist()
    assert (events["watch_time_ms"].to_numpy()[~listen] == 0).all()
    assert events["event_time_ms"].to_numpy().min() // 86_400_000 == 19_723  # 2024-01-01: the origin
    assert set(events["context"].to_pylist()) == {0, 1}

    build_sequences(store, YAMBDA, raw, Window(dt, 2, days), "a")
    store.publish("a", "items", dt)
    store.publish("a", "sequences", dt)
    items = {
        row["item_id"]: (row["artist_id"], row["album_id"])
        for row in store.read(store.require("items", dt)).to_pylist()
    }
    assert (items[1], items[2], items[3]) == ((7, 7), (9, 9), (None, None))
    rows = {row["user_id"]: row for row in store.read(store.require("sequences", dt)).to_pylist()}
    assert set(rows) == {0, 100, 200, 300, 400}
    longest = rows[0]
    assert len(longest["history_item_index"]) > 0.9 * LONGEST
    assert max(longest["target_history_end"]) > 0.9 * LONGEST  # no target's history was cut
    assert set(longest["target_label"]) == {0, 1}


def test_its_layout_without_its_types_is_named(tmp_path):
    from etl.stage.errors import StageError

    pq.write_table(
        pa.table(
            {
                "uid": [1],
                "timestamp": [5],
                "item_id": [1],
                "is_organic": [0],
                "event_type": ["listen"],
                "played_ratio": [1],
                "track_length_seconds": [3],
            }
        ),
        tmp_path / "multi_event.parquet",
    )
    raw = RawLocation(str(tmp_path))
    with pytest.raises(StageError, match="lacks the column played_ratio_pct"):
        raw.header(raw.logs(YAMBDA)[0], YAMBDA.logs)


@pytest.mark.parametrize(
    ("events", "says"),
    [
        (
            {"watch_time": {"column": "played_ratio_pct", "unit": "percent"}, "duration": None},
            "percent needs events.duration",
        ),
        ({"duration": {"column": "track_length_seconds", "unit": "percent"}}, "only watch_time"),
    ],
)
def test_a_share_is_one_of_a_duration(events, says):
    with pytest.raises(ValueError, match=says):
        type(YAMBDA).model_validate(YAMBDA.model_dump() | {"events": YAMBDA.events.model_dump() | events})

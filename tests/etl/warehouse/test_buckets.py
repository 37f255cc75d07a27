"""Users spread over buckets whatever their ids look like, and days of different layouts give each user once."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.datasets.definition import DatasetDefinition
from etl.ingest.raw import hashed_ids
from etl.stage.errors import StageError
from etl.warehouse.buckets import HASHES, Layout, common_layout, parts_by_bucket, read_bucket
from etl.warehouse.schemas import EVENTS, schema_fingerprint
from etl.warehouse.store import Manifest, TableStore

USERS = 200_000
COUNT = np.arange(USERS, dtype=np.int64)
IDS = {
    "sequential": COUNT + 1,
    "even": 2 * COUNT,
    "shifted by 40 bits": (COUNT % (1 << 22)) << 40,
    "snowflake": ((1_700_000_000_000 + COUNT * 37) << 22) | ((COUNT % 32) << 12),
    "multiples of 4,096": COUNT * 4_096,
    "hashed texts": hashed_ids(pa.array([f"user-{i}" for i in range(USERS)])),
    "negative": -COUNT,
    "round": COUNT * 1_000_000,
}


@pytest.mark.parametrize("buckets", [2, 3, 16, 64, 256])
@pytest.mark.parametrize("kind", IDS)
def test_each_bucket_holds_about_the_mean(kind, buckets):
    held = np.bincount(Layout(buckets).bucket_of(IDS[kind]), minlength=buckets)
    mean = USERS / buckets
    assert len(held) == buckets
    assert np.abs(held - mean).max() < 5 * np.sqrt(mean)  # of a fair spread one bucket in a million lies beyond


def test_the_bucket_of_a_user_never_changes():
    # Published days lie by it: another result would tear users apart.
    assert Layout(64).bucket_of(np.array([0, 1, 2, 1 << 40, -1, 7_412_408_520_282_046_469])).tolist() == [
        47,
        1,
        14,
        9,
        32,
        45,
    ]
    assert Layout(64, "product").bucket_of(np.array([1, 2, 3])).tolist() == [28, 57, 22]


@settings(max_examples=30)
@given(
    layouts=st.lists(
        st.builds(Layout, st.sampled_from([1, 2, 3, 4, 6, 8, 16]), st.sampled_from(sorted(HASHES))),
        min_size=1,
        max_size=4,
    ),
    users=st.lists(st.integers(0, 2**62), min_size=1, max_size=40, unique=True),
    seed=st.integers(0, 99),
)
def test_days_of_any_layouts_give_every_row_once_in_the_order_of_days(tmp_path_factory, layouts, users, seed):
    store = TableStore(str(tmp_path_factory.mktemp("w")), "d")
    rng, days = np.random.default_rng(seed), []
    for number, layout in enumerate(layouts):
        who = np.sort(rng.choice(users, rng.integers(0, len(users) + 1), replace=False))
        rows = pa.table(
            {
                f.name: pa.array(
                    np.full(len(who), number)
                    if f.name == "event_time_ms"
                    else who
                    if f.name == "user_id"
                    else np.zeros(len(who)),
                    f.type,
                )
                if f.name != "is_random"
                else pa.array(np.zeros(len(who), bool))
                for f in EVENTS
            },
            schema=EVENTS,
        )
        bucket = layout.bucket_of(who) if len(who) else np.zeros(0, np.int32)
        work = store.begin_try("a", ["events"], [f"2024-01-0{number + 1}"])
        files = tuple(
            store.write_file(work, "events", f"2024-01-0{number + 1}", b, rows.filter(pa.array(bucket == b)))
            for b in sorted(set(bucket.tolist()))
        )
        days.append(Manifest("d", "events", f"2024-01-0{number + 1}", "a", "s", "v", files, settings=layout.settings()))
    chosen = common_layout(days)
    found = []
    for bucket, parts in parts_by_bucket(days, chosen).items():
        rows = read_bucket(store, parts, bucket, chosen)
        assert (chosen.bucket_of(rows["user_id"].to_numpy()) == bucket).all()
        assert (np.diff(rows["event_time_ms"].to_numpy()) >= 0).all()
        narrow = read_bucket(store, parts, bucket, chosen, ["event_time_ms"])
        assert narrow.column_names == ["event_time_ms"]
        assert narrow.equals(rows.select(["event_time_ms"]))
        found += zip(rows["event_time_ms"].to_pylist(), rows["user_id"].to_pylist(), strict=True)
    written = [(number, user) for number, day in enumerate(days) for user in store.read(day)["user_id"].to_pylist()]
    assert sorted(found) == sorted(written)


def test_days_of_one_layout_are_read_file_by_file():
    from etl.warehouse.store import DataFile

    day = Manifest(
        "d",
        "events",
        "2024-01-01",
        "a",
        "s",
        "v",
        tuple(DataFile(b, 1, 1, str(b), str(b)) for b in (0, 2, 5)),
        settings=Layout(8).settings(),
    )
    assert {b: [(p.file.bucket, p.mixed) for p in parts] for b, parts in parts_by_bucket([day], Layout(8)).items()} == {
        b: [(b, False)] for b in (0, 2, 5)
    }
    # Twice as many buckets hold halves of these; half as many hold them whole.
    assert [(p.file.bucket, p.mixed) for p in parts_by_bucket([day], Layout(4))[1]] == [(5, False)]
    assert [(p.file.bucket, p.mixed) for p in parts_by_bucket([day], Layout(16))[10]] == [(2, True)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"buckets": "many"}, {"buckets": 0}, {"buckets": None}, {"buckets": 4, "bucket_hash": "of tomorrow"}],
    ids=str,
)
def test_a_layout_that_is_not_known_is_one_clear_error(settings):
    day = Manifest("shop", "events", "2024-01-01", "a", "s", "v", (), settings=settings)
    with pytest.raises(StageError, match=r"the manifest of shop/events dt=2024-01-01 has .* buckets by the hash"):
        Layout.of(day)


def test_rows_cut_into_buckets_are_each_users_in_the_order_that_they_had():
    from etl.jobs.rebucket import cut

    user = [5, 5, 2, 2, 2, 9, 4]
    rows = pa.table({"user_id": pa.array(user, pa.int64()), "place": list(range(7))})
    found = cut(rows, Layout(4))
    assert [bucket for bucket, _ in found] == sorted({int(b) for b in Layout(4).bucket_of(np.array(user))})
    for bucket, part in found:
        assert set(Layout(4).bucket_of(part["user_id"].to_numpy()).tolist()) == {bucket}
        assert part["user_id"].to_pylist() == sorted(part["user_id"].to_pylist())
    of_user = {
        u: [p for _, part in found for p in part.filter(pa.array(part["user_id"].to_numpy() == u))["place"].to_pylist()]
        for u in set(user)
    }
    assert of_user == {5: [0, 1], 2: [2, 3, 4], 9: [5], 4: [6]}
    assert cut(rows.slice(0, 0), Layout(4)) == []


def test_rows_of_another_definition_get_its_signals_and_columns():
    from etl.jobs.rebucket import Conform

    old = pa.table(
        {f.name: pa.array([1, 2], f.type) if f.name != "is_random" else pa.array([True, False]) for f in EVENTS},
        schema=EVENTS,
    )
    old = old.set_column(3, "feedback", pa.array([0b011, 0b110], pa.int16())).append_column(
        "gone", pa.array(["a", "b"])
    )
    schema = pa.schema([*EVENTS, pa.field("new", pa.float64())])
    # The first signal became the third, the second is gone, the third became the first.
    now = Conform(((0, 2), (2, 0)), schema, "digest", "c,b,a")(old)
    assert now["feedback"].to_pylist() == [0b100, 0b001]
    assert now.column_names == schema.names
    assert now["new"].to_pylist() == [None, None]
    assert now["user_id"].equals(old["user_id"])


def shop(signal: str, kind: str = "category") -> DatasetDefinition:
    """Four columns of one file; the field `category` is of that kind."""
    return DatasetDefinition.model_validate(
        {
            "name": "shop",
            "title": "Shop",
            "first_day": "2024-03-01",
            "logs": {
                "files": ["a.csv"],
                "columns": dict.fromkeys(("user", "item", "at", "act", "cat"), "integer"),
            },
            "events": {
                "user": "user",
                "item": "item",
                "time": {"column": "at", "unit": "seconds"},
                "signals": {signal: {"column": "act", "equals": 1}},
                "item_fields": {"category": {"column": "cat", "kind": kind}},
            },
            "targets": {"label": signal},
        }
    )


@pytest.mark.spark
def test_an_adopted_day_is_other_data_and_a_field_of_another_type_is_refused(tmp_path, capsys):
    """What was made from the day under its old definition is stale then, also when the day had been cut anew before."""
    from etl.datasets.rows_digest import rows_digest
    from etl.ingest.event_rows import events_schema
    from etl.ingest.freshness import same_rows
    from etl.jobs.rebucket import rebucket

    before, day = shop("buy"), "2024-03-01"
    store = TableStore(str(tmp_path), "shop")
    schema = events_schema(before)
    rows = pa.table(
        {f.name: pa.array(["c"] * 4 if f.name == "category" else [1, 2, 3, 4]).cast(f.type) for f in schema},
        schema=schema,
    )
    work = store.begin_try("a", ["events"], [day])
    settings = {"definition": rows_digest(before), "signals": "buy", **Layout(1).settings()}
    store.write_staged_manifest(
        work,
        Manifest(
            "shop",
            "events",
            day,
            "a",
            schema_fingerprint(schema),
            "v",
            (store.write_file(work, "events", day, 0, rows),),
            settings=settings,
        ),
    )
    first = store.publish("a", "events", day)
    [cut] = rebucket(store, before, [day], "b", buckets=2)
    assert first.data_digest in same_rows(cut)
    with pytest.raises(
        StageError, match=r"field category is string in what is published, and double by the definition"
    ):
        rebucket(store, shop("buy", "number"), [day], "c", adopt=True)
    assert store.require("events", day) == cut
    [adopted] = rebucket(store, shop("order"), [day], "d", adopt=True)
    assert same_rows(adopted) == {adopted.data_digest} and first.data_digest not in same_rows(adopted)
    said = capsys.readouterr().out
    assert "signal(s) buy are not in the definition any more" in said and "the label order is 0 on all of them" in said

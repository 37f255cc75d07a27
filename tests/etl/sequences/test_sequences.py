"""Histories: strictly earlier than their target, once a user, trimmed and cut as configured."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.datasets.definition import DatasetDefinition, History, Positions, dataset
from etl.sequences.items import counted, item_rows, merged
from etl.sequences.sequence_rows import item_indices, sequence_rows, watch_bucket
from etl.warehouse.partitions import MS_PER_DAY, Window, day_number
from etl.warehouse.schemas import EVALUATION, EVENTS, TRAIN, WATCH_BUCKETS
from training.data import Sequences

DT = "2022-04-21"
WINDOW = Window(DT, target_days=3, lookback_days=6)
FIRST_MS = day_number(WINDOW.event_days[0]) * MS_PER_DAY


def events_table(rows: list[tuple[int, int, int, int]]) -> pa.Table:
    """Rows of (user, item, time, feedback), sorted as the events table is: days in order, each by user and time."""
    rows = sorted(rows, key=lambda r: (r[2] // MS_PER_DAY, r[0], r[2], r[1]))
    user, item, time_ms, feedback = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    n = len(rows)
    return pa.table(
        {
            "user_id": user,
            "item_id": item,
            "event_time_ms": time_ms,
            "feedback": feedback,
            "watch_time_ms": [500] * n,
            "duration_ms": [1000] * n,
            "context": [1] * n,
            "is_random": [i % 3 == 0 for i in item],
        },
        schema=EVENTS,
    )


KUAIRAND = dataset("kuairand")


def build(rows, history: History | None = None, definition: DatasetDefinition = KUAIRAND):
    table = events_table(rows)
    items, counts = np.unique(table["item_id"].to_numpy(), return_counts=True)
    definition = definition.model_copy(update={"history": history or definition.history})
    return sequence_rows(table, items, counts, {}, WINDOW, definition), items


# A coarse clock, so that pages of one time are common.
logs = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 6 * 24 - 1), st.integers(0, 3)), max_size=120
).map(lambda rows: [(u, i, FIRST_MS + hour * 3_600_000, f) for u, i, hour, f in rows])


@settings(max_examples=60)
@given(
    rows=logs,
    cutoff=st.sampled_from(["event", "day_start"]),
    lag=st.sampled_from([0, 3_600_000, 5 * 3_600_000]),
    most=st.sampled_from([1, 3, 1000]),
)
def test_every_target_sees_exactly_the_latest_events_strictly_before_it(rows, cutoff, lag, most):
    (table, counts), _items = build(rows, History(cutoff=cutoff, availability_lag_ms=lag, max_events=most))
    first_target_ms = day_number(WINDOW.first_target_dt) * MS_PER_DAY
    seen_targets = 0
    for row in table.to_pylist():
        mine = sorted((r for r in rows if r[0] == row["user_id"]), key=lambda r: (r[2], r[1]))
        seen_targets += len(row["target_time_ms"])
        for j, time_ms in enumerate(row["target_time_ms"]):
            end = row["target_history_end"][j]
            got = row["history_time_ms"][max(0, end - most) : end]
            cut = (time_ms if cutoff == "event" else time_ms // MS_PER_DAY * MS_PER_DAY) - lag
            assert got == [r[2] for r in mine if r[2] < cut][-most:]
            assert all(t < time_ms for t in row["history_time_ms"][:end])
        assert row["history_time_ms"] == sorted(row["history_time_ms"])
        assert len(row["history_item_index"]) == len(row["history_feedback"]) == len(row["history_watch_bucket"])
    assert seen_targets == counts["targets"] == sum(r[2] >= first_target_ms for r in rows)
    assert counts["train_targets"] + counts["eval_targets"] == counts["targets"]
    first_evaluation_ms = day_number(WINDOW.first_evaluation_dt) * MS_PER_DAY
    for row in table.to_pylist():
        assert row["target_split"] == [EVALUATION if t >= first_evaluation_ms else TRAIN for t in row["target_time_ms"]]


@settings(max_examples=150)
@given(
    rows=logs,
    cutoff=st.sampled_from(["event", "day_start"]),
    lag=st.sampled_from([0, 3_600_000, 30 * 3_600_000]),
    most=st.sampled_from([1, 2, 5, 1000]),
    of=st.sampled_from([None, KUAIRAND.feedback_fields[:1], KUAIRAND.feedback_fields[:2]]),
    target_of=st.sampled_from([None, KUAIRAND.feedback_fields[1:2]]),
    positions=st.sampled_from([None, Positions(train=(-4, -3), validation=(-2,), evaluation=(-1,))]),
)
def test_what_a_model_reads_of_each_target_is_what_the_rule_says(rows, cutoff, lag, most, of, target_of, positions):
    targets = KUAIRAND.targets.model_copy(update={"of": target_of, "positions": positions})
    definition = KUAIRAND.model_copy(update={"targets": targets})
    history = History(of=of, cutoff=cutoff, availability_lag_ms=lag, max_events=most)
    (table, counts), items = build(rows, history, definition)
    flat = Sequences.from_arrow(table, most)
    bits = {name: 1 << bit for bit, name in enumerate(KUAIRAND.feedback_fields)}
    truncated = 0
    for user, row in enumerate(table.to_pylist()):
        mine = sorted((r for r in rows if r[0] == row["user_id"]), key=lambda r: (r[2], r[1]))
        past = [r for r in mine if of is None or any(r[3] & bits[name] for name in of)]
        here = flat.targets_of(user)
        for target, time_ms in zip(range(here.start, here.stop), row["target_time_ms"], strict=True):
            before = [
                r for r in past if r[2] < (time_ms if cutoff == "event" else time_ms // MS_PER_DAY * MS_PER_DAY) - lag
            ]
            seen = slice(
                *(int(flat.history_start[user] + place[target]) for place in (flat.target_first, flat.target_end))
            )
            got = zip(
                items[flat.history_item[seen]],
                flat.history_time_ms[seen],
                flat.history_interaction[seen] // WATCH_BUCKETS,
                strict=True,
            )
            assert list(got) == [(r[1], r[2], r[3]) for r in before[-most:]]
        truncated += len(before) > most  # of the last target, hence of any
        # Stored are max_events and what lies between the first and the last target, no more.
        first_end, last_end = row["target_history_end"][0], row["target_history_end"][-1]
        assert len(row["history_time_ms"]) == last_end <= min(first_end, most) + (last_end - first_end)
    assert truncated == counts["truncated_users"]


def test_a_target_never_sees_its_own_page():
    now = FIRST_MS + 5 * MS_PER_DAY
    (table, _), _ = build([(1, 10, now - 1, 1), (1, 11, now, 1), (1, 12, now, 1), (1, 13, now, 0)])
    [row] = table.to_pylist()
    assert row["target_time_ms"] == [now - 1, now, now, now]
    assert row["target_history_end"] == [0, 1, 1, 1]


def test_labels_items_and_who_exposed_them_follow_their_events():
    now = FIRST_MS + 5 * MS_PER_DAY
    (table, _), items = build([(1, 30, now, 1), (1, 20, now + 1, 2), (2, 20, now, 3)])
    first, second = table.to_pylist()
    assert [items[i] for i in first["target_item_index"]] == [30, 20]
    assert (first["target_label"], second["target_label"]) == ([1, 0], [1])
    assert (first["target_is_random"], second["target_is_random"]) == ([True, False], [False])


def test_users_without_a_target_have_no_row():
    (table, counts), _ = build([(1, 10, FIRST_MS, 1), (2, 10, FIRST_MS + 5 * MS_PER_DAY, 1)])
    assert table["user_id"].to_pylist() == [2]
    assert counts["users"] == 1


@settings(max_examples=50)
@given(
    ids=st.lists(st.one_of(st.integers(0, 30), st.integers(-(2**62), 2**62)), min_size=1, max_size=30),
    draws=st.lists(st.integers(0, 10**6), max_size=50),
)
def test_items_are_found_whether_their_ids_are_dense_or_hashes(ids, draws):
    known = np.unique(np.array(ids, dtype=np.int64))
    item = known[np.array(draws, dtype=np.int64) % len(known)]
    assert (known[item_indices(item, known)] == item).all()
    table = pa.table({"item_id": item, "event_time_ms": np.arange(len(item)), "x": item})
    found = counted(table, 3, {})[""]
    values, counts = np.unique(item, return_counts=True)
    assert (found["item_id"].to_pylist(), found["occurrences"].to_pylist()) == (values.tolist(), counts.tolist())
    assert sum(found["train_occurrences"].to_pylist()) == min(3, len(item))


def test_watch_buckets():
    watched = np.array([0, 10, 100, 1000, 5000, 700])
    duration = np.array([1000, 1000, 1000, 1000, 1000, 0])
    assert watch_bucket(watched, duration).tolist() == [1, 2, 3, 7, 9, 0]


def test_items_are_dense_sorted_and_joined_to_their_first_fields():
    counts = {"": pa.table({"item_id": [2, 5, 9], "occurrences": [1, 2, 3], "train_occurrences": [1, 2, 0]})}
    fields = pa.table(
        {
            "video_id": ["9", "2", "2"],
            "author_id": ["7", "", "8"],
            "video_duration": ["87433.0", "", "1"],
            "video_type": ["AD", "NORMAL", "X"],
            "upload_type": ["a", "b", "c"],
            "tag": ["12,65", "", "3"],
        }
    )
    rows = item_rows(counts, [fields], KUAIRAND).to_pylist()
    assert [r["item_index"] for r in rows] == [0, 1, 2]
    assert (rows[0]["author_id"], rows[0]["item_type"], rows[0]["categories"]) == (None, "NORMAL", [])
    assert rows[1]["item_type"] is None
    assert (rows[2]["author_id"], rows[2]["duration_ms"], rows[2]["categories"]) == (7, 87433, ["12", "65"])


occurrences = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 50), st.sampled_from([None, "a", "b", "c"])), min_size=1, max_size=60
)


@settings(max_examples=50)
@given(rows=occurrences, cuts=st.lists(st.integers(0, 60), max_size=3))
def test_an_item_has_the_latest_value_before_the_evaluation_however_the_log_is_cut(rows, cuts):
    table = pa.table(
        {
            "item_id": pa.array([r[0] for r in rows], pa.int64()),
            "event_time_ms": pa.array([r[1] for r in rows], pa.int64()),
            "category": pa.array([r[2] for r in rows], pa.string()),
        }
    )
    tmall = dataset("tmall")
    rule = {"category": tmall.item_fields["category"]}
    edges = [0, *sorted(min(c, len(rows)) for c in cuts), len(rows)]
    parts = [counted(table.slice(a, b - a), 25, rule) for a, b in itertools.pairwise(edges)]
    definition = tmall.model_copy(update={"items": (), "events": tmall.events.model_copy(update={"item_fields": rule})})
    found = {r["item_id"]: r for r in item_rows(merged(parts), [], definition).to_pylist()}
    for item in {r[0] for r in rows}:
        mine = [r for r in rows if r[0] == item]
        known = [(time < 25, time, value) for _, time, value in mine if value is not None]
        assert found[item]["category"] == (max(known)[2] if known else None)
        assert found[item]["train_occurrences"] == sum(time < 25 for _, time, _ in mine)

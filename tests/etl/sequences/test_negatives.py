"""Sampled negatives: never what the user had met, the same on every run, as popular as asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.datasets.definition import Negatives, Positions, dataset
from etl.sequences.items import counted
from etl.sequences.sequence_rows import sequence_rows, target_splits
from etl.warehouse.partitions import MS_PER_DAY, day_number
from etl.warehouse.schemas import EVALUATION, TRAIN, VALIDATION
from tests.etl.sequences.test_sequences import DT, FIRST_MS, WINDOW, events_table

KUAIRAND = dataset("kuairand")
EVALUATION_MS = day_number(WINDOW.first_evaluation_dt) * MS_PER_DAY


def sampled(rows, history=None, **rule):
    definition = KUAIRAND.model_copy(
        update={
            "targets": KUAIRAND.targets.model_copy(update={"label": None, "negatives": Negatives(**rule)}),
            "history": KUAIRAND.history.model_copy(update=history or {}),
        }
    )
    table = events_table(rows)
    counts = counted(table, EVALUATION_MS, {})[""]
    items = counts["item_id"].to_numpy()
    found, figures = sequence_rows(table, items, counts["train_occurrences"].to_numpy(), {}, WINDOW, definition)
    return found.to_pylist(), figures, items


logs = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 14), st.integers(0, 6 * 24 - 1)), min_size=1, max_size=80
).map(lambda rows: [(u, i, FIRST_MS + hour * 3_600_000, 1) for u, i, hour in rows])


@settings(max_examples=100)
@given(rows=logs, per_positive=st.integers(1, 4), way=st.sampled_from(["popularity", "uniform"]))
def test_a_negative_is_no_item_that_the_user_had_met(rows, per_positive, way):
    found, figures, items = sampled(rows, per_positive=per_positive, draw={way: 1.0})
    targets = 0
    for row in found:
        first_met = {}
        for user, item, time_ms, _ in sorted(rows, key=lambda r: r[2]):
            if user == row["user_id"]:
                first_met.setdefault(item, time_ms)
        positive = None
        for index, time_ms, label in zip(
            row["target_item_index"], row["target_time_ms"], row["target_label"], strict=True
        ):
            targets += 1
            if label:
                positive = items[index]
            else:
                assert items[index] != positive
                assert first_met.get(items[index], np.inf) > time_ms
    assert targets == figures["targets"]
    positives = sum(sum(row["target_label"]) for row in found)
    assert figures["negatives"] + figures["negatives_missing"] == positives * per_positive


def test_draws_hang_on_partition_and_user_and_on_nothing_else():
    rng = np.random.default_rng(0)
    rows = [
        (int(u), int(i), FIRST_MS + int(h) * 3_600_000, 1)
        for u, i, h in zip(rng.integers(0, 5, 200), rng.integers(0, 40, 200), rng.integers(0, 143, 200), strict=True)
    ]
    once, _, items = sampled(rows, per_positive=2)
    again, _, _ = sampled(list(reversed(rows)), per_positive=2)
    assert once == again
    other, _, _ = sampled(rows, per_positive=2, seed=8)
    assert once != other
    # Another user's rows elsewhere change nothing, as long as the items and their counts stay: buckets agree.
    alone = [row for row in once if row["user_id"] == 3]
    swapped = [(u if u == 3 else u + 10, i, t, f) for u, i, t, f in rows]
    assert [row for row in sampled(swapped, per_positive=2)[0] if row["user_id"] == 3] == alone
    assert len(items) == 40


def test_popular_items_are_drawn_as_often_as_they_occur():
    # One active user against a crowd that met item 0 nine times as often as item 1.
    crowd = [(100 + k, 0 if k % 10 else 1, FIRST_MS + k, 1) for k in range(5_000)]
    mine = [(1, 50 + k, FIRST_MS + 5 * MS_PER_DAY + k, 1) for k in range(2_000)]
    found, _, items = sampled(crowd + mine, per_positive=1, draw={"popularity": 1.0})
    [row] = [r for r in found if r["user_id"] == 1]
    drawn = [items[i] for i, label in zip(row["target_item_index"], row["target_label"], strict=True) if not label]
    share = drawn.count(0) / (drawn.count(0) + drawn.count(1))
    assert share == pytest.approx(0.9, abs=0.03)


@settings(max_examples=50)
@given(rows=logs, planted=logs, way=st.sampled_from(["popularity", "uniform", "own_history"]))
def test_what_the_evaluation_day_alone_shows_changes_no_negative(rows, planted, way):
    # Other users meet new items (ids before all others, too) and old ones, on the evaluation day alone.
    crowd = [(90 + user, item - 7, EVALUATION_MS + time_ms % MS_PER_DAY, 1) for user, item, time_ms, _ in planted * 20]

    def targets(log):
        found, _, items = sampled(log, per_positive=2, draw={way: 1.0})
        return {r["user_id"]: items[r["target_item_index"]].tolist() for r in found if r["user_id"] < 90}

    assert targets(rows) == targets(rows + crowd)


def test_own_history_gives_items_of_the_users_past():
    mine = [(1, 10 + k, FIRST_MS + 5 * MS_PER_DAY + k, 1) for k in range(50)]
    found, _, items = sampled([*mine, (2, 999, FIRST_MS, 1)], per_positive=1, draw={"own_history": 1.0})
    [row] = found
    for j in range(2, len(row["target_label"]), 2):
        positive, negative = items[row["target_item_index"][j]], items[row["target_item_index"][j + 1]]
        assert 10 <= negative < positive
        assert row["target_is_random"][j : j + 2] == [positive % 3 == 0] * 2


@pytest.mark.parametrize("most", [1, 3])
def test_own_history_ends_where_the_targets_history_does(most):
    # The row stores all 59 for its later targets; a target's own history is the `most` items before it.
    mine = [(1, 10 + k, FIRST_MS + 3 * MS_PER_DAY + k, 1) for k in range(60)]
    found, figures, items = sampled(
        [*mine, (2, 999, FIRST_MS, 1)], history={"max_events": most}, per_positive=2, draw={"own_history": 1.0}
    )
    [row] = found
    assert figures["negatives"] > 100
    assert len(row["history_item_index"]) == 59
    positive = None
    for index, label in zip(row["target_item_index"], row["target_label"], strict=True):
        positive = items[index] if label else positive
        if positive > 10:  # the first has no past, so any item is drawn
            assert label or positive - most <= items[index] < positive


def test_a_user_who_met_everything_gets_none_and_is_counted():
    rows = [(1, k % 3, FIRST_MS + 5 * MS_PER_DAY + k, 1) for k in range(9)]
    _, figures, _ = sampled(rows, per_positive=1)
    assert figures["negatives_missing"] > 0
    assert figures["negatives"] + figures["negatives_missing"] == 9


def test_positions_choose_targets_from_the_end():
    tmall = dataset("tmall")
    rule = tmall.targets.model_copy(
        update={"min_events": 4, "positions": Positions(train=(-3, -5), validation=(-2,), evaluation=(-1,))}
    )
    definition = tmall.model_copy(update={"targets": rule})
    user = np.array([1] * 6 + [2] * 3 + [3] * 7)
    feedback = np.array(
        [1] * 6 + [1] * 3 + [1, 1, 2, 1, 2, 1, 1], dtype=np.int16
    )  # user 3: two carts, which are no targets
    split = target_splits(user, np.arange(16), feedback, WINDOW, definition)
    assert split[:6].tolist() == [-1, TRAIN, -1, TRAIN, VALIDATION, EVALUATION]
    assert split[6:9].tolist() == [-1, -1, -1]  # too few events
    assert split[9:].tolist() == [TRAIN, -1, -1, TRAIN, -1, VALIDATION, EVALUATION]
    assert DT == WINDOW.dt

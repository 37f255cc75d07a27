"""What a training sees, and when: every target once an epoch, the last day held out, a rate by the step alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.warehouse.partitions import MS_PER_DAY
from etl.warehouse.schemas import EVALUATION, TRAIN
from tests.training.conftest import DAY_MS, random_partition, vocabulary_of
from training.config import TrainConfig, load_config
from training.data import Joined, Sequences, split_targets
from training.loop import TrainingData, Worker, learning_rate, train_model
from training.user_batches import Epoch, UserBatches, dealt, hashed

ITEMS, ROWS = random_partition(users=11, longest=30, seed=3)
SEQUENCES = Sequences.from_arrow(ROWS)
# Every target is known from all others by its time.
SEQUENCES = dataclasses.replace(SEQUENCES, target_time_ms=DAY_MS + np.arange(len(SEQUENCES.target_item)))
JOINED = Joined.of(SEQUENCES, ITEMS, vocabulary_of(ITEMS, SEQUENCES))


def epoch(targets, rank=0, world=1, number=0, at_once=3, most=5, min_steps=1) -> Epoch:
    return UserBatches(JOINED, rank, world, at_once, seed=5).epoch(targets, number, most, min_steps)


def seen(batch) -> list[int]:
    return [] if batch is None else (batch.target_time_ms - DAY_MS).tolist()


def test_the_published_sweep_of_din_over_lengths_trains_on_rows_at_hand():
    config = dataclasses.replace(load_config("longctr_din"), epochs=1, max_epoch_steps=2)
    assert config.users_per_step * config.targets_per_visit == 8_192
    for length in (10, 10_000):
        data = TrainingData.of(Sequences.from_arrow(ROWS, length), ITEMS, config)
        model, result = train_model("din", data, config, Worker(), lambda _: None)
        assert np.isfinite(result.best_logloss) and model.config.width == 7 * 32


def test_a_first_look_takes_seconds_of_any_partition():
    config = load_config("tiny")
    assert config.max_epoch_steps is not None and config.max_epoch_steps * config.epochs <= 200
    targets = np.arange(len(SEQUENCES.target_item))
    batches = UserBatches(JOINED, 0, 1, 3, seed=5)
    whole, cut = batches.epoch(targets, 0, 5, 1), batches.epoch(targets, 0, 5, 1, 4)
    assert len(whole) > len(cut) == 4 and [seen(batch) for batch in cut] == [seen(whole[step]) for step in range(4)]


@settings(max_examples=60)
@given(
    chosen=st.sets(st.integers(0, len(SEQUENCES.target_item) - 1), min_size=1),
    world=st.integers(1, 3),
    at_once=st.integers(1, 5),
    most=st.integers(1, 9),
    number=st.integers(0, 3),
    data=st.data(),
)
def test_an_epoch_has_every_target_once_for_any_workers_and_from_any_point(chosen, world, at_once, most, number, data):
    targets = np.array(sorted(chosen))
    one = epoch(targets, number=number, at_once=at_once, most=most)
    whole = [seen(batch) for batch in one]
    assert Counter(target for batch in whole for target in batch) == Counter(targets.tolist())
    assert all(max(np.diff(batch.target_start)) <= most and len(batch.cut_offs) <= at_once for batch in one)
    # Workers, and whoever goes on in the middle, see the same global batches: with epochs of their own, asked afresh.
    start = data.draw(st.integers(0, len(one) - 1))
    for step in range(start, len(one)):
        parts = [epoch(targets, rank, world, number, at_once, most) for rank in range(world)]
        assert sorted(target for part in parts for target in seen(part[step])) == sorted(whole[step])
        items = JOINED.items.take(parts[-1].items(step))
        assert np.array_equal(items.rows["item_id"], one[step].items.rows["item_id"])


def test_parts_and_their_order_differ_by_epoch_and_pass_and_a_pass_is_whole():
    targets = np.arange(len(SEQUENCES.target_item))
    batches = [seen(batch) for batch in epoch(targets, min_steps=9)]
    assert len(batches) == 16  # 11 users in two visits each, three a step: passes of 8 steps
    passes = batches[:8], batches[8:]
    for found in passes:
        assert sorted(target for batch in found for target in batch) == targets.tolist()
    later = [seen(batch) for batch in epoch(targets, number=1)]
    users = [[{target // 8 for target in batch} for batch in found] for found in (*passes, later)]
    assert users[0] != users[1] != users[2] != users[0]
    parts = [{tuple(batch[i : i + 4]) for batch in found for i in range(0, len(batch), 4)} for found in passes]
    assert parts[0] != parts[1]


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    most=st.sampled_from([300, 70_000]),
    parts=st.integers(1, 40),
)
def test_targets_are_dealt_out_evenly_and_alike_whoever_else_is_dealt(counts, most, parts):
    count_U, keys = np.array(counts, np.int64), hashed(np.arange(len(counts)).astype(np.uint64))
    parts_U = np.clip(count_U, 1, parts)
    together = np.split(dealt(count_U, parts_U, keys, most), count_U.cumsum()[:-1])
    for user, found in enumerate(together):
        alone = slice(user, user + 1)
        assert np.array_equal(found, dealt(count_U[alone], parts_U[alone], keys[alone], most))
        assert np.array_equal(np.sort(found), np.arange(counts[user]))
        for part in np.array_split(found, parts_U[user]):  # the first ones have one more there, too
            assert (np.diff(part) > 0).all()


def test_which_targets_meet_in_a_visit_is_random():
    """Of two targets that are neighbours in time as of any others, the share that meets is that of even parts."""
    users, count, parts = 2_000, 64, 8
    keys = hashed(np.arange(users).astype(np.uint64))
    found = dealt(np.full(users, count), np.full(users, parts), keys, count).reshape(users, parts, count // parts)
    part_UT = np.empty((users, count), np.int64)
    np.put_along_axis(part_UT, found.reshape(users, count), np.arange(count) // (count // parts), axis=1)
    expected = (count / parts - 1) / (count - 1)
    for apart in (1, 2, 7, 32):
        met = (part_UT[:, apart:] == part_UT[:, :-apart]).mean()
        assert met == pytest.approx(expected, abs=5 * (expected / (users * (count - apart))) ** 0.5)


@given(days=st.lists(st.integers(-3, 3), min_size=1, max_size=88), share=st.sampled_from([0.2, 0.5]))
def test_validation_is_the_last_training_day_and_never_before_training(days, share):
    day = np.resize(days, len(SEQUENCES.target_item))
    sequences = dataclasses.replace(
        SEQUENCES,
        target_time_ms=DAY_MS + day * MS_PER_DAY + np.arange(len(day)),
        target_split=np.where(day >= 2, EVALUATION, TRAIN).astype(np.int8),
    )
    split = split_targets(sequences, share, seed=1)
    assert np.array_equal(np.sort(np.concatenate([split.train, split.validation, split.evaluation])), np.arange(88))
    trained = set(day[day < 2])
    if len(trained) > 1:
        assert set(day[split.validation]) == {max(trained)}
        assert set(day[split.train]) == trained - {max(trained)}
        assert split.held_out.startswith("those of the last training day, 2022-04-")
    elif trained:
        assert split.held_out.startswith(f"a random {share:.0%}")


@pytest.mark.parametrize("end", [0.0, 0.1, 1.0])
def test_the_learning_rate_rises_falls_by_a_cosine_and_hangs_on_the_step_alone(end):
    config = TrainConfig(learning_rate=2.0, learning_rate_warmup_steps=10, learning_rate_end=end)
    rates = [learning_rate(config, step, 110) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0 + end)
    assert rates[110] == pytest.approx(2.0 * end)
    assert all(late <= early + 1e-12 for early, late in itertools.pairwise(rates[10:]))
    assert learning_rate(config, 500, 110) == pytest.approx(2.0 * end)
    assert learning_rate(dataclasses.replace(config, learning_rate_warmup_steps=0), 0, 110) == 2.0


def test_a_short_training_comes_to_its_rate_and_falls_again_and_a_long_one_is_as_it_was():
    short = TrainConfig(learning_rate=2.0, learning_rate_warmup_steps=500)
    rates = [learning_rate(short, step, 310) for step in range(310)]
    assert rates[154:156] == pytest.approx([2.0, 2.0]) and rates[-1] < 0.01
    assert [learning_rate(short, 0, planned) for planned in (1, 2)] == [2.0, 2.0]
    usual = load_config("default")
    assert usual.learning_rate_warmup_steps <= usual.epochs * usual.min_epoch_steps // 2  # nothing is cut off


@pytest.mark.parametrize("name", ["kuairand_1k", "large"])
def test_a_configuration_for_gpus_trains_what_fits_here(name):
    config = dataclasses.replace(load_config(name), min_epoch_steps=1, epochs=1, users_per_step=4, targets_per_visit=4)
    data = TrainingData.of(Sequences.from_arrow(ROWS), ITEMS, config)
    for model in config.models:
        ended = train_model(model, data, config, Worker(), lambda result: None)[1]
        assert np.isfinite(ended.best_logloss)
    assert config.auc_seed_sd is None  # measured on simulated rows alone

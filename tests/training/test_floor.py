"""The counted floor of a step, and the share of it that a training's lines say.

python -m pytest --noconftest tests/training/test_floor.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.partitions import random_partition, vocabulary_of
from tests.training.test_loop import planted, small_config
from training import loop
from training.config import ModelConfig
from training.data import Chosen, Joined, Sequences, make_batch
from training.device_batches import DeviceRows
from training.floor import CARDS, Card, Counts, card_of, least_ms
from training.loop import COLD, Start, Taken, Training, Worker
from training.pace import Pace

H100 = CARDS["NVIDIA H100 80GB HBM3"]
EXACT, VQL = ModelConfig(interest="softmax_attention", codes=128), ModelConfig(codes=128)
NO_LIMIT = float("inf")


def test_the_floor_counts_the_bytes_of_every_event():
    only_bytes = Card({"bf16": NO_LIMIT, "tf32": NO_LIMIT}, NO_LIMIT, NO_LIMIT, bytes=1e9)
    counts = Counts(targets=8, events=200, pairs=700, segments=4)
    # 14 of the row; key and value of 64 numbers each, read twice as bf16, their gradients written as fp32.
    exact = 200 * (14 + 2 * 64 * (2 * 2 + 4)) + 28 * 1_000
    assert least_ms(only_bytes, counts, EXACT, "bf16", 1_000) == pytest.approx(exact / 1e6)
    # No keys: a code for each of four groups. Cheapest without tables of segments.
    codes = 200 * (14 + 2 * 4 + 64 * (2 * 4 + 4)) + 28 * 1_000
    assert least_ms(only_bytes, counts, VQL, "tf32", 1_000) == pytest.approx(codes / 1e6)


def test_the_floor_counts_every_pair_that_is_seen():
    only_pairs = Card({"bf16": NO_LIMIT}, exponentials=1e9, lanes=NO_LIMIT, bytes=NO_LIMIT)
    counts = Counts(targets=21, events=150, pairs=1_003, segments=9)
    assert least_ms(only_pairs, counts, EXACT, "bf16", 0) == pytest.approx(3 * EXACT.heads * 1_003 / 1e6)
    products = replace(only_pairs, flops={"bf16": 1e12}, exponentials=NO_LIMIT)
    head = 21 * 6 * (192 * 128 + 128 * 64 + 64)
    attention = 2 * 16 * 9 * EXACT.heads * 1_003
    assert least_ms(products, counts, EXACT, "bf16", 0) == pytest.approx((attention + head) / 1e9)


def of_long_histories(targets: int) -> Counts:
    """Return a batch of 32 users with 16,384 events each, of which a target sees nearly all."""
    return Counts(32 * targets, 32 * 16_384, 32 * targets * 15_600, 32 * 8)


def test_on_an_h100_bytes_bind_for_few_targets_instructions_for_many_and_vql_needs_neither():
    few, many, h200 = of_long_histories(64), of_long_histories(1_024), CARDS["NVIDIA H200"]
    exact_few, exact_many = (least_ms(H100, counts, EXACT, "bf16", 325_000) for counts in (few, many))
    assert 0.15 < exact_few < 0.2
    assert 1.5 < exact_many < 2.2
    assert least_ms(h200, few, EXACT, "bf16", 325_000) < 0.75 * exact_few  # whose memory is faster
    assert least_ms(h200, many, EXACT, "bf16", 325_000) == exact_many
    assert least_ms(H100, many, VQL, "bf16", 325_000) < exact_many / 10


def test_products_in_fp32_are_three_in_tf32_and_no_slower():
    # The fused kernels make them so; to count the fp32 units would put the floor above what a step can take.
    many = of_long_histories(1_024)
    floor_in = {precision: least_ms(H100, many, EXACT, precision, 0) for precision in ("fp32", "tf32")}
    assert floor_in["fp32"] <= 3 * floor_in["tf32"]


def test_groups_with_numbers_of_codes_of_their_own_count_each_its_part_of_the_width():
    counts = Counts(targets=32_768, events=131_072, pairs=32_768 * 4_096, segments=256)
    of_codes = [least_ms(H100, counts, ModelConfig(codes=codes), "bf16", 1) for codes in (64, (32, 32, 96, 96), 96)]
    assert of_codes[0] == of_codes[1] < of_codes[2]


def test_no_floor_is_given_for_a_kind_that_is_not_counted():
    windowed = ModelConfig(interest="recent_attention", recent_window=200)
    assert least_ms(H100, of_long_histories(2), windowed, "bf16", 1) is None


def test_what_is_counted_of_a_choice_is_what_the_batch_of_it_holds():
    items, rows = random_partition()
    sequences = Sequences.from_arrow(rows, max_events=25)  # so that some targets do not see the first events
    joined = Joined.of(sequences, items, vocabulary_of(items, sequences))
    starts = sequences.target_start
    for users in ([3, 1, 0, 5], [2], []):
        targets = [np.arange(starts[user], starts[user + 1])[:: 1 + user] for user in users]
        of_users = np.array(users, np.int64), targets
        batch = make_batch(joined, *of_users)
        seen = [end - first for first, end in zip(batch.target_first, batch.target_end, strict=True)]
        owner = np.repeat(users, [len(each) for each in targets])
        cut_offs = set(zip(owner.tolist(), batch.target_end.tolist(), strict=True))
        expected = Counts(len(batch.target_item), len(batch.event_item), sum(seen), len(cut_offs))
        assert Counts.of(batch) == expected
        assert Counts.of_chosen(Chosen.of(sequences, *of_users)) == expected
        assert batch.target_first.any() or len(users) < 2


@pytest.fixture(params=[True, False], ids=["rows on the device", "rows that travel"])
def known_card(request, monkeypatch):
    """A CPU that passes for an H100, which holds its rows or is sent those of a batch."""
    monkeypatch.setattr(loop, "card_of", lambda device: H100)
    monkeypatch.setattr(DeviceRows, "on_gpu", staticmethod(lambda *given: DeviceRows(*given, request.param)))


class Stop(Exception):
    """Ends a training at a step of the test's choice."""


@pytest.mark.usefixtures("known_card")
@pytest.mark.parametrize("name", ["vql", "softmax_attention"])
def test_a_training_has_the_floor_of_every_step_it_took_and_one_that_goes_on_of_its_own(name):
    data = planted(users=30, length=40, topics=4, seed=2)
    config = small_config(epochs=2, min_epoch_steps=12, warmup_steps=4, targets_per_visit=9)
    floors: list[float] = []
    taken: list[float] = []
    states: list[loop.TrainingState] = []

    def look(run: Training) -> None:
        batch = make_batch(data.joined, *run.order(run.epoch).visited(run.position - 1))
        moved = sum(p.numel() for p in run.model.parameters())
        floors.append(least_ms(H100, Counts.of(batch), config.models[name], "fp32", moved))
        taken.append(run.taken().least_ms)
        if run.step == 9:
            states.append(run.state())

    whole = Training(name, data, config, Worker(), COLD)
    for _ in range(2):
        whole.run_epoch(look)
    assert len(floors) > 20 and min(floors) > 0 and len(set(floors)) > 5
    whole.close()
    assert taken == pytest.approx(np.cumsum(floors))
    left, again = floors[9:].copy(), Training(name, data, config, Worker(), Start(states[0]))
    floors.clear()
    taken.clear()
    for _ in range(again.epoch, 2):
        again.run_epoch(look)
    again.close()
    assert floors == left
    assert taken == pytest.approx(np.cumsum(left))


def test_a_cpu_and_a_kind_that_is_not_counted_have_no_floor(monkeypatch):
    data = planted(users=12, length=30, topics=4, seed=2)
    assert card_of("cpu") is None
    monkeypatch.setattr(DeviceRows, "on_gpu", staticmethod(DeviceRows))
    for name, card in (("softmax_attention", None), ("mean_pooling", H100)):
        monkeypatch.setattr(loop, "card_of", lambda device, card=card: card)
        run = Training(name, data, small_config(min_epoch_steps=3), Worker(), COLD)
        run.run_epoch(None)
        run.close()
        assert run.step > 0 and run.taken().least_ms == 0


def lines_of(*each: Taken) -> tuple[list[str], list[Mapping[str, float]]]:
    """Return the lines and the figures of a pace that sees such sums at its lines."""
    said: list[str] = []
    logged: list[Mapping[str, float]] = []
    now = [0.0]
    pace = Pace("vql", 900, "cpu", said.append, lambda figures, step: logged.append(figures), lambda: now[0])
    for step, sums in enumerate(each, 1):
        pace.at(step, lambda sums=sums: sums)
        now[0] += 20.0
    return said, logged


def test_a_line_says_what_share_of_the_time_the_floor_is():
    sums = [Taken(5.0 * i, 0.0, 10.0 * i, 20.0 * i, 75.0 * i, 25.0 * i, 12.5 * i) for i in (1, 2, 4)]
    said, logged = lines_of(*sums)
    assert all("  device idle 25.0%  12.5% of the floor" in line for line in said) and len(said) == 2
    assert [figures["vql/share_of_floor"] for figures in logged] == [0.125, 0.125]
    said, logged = lines_of(*(each._replace(least_ms=0.0) for each in sums))  # a card whose datasheet is not here
    assert not any("floor" in text for text in (*said, *logged[0]))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or card_of("cuda") is None, reason="needs a GPU whose datasheet is here"
)
@pytest.mark.parametrize("resident", [True, False], ids=["rows on the device", "rows that travel"])
@pytest.mark.parametrize("name", ["vql", "softmax_attention"])
def test_a_gpu_takes_longer_than_the_floor(name, resident, monkeypatch):
    monkeypatch.setattr(DeviceRows, "on_gpu", staticmethod(lambda *given: DeviceRows(*given, resident)))
    data = planted(users=64, length=2_000, topics=4, seed=2)
    config = small_config(epochs=1, min_epoch_steps=60, users_per_step=32)
    run = Training(name, data, replace(config, bf16=True), Worker(device="cuda"), COLD)
    run.run_epoch(None)
    taken = run.taken()
    assert run.recorded is not None and run.recorded.recordings
    assert 0 < taken.least_ms / (taken.working_ms + taken.waiting_ms) < 1
    run.close()

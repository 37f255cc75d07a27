"""`make bench-train`: its last line answers what it is run for, and answers that cannot be wrong are worth nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import resumed, train_step
from benchmarks.floor import CARDS, Card, least_ms
from benchmarks.peer_steps import peer_batch
from benchmarks.resumed import resumes_to_the_bit
from benchmarks.train_loop import loop_rows
from benchmarks.train_step import MODELS, loop_summary, make_batch, peer_ratios
from etl.warehouse.schemas import TRAIN
from training.data import Sequences
from training.resume import Checkpoints

H100 = CARDS["NVIDIA H100 80GB HBM3"]
EXACT, VQL = MODELS["softmax_attention"], MODELS["vql"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_last_line_has_every_figure(capsys):
    sizes = ["--users", "2", "--lengths", "64,128,256", "--targets", "64,1024", "--cut-offs", "2", "--loop", "4"]
    train_step.main([*sizes, "--runs", "2", "--device", "cpu"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = [f"step_ms_{kind}_{targets}" for kind in ("exact", "vql") for targets in (64, 1_024)]
    for name in [*measured, "loop_samples_per_s", "fat_rows_ratio"]:
        assert line[name] > 0
    assert 0 <= line["device_idle_share"] < 1
    assert 0 <= line["r2_step_vs_length"] <= 1
    assert line["resume_bit_equal"] is True
    assert line["device"] == "one CPU thread"
    assert line["share_of_floor"] is None  # a CPU has no datasheet here
    assert line["peer_ratio"] is None  # no --package
    assert line["length"] == 256


@pytest.mark.parametrize("model", [VQL, EXACT])
def test_a_training_goes_on_to_the_same_bits(model):
    assert resumes_to_the_bit(model, "cpu")


class Forgetful(Checkpoints):
    """Loses the optimizer's second moments."""

    def newest(self):
        found = super().newest()
        for moments in found.state.optimizer["state"].values():
            moments["exp_avg_sq"].zero_()
        return found


class BehindByABatch(Checkpoints):
    """Has the batch before the cut once more."""

    def newest(self):
        found = super().newest()
        return replace(found, state=replace(found.state, position=found.state.position - 1))


@pytest.mark.parametrize("lossy", [Forgetful, BehindByABatch])
def test_a_checkpoint_that_loses_something_is_told(monkeypatch, lossy):
    monkeypatch.setattr(resumed, "Checkpoints", lossy)
    assert not resumes_to_the_bit(EXACT, "cpu")


def test_the_floor_counts_the_bytes_of_every_event():
    only_bytes = Card({"bf16": float("inf"), "tf32": float("inf")}, float("inf"), float("inf"), bytes=1e9)
    batch = make_batch(2, 100, 4, 2)
    # 16 of the row; key and value of 64 numbers each, read twice as bf16, their gradients written as fp32.
    exact = 200 * (16 + 2 * 64 * (2 * 2 + 4)) + 28 * 1_000
    assert least_ms(only_bytes, batch, EXACT, "bf16", 1_000) == pytest.approx(exact / 1e6)
    # No keys: a code for each of four groups. Cheapest without tables of segments.
    codes = 200 * (16 + 2 * 4 + 64 * (2 * 4 + 4)) + 28 * 1_000
    assert least_ms(only_bytes, batch, VQL, "tf32", 1_000) == pytest.approx(codes / 1e6)


def test_the_floor_counts_every_pair_that_is_seen():
    only_pairs = Card({"bf16": float("inf")}, exponentials=1e9, lanes=float("inf"), bytes=float("inf"))
    batch = make_batch(3, 50, 7, 3)
    pairs = sum(end - first for first, end in zip(batch.target_first, batch.target_end, strict=True))
    assert least_ms(only_pairs, batch, EXACT, "bf16", 0) == pytest.approx(3 * EXACT.heads * pairs / 1e6)
    products = replace(only_pairs, flops={"bf16": 1e12}, exponentials=float("inf"))
    head = 7 * 3 * 6 * (192 * 128 + 128 * 64 + 64)
    attention = 2 * 16 * 9 * EXACT.heads * pairs
    assert least_ms(products, batch, EXACT, "bf16", 0) == pytest.approx((attention + head) / 1e9)


def test_on_an_h100_bytes_bind_for_few_targets_instructions_for_many_and_vql_needs_neither():
    few, many = make_batch(32, 16_384, 64, 8), make_batch(32, 16_384, 1_024, 8)
    h200 = CARDS["NVIDIA H200"]
    exact_few, exact_many = (least_ms(H100, batch, EXACT, "bf16", 325_000) for batch in (few, many))
    assert 0.15 < exact_few < 0.2
    assert 1.5 < exact_many < 2.2
    assert least_ms(h200, few, EXACT, "bf16", 325_000) < 0.75 * exact_few  # whose memory is faster
    assert least_ms(h200, many, EXACT, "bf16", 325_000) == exact_many
    assert least_ms(H100, many, VQL, "bf16", 325_000) < exact_many / 10


def test_no_floor_is_given_for_a_kind_that_is_not_counted():
    assert least_ms(H100, make_batch(1, 20, 2, 1), MODELS["recent_attention_200"], "bf16", 1) is None


def test_a_peer_gets_a_row_a_target_with_its_own_history():
    rows = Sequences.from_arrow(loop_rows(2, 40, 3))
    item_BM, mask_BL, label_B = peer_batch(rows, 64)
    train = np.flatnonzero(rows.target_split == TRAIN)
    drawn = np.random.default_rng(0).choice(train, 64, replace=False)
    assert item_BM.shape == (64, 1 + rows.target_end[drawn].max())
    for target, items, mask, label in zip(drawn, item_BM, mask_BL, label_B, strict=True):
        user = int(np.searchsorted(rows.target_start, target, side="right")) - 1
        seen = rows.history_item[rows.history_start[user] :][: rows.target_end[target]]
        padding = len(mask) - len(seen)
        assert items.tolist() == [0] * padding + (seen + 1).tolist() + [rows.target_item[target] + 1]
        assert mask.tolist() == [0.0] * padding + [1.0] * len(seen)
        assert label == rows.target_label[target]


def test_ratios_are_those_of_the_fastest_loop_and_the_fastest_peer():
    loops = [
        {"targets": 256, "loop_samples_per_s": 900.0, "device_idle_share": 0.3},
        {"targets": 64, "loop_samples_per_s": 100.0, "device_idle_share": 0.1},
        {"targets": 64, "loop_samples_per_s": 300.0, "device_idle_share": 0.2},
    ]
    peers = [{"model": "DIN", "samples_per_s": 10.0}, {"model": "SDIM", "samples_per_s": 30.0}]
    assert loop_summary(loops) == {"loop_samples_per_s": 300.0, "device_idle_share": 0.2}
    ratios = {"peer_ratio": 10.0, "peer_ratio_64": 10.0, "peer_ratio_256": 30.0, "fastest_peer": "SDIM"}
    assert peer_ratios(loops, peers) == ratios
    assert peer_ratios(loops, []) == {"peer_ratio": None}

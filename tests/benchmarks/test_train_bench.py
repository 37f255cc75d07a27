"""`make bench-train`: its last line answers what it is run for, and answers that cannot be wrong are worth nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import resumed, train_step
from benchmarks.peer_steps import peer_batch
from benchmarks.resumed import resumes_to_the_bit
from benchmarks.train_loop import loop_rows
from benchmarks.train_step import MODELS, loop_over_step, loop_summary, peer_ratios
from etl.warehouse.schemas import TRAIN
from training.data import Sequences
from training.model.interests import vql
from training.resume import Checkpoints

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
    assert line["no_kernel_share"] is None  # a CPU has no kernels
    assert line["loop_over_step"] is None and line["travelling_rows_rate"] is None  # a GPU's
    assert 0 <= line["r2_step_vs_length"] == min(line[f"r2_step_vs_length_{kind}"] for kind in ("exact", "vql")) <= 1
    assert {"length_exponent_exact", "length_exponent_vql"} <= line.keys()
    assert line["r2_step_vs_length_vql_events"] is None and line["r2_step_vs_length_vql_codes"] is None  # a GPU's
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
        {"targets": 256, "loop_samples_per_s": 900.0, "device_idle_share": 0.03, "no_kernel_share": 0.3},
        {"targets": 64, "loop_samples_per_s": 100.0, "device_idle_share": 0.01, "no_kernel_share": 0.1},
        {"targets": 64, "loop_samples_per_s": 300.0, "device_idle_share": 0.02, "no_kernel_share": 0.2},
    ]
    peers = [{"model": "DIN", "samples_per_s": 10.0}, {"model": "SDIM", "samples_per_s": 30.0}]
    summary = {"loop_samples_per_s": 300.0, "device_idle_share": 0.02, "no_kernel_share": 0.2}
    assert loop_summary(loops) == summary
    ratios = {"peer_ratio": 10.0, "peer_ratio_64": 10.0, "peer_ratio_256": 30.0, "fastest_peer": "SDIM"}
    assert peer_ratios(loops, peers) == ratios
    assert peer_ratios(loops, []) == {"peer_ratio": None}


def test_the_loop_that_is_farthest_behind_its_step_is_said():
    assert loop_over_step([{"loop_over_step": share} for share in (0.93, 0.91, 0.95)]) == 0.91
    assert loop_over_step([{"loop_over_step": None}]) is None


def runs_of(model: str, precision: str, *ms: float) -> list[dict]:
    """Return steps at 1,024 events, and at each four times as many."""
    case = {"model": model, "precision": precision, "targets": 64, "pass": "recorded"}
    return [case | {"length": 1_024 * 4**number, "step_ms": each} for number, each in enumerate(ms)]


def test_each_pass_of_vql_is_measured_at_every_length(monkeypatch):
    def measured(config, batch, *_):
        length, [by_codes] = batch.event_start[1], set(vql.preferred(batch.event_start, batch.target_start, (), (), 2))
        return {"gpu_ms": 1.0 + length if by_codes else length**2.0}

    monkeypatch.setattr(train_step, "measure", measured)
    args = train_step._arguments(["--device", "cuda", "--users", "2", "--lengths", "64,128,1024", "--runs", "1"])
    figures = train_step.growth_of_each_pass(args)
    assert figures["r2_step_vs_length_vql_codes"] == pytest.approx(1)
    assert figures["r2_step_vs_length_vql_events"] < 0.999


def test_a_kind_that_takes_less_than_a_line_is_told_from_one_that_takes_more():
    on_a_line = runs_of("softmax_attention", "bf16", 2.0, 5.0, 17.0)  # 1 + length / 1,024
    less, more = runs_of("vql", "tf32", 1.0, 4.0, 8.0), runs_of("vql", "bf16", 1.0, 1.0, 8.0)
    figures = train_step.growth_with_length([*on_a_line, *less])
    assert figures["r2_step_vs_length_exact"] == pytest.approx(1)
    assert figures["length_exponent_exact"] < 1
    assert figures["r2_step_vs_length"] == figures["r2_step_vs_length_vql"] < 0.95
    assert figures["length_exponent_vql"] == pytest.approx(1)
    figures = train_step.growth_with_length([*less, *more])
    assert figures["length_exponent_vql"] == pytest.approx(1.5)
    few = [run for run in on_a_line if run["length"] > 1_024]
    assert train_step.growth_with_length(few) == {"r2_step_vs_length": None}

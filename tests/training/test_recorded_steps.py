"""A recorded step is the step itself. Most of it needs a GPU:

python -m pytest --noconftest tests/training/test_recorded_steps.py
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import time

import numpy as np
import pytest
import torch

from benchmarks.train_loop import make_data
from tests.training import test_fused as fused_tests
from training import loop, recorded_steps
from training.config import ModelConfig, TrainConfig
from training.data import Chosen
from training.device_batches import DeviceRows, Sizes, read_rows
from training.loop import COLD, Training, TrainingData, Worker, train_model
from training.model import fused, fused_codes
from training.recorded_steps import RecordedSteps, budget, rounded_up, work_tables

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
VQL, EXACT = ModelConfig(codes=16), ModelConfig(interest="softmax_attention")
MODELS = {
    "vql": VQL,
    "averages": dataclasses.replace(VQL, ema_decay=0.9),
    "codes": VQL,
    "some codes": VQL,
    "window": dataclasses.replace(VQL, recent_window=7),
    "exact": EXACT,
    "no kernel": dataclasses.replace(EXACT, kernel_components=0),
}


def test_sizes_are_few_and_little_of_them_is_padding():
    sizes = [rounded_up(count) for count in range(1, 70_000)]
    assert all(count <= size <= max(count + 63, count * 9 / 8) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 90 and rounded_up(0) > 0


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_every_batch_fits_the_tables_of_its_budget(heads):
    rng, shapes_of = np.random.default_rng(heads), {}
    for users in (1, 5, 40):
        lengths, counts = rng.integers(0, [[9], [90_000]], (2, users)), rng.integers(0, [[4], [200]], (2, users))
        for length_U, count_U in itertools.product(lengths, counts):
            starts = [np.concatenate([[0], of.cumsum()]) for of in (count_U, length_U)]
            none = np.zeros(users, np.int64)
            chosen = Chosen(none, np.zeros(starts[0][-1], np.int64), *starts, none, none, none, none, pairs=0)
            sizes = budget(chosen, users)
            padded = chosen.padded(users, sizes.events, sizes.targets)
            tables = work_tables(padded, sizes, heads)
            exact = fused.Work.of(padded.event_start.tolist(), padded.target_start.tolist(), heads, torch.device("cpu"))
            for table, real in zip(tables, (exact.pieces_W5, exact.tiles_X4, exact.blocks_N5), strict=True):
                assert np.array_equal(table[: len(real)], real)
            shapes = [table.shape for table in tables]
            assert shapes_of.setdefault(sizes, shapes) == shapes


def loaded(model: ModelConfig, **changes) -> tuple[TrainingData, TrainConfig]:
    config = dataclasses.replace(
        TrainConfig(models={"it": model}, users_per_step=6, targets_per_visit=20, epochs=2, warmup_steps=5), **changes
    )
    return make_data(users=40, length=130, items=60, config=config), config


def step_of(run: Training, chosen: Chosen, recorded: RecordedSteps | None) -> list[torch.Tensor]:
    """Gradients, loss and codebook counts of a step that moves no weight."""
    torch.manual_seed(5)
    run.sums.flat.fill_(torch.nan)
    if recorded is not None:
        recorded(recorded.prepared(chosen), run.model.coded is not None and run.model.coded.quantizer.is_started())
    else:
        targets = np.split(chosen.target, chosen.target_start[1:-1])
        count = torch.tensor([len(chosen.target), chosen.event_start[-1]] * 2, dtype=torch.float32, device="cuda")
        run._move(run.batches.make(chosen.users, targets), count, most=0)
    return [part.clone() for part in (run.sums.flat, run.totals, *run.model.buffers())]


@needs_a_gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_recorded_step_has_the_gradients_of_the_step(name, bf16, monkeypatch):
    if "codes" in name:  # which a batch of this size would not meet
        costs = {f"{of}_PAIRS": 0 for of in ("EVENT", "TARGET", "BATCH")}
        costs["TABLE_PAIRS"] = 0.08 if name == "some codes" else 0
        for cost, pairs in costs.items():
            monkeypatch.setattr(fused_codes, cost, pairs)
    model = dataclasses.replace(MODELS[name], dropout=0.0)
    data, config = loaded(model, bf16=bf16, learning_rate=0.0, weight_decay=0.0)
    run = Training("it", data, config, Worker(device="cuda"), COLD)
    if run.model.coded is not None:
        run.model.coded.quantizer.start_from_keys(
            run.model.coded.keys(run.model.items(run.rows.items)), torch.Generator().manual_seed(0)
        )
    state = copy.deepcopy(run.model.state_dict())
    order = run.order(0)
    for number in (0, 1, 2, 3, 4, 5, 0, 1, 2, 3):
        chosen, found = Chosen.of(data.joined.sequences, *order.visited(number)), []
        for recorded in (None, run.recorded):
            run.model.load_state_dict(state)
            run.totals.zero_()
            found.append(step_of(run, chosen, recorded))
        for one, other in zip(*found, strict=True):
            error = (one.double() - other.double()).norm() / one.double().norm().clamp(min=1e-9)
            assert error < (2e-2 if bf16 else 2e-3), (number, error)
    passes = {(bool(plan.shapes[0]), bool(plan.shapes[1])) for plan, _ in run.recorded.recordings}
    assert {"codes": (False, True), "some codes": (True, True)}.get(name, (True, False)) in passes


@needs_a_gpu
@pytest.mark.parametrize("slow", ["planned", "on_device"])
def test_a_gpu_waits_while_its_host_makes_a_recorded_step(slow, monkeypatch):
    """Wherever the host loses its time: in the thread that makes batches, or between a step's begin and its launch."""
    data, config = loaded(MODELS["exact"], epochs=1, min_epoch_steps=60)
    place = {"planned": recorded_steps, "on_device": recorded_steps.fused}[slow]
    quick, marks = getattr(place, slow), []

    def slowly(*args, **more):
        time.sleep(0.02)
        return quick(*args, **more)

    def look(now: Training) -> None:
        if now.step in (30, 60):
            marks.append(now.taken())

    monkeypatch.setattr(place, slow, slowly)
    monkeypatch.setattr(loop, "TABLES_AHEAD", 2)  # so that not all are made while the first step is compiled
    train_model("it", data, config, Worker(device="cuda"), lambda _: None, look)
    working_ms, waiting_ms = (marks[1].working_ms - marks[0].working_ms, marks[1].waiting_ms - marks[0].waiting_ms)
    assert waiting_ms > 20 * 28 and waiting_ms > 3 * working_ms, (working_ms, waiting_ms)


@needs_a_gpu
@pytest.mark.parametrize("name", ["vql", "exact"])
def test_a_training_of_recorded_steps_comes_to_where_the_plain_one_does(name, monkeypatch):
    data, config = loaded(MODELS[name], min_epoch_steps=25, revive_every_steps=6)
    losses: dict[bool, list[float]] = {True: [], False: []}
    taken = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: taken.append(graph) or replay(graph))
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(Training, "_recorded", lambda *_: None)
        train_model(
            "it", data, config, Worker(device="cuda"), lambda r, p=plain: losses[p].append(r.metrics["train_loss"])
        )
    assert len(taken) > 30
    assert losses[True] == pytest.approx(losses[False], abs=0.01)


@pytest.mark.skipif(
    not (torch.cuda.is_available() or fused_tests.INTERPRETED), reason="needs a GPU, or Triton's interpreter"
)
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "rows that travel"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("users", [[0], [3, 0, 17, 5, 5], list(range(40)), []], ids=len)
def test_rows_read_by_kernels_are_those_read_by_torch(users, padded, resident):
    from training import batch_kernels

    data, _ = loaded(EXACT)
    sequences, rows = data.joined.sequences, DeviceRows(data.joined, fused_tests.DEVICE, resident)
    rng = np.random.default_rng(len(users))
    targets = [np.sort(rng.choice(np.arange(130) + 130 * user, 1 + user % 90, False)) for user in users]
    chosen = Chosen.of(sequences, np.array(users, np.int64), targets)
    real = sizes = Sizes.of(chosen)
    if padded:
        sizes = budget(chosen, 43)
        chosen = chosen.padded(41, sizes.events, sizes.targets)
        sizes = dataclasses.replace(sizes, users=len(chosen.users))
    counts = np.array([real.targets, real.events] * 2)
    table = torch.from_numpy(np.concatenate(rows.table_of(chosen, counts))).to(rows.device)
    given = *rows.parts(table, sizes), sizes, padded
    ours, theirs = batch_kernels.read_rows(*given), read_rows(*given)
    for one, other in zip([*ours[:-1], *(ours.padding or ())], [*theirs[:-1], *(theirs.padding or ())], strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


@needs_a_gpu
def test_an_older_recording_among_the_garbage_does_not_end_a_new_one():
    data, config = loaded(EXACT)
    run = Training("it", data, config, Worker(device="cuda"), COLD)
    chosen = Chosen.of(data.joined.sequences, *run.order(0).visited(0))
    other = Training("it", data, config, Worker(device="cuda"), COLD)
    for _ in range(2):
        step_of(other, chosen, other.recorded)
    assert other.recorded.recordings
    thresholds = gc.get_threshold()
    gc.disable()
    try:
        del other  # it holds itself, by its step
        step_of(run, chosen, run.recorded)
        gc.set_threshold(1, 1, 1)
        gc.enable()
        step_of(run, chosen, run.recorded)
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
    assert run.recorded.recordings

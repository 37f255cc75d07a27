"""The training loop: it learns what only old events show, resumes to the same weights, and ranks stay identical."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.multiprocessing as mp

from etl.warehouse.partitions import MS_PER_DAY, day_number
from etl.warehouse.schemas import EVALUATION, TRAIN, WATCH_BUCKETS
from tests.processes import free_port
from tests.training.partitions import DT, ITEMS_OF_KUAIRAND
from tests.waiting import wait_for
from training import loop
from training.config import ModelConfig, TrainConfig
from training.data import Joined, Sequences, split_targets
from training.device_batches import DeviceRows
from training.loop import EpochResult, Start, Training, TrainingData, TrainingState, Worker, _stream, train_model
from training.model.ranker import FieldSizes, Ranker
from training.user_batches import Epoch, UserBatches
from training.vocabulary import Vocabulary


def planted(users: int, length: int, topics: int, seed: int) -> TrainingData:
    """Users with a lasting taste per topic that only their own past clicks reveal."""
    rng = np.random.default_rng(seed)
    items = topics * 10
    topic = np.arange(items) % topics
    taste = rng.normal(0, 2.0, (users, topics))
    first_ms = (day_number(DT) - 13) * MS_PER_DAY
    item = rng.integers(0, items, users * length).astype(np.int32)
    user = np.repeat(np.arange(users), length)
    time_ms = np.sort(first_ms + rng.integers(0, 14 * MS_PER_DAY, (users, length)), axis=1).ravel()
    label = (rng.random(users * length) < 1 / (1 + np.exp(-taste[user, topic[item]]))).astype(np.int8)
    start = np.arange(users + 1) * length
    sequences = Sequences(
        np.arange(users),
        [["a"]] * users,
        start,
        item,
        time_ms,
        label.astype(np.int32) * WATCH_BUCKETS,
        start,
        item,
        time_ms,
        label,
        np.ones(len(item), np.int16),
        np.where(time_ms >= day_number(DT) * MS_PER_DAY, EVALUATION, TRAIN).astype(np.int8),
        np.zeros(users * length, np.int32),
        np.tile(np.arange(length, dtype=np.int32), users),
    )
    table = pa.table(
        {
            "item_index": np.arange(items, dtype=np.int32),
            "item_id": np.arange(items),
            "train_occurrences": np.full(items, 9),
            "author_id": np.arange(items),
            "categories": [[str(t)] for t in topic],
            "duration_ms": np.full(items, 9_000.0),
            "item_type": ["N"] * items,
            "upload_type": ["A"] * items,
        },
        schema=ITEMS_OF_KUAIRAND,
    )
    config = TrainConfig()
    fields = [np.array(["a"] * users, dtype=object)]
    vocabulary = Vocabulary.build(table, fields, sequences.target_context, config.vocabulary)
    return TrainingData(Joined.of(sequences, table, vocabulary), vocabulary, split_targets(sequences, 0.05, seed))


def small_config(**changes) -> TrainConfig:
    model = ModelConfig(codes=16, dropout=0.0)
    config = TrainConfig(
        models={
            name: dataclasses.replace(model, interest=name) for name in ("vql", "softmax_attention", "mean_pooling")
        },
        warmup_steps=10,
        min_epoch_steps=50,
        epochs=2,
        users_per_step=8,
        targets_per_visit=32,
    )
    return dataclasses.replace(config, **changes)


def auc_of(data: TrainingData, model) -> float:
    batches = UserBatches(data.joined, 0, 1, 32, 0)
    with torch.no_grad():
        scores = np.concatenate([model(batch.to("cpu"))[0].numpy() for batch in batches.all_of(data.split.evaluation)])
    label = data.joined.sequences.target_label[data.split.evaluation].astype(bool)
    return float((scores[label][:, None] > scores[~label][None, :]).mean())


def test_attention_models_learn_a_planted_long_term_interest_and_mean_pooling_cannot():
    data = planted(users=240, length=160, topics=16, seed=1)
    found = {}
    for name in ("vql", "softmax_attention", "mean_pooling"):
        model, _ = train_model(name, data, small_config(), Worker(), lambda result: None)
        found[name] = auc_of(data, model)
    assert found["vql"] > found["mean_pooling"] + 0.08, found
    assert found["softmax_attention"] > found["mean_pooling"] + 0.08, found


@pytest.mark.parametrize(
    "changes",
    [pytest.param({"compiled": True}, marks=pytest.mark.slow), {"bf16": True}, {"deterministic": True}],
    ids=lambda c: next(iter(c)),
)
def test_compiled_bf16_and_deterministic_training_reach_what_the_plain_one_does(changes):
    data = planted(users=48, length=60, topics=4, seed=4)
    config = small_config(epochs=2, min_epoch_steps=12, warmup_steps=6)
    plain, _ = train_model("vql", data, config, Worker(), lambda result: None)
    other, _ = train_model("vql", data, dataclasses.replace(config, **changes), Worker(), lambda result: None)
    assert abs(auc_of(data, plain) - auc_of(data, other)) < 0.02
    assert all(p.dtype == torch.float32 for p in other.parameters())
    if "deterministic" in changes:
        again, _ = train_model("vql", data, dataclasses.replace(config, **changes), Worker(), lambda result: None)
        assert all(
            torch.equal(a, b) for a, b in zip(other.state_dict().values(), again.state_dict().values(), strict=True)
        )
        torch.use_deterministic_algorithms(False)


def test_autocast_leaves_search_codebooks_softmax_and_loss_in_single_precision():
    data = planted(users=8, length=30, topics=4, seed=5)
    config = small_config()
    model = Ranker(FieldSizes.of(data.vocabulary), config.models["vql"])
    batch = next(UserBatches(data.joined, 0, 1, 8, 0).all_of(data.split.train)).to("cpu")
    with torch.no_grad():
        model.coded.quantizer.start_from_keys(
            model.coded.keys(model.items(batch.items)), torch.Generator().manual_seed(0)
        )
        off_centre = model.coded.keys(model.items(batch.items)) + 100.0  # in bf16 these would all be one key
        plain = model.coded.quantizer.search(off_centre)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.coded.quantizer.search(off_centre), plain)
        key = model.coded.keys(model.items(batch.items))
        _, loss, _ = model.coded.quantizer(key, torch.ones(len(key)), 0.25)
        assert key.dtype == loss.dtype == torch.float32
        logits, auxiliary = model(batch)
    assert auxiliary.dtype == torch.float32
    (torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.target_label) + auxiliary).backward()
    assert model.coded.quantizer.codebook_GCw.grad.dtype == torch.float32
    with torch.no_grad():
        assert (model(batch)[0] - logits).abs().max() < 0.05


def test_a_collapsed_codebook_is_said_in_words():
    data = planted(users=30, length=60, topics=4, seed=6)
    config = small_config(epochs=3, warmup_steps=5, revive_every_steps=10**9)
    config = dataclasses.replace(
        config, models={"vql": dataclasses.replace(config.models["vql"], codes=256)}
    )  # four topics
    said = []
    train_model(
        "vql", data, config, Worker(), lambda result: said.append((result.warnings, result.metrics["probe_warnings"]))
    )
    assert any("codes have collapsed" in warning for warning in said[-1][0])
    assert all(len(words) == count for words, count in said)


def test_dead_codes_move_to_keys_of_other_items_every_time_and_no_more_keys_are_made_than_there_are_codes(monkeypatch):
    data = planted(users=45, length=60, topics=4, seed=2)  # 40 items, most of them in every batch
    config = small_config(models={"vql": ModelConfig(interest="vql", codes=16)}, warmup_steps=5, revive_every_steps=4)
    asked: list[np.ndarray] = []
    features_of = Training._features

    def features(run: Training, items: np.ndarray):
        asked.append(items)
        return features_of(run, items)

    monkeypatch.setattr(Training, "_features", features)
    train_model("vql", data, config, Worker(), lambda result: None)
    started, *revived = asked
    assert len(started) > 16
    assert len(revived) > 2
    assert all(len(np.unique(items)) == 16 for items in revived)
    assert len({tuple(sorted(items)) for items in revived}) == len(revived)


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class Stop(Exception):
    """Ends a training at a step of the test's choice, as a kill would."""


@pytest.mark.parametrize("name", ["vql", "softmax_attention"])
@pytest.mark.parametrize("cuts", [(1,), (7, 8, 20), (3, 12, 13, 27)], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_a_gpu])])
def test_a_run_that_was_cut_continues_to_the_same_bits_and_sees_every_batch_once(
    name, cuts, device, tmp_path, monkeypatch
):
    data = planted(users=45, length=60, topics=4, seed=2)
    model = ModelConfig(interest=name, codes=16, dropout=0.2, ema_decay=0.9 if name == "vql" else None)
    config = small_config(
        models={name: model},
        epochs=3,
        patience=9,
        warmup_steps=5,
        revive_every_steps=4,
        min_epoch_steps=10,
        targets_per_visit=48,
        deterministic=True,
        table_learning_rate=0.05 if name == "softmax_attention" else None,
    )
    seen: list[tuple[int, int]] = []
    note = lambda now: seen.append((now.epoch, now.position))  # noqa: E731
    whole, ended = train_model(name, data, config, Worker(device=device), lambda result: None, note)
    expected, losses = seen.copy(), []
    seen.clear()

    def keep(at: int, now: Training) -> None:
        note(now)
        if now.step == at:
            torch.save(vars(now.state()), tmp_path / "state.pt")
            raise Stop

    resume = None
    for cut in cuts:
        with pytest.raises(Stop):
            train_model(
                name,
                data,
                config,
                Worker(device=device),
                lambda result: losses.append(result.metrics["train_loss"]),
                functools.partial(keep, cut),
                Start(resume),
            )
        resume = TrainingState(**torch.load(tmp_path / "state.pt", weights_only=True))
        torch.manual_seed(cut)  # another process has generators of its own
    last, again = train_model(
        name,
        data,
        config,
        Worker(device=device),
        lambda result: losses.append(result.metrics["train_loss"]),
        note,
        Start(resume),
    )
    assert seen == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), last.state_dict().values(), strict=True))
    assert (ended.best_epoch, ended.best_logloss, ended.metrics["train_loss"]) == (
        again.best_epoch,
        again.best_logloss,
        losses[-1],
    )
    assert len(losses) == 3


def _train_as_rank(
    rank: int, ports: dict[int, int], folder: str, config: TrainConfig, silent: int, gpus: bool, by_rows: bool
) -> None:
    """Train every model of the configuration as this rank of every group that has it, on a GPU of its own or on the
    CPU.
    """
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if gpus else "cpu"
    if gpus:
        torch.cuda.set_device(rank)
    if by_rows:
        loop.read_in_part = lambda tables, _rows: tables
    data = planted(users=30, length=50, topics=4, seed=3)
    sequences = data.joined.sequences
    none = np.repeat(np.arange(30) < silent, 50)  # users without history
    sequences = dataclasses.replace(sequences, target_end=np.where(none, 0, sequences.target_end))
    data = dataclasses.replace(data, joined=dataclasses.replace(data.joined, sequences=sequences))
    for world, port in ports.items():
        if rank >= world:
            continue
        if world > 1:
            torch.distributed.init_process_group(
                "nccl" if gpus else "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
            )
        for name in config.models:
            found: dict = {"bits": hashlib.sha256(), "loss": []}

            def look(at: Training, found: dict = found) -> None:
                now = at.state()
                tensors = [
                    *now.model.values(),
                    *(t for moments in now.optimizer["state"].values() for t in moments.values()),
                    *now.row_sums,
                    now.totals,
                ]
                for tensor in tensors:
                    found["bits"].update(tensor.cpu().numpy().tobytes())
                found["model"] = now.model

            train_model(
                name,
                data,
                config,
                Worker(rank, world, device),
                lambda result, found=found: found["loss"].append(result.metrics["train_loss"]),
                look,
            )
            torch.save(found | {"bits": found["bits"].hexdigest()}, f"{folder}/{name}-{world}-{rank}.pt")
        if world > 1:
            torch.distributed.destroy_process_group()


def trained_by(
    worlds: list[int], folder: Path, config: TrainConfig, silent: int = 0, gpus: bool = False, by_rows: bool = False
) -> Callable[[str, int], list[dict]]:
    """Train with groups of so many processes.

    Return what (name, workers) saw, a rank each: a digest of every bit after every step, losses, the model.
    """
    ports = {world: free_port() for world in worlds}
    mp.spawn(_train_as_rank, args=(ports, str(folder), config, silent, gpus, by_rows), nprocs=max(worlds))
    return lambda name, world: [
        torch.load(folder / f"{name}-{world}-{rank}.pt", weights_only=True, map_location="cpu") for rank in range(world)
    ]


@pytest.mark.parametrize(
    ("gpus", "deterministic", "tables"),
    [
        pytest.param(False, True, "whole", id="CPU"),
        pytest.param(False, True, "by rows", id="CPU, tables by rows"),
        pytest.param(False, True, "row-wise", id="CPU, row-wise Adagrad"),
        pytest.param(True, True, "whole", id="GPUs", marks=[pytest.mark.gpu, needs_two_gpus]),
        pytest.param(True, False, "whole", id="GPUs, steps recorded", marks=[pytest.mark.gpu, needs_two_gpus]),
        pytest.param(True, False, "by rows", id="GPUs, tables by rows", marks=[pytest.mark.gpu, needs_two_gpus]),
        pytest.param(True, False, "row-wise", id="GPUs, row-wise Adagrad", marks=[pytest.mark.gpu, needs_two_gpus]),
    ],
)
def test_any_number_of_workers_comes_to_the_weights_of_one_and_all_hold_the_same_bits(
    tmp_path, gpus, deterministic, tables
):
    vql = ModelConfig(codes=16, dropout=0.0)
    models = {
        "vql": vql,
        "averages": dataclasses.replace(vql, ema_decay=0.9),
        "softmax": dataclasses.replace(vql, interest="softmax_attention"),
    }
    # 30 users in global batches of 7: the last of a pass has 2, so that of 3 or 4 workers some have none. 50 steps.
    config = small_config(
        models=models,
        epochs=1,
        min_epoch_steps=50,
        users_per_step=7,
        targets_per_visit=64,
        warmup_steps=6,
        revive_every_steps=3,
    )
    if tables != "whole":
        config = dataclasses.replace(
            config, models={"softmax": models["softmax"]}, table_learning_rate=0.05 if tables == "row-wise" else None
        )
    worlds = [1, *(n for n in (2, 3, 4) if not gpus or n <= torch.cuda.device_count())]
    config = dataclasses.replace(config, deterministic=deterministic)
    trained = trained_by(worlds, tmp_path, config, gpus=gpus, by_rows=tables == "by rows")
    for name in config.models:
        [one] = trained(name, 1)
        for world in worlds[1:]:
            ranks = trained(name, world)
            assert len({rank["bits"] for rank in ranks}) == 1, (name, world)
            assert ranks[0]["loss"] == pytest.approx(one["loss"], rel=1e-5)
            for key, weight in one["model"].items():
                # Of rounding, which Adam blows up where a gradient is nearly 0; a GPU's sums differ by more of it.
                apart = (weight.double() - ranks[0]["model"][key].double()).norm() / weight.double().norm().clamp(min=1)
                assert apart < (3e-3 if gpus else 3e-4), (name, world, key, apart)


def test_a_worker_whose_users_have_no_history_does_not_stop_the_others(tmp_path):
    config = small_config(epochs=1, users_per_step=3, targets_per_visit=16, warmup_steps=4)
    config = dataclasses.replace(config, models={"vql": config.models["vql"]})
    ranks = trained_by([3], tmp_path, config, silent=20)("vql", 3)  # every worker has steps without a single event
    assert len({rank["bits"] for rank in ranks}) == 1


@pytest.mark.parametrize("resident", [True, False], ids=["rows on the device", "rows that travel"])
def test_steps_made_ahead_are_those_made_when_wanted_and_the_next_epoch_begins_before_one_is_judged(
    resident, monkeypatch
):
    """A GPU would wait until an epoch's targets are dealt out. Here a CPU is fed as one is."""
    data, config = planted(users=30, length=60, topics=3, seed=5), small_config(epochs=3, min_epoch_steps=20)
    wanted: list[EpochResult] = []
    train_model("vql", data, config, Worker(), wanted.append)
    asked, shares, found = set(), Epoch.shares, []
    threads, table_of = set(), DeviceRows.table_of

    def table_noted(rows: DeviceRows, *given) -> list[np.ndarray]:
        threads.add(threading.current_thread().name)
        return table_of(rows, *given)

    def noted(order: Epoch, number: int) -> np.ndarray:
        asked.add(order.key[1])
        return shares(order, number)

    def judged(result: EpochResult) -> None:
        found.append(result)
        if not result.finished:
            wait_for("the next epoch", lambda: result.epoch + 1 in asked)

    monkeypatch.setattr(DeviceRows, "on_gpu", staticmethod(lambda *given: DeviceRows(*given, resident)))
    monkeypatch.setattr(Epoch, "shares", noted)
    monkeypatch.setattr(DeviceRows, "table_of", table_noted)
    train_model("vql", data, config, Worker(), judged)
    assert any(name.startswith("batches") for name in threads)  # or the device would wait for the rows of a step
    for one, other in zip(wanted, found, strict=True):
        for loss in ("train_loss", "validation_logloss"):
            assert one.metrics[loss] == pytest.approx(other.metrics[loss], abs=1e-4)


def test_a_training_that_ends_before_its_time_makes_no_further_batches(monkeypatch):
    data, config = planted(users=30, length=60, topics=3, seed=5), small_config(epochs=40, patience=1)
    monkeypatch.setattr(DeviceRows, "on_gpu", staticmethod(DeviceRows))
    results: list[EpochResult] = []
    train_model("mean_pooling", data, config, Worker(), results.append)
    assert len(results) < 40
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_dropout_streams_differ_by_worker_and_step():
    assert len({_stream(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)}) == 240

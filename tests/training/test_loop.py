"""The training loop: it learns what only old events show, resumes to the same weights, and ranks stay identical."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.multiprocessing as mp

from etl.partitions import MS_PER_DAY, day_number
from etl.schemas import EVALUATION, TRAIN, WATCH_BUCKETS
from tests.training.conftest import DT, KUAIRAND_ITEMS
from training.config import ModelConfig, TrainConfig
from training.data import Joined, Sequences, UserBatches, split_targets
from training.loop import EpochResult, TrainingData, Worker, train_model
from training.model.ranker import FieldSizes, Ranker
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
    table = pa.table({"item_index": np.arange(items, dtype=np.int32), "item_id": np.arange(items), "train_occurrences": np.full(items, 9),
                      "author_id": np.arange(items), "categories": [[str(t)] for t in topic], "duration_ms": np.full(items, 9_000.0),
                      "item_type": ["N"] * items, "upload_type": ["A"] * items}, schema=KUAIRAND_ITEMS)  # fmt: skip
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
        epochs=6,
        users_per_step=8,
        targets_per_user=32,
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


@pytest.mark.parametrize("changes", [pytest.param({"compiled": True}, marks=pytest.mark.slow), {"bf16": True}, {"deterministic": True}], ids=lambda c: next(iter(c)))
def test_compiled_bf16_and_deterministic_training_reach_what_the_plain_one_does(changes):
    data = planted(users=48, length=60, topics=4, seed=4)
    config = small_config(epochs=2, min_epoch_steps=12, warmup_steps=6)
    plain, _ = train_model("vql", data, config, Worker(), lambda result: None)
    other, _ = train_model("vql", data, dataclasses.replace(config, **changes), Worker(), lambda result: None)
    assert abs(auc_of(data, plain) - auc_of(data, other)) < 0.02
    assert all(p.dtype == torch.float32 for p in other.parameters())
    if "deterministic" in changes:
        again, _ = train_model("vql", data, dataclasses.replace(config, **changes), Worker(), lambda result: None)
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), again.state_dict().values(), strict=True))
        torch.use_deterministic_algorithms(False)


def test_autocast_leaves_search_codebooks_softmax_and_loss_in_single_precision():
    data = planted(users=8, length=30, topics=4, seed=5)
    config = small_config()
    model = Ranker(FieldSizes.of(data.vocabulary), config.models["vql"])
    batch = next(UserBatches(data.joined, 0, 1, 8, 0).all_of(data.split.train)).to("cpu")
    with torch.no_grad():
        model.quantizer.start_from_keys(model.keys(model.items(batch.items)), torch.Generator().manual_seed(0))
        off_centre = model.keys(model.items(batch.items)) + 100.0  # in bf16 these would all be one key
        plain = model.quantizer.search(off_centre)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.quantizer.search(off_centre), plain)
        key = model.keys(model.items(batch.items))
        _, loss, _ = model.quantizer(key, torch.ones(len(key)), 0.25)
        assert key.dtype == loss.dtype == torch.float32
        logits, auxiliary = model(batch)
    assert auxiliary.dtype == torch.float32
    (torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.target_label) + auxiliary).backward()
    assert model.quantizer.codebook_GCw.grad.dtype == torch.float32
    with torch.no_grad():
        assert (model(batch)[0] - logits).abs().max() < 0.05


def test_a_collapsed_codebook_is_said_in_words():
    data = planted(users=30, length=60, topics=4, seed=6)
    config = small_config(epochs=3, warmup_steps=5, revive_every_steps=10**9)
    config = dataclasses.replace(config, models={"vql": dataclasses.replace(config.models["vql"], codes=256)})  # four topics
    said = []
    train_model("vql", data, config, Worker(), lambda result: said.append((result.warnings, result.metrics["probe_warnings"])))
    assert any("codes have collapsed" in warning for warning in said[-1][0])
    assert all(len(words) == count for words, count in said)


def test_a_run_that_was_cut_continues_to_the_same_weights(tmp_path):
    data = planted(users=20, length=60, topics=4, seed=2)
    config = small_config(epochs=3, patience=3, warmup_steps=2)
    states: list[EpochResult] = []

    def keep(result: EpochResult) -> None:
        torch.save(vars(result), tmp_path / f"{result.epoch}.pt")
        states.append(result)

    _whole, _ = train_model("vql", data, config, Worker(), keep)
    resume = torch.load(tmp_path / "0.pt", weights_only=True)
    _continued, result = train_model("vql", data, config, Worker(), lambda result: None, resume=resume)
    assert result.epoch == 2
    # Revival draws restart with the process; nothing else may differ.
    assert states[-1].metrics["validation_logloss"] == pytest.approx(result.metrics["validation_logloss"], abs=0.02)


def _train_one_rank(rank: int, world: int, port: int, folder: str, ema_decay: float | None) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(1)
    data = planted(users=32, length=50, topics=4, seed=3)
    config = small_config(epochs=3, patience=6, revive_every_steps=3, warmup_steps=3, users_per_step=4)
    model, _ = train_model(
        "vql",
        data,
        dataclasses.replace(config, models={"vql": dataclasses.replace(config.models["vql"], ema_decay=ema_decay)}),
        Worker(rank, world),
        lambda result: None,
    )
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_two_ranks_end_with_bit_identical_codebooks_and_weights(ema_decay, tmp_path):
    port = 20_000 + os.getpid() % 20_000
    mp.spawn(_train_one_rank, args=(2, port, str(tmp_path), ema_decay), nprocs=2)  # 150 steps
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    # Usage averages are each rank's own between synchronisations; weights and codebooks are not.
    assert [name for name in different if "usage" not in name] == []

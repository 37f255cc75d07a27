"""Tables whose rows are dealt out over workers: the weights of whole tables, with a part of the memory a worker."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.processes import free_port
from tests.training.test_loop import needs_two_gpus, planted, small_config
from training.config import ModelConfig, TrainConfig
from training.loop import Start, Training, TrainingState, Worker, train_model

WORLDS = (1, 2, 3, 4)
MOST_OFF = 1e-5  # of rounding; 1e-7 is seen
CUT, STEPS = 13, 25


def configs() -> dict[str, TrainConfig]:
    """Return what is trained: every optimizer, and codebooks, whose keys are of rows that others own."""
    config = small_config(
        epochs=1, min_epoch_steps=24, users_per_step=7, targets_per_visit=64, warmup_steps=6, revive_every_steps=3,
        sharded_from_rows=20, gradient_clip=0.05,
    )  # fmt: skip
    vql = ModelConfig(codes=16, dropout=0.0)
    softmax = dataclasses.replace(vql, interest="softmax_attention")
    return {
        "adamw": dataclasses.replace(config, models={"it": softmax}),
        "row-wise": dataclasses.replace(config, models={"it": softmax}, table_learning_rate=0.05),
        "codes": dataclasses.replace(config, models={"it": vql}),
    }


def _train(worker: Worker, folder: Path, kind: str, config: TrainConfig) -> None:
    """Train once undisturbed and once from the state of step `CUT`, from that of other numbers of workers, too."""
    data = planted(users=30, length=50, topics=4, seed=3)
    rank, world, bits = worker.rank, worker.world, hashlib.sha256()
    found: dict = {"loss": []}

    def look(now: Training) -> None:
        if world > 1:
            assert now.sharded is not None and now.sharded.names == ["item_id", "author_id"]
        for weight in (*now.model.parameters(), *now.model.buffers()):
            if now.sharded is None or now.sharded.rows_of(weight) is None:
                bits.update(weight.detach().cpu().numpy().tobytes())
        if now.step not in (CUT, STEPS):
            return
        state = now.state()  # only the first worker gets whole tables
        if now.step == CUT and rank == 0:
            torch.save(vars(state), folder / f"{kind}-{world}.state")
        found["state"] = vars(state)
        table = now.model.items.tables[0].weight
        moments = now.optimizer.state.get(table, {}).values()
        found["bytes"] = sum(part.nbytes for part in (table, *moments) if part.dim())

    note = lambda result: found["loss"].append(result.metrics["train_loss"])  # noqa: E731
    model, result = train_model("it", data, config, worker, note, look)
    found |= {"model": model.state_dict(), "validation": result.best_logloss, "bits": bits.hexdigest()}
    for before in WORLDS[: WORLDS.index(world) + 1]:
        resume = TrainingState(**torch.load(folder / f"{kind}-{before}.state", weights_only=True))
        again, _ = train_model("it", data, config, worker, lambda _: None, None, Start(resume))
        found[f"resumed from {before}"] = again.state_dict()
    torch.save(found, folder / f"{kind}-{world}-{rank}.pt")


def _as_rank(rank: int, ports: dict[int, int], folder: Path, gpus: bool) -> None:
    torch.set_num_threads(1)
    if gpus:
        torch.cuda.set_device(rank)
    for world, port in ports.items():
        if rank < world:
            how = "nccl" if gpus else "gloo"
            dist.init_process_group(how, f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
            for kind, config in configs().items():
                _train(Worker(rank, world, f"cuda:{rank}" if gpus else "cpu"), folder, kind, config)
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return what says of (kind, workers) what each rank saw."""
    folder = tmp_path_factory.mktemp("sharded")
    mp.spawn(_as_rank, args=({world: free_port() for world in WORLDS}, folder, False), nprocs=max(WORLDS))
    return lambda kind, world: [
        torch.load(folder / f"{kind}-{world}-{rank}.pt", weights_only=True) for rank in range(world)
    ]


def off_by(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return by how much the weights of two models of one form differ at most, by norm."""
    assert {name: weight.shape for name, weight in one.items()} == {name: w.shape for name, w in other.items()}
    return max(
        float((weight.double() - other[name].double()).norm() / weight.double().norm().clamp(min=1))
        for name, weight in one.items()
    )


@pytest.mark.parametrize("kind", configs())
def test_sharded_tables_come_to_the_weights_of_whole_ones(trained, kind):
    [whole] = trained(kind, 1)
    for world in WORLDS[1:]:
        ranks = trained(kind, world)
        assert len({rank["bits"] for rank in ranks}) == 1, "what every worker has whole is the same in every bit"
        assert all(off_by(rank["model"], ranks[0]["model"]) == 0 for rank in ranks)
        assert off_by(whole["model"], ranks[0]["model"]) < MOST_OFF, world
        assert ranks[0]["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert ranks[0]["validation"] == pytest.approx(whole["validation"], rel=1e-4)
        state, expected = ranks[0]["state"], whole["state"]
        for number, moments in expected["optimizer"]["state"].items():
            for name, moment in moments.items():
                torch.testing.assert_close(state["optimizer"]["state"][number][name], moment, rtol=1e-2, atol=1e-5)
        for mine, theirs in zip(state["row_sums"], expected["row_sums"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-7)


@pytest.mark.gpu
@needs_two_gpus
def test_recorded_steps_of_several_gpus_come_to_the_weights_of_whole_tables(tmp_path):
    worlds = [world for world in WORLDS if world <= torch.cuda.device_count()]
    mp.spawn(_as_rank, args=({world: free_port() for world in worlds}, tmp_path, True), nprocs=max(worlds))
    for kind in configs():
        [whole], *groups = (
            [torch.load(tmp_path / f"{kind}-{world}-{rank}.pt", map_location="cpu") for rank in range(world)]
            for world in worlds
        )
        for ranks in groups:
            assert len({rank["bits"] for rank in ranks}) == 1, (kind, len(ranks))
            resumed = [ranks[0][f"resumed from {before}"] for before in range(1, len(ranks) + 1)]
            for found in (ranks[0]["model"], *resumed):
                assert off_by(whole["model"], found) < 3e-3, (kind, len(ranks))


@pytest.mark.parametrize("kind", configs())
def test_a_training_that_was_cut_goes_on_with_whole_tables_or_with_any_number_of_workers(trained, kind):
    for world in WORLDS:
        for rank in trained(kind, world):
            assert off_by(rank["model"], rank[f"resumed from {world}"]) == 0
            for before in WORLDS[: WORLDS.index(world)]:
                assert off_by(rank["model"], rank[f"resumed from {before}"]) < MOST_OFF, (world, before)


def test_a_worker_holds_its_part_of_weights_and_moments(trained):
    [whole] = trained("adamw", 1)
    rows = len(whole["model"]["items.tables.0.weight"])
    for world in WORLDS[1:]:
        each = -(-rows // world)
        owned = [min(each, rows - rank * each) for rank in range(world)]
        assert [rank["bytes"] for rank in trained("adamw", world)] == [whole["bytes"] // rows * part for part in owned]

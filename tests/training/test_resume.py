"""Checkpoints: the newest whole one is found, another training's is refused, and the steps wait for a copy alone."""

from __future__ import annotations

import dataclasses
import os
import threading

import pytest
import torch

from etl.stage.errors import StageError
from etl.stage.folder import Folder
from tests.waiting import wait_for
from training.config import TrainConfig
from training.configs import tiny
from training.loop import TrainingState
from training.resume import Checkpoint, Checkpoints, flat


def state(step: int) -> TrainingState:
    return TrainingState(step, 1, 2, torch.zeros(2), {"w": torch.full((100,), float(step))}, {}, [], None, 0.5, -1)


def checkpoints(folder, said: list[str], every_steps: int = 1, **identity: str) -> Checkpoints:
    return Checkpoints(
        Folder(str(folder), "--runs"), {"configuration.seed": "7", **identity}, every_steps, 1e9, said.append
    )


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_two_are_kept(tmp_path):
    said: list[str] = []
    saved = checkpoints(tmp_path / "c", said)
    assert saved.newest() == Checkpoint()
    for step in range(1, 6):
        saved.write(Checkpoint({"a": {"epochs": 1}}, "b", state(step)))
    files = sorted((tmp_path / "c").iterdir())
    assert len(files) == 2
    os.truncate(files[-1], 500)
    reached = checkpoints(tmp_path / "c", said).newest()
    assert (
        reached.state is not None
        and reached.state.step == 4
        and (reached.name, reached.done) == ("b", {"a": {"epochs": 1}})
    )
    assert len(said) == 1 and f"{files[-1]} is damaged" in said[0]
    flipped = bytearray(files[0].read_bytes())
    flipped[len(flipped) // 2] ^= 1  # one bit of a weight: no reader of the format would see it
    files[0].write_bytes(flipped)
    assert checkpoints(tmp_path / "c", said).newest() == Checkpoint()


def test_another_training_is_refused_with_both_values(tmp_path):
    tiny_config = tiny.config()
    for config, other, line in (
        (
            tiny_config,
            dataclasses.replace(tiny_config, learning_rate=0.1),
            "configuration.learning_rate: 0.003 there, 0.1 now",
        ),
        (
            tiny_config,
            dataclasses.replace(tiny_config, models={"vql": tiny_config.models["vql"]}),
            "configuration.models.mean_pooling.bf16: missing",
        ),
    ):
        folder = Folder(str(tmp_path / line[-3:]), "--runs")
        Checkpoints(folder, flat(config.deciding, "configuration"), 1, 1, print).write(Checkpoint({}, "vql", state(1)))
        with pytest.raises(StageError) as refused:
            Checkpoints(folder, flat(other.deciding, "configuration"), 1, 1, print).newest()
        assert line.split(".bf16")[0] in refused.value.what and "--attempt" in refused.value.remedy
    assert "checkpoint_every_seconds" not in TrainConfig().deciding  # how often decides no weight


def test_a_step_does_not_wait_for_the_disk_and_a_full_one_is_told(tmp_path, monkeypatch):
    said: list[str] = []
    saved, go_on = checkpoints(tmp_path / "c", said, every_steps=2), threading.Event()
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: go_on.wait() and save(*args))
    copies: list[int] = []

    def at(step: int) -> Checkpoint:
        copies.append(step)
        return Checkpoint({}, "vql", state(step))

    for step in range(1, 8):
        if saved.due(step):
            saved.begin(step, at(step))
    assert copies == [2]  # that of step 2 is being written
    go_on.set()
    wait_for("checkpoint", lambda: list((tmp_path / "c").glob("*.pt")))
    wait_for("the end of writing", lambda: saved.due(8))
    saved.begin(8, at(8))
    saved.write(at(9))
    assert checkpoints(tmp_path / "c", said).newest().state.step == 9

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    saved.write(at(10))
    assert said == [
        "warning: no checkpoint could be written, a restart would begin at the one before it: No space left on device"
    ]

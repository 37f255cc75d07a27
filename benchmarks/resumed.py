"""Whether a training that was ended and goes on comes to the bits of one that nothing disturbed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing as mp
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from benchmarks.train_loop import make_data
from etl.stage.folder import Folder
from training.config import ModelConfig, load_config
from training.loop import COLD, Start, Training, TrainingState, Worker, train_model
from training.resume import Checkpoint, Checkpoints

STEPS, CUT = 40, 25  # of two epochs; codebooks have begun at 10, dead codes are revived every 7


class _Ended(Exception):
    pass


def apart(models: Sequence[ModelConfig], device: str) -> bool:
    """Ask `resumes_to_the_bit` of all, in a process of its own: what it sets for the device's libraries is for good."""
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, mp.get_context("spawn"), torch.set_num_threads, threads) as pool:
        return all(pool.map(resumes_to_the_bit, models, itertools.repeat(device)))


def resumes_to_the_bit(model: ModelConfig, device: str) -> bool:
    """Train a model, with dropout, undisturbed and from a checkpoint that another training was ended at.

    Returns whether weights, codebooks and the optimizer's state have the same bits after the last step.
    """
    undisturbed = _trained(model, device, COLD)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Folder(folder, "the benchmark"), {}, STEPS, 1e9, print)
        with contextlib.suppress(_Ended):
            _trained(model, device, COLD, checkpoints)
        continued = _trained(model, device, Start(resume=checkpoints.newest().state))
    pairs = zip(_tensors(undisturbed), _tensors(continued), strict=True)
    return all(one.numpy().tobytes() == other.numpy().tobytes() for one, other in pairs)


def _trained(model: ModelConfig, device: str, start: Start, checkpoints: Checkpoints | None = None) -> TrainingState:
    """Return the state after the last step; with `checkpoints` write one at the cut, and end there."""
    config = dataclasses.replace(
        load_config("default"), models={model.interest: model}, users_per_step=4, targets_per_visit=16,
        epochs=2, patience=2, min_epoch_steps=STEPS // 2, max_epoch_steps=STEPS // 2, warmup_steps=10,
        revive_every_steps=7, deterministic=True,
    )  # fmt: skip
    states: list[TrainingState] = []

    def look(now: Training) -> None:
        if checkpoints is not None and now.step == CUT:
            checkpoints.write(Checkpoint(name=model.interest, state=now.state()))
            raise _Ended
        if now.step == STEPS:
            states.append(now.state())

    data = make_data(16, 120, 500, config)
    train_model(model.interest, data, config, Worker(device=device), lambda _: None, look, start)
    return states[0]


def _tensors(state: TrainingState) -> list[Tensor]:
    moments = [moment for of_one in state.optimizer["state"].values() for moment in of_one.values()]
    return [*state.model.values(), *(moment for moment in moments if isinstance(moment, Tensor))]

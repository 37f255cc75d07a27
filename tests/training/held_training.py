"""The command line of training, held at a step by a test: `python -m tests.training.held_training`, by torchrun, too.

Its first worker writes how many steps of all models it has taken to the file `reached` of HELD_FOLDER, and goes no
further than the file `limit` says. So a kill comes at a step of the test's choice, however fast the machine is, and
what a killed driver or head had started cannot train to the end before it misses it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import training.job
import training.ray_cluster
import training.ray_workers
import training.torchrun
import training.train
from etl.stage.commands import run_stage
from etl.stage.local_files import replace_text
from tests.waiting import PATIENCE_S
from training.config import TrainConfig
from training.loop import Training, TrainingData, epoch_of
from training.user_batches import UserBatches

_train_model, _ray_worker = training.job.train_model, training.ray_workers._ray_worker


def steps_of_a_model(data: TrainingData, config: TrainConfig) -> int:
    """Return the steps of all epochs of a model."""
    batches = UserBatches(data.joined, 0, 1, config.users_per_step, config.seed)
    return config.epochs * len(epoch_of(batches, data, config, 0))


def _held_train_model(name, data, config, worker, on_epoch, on_step, start):
    folder = Path(os.environ["HELD_FOLDER"])
    before = list(config.models).index(name) * steps_of_a_model(data, config)

    def hold(now: Training) -> None:
        on_step(now)
        replace_text(folder / "reached", str(before + now.step))
        while before + now.step >= int((folder / "limit").read_text()):
            time.sleep(0.02)

    return _train_model(name, data, config, worker, on_epoch, hold if on_step else None, start)


def held_worker(config: dict[str, Any]) -> None:
    """Train as a worker of Ray does, held."""
    training.job.train_model = _held_train_model
    _ray_worker(config)


def main() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        training.job.train_model = _held_train_model
        run_stage(training.torchrun.main)
        return
    training.ray_workers._ray_worker = held_worker
    training.ray_workers.HEAD_CHECK_SECONDS = 1.0  # a head is gone after three
    training.ray_cluster.PLACEMENT_SECONDS = int(os.environ.get("HELD_PLACEMENT_SECONDS", PATIENCE_S))
    run_stage(training.train.main)


if __name__ == "__main__":
    from tests.training import held_training

    held_training.main()  # Ray takes functions of a module by their names

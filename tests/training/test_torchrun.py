"""Workers of torchrun are lost, and its `--max-restarts` start all again: two agents, as two machines have them."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from etl.stage.local_files import replace_text
from tests.processes import Started, free_port, runs, start
from tests.training import test_train
from tests.training.conftest import DT
from tests.training.held_training import steps_of_a_model
from tests.training.test_train import ROOT, check_run, check_same_models, command, has_reached
from tests.waiting import wait_for
from training.configs import tiny
from training.job import load_training_data

warehouse = test_train.warehouse
STEPS_TO_MISS = 3  # that a training may take behind the point of a kill


def workers(agent: Started) -> list[psutil.Process]:
    """Return the workers that an agent has started, which lead sessions of their own."""
    started = psutil.Process(agent.process.pid).children(recursive=True)
    return [process for process in started if runs(process, "tests.training.held_training")]


@contextlib.contextmanager
def machines(words: list[str], env: dict[str, str], folder: Path) -> Iterator[list[Started]]:
    """Yield two agents that train together, with a worker each."""
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    agent = ["-m", "torch.distributed.run", *meeting, "--local-addr", "127.0.0.1", "--max-restarts", "2"]
    held = [words[0], *agent, "-m", "tests.training.held_training", *words[3:]]
    started = [start(held, folder / f"log-{number}", ROOT, env | {"HELD_FOLDER": str(folder)}) for number in (0, 1)]
    try:
        yield started
    finally:
        for each in started:
            if each.process.poll() is None:
                for worker in workers(each):
                    worker.kill()
            each.stop()


def check_ended(agents: list[Started], folder: Path) -> None:
    ends = [agent.finish() for agent in agents]
    assert [code for code, _ in ends] == [0, 0], ends
    check_run(folder, subprocess.CompletedProcess("held", 0, "".join(said for _, said in ends), ""))


@pytest.mark.slow
def test_killed_workers_of_torchrun_cost_a_restart_each_and_no_bit(tmp_path, warehouse):
    steps = steps_of_a_model(load_training_data(warehouse, "kuairand", DT, tiny.config())[0], tiny.config())
    whole = tmp_path / "whole"
    whole.mkdir()
    replace_text(whole / "limit", str(3 * steps + 1))
    with machines(*command(whole, warehouse), whole) as agents:
        check_ended(agents, whole)

    points = [steps // 2, steps + steps // 2]
    replace_text(tmp_path / "limit", str(points[0] + STEPS_TO_MISS))
    with machines(*command(tmp_path, warehouse), tmp_path) as agents:
        for agent, point, goes_to in zip(agents, points, [points[1], 3 * steps], strict=True):
            wait_for(f"step {point}", functools.partial(has_reached, agents[0], point), every=0.01)
            [worker] = workers(agent)
            worker.kill()
            replace_text(tmp_path / "limit", str(goes_to + STEPS_TO_MISS))
        check_ended(agents, tmp_path)
    progress = (tmp_path / "runs" / "t" / "progress.log").read_text()
    assert progress.count("going on with") == 2
    check_same_models(tmp_path, whole)

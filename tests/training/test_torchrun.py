"""Workers of torchrun are lost, and its `--max-restarts` start all again: two agents, as two machines have them."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from etl.stage.errors import TryAgainError
from etl.stage.local_files import replace_text
from tests.processes import Started, free_port, runs, start
from tests.training import test_train
from tests.training.conftest import DT
from tests.training.held_training import steps_of_a_model
from tests.training.test_train import ROOT, STEPS_TO_MISS, check_run, check_same_models, command, has_reached
from tests.waiting import wait_for
from training.configs import tiny
from training.job import load_training_data
from training.torchrun import name_of_start

warehouse = test_train.warehouse


def names_of(store: dist.Store, ranks: list[int], world: int) -> list[str]:
    """Let workers of one start meet; return the names that they agreed upon."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: name_of_start(store, rank, world, 20.0), ranks))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]], ids=str)
def test_each_start_meets_by_a_name_of_its_own_whatever_earlier_ones_left(order):
    store = dist.HashStore()
    store.set("hello/1", "died before it was answered")
    first, second = (names_of(store, order, 3) for _ in range(2))
    assert len(set(first)) == len(set(second)) == 1 and set(first) != set(second)


def test_a_worker_that_heard_and_is_started_again_while_others_are_waited_for_hears_the_same():
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(names_of, store, [0, 1], 3)
        time.sleep(0.3)
        assert name_of_start(store, 1, 3, 5.0) == name_of_start(store, 2, 3, 5.0)
        assert len(set(first.result())) == 1


@pytest.mark.parametrize(("rank", "who"), [(0, r"workers \[1, 2\] of 3 did not come"), (1, "worker 0 did not answer")])
def test_a_worker_that_comes_alone_says_so_and_is_worth_another_try(rank, who):
    with pytest.raises(TryAgainError, match=f"{who}.* within 0 s"):
        name_of_start(dist.HashStore(), rank, 3, 0.2)


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
def test_killed_workers_of_torchrun_are_started_again_and_come_to_the_same_bits(tmp_path, warehouse):
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

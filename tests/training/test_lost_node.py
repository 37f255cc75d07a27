"""A node of a real Ray cluster is lost while a worker trains on it: nodes with an address each, ended by SIGKILL."""

from __future__ import annotations

import functools
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from etl.stage.errors import EXIT_TRY_AGAIN
from etl.stage.local_files import replace_text
from tests.processes import Started, free_port, runs, start
from tests.training import test_train
from tests.training.conftest import DT
from tests.training.held_training import steps_of_a_model
from tests.training.test_train import ROOT, STEPS_TO_MISS, check_run, check_same_models, command, has_reached
from tests.waiting import wait_for
from training.configs import tiny
from training.job import load_training_data
from training.ray_cluster import answers

pytestmark = [pytest.mark.slow, pytest.mark.ray]
warehouse = test_train.warehouse


@dataclass
class Cluster:
    """A head without room for workers, and nodes with room for one each; trainings there are held at a step."""

    folder: Path
    sockets: str  # of Ray
    env: dict[str, str]
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    nodes: list[Started] = field(default_factory=list)
    started: int = 0

    def _start(self, *more: str) -> Started:
        """Start a node, all of whose processes are in one session."""
        self.started += 1
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=80000000"]
        node = start([*ray, *more], self.folder / f"node-{self.started}.log", ROOT, self.env)
        self.nodes.append(node)
        wait_for("node", lambda: "will now block" in node.log.read_text())
        return node

    def start_head(self) -> None:
        port = self.address.split(":")[1]
        self._start(
            "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={self.sockets}"
        )
        assert answers(self.address)

    def fill(self, nodes: int) -> None:
        """Start nodes until there are so many beside the head."""
        while len(self.nodes) <= nodes:
            self._start(f"--address={self.address}", "--num-cpus=1", f"--node-ip-address=127.0.0.{self.started + 1}")

    def lose(self, which: int, of: str = "RayTrainWorker") -> None:
        """Kill all of one of the two nodes on which a worker is."""
        at_work = [node for node in self.nodes if any(runs(process, of) for process in node.family())]
        assert len(at_work) == 2
        at_work[which].stop()
        self.nodes.remove(at_work[which])

    def train(self, words: list[str], limit: int, **more: str) -> Started:
        """Start a training that goes to a step and no further."""
        self.go_on(limit)
        replace_text(self.folder / "reached", "0")
        held = [words[0], "-m", "tests.training.held_training", *words[3:]]
        return start(held, self.folder / "log", ROOT, self.env | {"RAY_ADDRESS": self.address} | more)

    def go_on(self, limit: int) -> None:
        replace_text(self.folder / "limit", str(limit))


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    env = {"HELD_FOLDER": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(24)}
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # a socket's path has at most 107 characters
        made = Cluster(tmp_path, short, command(tmp_path, "")[1] | env)
        try:
            made.start_head()
            made.fill(2)
            yield made
        finally:
            for node in made.nodes:
                node.stop()


def ended(running: Started) -> tuple[int, str]:
    """Return exit code and output of a training once it has ended, and nothing of it is left."""
    try:
        return running.finish()
    finally:
        running.stop()


@pytest.mark.parametrize("warehouse", [100], ids=["100 users"], indirect=True)
def test_workers_go_on_elsewhere_to_the_bits_of_an_undisturbed_run_or_say_what_room_is_missing(
    tmp_path, warehouse, cluster
):
    whole = tmp_path / "whole"
    whole.mkdir()
    words, env = command(whole, warehouse)
    words[1:3] = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "training.torchrun"]
    check_run(whole, subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False))
    steps = steps_of_a_model(load_training_data(warehouse, "kuairand", DT, tiny.config())[0], tiny.config())
    words = command(tmp_path, warehouse, "--workers", "2")[0]

    running = cluster.train(words, steps // 2 + STEPS_TO_MISS, HELD_PLACEMENT_SECONDS="20")
    wait_for("step of the first model", functools.partial(has_reached, running, steps // 2), every=0.01)
    cluster.lose(0)
    code, said = ended(running)
    assert code == EXIT_TRY_AGAIN and said.count("warning: training lost ") == 1 and "Traceback" not in said, said
    assert "error: no room for 2 worker(s) of 1 CPU each within 20 s: the cluster has 1 CPU, free 1 CPU" in said, said
    assert "remedy: run the same command again once lost nodes are back, or with fewer --workers" in said, said

    cluster.fill(2)
    running = cluster.train(words, steps + steps // 2 + STEPS_TO_MISS)
    wait_for("step of the second model", functools.partial(has_reached, running, steps + steps // 2), every=0.01)
    cluster.lose(-1)
    cluster.fill(2)
    cluster.go_on(3 * steps + 1)
    code, said = ended(running)
    assert said.count("warning: training lost ") == 1, said
    check_run(tmp_path, subprocess.CompletedProcess("held", code, said, ""))
    progress = (tmp_path / "runs" / "t" / "progress.log").read_text()
    assert "going on with vql after" in progress and "going on with softmax_attention after" in progress
    check_same_models(tmp_path, whole)


def test_a_training_of_one_or_two_workers_goes_on_with_the_one_that_is_left(tmp_path, warehouse, cluster):
    running = cluster.train(command(tmp_path, warehouse, "--workers", "1:2")[0], 3)
    wait_for("step", functools.partial(has_reached, running, 3), every=0.01)
    cluster.lose(0)
    cluster.go_on(1_000_000)
    code, said = ended(running)
    summary = check_run(tmp_path, subprocess.CompletedProcess("held", code, said, ""))
    assert all(model["epochs"] == 2 for model in summary["models"].values())
    assert [line.count("2 worker(s)") for line in said.splitlines() if "worker(s) on cpu" in line] == [1, 0], said

"""Nodes of a real Ray cluster are lost while workers score on them: the buckets are worked on by who is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from etl.stage.errors import EXIT_TRY_AGAIN
from tests.processes import Started, start
from tests.training import test_lost_node
from tests.training.partitions import published, random_partition
from tests.training.test_lost_node import Cluster, ended
from tests.training.test_train import ROOT
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.ray]
cluster = test_lost_node.cluster
BUCKETS = 5


def work(cluster: Cluster, warehouse: Path, folder: Path) -> Started:
    """Start the work and wait until both workers have a bucket."""
    folder.mkdir()
    words = [sys.executable, "-m", "tests.evaluation.held_buckets", str(warehouse), str(folder)]
    running = start(words, folder / "log", ROOT, cluster.env | {"RAY_ADDRESS": cluster.address})

    def both_begin() -> bool:
        assert running.process.poll() is None, running.log.read_text()
        return len(list(folder.glob("begun-*"))) == 2

    wait_for("two buckets", both_begin)
    return running


def test_buckets_of_a_lost_node_go_to_the_worker_that_is_left_and_without_any_it_is_said(tmp_path, cluster):
    published(tmp_path, random_partition(users=20, items=50, longest=30), BUCKETS)

    running = work(cluster, tmp_path / "warehouse", tmp_path / "one")
    cluster.lose(0, "_Worker")
    (tmp_path / "one" / "go").touch()
    code, said = ended(running)
    assert code == 0 and f"came to {list(range(BUCKETS))}" in said, said

    cluster.fill(2)
    running = work(cluster, tmp_path / "warehouse", tmp_path / "two")
    cluster.lose(0, "_Worker")
    cluster.nodes.pop().stop()
    code, said = ended(running)
    assert code == EXIT_TRY_AGAIN and "Traceback" not in said, said
    assert "error: no worker had room for 15 s: nodes were lost, or others use the cluster" in said, said

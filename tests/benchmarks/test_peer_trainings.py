"""Our code beside FuxiCTR's in one loop: the trainings that need no FuxiCTR, and what the table says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from infra import settings
from tests.training.partitions import DT, published, random_partition


def test_the_arms_of_our_own_code_train_and_stand_in_the_table(tmp_path):
    """In a process of its own: the module adds its kinds to the registry of interests."""
    store = published(tmp_path, random_partition(users=24), buckets=2)
    words = ["--package", str(tmp_path), "--warehouse", store.warehouse, "--dataset", store.dataset, "--dt", DT]
    words += ["--kinds", "din,eta", "--arms", "ours,bare,plain", "--seeds", "1,2", "--length", "20", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peer_trainings", *words],
        cwd=settings.ROOT,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, head, _, din, eta = done.stdout.splitlines()
    auc = {(line["kind"], line["arm"], line["seed"]): line["auc"] for line in map(json.loads, lines)}
    arms = {"din": ("ours", "bare"), "eta": ("ours", "bare", "plain")}
    assert auc.keys() == {(kind, arm, seed) for kind in arms for arm in arms[kind] for seed in (1, 2)}
    assert head.startswith("| kind | ours | bare | theirs | whole | plain | bare minus theirs |")
    for row, kind in ((din, "din"), (eta, "eta")):
        name, ours, bare, theirs, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        assert name == kind and theirs == ""  # there is no FuxiCTR
        for cell, arm in ((ours, "ours"), (bare, "bare")):
            assert cell.startswith(f"{(auc[kind, arm, 1] + auc[kind, arm, 2]) / 2:.4f} ± ")
        assert auc[kind, "ours", 1] != auc[kind, "bare", 1]  # bare lacks what ours has

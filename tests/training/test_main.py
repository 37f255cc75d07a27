"""The training command line on a tiny published partition: in one process, and with two Ray Train workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from etl.schemas import schema_fingerprint
from etl.store import Manifest, TableStore
from tests.training.conftest import DT, random_partition
from training.checkpoint import Cutoff
from training.scoring import load_scorer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def warehouse(tmp_path) -> str:
    items, sequences = random_partition(users=24, longest=40)
    store = TableStore(str(tmp_path / "warehouse"), "kuairand")
    settings = {"cutoff": "day_start", "availability_lag_ms": 60_000, "max_events": 30}
    for table, rows in (("items", items), ("sequences", sequences)):
        work = store.begin_try("t", [table], [DT])
        file = store.write_file(work, table, DT, 0, rows)
        counts = {"train_targets": 24 * 7}
        store.write_staged_manifest(work, Manifest("kuairand", table, DT, "t", schema_fingerprint(rows.schema), "v", (file,), counts, {}, settings))
        store.publish("t", table, DT)
    return store.warehouse


def train(tmp_path: Path, warehouse: str, *more: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    words = ["--dataset", "kuairand", "--warehouse", warehouse, "--dt", DT, "--attempt", "t", "--runs", str(tmp_path / "runs"), "--config", "tiny"]
    return subprocess.run([sys.executable, "-m", "training.main", *words, *more], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def check_run(tmp_path: Path, done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "runs" / "t" / "training.json").read_text())
    assert list(summary["models"]) == ["vql", "softmax_attention", "mean_pooling"]
    for model in summary["models"].values():
        scorer = load_scorer(model["package"])
        assert len(scorer.score_request(scorer.example_request())) >= 1
        assert scorer.cutoff == Cutoff("day_start", 60_000, 30)  # as the manifest of sequences says
    assert "vql epoch 2/2" in done.stdout
    return summary


def test_training_in_one_process_and_a_retry_continues_the_mlflow_run(tmp_path, warehouse):
    first = check_run(tmp_path, train(tmp_path, warehouse, "--workers", "0"))
    second = check_run(tmp_path, train(tmp_path, warehouse, "--workers", "0"))
    assert first["mlflow_run_id"] == second["mlflow_run_id"]
    assert [m["validation_logloss"] for m in first["models"].values()] == [m["validation_logloss"] for m in second["models"].values()]


@pytest.mark.slow
@pytest.mark.ray
def test_two_ray_workers_train_every_model(tmp_path, warehouse):
    done = train(tmp_path, warehouse, "--workers", "2")
    summary = check_run(tmp_path, done)
    assert "2 worker(s)" in done.stdout
    assert all(model["epochs"] == 2 for model in summary["models"].values())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--config", "nonsense"], "unknown training configuration 'nonsense'"),
        (["--models", "vql,din"], "unknown model 'din'"),
        (["--dt", "2022-04-22"], "dt=2022-04-22 of kuairand/sequences is not published"),
    ],
)
def test_wrong_arguments_give_one_clear_message(tmp_path, warehouse, more, says):
    done = train(tmp_path, warehouse, "--workers", "0", *more)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr

"""The whole chain by hand, stage by stage, on simulations: VQL finds the planted long-term interest.

About two minutes a seed on two cores; SEEDS=11,12,13 trains on more than one. The stages are the very command lines
that the DAG runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DT = "2022-04-21"


def run(folder: Path, *words: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.parametrize("seed", [int(seed) for seed in os.environ.get("SEEDS", "11").split(",")])
def test_vql_beats_mean_pooling_by_more_than_the_intervals(tmp_path, seed):
    raw, runs = str(tmp_path / "raw"), str(tmp_path / "runs")
    partition = [
        "--dataset",
        "kuairand_simulated",
        "--warehouse",
        str(tmp_path / "w"),
        "--dt",
        DT,
        "--attempt",
        f"seed{seed}",
    ]
    audit = ["--reports", str(tmp_path / "reports")]
    run(tmp_path, "etl.datasets.simulate", "--out", raw, "--seed", str(seed))
    run(tmp_path, "etl.jobs.events", *partition, "--raw", raw)
    run(tmp_path, "etl.quality.judge.audit", *partition, "--stage", "events", *audit)
    run(tmp_path, "etl.jobs.sequences", *partition, "--raw", raw)
    run(tmp_path, "etl.quality.judge.audit", *partition, "--stage", "sequences", *audit)
    run(tmp_path, "training.train", *partition, "--runs", runs, "--workers", "0", "--seed", str(seed))
    run(tmp_path, "evaluation.evaluate", *partition, "--runs", runs, "--raw", raw)
    result = json.loads((Path(runs) / f"seed{seed}" / "evaluation.json").read_text())
    models = {model["name"]: model for model in result["models"]}
    print({name: round(model["auc"], 4) for name, model in models.items()}, "best", result["best_auc"])
    vql, pooling = models["vql"], models["mean_pooling"]
    widths = (vql["auc_high"] - vql["auc_low"]) + (pooling["auc_high"] - pooling["auc_low"])
    assert vql["auc"] - pooling["auc"] > widths
    assert vql["auc"] < result["best_auc"] + 0.01
    # Five seeds of the training came to .7860 to .7894, exact attention to .7844 to .7905, on one simulation
    # (training/configs/default.py); simulations differ by some .01. Below is a regression of the model, not noise.
    assert vql["auc"] > 0.765
    assert vql["auc"] > models["softmax_attention"]["auc"] - 0.015

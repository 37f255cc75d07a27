"""What CONTRIBUTING.md walks through works as it stands there."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from etl.datasets.definition import dataset
from etl.quality.judge.check import main as check
from etl.stage.errors import EXIT_CORRECT
from infra import settings
from tests.etl.quality.feed import Feed, one_spark_session
from tests.training.conftest import random_partition
from training.data import Sequences
from training.loop import TrainingData, Worker, train_model

TEXT = (settings.ROOT / "CONTRIBUTING.md").read_text()
DT = "2024-03-04"


def block(section: str, language: str) -> str:
    """Return the first code block of a language in a section."""
    found = re.search(rf"^## {section}$.*?^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_the_baseline_is_the_one_of_the_registry_and_its_configuration_trains() -> None:
    interests = settings.ROOT / "training/model/interests"
    assert block("Add a baseline", "python") == (interests / "linear_attention.py").read_text()
    assert block("Add a baseline", "text") in (interests / "__init__.py").read_text()
    assert block("Add a baseline", "py") in (settings.ROOT / "tests/training/oracles.py").read_text()
    shown: dict = {}
    exec(block("Add a baseline", "python3"), shown)
    config = dataclasses.replace(shown["config"](), epochs=1, min_epoch_steps=1)
    items, rows = random_partition()
    data = TrainingData.of(Sequences.from_arrow(rows), items, config)
    for name in config.models:
        _, result = train_model(name, data, config, Worker(), lambda _: None)
        assert np.isfinite(result.best_logloss)


def test_the_twenty_rows_become_a_published_day_and_the_stage_reads_it(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "log.csv").write_text(block("Add a data set", "csv"))
    (tmp_path / "reading.yaml").write_text(block("Add a data set", "yaml"))
    feed = Feed(tmp_path, dataset(str(tmp_path / "reading.yaml")), tmp_path / "reports")
    partition = [
        "--dataset",
        str(tmp_path / "reading.yaml"),
        "--warehouse",
        feed.store.warehouse,
        "--dt",
        DT,
        "--attempt",
        "by-hand",
    ]
    with one_spark_session():
        feed.build_events("by-hand", DT)
    monkeypatch.setattr(sys, "argv", ["check", *partition, "--stage", "events"])
    check()
    assert "0 critical" in capsys.readouterr().out
    feed.audit("by-hand", DT).publish("events")
    counts = [feed.store.require("events", f"2024-03-0{day}").counts for day in (1, 2, 3, 4)]
    assert sum(day["rows_read"] for day in counts) == 20 == sum(day["events"] for day in counts)

    stage = tmp_path / "longest.py"
    stage.write_text(block("Add a stage", "python"))

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(stage), *partition, *more],
            cwd=tmp_path,
            env=settings.environment() | {"PYTHONPATH": str(settings.ROOT)},
            capture_output=True,
            text=True,
        )

    done = run("--most", "2")
    assert (
        done.returncode == 0
        and [line.split(": ")[1] for line in done.stdout.splitlines()] == ["2 events on 2024-03-04"] * 2
    ), done
    wrong = run("--most", "0")
    assert wrong.returncode == EXIT_CORRECT and "remedy: give 1 or more" in wrong.stderr

"""What is wrong in MLflow is told as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation import promote
from evaluation.gate import Decision
from tests.evaluation.conftest import DATASET, DT
from training.registry import Registry

ATTEMPT = f"{DATASET}-{DT}-00000000-c0"


def test_a_version_that_is_gone_behind_its_alias_is_named(stages, monkeypatch):
    monkeypatch.setattr(promote, "quality_gate", lambda evaluation, primary: Decision(True, "lenient"))
    monkeypatch.setattr(promote, "mechanical_gate", lambda *args: Decision(True, "not checked"))
    stages.train(ATTEMPT)
    for module in ("main", "register", "promote"):
        stages.run(module, ATTEMPT)
    registry = Registry(DATASET)
    database = Path(registry.uri.removeprefix("sqlite:///"))
    import sqlite3

    with sqlite3.connect(database) as connection:  # MLflow itself takes the alias along
        connection.execute("UPDATE registered_model_aliases SET version = 7 WHERE alias = 'champion'")
    other = ATTEMPT.replace("c0", "c1")
    stages.train(other)
    with pytest.raises(Exception, match="version 7 of vql_kuairand_simulated is gone, yet the alias champion points at it") as caught:
        stages.run("main", other)
    assert getattr(caught.value, "exit_code", None) == 2
    import mlflow

    eval(caught.value.remedy.partition("take it away: ")[2], {"mlflow": mlflow})
    stages.run("main", other)
    assert stages.json(other, "evaluation")["champion"] is None

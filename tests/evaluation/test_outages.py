"""An MLflow that is away at any moment costs waiting: the same command lines, called again, end with one run and one version."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from etl.errors import EXIT_TRY_AGAIN, TryAgainError
from evaluation import main as evaluation_main
from evaluation import promote
from evaluation.gate import Decision
from infra import settings
from tests.evaluation.conftest import DATASET, DT, Stages
from tests.evaluation.mlflow_server import MlflowServer, Wire
from training.registry import Registry

ATTEMPT = f"{DATASET}-{DT}-00000000-c0"


@pytest.fixture(scope="module")
def server(empty_database, tmp_path_factory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    server = MlflowServer(folder / "mlflow.db")
    server.start()
    yield server
    server.stop()


def use(stages: Stages, uri: str) -> None:
    stages.monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    stages.monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def check_one_of_each(attempt: str, status: str, aliases: list[str]) -> None:
    registry = Registry(DATASET)
    experiment = registry.client.get_experiment_by_name(DATASET)
    [run] = registry.client.search_runs([experiment.experiment_id], f"tags.`pipeline.attempt` = '{attempt}'")
    [version] = registry.client.search_model_versions(f"name = '{registry.name}' AND tags.`pipeline.attempt` = '{attempt}'")
    [model] = registry.client.search_logged_models([experiment.experiment_id], filter_string=f"tags.`pipeline.attempt` = '{attempt}'")
    assert run.info.status == status
    assert version.source == model.model_uri
    assert model.status == "READY"
    assert model.source_run_id == run.info.run_id
    assert registry.aliases_of(str(version.version)) == aliases
    assert {"vql/auc", "mean_pooling/logloss"} <= run.data.metrics.keys()
    assert {"data.snapshot_digest", "config_digest"} <= run.data.tags.keys()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True], ids=["request", "answer"])
def test_a_wire_that_breaks_at_every_change_leaves_one_run_and_one_version(stages, server, monkeypatch, lost):
    """Each stage is called again and again; each call gets one change further than the one before, before MLflow is away."""
    monkeypatch.setattr(promote, "quality_gate", lambda evaluation, primary: Decision(True, "lenient"))
    monkeypatch.setattr(promote, "mechanical_gate", lambda *args: Decision(True, "not checked"))
    monkeypatch.setattr(evaluation_main, "Audit", lambda *args, **more: SimpleNamespace(publish=lambda stage: None))
    monkeypatch.setattr(evaluation_main, "written_after", lambda *args: contextlib.nullcontext())
    attempt = f"{ATTEMPT}{int(lost)}"
    wire = Wire(server.uri)
    use(stages, server.uri)
    stages.train(attempt, seed=int(lost))
    use(stages, wire.uri)
    broken: dict[str, int] = {}
    for module in ("evaluation.main", "evaluation.register", "evaluation.promote"):
        for at in range(1, 100):
            wire.cut(at, lost)
            try:
                stages.run(module.rpartition(".")[2], attempt)
            except TryAgainError:
                broken[module] = at
                continue
            break
        assert not wire.down
        wire.mend()
    assert broken["evaluation.main"] >= 3
    assert broken["evaluation.register"] >= 5
    assert broken["evaluation.promote"] >= 3
    use(stages, server.uri)
    check_one_of_each(attempt, "RUNNING", ["challenger", "champion"])
    wire.close()


def as_airflow_does(words: list[str], env: dict[str, str], when_away) -> list[int]:
    """Call a stage until it succeeds, with the retries and waits of its task; return the exit codes.

    Args:
        when_away: called once, after the first try that has to be repeated.
    """
    import time

    from dags._exits import StageRetries

    codes: list[int] = []
    retries = len(settings.retry_waits())
    while not codes or codes[-1] != 0:
        done = subprocess.run([sys.executable, "-m", *words], cwd=settings.ROOT, env=env, capture_output=True, text=True, check=False)
        codes.append(done.returncode)
        if done.returncode != 0:
            decision = StageRetries().evaluate(SystemExit(done.returncode), len(codes), retries)
            assert decision.retry_delay is not None, done.stderr
            assert len(codes) <= retries, done.stderr
            assert "Traceback" not in done.stderr
            assert "does not answer" in done.stderr
            if len(codes) == 1:
                when_away()
            time.sleep(decision.retry_delay.total_seconds())
    return codes


@pytest.mark.slow
def test_a_server_that_goes_away_at_every_stage_costs_waiting_only(stages, empty_database, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGVIEW_RETRY_WAITS", "1 2 4 8 16")
    shutil.copy(empty_database, tmp_path / "served.db")
    server = MlflowServer(tmp_path / "served.db")
    env = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    place = ["--dataset", DATASET, "--warehouse", str(stages.warehouse), "--dt", DT, "--attempt", ATTEMPT, "--runs", str(stages.runs)]
    more = {"training.main": ["--config", "tiny", "--workers", "0"], "evaluation.main": ["--raw", str(stages.raw), "--reports", str(tmp_path / "reports")]}
    try:
        for module in ("training.main", "evaluation.main", "evaluation.register", "evaluation.promote", "training.caches"):
            server.stop()  # before training it has never run
            codes = as_airflow_does([module, *place, *more.get(module, [])], env, server.start)
            assert codes[0] == (0 if module == "training.main" else EXIT_TRY_AGAIN)
    finally:
        server.stop()
    server.start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        tags = Registry(DATASET).version("1").tags
        check_one_of_each(ATTEMPT, "FINISHED", ["challenger", "champion"] if tags["validation_status"] == "passed" else ["challenger"])
        assert tags["promotion"] in ("promoted", "refused")
    finally:
        server.stop()


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

"""An MLflow that is away costs waiting, and what is wrong in it is reported as what it is."""

from __future__ import annotations

import http.server
import importlib
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from etl.stage.commands import run_stage
from etl.stage.errors import EXIT_CORRECT, EXIT_TRY_AGAIN
from evaluation.gate import Decision
from evaluation.release import promote
from tests.evaluation.conftest import DATASET, DT
from tests.evaluation.mlflow_server import MlflowServer
from training.registry import Registry
from training.tracking import METRICS_FILE, runs_below

ATTEMPT = f"{DATASET}-{DT}-00000000-c0"
# stage, the request that the server is killed at, whether the server has done it before it dies, exit code of that call
OUTAGES = [
    ("training.train", ("/runs/create",), True, 0),
    ("training.train", ("/runs/log-batch",), False, 0),  # called again, it sends what the first call kept
    ("evaluation.evaluate", ("/runs/log-batch", '"auc"'), True, EXIT_TRY_AGAIN),
    ("evaluation.release.register", ("PUT", "/mlflow-artifacts/"), False, EXIT_TRY_AGAIN),
    ("evaluation.release.register", ("/model-versions/create",), True, EXIT_TRY_AGAIN),
    ("evaluation.release.promote", ("/registered-models/alias", "champion"), True, EXIT_TRY_AGAIN),
    ("evaluation.user_caches", ("/runs/update", "FINISHED"), True, EXIT_TRY_AGAIN),
]


@pytest.fixture
def server(empty_database, tmp_path) -> Iterator[MlflowServer]:
    shutil.copy(empty_database, tmp_path / "served.db")
    server = MlflowServer(tmp_path / "served.db")
    yield server
    server.close()


def place_of(stages) -> list[str]:
    """Return the arguments that every stage takes."""
    partition = ["--dataset", DATASET, "--warehouse", str(stages.warehouse), "--dt", DT, "--attempt", ATTEMPT]
    return [*partition, "--runs", str(stages.runs)]


@pytest.mark.slow
def test_a_server_killed_in_every_stage_leaves_one_run_and_one_version(stages, server, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(promote, "quality_gate", lambda evaluation, primary: Decision(True, "lenient"))
    monkeypatch.setattr(promote, "mechanical_gate", lambda *args: Decision(True, "not checked"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    place = place_of(stages)
    more = {
        "training.train": ["--config", "tiny", "--workers", "0"],
        "evaluation.evaluate": ["--raw", str(stages.raw), "--reports", str(tmp_path / "reports")],
    }

    def call(module: str) -> int:
        monkeypatch.setattr(sys, "argv", [module, *place, *more.get(module, [])])
        try:
            run_stage(importlib.import_module(module).main)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    for number, (module, request, answered, code) in enumerate(OUTAGES):
        server.start()
        server.kill_at(*request, answered=answered)
        capsys.readouterr()
        assert call(module) == code
        assert server.killed_at, f"{module} never asked for {request}: {capsys.readouterr()}"
        said = capsys.readouterr().err
        assert ("does not answer" in said) == (code == EXIT_TRY_AGAIN), said
        is_last = number + 1 == len(OUTAGES) or OUTAGES[number + 1][0] != module
        if is_last and code:
            assert call(module) == EXIT_TRY_AGAIN  # it is still away
            server.start()
            assert call(module) == 0

    registry = Registry(DATASET)
    experiment = registry.client.get_experiment_by_name(DATASET).experiment_id
    [run] = registry.client.search_runs([experiment], f"tags.`pipeline.attempt` = '{ATTEMPT}'")
    models = {one.data.tags["pipeline.model"]: one for one in runs_below(registry.client, run)}
    [version] = registry.client.search_model_versions(f"name = '{registry.name}'")
    [model] = registry.client.search_logged_models([experiment], filter_string="name = 'vql'")
    assert run.info.status == "FINISHED"
    assert len(models) == 3 and len(registry.client.search_runs([experiment])) == 4
    assert {one.info.status for one in models.values()} == {"FINISHED"}
    assert {"auc", "hashed_event_share"} <= run.data.metrics.keys()
    assert {"auc", "train_loss"} <= models["vql"].data.metrics.keys()
    assert {"logloss", "validation_logloss"} <= models["mean_pooling"].data.metrics.keys()
    assert {"data.snapshot_digest", "config_digest"} <= run.data.tags.keys()
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert not (stages.runs / ATTEMPT / METRICS_FILE).exists()
    assert version.source == model.model_uri
    assert model.status == "READY"
    assert registry.aliases() == dict.fromkeys(("anchor", "challenger", "champion"), version.version)
    assert registry.version(version.version).tags["validation_status"] == "passed"
    assert registry.package(version.version).is_dir()


BODIES = ("", "<html><body>Sign in</body></html>", '{"error_code": "PERMISSION_DENIED", "message": "no rights"}')


@pytest.fixture(
    params=[(status, body) for status in (401, 403) for body in BODIES], ids=lambda one: f"{one[0]}-{one[1][:5]}"
)
def gatekeeper(request) -> Iterator[tuple[str, list[str]]]:
    """A server that refuses whoever asks; yields its address and what was asked."""
    status, body = request.param
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(f"{self.command} {self.path}")
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = refuse

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_user_whom_mlflow_refuses_is_told_at_once_what_to_set(gatekeeper, stages, monkeypatch, capsys):
    address, asked = gatekeeper
    stages.train(ATTEMPT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    place = place_of(stages)
    more = {
        "training.train": ["--config", "tiny", "--workers", "0"],
        "evaluation.evaluate": ["--raw", str(stages.raw)],
        "evaluation.prune": ["--reports", str(stages.raw)],
    }
    (stages.runs / ATTEMPT / "evaluation.json").write_text("{}")
    (stages.runs / ATTEMPT / "registration.json").write_text("{}")
    for module in (
        "evaluation.evaluate",
        "evaluation.release.register",
        "evaluation.release.promote",
        "evaluation.user_caches",
        "evaluation.prune",
        "training.train",
    ):
        asked.clear()
        if module == "training.train":
            shutil.rmtree(stages.runs / ATTEMPT)
        monkeypatch.setattr(sys, "argv", [module, *place, *more.get(module, [])])
        with pytest.raises(SystemExit) as end:
            run_stage(importlib.import_module(module).main)
        said = capsys.readouterr().err
        assert (end.value.code, len(asked)) == (EXIT_CORRECT, 1), (module, said, asked)
        assert said.startswith(f"error: MLflow at {address} refuses this user: ")
        assert "remedy: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN" in said
        assert "Traceback" not in said


def test_a_version_that_is_gone_behind_its_alias_is_named(stages, monkeypatch):
    monkeypatch.setattr(promote, "quality_gate", lambda evaluation, primary: Decision(True, "lenient"))
    monkeypatch.setattr(promote, "mechanical_gate", lambda *args: Decision(True, "not checked"))
    stages.train(ATTEMPT)
    for module in ("evaluate", "release.register", "release.promote"):
        stages.run(module, ATTEMPT)
    registry = Registry(DATASET)
    database = Path(registry.uri.removeprefix("sqlite:///"))
    import sqlite3

    with sqlite3.connect(database) as connection:  # MLflow itself takes the alias along
        connection.execute("UPDATE registered_model_aliases SET version = 7 WHERE alias = 'champion'")
    other = ATTEMPT.replace("c0", "c1")
    stages.train(other)
    with pytest.raises(
        Exception, match="version 7 of vql_kuairand_simulated is gone, yet the alias champion points at it"
    ) as caught:
        stages.run("evaluate", other)
    assert getattr(caught.value, "exit_code", None) == 2
    import mlflow

    eval(caught.value.remedy.partition("take it away: ")[2], {"mlflow": mlflow})
    stages.run("evaluate", other)
    assert stages.json(other, "evaluation")["champion"] is None

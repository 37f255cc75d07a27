"""The report of a partition in MLflow.

On the run of its attempt, also when its gate stopped it, and never at its cost.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from etl.datasets.definition import dataset
from etl.stage.identity import report_page
from training import log_report
from training.tracking import ATTEMPT_TAG, attempt_run

DATASET, DT, ATTEMPT = "kuairand_simulated", "2022-04-21", "kuairand_simulated-2022-04-21-000000000000"


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return [
        "--dataset",
        DATASET,
        "--warehouse",
        str(tmp_path / "warehouse"),
        "--dt",
        DT,
        "--attempt",
        ATTEMPT,
        "--reports",
        str(tmp_path),
    ]


def write(reports: Path, verdict: str) -> Path:
    path = report_page(reports, DATASET, DT, ATTEMPT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<h1>{verdict}</h1>")
    path.with_suffix(".json").write_text(json.dumps({"verdict": verdict}))
    return path


@pytest.mark.parametrize(("verdict", "status"), [("stopped", "FAILED"), ("warned", "RUNNING")])
def test_the_page_is_an_artifact_of_the_attempts_run(arguments, tmp_path, capsys, verdict, status):
    from mlflow import MlflowClient

    written = write(tmp_path, verdict)
    with attempt_run(dataset(DATASET), DT, ATTEMPT, {}) as earlier:
        pass
    log_report.main(arguments)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["run_id"] == earlier.info.run_id
    run = MlflowClient().get_run(found["run_id"])
    assert (run.info.experiment_id, run.info.status, run.data.tags[ATTEMPT_TAG]) == (
        found["experiment_id"],
        status,
        ATTEMPT,
    )
    assert (
        Path(MlflowClient().download_artifacts(found["run_id"], found["artifact"], str(tmp_path))).read_text()
        == written.read_text()
    )


def test_a_retry_that_passes_replaces_the_page_of_the_try_that_was_stopped(arguments, tmp_path, capsys):
    from mlflow import MlflowClient

    for verdict in ("stopped", "passed"):
        write(tmp_path, verdict)
        log_report.main(arguments)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert MlflowClient().get_run(found["run_id"]).info.status == "RUNNING"
    assert [file.path for file in MlflowClient().list_artifacts(found["run_id"], log_report.ARTIFACT_FOLDER)] == [
        found["artifact"]
    ]


def test_without_mlflow_or_page_it_ends_well_and_says_why(arguments, tmp_path, monkeypatch, capsys):
    log_report.main(arguments)
    assert "there is no report" in (said := capsys.readouterr().out)
    assert json.loads(said.splitlines()[-1])["run_id"] is None
    write(tmp_path, "passed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log_report.main(arguments)
    assert "does not answer" in (said := capsys.readouterr().out)
    assert json.loads(said.splitlines()[-1])["run_id"] is None

"""Runs are found again, and metrics outlive a tracking server that is down."""

from __future__ import annotations

import pytest

from etl.datasets import dataset
from training.tracking import MetricsBuffer, attempt_run

ATTEMPT = "kuairand-2022-04-21-000000000000"


def runs(attempt: str = ATTEMPT) -> list:
    from mlflow import MlflowClient

    client = MlflowClient()
    return client.search_runs([client.get_experiment_by_name("kuairand").experiment_id], f"tags.`pipeline.attempt` = '{attempt}'")


def test_a_retry_continues_the_run_and_a_new_attempt_has_its_own(mlflow_store, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CTX_TRY_NUMBER", "1")
    with pytest.raises(RuntimeError, match="killed"), attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {"config_digest": "a"}) as first:
        raise RuntimeError("killed")
    assert runs()[0].info.status == "FAILED"
    monkeypatch.setenv("AIRFLOW_CTX_TRY_NUMBER", "2")
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as second:
        assert runs()[0].info.status == "RUNNING"
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT[:-1] + "1", {}) as other:
        pass
    assert second.info.run_id == first.info.run_id != other.info.run_id
    (run,) = runs()
    assert run.info.status == "FINISHED"
    expected = {"pipeline.partition": "2022-04-21", "pipeline.dataset": "kuairand", "simulated": "false", "config_digest": "a", "airflow.try_number": "2"}
    assert expected.items() <= run.data.tags.items()
    assert {"mlflow.source.git.commit", "git.dirty"} <= run.data.tags.keys()


def test_artifacts_stay_beside_the_database_whatever_the_working_folder(mlflow_store, tmp_path):
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as run:
        assert run.info.artifact_uri.startswith((tmp_path / "mlartifacts" / "kuairand").as_uri())


def test_metrics_wait_in_a_file_while_the_server_is_down(mlflow_store, monkeypatch, tmp_path, capsys):
    from mlflow import MlflowClient

    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as run:
        run_id = run.info.run_id
    file = tmp_path / "metrics.jsonl"
    buffer = MetricsBuffer(run_id, file)
    buffer.log({"vql/loss": 0.9}, 0)
    assert not file.exists()

    def down(*args, **kwargs):
        raise ConnectionError("refused")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_batch", down)
        buffer.log({"vql/loss": 0.8}, 1)
        buffer.log({"vql/loss": 0.7}, 2)
        assert buffer.flush() is False
    assert capsys.readouterr().out.count("warning") == 1
    assert len(file.read_text().splitlines()) == 2
    assert MetricsBuffer(run_id, file).flush()  # a later process sends what this one could not
    assert not file.exists()
    history = MlflowClient().get_metric_history(run_id, "vql/loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.9), (1, 0.8), (2, 0.7)]


def test_training_goes_on_without_mlflow(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as run:
        buffer = MetricsBuffer(run.info.run_id, tmp_path / "metrics.jsonl")
        buffer.log({"vql/loss": 0.9}, 0)
    assert run.info.run_id is None
    assert "going on without it" in capsys.readouterr().out
    assert buffer.flush() is False
    assert "0.9" in (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(Exception, match=r"127\.0\.0\.1"), attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}, required=True):
        pass

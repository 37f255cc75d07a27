"""Runs are found again, and metrics outlive a tracking server that is down."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from mlflow import MlflowClient

from etl.datasets.definition import dataset
from etl.stage.errors import EXIT_CORRECT, GateError, StageError, TryAgainError
from etl.stage.folder import Folder
from infra import settings
from tests.waiting import wait_for
from training.system_metrics import system_metrics
from training.tracking import NAME_TAG, NOTE_TAG, MetricsBuffer, attempt_run, end_run

ATTEMPT = "kuairand-2022-04-21-000000000000"


def runs(attempt: str = ATTEMPT) -> list:
    client = MlflowClient()
    return client.search_runs(
        [client.get_experiment_by_name("kuairand").experiment_id], f"tags.`pipeline.attempt` = '{attempt}'"
    )


def test_a_retry_continues_the_run_and_a_new_attempt_has_its_own(mlflow_store, monkeypatch):
    with (
        pytest.raises(RuntimeError, match="killed"),
        attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {"config_digest": "a"}) as first,
    ):
        raise RuntimeError("killed")
    assert runs()[0].info.status == "FAILED"
    monkeypatch.setenv("LONGVIEW_AIRFLOW_RUN_URL", "http://127.0.0.1:8080/dags/d/runs/r")
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as second:
        assert runs()[0].info.status == "RUNNING"
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT[:-1] + "1", {}) as other:
        pass
    assert second.info.run_id == first.info.run_id != other.info.run_id
    (run,) = runs()
    assert run.info.status == "RUNNING"  # other stages follow
    expected = {
        "pipeline.partition": "2022-04-21",
        "pipeline.dataset": "kuairand",
        "simulated": "false",
        "config_digest": "a",
        "airflow.run_url": "http://127.0.0.1:8080/dags/d/runs/r",
        "mlflow.note.content": f"{dataset('kuairand').title}: partition **2022-04-21**, attempt `{ATTEMPT}` · "
        "[Run in Airflow](http://127.0.0.1:8080/dags/d/runs/r)",
    }
    assert expected.items() <= run.data.tags.items()
    assert {"mlflow.source.git.commit", "git.dirty", "mlflow.user"} <= run.data.tags.keys()
    assert run.info.run_name == "2022-04-21 0000"
    MlflowClient().set_tag(run.info.run_id, NOTE_TAG, run.data.tags[NOTE_TAG] + "\n\na person's remark")
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {NAME_TAG: "2022-04-21 default 0000"}):
        pass
    assert runs()[0].info.run_name == "2022-04-21 default 0000"  # known once training comes
    assert runs()[0].data.tags[NOTE_TAG].endswith("a person's remark")
    experiment = MlflowClient().get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}, last=True):
        pass
    assert runs()[0].info.status == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StageError("odd", "correct it"), "FAILED"),
        (GateError("no", "correct it"), "FAILED"),
        (RuntimeError("odd"), "FAILED"),
        (TryAgainError("odd", "wait"), "RUNNING"),
    ],
)
def test_a_run_ends_with_its_stage_unless_the_same_line_may_succeed_later(mlflow_store, error, status):
    with pytest.raises(type(error)), attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}):
        raise error
    assert runs()[0].info.status == status
    end_run(dataset("kuairand"), ATTEMPT, "KILLED")  # what the task does when its stage cannot
    assert runs()[0].info.status == ("KILLED" if status == "RUNNING" else status)
    end_run(dataset("kuairand"), "never begun", "KILLED")
    assert runs("never begun") == []


def test_sigterm_ends_the_run_as_killed_and_a_second_one_takes_nothing_of_it(mlflow_store):
    code = f"""if True:
        import os, signal, time
        from etl.datasets.definition import dataset
        from training.tracking import attempt_run
        with attempt_run(dataset("kuairand"), "2022-04-21", {ATTEMPT!r}, {{}}):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(600)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # while it leaves
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=settings.ROOT)
    assert done.returncode == 143, done.stderr
    assert runs()[0].info.status == "KILLED"


def test_an_attempt_of_another_day_is_refused(mlflow_store):
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}):
        pass
    with (
        pytest.raises(StageError, match=r"belongs to dt=2022-04-21 of kuairand .* not to dt=2022-04-22"),
        attempt_run(dataset("kuairand"), "2022-04-22", ATTEMPT, {}),
    ):
        pass
    assert runs()[0].data.tags["pipeline.partition"] == "2022-04-21"


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(mlflow_store):
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as run:
        pass
    MlflowClient().delete_experiment(run.info.experiment_id)
    for required in (True, False):
        with (
            pytest.raises(StageError, match="was deleted") as caught,
            attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}, required=required),
        ):
            pass
        assert caught.value.exit_code == EXIT_CORRECT
    subprocess.run(caught.value.remedy.removeprefix("restore it: "), shell=True, check=True, capture_output=True)
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as again:
        assert again.info.experiment_id == run.info.experiment_id


def test_artifacts_stay_beside_the_database_whatever_the_working_folder(mlflow_store, tmp_path):
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as run:
        assert run.info.artifact_uri.startswith((tmp_path / "mlartifacts" / "kuairand").as_uri())


def test_metrics_wait_in_a_file_while_the_server_is_down(mlflow_store, monkeypatch, tmp_path, capsys):
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as run:
        run_id = run.info.run_id
    file, folder = tmp_path / "metrics.jsonl", Folder(str(tmp_path), "--runs")
    buffer = MetricsBuffer(run_id, folder)
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
    assert MetricsBuffer(run_id, folder).flush()  # a later process sends what this one could not
    assert not file.exists()
    history = MlflowClient().get_metric_history(run_id, "vql/loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.9), (1, 0.8), (2, 0.7)]


def test_training_goes_on_without_mlflow(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}, required=False) as run:
        buffer = MetricsBuffer(run.info.run_id, Folder(str(tmp_path), "--runs"))
        buffer.log({"vql/loss": 0.9}, 0)
    assert run.info.run_id is None
    assert "going on without MLflow" in capsys.readouterr().out
    assert buffer.flush() is False
    assert "0.9" in (tmp_path / "metrics.jsonl").read_text()
    with (
        pytest.raises(TryAgainError, match=r"127\.0\.0\.1.* does not answer"),
        attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}),
    ):
        pass


def test_system_metrics_are_sampled_to_the_end_and_a_run_that_goes_on_counts_on(mlflow_store, tmp_path):

    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as run:
        run_id = run.info.run_id
    file = tmp_path / "system_metrics.jsonl"
    for step in range(2):
        with system_metrics(MetricsBuffer(run_id, Folder(str(tmp_path), "--runs"), file.name)):
            pass
        wait_for("sample", lambda step=step: samples(run_id) == list(range(step + 1)))  # on a busy machine it is later
    found = client_metrics(run_id)
    wanted = ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage")
    assert {f"system/{name}" for name in wanted} <= found.keys()
    assert found["system/system_memory_usage_megabytes"] > 0
    wait_for("end of sending", lambda: not file.exists())


def test_system_metrics_wait_for_a_server_that_is_away_and_none_fails_a_training(
    mlflow_store, monkeypatch, tmp_path, capsys
):
    from mlflow import MlflowClient
    from mlflow.system_metrics import system_metrics_monitor

    with attempt_run(dataset("kuairand"), "2022-04-21", ATTEMPT, {}) as run:
        run_id = run.info.run_id
    file = tmp_path / "system_metrics.jsonl"
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    away = threading.Event()
    away.set()
    log_batch = MlflowClient.log_batch

    def answers(*args, **kwargs):
        if away.is_set():
            raise ConnectionError("refused")
        return log_batch(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", answers)
    with system_metrics(MetricsBuffer(run_id, Folder(str(tmp_path), "--runs"), file.name)):
        wait_for("samples in the file", lambda: file.exists() and file.read_text().count("system/cpu_") > 2)
        away.clear()
        wait_for("samples in MLflow", lambda: "system/cpu_utilization_percentage" in client_metrics(run_id))
    assert capsys.readouterr().out.count("warning") == 1
    wait_for("end of sending", lambda: not file.exists())
    assert samples(run_id) == list(range(len(samples(run_id)))) and len(samples(run_id)) > 3  # none was lost

    def broken(*args, **kwargs):
        raise OSError("no /proc")

    monkeypatch.setattr(system_metrics_monitor.SystemMetricsMonitor, "collect_metrics", broken)
    with system_metrics(MetricsBuffer(run_id, Folder(str(tmp_path), "--runs"), file.name)):
        pass
    said = "warning: no system metrics from here on: OSError: no /proc"
    wait_for("a warning, and no more", lambda: said in capsys.readouterr().out)


def samples(run_id: str) -> list[int]:
    return [one.step for one in MlflowClient().get_metric_history(run_id, "system/cpu_utilization_percentage")]


def client_metrics(run_id: str) -> dict[str, float]:
    return MlflowClient().get_run(run_id).data.metrics

"""One attempt has one MLflow run, found again by its tag, and a tracking server that is down never costs a training."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from etl.cli import log
from etl.datasets import DatasetDefinition
from etl.errors import StageError
from etl.store import code_version
from etl.uris import without_secrets
from infra import settings

ATTEMPT_TAG = "pipeline.attempt"
METRICS_PER_REQUEST = 500
ROOT = Path(__file__).resolve().parents[1]


def set_tracking() -> str:
    """Point MLflow at MLFLOW_TRACKING_URI (default: the store of `make run` and `make up`), quietly; return the URI."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", settings.tracking_uri())
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    uri = without_secrets(os.environ["MLFLOW_TRACKING_URI"], "MLFLOW_TRACKING_URI")
    if uri.startswith("sqlite:///"):
        _database(uri).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    return uri


@contextmanager
def attempt_run(definition: DatasetDefinition, dt: str, attempt: str, tags: Mapping[str, str], required: bool = False) -> Iterator:
    """Find or create the attempt's run (experiment = data set), make it the active one and yield it.

    A retry continues the run, a finished one is reopened. The run ends FINISHED, or FAILED when the body raises.

    Args:
        tags: added to the standard ones (partition, data set, git, Airflow ids); the same key wins over those.
        required: False: when MLflow does not answer, warn and yield a run whose `info.run_id` is None.
    """
    try:
        run = _find_or_create(definition, dt, attempt, tags)
    except StageError:
        raise  # an address to mend, not to print
    except Exception as error:
        if required:
            raise
        log(
            f"warning: MLflow at {os.environ.get('MLFLOW_TRACKING_URI')} does not answer, going on without it: {_first_line(error)}"
        )
        run = None
    if run is None:
        yield SimpleNamespace(info=SimpleNamespace(run_id=None, experiment_id=None))
        return
    import mlflow

    with mlflow.start_run(run_id=run.info.run_id) as active:
        yield active


class MetricsBuffer:
    """Metrics of a run: appended to a local file first, then sent; what could not be sent is sent again by `flush`.

    Args:
        run_id: the run; None when MLflow did not answer at the start (the metrics stay in the file).
        path: JSON lines, {"key", "value", "step", "timestamp"}, only what MLflow does not have yet.
    """

    def __init__(self, run_id: str | None, path: Path) -> None:
        self.run_id, self.path = run_id, Path(path)
        self._server_down = run_id is None
        self._pending: list[dict] = []
        if self.path.exists():
            self._pending = [json.loads(line) for line in self.path.read_text().splitlines() if line]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of one step; never raises for MLflow's sake."""
        now = int(time.time() * 1000)
        rows = [{"key": key, "value": float(value), "step": step, "timestamp": now} for key, value in metrics.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self._pending += rows
        if not self._server_down:
            self.flush()

    def flush(self) -> bool:
        """Send what is pending; return whether nothing is left. Metrics are not sent twice by one buffer."""
        if not self._pending:
            return True
        if self.run_id is None:
            return False
        try:
            set_tracking()
            from mlflow import MlflowClient
            from mlflow.entities import Metric

            client = MlflowClient()
            while self._pending:
                part = self._pending[:METRICS_PER_REQUEST]
                client.log_batch(
                    self.run_id,
                    metrics=[Metric(row["key"], row["value"], row["timestamp"], row["step"]) for row in part],
                )
                self._pending = self._pending[len(part) :]
        except Exception as error:
            if not self._server_down:
                log(f"warning: MLflow takes no metrics, keeping them in {self.path}: {_first_line(error)}")
            self._server_down = True
            return False
        self._server_down = False
        self.path.unlink(missing_ok=True)
        return True


def _find_or_create(definition: DatasetDefinition, dt: str, attempt: str, tags: Mapping[str, str]):
    uri = set_tracking()
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(definition.name)
    if experiment is None:
        # A server keeps artifacts where it was told to; beside a bare database they get a folder, never the cwd.
        location = None if uri.startswith("http") else (_artifact_root(uri) / definition.name).as_uri()
        experiment_id = client.create_experiment(definition.name, artifact_location=location)
    else:
        experiment_id = experiment.experiment_id
    wanted = {**_standard_tags(definition, dt, attempt), **tags}
    runs = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{ATTEMPT_TAG}` = '{attempt}'",
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    if not runs:
        return client.create_run(experiment_id, run_name=attempt, tags=wanted)
    for key, value in wanted.items():
        if runs[0].data.tags.get(key) != value:
            client.set_tag(runs[0].info.run_id, key, value)
    return runs[0]


def _standard_tags(definition: DatasetDefinition, dt: str, attempt: str) -> dict[str, str]:
    dirty = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=False,
    )
    tags = {
        ATTEMPT_TAG: attempt,
        "pipeline.partition": dt,
        "pipeline.dataset": definition.name,
        "simulated": str(definition.simulated).lower(),
        "mlflow.source.git.commit": code_version(),
        "git.dirty": str(bool(dirty.stdout.strip())).lower() if dirty.returncode == 0 else "unknown",
    }
    for variable, value in os.environ.items():
        if variable.startswith("AIRFLOW_CTX_"):
            tags[f"airflow.{variable.removeprefix('AIRFLOW_CTX_').lower()}"] = value
    return tags


def _artifact_root(uri: str) -> Path:
    return _database(uri).parent / "mlartifacts" if uri.startswith("sqlite:///") else settings.artifact_root()


def _database(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").split("?")[0]).absolute()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]

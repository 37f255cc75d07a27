"""One attempt has one MLflow run, found again by its tag.

A tracking server that is away costs waiting, never a training.
"""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from etl.datasets.definition import DatasetDefinition
from etl.stage.commands import log
from etl.stage.errors import StageError, TryAgainError, kind_of
from etl.stage.folder import Folder
from etl.stage.identity import RUN_URL_VARIABLE
from etl.stage.uris import without_secrets
from etl.warehouse.schemas import TABLES
from etl.warehouse.store import Manifest, TableStore, code_version
from infra import settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ATTEMPT_TAG, PARTITION_TAG = "pipeline.attempt", "pipeline.partition"
NAME_TAG, NOTE_TAG, PARENT_TAG = "mlflow.runName", "mlflow.note.content", "mlflow.parentRunId"  # MLflow's own
# Of the experiment: its pages are those of trainings. MLflow 3.17 asks the address instead (`settings.mlflow_run_url`).
URL_TAG = "airflow.run_url"
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
LEAVE_WITHIN_SECONDS = 12  # the task that waits for the stage kills it after 15
# MLflow's names of HTTP's 401 and 403, and of requests that no repetition makes good.
UNAUTHORIZED = frozenset(("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"))
REFUSED = frozenset(
    (
        "RESOURCE_DOES_NOT_EXIST",
        "NOT_FOUND",
        "ENDPOINT_NOT_FOUND",
        "INVALID_STATE",
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "RESOURCE_ALREADY_EXISTS",
    )
)
METRICS_FILES = METRICS_FILE, SYSTEM_METRICS_FILE = "metrics.jsonl", "system_metrics.jsonl"  # of a run's folder
METRICS_PER_REQUEST, PARAMETERS_PER_REQUEST, DIGEST_LENGTH = 500, 100, 36  # MLflow takes no more
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
        # Workers of Ray, which inherit it, work in folders of their own.
        uri = os.environ["MLFLOW_TRACKING_URI"] = "?".join([f"sqlite:///{_database(uri)}", *uri.split("?")[1:]])
    mlflow.set_tracking_uri(uri)
    return uri


@contextmanager
def asking_mlflow() -> Iterator[None]:
    """Raise a failure of MLflow as the kind that it is.

    Raises:
        TryAgainError: it does not answer.
        StageError: it refuses, or does not have what it is asked for.
    """
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        cause = failure_of(error)
        if cause is None:
            raise
        raise cause from error


def failure_of(error: Exception) -> StageError | None:
    """Return the stage's error for one that MLflow's client raised.

    None for one of another origin, which is a crash.
    """
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    uri, first = os.environ.get("MLFLOW_TRACKING_URI"), _on_one_line(error)
    if isinstance(error, requests.RequestException):
        response = error.response
        refused = response is not None and response.status_code < 500
        unauthorized = response is not None and response.status_code in (401, 403)
    elif isinstance(error, MlflowException):
        unauthorized = error.error_code in UNAUTHORIZED
        refused = error.error_code in REFUSED
    elif isinstance(error, sqlalchemy.exc.DBAPIError):
        unauthorized = refused = False
    elif kind_of(error) is TryAgainError:  # a store of artifacts
        return TryAgainError(
            f"the artifacts of MLflow at {uri} cannot be reached: {first}", "run the same command again once they can"
        )
    elif isinstance(error, OSError):
        return StageError(
            f"the artifacts of MLflow at {uri} cannot be read or written: {first}",
            "look at its rights and its free space, then run the same command again",
        )
    else:
        return None
    if unauthorized:
        return StageError(
            f"MLflow at {uri} refuses this user: {first}",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of one who may write",
        )
    if refused:
        return StageError(
            f"MLflow at {uri} cannot do that: {first}",
            "look for what it names: somebody may have deleted it; is the address that of an MLflow server?",
        )
    return TryAgainError(
        f"MLflow at {uri} does not answer: {first}",
        "start it, or correct MLFLOW_TRACKING_URI, and run the same command again",
    )


@contextmanager
def attempt_run(
    definition: DatasetDefinition,
    dt: str,
    attempt: str,
    tags: Mapping[str, str],
    required: bool = True,
    last: bool = False,
) -> Iterator:
    """Find or create the attempt's run (experiment = data set) and yield it; it is RUNNING until the last stage of the
    chain has ended.

    A retry continues the run and reopens one that has ended. The run ends FAILED when the body raises, unless the same
    command line may succeed a minute later; KILLED when this process gets SIGTERM, which ends it with code 143.

    Args:
        tags: added to the standard ones (partition, data set, git, Airflow ids); the same key wins over those.
        required: False: when MLflow does not answer, warn and yield a run whose `info.run_id` is None.
        last: the body is the last stage: the run ends FINISHED with it.

    Raises:
        TryAgainError: MLflow does not answer.
        StageError: it refuses, the experiment was deleted, or the attempt is another partition's.
    """
    with kept_open(lambda: run_of_attempt(definition, dt, attempt, tags), _end, required, last) as run:
        yield run


@contextmanager
def kept_open(
    begin: Callable[[], Run], end: Callable[[MlflowClient, Run, str], None], required: bool, last: bool
) -> Iterator:
    """Yield the run that `begin` finds or creates, and end it as `attempt_run` says.

    Args:
        end: gives the run a status, and what stands below it.
    """
    with _heard_sigterm() as killed:
        try:
            with asking_mlflow():
                run: Any = begin()
        except TryAgainError as error:
            if required:
                raise
            log(f"warning: going on without MLflow: {error.what}")
            run = SimpleNamespace(info=SimpleNamespace(run_id=None, experiment_id=None))
        try:
            yield run
        except BaseException as error:
            if run.info.run_id is not None and not isinstance(error, TryAgainError):
                status = "KILLED" if killed.is_set() else "FAILED"
                with _ending(status):
                    end(_client(), run, status)
            raise
    if last and run.info.run_id is not None:
        with asking_mlflow():
            end(_client(), run, "FINISHED")


def end_run(definition: DatasetDefinition, attempt: str, status: str) -> None:
    """End the attempt's run, if it has one that is still RUNNING: what its own stage could not do any more."""
    with _ending(status):
        set_tracking()
        client = _client()
        experiment = client.get_experiment_by_name(definition.name)
        for run in _runs(client, experiment.experiment_id, ATTEMPT_TAG, attempt) if experiment else []:
            if run.info.status == "RUNNING":
                _end(client, run, status)


def _end(client: MlflowClient, run: Run, status: str) -> None:
    """End a run behind those below it: one that has ended has none that is RUNNING."""
    for one in (*runs_below(client, run), run):
        client.set_terminated(one.info.run_id, status)


def log_origin(
    run_id: str | None, parameters: Mapping[str, str], store: TableStore, inputs: Sequence[Manifest]
) -> None:
    """Log what a run is trained from; a retry logs the same again. A server that does not take it costs a line.

    Args:
        run_id: None when MLflow did not answer.
        inputs: the tables that it reads, of `store`.
    """
    if run_id is None:
        return
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    rows = [Param(key, value) for key, value in parameters.items()]
    read = [
        Dataset(
            *dataset_of(store, manifest),
            "longview",
            store.root,
            json.dumps({"mlflow_colspec": [{"name": f.name, "type": str(f.type)} for f in TABLES[manifest.table]]}),
            json.dumps({"rows": manifest.rows, **manifest.counts}),
        )
        for manifest in inputs
    ]
    try:
        for start in range(0, len(rows), PARAMETERS_PER_REQUEST):
            _client().log_batch(run_id, params=rows[start : start + PARAMETERS_PER_REQUEST])
        context = [InputTag("mlflow.data.context", "training")]
        _client().log_inputs(run_id, [DatasetInput(one, context) for one in read])
    except Exception as error:
        log(f"warning: MLflow takes no parameters and inputs: {_on_one_line(error)}")


def dataset_of(store: TableStore, manifest: Manifest) -> tuple[str, str]:
    """Return name and digest of a published partition among MLflow's datasets."""
    return f"{store.dataset} {store.input_name(manifest)}", manifest.data_digest[:DIGEST_LENGTH]


class MetricsBuffer:
    """Metrics of a run: what could not be sent waits in a file of the run's folder, and is sent again by `flush`.

    A local file has them before they are sent; in an object store, where that would take time of every step, they are
    written when MLflow does not take them.

    Args:
        run_id: the run; None when MLflow did not answer at the start (the metrics stay in the file).
        folder, name: of the run and its file: JSON lines, {"key", "value", "step", "timestamp"}, only what MLflow does
            not have yet.
        say: takes a warning.
        models: model -> its run, which gets `<model>/<metric>` as `<metric>`.
    """

    def __init__(
        self,
        run_id: str | None,
        folder: Folder,
        name: str = METRICS_FILE,
        say: Callable[[str], None] = log,
        models: Mapping[str, str] | None = None,
    ) -> None:
        self.run_id, self.folder, self.name, self.say = run_id, folder, name, say
        self.models = models or {}
        self._server_down = run_id is None
        text = folder.read_text(name)
        self._in_file = text is not None
        self._pending: list[dict] = [json.loads(line) for line in (text or "").splitlines() if line]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of one step; never raises for MLflow's sake."""
        now = int(time.time() * 1000)
        rows = [{"key": key, "value": float(value), "step": step, "timestamp": now} for key, value in metrics.items()]
        if self._server_down or self.folder.is_local:
            self._keep(rows)
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
            self.send()
        except Exception as error:
            if not self._server_down:
                where = self.folder.address_of(self.name)
                self.say(f"warning: MLflow takes no metrics, keeping them in {where}: {_on_one_line(error)}")
                if not self.folder.is_local:
                    self.folder.forget(self.name)
                    self._keep(self._pending)
            self._server_down = True
            return False
        self._server_down = False
        return True

    def send(self) -> None:
        """Send what is pending; raises what MLflow raises."""
        set_tracking()
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        client = MlflowClient()
        while self._pending:
            run_id, _ = self._place_of(self._pending[0])
            part = [row for row in self._pending if self._place_of(row)[0] == run_id][:METRICS_PER_REQUEST]
            client.log_batch(
                run_id,
                metrics=[Metric(self._place_of(row)[1], row["value"], row["timestamp"], row["step"]) for row in part],
            )
            sent = {id(row) for row in part}
            self._pending = [row for row in self._pending if id(row) not in sent]
        if self._in_file:
            self.folder.forget(self.name)
            self._in_file = False

    def _place_of(self, row: Mapping) -> tuple[str, str]:
        """Return the run and the name there."""
        model, _, metric = row["key"].partition("/")
        assert self.run_id is not None
        return (self.models[model], metric) if model in self.models else (self.run_id, row["key"])

    def _keep(self, rows: Sequence[dict]) -> None:
        self.folder.append_text(self.name, "".join(json.dumps(row) + "\n" for row in rows))
        self._in_file = True


def run_of_attempt(definition: DatasetDefinition, dt: str, attempt: str, tags: Mapping[str, str]):
    """Return the attempt's one run, made where there is none, RUNNING and with these tags; see `attempt_run`."""
    uri = set_tracking()
    client = _client()
    experiment_id = experiment_of(client, definition.name, uri)
    wanted = {ATTEMPT_TAG: attempt, **standard_tags(definition, dt), **tags}
    note = note_of(definition, dt, f"attempt `{attempt}`")
    first = {NAME_TAG: run_name(definition.name, dt, attempt), NOTE_TAG: note, "mlflow.user": user_name()}
    run = only_run(client, experiment_id, (ATTEMPT_TAG, attempt), first | wanted)
    other = run.data.tags.get(PARTITION_TAG)
    if other != dt:
        raise StageError(
            f"attempt {attempt} belongs to dt={other} of {definition.name} (MLflow run {run.info.run_id}), not to"
            f" dt={dt}",
            "give every day an --attempt of its own",
        )
    set_tags(client, run, wanted, note)
    if run.info.status != "RUNNING":
        for one in (run, *runs_below(client, run)):
            client.update_run(one.info.run_id, status="RUNNING")
    return run


def only_run(client: MlflowClient, experiment_id: str, tag: tuple[str, str], first: Mapping[str, str]) -> Run:
    """Return the one run with a tag, made where there is none.

    A request whose answer was lost is sent again: the oldest run counts, as it does for every other process.

    Args:
        first: the tags of a new one.
    """
    if not _runs(client, experiment_id, *tag):
        client.create_run(experiment_id, tags={**first, tag[0]: tag[1]})
    run, *extra = _runs(client, experiment_id, *tag)
    for double in extra:
        client.delete_run(double.info.run_id)
    return run


def set_tags(client: MlflowClient, run: Run, wanted: Mapping[str, str], note: str) -> None:
    """Give a run the tags that it lacks, and the description where another run in Airflow goes on with it."""
    if wanted.get(URL_TAG, "") not in run.data.tags.get(NOTE_TAG, ""):
        wanted = {**wanted, NOTE_TAG: note}
    for key, value in wanted.items():
        if run.data.tags.get(key) != value:
            client.set_tag(run.info.run_id, key, value)
            run.data.tags[key] = value


def experiment_of(client, name: str, uri: str) -> str:
    """Return the id of the experiment, made where there is none."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server keeps artifacts where it is configured to; with a bare database they get a folder, never the cwd.
        location = None if uri.startswith("http") else (_artifact_root(uri) / name).as_uri()
        try:
            return client.create_experiment(name, artifact_location=location, tags={KIND_TAG: KIND})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
    if experiment.lifecycle_stage != "active":
        raise StageError(
            f"the experiment {name} of MLflow at {uri} was deleted",
            f"restore it: MLFLOW_TRACKING_URI={uri} {sys.executable} -m mlflow experiments restore --experiment-id"
            f" {experiment.experiment_id}",
        )
    if KIND_TAG not in experiment.tags:  # somebody else has made it, or an earlier release
        client.set_experiment_tag(experiment.experiment_id, KIND_TAG, KIND)
    return experiment.experiment_id


def _runs(client: MlflowClient, experiment_id: str, tag: str, value: str) -> list[Run]:
    """Return the runs with a tag, the oldest first."""
    return list(
        client.search_runs(
            [experiment_id], filter_string=f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time ASC"]
        )
    )


def runs_below(client: MlflowClient, run: Run) -> list[Run]:
    """Return the runs below another one, the oldest first: one a model of an attempt, a training of a comparison."""
    return _runs(client, run.info.experiment_id, PARENT_TAG, run.info.run_id)


def _client() -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient()


@contextmanager
def _heard_sigterm() -> Iterator[threading.Event]:
    """Leave the body by SystemExit(143) on SIGTERM, once, so that what was begun is ended; the event says that it came.

    Whoever sends it again is not heard, but `LEAVE_WITHIN_SECONDS` later the process ends in any case.
    """
    killed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield killed
        return

    def leave(signum: int, _frame: object) -> None:
        killed.set()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(LEAVE_WITHIN_SECONDS)
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield killed
    finally:
        if not killed.is_set():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _ending(status: str) -> Iterator[None]:
    """Let the body end a run without waiting for a server that does not answer, which costs a line.

    The process is about to end.
    """
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    try:
        yield
    except Exception as error:
        log(f"warning: MLflow still shows the run as RUNNING, not as {status}: {_on_one_line(error)}")


def standard_tags(definition: DatasetDefinition, dt: str) -> dict[str, str]:
    """Return what every run of a partition says of it, of the code and of the run in Airflow."""
    dirty = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=False,
    )
    tags = {
        PARTITION_TAG: dt,
        "pipeline.dataset": definition.name,
        "simulated": str(definition.simulated).lower(),
        "mlflow.source.git.commit": code_version(),
        "git.dirty": str(bool(dirty.stdout.strip())).lower() if dirty.returncode == 0 else "unknown",
    }
    if url := os.environ.get(RUN_URL_VARIABLE):
        tags[URL_TAG] = url
    return tags


def run_name(dataset: str, dt: str, attempt: str, config: str | None = None) -> str:
    """Return the name that a run has in lists, where a long one is cut behind its first words.

    Args:
        config: name of the training configuration; None where no training has come yet.

    >>> run_name("kuairand", "2022-04-21", "kuairand-2022-04-21-8f4ed4e35edb", "default")
    '2022-04-21 default 8f4e'
    """
    given = attempt.removeprefix(f"{dataset}-{dt}-")
    return " ".join(word for word in (dt, config, given if given == attempt else given[:4]) if word)


def entry() -> str:
    """Return the module that this process was started with, such as `training.train`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name


def note_of(definition: DatasetDefinition, dt: str, what: str) -> str:
    """Return the description of a run that holds no figures yet, in Markdown."""
    simulated = ", SIMULATED data" if definition.simulated and "SIMULATED" not in definition.title else ""
    url = os.environ.get(RUN_URL_VARIABLE)
    return f"{definition.title}{simulated}: partition **{dt}**, {what}" + (f" · [Run in Airflow]({url})" if url else "")


def user_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run as a number that has no name
        return str(os.getuid())


def _artifact_root(uri: str) -> Path:
    return _database(uri).parent / "mlartifacts" if uri.startswith("sqlite:///") else settings.artifact_root()


def _database(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").split("?")[0]).absolute()


def _on_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

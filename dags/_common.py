"""What the DAGs share: which partition a run means, what its first task hands on, and the task that runs one stage."""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dtm
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, BaseSensorOperator

from dags._exits import ends_as_a_stage, explained, log_lines
from etl.datasets.definition import definition_name
from etl.stage.errors import StageError
from etl.stage.identity import RUN_URL_VARIABLE
from infra import settings

KILL_AFTER_SECONDS = 15
ENDED_WITHIN_SECONDS = 60
NOTED_LENGTH = 300  # of what a line in the note of a run says


def partition_of(context: Mapping[str, Any]) -> str:
    """Return the partition day of a run: the parameter `dt`, else its data interval's first day. The first task asks,
    and no other.

    Raises:
        StageError: the run names no day, or two different ones.
    """
    run = context["dag_run"]
    chosen = (context.get("params") or {}).get("dt")
    start = context.get("data_interval_start") or getattr(run, "data_interval_start", None)
    if chosen:
        # A `dt` in the configuration of a backfill would make every day of it rebuild the same one.
        if (kind := run_type(run)) != "manual" and (start is None or start.date().isoformat() != chosen):
            raise StageError(
                f"dt={chosen} was given to a {kind} run of {start}",
                "leave dt empty; scheduled runs and backfills take the day of their interval",
            )
        return _day(chosen)
    if start is None:
        raise StageError(
            "this manual run has neither `dt` nor a logical date, so it names no partition",
            "trigger it again with dt, for example 2022-04-21",
        )
    return start.astimezone(dtm.UTC).date().isoformat()


def handed_on(context: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the first task of the run decided: `dt`, `attempt`, and `params`, the parameters by name.

    Raises:
        StageError: there is none, so nobody knows which attempt this is.
    """
    found = context["ti"].xcom_pull(task_ids=settings.START)
    if not found:
        raise StageError(
            f"the task `{settings.START}` of this run has named no attempt",
            "clear the whole run, which begins a new one",
        )
    return found


def partition_arguments(run: Mapping[str, Any], dataset: str) -> list[str]:
    """Return the arguments that every stage takes.

    Args:
        run: what its first task has handed on.
        dataset: name of a built-in data set, or the path of a definition.
    """
    return ["--dataset", dataset, "--warehouse", settings.warehouse(), "--dt", run["dt"], "--attempt", run["attempt"]]


def require_done(task: BaseOperator, context: Mapping[str, Any], attempt: str) -> None:
    """Refuse to go on behind a task whose state a person has set: Airflow goes on behind what is marked as success.

    A task that did its work has handed on the attempt that it did it for; only of what waits for files nothing is
    asked. What is marked as failed while later tasks work stops the run at the next one.

    Raises:
        StageError: names the task.
    """
    ti, run = context["ti"], context["dag_run"]
    remedy = (
        "clear that task with its downstream tasks, and it does its work in the same attempt; "
        "a day that a gate stopped is let through once and by name (make let-through)"
    )
    for name in sorted(task.upstream_task_ids):
        if isinstance(task.dag.get_task(name), BaseSensorOperator):
            continue
        if (ti.xcom_pull(task_ids=name) or {}).get("attempt") != attempt:
            what = f"attempt {attempt} has no result of the task `{name}`, which was rejected or marked as success"
            raise StageError(what, remedy)
    if before := sorted(task.get_flat_relative_ids(upstream=True)):
        states = ti.get_task_states(dag_id=run.dag_id, run_ids=[run.run_id], task_ids=before).get(run.run_id, {})
        if failed := [name for name in before if states.get(name) == "failed"]:
            raise StageError(f"the task `{failed[0]}` of this run is marked as failed", remedy)


def start_ending(partition: Sequence[str], status: str) -> None:
    """Begin to end the MLflow run of an attempt that no stage will end any more, in a session of its own.

    Args:
        partition: the arguments that every stage takes.
        status: FAILED or KILLED.
    """
    subprocess.Popen(
        ending(partition, status),
        cwd=settings.ROOT,
        env=settings.stage_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def ending(partition: Sequence[str], status: str) -> list[str]:
    """Return the command line that ends an attempt's run in MLflow, if that is still RUNNING."""
    return [sys.executable, "-m", "training.ended", *partition, "--status", status]


def end_failed_run(context: Mapping[str, Any], dataset: str) -> None:
    """End the MLflow run of a DAG run that has failed. A task that was marked as failed before it worked has no process
    that could.

    Airflow asks for it some time after the failure: a run that was cleared meanwhile goes on.

    Args:
        dataset: name of a built-in data set, or the path of a definition.
    """
    from infra.airflow_api import AirflowApi  # loads more than a DAG file needs

    run = context["ti"].xcom_pull(task_ids=settings.START) if "ti" in context else None
    if run and AirflowApi().call("GET", run_path(context["dag_run"]))["state"] == "failed":
        start_ending(partition_arguments(run, dataset), "FAILED")


def run_path(run: Any) -> str:
    """Return the path of a DAG run in Airflow's API."""
    return f"/api/v2/dags/{run.dag_id}/dagRuns/{urllib.parse.quote(run.run_id)}"


def note_failure(context: Any) -> None:
    """Say in the note of the run which task has failed for good, and what it said of it."""
    from dags._notes import append_note  # which takes the path of a run from here

    task = context["task"]
    if said := getattr(task, "said", ""):
        day = getattr(task, "_run", {}).get("dt", "")
        of_mapped = getattr(context.get("ti"), "rendered_map_index", None)
        name = f"{task.task_id} {of_mapped}" if of_mapped else task.task_id
        append_note(context, outcome_line(day, f"{name} failed: {said.removeprefix('error: ')}"))


def outcome_line(dt: str, outcome: str) -> str:
    """Return what became of a run as a line of its note, behind its day, '' where it has none.

    A long one ends behind a whole word: half a number is another number.
    """
    return textwrap.shorten(f"dt={dt}: {outcome}" if dt else outcome, NOTED_LENGTH, placeholder=" ...")


def _end_mlflow_run(context: Any) -> None:
    context["task"].end_mlflow_run()


class CommandOperator(BaseOperator):
    """Run a command line in a process of its own and follow its output in the task log.

    Its exit code decides whether it is tried again (`dags._exits`); what it says of an error stands at that level in
    the log, without a trace of Airflow's behind it. The process and all its children end with the task: when it is
    killed, times out, or dies.
    """

    ui_color = "#e8f0fe"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._process: subprocess.Popen[str] | None = None

    def follow(self, command: Sequence[str], module: str, context: Any) -> None:
        """Run the command line of a module to its end.

        Raises:
            SystemExit: it failed, with its code.
        """
        self.log.info("running: %s", shlex.join(command))
        run = context["dag_run"]
        run_url = {RUN_URL_VARIABLE: settings.airflow_run_url(run.dag_id, run.run_id)}
        self._process = started(command, run_url, start_new_session=True)
        try:
            assert self._process.stdout is not None
            said = log_lines(self.log, self._process.stdout)
            code = self._process.wait()
        finally:
            self._end_process()
        if code != 0:
            ended = f"{module} {explained(code)}"
            self.log.error(ended)
            self.said = said or ended
            raise SystemExit(code)

    def result_of(self, module: str, arguments: Sequence[str], context: Any) -> dict[str, Any]:
        """Run a module to its end; return what it leaves in the file that it is given as --result.

        Raises:
            SystemExit: it failed, with its code.
        """
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            self.follow([sys.executable, "-m", module, *arguments, "--result", str(result)], module, context)
            found: dict[str, Any] = json.loads(result.read_text())
        return found

    def on_kill(self) -> None:
        self._end_process()

    def _end_process(self) -> None:
        """End the process and everything that it started."""
        process = self._process
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM if process.poll() is None else signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=KILL_AFTER_SECONDS)
        _signal_group(process.pid, signal.SIGKILL)


class StageOperator(CommandOperator):
    """Run one stage's command line (docs/stages.md) on what the first task of the run has handed on.

    Args:
        module: module of the stage, for example `etl.jobs.events`.
        dataset: name of a built-in data set, or the path of a definition.
        arguments: what follows the partition's arguments; templates may name the run's parameters as `given`. No shell
            sees them.
    """

    template_fields: Sequence[str] = ("arguments",)

    def __init__(self, *, module: str, dataset: str, arguments: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(on_failure_callback=[_end_mlflow_run, note_failure], **kwargs)
        self.module = module
        self.arguments = list(arguments)
        self.dataset = dataset
        self._run: dict[str, Any] = {}  # what its first task has handed on
        self._killed = False

    @ends_as_a_stage
    def render_template_fields(self, context: Any, jinja_env: Any = None) -> None:
        self._run = handed_on(context)  # Airflow renders before all else, so this is asked for once
        given: Any = {**context, "given": self._run["params"]}
        super().render_template_fields(given, jinja_env)

    def partition(self) -> list[str]:
        """Return the arguments that every stage takes, of the run whose templates were rendered."""
        return partition_arguments(self._run, self.dataset)

    def command(self) -> list[str]:
        """Return the command line of this task."""
        return [sys.executable, "-m", self.module, *self.partition(), *map(str, self.arguments)]

    @ends_as_a_stage
    def execute(self, context: Any) -> dict[str, str]:
        require_done(self, context, self._run["attempt"])
        self.follow(self.command(), self.module, context)
        outcome = {"dataset": definition_name(self.dataset), "dt": self._run["dt"], "attempt": self._run["attempt"]}
        for outlet in self.outlets or ():
            context["outlet_events"][outlet].extra = outcome
        return outcome

    def on_kill(self) -> None:
        done = self._process is not None and self._process.poll() is not None  # the task only takes its leave
        super().on_kill()
        if self._run and not done:
            self._killed = True
            start_ending(self.partition(), "KILLED")

    def end_mlflow_run(self) -> None:
        """End the attempt's run in MLflow as FAILED, when the task has failed for good.

        What its stage has ended stays so.
        """
        if not self._run or self._killed:
            return
        try:
            done = subprocess.run(
                ending(self.partition(), "FAILED"),
                cwd=settings.ROOT,
                env=settings.stage_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=ENDED_WITHIN_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            self.log.warning("MLflow may still show the run as RUNNING")
        else:
            for line in (done.stdout + done.stderr).splitlines():
                self.log.info(line)


def started(
    command: Sequence[str],
    more_env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    start_new_session: bool = False,
) -> subprocess.Popen[str]:
    """Start a command line that ends with this process; what it says, errors among it, is a pipe of text."""
    return subprocess.Popen(
        command,
        cwd=settings.ROOT,
        env={**settings.stage_environment(), **(more_env or {})},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=start_new_session,
        preexec_fn=end_with_parent,
    )


def _day(text: str) -> str:
    try:
        return dtm.date.fromisoformat(text).isoformat()
    except ValueError:
        raise StageError(f"{text!r} is not a day", "give dt as YYYY-MM-DD") from None


def run_type(run: Any) -> str:
    """Return "manual", "scheduled" or "backfill"."""
    return str(getattr(run.run_type, "value", run.run_type))


def _signal_group(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Linux ends the stage when the task's process is killed, so that a retry never meets the stage that it
    replaces."""
    if _libc is not None:
        _libc.prctl(1, signal.SIGTERM)

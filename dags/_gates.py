"""The tasks around a gate: the gate with a link to its report, and the question to a person before training."""

from __future__ import annotations

import datetime as dtm
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk.exceptions import DownstreamTasksSkipped

from dags._common import (
    StageOperator,
    handed_on,
    outcome_line,
    partition_arguments,
    require_done,
    start_ending,
    started,
)
from dags._exits import ends_as_a_stage, explained, log_lines
from dags._links import ReportLink
from dags._notes import append_note
from etl.stage.errors import StageError
from infra import settings

LOGGED_WITHIN_SECONDS = 90
ANSWERED_WITHIN = dtm.timedelta(days=2)
WARNINGS_SHOWN = 20
GATES = ("events", "sequences", "training_input")  # stages whose outcomes a question before training needs


class GateOperator(StageOperator):
    """Run a gate; then log its report, which it writes well or not, to MLflow, and say where it is.

    MLflow is loaded while the gate runs, and nothing of it fails the task.

    Args:
        reports: folder of the reports.
        only_stopped: the stage writes a report only when it stops; a gate follows.
    """

    operator_extra_links = (ReportLink(),)

    def __init__(self, *, reports: str, only_stopped: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reports = reports
        self.only_stopped = only_stopped
        self.report_url = ""
        self._logger: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        return [*super().command(), "--reports", self.reports]

    @ends_as_a_stage
    def execute(self, context: Any) -> dict[str, str]:
        if not self.only_stopped:
            self._start_logger()
        try:
            outcome = super().execute(context)
        except SystemExit:
            self._log_report()
            raise
        if not self.only_stopped:
            self._log_report()
        return outcome

    def on_kill(self) -> None:
        super().on_kill()
        if self._logger is not None:
            self._logger.kill()

    def _start_logger(self) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "training.log_report",
            *self.partition(),
            "--reports",
            self.reports,
            "--when-input-ends",
        ]
        self._logger = started(command, stdin=subprocess.PIPE)
        return self._logger

    def _log_report(self) -> None:
        logger = self._logger or self._start_logger()
        try:
            output, _ = logger.communicate(timeout=LOGGED_WITHIN_SECONDS)
            *said, last = output.strip().splitlines() or [""]
            found = json.loads(last)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            logger.kill()
            self.log.warning("the report is not in MLflow: %s", error)
            return
        for line in said:
            self.log.info("%s", line)
        if found.get("run_id"):
            self.report_url = settings.mlflow_artifact_url(found["experiment_id"], found["run_id"], found["artifact"])
            self.log.info("report in MLflow: %s", self.report_url)


class WarningApproval(ApprovalOperator):
    """Ask a person before training when a gate of the run warned and the run's parameter `on_warning` is `approve`.

    Otherwise the task ends at once, and what follows runs. A rejected run skips everything that follows. Without the
    outcomes of all gates of its attempt it fails: what was not judged is not free of warnings.

    Args:
        dataset: name of a built-in data set, or the path of a definition.
        reports: folder of the reports.
        gate: id of the last gate, which knows where the report is.
    """

    operator_extra_links = (ReportLink(),)
    template_fields: Sequence[str] = ()

    def __init__(self, *, dataset: str, reports: str, gate: str, **kwargs: Any) -> None:
        super().__init__(
            subject="Train in spite of warnings?",
            response_timeout=ANSWERED_WITHIN,
            ignore_downstream_trigger_rules=True,
            **kwargs,
        )
        self.dataset = dataset
        self.reports = reports
        self.gate = gate
        self.report_url = ""

    @ends_as_a_stage
    def execute(self, context: Any) -> Any:
        self.report_url = self._find_report_url(context)
        run = handed_on(context)
        require_done(self, context, run["attempt"])
        on_warning = run["params"]["on_warning"]
        if on_warning != settings.APPROVE:
            self.log.info("on_warning=%s: warnings are logged and training goes on", on_warning)
            return {"attempt": run["attempt"]}
        found = self._summary(run)
        if missing := [gate for gate in GATES if gate not in found["stages"]]:
            raise StageError(
                f"no outcome of the gates {', '.join(missing)} is kept for attempt {found['attempt']}, "
                "so nobody knows whether they warned",
                "clear the gates' tasks with their downstream tasks, or the whole run",
            )
        warnings = found["failed"]["warning"]
        if not warnings:
            self.log.info("no gate of this run warned: nothing to approve")
            return {"attempt": run["attempt"]}
        self.subject = f"Train {found['dataset']} {found['dt']} in spite of {len(warnings)} warning(s)?"
        self.body = _body(found, warnings, self.report_url)
        self.log.info("%s\n%s", self.subject, self.body)
        return super().execute(context)

    @ends_as_a_stage
    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        self.report_url = self._find_report_url(context)
        run = handed_on(context)
        try:
            answer = super().execute_complete(context, event)
        except DownstreamTasksSkipped:  # a rejection
            start_ending(partition_arguments(run, self.dataset), "KILLED")  # nothing that follows will
            append_note(context, outcome_line(run["dt"], "rejected by a person before training: nothing was trained"))
            raise
        return {**answer, "attempt": run["attempt"]}

    def process_trigger_event_error(self, event: dict[str, Any]) -> None:
        if event["error_type"] == "timeout":  # asking the same once more would hold the next days back as long again
            raise StageError(
                f"nobody answered within {ANSWERED_WITHIN}, so nothing was trained",
                "clear this task with its downstream tasks to be asked again",
            )
        super().process_trigger_event_error(event)

    def _find_report_url(self, context: Any) -> str:
        return context["ti"].xcom_pull(task_ids=self.gate, key=ReportLink().xcom_key) or ""

    def _summary(self, run: Mapping[str, Any]) -> dict[str, Any]:
        module = "etl.quality.report.write"
        command = [
            sys.executable,
            "-m",
            module,
            *partition_arguments(run, self.dataset),
            "--reports",
            self.reports,
            "--json",
        ]
        done = subprocess.run(
            command,
            cwd=settings.ROOT,
            env=settings.stage_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            log_lines(self.log, done.stderr.splitlines())
            self.log.error(f"{module} {explained(done.returncode)}")
            raise SystemExit(done.returncode)
        return json.loads(done.stdout.strip().splitlines()[-1])


def _body(found: Mapping[str, Any], warnings: Sequence[str], report_url: str) -> str:
    """Return the question's text in Markdown; what the gates say stands in code marks, as data may be quoted in it."""
    lines = [f"The gates of attempt `{found['attempt']}` warn of:", ""]
    lines += [
        f"* `{warning.replace('`', ' ')}`"
        for warning in (" ".join(warning.split()) for warning in warnings[:WARNINGS_SHOWN])
    ]
    if len(warnings) > WARNINGS_SHOWN:
        lines.append(f"* and {len(warnings) - WARNINGS_SHOWN} more")
    lines += [
        "",
        f"[Partition report]({report_url})" if report_url else "The report is among the pages of `make up`.",
        "",
        (
            "**Approve** trains on this partition. **Reject** ends the run before training: nothing is trained or"
            f" registered; what was published stays. Without an answer within {ANSWERED_WITHIN.days} days the run"
            " fails."
        ),
    ]
    return "\n".join(lines)

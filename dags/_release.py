"""The tasks from training to promotion.

Each leads to its run and version in MLflow, and the last says what became of them.
"""

from __future__ import annotations

import json
from typing import Any

from airflow.sdk import Asset, AssetAlias

from dags._common import StageOperator, outcome_line
from dags._links import EvaluationReportLink, MlflowRunLink, ModelVersionLink
from dags._notes import append_note
from etl.stage.errors import StageError
from evaluation.release.outcomes import EVALUATION_PAGE, PROMOTED, sentence
from infra import settings


def champion_asset(dataset: str) -> Asset:
    """Return the asset that has an event whenever another version of the data set's model becomes champion."""
    return Asset(name=f"vql_champion_{dataset}", uri=f"longview://{dataset}/champion")


class ModelOperator(StageOperator):
    """Run a stage of a model, with buttons to the run, the version and the evaluation of its attempt in MLflow.

    Args:
        runs: folder of runs, which the stage gets as --runs.
    """

    operator_extra_links = (MlflowRunLink(), ModelVersionLink(), EvaluationReportLink())

    def __init__(self, *, runs: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.runs = runs
        self.run_url = self.version_url = self.evaluation_url = ""

    def command(self) -> list[str]:
        return [*super().command(), "--runs", self.runs]

    def execute(self, context: Any) -> dict[str, Any]:
        try:
            outcome = super().execute(context)
        finally:
            self._find_links()
        return self.announced(outcome, self._read("registration.json"), context)

    def _read(self, name: str) -> dict[str, Any]:
        """Return what the stage has written into its attempt's folder, empty where it has not."""
        from etl.stage.folder import Folder  # with Arrow, which no file of DAGs loads

        return json.loads(Folder(self.runs, "--runs").below(self._run["attempt"]).read_text(name) or "{}")

    def announced(self, outcome: dict[str, Any], registration: dict[str, Any], context: Any) -> dict[str, Any]:
        """Return what the task hands on, after it has been said where people look."""
        return outcome

    def _find_links(self) -> None:
        try:
            registration, training = self._read("registration.json"), self._read("training.json")
        except (OSError, StageError) as error:  # a store that does not answer: the stage has said so
            self.log.warning("no links to MLflow: %s", error)
            return
        run_id = registration.get("run_id") or training.get("mlflow_run_id")
        experiment_id = registration.get("experiment_id") or training.get("mlflow_experiment_id")
        if run_id and experiment_id:
            self.run_url = settings.mlflow_run_url(experiment_id, run_id)
            self.log.info("run in MLflow: %s", self.run_url)
            if registration:  # it was evaluated
                self.evaluation_url = settings.mlflow_artifact_url(experiment_id, run_id, EVALUATION_PAGE)
                self.log.info("evaluation in MLflow: %s", self.evaluation_url)
        if registration:
            self.version_url = settings.mlflow_version_url(registration["model_name"], registration["version"])
            self.log.info("model version in MLflow: %s", self.version_url)


class PromoteOperator(ModelOperator):
    """Promote or refuse; the outcome and its reason stand in the run's note, in the task's XCom and in its log.

    A promotion alone is an event of the asset `champion`, through its alias. A try that repeats a promotion after its
    task died, or a clear of this task, gives the event again as long as the version is the champion.

    Args:
        champion: the asset; `outlets` is its alias.
    """

    def __init__(self, *, champion: Asset, **kwargs: Any) -> None:
        self.alias = AssetAlias(name=champion.name)
        super().__init__(outlets=[self.alias], **kwargs)
        self.champion = champion

    def announced(self, outcome: dict[str, Any], registration: dict[str, Any], context: Any) -> dict[str, Any]:
        decision, reason = registration["outcome"], registration["gate"]["reason"]
        line = sentence(decision, registration["model_name"], registration["version"], reason)
        self.log.info(line)
        append_note(context, outcome_line(outcome["dt"], line))
        details = {
            "outcome": decision,
            "reason": reason,
            "model": registration["model_name"],
            "version": registration["version"],
        }
        if decision == PROMOTED and "champion" in registration["aliases"]:
            context["outlet_events"][self.alias].add(
                self.champion, extra={**outcome, **details, **registration["digests"]}
            )
        return {**outcome, **details}

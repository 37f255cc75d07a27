"""The task that takes a person's decision on a version: `evaluation.release.by_hand`, with the form's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk import AssetAlias, Param

from dags._common import CommandOperator, outcome_line
from dags._exits import ends_as_a_stage
from dags._form import data_sets, refused_fields, unknown_fields
from dags._links import ModelVersionLink
from dags._notes import append_note
from dags._release import champion_asset
from etl.stage.errors import StageError
from evaluation.release.outcomes import ACTIONS, MOVED, sentence, version_problem
from infra import settings

MODULE = "evaluation.release.by_hand"


def params() -> dict[str, Param]:
    """Return the fields of the form."""
    return {
        "data_set": Param(
            type="string", enum=list(data_sets()), title="Data set", description="Whose model it is about."
        ),
        "action": Param(
            type="string",
            enum=list(ACTIONS),
            title="Action",
            description=(
                "rollback: the champion before serves again. promote: a version serves, whatever the quality gate said."
                " refuse: a version is not promoted."
            ),
        ),
        "version": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            title="Version",
            description="Number of the version in MLflow, to promote or refuse. A rollback takes none.",
        ),
        "reason": Param(
            type="string",
            minLength=3,
            title="Reason",
            description="Why, in a sentence that others will understand.",
        ),
        "by": Param(type="string", minLength=1, title="By", description="Name of the person who decides."),
        "despite_mechanical_gate": Param(
            False,
            type="boolean",
            title="Despite the mechanical gate",
            description="Promote although the artifact failed in a fresh process, or cannot be checked any more.",
        ),
        "dry_run": Param(
            False, type="boolean", title="Dry run", description="Make every check, say what would happen, move nothing."
        ),
    }


class DecisionOperator(CommandOperator):
    """Check every field, take the decision, and say it in the run's note, in the XCom and in the log.

    The run is the decision: a retry, and a clear of the task, complete it and never take it twice. Where the champion
    moves, the data set's asset `champion` has an event, through its alias.
    """

    operator_extra_links = (ModelVersionLink(),)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(outlets=[AssetAlias(name=champion_asset(name).name) for name in data_sets()], **kwargs)
        self.version_url = ""

    @ends_as_a_stage
    def execute(self, context: Any) -> dict[str, Any]:
        given = dict(context["params"])
        for name, value in given.items():
            self.log.info("%s = %s", name, value)
        if wrong := problems(self.dag.params, given):
            raise StageError(
                "this decision cannot be taken: " + "; ".join(wrong), "trigger it again, with these corrected"
            )
        decided = self.result_of(MODULE, arguments(given, context["dag_run"].run_id), context)
        self.version_url = settings.mlflow_version_url(decided["model"], decided["version"])
        reason = f"by {decided['by']}: {decided['reason']}"
        said = sentence(decided["outcome"], decided["model"], decided["version"], reason)
        append_note(context, outcome_line("", f"dry run, nothing moved: {said}" if given["dry_run"] else said))
        digests = decided.pop("digests")
        aliases = decided.pop("aliases")
        if decided["outcome"] in MOVED and "champion" in aliases and not given["dry_run"]:
            asset = champion_asset(given["data_set"])
            context["outlet_events"][AssetAlias(name=asset.name)].add(asset, extra={**decided, **digests})
        return decided


def arguments(given: Mapping[str, Any], decision: str) -> list[str]:
    """Return what follows the module on the command line.

    Args:
        decision: its name: the id of the run.
    """
    words = [given["action"], "--dataset", data_sets()[given["data_set"]]]
    words += ["--warehouse", settings.warehouse(), "--runs", settings.runs()]
    words += ["--by", given["by"], "--reason", given["reason"], "--decision", decision]
    if given["version"] is not None:
        words += ["--version", str(given["version"])]
    return words + ["--" + name.replace("_", "-") for name in ("despite_mechanical_gate", "dry_run") if given[name]]


def problems(own: Any, given: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the fields, each problem with the name of its field.

    Args:
        own: the parameters of the DAG.
    """
    found = [*unknown_fields(own, given), *refused_fields(own, given).values()]
    action = given.get("action")
    if action in ACTIONS and (wrong := version_problem(action, given.get("version"))):
        found.append(wrong)
    return found

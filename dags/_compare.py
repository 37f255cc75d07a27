"""The tasks of a comparison: `evaluation.compare` with the form's fields, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk import Param

from dags._common import CommandOperator, outcome_line
from dags._exits import ends_as_a_stage
from dags._form import data_sets, refused_fields, unknown_fields
from dags._links import MlflowRunLink
from dags._notes import append_note
from etl.stage.errors import StageError
from infra import settings

MODULE = "evaluation.compare"
PLAN, TRAIN, TABLE = "plan", "train", "table"  # the tasks
MOST_TRAININGS = 1_024  # Airflow's `core.max_map_length`
WORDS, NUMBERS = (rf"^{one}( *, *{one})*$(?!\n)" for one in ("[a-z0-9_]+", "[0-9]+"))


def params() -> dict[str, Param]:
    """Return the fields of the form."""
    return {
        "data_set": Param(
            type="string", enum=list(data_sets()), title="Data set", description="Whose partition they are trained on."
        ),
        "dt": Param(
            type="string",
            format="date",
            pattern=r"^\d{4}-\d{2}-\d{2}$(?!\n)",
            title="Partition day (UTC)",
            description="A published day: its last days are judged.",
        ),
        "models": Param(
            None,
            type=["null", "string"],
            pattern=WORDS,
            title="Models",
            description="Kinds of interest with commas, such as vql,softmax_attention,din; the others are compared with"
            " the first. Empty: all.",
        ),
        "lengths": Param(
            None,
            type=["null", "string"],
            pattern=NUMBERS,
            title="Lengths",
            description="Events that a target sees at most, with commas. Empty: all that the partition gives.",
        ),
        "seeds": Param("7", type="string", pattern=NUMBERS, title="Seeds", description="With commas, such as 7,8,9."),
        "config": Param(
            "default",
            type="string",
            enum=settings.training_configs(),
            title="Training configuration",
            description="Its training, and its first model but for the kind of interest.",
        ),
    }


def arguments(given: Mapping[str, Any], step: str) -> list[str]:
    """Return what follows the module on the command line.

    Args:
        step: what of the comparison is done (`--only`).
    """
    words = ["--dataset", data_sets()[given["data_set"]], "--warehouse", settings.warehouse(), "--dt", given["dt"]]
    words += ["--config", given["config"], "--only", step]
    for name in ("models", "lengths", "seeds"):
        if given[name]:
            words += [f"--{name}", str(given[name]).replace(" ", "")]
    return words


class ComparisonOperator(CommandOperator):
    """Do a part of the comparison that the form asks for, with a button to its run in MLflow.

    What stands is not trained again, so that a retry and a clear go on with it.
    """

    operator_extra_links = (MlflowRunLink(),)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_url = ""

    def done(self, step: str, given: Mapping[str, Any], context: Any) -> dict[str, Any]:
        """Run the command; return what it says of the trainings that are asked for."""
        found = self.result_of(MODULE, arguments(given, step), context)
        if found["run_id"]:  # MLflow has answered
            self.run_url = settings.mlflow_run_url(found["experiment_id"], found["run_id"])
            self.log.info("run in MLflow: %s", self.run_url)
        return found


class PlanOperator(ComparisonOperator):
    """Check every field and hand on the trainings that are asked for, those that stand, too."""

    @ends_as_a_stage
    def execute(self, context: Any) -> list[dict[str, Any]]:
        given = dict(context["params"])
        for name, value in given.items():
            self.log.info("%s = %s", name, value)
        own = self.dag.params
        if wrong := [*unknown_fields(own, given), *refused_fields(own, given).values()]:
            raise StageError(
                "this comparison cannot be made: " + "; ".join(wrong), "trigger it again, with these corrected"
            )
        found = self.done("plan", given, context)
        trainings: list[dict[str, Any]] = found["trainings"]
        if len(trainings) > MOST_TRAININGS:
            raise StageError(
                f"{len(trainings):,} trainings are more than the {MOST_TRAININGS:,} that Airflow maps",
                "compare fewer models, lengths or seeds at a time; the table of a later run has what stands",
            )
        said = f"{given['data_set']}: {len(trainings)} trainings, {found['stand']} of them stand"
        append_note(context, outcome_line(given["dt"], said))
        return trainings


class TrainingOperator(ComparisonOperator):
    """Train one model at one length with one seed; leads to the run of this training.

    Args:
        training: of what `PlanOperator` hands on: `model`, `length`, `seed`, and its `name`.
    """

    def __init__(self, *, training: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.training = training

    @ends_as_a_stage
    def execute(self, context: Any) -> dict[str, Any]:
        one = {"models": self.training["model"], "lengths": self.training["length"], "seeds": self.training["seed"]}
        found = self.done("train", {**context["params"], **one}, context)
        return {"training": self.training["name"], "stands": bool(found["stand"]), "best": found["best"]}


class TableOperator(ComparisonOperator):
    """Make table and plots of what stands; fails behind them when a training has failed, or was skipped as its run was
    marked as failed."""

    @ends_as_a_stage
    def execute(self, context: Any) -> dict[str, Any]:
        found = self.done("show", context["params"], context)
        asked, run = len(found["trainings"]), context["dag_run"]
        said = f"{found['stand']} of {asked} trainings stand; the best is {found['best'] or 'none'}"
        append_note(context, outcome_line(context["params"]["dt"], said))
        states = context["ti"].get_task_states(dag_id=run.dag_id, run_ids=[run.run_id], task_ids=[TRAIN])
        of_run = states.get(run.run_id, {}).values()
        if missing := [state for state in of_run if state not in ("success", "removed")]:
            raise StageError(
                f"{len(missing)} of {asked} tasks `{TRAIN}` of this run have failed or were skipped; the table has what"
                " stands",
                "correct what their logs say and clear them with their downstream tasks: nothing is trained twice",
            )
        return {"stand": found["stand"], "best": found["best"]}

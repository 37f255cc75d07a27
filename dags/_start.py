"""The first task of a run: it decides once what the run is about, and every later task takes that from it."""

from __future__ import annotations

import datetime as dtm
from collections.abc import Mapping, Sequence
from typing import Any

from airflow.sdk import BaseOperator

from dags._common import partition_of
from dags._exits import ends_as_a_stage
from dags._form import refused_fields, unknown_fields
from dags._notes import append_note
from etl.datasets.definition import DatasetDefinition, dataset
from etl.stage.errors import StageError
from etl.stage.identity import attempt_name
from etl.stage.uris import folder_problem
from infra import settings
from infra.options import OPTIONS


class StartOperator(BaseOperator):
    """Name the partition and the attempt, check every parameter of the run, log them, and hand all of it on.

    The attempt is named by the id of this task's instance: no other row has it, also not one that was made anew under
    the same run id, and a clear of this task gives it another. So a clear of the run, or of this task, begins a new
    attempt; a clear of a later task leaves this one's result, and goes on in the attempt. A retry of this task names it
    anew before anybody has used the name.

    Args:
        dataset: name of a built-in data set, or the path of a definition.
    """

    ui_color = "#e8f0fe"

    def __init__(self, *, dataset: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dataset = dataset

    @ends_as_a_stage
    def execute(self, context: Any) -> dict[str, Any]:
        definition = dataset(self.dataset)
        params, conf = dict(context["params"]), context["dag_run"].conf or {}
        own = self.dag.params
        defaults = own.dump()
        for name, value in params.items():
            shown = (
                "(not shown)" if name == "raw" and isinstance(value, str) and folder_problem(value) else value
            )  # it may hold a key
            self.log.info("%s = %s   (%s)", name, shown, source(name, value, conf, defaults, definition))
        dt = partition_of(context)
        wrong = [
            *_schema_problems(own, params),
            *problems(params, definition, dt, list(own), settings.training_configs(), _today()),
        ]
        if wrong:
            raise StageError("this run cannot be done: " + "; ".join(wrong), "trigger it again, with these corrected")
        attempt = attempt_name(definition.name, dt, str(context["ti"].id))
        self.log.info("partition dt = %s, attempt %s", dt, attempt)
        append_note(context, f"dt={dt}, attempt {attempt}")
        return {"dt": dt, "attempt": attempt, "params": {name: params[name] for name in own}}


def source(
    name: str, value: Any, conf: Mapping[str, Any], defaults: Mapping[str, Any], definition: DatasetDefinition
) -> str:
    """Return where a parameter's value comes from.

    The form sends every field, so one that is as it was prefilled is no choice of the run.
    """
    if name in conf and value != defaults.get(name):
        return "this run"
    if name == "raw" and definition.run.raw is None:
        return settings.raw_variable()
    if name in ("dt", "warm_start"):
        return "default"
    return "definition of the data set"


def problems(
    params: Mapping[str, Any],
    definition: DatasetDefinition,
    dt: str,
    known: Sequence[str],
    configs: Sequence[str],
    today: str,
) -> list[str]:
    """Return what is wrong with a run's parameters beyond the schema of each, each problem with the name of its field.

    Args:
        known: the DAG's parameters.
        configs: the training configurations that there are.
        today: the UTC day, YYYY-MM-DD; only a run that names it with `dt` may build it before it has ended.
    """
    found = unknown_fields(known, params)
    if outside := definition.outside(dt, today):
        found.append(f"dt: {dt} {outside}")
    elif dt == today and not params.get("dt"):
        found.append(f"dt: {dt}, the day of the logical date, has not ended; give dt")
    if isinstance(raw := params.get("raw"), str) and (problem := folder_problem(raw)):
        found.append(
            f"raw: {problem}"
            + (
                f"; in the folder of this installation it would be {settings.ROOT / raw}"
                if "relative" in problem
                else ""
            )
        )
    for name in known:
        if (check := OPTIONS[name].check) is not None and name in params:
            try:
                check(params[name])
            except ValueError as error:
                found.append(f"{name}: {error}")
    if (config := params.get("config")) not in configs:
        found.append(f"config: {config!r} is no training configuration; there are {', '.join(configs)}")
    target, lookback, evaluation = (params.get(f"{name}_days") for name in ("target", "lookback", "evaluation"))
    if isinstance(target, int) and isinstance(lookback, int) and lookback < target:
        found.append(f"lookback_days: {lookback} is less than target_days, {target}")
    if isinstance(target, int) and isinstance(evaluation, int) and evaluation >= target:
        found.append(f"evaluation_days: {evaluation} leaves no day to train of target_days, {target}")
    return found


def _schema_problems(own: Any, params: Mapping[str, Any]) -> list[str]:
    def said_elsewhere(name: str) -> bool:
        """Whether `problems` says more of it, and of an address without what it may hide."""
        return OPTIONS[name].check is not None or (name == "raw" and isinstance(params.get(name), str))

    return [problem for name, problem in refused_fields(own, params).items() if not said_elsewhere(name)]


def _today() -> str:
    return dtm.datetime.now(dtm.UTC).date().isoformat()

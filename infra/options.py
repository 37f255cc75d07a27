"""The options of a run, each once.

The DAG's form, its command lines and the variables of `make run` are made from this table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from etl.datasets.definition import DatasetDefinition
from etl.stage.uris import FOLDER_PATTERN
from etl.stage.worker_counts import MOST_WORKERS, WORKERS_ALLOWED, WORKERS_PATTERN, worker_range
from infra import settings

MOST_DAYS = 36_500
DAYS = {"type": "integer", "minimum": 2, "maximum": MOST_DAYS}


@dataclass(frozen=True)
class Option:
    """One option of a run.

    Attributes:
        name: the parameter of the DAG; a stage takes it as `--name`, `make run` as the variable NAME.
        title: of the field in the form.
        description: one sentence or two for the form and the docs.
        schema: what is allowed: keywords of JSON schema.
        default: its value where a run does not choose, from the data set's definition.
        form: of a text that is none of a few words: what it looks like.
        check: raises ValueError, in words, for every value that is not allowed, where the schema alone cannot tell.
    """

    name: str
    title: str
    description: str
    schema: Mapping[str, Any]
    default: Callable[[DatasetDefinition], Any]
    form: str = "a text"
    check: Callable[[Any], object] | None = None

    @property
    def variable(self) -> str:
        return self.name.upper()

    @property
    def argument(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        if "enum" in self.schema:
            return " or ".join(self.schema["enum"])
        if self._is_number:
            return f"a whole number from {self.schema['minimum']:,} to {self.schema['maximum']:,}"
        return self.form

    @property
    def _is_number(self) -> bool:
        return self.schema.get("type") == "integer"

    def parsed(self, text: str) -> str | int:
        """Return the value of a variable's text.

        Raises:
            ValueError: it is not allowed; says what is.
        """
        value: str | int = int(text) if self._is_number and text.isascii() and text.isdigit() else text
        if self._is_number:
            fits = isinstance(value, int) and self.schema["minimum"] <= value <= self.schema["maximum"]
        else:
            fits = text in self.schema.get("enum", [text]) and bool(re.match(self.schema.get("pattern", ""), text))
        if not fits:
            raise ValueError(f"{self.variable}={text} is not {self.allowed}")
        if self.check is not None:
            try:
                self.check(value)
            except ValueError as error:
                raise ValueError(f"{self.variable}={error}") from None
        return value


OPTIONS = {
    option.name: option
    for option in (
        Option(
            "dt",
            "Partition day (UTC)",
            "The day to build; without it the run takes the day of its logical date.",
            {"type": ["null", "string"], "format": "date", "pattern": r"^\d{4}-\d{2}-\d{2}$(?!\n)"},
            lambda definition: None,
            form="a day, YYYY-MM-DD",
        ),
        Option(
            "raw",
            "Folder of the raw logs",
            "Absolute path, or a URI that Arrow reads.",
            {"type": "string", "pattern": FOLDER_PATTERN, "maxLength": 500},
            lambda definition: definition.run.raw or settings.raw(definition.name),
            form="an absolute path or a URI",
        ),
        Option(
            "config",
            "Training configuration",
            "Name of a file of training/configs, without its suffix.",
            {"type": "string", "pattern": r"^[a-z0-9_]+$(?!\n)", "maxLength": 60},
            lambda definition: definition.run.config,
            form="a name",
        ),
        Option(
            "target_days",
            "Target days",
            "Days, dt included, whose events are targets; the last are for evaluation.",
            DAYS,
            lambda definition: definition.window.target_days,
        ),
        Option(
            "lookback_days",
            "Lookback days",
            "Days, dt included, whose events may stand in a history; at least target_days.",
            DAYS,
            lambda definition: definition.window.lookback_days,
        ),
        Option(
            "evaluation_days",
            "Evaluation days",
            "Last days, dt included, that are for evaluation; fewer than target_days.",
            DAYS | {"minimum": 1},
            lambda definition: definition.window.evaluation_days,
        ),
        Option(
            "max_history",
            "Longest history",
            "At most so many of the latest events before it does a target see. "
            "A row stores these, and the events between its user's first and last target.",
            {"type": "integer", "minimum": 1, "maximum": 1_000_000},
            lambda definition: definition.history.max_events,
        ),
        Option(
            "warm_start",
            "Warm start",
            "champion: begin with the weights of the model in service, if it is of an earlier day.",
            {"type": "string", "enum": ["none", "champion"]},
            lambda definition: "none",
        ),
        Option(
            "on_warning",
            "When a gate warns",
            "approve: the run waits before training until a person approves or rejects it.",
            {"type": "string", "enum": [settings.CONTINUE, settings.APPROVE]},
            lambda definition: definition.run.on_warning,
        ),
        Option(
            "workers",
            "Training workers",
            "Ray workers that train; on a cluster (RAY_ADDRESS) they score and make user caches, too. "
            "MIN:MAX: as many as it has room for when they start, or start again.",
            # Runs of before have a number. Two types would make the field a box of six lines; so there is none.
            {
                "anyOf": [{"type": "string"}, {"type": "integer"}],
                "pattern": WORKERS_PATTERN,
                "minimum": 1,
                "maximum": MOST_WORKERS,
            },
            lambda definition: str(definition.run.workers),
            form=WORKERS_ALLOWED,
            check=worker_range,
        ),
    )
}


def arguments(*names: str) -> list[str]:
    """Return the arguments by which a task hands these options of its run to a stage, as templates."""
    return [text for name in names for text in (OPTIONS[name].argument, f"{{{{ given.{name} }}}}")]


def table() -> str:
    """Return the table of docs/operations.md."""
    head = ["| variable of `make run` | field of the form | allowed | what it is |", "|---|---|---|---|"]
    rows = [
        f"| `{option.variable}` | {option.title} (`{option.name}`) | {option.allowed} | {option.description} |"
        for option in OPTIONS.values()
    ]
    return "\n".join([*head, *rows])

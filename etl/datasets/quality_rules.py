"""The section `quality` of a definition: bounds that differ for this data set, each with its reason, and expectations
of its own.

The models are what a file is checked against; `etl.quality.measure.own_rules` runs what stands in them. Nothing heavy
is imported here: DAG files read definitions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field as Setting

from etl.datasets.definition_model import DefinitionModel
from etl.metrics import registry
from etl.metrics.thresholds import SECTIONS, Thresholds, Value

TABLES_BY_GATE = {"events": ("events",), "sequences": ("items", "sequences")}
STATISTICS = "statistics."  # statistics.<stage>: the metrics of a gate, one row a day
GATE_OF_STATISTICS = {
    "raw": "raw",
    "events": "events",
    "items": "sequences",
    "sequences": "sequences",
    "training_input": "training_input",
    "model_output": "model_output",
}
Table = Literal[
    "events",
    "items",
    "sequences",
    "statistics.raw",
    "statistics.events",
    "statistics.items",
    "statistics.sequences",
    "statistics.training_input",
    "statistics.model_output",
]
Severity = Literal["info", "warning", "critical"]
NAME = "^[a-z][a-z0-9_]{0,59}$"

MOST_TIMES_THE_DEFAULT = (
    100  # a number of rows or users that it takes to judge: far beyond it nothing would ever be judged
)
MOST_TRAILING_DAYS = 60
HIGHEST_PSI = 5.0  # a critical bound on a PSI: beyond it nothing that a day can do reaches it


class Bound(DefinitionModel):
    """A number of `etl.metrics` that differs for this data set.

    Attributes:
        value: a number, or the pair of a lowest and a highest one.
        reason: why; shown wherever the bound is.
    """

    value: int | float | tuple[float, float]
    reason: str = Setting(min_length=1, max_length=500, pattern=r"\S")

    @pydantic.field_validator("value", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError("must be a number, or two of them: [lowest, highest]")
        return value


class _Own(DefinitionModel):
    """What every expectation of one's own says.

    Attributes:
        name: unique within the definition; names it in reports and in decisions.
        table: what it is about.
        severity: what its failure does.
        reason: why it is expected; shown on the report.
        remedy: what to do when it fails.
    """

    name: str = Setting(pattern=NAME)
    table: Table
    severity: Severity = "warning"
    reason: str = Setting(min_length=1, max_length=500, pattern=r"\S")
    remedy: str = Setting(
        default="look at the rows of the day; then have them delivered again, or change this expectation",
        min_length=1,
        max_length=500,
    )

    @property
    def gate(self) -> str:
        """The gate that judges it."""
        if self.table.startswith(STATISTICS):
            return GATE_OF_STATISTICS[self.table.removeprefix(STATISTICS)]
        return next(gate for gate, tables in TABLES_BY_GATE.items() if self.table in tables)


class Condition(_Own):
    """A condition in SQL that the rows of a table meet; rows for which it is false or null are counted, all of them.

    Attributes:
        sql: a boolean expression over the columns, in DuckDB's dialect.
        tolerated_share: of the rows, that may fail it.
    """

    sql: str = Setting(min_length=1, max_length=4_000)
    tolerated_share: float = Setting(default=0.0, ge=0, lt=1)


class Expectation(_Own):
    """An expectation of Great Expectations by the name of its class, with its arguments.

    Attributes:
        expectation: such as ExpectColumnValuesToBeInSet.
        arguments: its keyword arguments.
    """

    expectation: str = Setting(pattern="^Expect[A-Za-z0-9]+$")
    arguments: dict[str, Any] = Setting(default={})

    @pydantic.field_validator("expectation")
    @classmethod
    def _exists(cls, name: str) -> str:
        known = expectation_names()
        if name not in known:
            raise ValueError(f"Great Expectations has no {name}; it has, for example, {', '.join(_like(name, known))}")
        if name.startswith("ExpectTableRowCount"):
            raise ValueError(
                "large tables are judged by a sample of their rows: expect their number of column `rows` of table"
                " statistics.events instead"
            )
        return name

    @pydantic.field_validator("arguments")
    @classmethod
    def _not_ours(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in ("severity", "notes", "meta", "description", "id", "batch_id"):
            if name in arguments:
                raise ValueError(
                    f"{name!r} is no argument here; severity, reason and remedy are fields of the expectation"
                )
        return arguments


class Quality(DefinitionModel):
    """How the gates judge this data set.

    Attributes:
        bounds: name of a bound (docs/expectations.md) or a setting of `etl.metrics.thresholds` -> value and reason.
        expectations, conditions: of one's own.
    """

    bounds: dict[str, Bound] = Setting(default={})
    expectations: tuple[Expectation, ...] = ()
    conditions: tuple[Condition, ...] = ()

    @pydantic.model_validator(mode="after")
    def _sound(self) -> Quality:
        thresholds_with(self.bounds)
        names = [own.name for own in (*self.expectations, *self.conditions)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is given twice among expectations and conditions")
        return self

    def thresholds(self) -> Thresholds:
        """Return the thresholds of this data set."""
        return thresholds_with(self.bounds)

    @property
    def digest(self) -> str:
        """Return what distinguishes two of these sections."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class StatedFloat(float):
    """A bound that a definition sets, with its reason."""

    reason: str


class StatedInt(int):
    """The same of a whole number."""

    reason: str


def thresholds_with(bounds: dict[str, Bound]) -> Thresholds:
    """Return the thresholds with some bounds set; those hold their reason (`reason_of`).

    Raises:
        ValueError: no such bound, another type, or one that no data could break.
    """
    thresholds = Thresholds()
    defaults = thresholds.known()
    for where, bound in bounds.items():
        section, _, name = where.partition(".")
        if section not in SECTIONS:
            known = ", ".join(SECTIONS)
            raise ValueError(
                f"bounds.{where}: no such bound; it begins with one of {known}, such as events.min_label_rate"
            )
        if where not in defaults:
            names = [key.partition(".")[2] for key in defaults if key.startswith(f"{section}.")]
            near = ", ".join(_like(name, names))
            raise ValueError(f"bounds.{where}: no such bound; {section} has, for example, {near}")
        value = _checked(where, name, bound.value, defaults[where])
        thresholds = thresholds.with_value(where, _stated(value, bound.reason))
    drift = thresholds.drift
    for name in ("min_trailing_days", "min_steady_days", "memory_days"):
        if getattr(drift, name) > drift.trailing_days:
            raise ValueError(
                f"bounds.drift.{name} is {getattr(drift, name)}, more than drift.trailing_days ({drift.trailing_days}):"
                " nothing would be compared"
            )
    return thresholds


def reason_of(value: Any) -> str:
    """Return the reason of a bound that a definition has set, '' of any other."""
    return getattr(value[0] if isinstance(value, tuple) else value, "reason", "")


def stated_bounds(bounds: dict[str, Bound], gate: str) -> dict[str, dict[str, Any]]:
    """Return what a gate's report says of the bounds that are set: name -> value, default, reason."""
    sections = (gate,) if gate == "training_input" else (gate, "drift")
    defaults = Thresholds().known()
    return {
        where: {"value": bound.value, "default": defaults[where], "reason": bound.reason}
        for where, bound in bounds.items()
        if where.partition(".")[0] in sections
    }


def expectation_names() -> list[str]:
    """Return the classes of Great Expectations' own expectations without importing it, which takes seconds."""
    spec = importlib.util.find_spec("great_expectations")
    assert spec is not None and spec.origin is not None
    exported = (Path(spec.origin).parent / "expectations" / "__init__.py").read_text(encoding="utf-8")
    return sorted(set(re.findall(r"\bExpect\w+", exported)) - {"Expectation"})


def _checked(where: str, name: str, value: Any, default: Value) -> Any:
    """Return a value of the default's type that data could still break."""
    if isinstance(default, tuple):
        if not isinstance(value, tuple):
            raise ValueError(f"bounds.{where}: give two numbers, [lowest, highest], as in {list(default)}")
        low, high = (float(number) for number in value)
        if not 0 < low < 1 < high:
            raise ValueError(
                f"bounds.{where}: {[low, high]} must be of a number between 0 and 1 and one above 1: nothing could"
                " break it otherwise"
            )
        return low, high
    if isinstance(value, tuple):
        raise ValueError(f"bounds.{where}: give one number, as in {default}")
    if isinstance(default, int):
        if value != int(value):
            raise ValueError(f"bounds.{where}: {value} must be a whole number, as in {default}")
        most = (
            MOST_TRAILING_DAYS
            if name.endswith("_days")
            else 24
            if name == "min_hours_covered"
            else default * MOST_TIMES_THE_DEFAULT
        )
        least = 1 if name.endswith("_days") or name == "sample_bytes" else 0
        if not least <= value <= most:
            raise ValueError(
                f"bounds.{where}: {value} must be between {least} and {most}: beyond it nothing would be judged"
            )
        return int(value)
    value = float(value)
    stopping = registry.critical_bounds()
    critical = where in stopping or where == "raw.max_refused_share"  # beyond that the events job stops
    lowest = stopping.get(where, False)
    if value < 0 or (lowest and value == 0):
        raise ValueError(
            f"bounds.{where}: {value:g} must be {'above 0: nothing is below it' if lowest else 'at least 0'}"
        )
    if _is_fraction(name) and (value > 1 or (critical and value == 1)):
        raise ValueError(
            f"bounds.{where}: {value:g} must be {'below' if critical else 'at most'} 1: "
            + ("a critical bound that nothing breaks would switch the gate off" if critical else "it is a share")
        )
    if critical and "psi" in name and value > HIGHEST_PSI:
        raise ValueError(
            f"bounds.{where}: {value:g} must be at most {HIGHEST_PSI:g}: a critical bound that nothing breaks would"
            " switch the gate off"
        )
    return value


def _is_fraction(name: str) -> bool:
    return any(part in name for part in ("share", "rise", "drop", "label_rate")) or name in (
        "min_score_sd",
        "max_ece",
        "min_shift_gain",
    )


def _stated(value: Any, reason: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_stated(number, reason) for number in value)
    stated: StatedFloat | StatedInt = StatedInt(value) if isinstance(value, int) else StatedFloat(value)
    stated.reason = reason
    return stated


def _like(name: str, known: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]

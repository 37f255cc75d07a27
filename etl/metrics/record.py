"""What a metric is: one record. How it is measured, what is expected of it and how it is shown follow from it.

The records stand in the files next to this one, one file a gate; `etl.metrics.registry` holds them all. Nothing heavy
is imported by these files: DAG files read definitions, which know the bounds of the records. So a record measures by
what the class of its facts (`etl.quality.measure`) offers, and imports no library itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

CRITICAL, WARNING, INFO = "critical", "warning", "info"
NAN = float("nan")

Measured = float | Mapping[str, float]


@dataclass(frozen=True)
class Bound:
    """A number that an expectation compares with; a definition may set its own.

    Attributes:
        key: its name in `quality.bounds` of a definition: `<section>.<name>`.
        default: what holds without that; a pair is the lowest and the highest value.
    """

    key: str
    default: int | float | tuple[float, float]


@dataclass(frozen=True)
class Limit:
    """One expectation of a metric.

    Attributes:
        severity: what its failure does: `critical` stops the stage, `warning` is logged, `info` is recorded.
        low, high: the lowest and the highest value that hold; a bound whose value is a pair may stand on both sides.
        strict: the bounds themselves do not hold.
        known: a value that is not known stops the stage, too: a bound alone holds for a null.
        contract: what breaks it breaks the contract of the tables, and nobody can let it through.
        so_that: what holds then; '' for what the metric says.
    """

    severity: str
    low: float | Bound | None = None
    high: float | Bound | None = None
    strict: bool = False
    known: bool = False
    contract: bool = False
    so_that: str = ""


@dataclass(frozen=True)
class Panel:
    """A drawing of the report, over days; the metrics that name it are its lines."""

    title: str
    logarithmic: bool = False


@dataclass(frozen=True)
class Metric:
    """One number about a day, a file, a partition or a model, or (its name ends with `*`) a family of them.

    A name that ends with `_count` counts what offends and should be 0; `_share` and `_rate` are fractions of 1.

    Attributes:
        measure: takes the facts of its suite, returns the value, not a number where it cannot be judged; of a family a
            mapping: what stands for the `*` -> value. None: `count` is all.
        so_that: what holds within its limits.
        remedy: what to do when it fails.
        limits: what is expected of it; none: it is only recorded, for drawings and for the days that follow.
        count: of metrics of sequences: takes the lists of one bucket of users, returns what adds up over buckets.
        details: takes the facts, returns what more to say when it fails; '' for nothing.
        plant: SQL over the suite's table `t` that returns the rows with a fault in them, which the metric must find.
        panel, line: the drawing that shows it, and its name there ('' : its own).
    """

    name: str
    measure: Callable[[Any], Measured] | None = None
    so_that: str = ""
    remedy: str = ""
    limits: tuple[Limit, ...] = ()
    count: Callable[[Any], int] | None = None
    details: Callable[[Any], str] | None = None
    plant: str = ""
    panel: Panel | None = None
    line: str = ""


@dataclass(frozen=True)
class Suite:
    """The metrics that are judged together: one row of them a day, a file, a partition or a model.

    Attributes:
        gate: the gate that judges it.
        row: what a row is.
        metrics: measured from the facts of the row.
        compared: measured afterwards, from the row and from the statistics of the days before.
    """

    name: str
    gate: str
    row: str
    metrics: tuple[Metric, ...]
    compared: tuple[Metric, ...] = ()

    @property
    def records(self) -> tuple[Metric, ...]:
        return self.metrics + self.compared


def zero(contract: bool = False) -> tuple[Limit, ...]:
    """Stop where there is any, or where it is not known."""
    return (Limit(CRITICAL, 0, 0, known=True, contract=contract),)


def at_least_one() -> tuple[Limit, ...]:
    """Stop where there is none, or where it is not known."""
    return (Limit(CRITICAL, low=1, known=True),)


def warn(low: float | Bound | None = None, high: float | Bound | None = None) -> tuple[Limit, ...]:
    """Warn outside (low, high); what is not known passes."""
    return (Limit(WARNING, low, high),)


def graded(warning: Limit, critical: Limit) -> tuple[Limit, ...]:
    """Stop beyond the one and warn beyond the other."""
    return critical, warning


def most(warning: Bound, critical: Bound) -> tuple[Limit, ...]:
    """Warn above the one and stop above the other; what is not known passes."""
    return graded(Limit(WARNING, high=warning), Limit(CRITICAL, high=critical))


def between(warning: Bound, critical: Bound) -> tuple[Limit, ...]:
    """Warn outside the one pair and stop outside the other; what is not known passes."""
    return graded(Limit(WARNING, warning, warning), Limit(CRITICAL, critical, critical))


def share(part: float, whole: float) -> float:
    """Return part / whole, 0 of nothing."""
    return part / whole if whole else 0.0

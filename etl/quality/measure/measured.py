"""Measures records: pure, from the facts of a row to its values and to what more there is to say about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from etl.datasets.quality_rules import Condition
from etl.metrics.record import Metric

Row = dict[str, float | str]
EVERY_ROW = ""  # key of details that are of no row in particular


@dataclass(frozen=True)
class Check:
    """Rows of metrics to judge by one suite.

    Attributes:
        suite: name of the suite: of `etl.metrics.registry`, or of the data set's own conditions.
        rows: one a day, or one a file.
        key: metric that names a row.
        details: metric -> row's key (or EVERY_ROW) -> what more to say when an expectation on it fails there.
        conditions: the data set's own, of which the rows hold the shares that fail; none: the suite is built in.
    """

    suite: str
    rows: Sequence[Row]
    key: str = "dt"
    details: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    conditions: Sequence[Condition] = ()


@dataclass(frozen=True)
class Evidence:
    """What has been measured for a gate.

    Attributes:
        checks: the rows of metrics and their suites.
        statistics: (stage, day, metrics) to keep for the days that follow.
    """

    checks: Sequence[Any]
    statistics: Sequence[tuple[str, str, Mapping[str, Any]]]


def measured(metrics: Sequence[Metric], facts: Any) -> tuple[Row, dict[str, str]]:
    """Return the value of each metric, a family's by the name of each member, and metric -> what more to say about it.

    Args:
        facts: what the suite's records measure; `counted` of it holds what only adds up.
    """
    row: Row = {}
    details: dict[str, str] = {}
    for metric in metrics:
        value = metric.measure(facts) if metric.measure is not None else facts.counted[metric.name]
        if isinstance(value, Mapping):
            stem = metric.name.removesuffix("*")
            row |= {f"{stem}{member}": _plain(of) for member, of in value.items()}
            continue
        row[metric.name] = _plain(value)
        if metric.details is not None and not np.isnan(value) and (more := metric.details(facts)):
            details[metric.name] = more
    return row, details


def same_metrics(rows: Sequence[Row]) -> list[Row]:
    """Give every row every metric: days differ in the values of their fields."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, float("nan")) for name in names} for row in rows]


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a row that are numbers."""
    return {name: float(value) for name, value in metrics.items() if not isinstance(value, str)}


def _plain(value: Any) -> float:
    """Return a number of numpy, or a yes, as Python's."""
    plain = value.item() if isinstance(value, np.generic) else value
    return int(plain) if isinstance(plain, bool) else plain

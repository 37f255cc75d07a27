"""What each suite expects, made of the records of `etl.metrics`; and the page that lists it all.

`python -m etl.quality.judge.suites > docs/expectations.md` writes that page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from etl.datasets.quality_rules import Condition, reason_of
from etl.metrics import registry
from etl.metrics.events import REBUILD
from etl.metrics.record import CRITICAL, INFO, Bound, Limit, Metric
from etl.metrics.thresholds import Thresholds

UNKNOWN = "unknown_count"  # metrics of a row that must be known and are not
# One expectation for all of them: an expectation costs more than a metric.
EVERY_KNOWN = Metric(
    UNKNOWN,
    so_that="Every metric that decides is known.",
    remedy=REBUILD,
    limits=(Limit(CRITICAL, 0, 0, contract=True),),
)


@dataclass(frozen=True)
class Expected:
    """One expectation of a suite, with the bounds of one data set.

    Attributes:
        metric: name of the column that is judged.
        low, high: the lowest and the highest value that hold; None: any.
        strict: the bounds themselves do not hold.
        so_that: what holds within them.
        bound_keys: names in `quality.bounds` of what a definition may set.
    """

    metric: str
    severity: str
    low: float | None
    high: float | None
    strict: bool
    known: bool
    contract: bool
    so_that: str
    remedy: str
    bound_keys: tuple[str, ...] = ()

    @property
    def bounds(self) -> str:
        """The bounds in words, not signs: Data Docs pages would read "<" as the start of a tag."""
        signs = ("above", "below") if self.strict else ("at least", "at most")
        pairs = zip(signs, (self.low, self.high), strict=True)
        return " and ".join(f"{sign} {bound:g}" for sign, bound in pairs if bound is not None)


def expected(suite: str, thresholds: Thresholds, own: Sequence[Condition] = ()) -> list[Expected]:
    """Return what a suite expects.

    Args:
        suite: a name of the registry.
        own: the data set's own conditions; given, the suite is of these: few rows fail each.
    """
    if own:
        return [_of_condition(condition) for condition in own]
    records = registry.SUITES[suite].records
    if any(limit.known for metric in records for limit in metric.limits):
        records = (*records, EVERY_KNOWN)
    return [_of_limit(metric, limit, thresholds) for metric in records for limit in metric.limits]


def must_be_known(suite: str, own: Sequence[Condition] = ()) -> list[str]:
    """Return the metrics of a suite whose unknown value stops the stage."""
    return (
        []
        if own
        else [metric.name for metric in registry.SUITES[suite].records if any(limit.known for limit in metric.limits)]
    )


def _of_limit(metric: Metric, limit: Limit, thresholds: Thresholds) -> Expected:
    low, high = thresholds.number(limit.low, 0), thresholds.number(limit.high, 1)
    so_that = limit.so_that or metric.so_that
    if reason := reason_of(low) or reason_of(high):
        so_that = f"{so_that} The definition sets this bound: {reason}"
    keys = dict.fromkeys(bound.key for bound in (limit.low, limit.high) if isinstance(bound, Bound))
    return Expected(
        metric.name,
        limit.severity,
        low,
        high,
        limit.strict,
        limit.known,
        limit.contract,
        so_that,
        metric.remedy,
        tuple(keys),
    )


def _of_condition(own: Condition) -> Expected:
    return Expected(own.name, own.severity, None, own.tolerated_share, False, False, False, own.reason, own.remedy)


def table() -> str:
    """Return every expectation as a page for people, with the default bounds: docs/expectations.md."""
    lines = [
        "# Every expectation",
        "",
        (
            "Written by `python -m etl.quality.judge.suites > docs/expectations.md` from the records of `etl/metrics/`,"
            " with"
        ),
        (
            "the default bounds; `quality.bounds` of a definition sets others by the names given here. What the"
            " metrics are"
        ),
        "for and which faults they were tried on: [validation.md](validation.md). How to add one:",
        "[CONTRIBUTING.md](../CONTRIBUTING.md#add-an-expectation).",
        "",
    ]
    for gate in registry.GATES:
        lines += [f"## Gate {gate}", "", "| of each | metric | severity | must be | bound | so that | else |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for suite in registry.SUITES.values():
            if suite.gate == gate:
                lines += [_line(suite.row, one) for one in expected(suite.name, Thresholds())]
        lines.append("")
    return "\n".join(lines)


def _line(row: str, one: Expected) -> str:
    severity = f"{one.severity}{', nobody lets it through' if one.contract else ''}"
    bounds = one.bounds if one.low != one.high else f"{one.low:g}"
    keys = ", ".join(f"`{key}`" for key in one.bound_keys)
    remedy = one.remedy if one.severity != INFO else ""
    return f"| {row} | `{one.metric}` | {severity} | {bounds} | {keys} | {one.so_that} | {remedy} |"


if __name__ == "__main__":
    print(table(), end="")

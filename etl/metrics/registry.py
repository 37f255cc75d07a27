"""Every suite of every gate, and what is known of its records by name."""

from __future__ import annotations

from collections.abc import Iterator

from etl.metrics import events, model_output, raw, sequences, training_input
from etl.metrics.record import CRITICAL, Bound, Suite

SUITES: dict[str, Suite] = {
    suite.name: suite for room in (raw, events, sequences, training_input, model_output) for suite in room.SUITES
}
GATES = tuple(dict.fromkeys(suite.gate for suite in SUITES.values()))


def bounds() -> dict[str, Bound]:
    """Return every bound that a record compares with, by key."""
    return {bound.key: bound for bound, _, _ in _uses()}


def critical_bounds() -> dict[str, bool]:
    """Return the keys of the bounds that stop a stage, each with whether it is a lowest value."""
    return {bound.key: is_lowest for bound, severity, is_lowest in _uses() if severity == CRITICAL}


def _uses() -> Iterator[tuple[Bound, str, bool]]:
    for suite in SUITES.values():
        for metric in suite.records:
            for limit in metric.limits:
                for bound, is_lowest in ((limit.high, False), (limit.low, True)):
                    if isinstance(bound, Bound):
                        yield bound, limit.severity, is_lowest

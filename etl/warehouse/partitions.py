"""The only place that knows what a partition is: one UTC day, written `YYYY-MM-DD`, and the days a partition needs."""

from __future__ import annotations

import datetime as dtm
from dataclasses import dataclass

from etl.stage.errors import StageError

MS_PER_DAY = 86_400_000
_EPOCH = dtm.date(1970, 1, 1)


def parse_dt(text: str) -> str:
    """Return `text` when it is a calendar day `YYYY-MM-DD`.

    Raises:
        StageError: it is not.
    """
    try:
        day = dtm.date.fromisoformat(text)
    except ValueError:
        day = None
    if day is None or day.isoformat() != text:
        raise StageError(f"the partition {text!r} is not a day", "give it as YYYY-MM-DD, for example 2022-04-21")
    return text


def add_days(dt: str, days: int) -> str:
    """Return the day `days` after `dt` (before it when negative)."""
    return (dtm.date.fromisoformat(dt) + dtm.timedelta(days=days)).isoformat()


def day_number(dt: str) -> int:
    """Return the days since 1970-01-01; `event_time_ms // MS_PER_DAY` of every event of partition `dt`."""
    return (dtm.date.fromisoformat(dt) - _EPOCH).days


def dt_of_day_number(number: int) -> str:
    """Inverse of `day_number`."""
    return (_EPOCH + dtm.timedelta(days=number)).isoformat()


def days_between(first_dt: str, last_dt: str) -> list[str]:
    """Return every day from `first_dt` to `last_dt`, both included; empty when the order is reversed."""
    first = day_number(first_dt)
    return [dt_of_day_number(number) for number in range(first, day_number(last_dt) + 1)]


@dataclass(frozen=True)
class Window:
    """The days that partition `dt` is a function of.

    Attributes:
        dt: the partition, and the last day of its window.
        target_days: days, `dt` included, whose events are targets; all but the last `evaluation_days` are training
            data.
        lookback_days: days, `dt` included, whose events may stand in a history; at least `target_days`.
        evaluation_days: the last so many days, `dt` included, are for evaluation: 1, or more where a day holds too
            little.
    """

    dt: str
    target_days: int
    lookback_days: int
    evaluation_days: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.evaluation_days < self.target_days <= self.lookback_days:
            raise StageError(
                f"window of {self.evaluation_days} evaluation days and {self.target_days} target days with a lookback"
                f" of {self.lookback_days} days",
                "use 1 <= evaluation_days < target_days <= lookback_days",
            )

    @property
    def first_target_dt(self) -> str:
        return add_days(self.dt, 1 - self.target_days)

    @property
    def first_evaluation_dt(self) -> str:
        return add_days(self.dt, 1 - self.evaluation_days)

    @property
    def event_days(self) -> list[str]:
        """Every day whose events the partition reads, oldest first."""
        return days_between(add_days(self.dt, 1 - self.lookback_days), self.dt)

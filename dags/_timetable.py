"""When the DAG of a data set runs by itself, and which day a run stands for.

The bounds of the data set are here and not in the DAG's `start_date` and `end_date`: tasks inherit those, and Airflow
ends a run whose logical date lies outside them as a success without a task.
"""

from __future__ import annotations

import datetime as dtm
from typing import TYPE_CHECKING, Any

import pendulum
from airflow.timetables.base import DagRunInfo, DataInterval, Timetable

if TYPE_CHECKING:
    from airflow.timetables.base import TimeRestriction

DAY = dtm.timedelta(days=1)


class PartitionDays(Timetable):
    """One run a UTC day: its data interval is the day, its logical date the day's midnight.

    Args:
        first_day, last_day: of the schedule, YYYY-MM-DD; without a last day it goes on.
        hour: UTC hour at which a day that has ended is built; None: no run starts by itself, backfills and manual runs
            do as ever.
    """

    def __init__(self, first_day: str, last_day: str | None, hour: int | None) -> None:
        self.first_day, self.last_day, self.hour = first_day, last_day, hour
        self.description = self.summary

    @property
    def summary(self) -> str:
        if self.hour is None:
            return "no schedule"
        return f"{self.hour:02d}:00 UTC, {self.first_day} .. {self.last_day or ''}".rstrip()

    def serialize(self) -> dict[str, Any]:
        return {"first_day": self.first_day, "last_day": self.last_day, "hour": self.hour}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> Timetable:
        return cls(**data)

    def infer_manual_data_interval(self, *, run_after: pendulum.DateTime) -> DataInterval:
        """Return the UTC day of a manual run's logical date, whatever the day."""
        day = _midnight(run_after)
        return DataInterval(day, day + DAY)

    def next_dagrun_info(
        self, *, last_automated_data_interval: DataInterval | None, restriction: TimeRestriction
    ) -> DagRunInfo | None:
        """Return the next run.

        With `catchup` a backfill asks: every day of its range, also one outside the data set, whose run then says so.
        Such a run is due from its day's beginning on, as the day is over anyway: Airflow makes its id of that moment,
        and so the id names the day.
        """
        last = last_automated_data_interval
        if restriction.catchup:
            if last is not None:
                day = _midnight(last.start) + DAY
            elif restriction.earliest is not None:
                day = _midnight(restriction.earliest + DAY - dtm.timedelta(microseconds=1))
            else:
                return None
            if restriction.latest is not None and day > restriction.latest:
                return None
            return DagRunInfo(run_after=day, data_interval=DataInterval(day, day + DAY))
        if self.hour is None:
            return None
        due_after = DAY + dtm.timedelta(hours=self.hour)  # the beginning of the day
        day = max(_midnight(pendulum.now("UTC") - due_after), _midnight_of(self.first_day))
        if last is not None:
            day = max(day, _midnight(last.start) + DAY)
        if self.last_day is not None and day > _midnight_of(self.last_day):
            return None
        return DagRunInfo(run_after=day + due_after, data_interval=DataInterval(day, day + DAY))

    def generate_run_id(
        self, *, run_type: Any, run_after: pendulum.DateTime, data_interval: DataInterval | None, **extra: Any
    ) -> str:
        """Return the id of a scheduled run by its day.

        Of a manual run, of which there may be several a day, by its moment.
        """
        if str(getattr(run_type, "value", run_type)) == "scheduled" and data_interval is not None:
            return run_type.generate_run_id(suffix=data_interval.start.date().isoformat())
        return super().generate_run_id(run_type=run_type, run_after=run_after, data_interval=data_interval, **extra)


def _midnight_of(day: str) -> pendulum.DateTime:
    return pendulum.instance(dtm.datetime.fromisoformat(day), tz="UTC")


def _midnight(moment: dtm.datetime) -> pendulum.DateTime:
    """Return the beginning of a moment's UTC day."""
    return pendulum.instance(moment).in_timezone("UTC").start_of("day")

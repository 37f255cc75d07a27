"""The task in which a scheduled run waits for the raw files of its day."""

from __future__ import annotations

import datetime as dtm
import zoneinfo
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator

from dags._common import handed_on, run_type
from dags._exits import ends_as_a_stage
from etl.datasets.definition import DatasetDefinition, dataset
from etl.stage.errors import StageError

if TYPE_CHECKING:
    from etl.ingest.raw import RawFile

LOOK_EVERY_SECONDS = 300


class WaitForFiles(BaseSensorOperator):
    """Look for the day's raw files from time to time, without a slot in between, until they are there or the deadline
    is over.

    Only a scheduled run waits, so long after its hour as the definition says (`run.wait_hours`). A person who triggers
    a run or a backfill knows what is there; the events job says what is missing.

    Args:
        dataset: name of a built-in data set, or the path of a definition.
    """

    ui_color = "#e8f0fe"

    def __init__(self, *, dataset: str, **kwargs: Any) -> None:
        super().__init__(mode="reschedule", poke_interval=LOOK_EVERY_SECONDS, timeout=dtm.timedelta(days=2), **kwargs)
        self.dataset = dataset

    @ends_as_a_stage
    def poke(self, context: Any) -> bool:
        run, given = context["dag_run"], handed_on(context)
        if run_type(run) != "scheduled":
            self.log.info("this run was started by a person: it takes the files that there are")
            return True
        definition = dataset(self.dataset)
        missing = what_is_missing(definition, given["params"]["raw"], given["dt"])
        if not missing:
            self.log.info("the raw files of %s are there", given["dt"])
            return True
        deadline = run.run_after + dtm.timedelta(hours=definition.run.wait_hours)
        if dtm.datetime.now(dtm.UTC) >= deadline:
            raise StageError(
                f"the raw files of {given['dt']} did not come by {deadline:%Y-%m-%d %H:%M} UTC: {missing}",
                "when they are there, clear this task with its downstream tasks; "
                "run.hour and run.wait_hours of the definition say how long a run waits",
            )
        self.log.info("waiting until %s UTC: %s", f"{deadline:%Y-%m-%d %H:%M}", missing)
        return False


def what_is_missing(definition: DatasetDefinition, raw: str, dt: str) -> str:
    """Return why the raw files of a UTC day are not there yet; '' when they are.

    Files whose names promise days: each local day that the UTC day touches has one. Others: one has changed since the
    day began.

    Args:
        raw: folder of the raw logs.
        dt: the day, YYYY-MM-DD.
    """
    from etl.ingest.raw import RawLocation  # takes a second to load, in a file that Airflow reads all the time

    try:
        files = RawLocation(raw).logs(definition)
    except (StageError, OSError) as error:
        return " ".join(str(error).split())
    return missing_days(files, definition, dt) if definition.logs.days_in_name else _unchanged(files, dt)


def missing_days(files: Sequence[RawFile], definition: DatasetDefinition, dt: str) -> str:
    assert definition.logs.days_in_name is not None
    zone = zoneinfo.ZoneInfo(definition.logs.days_in_name.zone or definition.events.time.zone)
    begin = _begin(dt)
    wanted = dict.fromkeys(
        moment.astimezone(zone).date().isoformat() for moment in (begin, begin + dtm.timedelta(days=1, microseconds=-1))
    )
    lacking = [
        day
        for day in wanted
        if not any(file.first_dt and file.last_dt and file.first_dt <= day <= file.last_dt for file in files)
    ]
    return (
        f"no file that matches {', '.join(definition.logs.files)} has {' or '.join(lacking)} in its name (days of"
        f" {zone.key}); the last is {files[-1].name}"
        if lacking
        else ""
    )


def _unchanged(files: Sequence[RawFile], dt: str) -> str:
    newest = max(files, key=lambda file: file.modified_ns)
    changed = dtm.datetime.fromtimestamp(newest.modified_ns / 1e9, dtm.UTC)
    return (
        ""
        if changed >= _begin(dt)
        else f"no file has changed since that day began; the newest, {newest.name}, is of {changed:%Y-%m-%d %H:%M} UTC"
    )


def _begin(dt: str) -> dtm.datetime:
    return dtm.datetime.fromisoformat(dt).replace(tzinfo=dtm.UTC)

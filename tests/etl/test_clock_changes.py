"""Local times on the days on which clocks change: read by a stated rule, counted and reported."""

from __future__ import annotations

import datetime as dtm
import zoneinfo

import numpy as np
import pyarrow as pa
import pytest

from etl.datasets.definition import DatasetDefinition, Time
from etl.ingest import build_events as job
from etl.ingest.raw import MISSING, REPEATED, SINGLE, RawLocation, clocked_times_ms
from etl.warehouse.store import TableStore
from tests.etl.test_feed_life import NoSpark, run_here

FORMAT = "%Y-%m-%d %H:%M:%S"


@pytest.mark.parametrize("kind", ["text", "timestamp"])
@pytest.mark.parametrize(
    ("zone", "local", "clock", "utc"),
    [
        ("Europe/Berlin", "2024-10-27 01:59:59", SINGLE, "2024-10-26 23:59:59"),
        ("Europe/Berlin", "2024-10-27 02:00:00", REPEATED, "2024-10-27 01:00:00"),
        ("Europe/Berlin", "2024-10-27 02:59:59", REPEATED, "2024-10-27 01:59:59"),
        ("Europe/Berlin", "2024-10-27 03:00:00", SINGLE, "2024-10-27 02:00:00"),
        ("Europe/Berlin", "2024-03-31 02:10:00", MISSING, "2024-03-31 01:10:00"),
        ("Europe/Berlin", "2024-03-31 02:40:00", MISSING, "2024-03-31 01:40:00"),
        ("Europe/Berlin", "2024-03-31 03:10:00", SINGLE, "2024-03-31 01:10:00"),
        ("America/New_York", "2024-11-03 01:30:00", REPEATED, "2024-11-03 06:30:00"),
        ("Australia/Lord_Howe", "2024-10-06 02:10:00", MISSING, "2024-10-05 15:40:00"),  # half an hour
        ("Asia/Shanghai", "2024-03-31 02:10:00", SINGLE, "2024-03-30 18:10:00"),
    ],
)
def test_repeated_hours_are_the_second_pass_and_missing_ones_go_by_the_clock_before(kind, zone, local, clock, utc):
    moment = dtm.datetime.strptime(local, FORMAT)
    values, time = (
        (pa.array([local]), Time(column="at", format=FORMAT, zone=zone))
        if kind == "text"
        else (pa.array([moment], pa.timestamp("us")), Time(column="at", zone=zone))
    )
    time_ms, there, found = clocked_times_ms(values, time)
    wanted = dtm.datetime.strptime(utc, FORMAT).replace(tzinfo=dtm.UTC)
    assert (time_ms.tolist(), there.tolist(), found.tolist()) == ([round(wanted.timestamp() * 1_000)], [True], [clock])
    if clock == REPEATED:  # as Python's own rule for the second pass says
        assert moment.replace(tzinfo=zoneinfo.ZoneInfo(zone), fold=1).astimezone(dtm.UTC) == wanted


def test_every_second_of_both_days_keeps_its_place_but_for_the_hours_that_change():
    start = np.datetime64("2024-03-31T00:00:00", "s")
    local = start + np.arange(86_400)
    time_ms, there, clock = clocked_times_ms(pa.array(local), Time(column="at", zone="Europe/Berlin"))
    assert there.all()
    assert (clock == MISSING).sum() == 3_600
    assert (np.diff(time_ms[clock == MISSING]) == 1_000).all()  # in their order, at their distances
    assert (np.diff(time_ms[clock == SINGLE]) == 1_000).all()


def test_they_are_counted_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "spark_session", lambda name: NoSpark())
    monkeypatch.setattr(job, "_run", run_here)
    definition = DatasetDefinition.model_validate(
        {
            "name": "shop",
            "title": "A shop",
            "first_day": "2024-03-01",
            "logs": {
                "files": ["*.csv"],
                "columns": {"user": "integer", "item": "integer", "at": "text"},
                "days_in_name": {"pattern": r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)"},
            },
            "events": {
                "user": "user",
                "item": "item",
                "time": {"column": "at", "format": FORMAT, "zone": "Europe/Berlin"},
                "signals": {"any": {"column": "item", "at_least": 1}},
            },
            "targets": {"label": "any"},
        }
    )
    (tmp_path / "raw").mkdir()
    rows = ["1,1,2024-10-27 02:30:00", "2,1,2024-10-27 02:30:00", "1,2,2024-10-27 12:00:00"]
    (tmp_path / "raw" / "2024-10-27.csv").write_text("\n".join(["user,item,at", *rows]) + "\n")
    (tmp_path / "raw" / "2024-03-31.csv").write_text("user,item,at\n1,1,2024-03-31 02:30:00\n1,2,2024-03-31 12:00:00\n")
    store = TableStore(str(tmp_path / "w"), "shop")
    for dt, counted in (("2024-10-27", (2, 0)), ("2024-03-31", (0, 1))):
        summary = job.build_events(store, definition, RawLocation(str(tmp_path / "raw")), job.Build(dt, dt, 1, 1, 0.0))
        counts = store.staged_manifest(dt, "events", dt).counts
        assert (counts["repeated_times"], counts["missing_times"]) == counted
        assert (
            summary["rows_read"] == summary["events"] == counts["rows_read"]
        )  # reported next to the rows, not among them
        assert f"clock changes: {counted[0]} event(s)" in capsys.readouterr().out

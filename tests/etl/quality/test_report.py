"""The page of a partition: it says what failed and what to do, shows rows of untrusted logs as text, and is always
written.

.venv/bin/python -m pytest tests/etl/quality/test_report.py -q
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest

from etl.datasets.definition import dataset
from etl.quality.judge import data_docs
from etl.quality.judge.outcomes import Decision, Failing, Outcome, StageOutcome, write_outcome
from etl.quality.measure.statistics import write_stats
from etl.quality.report import prune
from etl.quality.report import write as report
from etl.quality.report.pages import Partition, Quarantine, index_page, partition_page, summary
from etl.quality.report.plots import draw
from etl.stage.identity import report_page
from etl.warehouse.partitions import add_days
from etl.warehouse.schemas import QUARANTINE, schema_fingerprint
from etl.warehouse.store import Manifest, TableStore

DATASET, DT, ATTEMPT = "kuairand_simulated", "2022-04-21", "kuairand_simulated-2022-04-21-0badf00d0000"
EVIL = "<script>alert('x')</script>\"&\x00\x1b[31m\u202eABC"


class Reader(HTMLParser):
    """What a browser would make of a page: its elements, its addresses and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.text += data


def outcome(severity: str, success: bool = False, column: str = "label_rate", **changes) -> Outcome:
    made = {
        "suite": "events_days",
        "expectation": "expect_column_values_to_be_between",
        "observed": {DT: 0.12},
        "expected": {"min_value": 0.25},
        "remedy": "look at the raw files of the day",
        "message": f"{column} is 0.12, at least 0.25 was expected",
        "data_docs": "/r/data_docs/uncommitted/validations/events_days/run/time/batch.html",
    }
    return Outcome(column=column, severity=severity, success=success, **{**made, **changes})


def gate(stage: str, severity: str | None, *outcomes: Outcome) -> StageOutcome:
    return StageOutcome(DATASET, True, DT, ATTEMPT, stage, 1_650_585_600_000, severity, outcomes)


def partition(*gates: StageOutcome, **changes) -> Partition:
    made = {
        "dataset": DATASET,
        "simulated": True,
        "dt": DT,
        "attempt": ATTEMPT,
        "stopped_by": "",
        "stats": {},
        "quarantine": None,
        "data_docs": {},
        "written_at_ms": 1_650_585_600_000,
    }
    return Partition(outcomes=gates, **{**made, **changes})


@pytest.fixture
def store(tmp_path: Path) -> TableStore:
    return TableStore(str(tmp_path / "warehouse"), DATASET)


# ---- what the page says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gates", "stopped_by", "verdict"),
    [
        ([gate("raw", None), gate("events", "critical", outcome("critical"))], "", "stopped"),
        ([gate("events", "warning", outcome("warning")), gate("sequences", None)], "", "warned"),
        ([gate("events", "info", outcome("info"))], "", "passed"),
        ([gate("events", None)], "file x has no column user_id", "stopped"),
        ([], "", "not judged"),
    ],
)
def test_the_worst_severity_of_all_gates_is_the_verdict(gates, stopped_by, verdict) -> None:
    made = partition(*gates, stopped_by=stopped_by)
    assert made.verdict == summary(made)["verdict"] == verdict
    assert verdict in Reader(partition_page(made, [], "../index.html")).text


def test_a_failure_is_told_with_severity_values_bounds_remedy_and_its_data_docs_page() -> None:
    path = outcome("critical").data_docs
    gates = [
        gate("raw", None),
        gate(
            "events",
            "critical",
            outcome("warning", column="hours_covered"),
            outcome("critical"),
            outcome("critical", True, "users"),
        ),
    ]
    page = Reader(
        partition_page(partition(*gates, data_docs={path: "../../data docs/batch.html"}), [], "../../../index.html")
    )
    for said in (
        "SIMULATED DATA",
        DATASET,
        DT,
        ATTEMPT,
        "raw: passed",
        "events: stopped",
        "label_rate is 0.12",
        "0.25",
        "look at the raw files of the day",
    ):
        assert said in page.text
    assert page.text.index("critical") < page.text.index("hours_covered")  # the worst first
    assert "users is" not in page.text  # what held is Great Expectations' pages' business
    assert ("href", "../../data%20docs/batch.html") in page.attributes
    assert ("href", "../../../index.html") in page.attributes


def test_a_gate_that_stopped_before_its_expectations_says_why() -> None:
    page = Reader(
        partition_page(
            partition(gate("raw", None), stopped_by="file a.parquet has no column user_id\n  remedy: rebuild"), [], "x"
        )
    )
    assert "no column user_id\n  remedy: rebuild" in page.text


def test_real_data_is_not_called_simulated() -> None:
    assert "SIMULATED" not in partition_page(partition(gate("raw", None), simulated=False), [], "x")


def test_a_page_needs_nothing_beside_it() -> None:
    plots = draw({"events": {"rows": {DT: 5.0, "2022-04-20": 4.0}}}, DT)
    page = Reader(partition_page(partition(gate("events", None)), plots, "../index.html"))
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert [value for name, value in page.attributes if name in ("href", "src") and "//" in str(value)] == []


def test_rows_of_untrusted_logs_are_text() -> None:
    """Whatever text a page shows comes from data or from people."""
    row = {"source_file": EVIL, "row_number": 7, "reason": f"bad_time: {EVIL}", "raw_text": EVIL * 100}
    failed = outcome(
        "critical", column=EVIL, observed={EVIL: EVIL}, expected=[EVIL], remedy=EVIL, message=EVIL, data_docs=EVIL
    )
    decision = Decision(EVIL, EVIL, EVIL, EVIL, 0, EVIL, (Failing(EVIL, EVIL, EVIL, (EVIL,), EVIL),))
    bounds = {EVIL: {"value": EVIL, "default": EVIL, "reason": EVIL}}
    judged = replace(gate(EVIL, "critical", failed, replace(failed, severity="info")), passed=decision, bounds=bounds)
    made = partition(
        judged,
        replace(judged, passed=None),
        stopped_by=EVIL.upper(),
        quarantine=Quarantine(1, {EVIL: 1}, [row], EVIL),
        stats={"events": {EVIL: {DT: 1.0}}},
        data_docs={EVIL: f"javascript:{EVIL}", f"{EVIL}/gone": None},
        pass_commands=[EVIL],
        other_attempts={EVIL: EVIL, "events": EVIL},
        dataset=EVIL,
        attempt=EVIL,
    )
    for html in (
        partition_page(made, draw({"events": {f"action_rate_{EVIL}": {DT: 1.0}, "action_rate_b": {DT: 0.5}}}, DT), "x"),
        index_page([("a.html", summary(made))]),
    ):
        page = Reader(html)
        assert "script" not in page.tags
        assert not any(name.startswith("on") for name, _ in page.attributes)
        assert not any(
            str(value).lower().startswith("javascript:") for name, value in page.attributes if name == "href"
        )
        assert not set("\x00\x1b\u202e") & set(html)
        assert EVIL[:20] in page.text  # and it is shown
    assert "\\x1b[31m" in page.text or "\\x1b[31m" in Reader(partition_page(made, [], "x")).text


def test_long_rows_are_cut_and_say_so() -> None:
    row = {"source_file": "a", "row_number": 1, "reason": "r", "raw_text": "x" * 9000}
    html = partition_page(partition(quarantine=Quarantine(1, {"r": 1}, [row])), [], "x")
    assert len(html) < 12_000
    assert "9,000 characters" in html


def test_refused_rows_are_counted_by_reason_and_shown() -> None:
    row = {"source_file": "log.csv", "row_number": 71, "reason": "bad_time: 0", "raw_text": "1,2,3"}
    text = Reader(
        partition_page(partition(quarantine=Quarantine(1234, {"bad_time": 1200, "bad_id": 34}, [row])), [], "x")
    ).text
    for said in ("1,234 raw rows", "1,200", "34", "log.csv", "71", "bad_time: 0", "1,2,3"):
        assert said in text


def test_the_index_has_the_newest_partition_and_attempt_first() -> None:
    def entry(dt: str, attempt: str, at: int, *gates: StageOutcome) -> tuple[str, dict]:
        made = partition(
            *gates,
            dt=dt,
            attempt=attempt,
            written_at_ms=at,
            data_docs={"/r/validations/events_days/b.html": "../../../d/b.html"},
        )
        return f"partitions/{DATASET}/dt={dt}/{attempt}.html", summary(made)

    entries = [
        entry("2022-04-20", "day-before", 9, gate("raw", None)),
        entry(DT, "early", 1, gate("events", "critical", outcome("critical"))),
        entry(DT, "late", 2, gate("events", "warning", outcome("warning"))),
    ]
    html = index_page(entries)
    page = Reader(html)
    assert page.text.index("late") < page.text.index("early") < page.text.index("day-before")
    assert page.text.index("warned") < page.text.index("stopped")
    assert "1 critical" in page.text
    assert ("href", f"partitions/{DATASET}/dt={DT}/late.html") in page.attributes
    assert ("href", f"partitions/{DATASET}/dt={DT}/../../../d/b.html") in page.attributes
    assert "No gate has run" in Reader(index_page([])).text


# ---- drawings --------------------------------------------------------------------------------------------------------


def test_statistics_are_drawn_over_days_in_the_colours_of_the_page() -> None:
    days = [add_days(DT, -back) for back in range(20, -1, -1)]
    hours = {f"hour_share_{hour:02d}": dict.fromkeys(days, 1 / 24) for hour in range(24)}
    series = {
        "events": {
            "rows": dict.fromkeys(days, 100.0),
            "label_rate": {**dict.fromkeys(days, 0.3), DT: None},
            "action_rate_click": {DT: 0.3},
            "action_rate_like": {DT: 0.1},
            **hours,
        },
        "sequences": {"history_length_p50": {DT: 10.0}, "history_length_p99": {DT: 9000.0}},
    }
    plots = {plot.title: plot for plot in draw(series, DT)}
    assert any("hour" in title for title in plots)
    assert plots["Events: action rates"].lines == ("click", "like")
    assert plots["Sequences: history length, events"].lines == ("p50", "p99")
    for plot in plots.values():
        ElementTree.fromstring(plot.svg)
        assert not re.search(r"#0[1-4]0", plot.svg)  # a colour that the page was to choose
        assert "currentColor" in plot.svg
        assert "var(--day)" in plot.svg
    assert "var(--band)" in plots["Events: rows"].svg
    assert "04-21" in plots["Events: label rate"].svg  # the day is there even when it could not be measured


def test_days_after_the_partition_and_before_the_data_are_not_drawn() -> None:
    [plot] = draw(
        {"events": {"rows": {DT: 5.0, "2022-04-20": 0.0, "2022-04-19": 4.0, "2022-04-18": 0.0, "2022-04-25": 9.0}}}, DT
    )
    assert {day for day in ("04-18", "04-19", "04-20", "04-21", "04-25") if day in plot.svg} == {
        "04-19",
        "04-20",
        "04-21",
    }


def test_nothing_kept_draws_nothing() -> None:
    assert draw({}, DT) == []
    assert draw({"events": {"rows": {}}}, DT) == []


# ---- from a warehouse ------------------------------------------------------------------------------------------------


def refuse(store: TableStore, reasons: list[str], attempt: str = ATTEMPT) -> None:
    count = len(reasons)
    rows = pa.table(
        [["log.csv"] * count, list(range(count)), reasons, [f"raw {row}" for row in range(count)]], schema=QUARANTINE
    )
    work = store.begin_try(attempt, ["quarantine"], [DT])
    files = (store.write_file(work, "quarantine", DT, 0, rows),)
    store.write_staged_manifest(
        work, Manifest(DATASET, "quarantine", DT, attempt, schema_fingerprint(QUARANTINE), "test", files)
    )


def test_a_stopped_attempt_shows_what_it_measured_and_refused(store: TableStore, tmp_path: Path) -> None:
    for back in (2, 1):
        write_stats(store, "events", add_days(DT, -back), "before", {"rows": 100.0 * back})
    write_stats(store, "events", DT, ATTEMPT, {"rows": 7777.0}, rejected=True)
    write_stats(store, "events", DT, "another", {"rows": 8888.0})
    write_outcome(store, gate("events", "critical", outcome("critical")))
    refuse(store, ["bad_time: 1"] * 30 + ["bad_id: 5"] * 2)
    found = report.write(dataset(DATASET), store, DT, ATTEMPT, tmp_path / "reports", "")
    text = Reader(report_page(tmp_path / "reports", DATASET, DT, ATTEMPT).read_text()).text
    assert found["verdict"] == "stopped"
    assert "7,777" in text
    assert "8,888" not in text  # another attempt's day
    assert "100 to 200" in text  # the days before
    assert (
        f"etl.quality.judge.pass_once --dataset {DATASET} --warehouse {store.warehouse} --dt {DT} --stage events"
        f" --attempt {ATTEMPT} --reason" in text
    )
    assert re.search(r"bad_time\s*30", text)
    assert re.search(r"bad_id\s*2", text)
    assert "raw 31" in text  # a rare reason is in the sample, too
    assert ATTEMPT in (tmp_path / "reports" / "index.html").read_text()


def test_refused_rows_of_a_day_that_was_published_anew_meanwhile_are_shown(
    store: TableStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(store, ["bad_time: 1"] * 3)
    held = store.publish(ATTEMPT, "quarantine", DT)
    refuse(store, ["bad_id: 5"], "later")
    store.publish("later", "quarantine", DT)
    monkeypatch.setattr(
        TableStore, "manifest", lambda self, table, dt: held if (table, dt) == ("quarantine", DT) else None
    )
    report.write(dataset(DATASET), store, DT, ATTEMPT, tmp_path / "reports", "")
    assert re.search(r"bad_time\s*3", Reader(report_page(tmp_path / "reports", DATASET, DT, ATTEMPT).read_text()).text)


def test_the_command_line_prints_the_summary(
    store: TableStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_outcome(store, gate("events", "warning", outcome("warning")))
    report.main(
        [
            "--dataset",
            DATASET,
            "--warehouse",
            store.warehouse,
            "--dt",
            DT,
            "--attempt",
            ATTEMPT,
            "--reports",
            str(tmp_path),
            "--json",
        ]
    )
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "warned"
    assert found["failed"]["warning"] == ["events: label_rate is 0.12, at least 0.25 was expected"]


def gate_of(tmp_path: Path, body: str, reports: Path, more: str = "") -> subprocess.CompletedProcess[str]:
    """Run a gate with its report in a process of its own, until both have ended."""
    code = (
        "from pathlib import Path\nfrom etl.stage.errors import StageError\nfrom etl.quality.judge.page_process import"
        " written_after\nfrom etl.warehouse.store import TableStore\nstore ="
        f" TableStore({str(tmp_path / 'warehouse')!r}, {DATASET!r})\nwith written_after({DATASET!r}, store, {DT!r},"
        f" {ATTEMPT!r}, Path({str(reports)!r}){more}):\n    {body}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=Path(report.__file__).parents[3], capture_output=True, text=True, timeout=120
    )


def test_the_page_is_written_when_a_gate_stops_and_the_gates_own_error_is_kept(tmp_path: Path) -> None:
    for more in ("", ", only_stopped=True"):
        done = gate_of(
            tmp_path, "raise StageError('file a.parquet has no column user_id', 'rebuild it')", tmp_path, more
        )
        page = report_page(tmp_path, DATASET, DT, ATTEMPT)
        assert done.returncode == 1
        assert "StageError: file a.parquet has no column user_id" in done.stderr
        assert "no column user_id" in page.read_text()
        assert f"report: {page}" in done.stdout
        page.unlink()


def test_a_gate_that_holds_has_its_page_and_a_job_only_when_it_stops(tmp_path: Path) -> None:
    page = report_page(tmp_path, DATASET, DT, ATTEMPT)
    assert gate_of(tmp_path, "pass", tmp_path, ", only_stopped=True").stdout == ""
    assert not page.exists()
    assert gate_of(tmp_path, "pass", tmp_path).returncode == 0
    assert page.exists()


def test_a_report_that_cannot_be_written_costs_the_gate_nothing_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = gate_of(tmp_path, "pass", tmp_path / "file")
    assert done.returncode == 0
    assert "warning: the report" in done.stdout


def test_a_gate_loads_no_drawing_library() -> None:
    code = "import sys, etl.quality.judge.audit; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(report.__file__).parents[3])


# ---- Data Docs are kept of the newest attempts -----------------------------------------------------------------------


def validation(reports: Path, attempt: str, days_old: int) -> Path:
    """Write a validation and its page, as Great Expectations lays them down."""
    for folder, suffix in zip(data_docs.folders(reports), (".json", ".html"), strict=True):
        path = folder / "events_days" / f"{attempt}-events" / "20220421T000000.000000Z" / f"batch{suffix}"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        age(path, days_old)
    return path


def age(path: Path, days: int) -> None:
    os.utime(path, (days_ago(days) / 1_000,) * 2)


def days_ago(days: int) -> int:
    return 1_700_000_000_000 - days * 86_400_000  # pages that a test writes are newer


def test_old_data_docs_go_whole_and_no_report_links_to_them(store: TableStore, tmp_path: Path) -> None:
    pages = {}
    for attempt, days_old in (("oldest", 61), ("middle", 59), ("newest", 0)):
        pages[attempt] = validation(tmp_path, attempt, days_old)
        write_outcome(
            store,
            replace(gate("events", "warning", outcome("warning", data_docs=str(pages[attempt]))), attempt=attempt),
        )
        report.write(dataset(DATASET), store, DT, attempt, tmp_path, "")
    shown = report_page(tmp_path, DATASET, DT, "oldest")
    assert "data_docs" in shown.read_text()
    age(shown, 61)
    of_another = validation(tmp_path, "another", 99)
    (tmp_path / "partitions" / "another_set" / "dt=2022-04-21").mkdir(parents=True)
    (tmp_path / "partitions" / "another_set" / "dt=2022-04-21" / "another.html").touch()
    would = prune.prune_docs(tmp_path, DATASET, days_ago(60), dry_run=True)
    assert pages["oldest"].exists()
    removed = prune.prune_docs(tmp_path, DATASET, days_ago(60), dry_run=False)
    assert removed == would
    assert [(one.kind, one.name, one.files, one.bytes) for one in removed] == [("data docs", "oldest", 2, 4)]
    assert of_another.exists()  # its data set says when
    assert shown.stat().st_mtime == days_ago(61) / 1_000  # the report is as old as before
    assert [path.exists() for path in pages.values()] == [False, True, True]
    assert not list(tmp_path.rglob("oldest-events"))
    for write_again in (False, True):  # as it lies there, and written anew
        if write_again:
            report.write(dataset(DATASET), store, DT, "oldest", tmp_path, "")
        else:
            report.write_index(tmp_path)
        for page in (shown, report_page(tmp_path, DATASET, DT, "middle"), tmp_path / "index.html"):
            for name, address in Reader(page.read_text()).attributes:
                assert name != "href" or (page.parent / str(address)).exists(), (page, address)
        assert "no longer kept" in Reader(shown.read_text()).text
    assert prune.prune_docs(tmp_path, DATASET, days_ago(60), dry_run=False) == []


def test_old_reports_go_and_the_index_knows(store: TableStore, tmp_path: Path) -> None:
    for attempt in ("old", "new"):
        write_outcome(store, replace(gate("events", None), attempt=attempt))
        report.write(dataset(DATASET), store, DT, attempt, tmp_path, "")
    old = report_page(tmp_path, DATASET, DT, "old")
    for path in (old, old.with_suffix(".json")):
        age(path, 366)
    assert prune.prune_reports(tmp_path, "another_set", days_ago(365), dry_run=False) == []
    would = prune.prune_reports(tmp_path, DATASET, days_ago(365), dry_run=True)
    assert (old.exists(), [one.name for one in would]) == (True, ["old"])
    assert prune.prune_reports(tmp_path, DATASET, days_ago(365), dry_run=False) == would
    assert sorted(path.name for path in old.parent.iterdir()) == ["new.html", "new.json"]
    links = [address for name, address in Reader((tmp_path / "index.html").read_text()).attributes if name == "href"]
    assert [link for link in links if link and "partitions" in link] == [f"partitions/{DATASET}/dt={DT}/new.html"]
    report.write(dataset(DATASET), store, DT, "old", tmp_path, "")  # what the gates found is still there
    assert old.exists()


def test_messages_are_whole() -> None:
    message = "the missing_hour_count of the day " + "and so on " * 200 + "END"
    html = partition_page(
        partition(gate("events", "critical", outcome("critical", message=message, remedy=message))), [], "index.html"
    )
    assert html.count("END") == 2
    assert summary(partition(gate("events", "critical", outcome("critical", message=message))))["failed"][
        "critical"
    ] == [f"events: {message}"]


def test_values_of_another_attempt_are_marked(store: TableStore, tmp_path: Path) -> None:
    write_stats(store, "events", DT, "another-attempt", {"rows": 8888.0})
    write_stats(store, "raw", DT, ATTEMPT, {"files": 1.0})
    refuse(store, ["bad_time: 1"], "another-attempt")
    store.publish("another-attempt", "quarantine", DT)
    write_outcome(store, gate("raw", None))
    report.write(dataset(DATASET), store, DT, ATTEMPT, tmp_path, "")
    text = Reader(report_page(tmp_path, DATASET, DT, ATTEMPT).read_text()).text
    assert re.search(r"events \(of attempt another-attempt, not of this one\)\s*rows", text)
    assert re.search(r"refused \(of attempt another-attempt, not of this one\)", text)
    assert not re.search(r"raw \(of attempt", text)

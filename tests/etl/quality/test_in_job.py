"""Gates in a job's own process: the same verdict as the gate's, taken over only for the bytes that were judged.

.venv/bin/python -m pytest tests/etl/quality/test_in_job.py -q
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etl.jobs import events as events_job
from etl.jobs import sequences as sequences_job
from etl.quality.judge import audit as audit_module
from etl.stage.errors import StageError
from etl.warehouse.partitions import add_days
from tests.etl.quality.feed import DAYS, DT, Feed, log_name, one_spark_session, write_feed
from tests.etl.quality.test_faults import MS_PER_HOUR, changed, half_written_to_a_line_end, rotated

pytestmark = pytest.mark.spark

ATTEMPT = "in-job"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Feed]:
    folder = tmp_path_factory.mktemp("feed")
    with one_spark_session():
        feed = Feed(folder, write_feed(folder), folder / "reports")
        feed.build_events("base", add_days(DT, -1), DAYS - 1)
        feed.audit("base", add_days(DT, -1)).publish("events")
        yield feed


@pytest.fixture
def feed(clean: Feed, tmp_path: Path) -> Feed:
    return clean.copy(tmp_path)


def judged_again(*_: object) -> None:
    raise AssertionError("the gate judged again what the job has judged")


def run_job(feed: Feed, job, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    definition = (
        next(path for path in (feed.folder, feed.reports.parent) if (path / "feed.yaml").exists()) / "feed.yaml"
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "job",
            "--dataset",
            str(definition),
            "--warehouse",
            feed.store.warehouse,
            "--dt",
            DT,
            "--attempt",
            ATTEMPT,
            "--raw",
            str(feed.raw),
            "--reports",
            str(feed.reports),
            *more,
        ],
    )
    job.main()


def test_the_gate_publishes_what_the_job_has_judged_without_judging_again(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage, job in (("events", events_job), ("sequences", sequences_job)):
        run_job(feed, job, monkeypatch)
        assert feed.store.manifest(stage, DT) is None
        assert stage not in feed.outcomes(ATTEMPT)
        with monkeypatch.context() as patch:
            patch.setattr(audit_module, "validate", judged_again)
            feed.audit(ATTEMPT).publish(stage)
        assert feed.store.require(stage, DT).attempt == ATTEMPT
    assert {stage: outcome.max_severity for stage, outcome in feed.outcomes(ATTEMPT).items()} == {
        "raw": None,
        "events": None,
        "sequences": None,
    }
    assert all(
        Path(o.data_docs).exists()
        for outcome in feed.outcomes(ATTEMPT).values()
        for o in outcome.outcomes
        if o.data_docs
    )
    assert not list(Path(feed.store.root).rglob("judged.json"))


def test_what_tasks_measure_is_what_the_gate_measures(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    feed.build_events(ATTEMPT)
    feed.audit(ATTEMPT).publish("events")
    run_job(feed, sequences_job, monkeypatch)
    audit = feed.audit(ATTEMPT)
    ahead = audit._judged_ahead(audit._staged("sequences"))
    assert ahead is not None
    measured = {
        stage: audit_module.numbers(metrics)
        for stage, _, metrics in feed.audit(ATTEMPT).partition.measure("sequences").statistics
    }
    assert [stage for stage, _, _ in ahead[1]] == list(measured)
    for stage, _, metrics in ahead[1]:
        assert metrics == pytest.approx(measured[stage], nan_ok=True)


def test_a_fault_found_beside_the_job_is_stopped_by_its_gate(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    changed("time_ms", rotated(8))(feed)
    run_job(feed, events_job, monkeypatch)  # its work is done; whether it may be used is the gate's to say
    with pytest.raises(StageError, match="hour_shift"):
        feed.audit(ATTEMPT).publish("events")
    assert feed.store.manifest("events", DT) is None


def test_raw_files_that_do_not_pass_are_not_read(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    changed("time_ms", lambda time, _: time + 8 * MS_PER_HOUR)(feed)
    with pytest.raises(StageError, match=rf"stage raw[\s\S]*outside_named_days_share[\s\S]*{log_name(DT)}"):
        run_job(feed, events_job, monkeypatch)
    assert feed.store.staged_days(ATTEMPT, "events") == []


def test_bytes_that_changed_after_the_judgement_are_not_published(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(feed, events_job, monkeypatch)
    half_written_to_a_line_end(feed)
    feed.build_events("other")
    staged = feed.store.staged_manifest(ATTEMPT, "events", DT)
    other = feed.store.staged_manifest("other", "events", DT)
    assert staged is not None and other is not None
    for mine, theirs in zip(staged.files, other.files, strict=True):  # files of another build under the old manifest
        Path(f"{feed.store.root}/{mine.path}").write_bytes(Path(f"{feed.store.root}/{theirs.path}").read_bytes())
    with pytest.raises(StageError, match=rf"{staged.files[0].path}.*its manifest says"):
        feed.audit(ATTEMPT).publish("events")
    assert feed.store.manifest("events", DT) is None
    feed.build_events(ATTEMPT)  # what the remedy says: a new try, which nobody has judged yet
    audit = feed.audit(ATTEMPT)
    assert audit._judged_ahead(audit._staged("events")) is None

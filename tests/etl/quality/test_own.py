"""Bounds and expectations of a data set's own: they judge, say why, and reach every form of the gate; ordinary feeds
pass.

.venv/bin/python -m pytest tests/etl/quality/test_own.py -q
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from etl.datasets.definition import dataset
from etl.ingest.raw import RawLocation
from etl.jobs import events as events_job
from etl.quality.judge import pass_once
from etl.quality.judge.audit import Audit
from etl.quality.judge.outcomes import (
    Decision,
    Failing,
    Outcome,
    StageOutcome,
    read_decisions,
    read_outcomes,
    write_decision,
)
from etl.quality.measure import own_rules as own
from etl.quality.measure.partition import Partition
from etl.quality.report.write import write
from etl.stage.errors import StageError
from etl.warehouse.partitions import MS_PER_DAY, add_days, day_number
from etl.warehouse.store import TableStore
from evaluation.release import register
from tests.etl.quality.test_audit import (
    DT,
    USERS,
    all_zero_labels,
    events_table,
    items_table,
    set_column,
    stage_events,
    stage_sequences,
    user_rows,
)

REASON = "a feed of ours with few clicks"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def store(tmp_path: Path) -> TableStore:
    return TableStore(str(tmp_path / "warehouse"), "own")


def definition(folder: Path, **quality):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"extends": "kuairand_simulated", "name": "own", "quality": quality}))
    return dataset(str(path))


def audit(store: TableStore, folder: Path, attempt: str, reports: Path | None, **quality) -> Audit:
    return Audit(Partition(store, definition(folder, **quality), DT, attempt), reports)


def failed(outcome: StageOutcome, severity: str) -> dict[str, Outcome]:
    return {one.column: one for one in outcome.failed(severity)}


def with_label_rate(rate: float) -> pa.Table:
    table = events_table()
    feedback = np.zeros(table.num_rows, np.int64)
    feedback[:: round(1 / rate)] = 1
    return set_column(table, "feedback", feedback)


def one_time_a_day() -> pa.Table:
    table = events_table()
    return set_column(table, "event_time_ms", np.full(table.num_rows, day_number(DT) * MS_PER_DAY + 16 * 3_600_000))


def without_durations() -> pa.Table:
    table = events_table()
    return set_column(
        set_column(table, "duration_ms", np.zeros(table.num_rows)), "watch_time_ms", np.zeros(table.num_rows)
    )


# ---- ordinary feeds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table", [lambda: with_label_rate(0.01), without_durations], ids=["1 % clicks", "no durations"]
)
def test_an_ordinary_feed_passes_without_a_word(store: TableStore, tmp_path: Path, reports: Path, table) -> None:
    stage_events(store, "a", table=table())
    outcome = audit(store, tmp_path, "a", None).publish("events")
    assert outcome is not None
    assert not outcome.failed("critical")
    assert not outcome.failed("warning")


def test_hours_are_judged_only_where_times_have_them(store: TableStore, tmp_path: Path) -> None:
    stage_events(store, "a", table=one_time_a_day())
    outcome = audit(store, tmp_path, "a", None).judge(
        "events", audit(store, tmp_path, "a", None).partition.measure("events")
    )
    assert not {"hours_covered"} & set(failed(outcome, "warning"))
    table = events_table()
    stage_events(
        store, "b", table=table.filter(pa.array(table["event_time_ms"].to_numpy() % MS_PER_DAY < 6 * 3_600_000))
    )
    outcome = audit(store, tmp_path, "b", None).judge(
        "events", audit(store, tmp_path, "b", None).partition.measure("events")
    )
    assert "hours_covered" in failed(outcome, "warning")


@pytest.mark.parametrize(("share", "severity"), [(0.7, "warning"), (1.0, "critical")])
def test_near_empty_histories_are_told_and_empty_ones_stop(
    store: TableStore, tmp_path: Path, share: float, severity: str
) -> None:
    rows = user_rows()
    for user in range(round(share * USERS)):
        rows["target_history_end"][user] = [0, 0, 0]
    stage_sequences(store, "a", rows)
    judge = audit(
        store, tmp_path, "a", None, bounds={"sequences.min_judged_targets": {"value": 10, "reason": "a small test"}}
    )
    outcome = judge.judge("sequences", judge.partition.measure("sequences"))
    assert failed(outcome, severity)["eval_empty_history_share"].observed == {DT: pytest.approx(share)}


# ---- bounds ------------------------------------------------------------------------------------------------------


def test_a_bound_of_the_data_set_judges_and_says_why_everywhere(
    store: TableStore, tmp_path: Path, reports: Path
) -> None:
    stage_events(store, "loose", table=with_label_rate(0.2))
    bound = {"events.min_label_rate": {"value": 0.3, "reason": REASON + " <b>"}}
    outcome = audit(store, tmp_path, "loose", reports, bounds=bound).publish("events")
    assert outcome is not None
    one = failed(outcome, "warning")["label_rate"]
    assert "expected at least 0.3" in one.message
    assert REASON in one.message
    assert outcome.bounds == {"events.min_label_rate": {"value": 0.3, "default": 0.002, "reason": REASON + " <b>"}}
    assert REASON in Path(str(one.data_docs)).read_text()
    assert "<b>" not in Path(str(one.data_docs)).read_text().split(REASON)[1][:40]
    write(dataset(str(tmp_path / "own.yaml")), store, DT, "loose", reports, "")
    page = (reports / "partitions" / "own" / f"dt={DT}" / "loose.html").read_text()
    assert "Bounds of this data set" in page
    assert REASON + " &lt;b&gt;" in page


def test_what_the_job_has_judged_under_other_bounds_is_judged_again(store: TableStore, tmp_path: Path) -> None:
    stage_events(store, "ahead", table=with_label_rate(0.2))
    audit(store, tmp_path, "ahead", None).judge_ahead("events")
    outcome = audit(
        store, tmp_path, "ahead", None, bounds={"events.min_label_rate": {"value": 0.3, "reason": REASON}}
    ).publish("events")
    assert outcome is not None
    assert "label_rate" in failed(outcome, "warning")


# ---- conditions and expectations ---------------------------------------------------------------------------------

CONDITIONS = [
    {
        "name": "user_below_19",
        "table": "events",
        "sql": "user_id < 19 -- a comment",
        "tolerated_share": 0.01,
        "severity": "critical",
        "reason": "ids end there",
        "remedy": "ask",
    },
    {
        "name": "usually_watched",
        "table": "events",
        "sql": "watch_time_ms > 100",
        "tolerated_share": 0.5,
        "reason": "mostly",
    },
    {"name": "known_users", "table": "statistics.events", "sql": "users >= 1000", "reason": "we have many"},
]
EXPECTATIONS = [
    {
        "name": "contexts",
        "table": "events",
        "expectation": "ExpectColumnValuesToBeInSet",
        "arguments": {"column": "context", "value_set": [0, 1]},
        "reason": "two pages",
    },
    {
        "name": "mean_context",
        "table": "events",
        "expectation": "ExpectColumnMeanToBeBetween",
        "arguments": {"column": "context", "min_value": 0, "max_value": 3},
        "reason": "r",
    },
    {
        "name": "rows_enough",
        "table": "statistics.events",
        "expectation": "ExpectColumnMinToBeBetween",
        "arguments": {"column": "rows", "min_value": 5_000},
        "severity": "info",
        "reason": "r",
    },
]


@pytest.mark.parametrize("ahead", [False, True], ids=["gate", "in the job"])
def test_own_conditions_and_expectations_are_judged_by_day(
    store: TableStore, tmp_path: Path, reports: Path, ahead: bool
) -> None:
    yesterday = add_days(DT, -1)
    stage_events(store, "own")
    stage_events(store, "own", yesterday, events_table(yesterday).slice(0, 19 * 48))
    judge = audit(store, tmp_path, "own", reports, conditions=CONDITIONS, expectations=EXPECTATIONS)
    if ahead:
        judge.judge_ahead("events")
    with pytest.raises(
        StageError,
        match=(
            r"user_below_19 is 0\.05 \(2022-04-21\).*48 of 960 rows of events fail `user_id < 19 -- a comment`, such as"
            r" user_id 19"
        ),
    ):
        judge.publish("events")
    [outcome] = read_outcomes(store, DT, "own")
    critical, warning, info = (failed(outcome, severity) for severity in ("critical", "warning", "info"))
    assert set(critical) == {"user_below_19"}
    assert critical["user_below_19"].observed == {DT: 0.05}  # yesterday held
    assert {"known_users", "contexts"} <= set(warning)
    assert not {"usually_watched", "mean_context"} & set(warning)
    assert "contexts: ExpectColumnValuesToBeInSet" in warning["contexts"].message
    assert "rows_enough" in info
    assert all(Path(str(one.data_docs)).exists() for one in outcome.outcomes)
    assert store.manifest("events", DT) is None


def test_conditions_on_sequences_see_whole_lists_and_expectations_their_lengths(
    store: TableStore, tmp_path: Path
) -> None:
    stage_sequences(store, "lists")
    conditions = [{"name": "few", "table": "sequences", "sql": "len(history_item_index) > 9", "reason": "r"}]
    expectations = [
        {
            "name": "length",
            "table": "sequences",
            "expectation": "ExpectColumnValuesToBeBetween",
            "arguments": {"column": "history_item_index_length", "max_value": 3},
            "reason": "r",
        }
    ]
    judge = audit(store, tmp_path, "lists", None, conditions=conditions, expectations=expectations)
    outcome = judge.publish("sequences")
    assert outcome is not None
    assert failed(outcome, "warning")["few"].observed == {DT: 1.0}
    assert f"{USERS} of {USERS} rows" in failed(outcome, "warning")["length"].message


def test_a_large_table_is_seen_by_every_nth_row_and_counted_whole(
    store: TableStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "MOST_ROWS", 100)
    made = stage_events(store, "large")
    sample = own.sampled(store, dataset("kuairand_simulated"), made)
    assert (sample.rows, sample.step, len(sample.frame)) == (960, 10, 96)
    assert sample.frame["user_id"].tolist() == [
        row // 48 for row in range(0, 960, 10)
    ]  # over the borders of files and batches
    [condition] = definition(tmp_path, conditions=[{**CONDITIONS[0]}]).quality.conditions
    assert own.counted(store, dataset("kuairand_simulated"), made, [condition])["user_below_19"].failed == 48


def test_wrong_arguments_are_told_before_anything_is_read(store: TableStore, tmp_path: Path) -> None:
    wrong = {**EXPECTATIONS[0], "arguments": {"column": "context", "valueset": [1]}}
    with pytest.raises(
        StageError,
        match=(
            r"quality\.expectations \(contexts\): ExpectColumnValuesToBeInSet does not take these arguments.*value_?set"
        ),
    ):
        audit(store, tmp_path, "a", None, expectations=[wrong])


def test_a_condition_on_a_metric_that_is_not_there_is_named(store: TableStore, tmp_path: Path) -> None:
    stage_events(store, "a")
    judge = audit(store, tmp_path, "a", None, conditions=[{**CONDITIONS[2], "sql": "no_such_metric > 1"}])
    with pytest.raises(
        StageError,
        match=r"quality\.conditions \(known_users\) cannot be evaluated on statistics\.events.*no_such_metric",
    ):
        judge.publish("events")


# ---- once, by a person -------------------------------------------------------------------------------------------


def decide(store: TableStore, *more: str) -> None:
    pass_once.main(
        [
            "--dataset",
            "own",
            "--warehouse",
            store.warehouse,
            "--dt",
            DT,
            "--stage",
            "events",
            "--by",
            "Ada",
            "--reason",
            "the label was switched off for a day",
            *more,
        ]
    )


def test_a_stopped_partition_is_let_through_once_by_name(store: TableStore, tmp_path: Path, reports: Path) -> None:
    stage_events(store, "first", table=all_zero_labels())
    with pytest.raises(
        StageError,
        match=(
            rf"etl\.quality\.judge\.pass_once --dataset own --warehouse {store.warehouse} --dt {DT} --stage events"
            r" --attempt first"
        ),
    ):
        audit(store, tmp_path, "first", reports).publish("events")
    decide(store)
    # The next attempt fails elsewhere, too: that was not decided.
    stage_events(store, "worse", table=all_zero_labels(), lost_rows=5)
    with pytest.raises(StageError, match="unreconciled_count"):
        audit(store, tmp_path, "worse", reports).publish("events")
    stage_events(store, "second", table=all_zero_labels())
    outcome = audit(store, tmp_path, "second", reports).publish("events")
    assert outcome is not None and outcome.passed is not None
    assert (outcome.passed.by, outcome.passed.reason, outcome.max_severity) == (
        "Ada",
        "the label was switched off for a day",
        "critical",
    )
    assert store.require("events", DT).attempt == "second"
    found = write(dataset(str(tmp_path / "own.yaml")), store, DT, "second", reports, "")
    page = (reports / "partitions" / "own" / f"dt={DT}" / "second.html").read_text()
    assert found["verdict"] == "let through"
    assert found["passed"] == [
        {
            "stage": "events",
            "by": "Ada",
            "reason": "the label was switched off for a day",
            "expectations": ["label_rate"],
        }
    ]
    assert "the label was switched off for a day" in page and "Ada" in page
    # Once.
    stage_events(store, "third", table=all_zero_labels())
    with pytest.raises(StageError, match="label_rate"):
        audit(store, tmp_path, "third", reports).publish("events")
    assert store.require("events", DT).attempt == "second"


def test_a_decision_is_for_the_day_that_failed(store: TableStore, tmp_path: Path) -> None:
    stage_events(store, "first", table=all_zero_labels())
    with pytest.raises(StageError):
        audit(store, tmp_path, "first", None).publish("events")
    decide(store)
    yesterday = add_days(DT, -1)
    stage_events(store, "second", table=all_zero_labels())
    stage_events(store, "second", yesterday, set_column(events_table(yesterday), "feedback", np.zeros(USERS * 48)))
    with pytest.raises(StageError, match="label_rate"):
        audit(store, tmp_path, "second", None).publish("events")
    assert store.manifest("events", yesterday) is None


def test_the_same_attempt_goes_on_when_its_gate_is_run_again(store: TableStore, tmp_path: Path) -> None:
    stage_events(store, "one", table=all_zero_labels())
    judge = audit(store, tmp_path, "one", None)
    judge.judge_ahead("events")
    with pytest.raises(StageError):
        judge.publish("events")
    decide(store, "--expectation", "label_rate")
    outcome = audit(store, tmp_path, "one", None).publish("events")
    assert outcome is not None and outcome.passed is not None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--expectation", "users"], "users had not failed there"),
        (["--attempt", "other"], "has stopped no attempt other"),
        (["--reason", "."], "needs who takes it and why"),
        (["--by", " "], "needs who takes it and why"),
        (["--stage", "raw"], "gate raw has stopped nothing"),
    ],
)
def test_a_decision_that_means_nothing_is_refused(
    store: TableStore, tmp_path: Path, more: list[str], says: str
) -> None:
    stage_events(store, "first", table=all_zero_labels())
    with pytest.raises(StageError):
        audit(store, tmp_path, "first", None).publish("events")
    with pytest.raises(StageError, match=says):
        decide(store, *more)
    assert read_decisions(store, DT, "events") == []


def test_a_decision_is_for_every_day_that_failed_however_many(store: TableStore, tmp_path: Path) -> None:
    """An outcome shows twenty of the days; the decision holds all of them, and no other."""
    days = [add_days(DT, -back) for back in range(24, -1, -1)]

    def staged(attempt: str, bad: set[str]) -> Audit:
        for day in days:
            table = events_table(day)
            stage_events(
                store, attempt, day, set_column(table, "feedback", np.zeros(table.num_rows)) if day in bad else table
            )
        return audit(store, tmp_path, attempt, None)

    decided = set(days[:23])
    with pytest.raises(StageError):
        staged("first", decided).publish("events")
    decide(store, "--expectation", "label_rate")
    [decision] = read_decisions(store, DT, "events")
    assert set(decision.failing[0].rows) == decided
    with pytest.raises(StageError, match="label_rate"):
        staged("others", {*days[:20], *days[-3:]}).publish("events")
    outcome = staged("same", decided).publish("events")
    assert outcome is not None and outcome.passed is not None


def lost_rows(store: TableStore) -> None:
    stage_events(store, "first", lost_rows=5)


def fewer_rows(store: TableStore) -> None:
    stage_events(store, "before")
    store.publish("before", "events", DT)
    stage_events(store, "first", table=events_table().slice(0, 900))


def a_user_twice(store: TableStore) -> None:
    rows = user_rows()
    rows["user_id"][1] = rows["user_id"][0]
    stage_sequences(store, "first", rows)


def an_item_twice(store: TableStore) -> None:
    items = items_table()
    stage_sequences(
        store,
        "first",
        items=set_column(items, "item_id", [*items["item_id"].to_pylist()[:-1], items["item_id"][-2].as_py()]),
    )


def no_user_column(store: TableStore) -> None:
    raw = Path(store.warehouse, "raw")
    raw.mkdir(parents=True)
    (raw / "SIMULATED.json").write_text('{"simulated": true}')
    (raw / "log_standard_4_21_to_4_21_sim.csv").write_text("video_id,time_ms\n1,1650500000000\n")


@pytest.mark.parametrize(
    ("stage", "breaks", "metric"),
    [
        ("events", lost_rows, "unreconciled_count"),
        ("events", fewer_rows, "rows_lost_count"),
        ("sequences", a_user_twice, "repeated_user_count"),
        ("sequences", an_item_twice, "item_id_not_increasing_count"),
        ("raw", no_user_column, "missing_column_count"),
    ],
)
def test_what_breaks_the_contract_of_the_tables_nobody_lets_through(
    store: TableStore, tmp_path: Path, stage: str, breaks, metric: str
) -> None:
    breaks(store)
    gate = audit(store, tmp_path, "first", None)
    gate.partition.raw = RawLocation(f"{store.warehouse}/raw") if stage == "raw" else None
    with pytest.raises(StageError, match=metric) as stopped:
        gate.publish(stage)
    assert "pass_once" not in str(stopped.value), "it offers what it would refuse"
    for more in ([], ["--expectation", metric]):
        with pytest.raises(StageError, match=rf"(?s){metric}.* cannot be let through.*remedy: ."):
            pass_once.main(
                [
                    "--dataset",
                    "own",
                    "--warehouse",
                    store.warehouse,
                    "--dt",
                    DT,
                    "--stage",
                    stage,
                    "--by",
                    "Ada",
                    "--reason",
                    "they said it is fine",
                    *more,
                ]
            )
    assert read_decisions(store, DT, stage) == []
    # Nor does a decision that was made before such were refused.
    [outcome] = [one for one in read_outcomes(store, DT, "first") if one.stage == stage]
    write_decision(
        store, Decision(DT, stage, "first", "Ada", 1, "old", tuple(map(Failing.of, outcome.failed("critical"))))
    )
    with pytest.raises(StageError, match=metric):
        gate.publish(stage)


def test_the_model_version_says_who_let_what_through(store: TableStore, tmp_path: Path) -> None:
    stage_events(store, "one", table=all_zero_labels())
    assert register._passes(store, DT, "one") == {}
    with pytest.raises(StageError):
        audit(store, tmp_path, "one", None).publish("events")
    decide(store)
    audit(store, tmp_path, "one", None).publish("events")
    assert register._passes(store, DT, "one") == {
        "quality.passed_by": "Ada",
        "quality.passed_reason": "events: the label was switched off for a day",
        "quality.passed_expectations": "events: label_rate",
    }


def test_the_share_of_refused_rows_is_a_bound_of_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make run` and the DAG have no option for it."""
    taken = []

    def build_events(*arguments: object) -> dict[str, int]:
        taken.append(arguments[3].max_bad_share)
        return dict.fromkeys(
            ("rows_read", "events", "duplicates", "quarantined", "outside_days", "built_ahead", "already_published"), 0
        )

    monkeypatch.setattr(events_job, "build_events", build_events)
    definition(tmp_path, bounds={"raw.max_refused_share": {"value": 0.05, "reason": "the app of 2019"}})
    for given in ("kuairand_simulated", str(tmp_path / "own.yaml")):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "events",
                "--dataset",
                given,
                "--warehouse",
                str(tmp_path),
                "--dt",
                DT,
                "--attempt",
                "a",
                "--raw",
                str(tmp_path),
            ],
        )
        events_job.main()
    assert taken == [0.01, 0.05]

"""The gates, end to end through the real `main`: clean data is published, planted faults are stopped.

.venv/bin/python -m pytest tests/etl/quality -q
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.datasets.definition import dataset
from etl.quality.judge import audit
from etl.quality.judge.outcomes import StageOutcome, read_outcomes
from etl.quality.measure.partition import Partition
from etl.quality.measure.statistics import read_stats
from etl.stage.errors import EXIT_CORRECT, StageError
from etl.warehouse.partitions import MS_PER_DAY, add_days, day_number
from etl.warehouse.schemas import (
    EVALUATION,
    EVENTS,
    ITEMS,
    SEQUENCES,
    TABLES,
    TRAIN,
    VALIDATION,
    item_field_type,
    schema_fingerprint,
)
from etl.warehouse.store import Manifest, TableStore

DATASET = "kuairand_simulated"
DT = "2022-04-21"
USERS, EVENTS_PER_USER, ITEM_COUNT = 20, 48, 30
KUAIRAND_ITEMS = pa.schema(
    [*ITEMS, *[pa.field(name, item_field_type(rule.kind)) for name, rule in dataset(DATASET).item_fields.items()]]
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of reports for all tests: validations must accumulate in it."""
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def store(tmp_path: Path) -> TableStore:
    return TableStore(str(tmp_path / "warehouse"), DATASET)


def run(store: TableStore, stage: str, attempt: str, reports: Path, definition: str = DATASET) -> None:
    audit.main(
        [
            "--dataset",
            definition,
            "--warehouse",
            store.warehouse,
            "--dt",
            DT,
            "--attempt",
            attempt,
            "--stage",
            stage,
            "--reports",
            str(reports),
        ]
    )


def result(store: TableStore, attempt: str, stage: str) -> StageOutcome:
    [outcome] = [outcome for outcome in read_outcomes(store, DT, attempt) if outcome.stage == stage]
    return outcome


def failures(store: TableStore, attempt: str, stage: str, severity: str) -> set[str]:
    return {outcome.column for outcome in result(store, attempt, stage).failed(severity)}


def statistics(store: TableStore, stage: str, dt: str = DT) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in read_stats(store, stage, dt, 1).to_pylist()}


def stage_table(
    store: TableStore, attempt: str, table: str, dt: str, parts: list[pa.Table], **manifest: dict
) -> Manifest:
    work = store.begin_try(attempt, [table], [dt])
    files = tuple(store.write_file(work, table, dt, bucket, part) for bucket, part in enumerate(parts))
    made = Manifest(
        store.dataset,
        table,
        dt,
        attempt,
        schema_fingerprint(parts[0].schema if parts else TABLES[table]),
        "test",
        files,
        **manifest,
    )
    store.write_staged_manifest(work, made)
    return made


def test_a_gate_judges_no_day_that_its_attempt_does_not_build(store: TableStore) -> None:
    """The attempt has staged the day before, too, for its own partition."""
    store.begin_try("a", ["events"], [add_days(DT, -1), DT], DT)
    definition = dataset(DATASET)
    assert audit.Audit(Partition(store, definition, DT, "a")).attempt == "a"
    with pytest.raises(StageError, match=rf"attempt a builds dt={DT} .*, not dt={add_days(DT, -1)}") as caught:
        audit.Audit(Partition(store, definition, add_days(DT, -1), "a"))
    assert caught.value.exit_code == EXIT_CORRECT


# ---- events ------------------------------------------------------------------------------------------------------


def events_table(dt: str = DT, seed: int = 0) -> pa.Table:
    """Return a clean day: every user meets an item every half an hour."""
    rng = np.random.default_rng([seed, day_number(dt)])
    rows = USERS * EVENTS_PER_USER
    user = np.repeat(np.arange(USERS), EVENTS_PER_USER)
    time_ms = (
        day_number(dt) * MS_PER_DAY
        + np.tile(np.arange(EVENTS_PER_USER) * 1_800_000, USERS)
        + rng.integers(0, 60_000, rows)
    )
    return pa.table(
        {
            "user_id": user,
            "item_id": rng.integers(0, ITEM_COUNT, rows),
            "event_time_ms": time_ms,
            "feedback": rng.integers(0, 4, rows),
            "watch_time_ms": rng.integers(0, 9_000, rows),
            "duration_ms": rng.integers(0, 9_000, rows),
            "context": rng.integers(0, 3, rows),
            "is_random": rng.random(rows) < 0.1,
        }
    ).cast(EVENTS)


def stage_events(
    store: TableStore, attempt: str, dt: str = DT, table: pa.Table | None = None, lost_rows: int = 0
) -> Manifest:
    table = events_table(dt) if table is None else table
    counts = {"rows_read": table.num_rows + 3 + lost_rows, "events": table.num_rows, "duplicates": 2, "quarantined": 1}
    refused = pa.table({"source_file": ["log.csv"], "row_number": [7], "reason": ["bad_time: x"], "raw_text": ["a,b"]})
    stage_table(store, attempt, "quarantine", dt, [refused])
    half = table.num_rows // 2
    return stage_table(store, attempt, "events", dt, [table.slice(0, half), table.slice(half)], counts=counts)


def set_column(table: pa.Table, name: str, values: np.ndarray | list) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.names.index(name), field, pa.array(values, field.type))


def test_clean_events_are_published_and_documented(
    store: TableStore, reports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = "clean-events"
    days = [add_days(DT, -back) for back in (2, 1, 0)]
    staged = {day: stage_events(store, attempt, day) for day in days}
    run(store, "events", attempt, reports)

    for day in days:
        assert store.require("events", day).data_digest == staged[day].data_digest
        assert store.require("quarantine", day).rows == 1
    out = capsys.readouterr().out
    assert out.index(f"published events dt={days[0]}") < out.index(
        f"published events dt={DT}"
    )  # the partition's own day is last
    found = result(store, attempt, "events")
    assert found.max_severity is None
    assert found.simulated is True
    assert [statistics(store, "events", day)["rows"] for day in days] == [USERS * EVENTS_PER_USER] * 3
    for page in {outcome.data_docs for outcome in found.outcomes}:
        assert f"{attempt}-events" in page
        assert "</html>" in Path(page).read_text()
    assert (
        'href="../index.html"' in (reports / "data_docs" / "index.html").read_text()
    )  # the pages' home: all partitions

    run(store, "events", attempt, reports)  # a retry after success
    assert "nothing to do" in capsys.readouterr().out


def test_publication_cut_short_is_finished_by_a_retry(
    store: TableStore, reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = "cut-short"
    staged = stage_events(store, attempt)
    first = staged.files[0]
    moved = f"events/dt={DT}/bucket=000/{first.digest[:20]}.parquet"
    store.fs.create_dir(f"{store.root}/events/dt={DT}/bucket=000", recursive=True)
    store.fs.move(f"{store.root}/{first.path}", f"{store.root}/{moved}")
    store.publish(attempt, "quarantine", DT)
    run(store, "events", attempt, reports)
    assert store.require("events", DT).data_digest == staged.data_digest


def all_zero_labels() -> pa.Table:
    table = events_table()
    return set_column(table, "feedback", np.zeros(table.num_rows))


def event_of_another_day() -> pa.Table:
    table = events_table()
    times = table["event_time_ms"].to_numpy().copy()
    times[5] += MS_PER_DAY
    return set_column(table, "event_time_ms", times)


def hour_twice() -> pa.Table:
    table = events_table()
    hour = table.filter(pa.array(table["event_time_ms"].to_numpy() % MS_PER_DAY < 3_600_000))
    return pa.concat_tables([table, hour])


def unknown_feedback_bit() -> pa.Table:
    table = events_table()
    feedback = table["feedback"].to_numpy().copy()
    feedback[3] = 1 << 12
    return set_column(table, "feedback", feedback)


@pytest.mark.parametrize(
    ("fault", "table", "lost_rows", "column"),
    [
        ("all-zero-labels", all_zero_labels, 0, "label_rate"),
        ("another-day", event_of_another_day, 0, "outside_day_count"),
        ("rows-lost", events_table, 9, "unreconciled_count"),
        ("empty-day", EVENTS.empty_table, 0, "lost_day_count"),
        ("hour-twice", hour_twice, 0, "worst_hour_repeated_key_share"),
        ("unknown-bit", unknown_feedback_bit, 0, "feedback_out_of_range_count"),
    ],
)
def test_faulty_events_are_stopped(
    store: TableStore, reports: Path, fault: str, table, lost_rows: int, column: str
) -> None:
    stage_events(store, "before", table=events_table(seed=1))
    store.publish("before", "events", DT)
    digest = store.require("events", DT).data_digest

    attempt = f"fault-{fault}"
    stage_events(store, attempt, table=table(), lost_rows=lost_rows)
    with pytest.raises(StageError) as error:
        run(store, "events", attempt, reports)
    assert column in failures(store, attempt, "events", "critical")
    for part in ("stage events", "expect_column_values_to_be_between", column, "expected", "data_docs", "remedy"):
        assert part in str(error.value)
    assert column in str(error.value).splitlines()[0]
    assert store.require("events", DT).data_digest == digest
    assert store.manifest("quarantine", DT) is None
    assert result(store, attempt, "events").max_severity == "critical"


def test_a_day_with_fewer_rows_than_are_published_is_stopped_unless_somebody_accepts_it(
    store: TableStore, reports: Path
) -> None:
    before = events_table()
    stage_events(store, "before", table=before)
    store.publish("before", "events", DT)
    stage_events(store, "fewer", table=before.slice(1))
    with pytest.raises(StageError, match=r"rows_lost_count[\s\S]*--accept-loss DAY"):
        run(store, "events", "fewer", reports)
    assert failures(store, "fewer", "events", "critical") == {"rows_lost_count"}
    assert store.require("events", DT).rows == before.num_rows
    stage_events(store, "accepted", table=before.slice(1))
    staged = store.staged("accepted", "events", DT)
    assert staged is not None
    store.write_staged_manifest(staged.work, replace(staged.manifest, settings={"accepted_loss": "yes"}))
    run(store, "events", "accepted", reports)
    assert store.require("events", DT).rows == before.num_rows - 1


def test_fault_on_a_lookback_day_stops_every_day(store: TableStore, reports: Path) -> None:
    stage_events(
        store, "lookback", add_days(DT, -1), table=set_column(events_table(add_days(DT, -1)), "feedback", np.zeros(960))
    )
    stage_events(store, "lookback")
    with pytest.raises(StageError, match=r"label_rate.*2022-04-20"):
        run(store, "events", "lookback", reports)
    assert store.manifest("events", DT) is None


def test_lookback_days_before_the_data_begin_are_published_empty(store: TableStore, reports: Path) -> None:
    nothing = dict.fromkeys(("rows_read", "events", "duplicates", "quarantined"), 0)
    for table in ("quarantine", "events"):
        stage_table(store, "begin", table, add_days(DT, -1), [], counts=nothing)
    stage_events(store, "begin")
    run(store, "events", "begin", reports)
    assert store.require("events", add_days(DT, -1)).rows == 0
    assert result(store, "begin", "events").max_severity == "info"
    assert failures(store, "begin", "events", "info") == {"rows"}

    for table in ("quarantine", "events"):  # an empty day after days with events is a gap
        stage_table(store, "gap", table, add_days(DT, 1), [], counts=nothing)
    stage_events(store, "gap")
    run(store, "events", "gap", reports)
    assert failures(store, "gap", "events", "warning") == {"gap_count"}


def test_dropped_column_is_named(store: TableStore, reports: Path) -> None:
    staged = stage_events(store, "dropped")
    path = f"{store.root}/{staged.files[1].path}"
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["context"]), path)
    with pytest.raises(StageError, match=r"bucket=001.*no column context"):
        run(store, "events", "dropped", reports)
    assert store.manifest("events", DT) is None


def test_warning_is_published_although_success_is_false(
    store: TableStore, reports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = events_table()
    user = table["user_id"].to_numpy()
    staged = stage_events(store, "warned", table=set_column(table, "user_id", np.where(user < 11, 0, user)))
    run(store, "events", "warned", reports)
    assert result(store, "warned", "events").max_severity == "warning"  # Great Expectations' own `success` is False
    assert failures(store, "warned", "events", "warning") == {"largest_user_share"}
    assert store.require("events", DT).data_digest == staged.data_digest
    assert "warning: stage events" in capsys.readouterr().out


def test_day_of_unusual_size_is_a_warning(store: TableStore, reports: Path) -> None:
    for back in (1, 2, 3):
        stage_events(store, "before", add_days(DT, -back))
        store.publish("before", "events", add_days(DT, -back))
    stage_events(store, "small", table=events_table().slice(0, 96))
    run(store, "events", "small", reports)
    assert "rows_to_trailing_median" in failures(store, "small", "events", "warning")


def test_nothing_staged_says_what_to_run(store: TableStore, reports: Path) -> None:
    for stage in ("events", "sequences"):
        with pytest.raises(StageError, match=f"python -m etl.jobs.{stage}"):
            run(store, stage, "nothing", reports)


# ---- sequences and training input ----------------------------------------------------------------------------------

TARGET_DAYS, LOOKBACK_DAYS = 2, 4
SETTINGS = {
    "target_days": TARGET_DAYS,
    "lookback_days": LOOKBACK_DAYS,
    "evaluation_days": 1,
    "cutoff": "event",
    "availability_lag_ms": 0,
    "max_events": 100,
}


def user_rows() -> dict[str, list]:
    """Return clean users: a history of three days, one training and two evaluation targets each."""
    day_ms = day_number(DT) * MS_PER_DAY
    rows: dict[str, list] = {name: [] for name in SEQUENCES.names}
    for user in range(USERS):
        history = [day_ms - 3 * MS_PER_DAY + user, day_ms - 2 * MS_PER_DAY, day_ms - MS_PER_DAY + 5, day_ms + 10]
        targets = [day_ms - MS_PER_DAY + 5, day_ms + 10, day_ms + 20]
        rows["user_id"].append(user)
        rows["user_fields"].append(["a"] * 8)
        rows["history_item_index"].append([user, 1, 2, 3])
        rows["history_time_ms"].append(history)
        rows["history_feedback"].append([1, 0, 3, 0])
        rows["history_watch_bucket"].append([0, 1, 2, 9])
        rows["target_item_index"].append([2, 3, user])
        rows["target_time_ms"].append(targets)
        rows["target_label"].append([user % 2, (user // 2) % 2, 1 - user % 2])
        rows["target_context"].append([0, 1, -1])
        rows["target_is_random"].append([False] * 3)
        rows["target_split"].append([TRAIN, EVALUATION, EVALUATION])
        rows["target_history_end"].append([2, 3, 4])
    return rows


def items_table() -> pa.Table:
    return pa.table(
        {
            "item_index": np.arange(ITEM_COUNT),
            "item_id": np.arange(ITEM_COUNT) * 7,
            "train_occurrences": np.arange(ITEM_COUNT),
            "author_id": [None] * ITEM_COUNT,
            "categories": [["1", "2"]] * ITEM_COUNT,
            "duration_ms": [1.0] * ITEM_COUNT,
            "item_type": ["NORMAL"] * ITEM_COUNT,
            "upload_type": [None] * ITEM_COUNT,
        },
        schema=KUAIRAND_ITEMS,
    )


def stage_sequences(
    store: TableStore,
    attempt: str,
    rows: dict[str, list] | None = None,
    items: pa.Table | None = None,
    settings: dict[str, int] = SETTINGS,
    without_fields: int = 0,
) -> Manifest:
    table = pa.table(rows or user_rows(), schema=SEQUENCES)
    split = table["target_split"].combine_chunks().flatten().to_pylist()
    days = [add_days(DT, -back) for back in range(LOOKBACK_DAYS)]
    inputs = {f"events/dt={day}": m.data_digest for day in days if (m := store.manifest("events", day)) is not None}
    counts = {
        "users": USERS,
        "targets": 3 * USERS,
        "train_targets": split.count(TRAIN),
        "validation_targets": split.count(VALIDATION),
        "eval_targets": split.count(EVALUATION),
        "history_events": 4 * USERS,
        "truncated_users": 0,
    }
    stage_table(
        store,
        attempt,
        "items",
        DT,
        [items_table() if items is None else items],
        counts={"without_fields": without_fields},
    )
    return stage_table(
        store,
        attempt,
        "sequences",
        DT,
        [table.slice(0, 7), table.slice(7)],
        counts=counts,
        inputs=inputs,
        settings=settings,
    )


def publish_events(store: TableStore, seed: int = 0) -> None:
    for back in range(LOOKBACK_DAYS):
        day = add_days(DT, -back)
        stage_events(store, f"events{seed}", day, events_table(day, seed))
        store.publish(f"events{seed}", "events", day)


def test_clean_sequences_are_published_then_fit_for_training(store: TableStore, reports: Path) -> None:
    publish_events(store)
    staged = stage_sequences(store, "clean")
    run(store, "sequences", "clean", reports)
    assert store.require("sequences", DT).data_digest == staged.data_digest
    assert store.require("items", DT).attempt == "clean"
    assert result(store, "clean", "sequences").max_severity is None
    row = statistics(store, "sequences")
    assert (row["train_label_rate"], row["eval_targets"], row["history_length_p50"]) == (0.5, 2 * USERS, 4)
    run(store, "sequences", "clean", reports)  # a retry after success

    run(store, "training_input", "clean", reports)
    found = result(store, "clean", "training_input")
    assert found.max_severity is None
    assert {len(outcome.observed) for outcome in found.outcomes if outcome.suite == "training_window"} == {
        LOOKBACK_DAYS
    }
    assert statistics(store, "training_input")["unseen_eval_item_share"] == 1 / (2 * USERS)  # item 0 never occurred

    publish_events(store, seed=5)  # the events are published anew: what was built from the old ones is stale
    with pytest.raises(StageError, match=r"stale_count.*2022-04-18"):
        run(store, "training_input", "clean", reports)


def test_incomplete_window_stops_training(store: TableStore, reports: Path) -> None:
    stage_sequences(store, "window")
    run(store, "sequences", "window", reports)
    with pytest.raises(StageError, match=r"training must not start[\s\S]*missing_count"):
        run(store, "training_input", "window", reports)


def test_items_of_another_attempt_stop_training(store: TableStore, reports: Path) -> None:
    publish_events(store)
    stage_sequences(store, "first")
    run(store, "sequences", "first", reports)
    stage_sequences(store, "second")
    store.publish("second", "items", DT)
    with pytest.raises(StageError, match="mixed_attempts_count"):
        run(store, "training_input", "first", reports)


def leak(rows: dict[str, list]) -> None:
    rows["target_history_end"][4][1] = 4  # the target at day_ms + 10 sees the event of the same time, its own page


def unsorted_history(rows: dict[str, list]) -> None:
    rows["history_time_ms"][9][:2] = rows["history_time_ms"][9][1::-1]


def index_out_of_range(rows: dict[str, list]) -> None:
    rows["history_item_index"][0][0] = ITEM_COUNT


def end_out_of_range(rows: dict[str, list]) -> None:
    rows["target_history_end"][2][2] = 5


def unequal_lengths(rows: dict[str, list]) -> None:
    rows["history_feedback"][3].pop()


def no_eval_targets(rows: dict[str, list]) -> None:
    rows["target_time_ms"] = [[times[0], times[0] + 1, times[0] + 2] for times in rows["target_time_ms"]]
    rows["target_history_end"] = [[2, 3, 3]] * USERS
    rows["target_split"] = [[TRAIN] * 3] * USERS


def evaluation_target_in_training(rows: dict[str, list]) -> None:
    rows["target_split"][6][2] = TRAIN


def training_target_in_evaluation(rows: dict[str, list]) -> None:
    rows["target_split"][6][0] = EVALUATION


def unknown_split(rows: dict[str, list]) -> None:
    rows["target_split"][6][0] = 3


def target_before_the_window(rows: dict[str, list]) -> None:
    rows["target_time_ms"][6][0] -= 2 * MS_PER_DAY
    rows["target_history_end"][6][0] = 0


@pytest.mark.parametrize(
    ("fault", "column"),
    [
        (leak, "leak_count"),
        (unsorted_history, "history_disorder_count"),
        (index_out_of_range, "item_index_out_of_range_count"),
        (end_out_of_range, "history_end_out_of_range_count"),
        (unequal_lengths, "unequal_length_count"),
        (no_eval_targets, "eval_targets"),
        (evaluation_target_in_training, "split_wrong_count"),
        (training_target_in_evaluation, "split_wrong_count"),
        (unknown_split, "split_wrong_count"),
        (target_before_the_window, "target_outside_window_count"),
    ],
)
def test_faulty_sequences_are_stopped(store: TableStore, reports: Path, fault, column: str) -> None:
    stage_sequences(store, "before")
    store.publish("before", "items", DT)
    digest = store.publish("before", "sequences", DT).data_digest

    attempt = f"fault-{fault.__name__}"
    rows = user_rows()
    fault(rows)
    stage_sequences(store, attempt, rows)
    with pytest.raises(StageError, match=column):
        run(store, "sequences", attempt, reports)
    assert column in failures(store, attempt, "sequences", "critical")
    assert store.require("sequences", DT).data_digest == digest
    assert store.require("items", DT).attempt == "before"


def test_the_split_is_that_of_the_partitions_own_evaluation_days(store: TableStore, reports: Path) -> None:
    rows = user_rows()
    stage_sequences(store, "two-days", rows, settings={**SETTINGS, "target_days": 3, "evaluation_days": 2})
    with pytest.raises(StageError, match="split_wrong_count"):
        run(store, "sequences", "two-days", reports)
    assert store.manifest("sequences", DT) is None


def test_a_manifest_without_its_window_is_told(store: TableStore, reports: Path) -> None:
    stage_sequences(store, "windowless", settings={"target_days": 2, "lookback_days": 4})
    with pytest.raises(StageError, match="lacks the setting 'evaluation_days'"):
        run(store, "sequences", "windowless", reports)


def test_targets_by_position_are_not_judged_by_their_day(tmp_path: Path, reports: Path) -> None:
    definition = own_definition(tmp_path, "targets: {positions: {train: [-3], validation: [-2], evaluation: [-1]}}")
    store = TableStore(str(tmp_path / "warehouse"), "own")
    rows = user_rows()
    rows["target_split"] = [[TRAIN, VALIDATION, EVALUATION]] * USERS
    for times, ends in zip(rows["target_time_ms"], rows["target_history_end"], strict=True):
        times[0] -= MS_PER_DAY  # in the lookback, but before the target days
        ends[0] = 1
    staged = stage_sequences(store, "positions", rows)
    run(store, "sequences", "positions", reports, definition)
    assert store.require("sequences", DT).data_digest == staged.data_digest
    row = statistics(store, "sequences")
    assert (row["train_targets"], row["validation_targets"], row["eval_targets"]) == (USERS, USERS, USERS)

    rows["target_time_ms"][0][0] -= 3 * MS_PER_DAY
    rows["target_history_end"][0][0] = 0
    stage_sequences(store, "too-old", rows)
    with pytest.raises(StageError, match="target_outside_window_count"):
        run(store, "sequences", "too-old", reports, definition)


# ---- the data set's own fields -------------------------------------------------------------------------------------


def own_definition(folder: Path, *lines: str) -> str:
    path = folder / "own.yaml"
    path.write_text("\n".join(["extends: kuairand_simulated", "name: own", *lines]))
    return str(path)


def test_fields_of_the_data_set_belong_to_the_contract_of_events(tmp_path: Path, reports: Path) -> None:
    definition = own_definition(
        tmp_path, "events: {item_fields: {seller: {column: video_id, kind: id}, brand: {column: tab}}}"
    )
    store = TableStore(str(tmp_path / "warehouse"), "own")
    table = events_table()
    whole = table.append_column("seller", table["item_id"]).append_column(
        "brand", pa.array(["a", None] * (table.num_rows // 2))
    )
    staged = stage_events(store, "whole", table=whole)
    run(store, "events", "whole", reports, definition)
    assert store.require("events", DT).data_digest == staged.data_digest
    assert result(store, "whole", "events").max_severity is None

    stage_events(store, "lacking", table=whole.drop_columns(["brand"]))
    with pytest.raises(StageError, match=r"no column brand \(string\)"):
        run(store, "events", "lacking", reports, definition)
    stage_events(
        store,
        "other-type",
        table=set_column(whole, "brand", ["a"] * table.num_rows)
        .drop_columns(["seller"])
        .append_column("seller", pa.array(["a"] * table.num_rows)),
    )
    with pytest.raises(StageError, match="column seller is string, not int64"):
        run(store, "events", "other-type", reports, definition)
    stage_events(store, "extra", table=whole.append_column("colour", whole["brand"]))
    with pytest.raises(StageError, match="does not know: colour"):
        run(store, "events", "extra", reports, definition)


def test_fields_of_the_data_set_belong_to_the_contract_of_items(store: TableStore, reports: Path) -> None:
    stage_sequences(store, "lacking-item-field", items=items_table().drop_columns(["author_id"]))
    with pytest.raises(StageError, match=r"table items.*no column author_id \(int64\)"):
        run(store, "sequences", "lacking-item-field", reports)
    assert store.manifest("items", DT) is None


def test_item_files_that_describe_few_items_are_ordinary_and_such_that_describe_none_are_not(
    store: TableStore, reports: Path
) -> None:
    stage_sequences(store, "few", without_fields=ITEM_COUNT - 1)
    run(store, "sequences", "few", reports)
    assert failures(store, "few", "sequences", "warning") == {"without_fields_share"}
    stage_sequences(store, "none", without_fields=ITEM_COUNT)
    with pytest.raises(StageError, match=r"without_fields_share is 1 .*item files"):
        run(store, "sequences", "none", reports)
    assert store.require("items", DT).attempt == "few"


def test_repeats_that_the_data_set_keeps_are_no_fault(tmp_path: Path, reports: Path) -> None:
    definition = own_definition(tmp_path, "logs: {repeats: keep}")
    store = TableStore(str(tmp_path / "warehouse"), "own")
    staged = stage_events(store, "repeating", table=hour_twice())
    run(store, "events", "repeating", reports, definition)
    assert store.require("events", DT).data_digest == staged.data_digest
    assert result(store, "repeating", "events").max_severity is None


def test_sampled_negatives_have_no_label_rate_to_judge(tmp_path: Path, reports: Path) -> None:
    definition = own_definition(tmp_path, "targets: {label: null, negatives: {per_positive: 1}}")
    store = TableStore(str(tmp_path / "warehouse"), "own")
    stage_events(store, "unlabelled", table=all_zero_labels())
    run(store, "events", "unlabelled", reports, definition)
    assert result(store, "unlabelled", "events").max_severity is None


def test_items_out_of_order_are_stopped(store: TableStore, reports: Path) -> None:
    stage_sequences(store, "disorder", items=set_column(items_table(), "item_id", np.arange(ITEM_COUNT)[::-1].copy()))
    with pytest.raises(StageError, match="item_id_not_increasing_count"):
        run(store, "sequences", "disorder", reports)


def test_importing_the_audit_stays_light() -> None:
    code = (
        "import sys, etl.quality.judge.audit; sys.exit(any(m in sys.modules for m in ('great_expectations', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_error_reaches_the_command_line(store: TableStore, reports: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "etl.quality.judge.audit",
            "--dataset",
            DATASET,
            "--warehouse",
            store.warehouse,
            "--dt",
            DT,
            "--attempt",
            "none",
            "--stage",
            "events",
            "--reports",
            str(reports),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "remedy: run `python -m etl.jobs.events`" in done.stderr

"""The gates, end to end through the real `main`: clean data is published, planted faults are stopped.

    .venv/bin/python -m pytest tests/etl/quality -q
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.errors import StageError
from etl.partitions import MS_PER_DAY, add_days, day_number
from etl.quality import audit
from etl.schemas import EVENTS, ITEMS, SEQUENCES, TABLES, schema_fingerprint
from etl.store import Manifest, TableStore

DATASET = "kuairand_simulated"
DT = "2022-04-21"
USERS, EVENTS_PER_USER, ITEM_COUNT = 20, 48, 30


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of reports for all tests: validations must accumulate in it."""
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def store(tmp_path: Path) -> TableStore:
    return TableStore(str(tmp_path / "warehouse"), DATASET)


def run(store: TableStore, stage: str, attempt: str, reports: Path) -> None:
    audit.main(["--dataset", DATASET, "--warehouse", store.warehouse, "--dt", DT, "--attempt", attempt,
                "--stage", stage, "--reports", str(reports)])  # fmt: skip


def result(reports: Path, attempt: str, stage: str) -> dict:
    return json.loads((reports / "validations" / f"{attempt}-{stage}.json").read_text())


def failures(reports: Path, attempt: str, stage: str, severity: str) -> set[str]:
    return {e["column"] for e in result(reports, attempt, stage)["expectations"] if not e["success"] and e["severity"] == severity}


def stage_table(store: TableStore, attempt: str, table: str, dt: str, parts: list[pa.Table], **manifest: dict) -> Manifest:
    files = tuple(store.write_file(attempt, table, dt, bucket, part) for bucket, part in enumerate(parts))
    made = Manifest(DATASET, table, dt, attempt, schema_fingerprint(TABLES[table]), "test", files, **manifest)
    store.write_staged_manifest(made)
    return made


# ---- events ------------------------------------------------------------------------------------------------------


def events_table(dt: str = DT, seed: int = 0) -> pa.Table:
    """Return a clean day: every user meets an item every half an hour."""
    rng = np.random.default_rng(seed)
    rows = USERS * EVENTS_PER_USER
    user = np.repeat(np.arange(USERS), EVENTS_PER_USER)
    time_ms = day_number(dt) * MS_PER_DAY + np.tile(np.arange(EVENTS_PER_USER) * 1_800_000, USERS) + user
    return pa.table(
        {
            "user_id": user,
            "item_id": rng.integers(0, ITEM_COUNT, rows),
            "event_time_ms": time_ms,
            "feedback": rng.integers(0, 4, rows),
            "watch_time_ms": rng.integers(0, 9_000, rows),
            "duration_ms": rng.integers(0, 9_000, rows),
            "tab": rng.integers(0, 3, rows),
            "is_random": rng.random(rows) < 0.1,
        }
    ).cast(EVENTS)


def stage_events(store: TableStore, attempt: str, dt: str = DT, table: pa.Table | None = None, lost_rows: int = 0) -> Manifest:
    table = events_table(dt) if table is None else table
    counts = {"rows_read": table.num_rows + 3 + lost_rows, "events": table.num_rows, "duplicates": 2, "quarantined": 1}
    refused = pa.table({"source_file": ["log.csv"], "row_number": [7], "reason": ["bad_time: x"], "raw_text": ["a,b"]})
    stage_table(store, attempt, "quarantine", dt, [refused])
    half = table.num_rows // 2
    return stage_table(store, attempt, "events", dt, [table.slice(0, half), table.slice(half)], counts=counts)


def set_column(table: pa.Table, name: str, values: np.ndarray | list) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.names.index(name), field, pa.array(values, field.type))


def test_clean_events_are_published_and_documented(store: TableStore, reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = "clean-events"
    days = [add_days(DT, -back) for back in (2, 1, 0)]
    staged = {day: stage_events(store, attempt, day) for day in days}
    run(store, "events", attempt, reports)

    for day in days:
        assert store.require("events", day).data_digest == staged[day].data_digest
        assert store.require("quarantine", day).rows == 1
    out = capsys.readouterr().out
    assert out.index(f"published events dt={days[0]}") < out.index(f"published events dt={DT}")  # the partition's own day is last
    found = result(reports, attempt, "events")
    assert found["summary"]["outcome"] == "passed"
    assert found["simulated"] is True
    assert [row["dt"] for row in found["stats"]["events_days"]] == days
    for page in found["data_docs"]:
        assert f"{attempt}-events" in page
        assert "</html>" in Path(page).read_text()
    assert f"{attempt}-events" in (reports / "data_docs" / "index.html").read_text()

    run(store, "events", attempt, reports)  # a retry after success
    assert "nothing to do" in capsys.readouterr().out


def test_publication_cut_short_is_finished_by_a_retry(store: TableStore, reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_faulty_events_are_stopped(store: TableStore, reports: Path, fault: str, table, lost_rows: int, column: str) -> None:
    stage_events(store, "before", table=events_table(seed=1))
    store.publish("before", "events", DT)
    digest = store.require("events", DT).data_digest

    attempt = f"fault-{fault}"
    stage_events(store, attempt, table=table(), lost_rows=lost_rows)
    with pytest.raises(StageError) as error:
        run(store, "events", attempt, reports)
    assert column in failures(reports, attempt, "events", "critical")
    for part in ("stage events", "expect_column_values_to_be_between", column, "observed", "data_docs", "remedy"):
        assert part in str(error.value)
    assert store.require("events", DT).data_digest == digest
    assert store.manifest("quarantine", DT) is None
    assert result(reports, attempt, "events")["summary"]["outcome"] == "failed"


def test_fault_on_a_lookback_day_stops_every_day(store: TableStore, reports: Path) -> None:
    stage_events(store, "lookback", add_days(DT, -1), table=set_column(events_table(add_days(DT, -1)), "feedback", np.zeros(960)))
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
    assert result(reports, "begin", "events")["summary"]["outcome"] == "passed"
    assert failures(reports, "begin", "events", "info") == {"rows"}

    for table in ("quarantine", "events"):  # an empty day after days with events is a gap
        stage_table(store, "gap", table, add_days(DT, 1), [], counts=nothing)
    stage_events(store, "gap")
    run(store, "events", "gap", reports)
    assert failures(reports, "gap", "events", "warning") == {"gap_count"}


def test_dropped_column_is_named(store: TableStore, reports: Path) -> None:
    staged = stage_events(store, "dropped")
    path = f"{store.root}/{staged.files[1].path}"
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["tab"]), path)
    with pytest.raises(StageError, match=r"bucket=001.*no column tab"):
        run(store, "events", "dropped", reports)
    assert store.manifest("events", DT) is None


def test_warning_is_published_although_success_is_false(store: TableStore, reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = events_table()
    user = table["user_id"].to_numpy()
    staged = stage_events(store, "warned", table=set_column(table, "user_id", np.where(user < 12, 0, user)))
    run(store, "events", "warned", reports)
    summary = result(reports, "warned", "events")["summary"]
    assert summary["gx_success"] is False  # the trap: Great Expectations does not look at severities
    assert summary["max_severity_failure"] == "warning"
    assert summary["outcome"] == "warned"
    assert failures(reports, "warned", "events", "warning") == {"largest_user_share"}
    assert store.require("events", DT).data_digest == staged.data_digest
    assert "warning: stage events" in capsys.readouterr().out


def test_day_of_unusual_size_is_a_warning(store: TableStore, reports: Path) -> None:
    for back in (1, 2, 3):
        stage_events(store, "before", add_days(DT, -back))
        store.publish("before", "events", add_days(DT, -back))
    stage_events(store, "small", table=events_table().slice(0, 96))
    run(store, "events", "small", reports)
    assert "rows_to_trailing_median" in failures(reports, "small", "events", "warning")


def test_nothing_staged_says_what_to_run(store: TableStore, reports: Path) -> None:
    for stage in ("events", "sequences"):
        with pytest.raises(StageError, match=f"python -m etl.jobs.{stage}"):
            run(store, stage, "nothing", reports)


# ---- sequences and training input ----------------------------------------------------------------------------------

TARGET_DAYS, LOOKBACK_DAYS = 2, 4


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
        rows["target_tab"].append([0, 1, -1])
        rows["target_history_end"].append([2, 3, 4])
    return rows


def items_table() -> pa.Table:
    return pa.table(
        {
            "item_index": np.arange(ITEM_COUNT),
            "item_id": np.arange(ITEM_COUNT) * 7,
            "train_occurrences": np.arange(ITEM_COUNT),
            "author_id": [None] * ITEM_COUNT,
            "categories": [[1, 2]] * ITEM_COUNT,
            "duration_ms": [1] * ITEM_COUNT,
            "item_type": ["NORMAL"] * ITEM_COUNT,
            "upload_type": [None] * ITEM_COUNT,
        },
        schema=ITEMS,
    )


def stage_sequences(store: TableStore, attempt: str, rows: dict[str, list] | None = None, items: pa.Table | None = None) -> Manifest:
    table = pa.table(rows or user_rows(), schema=SEQUENCES)
    days = [add_days(DT, -back) for back in range(LOOKBACK_DAYS)]
    inputs = {f"events/dt={day}": m.data_digest for day in days if (m := store.manifest("events", day)) is not None}
    settings = {"target_days": TARGET_DAYS, "lookback_days": LOOKBACK_DAYS, "max_history": 100}
    counts = {"users": USERS, "targets": 3 * USERS, "train_targets": USERS, "eval_targets": 2 * USERS,
              "history_events": 4 * USERS, "truncated_users": 0}  # fmt: skip
    stage_table(store, attempt, "items", DT, [items_table() if items is None else items])
    return stage_table(store, attempt, "sequences", DT, [table.slice(0, 7), table.slice(7)], counts=counts, inputs=inputs,
                       settings=settings)  # fmt: skip


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
    assert result(reports, "clean", "sequences")["summary"]["outcome"] == "passed"
    [row] = result(reports, "clean", "sequences")["stats"]["sequences"]
    assert (row["train_label_rate"], row["eval_targets"], row["history_length_p50"]) == (0.5, 2 * USERS, 4)
    run(store, "sequences", "clean", reports)  # a retry after success

    run(store, "training_input", "clean", reports)
    found = result(reports, "clean", "training_input")
    assert found["summary"]["outcome"] == "passed"
    assert len(found["stats"]["training_window"]) == LOOKBACK_DAYS
    assert found["stats"]["training_input"][0]["unseen_eval_item_share"] == 1 / (2 * USERS)  # item 0 never occurred

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


@pytest.mark.parametrize(
    ("fault", "column"),
    [
        (leak, "leak_count"),
        (unsorted_history, "history_disorder_count"),
        (index_out_of_range, "item_index_out_of_range_count"),
        (end_out_of_range, "history_end_out_of_range_count"),
        (unequal_lengths, "unequal_length_count"),
        (no_eval_targets, "eval_targets"),
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
    assert column in failures(reports, attempt, "sequences", "critical")
    assert store.require("sequences", DT).data_digest == digest
    assert store.require("items", DT).attempt == "before"


def test_items_out_of_order_are_stopped(store: TableStore, reports: Path) -> None:
    stage_sequences(store, "disorder", items=set_column(items_table(), "item_id", np.arange(ITEM_COUNT)[::-1].copy()))
    with pytest.raises(StageError, match="item_id_not_increasing_count"):
        run(store, "sequences", "disorder", reports)


def test_importing_the_audit_stays_light() -> None:
    code = "import sys, etl.quality.audit; sys.exit(any(m in sys.modules for m in ('great_expectations', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_error_reaches_the_command_line(store: TableStore, reports: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "etl.quality.audit", "--dataset", DATASET, "--warehouse", store.warehouse, "--dt", DT,
         "--attempt", "none", "--stage", "events", "--reports", str(reports)],
        capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "remedy: run `python -m etl.jobs.events`" in done.stderr

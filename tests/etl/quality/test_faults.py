"""The catalogue of planted faults: each runs the real stages and must be stopped at its gate, with the thing named;
clean days pass.

.venv/bin/python -m pytest tests/etl/quality/test_faults.py -q
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from etl.datasets.definition import DatasetDefinition
from etl.quality.measure.scores import Scores
from etl.quality.measure.statistics import read_stats
from etl.stage.errors import StageError
from etl.warehouse.partitions import MS_PER_DAY, add_days, day_number, days_between
from tests.etl.quality.feed import (
    DAYS,
    DT,
    FIRST,
    ROWS_A_DAY,
    Feed,
    log_name,
    one_spark_session,
    read_log,
    write_feed,
    write_log,
)

pytestmark = pytest.mark.spark

YESTERDAY = add_days(DT, -1)
MS_PER_HOUR = 3_600_000
BOT = 123_456


def of_day(dt: str) -> str:
    """Return the attempt that has built a day of the clean feed."""
    return f"base-{dt}"


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with one_spark_session():
        yield


@pytest.fixture(scope="module")
def clean(session: None, tmp_path_factory: pytest.TempPathFactory) -> Feed:
    """All days but the last, published through the real stages; partitions of sequences of the last three of them."""
    folder = tmp_path_factory.mktemp("feed")
    feed = Feed(folder, write_feed(folder), folder / "reports")
    feed.build_events(of_day(YESTERDAY), YESTERDAY, DAYS - 1)
    feed.audit(of_day(YESTERDAY), YESTERDAY).publish("events")
    for dt in days_between(add_days(DT, -3), YESTERDAY):
        feed.build_sequences(of_day(dt), dt)
        feed.audit(of_day(dt), dt).publish("sequences")
    return feed


@pytest.fixture
def feed(clean: Feed, tmp_path: Path) -> Feed:
    return clean.copy(tmp_path)


@pytest.fixture(scope="module")
def built(clean: Feed, tmp_path_factory: pytest.TempPathFactory) -> Feed:
    """The last day too, its sequences staged by attempt `today` and not yet judged."""
    feed = clean.copy(tmp_path_factory.mktemp("built"))
    feed.build_events("today")
    feed.audit("today").publish("events")
    feed.build_sequences("today")
    return feed


@dataclass(frozen=True)
class Fault:
    """One planted fault and what must come of it.

    Attributes:
        plant: spoils the feed.
        gate, severity: where it must be found, and how severe.
        metric: what must have failed there.
        names: texts that the message must hold, besides the metric.
    """

    name: str
    plant: Callable[[Feed], None]
    gate: str
    metric: str
    names: tuple[str, ...] = ()
    severity: str = "critical"

    def __str__(self) -> str:
        return self.name


# ---- in the day's raw file ---------------------------------------------------------------------------------------


def set_column(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values))


def changed(name: str, change: Callable[[np.ndarray, pa.Table], np.ndarray]) -> Callable[[Feed], None]:
    """Return what changes one column of the day's file."""
    return lambda feed: feed.change_log(lambda table: set_column(table, name, change(table[name].to_numpy(), table)))


def some(rows: int, share: float) -> np.ndarray:
    return np.random.default_rng(3).random(rows) < share


def in_hour(table: pa.Table, hour: int) -> np.ndarray:
    return table["time_ms"].to_numpy() % MS_PER_DAY // MS_PER_HOUR == hour


def renamed(feed: Feed) -> None:
    feed.change_log(
        lambda table: table.rename_columns(
            ["is_clicked" if name == "is_click" else name for name in table.column_names]
        )
    )


def empty_file(feed: Feed) -> None:
    path = feed.raw / log_name(DT)
    path.unlink()
    path.write_bytes(b"")


def half_written(feed: Feed) -> None:
    path = feed.raw / log_name(DT)
    body = path.read_bytes()
    path.unlink()
    middle = body.rindex(b"\n", 0, len(body) // 2)
    path.write_bytes(body[: middle + 30])


def half_written_to_a_line_end(feed: Feed) -> None:
    feed.change_log(lambda table: table.slice(0, table.num_rows // 2))


def yesterdays_file(feed: Feed) -> None:
    write_log(feed.raw / log_name(DT), read_log(feed.raw / log_name(YESTERDAY)))


def yesterdays_rows_with_todays_times(feed: Feed) -> None:
    table = read_log(feed.raw / log_name(YESTERDAY))
    write_log(feed.raw / log_name(DT), set_column(table, "time_ms", table["time_ms"].to_numpy() + MS_PER_DAY))


def other_encoding(feed: Feed) -> None:
    path = feed.raw / log_name(DT)
    text = path.read_text()
    path.unlink()
    path.write_bytes(text.encode("utf-16"))


def text_in_numbers(feed: Feed) -> None:
    path = feed.raw / log_name(DT)
    lines = path.read_text().splitlines()
    path.unlink()
    path.write_text(
        "\n".join(
            [
                lines[0],
                *(
                    line.rpartition(",")[0] + ",home" if number % 3 == 0 else line
                    for number, line in enumerate(lines[1:])
                ),
            ]
        )
        + "\n"
    )


def no_file(feed: Feed) -> None:
    (feed.raw / log_name(DT)).unlink()


def duplicated_hour(feed: Feed) -> None:
    feed.change_log(
        lambda table: pa.concat_tables([table, table.filter(pa.array(in_hour(table, 12)))]).sort_by("time_ms")
    )


def duplicated_hour_with_other_watch_times(feed: Feed) -> None:
    def change(table: pa.Table) -> pa.Table:
        hour = table.filter(pa.array(in_hour(table, 12)))
        again = set_column(hour, "play_time_ms", hour["play_time_ms"].to_numpy() + 1)
        return pa.concat_tables([table, again]).sort_by("time_ms")

    feed.change_log(change)


def bot(feed: Feed) -> None:
    def change(table: pa.Table) -> pa.Table:
        rows = table.take(
            pa.array(np.sort(np.random.default_rng(3).choice(table.num_rows, round(table.num_rows * 0.4 / 0.6))))
        )
        rows = set_column(
            set_column(rows, "user_id", np.full(rows.num_rows, BOT)),
            "time_ms",
            rows["time_ms"].to_numpy() // 1_000 * 1_000 + np.arange(rows.num_rows) % 1_000,
        )
        return pa.concat_tables([table, rows]).sort_by("time_ms")

    feed.change_log(change)


def rotated(hours: int) -> Callable[[np.ndarray, pa.Table], np.ndarray]:
    return lambda time, _: time // MS_PER_DAY * MS_PER_DAY + (time + hours * MS_PER_HOUR) % MS_PER_DAY


RAW = [
    Fault(
        "dropped column",
        lambda feed: feed.change_log(lambda table: table.drop_columns(["is_click"])),
        "raw",
        "missing_column_count",
        ("is_click", log_name(DT)),
    ),
    Fault("renamed column", renamed, "raw", "missing_column_count", ("is_click may be its is_clicked",)),
    Fault(
        "seconds instead of milliseconds",
        changed("time_ms", lambda time, _: time // 1_000),
        "raw",
        "refused_share",
        ("time_out_of_range: time_ms=16",),
    ),
    Fault("empty file", empty_file, "raw", "empty_count", (log_name(DT), "delivered again")),
    Fault(
        "header without rows",
        lambda feed: feed.change_log(lambda table: table.slice(0, 0)),
        "raw",
        "empty_count",
        ("a header and no line",),
    ),
    Fault("half-written file", half_written, "raw", "cut_count", ("ends within a line",)),
    Fault("yesterday's file delivered again", yesterdays_file, "raw", "copy_count", (log_name(YESTERDAY),)),
    Fault(
        "time zone off by 8 hours",
        changed("time_ms", lambda time, _: time + 8 * MS_PER_HOUR),
        "raw",
        "outside_named_days_share",
        (DT, "time zone"),
    ),
    Fault("other encoding", other_encoding, "raw", "unreadable_count", ("UTF-16", log_name(DT))),
    Fault("text in a column of numbers", text_in_numbers, "raw", "refused_share", ("not_an_integer: tab='home'",)),
    Fault("no file of the day", no_file, "raw", "files", (f"covers dt={DT}",)),
]
EVENTS = [
    Fault(
        "file cut at a line end",
        half_written_to_a_line_end,
        "events",
        "missing_hour_count",
        ("no event in the UTC hour(s)",),
    ),
    Fault("yesterday's rows with today's times", yesterdays_rows_with_todays_times, "events", "repeated_day_share"),
    Fault("clock turned by 8 hours", changed("time_ms", rotated(8)), "events", "hour_shift", ("moved by about +",)),
    Fault(
        "missing hour",
        lambda feed: feed.change_log(lambda table: table.filter(pa.array(~in_hour(table, 9)))),
        "events",
        "missing_hour_count",
        ("hour(s) 09",),
    ),
    Fault(
        "duplicated hour, rows that differ",
        duplicated_hour_with_other_watch_times,
        "events",
        "worst_hour_repeated_key_share",
    ),
    Fault("duplicated hour, equal rows", duplicated_hour, "events", "duplicate_share", severity="warning"),
    Fault("labels all zero", changed("is_click", lambda click, _: click * 0), "events", "label_rate"),
    Fault(
        "label rate halved",
        changed("is_click", lambda click, _: np.where(some(len(click), 0.5), 0, click)),
        "events",
        "label_rate_to_trailing",
        ("the median of the days before",),
    ),
    Fault(
        "a signal is gone",
        changed("is_like", lambda like, _: like * 0),
        "events",
        "vanished_signal_count",
        ("never set: is_like",),
    ),
    Fault("bot user with 40 % of the rows", bot, "events", "bot_user_share", (f"user {BOT}",)),
    Fault(
        "item ids shifted by one",
        changed("video_id", lambda item, _: item + 1),
        "events",
        "duration_mismatch_rise",
        ("ids",),
    ),
    Fault(
        "item ids of another numbering",
        changed("video_id", lambda item, _: item + 50_000),
        "events",
        "known_item_share_drop",
        ("ids",),
    ),
    Fault(
        "user ids of another numbering",
        changed("user_id", lambda user, _: user + 50_000),
        "events",
        "known_user_share_drop",
        ("ids",),
    ),
    Fault(
        "nearly half of the users are missing",
        lambda feed: feed.change_log(lambda table: table.filter(pa.array(table["user_id"].to_numpy() % 20 > 8))),
        "events",
        "rows_to_trailing_extremes",
    ),
    Fault(
        "a field with a new category",
        changed("tab", lambda tab, _: np.where(some(len(tab), 0.05), 9, tab)),
        "events",
        "new_category_share",
        ("context has the new value(s) 9",),
        "warning",
    ),
    Fault(
        "watch times in seconds",
        changed("play_time_ms", lambda watch, _: watch // 1_000),
        "events",
        "watch_p50_to_trailing",
        severity="warning",
    ),
]


@pytest.mark.parametrize("fault", RAW + EVENTS, ids=str)
def test_fault_in_raw_logs_is_stopped_or_told_at_its_gate(feed: Feed, fault: Fault) -> None:
    before = {day: feed.store.require("events", day).data_digest for day in days_between(FIRST, YESTERDAY)}
    fault.plant(feed)
    error = run_to(feed, fault.gate)
    require_found(feed, fault, error)
    assert {day: feed.store.require("events", day).data_digest for day in before} == before
    if fault.severity == "critical":
        assert feed.store.manifest("events", DT) is None
        assert not any(
            row["attempt"] == "today" for row in read_stats(feed.store, fault.gate, DT, DAYS).to_pylist()
        )  # no baseline for later days


def run_to(feed: Feed, gate: str) -> StageError | None:
    try:
        feed.audit("today").publish("raw")
        if gate != "raw":
            feed.build_events("today")
            feed.audit("today").publish("events")
    except StageError as error:
        return error
    return None


def require_found(feed: Feed, fault: Fault, error: StageError | None) -> None:
    """Require that exactly the fault's gate has found it, with its severity, and says what and where."""
    outcomes = feed.outcomes("today")
    assert {
        stage: outcome.max_severity for stage, outcome in outcomes.items() if outcome.max_severity not in (None, "info")
    } == {fault.gate: fault.severity}
    failed = {outcome.column: outcome for outcome in outcomes[fault.gate].failed(fault.severity)}
    assert fault.metric in failed, sorted(failed)
    notes = f"{failed[fault.metric].message} {failed[fault.metric].remedy}"
    for part in (fault.metric, *fault.names):
        assert part in notes
    assert failed[fault.metric].remedy
    if fault.severity == "critical":
        assert fault.metric in str(error).splitlines()[0]  # which stands in the note of the run
        assert failed[fault.metric].remedy in str(error)
    else:
        assert error is None
        assert feed.store.require("events", DT).rows


# ---- in what a job staged: as a job with a bug would ---------------------------------------------------------------


def lists_changed(name: str, change: Callable[[list, dict], list]) -> Callable[[Feed], None]:
    """Return what changes one list column of the staged sequences, row by row."""

    def apply(table: pa.Table) -> pa.Table:
        rows = [change(row[name], row) for row in table.to_pylist()]
        return table.set_column(
            table.schema.get_field_index(name), table.schema.field(name), pa.array(rows, table.schema.field(name).type)
        )

    return lambda feed: feed.restage("today", "sequences", apply)


def own_page(ends: list, row: dict) -> list:
    """Let every target see the history through its own time, not before it: what a `<=` instead of a `<` does."""
    return [int(np.searchsorted(row["history_time_ms"], time, side="right")) for time in row["target_time_ms"]]


def shifted_item_index(table: pa.Table) -> pa.Table:
    return table.set_column(0, table.schema.field(0), pa.array(table["item_index"].to_numpy() + 1, pa.int32()))


STAGED = [
    Fault(
        "leak: history includes the target's own page",
        lists_changed("target_history_end", own_page),
        "sequences",
        "leak_count",
        ("No target sees",),
    ),
    Fault(
        "sequences not sorted",
        lists_changed("history_time_ms", lambda times, _: times[::-1]),
        "sequences",
        "history_disorder_count",
    ),
    Fault(
        "codes out of vocabulary",
        lists_changed("history_item_index", lambda index, _: [9_999, *index[1:]]),
        "sequences",
        "item_index_out_of_range_count",
    ),
    Fault(
        "history end beyond the history",
        lists_changed("target_history_end", lambda ends, _: [end + 10_000 for end in ends]),
        "sequences",
        "history_end_out_of_range_count",
    ),
    Fault(
        "lists of different lengths",
        lists_changed("history_feedback", lambda bits, _: bits[1:]),
        "sequences",
        "unequal_length_count",
    ),
    Fault(
        "evaluation targets in training",
        lists_changed("target_split", lambda split, _: [0] * len(split)),
        "sequences",
        "split_wrong_count",
    ),
    Fault(
        "labels beyond 0 and 1",
        lists_changed("target_label", lambda label, _: [2 * value for value in label]),
        "sequences",
        "label_not_binary_count",
    ),
    Fault(
        "item index off by one",
        lambda feed: feed.restage("today", "items", shifted_item_index),
        "sequences",
        "item_index_not_dense_count",
    ),
]


@pytest.mark.parametrize("fault", STAGED, ids=str)
def test_fault_in_staged_sequences_is_stopped(built: Feed, tmp_path: Path, fault: Fault) -> None:
    feed = built.copy(tmp_path)
    fault.plant(feed)
    with pytest.raises(StageError) as error:
        feed.audit("today").publish("sequences")
    require_found(feed, fault, error.value)
    assert feed.store.manifest("sequences", DT) is None
    assert feed.store.manifest("items", DT) is None


def change_item_file(feed: Feed, change: Callable[[pa.Table], pa.Table]) -> None:
    path = feed.raw / "video_features_basic_sim.csv"
    write_log(path, change(read_log(path)))


FEATURES = [
    Fault(
        "item file of another numbering",
        lambda feed: change_item_file(
            feed, lambda items: set_column(items, "video_id", items["video_id"].to_numpy() + 50_000)
        ),
        "sequences",
        "without_fields_share",
        ("item files",),
    ),
    Fault(
        "half of the item file's ids of another numbering",
        lambda feed: change_item_file(
            feed,
            lambda items: set_column(
                items,
                "video_id",
                np.where(
                    np.arange(items.num_rows) % 2 == 0,
                    items["video_id"].to_numpy() + 50_000,
                    items["video_id"].to_numpy(),
                ),
            ),
        ),
        "sequences",
        "without_fields_share_rise",
        ("item files",),
    ),
    Fault(
        "an item field with a new category",
        lambda feed: change_item_file(
            feed,
            lambda items: set_column(
                items,
                "video_type",
                np.where(
                    np.arange(items.num_rows) % 20 == 0, "LIVE", items["video_type"].to_numpy(zero_copy_only=False)
                ),
            ),
        ),
        "sequences",
        "new_category_share",
        ("item_type has the new value(s) LIVE",),
        "warning",
    ),
]


@pytest.mark.parametrize("fault", FEATURES, ids=str)
def test_fault_in_an_item_file_is_found(built: Feed, tmp_path: Path, fault: Fault) -> None:
    feed = built.copy(tmp_path)
    fault.plant(feed)
    feed.build_sequences("today")
    error = None
    try:
        feed.audit("today").publish("sequences")
    except StageError as raised:
        error = raised
    require_found(feed, fault, error)
    assert (feed.store.manifest("sequences", DT) is None) == (fault.severity == "critical")


@pytest.mark.parametrize("optional", [False, True])
def test_a_feed_without_item_file_passes_where_its_definition_says_so(
    built: Feed, tmp_path: Path, optional: bool
) -> None:
    feed = built.copy(tmp_path)
    (feed.raw / "video_features_basic_sim.csv").unlink()
    raw = feed.definition.model_dump(exclude_unset=True)
    feed.definition = DatasetDefinition.model_validate(
        {**raw, "items": [{**rule, "optional": optional} for rule in raw["items"]]}
    )
    feed.build_sequences("today")
    if not optional:
        with pytest.raises(StageError, match="without_fields_share is 1 "):
            feed.audit("today").publish("sequences")
        return
    outcome = feed.audit("today").publish("sequences")
    assert outcome is not None and not {
        one.column for one in outcome.outcomes if not one.success and one.severity != "info"
    }
    assert feed.audit("today").publish("training_input") is not None
    # A file that is there is judged, whatever the definition says of its absence.
    write_log(
        feed.raw / "video_features_basic_sim.csv",
        set_column(read_log(built.raw / "video_features_basic_sim.csv"), "video_id", np.arange(50_000, 50_600)),
    )
    feed.build_sequences("later")
    with pytest.raises(StageError, match="without_fields_share is 1 "):
        feed.audit("later").publish("sequences")


def test_events_built_again_after_the_sequences_stop_training(built: Feed, tmp_path: Path) -> None:
    feed = built.copy(tmp_path)
    feed.audit("today").publish("sequences")
    feed.audit("today").publish("training_input")  # nothing is wrong yet
    feed.change_log(lambda table: set_column(table, "play_time_ms", table["play_time_ms"].to_numpy() + 1), YESTERDAY)
    feed.build_events("again", YESTERDAY)
    feed.audit("again", YESTERDAY).publish("events")
    with pytest.raises(StageError, match=rf"training must not start[\s\S]*stale_count[\s\S]*{YESTERDAY}"):
        feed.audit("today").publish("training_input")


# ---- in the model's scores -----------------------------------------------------------------------------------------


def with_nan(score: np.ndarray) -> np.ndarray:
    score[7] = np.nan
    return score


SCORES = [
    ("a score is not a number", with_nan, "not_a_number_count", "critical"),
    ("scores are logits", lambda score: np.log(score / (1 - score)), "out_of_range_count", "critical"),
    ("every score is the same", lambda score: np.full_like(score, 0.4), "constant_share", "critical"),
    (
        "most scores are the same",
        lambda score: np.where(np.arange(len(score)) % 10 < 6, 0.4, score),
        "constant_share",
        "critical",
    ),
    ("probabilities a fifth of what they should be", lambda score: score / 5, "expected_ratio", "critical"),
    ("probabilities half as high again", lambda score: np.minimum(score * 1.5, 1), "expected_ratio", "warning"),
    ("scores upside down", lambda score: 1 - score, "auc", "warning"),
]


def scores_of(change: Callable[[np.ndarray], np.ndarray]) -> Scores:
    """Return what the evaluation of a calibrated model hands in, changed."""
    rng = np.random.default_rng(4)
    score = rng.beta(2, 3, 3_000)
    label = (rng.random(3_000) < score).astype(np.int8)
    score = change(score).astype(np.float32)
    auc = float((score[label == 1][:, None] > score[label == 0][None]).mean())
    return Scores(label, score, auc)


@pytest.mark.parametrize(
    ("change", "metric", "severity"), [fault[1:] for fault in SCORES], ids=[fault[0] for fault in SCORES]
)
def test_fault_in_scores_is_found(
    clean: Feed, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], metric: str, severity: str
) -> None:
    feed = Feed(tmp_path, clean.definition, clean.reports)
    audit = feed.audit("today", scores=scores_of(change))
    if severity == "critical":
        with pytest.raises(StageError, match=rf"must not be registered[\s\S]*{metric}"):
            audit.publish("model_output")
    else:
        audit.publish("model_output")
    assert metric in {outcome.column for outcome in feed.outcomes("today")["model_output"].failed(severity)}
    assert feed.outcomes("today")["model_output"].max_severity == severity


# ---- clean days ----------------------------------------------------------------------------------------------------


def test_ten_clean_days_of_events_raise_nothing(clean: Feed) -> None:
    """Weekdays and chance move rows, hours and rates.

    Days 2 to 11 are judged, the first ones without enough days before them.
    """
    outcome = clean.outcomes(of_day(YESTERDAY), YESTERDAY)["events"]
    assert {
        day
        for o in outcome.outcomes
        if o.column == "label_rate_to_trailing"
        for day, value in o.observed.items()
        if value is not None
    } >= set(days_between(add_days(FIRST, 3), YESTERDAY))
    rows = [
        row["value"]
        for row in read_stats(clean.store, "events", YESTERDAY, DAYS).to_pylist()
        if row["metric"] == "rows"
    ]
    assert len(rows) == 11
    assert max(rows) > 1.15 * min(rows) > ROWS_A_DAY  # the noise is there
    assert [o.message for severity in ("critical", "warning") for o in outcome.failed(severity)] == []


def test_a_clean_day_passes_every_gate(feed: Feed) -> None:
    assert feed.run("today") is None
    feed.audit("today", scores=scores_of(lambda score: score)).publish("model_output")
    assert {stage: outcome.max_severity for stage, outcome in feed.outcomes("today").items()} == dict.fromkeys(
        ("raw", "events", "sequences", "training_input", "model_output")
    )
    assert feed.store.require("sequences", DT).rows


@pytest.mark.slow
def test_ten_clean_days_one_after_the_other_raise_no_critical_and_at_most_one_warning(
    session: None, tmp_path: Path
) -> None:
    """The chain as the scheduler runs it, from the first day that has a window on."""
    feed = Feed(tmp_path, write_feed(tmp_path), tmp_path / "reports")
    warnings = []
    for dt in days_between(add_days(DT, -9), DT):
        attempt = f"day-{dt}"
        assert feed.run(attempt, dt) is None
        warnings += [o.message for outcome in feed.outcomes(attempt, dt).values() for o in outcome.failed("warning")]
    assert len(warnings) <= 1, warnings


def first_day_of(clean: Feed, folder: Path) -> Feed:
    """Return a feed that begins: no warehouse, and one day's file."""
    feed = Feed(folder, clean.definition, clean.reports)
    feed.raw.mkdir()
    for path in clean.raw.iterdir():
        if not path.name.startswith("log_") or path.name == log_name(FIRST):
            (feed.raw / path.name).hardlink_to(path)
    return feed


def test_a_missing_hour_of_the_first_day_is_told(clean: Feed, tmp_path: Path) -> None:
    feed = first_day_of(clean, tmp_path)
    feed.change_log(lambda table: table.filter(pa.array(~in_hour(table, 9))), FIRST)
    feed.build_events("today", FIRST, 2)
    feed.audit("today", FIRST).publish("events")
    assert [o.column for o in feed.outcomes("today", FIRST)["events"].failed("warning")] == ["odd_empty_hour_count"]


def test_the_first_day_of_a_feed_is_judged_by_absolute_bounds_alone(clean: Feed, tmp_path: Path) -> None:
    feed = first_day_of(clean, tmp_path)
    feed.audit("today", FIRST).publish("raw")
    feed.build_events("today", FIRST, 2)
    feed.audit("today", FIRST).publish("events")
    outcome = feed.outcomes("today", FIRST)["events"]
    assert outcome.max_severity == "info"  # a lookback day before the data begin is recorded
    assert day_number(FIRST) == day_number(DT) - DAYS + 1

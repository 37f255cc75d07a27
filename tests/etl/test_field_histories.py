"""Inputs that failed.

A feed younger than its lookback, with item fields in its log; and histories longer than max_events.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from etl.datasets.definition import dataset
from etl.ingest import build_events as events_job
from etl.ingest.raw import RawLocation
from etl.quality.judge.outcomes import StageOutcome
from etl.sequences import build_sequences as sequences_job
from etl.stage.errors import StageError
from etl.warehouse.partitions import MS_PER_DAY, Window, add_days, day_number, days_between
from tests.etl.quality.feed import Feed, one_spark_session
from training.config import TrainConfig
from training.data import make_batch
from training.job import load_training_data

FIRST = "2024-03-01"
FIELD = Path(__file__).resolve().parents[2].parent / "shared" / "field"
SHOP = """
name: shop
title: Shop
first_day: 2024-03-01
logs:
  files: [log.csv]
  columns: {user: text, item: text, act: text, at: integer, cat: text, price: decimal, tags: text}
events:
  user: user
  item: item
  time: {column: at, unit: seconds}
  signals: {click: {column: act, equals: click}}
  item_fields:
    category: {column: cat}
    price: {column: price, kind: number}
    tags: {column: tags, kind: categories}
targets: {label: click}
window: {target_days: 7, lookback_days: 30, evaluation_days: 1}
"""


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with one_spark_session():
        yield


class Shop(Feed):
    """A young feed: its definition's own window, and a log that grows."""

    def __init__(self, folder: Path, text: str = SHOP) -> None:
        (folder / "raw").mkdir()
        (folder / "shop.yaml").write_text(text)
        super().__init__(folder, dataset(str(folder / "shop.yaml")), folder / "reports")

    def write(self, days: list[str], rows_a_day: int = 12) -> None:
        lines = ["user,item,act,at,cat,price,tags"]
        for day in days:
            start = day_number(day) * MS_PER_DAY // 1_000
            lines += [
                f"u{i % 4},i{i % 5},{'click' if i % 3 else 'view'},{start + 3_600 * i},c{i % 2},{i}.5,a|b"
                for i in range(rows_a_day)
            ]
        (self.raw / "log.csv").write_text("\n".join(lines) + "\n")

    def build_events(self, attempt: str, dt: str = FIRST, lookback_days: int = 30) -> None:
        super().build_events(attempt, dt, lookback_days)

    def build_sequences(self, attempt: str, dt: str = FIRST) -> None:
        window = Window(dt, **self.definition.window.model_dump())
        sequences_job.build_sequences(self.store, self.definition, RawLocation(str(self.raw)), window, attempt)

    def passed(self, attempt: str, dt: str) -> dict[str, StageOutcome]:
        outcomes = self.outcomes(attempt, dt)
        assert not [o.message for outcome in outcomes.values() for o in outcome.failed("critical")]
        return outcomes


def test_a_feed_younger_than_its_lookback_runs_from_its_first_day(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    found = {}
    for number in range(3):
        dt = add_days(FIRST, number)
        shop.write(days_between(FIRST, dt))
        found[dt] = shop.run(f"day-{number}", dt)
        if number:
            assert found[dt] is None, found[dt]
            assert {"events", "sequences", "training_input"} <= shop.passed(f"day-{number}", dt).keys()
            assert shop.store.require("sequences", dt).counts["train_targets"] == 12 * number
            items = shop.store.read(shop.store.require("items", dt))
            assert set(items["category"].to_pylist()) == {"c0", "c1"}
    # On the first day there is nothing before the evaluation day: the day is published, and what can be trained is
    # named.
    error = found[FIRST]
    assert isinstance(error, StageError)
    assert f"nothing to train dt={FIRST} on" in error.what
    assert f"dt={add_days(FIRST, 1)}" in error.remedy
    assert "first day that can be trained" in error.remedy
    assert shop.store.require("events", FIRST).rows == 12
    assert shop.store.require("events", add_days(FIRST, -29)).rows == 0
    assert shop.store.manifest("sequences", FIRST) is None


@pytest.mark.parametrize("days", [(0, 2), (1, 2), (0, 1, 3)], ids=str)
def test_an_empty_day_is_a_day_wherever_it_lies(tmp_path: Path, days: tuple[int, ...]) -> None:
    shop = Shop(tmp_path)
    dt = add_days(FIRST, days[-1])
    shop.write([add_days(FIRST, day) for day in days])
    assert shop.run("a", dt) is None
    shop.passed("a", dt)
    full = {day for day in Window(dt, 7, 30).event_days if shop.store.require("events", day).rows}
    assert full == {add_days(FIRST, day) for day in days}
    # Every column of the definition is there to be read of an empty day too.
    empty = shop.store.require("events", add_days(dt, -20))
    schema = events_job.events_schema(shop.definition)
    assert shop.store.read(empty, ["user_id", "category", "price", "tags"], empty=schema).schema.names == [
        "user_id",
        "category",
        "price",
        "tags",
    ]


def test_more_than_one_evaluation_day_moves_the_first_day_that_can_be_trained(tmp_path: Path) -> None:
    shop = Shop(tmp_path, SHOP.replace("evaluation_days: 1", "evaluation_days: 2"))
    second, third = add_days(FIRST, 1), add_days(FIRST, 2)
    shop.write(days_between(FIRST, second))
    error = shop.run("a", second)
    assert isinstance(error, StageError)
    assert f"dt={third}" in error.remedy
    shop.write(days_between(FIRST, third))
    assert shop.run("b", third) is None


def test_a_feed_that_paused_longer_than_its_target_days_says_when_it_can_be_trained_again(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    back = add_days(FIRST, 12)
    shop.write([FIRST, add_days(FIRST, 1), back])
    error = shop.run("a", back)
    assert isinstance(error, StageError)
    assert f"dt={add_days(back, 1)}" in error.remedy
    assert shop.store.require("events", FIRST).rows == 12


def events_a_target_sees(feed: Feed, dt: str, user_id: int) -> list[int]:
    """Return how many events the batch of each target alone holds, as a training reads the published partition."""
    data, *_ = load_training_data(feed.store.warehouse, feed.definition.name, dt, TrainConfig())
    sequences = data.joined.sequences
    user = int(np.flatnonzero(sequences.user_id == user_id)[0])
    targets = np.arange(*sequences.targets_of(user).indices(len(sequences.target_item)))
    return [len(make_batch(data.joined, np.array([user]), [np.array([target])]).event_item) for target in targets]


@pytest.mark.skipif(not FIELD.exists(), reason="the inputs of the field trials are not here")
def test_max_events_bounds_the_target_after_ten_events(tmp_path: Path) -> None:
    source = FIELD / "max_events_is_no_cap"
    definition = dataset(str(shutil.copy(source / "definition.yaml", tmp_path / "mini.yaml")))
    shutil.copytree(source / "input", tmp_path / "raw")
    feed, dt = Feed(tmp_path, definition, tmp_path / "reports"), "2024-03-02"
    feed.build_events("a", dt, definition.window.lookback_days)
    feed.audit("a", dt).publish("events")
    sequences_job.build_sequences(
        feed.store, definition, RawLocation(str(feed.raw)), Window(dt, **definition.window.model_dump()), "a"
    )
    feed.audit("a", dt).publish("sequences")
    manifest = feed.store.require("sequences", dt)
    assert manifest.settings["max_events"] == 3
    row = next(row for row in feed.store.read(manifest).to_pylist() if row["user_id"] == 2)
    assert (
        row["target_history_end"][-1] == 10
    )  # ten events on the day before: the row stores them for the targets of that day
    assert max(events_a_target_sees(feed, dt, 2)) == 3
    assert events_a_target_sees(feed, dt, 2)[-1] == 3


@pytest.mark.skipif(not FIELD.exists(), reason="the inputs of the field trials are not here")
def test_the_input_that_failed_is_published_and_says_when_it_can_be_trained(tmp_path: Path) -> None:
    source = FIELD / "empty_day_with_category_field"
    definition = dataset(str(shutil.copy(source / "definition.yaml", tmp_path / "shop.yaml")))
    shutil.copytree(source / "input", tmp_path / "raw")
    feed = Feed(tmp_path, definition, tmp_path / "reports")
    feed.build_events("a", FIRST, definition.window.lookback_days)
    feed.audit("a", FIRST).publish("events")
    assert [feed.store.require("events", day).rows for day in (add_days(FIRST, -1), FIRST)] == [0, 6]
    with pytest.raises(StageError, match="nothing to train"):
        sequences_job.build_sequences(
            feed.store, definition, RawLocation(str(feed.raw)), Window(FIRST, **definition.window.model_dump()), "a"
        )

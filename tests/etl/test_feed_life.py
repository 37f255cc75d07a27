"""Sixty days in the life of a feed: retention of raw files and of what was superseded, late and repeated deliveries,
edited definitions, kills, backfills in any order.

Everything runs as the jobs run it, but for Spark: the tasks' own functions are called here, one after the other.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from etl.datasets.definition import DatasetDefinition
from etl.ingest import build_events as job
from etl.ingest.affected import affected
from etl.ingest.event_rows import parse_split, parsed_schema
from etl.ingest.raw import RawLocation
from etl.stage.errors import StageError
from etl.warehouse.partitions import MS_PER_DAY, add_days, day_number, days_between
from etl.warehouse.retention import Cutoffs, Lineage, prune_partitions, prune_staging
from etl.warehouse.store import Manifest, TableStore

FIRST, DAYS, LOOKBACK, BUCKETS = "2024-01-01", 60, 6, 2
RETENTION_DAYS, NS_PER_DAY = 4, MS_PER_DAY * 1_000_000


class NoSpark:
    def stop(self) -> None:
        pass


def run_here(spark, store, definition, raw, plan) -> list[dict]:
    """Do what the Spark job's tasks do, in one task."""
    splits = raw.splits(plan.files, definition.logs, lambda ranges: [raw.count_newlines(*r) for r in ranges])
    days = frozenset(day_number(day) for day in [*plan.days, *plan.ahead])
    tables = [table for split in splits for table in parse_split(raw, split, definition, days, plan.dt, plan.layout)]
    rows = pa.concat_tables([parsed_schema(definition).empty_table(), *tables])
    return job.write_rows(rows, store, definition, plan.staging, plan.later, plan.layout)


@pytest.fixture(autouse=True)
def without_spark(monkeypatch) -> None:
    monkeypatch.setattr(job, "spark_session", lambda name: NoSpark())
    monkeypatch.setattr(job, "_run", run_here)
    monkeypatch.setattr(job, "code_version", lambda: "one")


def shop(title: str = "A shop", least: int = 0, dated: bool = True, last_day: str | None = None) -> DatasetDefinition:
    return DatasetDefinition.model_validate(
        {
            "name": "shop",
            "title": title,
            "first_day": FIRST,
            "last_day": last_day,
            "logs": {
                "files": ["*.csv"],
                "columns": {
                    "user": "integer",
                    "item": "integer",
                    "at": "integer",
                    "seen": {"type": "integer", "min": least},
                },
                "expected_refusals": ["out_of_range"],
                **({"days_in_name": {"pattern": r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)"}} if dated else {}),
            },
            "events": {
                "user": "user",
                "item": "item",
                "time": {"column": "at", "unit": "milliseconds"},
                "signals": {"long": {"column": "seen", "at_least": 50}},
            },
            "targets": {"label": "long"},
        }
    )


def write_log(path: Path, rng: random.Random, days: list[str], rows: int = 6) -> None:
    lines = [
        f"{rng.randrange(9)},{rng.randrange(99)},{day_number(day) * MS_PER_DAY + rng.randrange(MS_PER_DAY)},"
        f"{rng.randrange(100)}"
        for day in days
        for _ in range(rows)
    ]
    path.write_text("\n".join(["user,item,at,seen", *lines]) + "\n")


def build(
    store: TableStore,
    raw: Path,
    definition: DatasetDefinition,
    dt: str,
    attempt: str,
    lookback: int = LOOKBACK,
    accept: tuple[str, ...] = (),
) -> dict[str, int]:
    return job.build_events(
        store, definition, RawLocation(str(raw)), job.Build(dt, attempt, lookback, BUCKETS, 1.0, accept)
    )


def publish(store: TableStore, attempt: str) -> None:
    for table in ("quarantine", "events"):
        for day in store.staged_days(attempt, table):
            store.publish(attempt, table, day)


def scratch(folder: Path, raw: Path, definition: DatasetDefinition, days: list[str]) -> dict[str, str]:
    """Return the digests of days that are built from the raw files that are there, in a warehouse of their own."""
    store, found = TableStore(str(folder), "shop"), {}
    for day in days:
        build(store, raw, definition, day, f"s{day}", 1)
        publish(store, f"s{day}")
        found[day] = store.require("events", day).data_digest
    shutil.rmtree(folder, ignore_errors=True)
    return found


class Life:
    """A feed, and what an outsider knows of it.

    Which days are whole in the raw folder, and what each was built from.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng, self.raw, self.folder = random.Random(seed), folder / "raw", folder
        self.raw.mkdir()
        self.store, self.definition, self.attempts = TableStore(str(folder / "w"), "shop"), shop(), 0
        self.delivered: dict[str, set[str]] = {}  # day -> every file that was ever delivered for it
        self.built: dict[
            str, tuple[dict[str, bytes], int]
        ] = {}  # day -> the files and the bound that its rows were built by
        happenings = ("pruned", "stop", "accepted", "late", "lost", "stale", "killed", "backfill")
        self.seen = dict.fromkeys(happenings, 0)

    def deliver(self, day: str, name: str) -> None:
        write_log(self.raw / name, self.rng, [day])
        self.delivered.setdefault(day, set()).add(name)

    def there(self, day: str) -> dict[str, bytes]:
        return {
            name: (self.raw / name).read_bytes() for name in self.delivered.get(day, ()) if (self.raw / name).exists()
        }

    def bound(self) -> int:
        return int(self.definition.logs.columns["seen"].min or 0)

    def lost(self, day: str) -> bool:
        """Whether a file that the published day was built from is gone."""
        return (
            day in self.built
            and bool(self.built[day][0].keys() - self.there(day).keys())
            and self.manifest(day).rows > 0
        )

    def manifest(self, day: str) -> Manifest:
        return self.store.require("events", day)

    def stale(self) -> dict[str, bool]:
        """Return the published days that are not what would be built now -> whether they can be built whole."""
        found = {}
        for day, (files, bound) in self.built.items():
            now = self.there(day)
            if bound != self.bound() or any(files.get(name) != body for name, body in now.items()):
                found[day] = not self.lost(day)
        return found

    def run(self, dt: str, killed: str | None = None, accept: tuple[str, ...] = ()) -> StageError | None:
        self.attempts += 1
        attempt, window = f"a{self.attempts}", days_between(add_days(dt, 1 - LOOKBACK), dt)
        must = {day for day in window if self.lost(day) and (day == dt or self.built[day][1] != self.bound())} - set(
            accept
        )
        before = {day: self.manifest(day) for day in self.store.days("events")}
        try:
            build(self.store, self.raw, self.definition, dt, attempt, accept=accept)
        except StageError as error:
            assert {day: self.manifest(day) for day in before} == before
            if must:
                assert all(f"dt={day}: " in error.what for day in must), (must, error.what)
                assert "--accept-loss" in error.remedy
            return error
        assert not must
        staged = self.store.staged_days(attempt, "events")
        if killed == "before":
            return None  # nothing of it is published, ever
        for day in sorted(staged, key=lambda d: (d == dt, d)):
            assert not (self.lost(day) and day not in accept)
            self.store.publish(attempt, "events", day)
            self.built[day] = self.there(day), self.bound()
            if killed == "between" and self.rng.random() < 0.3:
                return None
        return None

    def a_day_goes_by(self) -> None:
        """Make what has an age that counts a day older."""
        root = Path(self.store.root)
        for path in [*root.glob("_manifests/*/*/current.json"), *root.glob("_staging/**/*")]:
            os.utime(path, ns=(path.stat().st_mtime_ns - NS_PER_DAY,) * 2)

    def prune(self) -> int:
        """Remove what is old.

        What is published, what is stale and what any engine reads are as before. Return what went.
        """
        tables = {
            name: {day: self.store.require(name, day) for day in self.store.days(name)}
            for name in ("events", "quarantine")
        }
        stale = affected(self.store, self.definition, RawLocation(str(self.raw)))
        (now := self.folder / "now").touch()
        old_ms = now.stat().st_mtime_ns // 1_000_000 - RETENTION_DAYS * MS_PER_DAY
        said: list[str] = []
        removed = prune_partitions(self.store, Cutoffs(old_ms, old_ms), Lineage(), False, said.append)
        removed += prune_staging(self.store, old_ms, (), False)
        assert said == []
        assert tables == {
            name: {day: self.store.require(name, day) for day in self.store.days(name)} for name in tables
        }
        assert affected(self.store, self.definition, RawLocation(str(self.raw))) == stale
        for manifest in (manifest for days in tables.values() for manifest in days.values() if manifest.files):
            folder = Path(self.store.root) / manifest.table / f"dt={manifest.dt}"
            listed = [f"{self.store.root}/{file.path}" for file in manifest.files]
            assert sorted(map(str, folder.rglob("*.parquet"))) == sorted(listed)
            assert duckdb.read_parquet(listed, hive_partitioning=False).count("*").fetchone() == (manifest.rows,)
        return sum(one.files for one in removed)


@contextlib.contextmanager
def never_smaller(life: Life, accept: tuple[str, ...]) -> Iterator[None]:
    before = {day: (life.manifest(day).rows, life.bound()) for day in life.store.days("events")}
    yield
    for day, (rows, _) in before.items():
        # A bound that somebody raised refuses rows: the gate of events stops that, here it is left to the definition.
        assert life.manifest(day).rows >= rows or day in accept or life.built[day][1] > 0, day


def a_day_of_the_raw_folder(life: Life, number: int, today: str) -> None:
    """Files come, in time and late; retention takes some, and the folder moves."""
    rng = life.rng
    life.deliver(today, f"log-{today}.csv")
    if number > 3 and rng.random() < 0.25:  # rows that come late, beside the day's own file or in its place
        day = add_days(today, -rng.randrange(1, 9))
        if day >= FIRST:
            life.deliver(day, f"late-{day}-{number}.csv" if rng.random() < 0.6 else f"log-{day}.csv")
            life.seen["late"] += 1
    if rng.random() < 0.5:  # retention
        for day in days_between(FIRST, add_days(today, -rng.randrange(3, 9))):
            for name in sorted(life.there(day)):
                if rng.random() < 0.7:
                    (life.raw / name).unlink()
    if rng.random() < 0.1:  # other times of change, the same bytes
        moved = life.folder / f"raw{number}"
        shutil.copytree(life.raw, moved, copy_function=shutil.copyfile)
        life.raw = moved


def the_definition_is_edited(life: Life, number: int) -> None:
    if life.rng.random() < 0.2:
        life.definition = shop(f"Title {number}", life.bound())
    if life.rng.random() < 0.05:
        life.definition = shop(life.definition.title, 5 - life.bound())


def what_is_stale_is_named_and_nothing_else(life: Life, number: int) -> None:
    if life.built:
        found = affected(life.store, life.definition, RawLocation(str(life.raw)))
        said = {s.dt: s.whole for s in found if s.table == "events"}
        assert said == life.stale(), number
        life.seen["stale"] += len(said)
        life.seen["lost"] += sum(not whole for whole in said.values())


def builds_of_a_day(life: Life, number: int, today: str) -> None:
    """Build the day, or a backfill in any order; some are killed.

    A build that would lose rows stops, and is run again with that accepted.
    """
    rng, seen = life.rng, life.seen
    killed = rng.choice([None, None, None, "before", "between"])
    seen["killed"] += killed is not None
    days = (
        [today]
        if rng.random() < 0.7
        else rng.sample(days_between(max(FIRST, add_days(today, -8)), today), min(3, number + 1))
    )
    seen["backfill"] += len(days) > 1
    for dt in days:
        with never_smaller(life, ()):
            error = life.run(dt, killed)
        if error is None:
            continue
        if "would have to be built again" in error.what and dt == today:
            seen["stop"] += 1
            accept = tuple(day for day in days_between(add_days(dt, 1 - LOOKBACK), dt) if life.lost(day))
            with never_smaller(life, accept):
                assert life.run(dt, accept=accept) is None
            seen["accepted"] += 1


def what_is_fresh_is_what_a_build_from_nothing_gives(life: Life) -> None:
    """Wherever raw is still there."""
    fresh = [
        day
        for day in life.built
        if day not in life.stale() and not life.lost(day) and life.there(day) and life.manifest(day).rows
    ]
    checked = life.rng.sample(sorted(fresh), min(2, len(fresh)))
    assert scratch(life.folder / "scratch", life.raw, life.definition, checked) == {
        day: life.manifest(day).data_digest for day in checked
    }


def test_sixty_days_of_a_feed(tmp_path):
    life = Life(tmp_path, 1)
    others = random.Random(2)  # readers and prunes: the feed's life is the same without them
    readers: list[tuple[int, Manifest]] = []  # since which day each holds the manifest that it reads
    for number in range(DAYS):
        today = add_days(FIRST, number)
        a_day_of_the_raw_folder(life, number, today)
        the_definition_is_edited(life, number)
        what_is_stale_is_named_and_nothing_else(life, number)
        builds_of_a_day(life, number, today)
        life.a_day_goes_by()
        readers = [(since, manifest) for since, manifest in readers if number - since < RETENTION_DAYS]
        readers += [(number, life.manifest(day)) for day in others.sample(sorted(life.built), min(2, len(life.built)))]
        if others.random() < 0.3:
            life.seen["pruned"] += life.prune()
        for _, manifest in readers:
            assert life.store.read(manifest).num_rows == manifest.rows
        what_is_fresh_is_what_a_build_from_nothing_gives(life)
    assert all(life.seen.values()), life.seen  # a life in which nothing happens shows nothing


def test_three_archived_days_and_a_harmless_key_leave_what_is_published_alone(tmp_path):
    raw, store = tmp_path / "raw", TableStore(str(tmp_path / "w"), "shop")
    raw.mkdir()
    days, rng = days_between(FIRST, add_days(FIRST, 3)), random.Random(0)
    for day in days[:3]:
        write_log(raw / f"{day}.csv", rng, [day])
    build(store, raw, shop(), days[2], "before", 3)
    publish(store, "before")
    before = {day: store.require("events", day) for day in days[:3]}
    assert all(m.rows for m in before.values())
    for day in days[:3]:
        (raw / f"{day}.csv").unlink()
    write_log(raw / f"{days[3]}.csv", rng, [days[3]])
    build(store, raw, shop("A title, and nothing else, is new"), days[3], "after", 4)
    assert store.staged_days("after", "events") == [days[3]]
    publish(store, "after")
    assert {day: store.require("events", day) for day in days[:3]} == before
    assert affected(store, shop(), RawLocation(str(raw))) == []
    # The partition of an archived day cannot be built; nor can one whose lookback the definition changes.
    for dt, definition in ((days[1], shop()), (days[3], shop(least=1))):
        with pytest.raises(StageError, match=rf"(?s)dt={days[1]}: .*gone: {days[1]}.csv.*--accept-loss DAY") as stopped:
            build(store, raw, definition, dt, f"stopped-{dt}", 4)
        assert ("--adopt-definition" in stopped.value.remedy) is (definition != shop()), (
            "where no definition changed there is none to adopt"
        )
    assert {s.dt: s.whole for s in affected(store, shop(least=1), RawLocation(str(raw)))} == {
        **dict.fromkeys(days[:3], False),
        days[3]: True,
    }
    build(store, raw, shop(least=1), days[3], "accepted", 4, tuple(days[:3]))
    publish(store, "accepted")
    assert [store.require("events", day).rows for day in days[:3]] == [0, 0, 0]
    assert store.require("events", days[0]).settings["accepted_loss"] == "yes"
    with pytest.raises(StageError, match="--accept-loss names 2023-12-01, which is no day of the lookback"):
        build(store, raw, shop(), days[3], "no", 4, ("2023-12-01",))


class CountingFiles(pafs.LocalFileSystem):
    """A local disk that counts how often each file is opened to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: collections.Counter[str] = collections.Counter()

    def open_input_stream(self, path, *more, **names):
        self.opened[str(path)] += 1
        return super().open_input_stream(path, *more, **names)


def test_a_daily_run_reads_each_manifest_of_its_lookback_once(tmp_path):
    """On an object store each read is a request; a lookback may have thousands of days."""
    raw, store = tmp_path / "raw", TableStore(str(tmp_path / "w"), "shop")
    raw.mkdir()
    days, rng = days_between(FIRST, add_days(FIRST, 5)), random.Random(0)
    for day in days:
        write_log(raw / f"{day}.csv", rng, [day])
    build(store, raw, shop(), days[4], "before", 5)
    publish(store, "before")
    store.fs = CountingFiles()
    build(store, raw, shop(), days[5], "after", 6)
    manifests = {path: count for path, count in store.fs.opened.items() if "/_manifests/events/" in path}
    assert len(manifests) == 5
    assert set(manifests.values()) == {1}, manifests


def test_a_late_file_of_an_archived_day_is_told_and_leaves_the_day_as_it_is(tmp_path, capsys):
    raw, store = tmp_path / "raw", TableStore(str(tmp_path / "w"), "shop")
    raw.mkdir()
    days, rng = days_between(FIRST, add_days(FIRST, 1)), random.Random(0)
    write_log(raw / f"{days[0]}.csv", rng, [days[0]])
    build(store, raw, shop(), days[0], "a", 2)
    publish(store, "a")
    (raw / f"{days[0]}.csv").unlink()
    write_log(raw / f"late-{days[0]}.csv", rng, [days[0]])
    write_log(raw / f"{days[1]}.csv", rng, [days[1]])
    before = store.require("events", days[0])
    build(store, raw, shop(), days[1], "b", 2)
    said = capsys.readouterr().out
    assert f"dt={days[0]}: late rows may have come, but the day can no longer be rebuilt whole" in said
    assert store.staged_days("b", "events") == [days[1]]
    publish(store, "b")
    assert store.require("events", days[0]) == before
    [stale] = affected(store, shop(), RawLocation(str(raw)))
    assert (stale.dt, stale.whole) == (days[0], False)
    assert "can no longer be rebuilt whole" in stale.because[0]
    from etl.ingest.affected import backfill_days, table

    assert backfill_days([stale], store) == []
    assert f"cannot be built again whole until their raw files are back: {days[0]}" in table([stale], store)


def test_a_file_without_days_in_its_name_is_parsed_once_for_all_its_days(tmp_path, monkeypatch):
    raw, store = tmp_path / "raw", TableStore(str(tmp_path / "w"), "shop")
    raw.mkdir()
    days, rng = days_between(FIRST, add_days(FIRST, 29)), random.Random(0)
    write_log(raw / "all.csv", rng, days, 20)
    definition, parsed = shop(dated=False, last_day=days[-1]), []
    monkeypatch.setattr(job, "_run", lambda *args: parsed.append(args[4].dt) or run_here(*args))
    first = build(store, raw, definition, days[9], "d9", 5)
    assert (first["rows_read"], first["events"], first["built_ahead"]) == (600, 100, 500)
    publish(store, "d9")
    assert store.days("events") == days[5:10]  # what waits is not published, and no gate sees it
    for dt in [*days[10:], *reversed(days[:9])]:
        summary = build(store, raw, definition, dt, f"d{dt}", 5)
        assert summary["rows_read"] == 0
        assert store.staged_manifest(f"d{dt}", "events", dt).rows == 20  # for the gates of this attempt
        publish(store, f"d{dt}")
    assert parsed == [days[9]]
    # A day that is published is taken from there; once none waits, all that did is dropped.
    assert build(store, raw, definition, days[0], "again", 5)["rows_read"] == 0
    assert store.staged_days(job.AHEAD, "events") == []
    assert scratch(tmp_path / "s", raw, definition, days) == {
        day: store.require("events", day).data_digest for day in days
    }
    assert affected(store, definition, RawLocation(str(raw))) == []


def test_days_that_wait_are_dropped_when_they_are_no_longer_what_would_be_built(tmp_path):
    raw, store = tmp_path / "raw", TableStore(str(tmp_path / "w"), "shop")
    raw.mkdir()
    days, rng = days_between(FIRST, add_days(FIRST, 5)), random.Random(0)
    write_log(raw / "all.csv", rng, days, 20)
    build(store, raw, shop(dated=False, last_day=days[-1]), days[0], "a", 1)
    publish(store, "a")
    assert store.staged_days(job.AHEAD, "events") == days[1:]
    changed = shop(dated=False, last_day=days[-1], least=20)
    assert build(store, raw, changed, days[1], "b", 1)["rows_read"] == 120
    publish(store, "b")
    write_log(raw / "all.csv", rng, days, 21)
    assert build(store, raw, changed, days[2], "c", 1)["rows_read"] == 126
    publish(store, "c")
    # A file of one that waits is damaged: it is built from the raw file.
    [file, *_] = store.staged_manifest(job.AHEAD, "events", days[3]).files
    path = Path(store.root) / file.path
    os.truncate(path, file.bytes - 1)
    assert build(store, raw, changed, days[3], "d", 1)["rows_read"] == 126
    publish(store, "d")
    assert build(store, raw, changed, days[4], "e", 1)["rows_read"] == 0
    publish(store, "e")
    # Days 0 and 1 were published by what was there then.
    assert {s.dt for s in affected(store, changed, RawLocation(str(raw)))} == set(days[:2])
    assert scratch(tmp_path / "s", raw, changed, days[2:5]) == {
        day: store.require("events", day).data_digest for day in days[2:5]
    }


def test_a_feed_that_starts_small_gets_the_buckets_of_its_lookback(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "BUCKET_BYTES", 1_000)
    raw, store = tmp_path / "raw", TableStore(str(tmp_path / "w"), "shop")
    raw.mkdir()
    days, rng = days_between(FIRST, add_days(FIRST, 8)), random.Random(0)
    buckets = {}
    for number, day in enumerate(days):
        write_log(raw / f"{day}.csv", rng, [day], 20 if number < 4 else 200)
        job.build_events(store, shop(), RawLocation(str(raw)), job.Build(day, day, 8, None, 1.0))
        publish(store, day)
        buckets[day] = store.require("events", day).settings["buckets"]
    # The first day knows that a lookback is eight such days; a feed that grew tenfold gets more with its first large
    # day.
    size = (raw / f"{days[0]}.csv").stat().st_size
    assert buckets[days[0]] == 1 << (8 * size // 1_000).bit_length() == buckets[days[3]]
    assert buckets[days[4]] >= 4 * buckets[days[3]]
    assert buckets[days[8]] == buckets[days[4]]

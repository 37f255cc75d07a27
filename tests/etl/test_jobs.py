"""The Spark jobs on small raw logs.

Reconciliation, equal bytes in any order, and failures that leave what is published alone.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from etl.datasets.definition import dataset
from etl.datasets.simulate import Simulation, write_simulation
from etl.ingest.affected import affected
from etl.ingest.build_events import Build, Judge, build_events
from etl.ingest.freshness import Action
from etl.ingest.raw import RawLocation
from etl.jobs.compact import compact
from etl.jobs.rebucket import rebucket
from etl.sequences.build_sequences import build_sequences
from etl.stage.errors import StageError
from etl.warehouse.buckets import Layout
from etl.warehouse.partitions import Window
from etl.warehouse.store import Manifest, TableStore

pytestmark = pytest.mark.spark

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "kuairand"
DT, EARLIER, DAYS, BUCKETS = "2022-04-11", "2022-04-10", 5, 2
NAME = "kuairand_simulated"


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "logs"
    write_simulation(Simulation(users=60, days=4, items=200, length_scale=0.01), folder)
    return folder


def ingest(
    warehouse: Path, raw: Path, dt: str, attempt: str, max_bad_share: float = 0.01, buckets: int = BUCKETS
) -> tuple[TableStore, dict[str, int]]:
    store = TableStore(str(warehouse), NAME)
    summary = build_events(
        store, dataset(NAME), RawLocation(str(raw)), Build(dt, attempt, DAYS, buckets, max_bad_share)
    )
    for table in ("quarantine", "events"):
        for day in store.staged_days(attempt, table):
            store.publish(attempt, table, day)
    return store, summary


def digests(store: TableStore, days: list[str]) -> dict[str, str]:
    return {day: store.require("events", day).data_digest for day in days}


def adds_up(summary: dict[str, int]) -> bool:
    parts = ("events", "duplicates", "quarantined", "outside_days", "already_published")
    return summary["rows_read"] == sum(summary[name] for name in parts)


@pytest.fixture(scope="module")
def built(tmp_path_factory, raw) -> tuple[TableStore, dict[str, int]]:
    return ingest(tmp_path_factory.mktemp("warehouse"), raw, DT, "whole")


def test_every_raw_row_is_an_event_a_duplicate_or_quarantined(built, raw):
    store, summary = built
    assert adds_up(summary)
    assert summary["rows_read"] == sum(len(p.read_text().splitlines()) - 1 for p in raw.glob("log_standard_*.csv"))
    assert summary["outside_days"] == summary["already_published"] == summary["quarantined"] == 0
    events = [store.require("events", day) for day in Window(DT, 2, DAYS).event_days]
    assert sum(m.rows for m in events) == summary["events"]
    assert all(
        m.counts["rows_read"] == m.counts["events"] + m.counts["duplicates"] + m.counts["quarantined"] for m in events
    )


def test_days_built_apart_in_another_order_have_the_same_digests(built, raw, tmp_path):
    store, _ = built
    other, first = ingest(tmp_path / "w", raw, EARLIER, "earlier")
    assert first["outside_days"] > 0
    _, second = ingest(tmp_path / "w", raw, DT, "later")
    assert second["already_published"] > 0
    assert adds_up(first)
    assert adds_up(second)
    days = Window(DT, 2, DAYS).event_days
    assert digests(other, days) == digests(store, days)


def test_a_day_is_built_again_when_a_file_that_may_hold_it_comes_later(built, raw, tmp_path):
    # The UTC day EARLIER ends in the next local day, hence in the next file.
    *_, last = sorted(raw.glob("log_standard_*.csv"))
    shutil.copytree(raw, tmp_path / "raw", ignore=shutil.ignore_patterns(last.name))
    store, _ = ingest(tmp_path / "w", tmp_path / "raw", EARLIER, "before")
    assert digests(store, [EARLIER]) != digests(built[0], [EARLIER])
    shutil.copy(last, tmp_path / "raw")
    _, summary = ingest(tmp_path / "w", tmp_path / "raw", DT, "after")
    assert adds_up(summary)
    days = Window(DT, 2, DAYS).event_days
    assert digests(store, days) == digests(built[0], days)
    # A file that is gone takes no published row with it.
    (tmp_path / "raw" / sorted(raw.glob("log_standard_*.csv"))[0].name).unlink()
    place = RawLocation(str(tmp_path / "raw"))
    manifest = store.require("events", EARLIER)
    assert Judge(dataset(NAME), place, place.logs(dataset(NAME)))(EARLIER, manifest).action is Action.FRESH
    keeping = dataset(NAME).model_copy(update={"logs": dataset(NAME).logs.model_copy(update={"repeats": "keep"})})
    assert Judge(keeping, place, place.logs(keeping))(EARLIER, manifest).action is Action.STOP


def test_sequences_are_the_same_bytes_on_a_re_run_and_fit_their_items(built, raw):
    store, _summary = built
    window = Window(DT, 3, DAYS)
    found = []
    for attempt in ("s1", "s2"):
        counts = build_sequences(store, dataset(NAME), RawLocation(str(raw)), window, attempt)
        found.append([store.publish(attempt, table, DT).data_digest for table in ("items", "sequences")])
    assert found[0] == found[1]
    items, sequences = store.read(store.require("items", DT)), store.read(store.require("sequences", DT))
    assert items["item_id"].to_pylist() == sorted(set(items["item_id"].to_pylist()))
    assert counts["targets"] == sum(len(t) for t in sequences["target_item_index"].to_pylist())
    assert all(len(fields) == 8 for fields in sequences["user_fields"].to_pylist())
    assert max(max(h, default=0) for h in sequences["history_item_index"].to_pylist()) < items.num_rows


def test_a_block_of_days_gives_the_same_bytes_and_is_left_alone_once_a_day_changes(built, raw, tmp_path):
    shutil.copytree(built[0].warehouse, tmp_path / "w")
    store = TableStore(str(tmp_path / "w"), NAME)
    days = Window(DT, 3, DAYS).event_days
    found = {}
    for attempt in ("days", "block"):
        if attempt == "block":
            block = compact(store, days[:-1], "compact")
            assert block.rows == sum(store.require("events", day).rows for day in days[:-1])
            assert block.counts["files_before"] > len(block.files) == BUCKETS
            assert [m.table for m in store.compacted([store.require("events", day) for day in days])] == [
                "event_blocks",
                "events",
            ]
        build_sequences(store, dataset(NAME), RawLocation(str(raw)), Window(DT, 3, DAYS), attempt)
        found[attempt] = [store.publish(attempt, table, DT).data_digest for table in ("items", "sequences")]
    assert found["days"] == found["block"]
    # A window that cuts the block, or a day that was built anew, reads the days themselves.
    assert [m.table for m in store.compacted([store.require("events", day) for day in days[1:]])] == ["events"] * (
        DAYS - 1
    )
    changed = [
        replace(m, files=m.files[1:]) if m.dt == EARLIER else m for m in (store.require("events", day) for day in days)
    ]
    assert [m.table for m in store.compacted(changed)] == ["events"] * DAYS
    with pytest.raises(StageError, match="dt=2022-04-30 of kuairand_simulated/events is not published"):
        compact(store, [DT, "2022-04-30"], "no")


def test_a_late_file_makes_its_days_stale_and_all_that_was_made_from_them(built, raw, tmp_path, capsys):
    shutil.copytree(built[0].warehouse, tmp_path / "w")
    shutil.copytree(raw, tmp_path / "raw")
    place = RawLocation(str(tmp_path / "raw"))
    store = TableStore(str(tmp_path / "w"), NAME)
    assert affected(store, dataset(NAME), RawLocation(str(raw))) == []
    build_sequences(store, dataset(NAME), place, Window(DT, 2, 3), "s")
    for table in ("items", "sequences"):
        store.publish("s", table, DT)
    store.write_staged_manifest(
        store.begin_try("again", ["events"], [EARLIER]),
        replace(store.require("events", EARLIER), attempt="again", files=()),
    )
    store.publish("again", "events", EARLIER)
    stale = affected(store, dataset(NAME), None)
    assert [(s.table, s.dt, s.because) for s in stale] == [
        (t, DT, (f"events/dt={EARLIER} was built again",)) for t in ("items", "sequences")
    ]
    # With the raw folder, which was moved meanwhile; copied files have another time of change, and the same bytes.
    *_, late = sorted((tmp_path / "raw").glob("log_standard_*.csv"))
    os.utime(late, ns=(1, 1))
    assert [s.table for s in affected(store, dataset(NAME), place)] == ["items", "sequences"]
    changed_definition = dataset(NAME).model_copy(
        update={"logs": dataset(NAME).logs.model_copy(update={"repeats": "keep"})}
    )
    assert affected(store, changed_definition, RawLocation(str(raw)))[0].because == ("the definition changed",)
    with pytest.raises(StageError, match="no day of kuairand_simulated is published"):
        affected(TableStore(str(tmp_path / "typo"), NAME), dataset(NAME), None)
    # A file delivered again, of the same size.
    late.write_bytes(late.read_bytes().replace(b",1,", b",0,", 1))
    changed = [s for s in affected(store, dataset(NAME), place) if s.table == "events"]
    assert DT in {s.dt for s in changed}
    assert "2022-04-08" not in {s.dt for s in changed}
    assert {(s.because, s.whole) for s in changed} == {((f"raw files changed: {late.name}",), True)}
    done = run_cli("etl.ingest.affected", "--dataset", NAME, "--warehouse", store.warehouse, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["backfill"] == [[DT, DT]]


def test_days_that_a_neighbour_publishes_while_sequences_are_built_change_nothing_of_them(
    built, raw, tmp_path, monkeypatch
):
    """The job reads the days that were published when it began, though their files have moved meanwhile."""
    shutil.copytree(built[0].warehouse, tmp_path / "w")
    store = TableStore(str(tmp_path / "w"), NAME)
    days = Window(DT, 2, 3).event_days
    before = {f"events/dt={day}": store.require("events", day).data_digest for day in days}

    def staged(attempt: str) -> list[Manifest]:
        build_sequences(store, dataset(NAME), RawLocation(str(raw)), Window(DT, 2, 3), attempt)
        return [store.staged_manifest(attempt, table, DT) for table in ("items", "sequences")]

    def publish_first(name: str, day: str) -> None:
        """Let a neighbour publish another `day`, with a file less, right before the job calls a function."""
        called = getattr(module, name)

        def calls(*given):
            work = store.begin_try(f"neighbour-{day}", ["events"], [day])
            current = store.require("events", day)
            store.write_staged_manifest(work, replace(current, attempt=work.attempt, files=current.files[1:]))
            store.publish(work.attempt, "events", day)
            return called(*given)

        monkeypatch.setattr(module, name, calls)

    module = importlib.import_module("etl.sequences.build_sequences")
    calm = staged("calm")
    publish_first("spark_session", EARLIER)  # what is published is known, and nothing read
    publish_first("item_rows", DT)  # events are read once for the items, and once more for the rows
    meanwhile = staged("meanwhile")
    monkeypatch.undo()
    assert [m.data_digest for m in meanwhile] == [m.data_digest for m in calm]
    assert meanwhile[1].inputs == before
    for table in ("items", "sequences"):
        store.publish("meanwhile", table, DT)
    stale = affected(store, dataset(NAME), None)
    assert {(s.table, s.dt) for s in stale} == {("items", DT), ("sequences", DT)}
    assert {*stale[0].because} == {f"events/dt={day} was built again" for day in (EARLIER, DT)}


def broken_copy(raw: Path, folder: Path, every: int) -> int:
    """Copy the logs with every n-th line of one file cut; return how many lines were cut."""
    shutil.copytree(raw, folder)
    path = sorted(folder.glob("log_standard_*.csv"))[-1]
    lines = path.read_text().splitlines()
    cut = range(every, len(lines), every)
    for index in cut:
        lines[index] = ",".join([*lines[index].split(",")[:12], "soon", *lines[index].split(",")[13:]])
    path.write_text("\n".join(lines) + "\n")
    return len(cut)


def test_broken_rows_are_quarantined_with_file_row_and_reason(raw, tmp_path):
    cut = broken_copy(raw, tmp_path / "raw", every=400)
    store, summary = ingest(tmp_path / "w", tmp_path / "raw", DT, "broken")
    assert summary["quarantined"] == cut > 0
    assert adds_up(summary)
    refused = [
        r
        for day in Window(DT, 2, DAYS).event_days
        if (m := store.manifest("quarantine", day))
        for r in store.read(m).to_pylist()
    ]
    assert sorted(r["row_number"] for r in refused) == [400 * (i + 1) + 1 for i in range(cut)]
    assert {r["reason"] for r in refused} == {"not_an_integer: play_time_ms='soon'"}


def test_a_cut_archive_stops_the_stage(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    path = sorted((tmp_path / "raw").glob("log_standard_*.csv"))[-1]
    whole = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(StageError, match=r"damaged: log_standard_.*csv.gz: truncated_gzip"):
        ingest(tmp_path / "w", tmp_path / "raw", DT, "cut")


def test_a_cut_archive_stops_the_stage_also_when_the_first_day_of_its_name_is_not_built(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    path = sorted((tmp_path / "raw").glob("log_standard_*.csv"))[0]  # 4_08 .. 4_10; only 4_10 is built
    whole = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(whole[: len(whole) * 2 // 3])
    store = TableStore(str(tmp_path / "w"), NAME)
    with pytest.raises(StageError, match=r"damaged: log_standard_.*csv.gz: truncated_gzip"):
        build_events(store, dataset(NAME), RawLocation(str(tmp_path / "raw")), Build(EARLIER, "cut", 1, BUCKETS, 0.01))
    assert store.staged_days("cut", "events") == []


def test_lines_without_a_day_count_against_the_share_of_refused_rows_whatever_the_lookback(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    path = sorted((tmp_path / "raw").glob("log_standard_*.csv"))[0]  # 4_08 .. 4_10; only 4_10 is built
    header, *rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + b"".join(b"garbage\n" if i % 2 else row for i, row in enumerate(rows)))
    store = TableStore(str(tmp_path / "w"), NAME)
    with pytest.raises(StageError, match=r"raw rows read .* were refused.*wrong_column_count"):
        build_events(store, dataset(NAME), RawLocation(str(tmp_path / "raw")), Build(EARLIER, "bad", 1, BUCKETS, 0.01))
    assert store.staged_days("bad", "events") == []


@pytest.mark.parametrize(
    "buckets", [pytest.param(1, marks=pytest.mark.slow), pytest.param(BUCKETS + 1, marks=pytest.mark.slow), 2 * BUCKETS]
)
def test_days_in_different_buckets_are_read_together_until_they_are_cut_alike(built, raw, tmp_path, buckets):
    shutil.copytree(built[0].warehouse, tmp_path / "w")
    store, window = TableStore(str(tmp_path / "w"), NAME), Window(DT, 2, DAYS)

    def sequences(attempt: str) -> list[dict]:
        """Build and publish; return every user's row, in no order of buckets."""
        build_sequences(store, dataset(NAME), RawLocation(str(raw)), window, attempt)
        manifests = [store.publish(attempt, table, DT) for table in ("items", "sequences")]
        rows = store.read(manifests[1]).to_pylist()
        assert len({row["user_id"] for row in rows}) == len(rows)
        return [manifests[0].data_digest, *sorted(rows, key=lambda row: row["user_id"])]

    alike = sequences("alike")
    build_events(store, dataset(NAME), RawLocation(str(raw)), Build(DT, "other", 1, buckets, 0.01))
    cut_otherwise = store.publish("other", "events", DT)
    # A day as an earlier version has cut it.
    old = Layout(buckets, "product")
    for_old = store.read(store.require("events", EARLIER))
    bucket = old.bucket_of(for_old["user_id"].to_numpy())
    work = store.begin_try("old", ["events"], [EARLIER])
    files = tuple(
        store.write_file(work, "events", EARLIER, b, for_old.filter(pa.array(bucket == b)).sort_by("user_id"))
        for b in sorted(set(bucket.tolist()))
    )
    settings = {
        name: value for name, value in store.require("events", EARLIER).settings.items() if name != "bucket_hash"
    } | {"buckets": buckets}
    store.write_staged_manifest(
        work, replace(store.require("events", EARLIER), attempt="old", files=files, settings=settings)
    )
    store.publish("old", "events", EARLIER)
    assert sequences("mixed") == alike
    block = compact(store, window.event_days[:-1], "compact")
    assert block.rows == sum(store.require("events", day).rows for day in window.event_days[:-1])
    assert sequences("block") == alike
    # Cut alike, they are the bytes of a build with so many buckets, and what was made of them is not stale.
    rebucket(store, dataset(NAME), window.event_days, "cut", buckets)
    assert store.require("events", DT).data_digest == cut_otherwise.data_digest
    whole, _ = ingest(tmp_path / "fresh", raw, DT, "fresh", buckets=buckets)
    days = [day for day in window.event_days if day != EARLIER]  # its users were sorted, nothing else
    assert digests(store, days) == digests(whole, days)
    assert not [
        s
        for s in affected(store, dataset(NAME), RawLocation(str(raw)))
        if s.table == "sequences" and DT not in s.because[0] and EARLIER not in s.because[0]
    ]
    assert rebucket(store, dataset(NAME), window.event_days, "again", buckets) == []
    assert sequences("cut") == alike


def run_cli(*words: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def test_too_many_broken_rows_stop_the_stage_and_leave_what_is_published(built, raw, tmp_path):
    store, _ = built
    before = digests(store, [DT])
    broken_copy(raw, tmp_path / "raw", every=5)
    done = run_cli(
        "etl.jobs.events",
        "--dataset",
        NAME,
        "--warehouse",
        store.warehouse,
        "--dt",
        DT,
        "--attempt",
        "bad",
        "--raw",
        str(tmp_path / "raw"),
        "--lookback-days",
        str(DAYS),
        "--buckets",
        str(BUCKETS),
    )
    assert done.returncode == 2
    assert "not_an_integer" in done.stderr
    assert "_sim.csv" in done.stderr
    assert "remedy:" in done.stderr
    assert "Traceback" not in done.stderr
    assert digests(store, [DT]) == before
    assert store.staged_days("bad", "events") == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--raw": "/nowhere/at/all"}, "the raw folder /nowhere/at/all does not exist"),
        ({"--dataset": "kuairnd"}, "unknown data set 'kuairnd'"),
        ({"--dt": "2022-4-1"}, "'2022-4-1' is not a day"),
        ({"--dt": "2022-06-01"}, "covers dt=2022-06-01"),
        ({"--dataset": "kuairand"}, "use --dataset kuairand_simulated"),
    ],
)
def test_wrong_arguments_give_one_clear_message_before_spark_starts(raw, tmp_path, changes, says):
    words = {"--dataset": NAME, "--warehouse": str(tmp_path), "--dt": DT, "--attempt": "x", "--raw": str(raw)} | changes
    done = run_cli("etl.jobs.events", *[word for pair in words.items() for word in pair])
    assert done.returncode == 2
    assert says in done.stderr
    assert "remedy:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_day_without_a_row_says_what_the_files_hold(raw, tmp_path):
    with pytest.raises(
        StageError,
        match=r"no row for dt=2022-04-07 .*\(log_standard_4_08_to_4_10_sim.csv\) hold 2022-04-08 \.\. 2022-04-10",
    ):
        ingest(tmp_path, raw, "2022-04-07", "none")


def test_sequences_of_a_day_that_was_never_ingested_name_it(built, raw):
    with pytest.raises(StageError, match="dt=2022-04-05 of kuairand_simulated/events is not published"):
        build_sequences(built[0], dataset(NAME), RawLocation(str(raw)), Window(DT, 2, 7), "x")


@pytest.mark.skipif(not REAL.exists(), reason=f"the real KuaiRand rows are not at {REAL}")
def test_all_real_kuairand_rows_are_accounted_for(tmp_path):
    store = TableStore(str(tmp_path), "kuairand")
    summary = build_events(store, dataset("kuairand"), RawLocation(str(REAL)), Build("2022-04-21", "real", 30, 4, 0.01))
    assert summary == {
        "rows_read": 41_828,
        "events": 41_712,
        "duplicates": 116,
        "quarantined": 0,
        "outside_days": 0,
        "built_ahead": 0,
        "already_published": 0,
    }
    staged: list[Manifest] = [
        store.staged_manifest("real", "events", day) for day in store.staged_days("real", "events")
    ]
    assert sum(m.rows for m in staged) == 41_712

"""What nothing needs any more goes, what is published stays: by age, on a disk and on S3, dry, killed, beside
publishers.

.venv/bin/python -m pytest tests/etl/warehouse/test_retention.py -q
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from dataclasses import replace

import pyarrow.fs as pafs
import pytest

from etl.warehouse import retention
from etl.warehouse.retention import Cutoffs, Lineage, Removed, prune_partitions, prune_staging
from etl.warehouse.store import Manifest, TableStore
from tests.etl.test_cluster import s3  # noqa: F401  (a fixture)
from tests.etl.warehouse import test_publication
from tests.etl.warehouse.test_publication import texts, whole
from tests.etl.warehouse.test_store import DT, rows, stage, staged_manifest

EARLIER_MS, LATER_MS = 1_700_000_000_000, 4_102_444_800_000  # years before and after now
OLD = Cutoffs(LATER_MS, LATER_MS)
NOTHING = Lineage()
store = test_publication.store
locally = pytest.mark.parametrize("store", ["local"], indirect=True)  # where nothing hangs on the store


def everything(store: TableStore) -> set[str]:
    infos = store.fs.get_file_info(pafs.FileSelector(store.root, recursive=True, allow_not_found=True))
    return {info.path[len(store.root) + 1 :] for info in infos if info.type == pafs.FileType.File}


def published(store: TableStore, *names: str) -> list[Manifest]:
    """Publish the partition so often, each time with other rows; return the manifests."""
    done = []
    for name in names:
        stage(store, name, name)
        done.append(store.publish(name, "quarantine", DT))
    return done


def pruned(
    store: TableStore, cutoffs: Cutoffs = OLD, lineage: Lineage = NOTHING, dry_run: bool = False
) -> list[Removed]:
    said: list[str] = []
    removed = prune_partitions(store, cutoffs, lineage, dry_run, said.append)
    assert said == []
    return removed


def kept_history(store: TableStore) -> int:
    return sum("/history/" in path for path in everything(store))


def test_what_was_published_before_goes_by_age_and_what_is_published_stays(store):
    first, second, current = published(store, "one", "two", "three")
    before = everything(store)
    recent = Cutoffs(EARLIER_MS, EARLIER_MS)
    assert pruned(store, recent) == pruned(store, Cutoffs(None, None)) == []
    assert (texts(store, first), texts(store, second)) == ({"one"}, {"two"})  # a reader that began before
    would = pruned(store, dry_run=True)
    assert everything(store) == before
    assert pruned(store) == would
    sizes = sum(file.bytes for manifest in (first, second) for file in manifest.files)
    assert [(one.kind, one.name, one.files) for one in would] == [
        ("history", f"quarantine/dt={DT}", 2),
        ("superseded", f"quarantine/dt={DT}", 2),
    ]
    assert would[1].bytes == sizes
    assert {path for path in before - everything(store) if "/history/" not in path} == {
        f"_superseded/{file.path}" for m in (first, second) for file in m.files
    }
    assert (store.require("quarantine", DT), texts(store, current), kept_history(store)) == (current, {"three"}, 1)
    assert whole(store, current)
    assert pruned(store) == []
    # Rows of before are published again as any others.
    stage(store, "again", "one")
    assert texts(store, store.publish("again", "quarantine", DT)) == {"one"}


@locally
def test_files_go_and_the_history_stays_where_it_never_goes(store):
    published(store, "one", "two")
    assert [one.kind for one in pruned(store, Cutoffs(LATER_MS, None))] == ["superseded"]
    assert kept_history(store) == 2


def test_a_file_that_is_published_again_is_not_taken_for_a_superseded_one(store):
    one, _, again = *published(store, "one", "two"), None
    stage(store, "again", "one")
    again = store.publish("again", "quarantine", DT)
    assert again.files == one.files
    pruned(store)
    assert (whole(store, again), store.require("quarantine", DT)) == (True, again)


def publish_table(store: TableStore, table: str, attempt: str, text: str, **more) -> Manifest:
    work = store.begin_try(attempt, [table], [DT])
    file = store.write_file(work, "quarantine", DT, 0, rows(text))
    path = f"{work.partition_dir(table, DT)}/bucket=000/part.parquet"
    store.fs.create_dir(f"{store.root}/{path.rpartition('/')[0]}", recursive=True)
    store.fs.move(f"{store.root}/{file.path}", f"{store.root}/{path}")
    manifest = replace(staged_manifest(attempt, replace(file, path=path)), table=table, **more)
    store.write_staged_manifest(work, manifest)
    return store.publish(attempt, table, DT)


@locally
def test_what_models_were_trained_on_and_serve_stays(store):
    """A registered version.

    Its sequences and items with their files, the manifests of its events, its caches while it is served.
    """
    tables: dict[str, list[Manifest]] = {"events": [], "items": [], "sequences": [], "user_caches": []}
    for version, attempt in enumerate(("x.1", "y.2", "z.3"), 1):
        tables["events"].append(publish_table(store, "events", attempt, f"events {attempt}"))
        tables["items"].append(publish_table(store, "items", attempt, f"items {attempt}"))
        inputs = {f"events/dt={DT}": tables["events"][-1].data_digest}
        tables["sequences"].append(publish_table(store, "sequences", attempt, f"sequences {attempt}", inputs=inputs))
        caches = publish_table(
            store, "user_caches", attempt, f"caches {attempt}", settings={"model_version": f"vql/{version}"}
        )
        tables["user_caches"].append(caches)
    lineage = Lineage(3, frozenset([tables["sequences"][1].data_digest]), frozenset(["vql/2"]), frozenset(["y.2"]))
    removed = pruned(store, OLD, lineage)
    assert {(one.kind, one.name.split("/")[0], one.files) for one in removed} == {
        ("history", "events", 1),
        ("history", "items", 1),
        ("history", "sequences", 1),
        ("history", "user_caches", 1),
        ("superseded", "events", 2),
        ("superseded", "items", 1),
        ("superseded", "sequences", 1),
        ("superseded", "user_caches", 1),
    }
    for table in ("items", "sequences", "user_caches"):
        assert [texts(store, manifest) for manifest in tables[table][1:]] == [
            {f"{'caches' if 'user' in table else table} {a}"} for a in ("y.2", "z.3")
        ]
    histories = {path.split("/")[-1].split(".")[0] for path in everything(store) if "/history/" in path}
    assert histories == {manifest.data_digest for found in tables.values() for manifest in found[1:]}
    assert pruned(store, OLD, lineage) == []
    # A version that was deleted needs nothing.
    assert {one.kind for one in pruned(store)} == {"history", "superseded"}
    assert [texts(store, found[-1]) for found in tables.values()] == [
        {"events z.3"},
        {"items z.3"},
        {"sequences z.3"},
        {"caches z.3"},
    ]


class Killed(BaseException):
    pass


def test_a_prune_that_is_killed_leaves_what_is_published_and_the_next_one_ends_it(store, monkeypatch):
    *_, current = published(store, *(f"n{number}" for number in range(4)))
    there = everything(store)
    gone = {
        path for path in there if "_superseded" in path or ("/history/" in path and current.data_digest not in path)
    }
    delete, kills = retention._delete, 0

    def killed(store, infos):
        delete(store, infos[:1])
        if len(infos) > 1:
            raise Killed

    monkeypatch.setattr(retention, "_delete", killed)
    while True:
        try:
            pruned(store)
            break
        except Killed:
            kills += 1
        assert store.require("quarantine", DT) == current
        assert whole(store, current)
        for path in (path for path in everything(store) if "/history/" in path):
            assert texts(store, store.manifest_at(path)), "a manifest of the history outlives none of its files"
    assert kills == 4
    assert everything(store) == there - gone


def test_who_publishes_between_the_look_and_the_removal_waits_or_loses_nothing(store, monkeypatch):
    """On a disk nobody can.

    On S3 the bytes that are to go are published and superseded once more, and somebody reads them.
    """
    published(store, "a", "b")
    delete, again, waits = retention._delete, [], []

    def meanwhile(pruned_store, infos):
        if isinstance(store.fs, pafs.LocalFileSystem):
            with open(f"{store.root}/_manifests/quarantine/dt={DT}/current.json.lock") as lock:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                waits.append(lock)
        elif "_superseded" in infos[0].path:
            time.sleep(1.1)  # S3 gives times in seconds
            for name, text in (("again", "a"), ("newest", "c")):
                stage(store, name, text)
                again.append(store.publish(name, "quarantine", DT))
        delete(pruned_store, infos)

    monkeypatch.setattr(retention, "_delete", meanwhile)
    pruned(store)
    assert waits or again
    for manifest, text in zip(again, ("a", "c"), strict=False):
        assert texts(store, manifest) == {text}


@locally
def test_publications_beside_a_prune_stay_whole(store):
    """Everything is old at once here, which no data set can say: even so what is published is whole, always."""
    published(store, "a", "b")
    stop, wrong, rounds = threading.Event(), [], []

    def prune_on() -> None:
        mine = TableStore(store.warehouse, "kuairand")
        while not stop.is_set():
            prune_partitions(mine, OLD, NOTHING, False, wrong.append)
            prune_staging(mine, 0, (), False)
            rounds.append(1)

    thread = threading.Thread(target=prune_on)
    thread.start()
    try:
        for number in range(12):
            stage(store, f"n{number}", "ab"[number % 2])  # the same bytes come back again and again
            current = store.publish(f"n{number}", "quarantine", DT)
            assert (store.require("quarantine", DT), whole(store, current)) == (current, True)
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert rounds
    assert {path for path in everything(store) if path.startswith(f"quarantine/dt={DT}/")} == {
        file.path for file in current.files
    }


@locally
def test_a_damaged_history_is_said_and_its_partition_left_alone(store):
    published(store, "one", "two")
    [old] = [
        path
        for path in everything(store)
        if "/history/" in path and store.require("quarantine", DT).data_digest not in path
    ]
    store.write_text(old, "{")
    before, said = everything(store), []
    assert prune_partitions(store, OLD, NOTHING, False, said.append) == []
    assert f"quarantine/dt={DT} is left as it is: the manifest {store.root}/{old} is cut or garbled" in said[0]
    assert everything(store) == before


def test_what_ended_attempts_have_staged_goes_by_age(store):
    for attempt in ("old", "running"):
        stage(store, attempt, attempt)
    store.write_text("_staging/zombie/try-0001-00000000/quarantine/late.parquet", "a folder without a record")
    before = everything(store)
    assert prune_staging(store, EARLIER_MS, (), False) == []
    would = prune_staging(store, LATER_MS, ("running",), True)
    assert everything(store) == before
    assert prune_staging(store, LATER_MS, ("running",), False) == would
    assert [(one.kind, one.name, one.files) for one in would] == [("staging", "old", 3), ("staging", "zombie", 1)]
    assert {path.split("/")[1] for path in everything(store)} == {"running"}
    assert store.tries("old") == []
    assert texts(store, store.publish("running", "quarantine", DT)) == {"running"}
    if isinstance(store.fs, pafs.LocalFileSystem):
        assert os.listdir(f"{store.root}/_staging") == ["running"]

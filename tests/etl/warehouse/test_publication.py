"""What is published is what was judged, by one publisher at a time, readable for years: real processes, a real S3
server.

.venv/bin/python -m pytest tests/etl/warehouse/test_publication.py -q
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pytest

from etl.quality.judge import audit
from etl.quality.judge.audit import Audit
from etl.quality.measure.partition import Partition
from etl.stage.errors import StageError
from etl.warehouse.manifests import CHECKSUM, checksum
from etl.warehouse.schemas import EVENTS, QUARANTINE
from etl.warehouse.store import Manifest, Staged, TableStore, Try
from tests.etl.quality.test_audit import stage_events
from tests.etl.test_cluster import BUCKET, s3  # noqa: F401  (a fixture)
from tests.etl.warehouse.test_store import DT, rows, stage, staged_manifest
from tests.waiting import wait_for

DATASET = "kuairand_simulated"


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> TableStore:
    if request.param == "local":
        return TableStore(str(tmp_path / "warehouse"), "kuairand")
    return TableStore(f"s3://{BUCKET}/{tmp_path.name}{request.getfixturevalue('s3')}", "kuairand")


def texts(store: TableStore, manifest: Manifest) -> set[str]:
    return set(store.read(manifest)["raw_text"].to_pylist())


def whole(store: TableStore, manifest: Manifest) -> bool:
    bodies = [store.fs.open_input_file(f"{store.root}/{file.path}").read() for file in manifest.files]
    return [hashlib.sha256(body).hexdigest() for body in bodies] == [file.digest for file in manifest.files]


# ---- two publishers
# ----------------------------------------------------------------------------------------------------


def test_of_two_publishers_that_began_from_the_same_state_the_second_fails_and_loses_nothing(store):
    stage(store, "a", "one")
    store.publish("a", "quarantine", DT)
    stage(store, "b", "two")
    stage(store, "c", "three")
    winner = store.publish("b", "quarantine", DT)
    with pytest.raises(
        StageError,
        match=(
            rf"quarantine/dt={DT} changed while attempt c .*attempt b published {winner.data_digest[:16]}[\s\S]*same"
            r" --attempt"
        ),
    ):
        store.publish("c", "quarantine", DT)
    assert store.require("quarantine", DT) == winner
    assert texts(store, store.staged_manifest("c", "quarantine", DT)) == {"three"}
    stage(store, "c", "three")  # what the remedy says
    assert texts(store, store.publish("c", "quarantine", DT)) == {"three"}


def test_the_first_publication_of_a_day_is_conditional_too(store):
    stage(store, "a", "one")
    stage(store, "b", "two")
    store.publish("a", "quarantine", DT)
    with pytest.raises(StageError, match="from nothing published: attempt a published"):
        store.publish("b", "quarantine", DT)


def test_the_same_data_from_a_neighbour_is_no_conflict(store):
    stage(store, "a", "one")
    stage(store, "b", "one")
    assert store.publish("a", "quarantine", DT).data_digest == store.publish("b", "quarantine", DT).data_digest
    assert store.require("quarantine", DT).attempt == "b"


def publish_in_a_process(warehouse: str, attempt: str, start: str, out: str) -> None:
    store = TableStore(warehouse, "kuairand")
    while not Path(start).exists():
        time.sleep(0.001)
    try:
        store.publish(attempt, "quarantine", DT)
        said = "published"
    except StageError as error:
        said = str(error)
    Path(out, attempt).write_text(said)


def test_publishers_at_the_same_moment_leave_one_winner(store, tmp_path):
    """Spawned processes: whoever wins, the others say so, and what is published is one of them, whole."""
    stage(store, "before", "before")
    store.publish("before", "quarantine", DT)
    names = [f"p{n}" for n in range(4)]
    for name in names:
        stage(store, name, name)
    (tmp_path / "out").mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=publish_in_a_process, args=(store.warehouse, name, str(tmp_path / "go"), str(tmp_path / "out"))
        )
        for name in names
    ]
    for process in processes:
        process.start()
    (tmp_path / "go").touch()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    said = {name: (tmp_path / "out" / name).read_text() for name in names}
    [winner] = [name for name, text in said.items() if text == "published"]
    assert all(f"attempt {winner} published" in text for name, text in said.items() if name != winner)
    published = store.require("quarantine", DT)
    assert texts(store, published) == {winner}
    assert whole(store, published)
    assert {info.path for info in files_of(store, f"quarantine/dt={DT}")} == {
        f"{store.root}/{file.path}" for file in published.files
    }


# ---- a zombie
# ----------------------------------------------------------------------------------------------------------


def zombie(warehouse: str, work: Try, begun: str, stop: str) -> None:
    """A try that outlived its retry.

    Writes its files and its manifest over and over, and begins again when the retry took its folder away meanwhile.
    """
    store = TableStore(warehouse, DATASET)
    count = 0
    while not Path(stop).exists():
        with contextlib.suppress(FileNotFoundError):
            write_as_zombie(store, work, count)
        count += 1
        if count == 2:
            Path(begun).touch()


def write_as_zombie(store: TableStore, work: Try, count: int) -> None:
    manifest = replace(staged_manifest(work.attempt), dataset=DATASET)
    file = store.write_file(work, "quarantine", DT, 0, rows(f"zombie {count}"))
    store.write_staged_manifest(work, replace(manifest, files=(file,)))
    table = pa.table({name: [0] * 3 for name in EVENTS.names}).cast(EVENTS)
    event_files = tuple(store.write_file(work, "events", DT, bucket, table) for bucket in (0, 1))
    store.write_staged_manifest(work, replace(manifest, table="events", files=event_files))


def test_a_zombie_that_goes_on_writing_changes_nothing_that_is_published(tmp_path):
    store = TableStore(str(tmp_path / "warehouse"), DATASET)
    work = store.begin_try("retried", ("quarantine", "events"), [DT])
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=zombie, args=(store.warehouse, work, str(tmp_path / "begun"), str(tmp_path / "stop"))
    )
    process.start()
    try:
        wait_for("first writes of the zombie", lambda: (tmp_path / "begun").exists())
        assert store.staged_days("retried", "events") == [DT], "the first try is whole, until its retry begins"
        retry = stage_events(store, "retried")
        gate = [
            "--dataset",
            DATASET,
            "--warehouse",
            store.warehouse,
            "--dt",
            DT,
            "--attempt",
            "retried",
            "--stage",
            "events",
            "--reports",
            str(tmp_path / "reports"),
        ]
        audit.main(gate)
        published = store.require("events", DT)
        assert published.data_digest == retry.data_digest
        before = mtime(store, work)
        wait_for("write of the zombie", lambda: mtime(store, work) > before or not process.is_alive())
        assert process.is_alive(), "it still writes, after the publication"
        audit.main(gate)
        assert process.is_alive()
    finally:
        (tmp_path / "stop").touch()
        process.join(60)
    for table in ("events", "quarantine"):
        manifest = store.require(table, DT)
        assert whole(store, manifest)
        assert {info.path for info in files_of(store, f"{table}/dt={DT}")} == {
            f"{store.root}/{file.path}" for file in manifest.files
        }
    assert store.require("events", DT) == published
    assert store.staged_days("retried", "events") == []


def mtime(store: TableStore, work: Try) -> int:
    path = Path(store.root, work.partition_dir("events", DT), "manifest.json")
    return path.stat().st_mtime_ns if path.exists() else 0


def test_a_file_overwritten_between_judgement_and_publication_is_refused(tmp_path, monkeypatch):
    store = TableStore(str(tmp_path / "warehouse"), DATASET)
    stage_events(store, "first")
    gate = Audit(Partition(store, _definition(), DT, "first"))
    gate.publish("events")
    before = {table: store.require(table, DT) for table in ("events", "quarantine")}
    staged = stage_events(store, "second")
    write = Audit._write_judgement

    def then_overwrite(self: Audit, judged: list[Staged], *more) -> None:
        write(self, judged, *more)
        path = Path(store.root, staged.files[1].path)
        path.write_bytes(Path(store.root, staged.files[0].path).read_bytes())

    monkeypatch.setattr(Audit, "_write_judgement", then_overwrite)
    with pytest.raises(StageError, match=rf"{staged.files[1].path} of table events dt={DT} has"):
        Audit(Partition(store, _definition(), DT, "second")).publish("events")
    assert {table: store.require(table, DT) for table in before} == before
    assert all(whole(store, manifest) for manifest in before.values())


def _definition():
    from etl.datasets.definition import dataset

    return dataset(DATASET)


# ---- the manifest
# ------------------------------------------------------------------------------------------------------


def damaged(store: TableStore, change: Callable[[str], str]) -> Path:
    stage(store, "a", "one")
    store.publish("a", "quarantine", DT)
    path = Path(store.root, f"_manifests/quarantine/dt={DT}/current.json")
    path.write_text(change(path.read_text()))
    return path


def with_keys(**keys) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **keys})


def of_tomorrow(text: str) -> str:
    content = {**json.loads(text), "signed_by": "somebody"}  # a key that this version does not know
    return json.dumps({**content, CHECKSUM: checksum(content)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "", "is empty"),
        (lambda text: text[: len(text) // 2], "is cut or garbled"),
        (lambda text: "\x00" * len(text), "is cut or garbled"),
        (lambda text: "[]", "is cut or garbled"),
        (lambda text: json.dumps({"files": []}), "is garbled"),
        (with_keys(files=[{"path": "x"}]), "is garbled"),
        (with_keys(files=None), "is garbled"),
        (with_keys(files=[]), "says 3 rows .*, its files have 0 rows"),
        (with_keys(data_digest="0" * 64), "says 3 rows and the data digest 0000"),
        (with_keys(format_version="one"), "is cut or garbled"),
        (with_keys(settings=["raw_files"]), "is garbled: settings is"),
        (with_keys(counts={"quarantined": 99}), "was changed after it was written"),
        (with_keys(inputs={"log.csv": "sha256:0"}), "was changed after it was written"),
        (with_keys(settings={"buckets": 7}), "was changed after it was written"),
        (with_keys(attempt="b"), "was changed after it was written"),
    ],
)
def test_a_damaged_pointer_names_its_path_and_the_history_that_mends_it(tmp_path, change, says):
    store = TableStore(str(tmp_path / "warehouse"), "kuairand")
    path = damaged(store, change)
    with pytest.raises(
        StageError, match=rf"{path} {says}[\s\S]*remedy: copy the newest good manifest of .*/history over it"
    ):
        store.require("quarantine", DT)
    [remembered] = (path.parent / "history").iterdir()  # and that repairs it
    path.write_text(remembered.read_text())
    assert texts(store, store.require("quarantine", DT)) == {"one"}


def test_a_manifest_of_another_version(tmp_path):
    store = TableStore(str(tmp_path / "warehouse"), "kuairand")
    damaged(store, with_keys(format_version=2))
    with pytest.raises(StageError, match=r"was written by a newer longview: format_version 2[\s\S]*update longview"):
        store.require("quarantine", DT)
    path = damaged(TableStore(str(tmp_path / "other"), "kuairand"), of_tomorrow)
    other = TableStore(str(tmp_path / "other"), "kuairand")
    assert texts(other, other.require("quarantine", DT)) == {"one"}
    path.write_text(
        json.dumps(
            {
                name: value
                for name, value in json.loads(path.read_text()).items()
                if name not in ("format_version", CHECKSUM)
            }
        )
    )  # of yesterday
    assert texts(other, other.require("quarantine", DT)) == {"one"}


def test_history_keeps_every_manifest_of_every_attempt(store):
    for attempt, text in (("a", "one"), ("b", "two"), ("c", "one")):
        stage(store, attempt, text)
        store.publish(attempt, "quarantine", DT)
    remembered = [
        json.loads(store.read_text(info.path[len(store.root) + 1 :]))
        for info in files_of(store, f"_manifests/quarantine/dt={DT}/history")
    ]
    assert sorted(manifest["attempt"] for manifest in remembered) == ["a", "b", "c"]
    for manifest in remembered:  # all of them can still be read
        read = Manifest.from_json(json.dumps(manifest), "history", "")
        assert texts(store, read) == {"two" if read.attempt == "b" else "one"}


def test_files_and_folders_are_on_the_disk_before_the_pointer_moves(tmp_path, monkeypatch):
    store = TableStore(str(tmp_path / "warehouse"), "kuairand")
    stage(store, "a", "one")
    done: list[str] = []
    fsync, move = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    def moved(source, target) -> None:
        done.append(f"move {os.path.basename(target)}")
        move(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    published = store.publish("a", "quarantine", DT)
    name = Path(published.files[0].path).name
    assert done[:3] == ["sync part.parquet", f"move {name}", "sync bucket=000"]
    pointer = done.index("move current.json")
    assert pointer > 2 and done[pointer + 1] == f"sync dt={DT}"
    assert done[-1] == "sync history", "behind the pointer: a history without one means that it was lost"
    assert done[pointer - 1].startswith("sync .current.json")


# ---- the folder
# --------------------------------------------------------------------------------------------------------


def files_of(store: TableStore, folder: str) -> list[pa.fs.FileInfo]:
    infos = store.fs.get_file_info(pa.fs.FileSelector(f"{store.root}/{folder}", recursive=True, allow_not_found=True))
    return [info for info in infos if info.type == pa.fs.FileType.File and not info.path.endswith(".lock")]


def test_the_folder_holds_what_is_published_and_nothing_else(store):
    for attempt, text in (("a", "one"), ("b", "two"), ("c", "one"), ("d", "three")):
        stage(store, attempt, text)
        published = store.publish(attempt, "quarantine", DT)
        assert {info.path for info in files_of(store, f"quarantine/dt={DT}")} == {
            f"{store.root}/{file.path}" for file in published.files
        }
        plain = pyarrow.dataset.dataset(f"{store.root}/quarantine", filesystem=store.fs, partitioning="hive").to_table()
        assert set(plain["raw_text"].to_pylist()) == {text}
        assert plain.num_rows == published.rows
        assert set(plain.column_names) == {*QUARANTINE.names, "dt", "bucket"}
    store.write_staged_manifest(store.begin_try("empty", ["quarantine"], [DT]), staged_manifest("empty"))
    assert store.publish("empty", "quarantine", DT).rows == 0
    assert files_of(store, f"quarantine/dt={DT}") == []


def test_a_publication_killed_after_the_pointer_moved_is_tidied_by_its_retry(tmp_path, monkeypatch):
    store = TableStore(str(tmp_path / "warehouse"), "kuairand")
    stage(store, "a", "one")
    store.publish("a", "quarantine", DT)
    stage(store, "b", "two")

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TableStore, "_settle", killed)
        with pytest.raises(Killed):
            store.publish("b", "quarantine", DT)
    assert len(files_of(store, f"quarantine/dt={DT}")) == 2
    published = store.publish("b", "quarantine", DT)
    assert [info.path for info in files_of(store, f"quarantine/dt={DT}")] == [
        f"{store.root}/{file.path}" for file in published.files
    ]
    assert texts(store, published) == {"two"}


def test_a_file_that_a_loser_placed_is_taken_out(store, monkeypatch):
    """The pointer moved after this publisher looked: as on S3, where there is no lock."""
    from etl.warehouse import store as module
    from etl.warehouse.pointers import Moved, opened

    stage(store, "a", "one")
    store.publish("a", "quarantine", DT)
    stage(store, "late", "late")
    stage(store, "b", "two")
    first = True

    def opened_late(*arguments):
        nonlocal first
        if not first:
            return opened(*arguments)
        first = False
        return raced()

    import contextlib

    @contextlib.contextmanager
    def raced():
        class Pointer:
            text = store.read_text(f"_manifests/quarantine/dt={DT}/current.json")

            def replace(self, text: str) -> None:
                store.publish("b", "quarantine", DT)
                raise Moved

        yield Pointer()

    monkeypatch.setattr(module, "opened", opened_late)
    with pytest.raises(StageError, match="attempt b published"):
        store.publish("late", "quarantine", DT)
    published = store.require("quarantine", DT)
    assert texts(store, published) == {"two"}
    assert [info.path for info in files_of(store, f"quarantine/dt={DT}")] == [
        f"{store.root}/{file.path}" for file in published.files
    ]

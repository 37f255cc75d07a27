"""Publication: whole or not at all, idempotent, and never under a reader's feet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from etl.stage.errors import StageError
from etl.warehouse.schemas import QUARANTINE, schema_fingerprint
from etl.warehouse.store import DataFile, Manifest, TableStore

DT = "2022-04-21"


def rows(text: str, n: int = 3) -> pa.Table:
    return pa.table(
        {"source_file": ["f"] * n, "row_number": list(range(n)), "reason": ["r"] * n, "raw_text": [text] * n},
        schema=QUARANTINE,
    )


def staged_manifest(attempt: str, *files: DataFile, dt: str = DT) -> Manifest:
    return Manifest("kuairand", "quarantine", dt, attempt, schema_fingerprint(QUARANTINE), "v", files)


def stage(store: TableStore, attempt: str, text: str, complete: bool = True, dt: str = DT) -> None:
    work = store.begin_try(attempt, ["quarantine"], [dt])
    file = store.write_file(work, "quarantine", dt, 0, rows(text))
    if complete:
        store.write_staged_manifest(work, staged_manifest(attempt, file, dt=dt))


@pytest.fixture
def store(tmp_path) -> TableStore:
    return TableStore(str(tmp_path / "warehouse"), "kuairand")


def test_a_half_staged_partition_is_not_published(store):
    stage(store, "a", "one", complete=False)
    assert store.staged_days("a", "quarantine") == []
    with pytest.raises(StageError, match="no completely staged partition"):
        store.publish("a", "quarantine", DT)
    assert store.manifest("quarantine", DT) is None


def test_what_counts_is_the_newest_try_that_was_begun_and_only_when_it_is_complete(store):
    stage(store, "a", "zombie")
    [zombie] = store.tries("a")
    retry = store.begin_try("a", ["quarantine"], [DT])
    late = store.write_file(zombie, "quarantine", DT, 0, rows("zombie"))  # it outlived its retry
    store.write_staged_manifest(zombie, staged_manifest("a", late))
    assert store.staged_days("a", "quarantine") == []
    with pytest.raises(StageError, match="no completely staged partition"):
        store.publish("a", "quarantine", DT)
    file = store.write_file(retry, "quarantine", DT, 0, rows("retry"))
    store.write_staged_manifest(retry, staged_manifest("a", file))
    late = store.write_file(zombie, "quarantine", DT, 0, rows("zombie"))
    store.write_staged_manifest(zombie, staged_manifest("a", late))
    published = store.publish("a", "quarantine", DT)
    assert set(store.read(published)["raw_text"].to_pylist()) == {"retry"}
    late = store.write_file(zombie, "quarantine", DT, 0, rows("zombie"))  # and goes on
    store.write_staged_manifest(zombie, staged_manifest("a", late))
    assert store.staged_manifest("a", "quarantine", DT) is None
    assert store.publish("a", "quarantine", DT) == published


def test_a_try_leaves_days_and_tables_that_it_does_not_stage_alone(store):
    other = store.begin_try("a", ["quarantine"], ["2022-04-20"])
    store.write_staged_manifest(other, staged_manifest("a", dt="2022-04-20"))
    store.begin_try("a", ["events"], ["2022-04-20"])
    stage(store, "a", "one")
    assert store.staged_days("a", "quarantine") == ["2022-04-20", DT]


@pytest.mark.parametrize(
    ("harm", "says"),
    [("overwritten", "has the sha256"), ("cut", "bytes, its manifest says"), ("deleted", "is missing")],
)
def test_a_staged_file_that_is_not_what_its_manifest_says_is_refused_and_nothing_changes(store, harm, says):
    stage(store, "a", "one")
    before = store.publish("a", "quarantine", DT)
    for day in ("2022-04-20", DT):  # of two days published together, the second is wrong: neither is published
        stage(store, "b", "two", dt=day)
    staged = [store.staged("b", "quarantine", day) for day in ("2022-04-20", DT)]
    path = Path(store.root) / staged[1].manifest.files[0].path
    body = path.read_bytes()
    {
        "overwritten": lambda: path.write_bytes(bytes(len(body))),
        "cut": lambda: path.write_bytes(body[:-1]),
        "deleted": path.unlink,
    }[harm]()
    with pytest.raises(StageError, match=rf"{path} of table quarantine dt={DT} .*{says}"):
        store.publish_all(staged)
    assert store.require("quarantine", DT) == before
    assert store.manifest("quarantine", "2022-04-20") is None
    assert set(store.read(before)["raw_text"].to_pylist()) == {"one"}


def test_a_publication_cut_short_is_finished_from_verified_files_only(store):
    stage(store, "a", "one")
    file = store.staged_manifest("a", "quarantine", DT).files[0]
    moved = Path(store.root) / store.published_path("quarantine", DT, file)
    moved.parent.mkdir(parents=True)
    (Path(store.root) / file.path).rename(moved)
    body = moved.read_bytes()
    moved.write_bytes(bytes(len(body)))
    with pytest.raises(StageError, match="has the sha256"):
        store.publish("a", "quarantine", DT)
    assert store.manifest("quarantine", DT) is None
    moved.write_bytes(body)
    assert store.read(store.publish("a", "quarantine", DT)).num_rows == 3


def test_an_attempt_builds_one_day(store):
    store.begin_try("a", ["quarantine"], ["2022-04-20", DT], DT)
    for tables in (["quarantine"], ["sequences"]):
        with pytest.raises(
            StageError,
            match=(
                rf"attempt a builds dt={DT} \(by _staging/a/try-0001-.*, not dt=2022-04-20.*\n.*an --attempt of its own"
            ),
        ):
            store.begin_try("a", tables, ["2022-04-20"], "2022-04-20")
    store.begin_try("a", ["sequences"], [DT], DT)
    store.begin_try("b", ["quarantine"], ["2022-04-20"], "2022-04-20")


def test_publishing_twice_changes_nothing(store):
    stage(store, "a", "one")
    first = store.publish("a", "quarantine", DT)
    assert store.publish("a", "quarantine", DT) == first
    assert store.read(first).num_rows == 3


def test_the_digest_is_of_the_data_and_not_of_the_attempt(store):
    stage(store, "a", "one")
    first = store.publish("a", "quarantine", DT)
    stage(store, "b", "one")
    second = store.publish("b", "quarantine", DT)
    stage(store, "c", "two")
    third = store.publish("c", "quarantine", DT)
    assert first.data_digest == second.data_digest != third.data_digest


def test_a_reader_that_holds_the_old_manifest_still_reads_the_old_rows(store):
    stage(store, "a", "one")
    old = store.publish("a", "quarantine", DT)
    stage(store, "b", "two")
    store.publish("b", "quarantine", DT)
    assert set(store.read(old)["raw_text"].to_pylist()) == {"one"}
    assert set(store.read(store.require("quarantine", DT))["raw_text"].to_pylist()) == {"two"}


def test_rows_with_a_missing_column_are_refused(store):
    with pytest.raises((KeyError, pa.ArrowInvalid)):
        store.write_file(
            store.begin_try("a", ["quarantine"], [DT]), "quarantine", DT, 0, rows("one").drop_columns(["reason"])
        )


def test_a_missing_partition_names_table_day_and_remedy(store):
    with pytest.raises(
        StageError, match=r"dt=2022-04-21 of kuairand/quarantine is not published.*(?s:.*)remedy: run the stage"
    ):
        store.require("quarantine", DT)


def test_a_pointer_that_was_lost_is_no_day_that_was_never_published(store):
    """Built again from what raw files are left, the day would be published empty."""
    stage(store, "a", "one")
    published = store.publish("a", "quarantine", DT)
    pointer = Path(store.root, "_manifests", "quarantine", f"dt={DT}", "current.json")
    text = pointer.read_text()
    pointer.unlink()
    for ask in (lambda: store.manifest("quarantine", DT), lambda: stage(store, "b", "two")):
        with pytest.raises(
            StageError, match=r"current\.json is gone, yet the partition was published.*history"
        ) as stopped:
            ask()
        assert "copy the newest good one" in stopped.value.remedy
    [remembered] = (pointer.parent / "history").glob("*.json")
    assert remembered.read_text() == text
    pointer.write_text(remembered.read_text())
    assert store.require("quarantine", DT) == published


def test_a_published_file_that_is_gone_is_named_with_the_way_out(store):
    stage(store, "a", "one")
    published = store.publish("a", "quarantine", DT)
    Path(store.root, published.files[0].path).unlink()
    with pytest.raises(StageError, match=rf"{published.files[0].path}.* cannot be read") as stopped:
        store.read(published)
    assert "build its partition again" in stopped.value.remedy

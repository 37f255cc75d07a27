"""Publication: whole or not at all, idempotent, and never under a reader's feet."""

from __future__ import annotations

import pyarrow as pa
import pytest

from etl.errors import StageError
from etl.schemas import QUARANTINE, schema_fingerprint
from etl.store import Manifest, TableStore

DT = "2022-04-21"


def rows(text: str, n: int = 3) -> pa.Table:
    return pa.table({"source_file": ["f"] * n, "row_number": list(range(n)), "reason": ["r"] * n, "raw_text": [text] * n}, schema=QUARANTINE)


def stage(store: TableStore, attempt: str, text: str, complete: bool = True) -> None:
    file = store.write_file(attempt, "quarantine", DT, 0, rows(text))
    if complete:
        store.write_staged_manifest(Manifest(store.dataset, "quarantine", DT, attempt, schema_fingerprint(QUARANTINE), "v", (file,)))


@pytest.fixture
def store(tmp_path) -> TableStore:
    return TableStore(str(tmp_path / "warehouse"), "kuairand")


def test_a_half_staged_partition_is_not_published(store):
    stage(store, "a", "one", complete=False)
    assert store.staged_days("a", "quarantine") == []
    with pytest.raises(StageError, match="no completely staged partition"):
        store.publish("a", "quarantine", DT)
    assert store.manifest("quarantine", DT) is None


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
        store.write_file("a", "quarantine", DT, 0, rows("one").drop_columns(["reason"]))


def test_a_missing_partition_names_table_day_and_remedy(store):
    with pytest.raises(StageError, match=r"dt=2022-04-21 of kuairand/quarantine is not published.*(?s:.*)remedy: run the stage"):
        store.require("quarantine", DT)

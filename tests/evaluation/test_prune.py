"""The end of the daily chain removes what is old, and nothing that a model in MLflow needs."""

from __future__ import annotations

import os
import sys

import pytest

from etl.datasets.definition import Retention, dataset
from etl.stage.folder import Folder
from etl.warehouse.partitions import MS_PER_DAY
from etl.warehouse.store import Manifest, TableStore
from evaluation import prune
from tests.evaluation.conftest import DATASET, DT
from tests.processes import free_port
from training.registry import Registry

ATTEMPT = "by-hand"


def begun_ms(stages) -> int:
    return (stages.raw / "SIMULATED.json").stat().st_mtime_ns // 1_000_000


def runs(stages) -> Folder:
    return Folder(str(stages.runs), "--runs")


def pruned(stages, days: int, **more) -> set[tuple[str, str]]:
    """Prune as in so many days; return (kind, name) of what went."""
    store, reports = TableStore(str(stages.warehouse), DATASET), stages.runs.parent / "reports"
    now_ms = begun_ms(stages) + days * MS_PER_DAY
    return {
        (one.kind, one.name)
        for one in prune.prune(store, more.pop("definition", dataset(DATASET)), runs(stages), reports, now_ms, **more)
    }


def published_again(stages, table: str, settings: dict | None = None) -> tuple[TableStore, Manifest]:
    """Publish the partition once more, without rows; return what was published before."""
    store = TableStore(str(stages.warehouse), DATASET)
    before = store.manifest(table, DT) or store.require("items", DT)
    work = store.begin_try("later", [table], [DT], DT)
    later = Manifest(DATASET, table, DT, "later", before.schema, "v", (), settings=settings or {})
    store.write_staged_manifest(work, later)
    store.publish("later", table, DT)
    return store, before


def test_what_a_registered_version_was_made_from_stays_and_the_rest_goes(stages, monkeypatch, capsys):
    stages.train(ATTEMPT)
    for module in ("evaluate", "release.register"):
        stages.run(module, ATTEMPT)
    stages.train("not-registered")
    for attempt, name in (("of-another", '{"dataset": "another"}'), ("broken", "")):
        (stages.runs / attempt).mkdir()
        (stages.runs / attempt / ("attempt.json" if name else "notes.txt")).write_text(name)
    store, items = published_again(stages, "items")
    store, sequences = published_again(stages, "sequences")
    assert pruned(stages, 3) == set()
    # After 31 days: staging 14, runs and what was superseded 30.
    would = pruned(stages, 31, attempt="not-registered", dry_run=True)
    assert ("runs", "not-registered") not in would
    before = sorted(str(path) for path in stages.runs.parent.rglob("*"))
    would = pruned(stages, 31, dry_run=True)
    assert sorted(str(path) for path in stages.runs.parent.rglob("*")) == before
    assert pruned(stages, 31) == would == {("staging", "setup"), ("staging", "later"), ("runs", "not-registered")}
    assert sorted(path.name for path in stages.runs.iterdir() if path.is_dir()) == ["broken", ATTEMPT, "of-another"]
    assert [store.read(manifest).num_rows for manifest in (items, sequences)] == [items.rows, sequences.rows]
    assert pruned(stages, 31) == set()
    # A version that somebody deleted needs nothing.
    registry = Registry(DATASET)
    registry.client.delete_registered_model(registry.name)
    assert pruned(stages, 31) == {("superseded", f"{name}/dt={DT}") for name in ("items", "sequences")} | {
        ("runs", ATTEMPT)
    }
    assert store.require("sequences", DT).attempt == "later"
    arguments = [
        "--dataset",
        DATASET,
        "--warehouse",
        str(stages.warehouse),
        "--runs",
        str(stages.runs),
        "--reports",
        str(stages.runs / "r"),
    ]
    monkeypatch.setattr(sys, "argv", ["prune", *arguments, "--dry-run"])
    prune.main()
    assert "would be removed: nothing" in capsys.readouterr().out


def test_nothing_that_a_model_may_need_goes_while_nobody_knows(stages, monkeypatch, capsys):
    stages.train("old")
    published_again(stages, "items")
    published_again(stages, "user_caches", {"model_version": "vql_kuairand_simulated/3"})
    rest = {("superseded", f"items/dt={DT}"), ("runs", "old")}
    staying = {("staging", "setup"), ("staging", "later")}
    assert pruned(stages, 31, dry_run=True) == staying
    assert (
        "has no version of vql_kuairand_simulated, yet user caches of one are published; is MLFLOW_TRACKING_URI"
        in capsys.readouterr().out
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert pruned(stages, 31) == staying
    assert (
        "superseded files, histories and runs stay, since models may need them: MLflow at http"
        in capsys.readouterr().out
    )
    assert not rest & staying


def test_a_definition_says_how_long_and_never_is_never(stages):
    definition = dataset(DATASET)
    stages.train("old")
    never = definition.model_copy(update={"retention": Retention(**dict.fromkeys(Retention.model_fields, "never"))})
    assert pruned(stages, 10_000, definition=never) == set()
    soon = definition.model_copy(update={"retention": Retention(runs_days=4)})
    assert pruned(stages, 3, definition=soon) == set()
    assert pruned(stages, 5, definition=soon) == {("runs", "old")}


def test_a_folder_of_a_run_goes_in_one_step(stages, monkeypatch):
    stages.train("old")
    monkeypatch.setattr(prune.shutil, "rmtree", lambda folder, **more: os.unlink(folder / "training.json"))
    pruned(stages, 31)
    assert not (stages.runs / "old").exists()
    monkeypatch.undo()
    assert list(prune.prune_runs(runs(stages), DATASET, begun_ms(stages), (), False)) == []
    assert list(stages.runs.iterdir()) == []


@pytest.mark.parametrize("given", ["0", "3", "1.5", "'30'", "null", "true", "Never", "forever"])
def test_what_is_no_number_of_days_is_refused_by_name(tmp_path, given):
    from etl.stage.errors import StageError

    path = tmp_path / "shop.yaml"
    path.write_text(f"extends: kuairand\nname: shop\nretention: {{runs_days: {given}}}\n")
    with pytest.raises(
        StageError, match=r"retention.runs_days: a whole number of days from 4 to 36525 is wanted, or never"
    ):
        dataset(str(path))

"""A published partition with untrained models in real packages, and an empty MLflow store; no Spark, no Ray."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from etl.datasets.definition import dataset
from etl.stage.folder import Folder
from etl.warehouse.partitions import MS_PER_DAY, add_days, day_number
from etl.warehouse.schemas import EVALUATION, TABLES, TRAIN, schema_fingerprint
from etl.warehouse.store import Manifest, TableStore
from evaluation.gate import Decision
from evaluation.release import promote
from infra import settings
from tests.training.conftest import random_partition, vocabulary_of
from training.config import ModelConfig
from training.data import Sequences
from training.model.ranker import FieldSizes, Ranker
from training.package import Cutoff, save_package
from training.run_folder import run_folder
from training.scoring import request_of
from training.tracking import attempt_run

DATASET, DT, NEXT_DT = "kuairand_simulated", "2022-04-21", "2022-04-22"
FIRST, SECOND = f"{DATASET}-{DT}-00000000-c0", f"{DATASET}-{NEXT_DT}-00000000-c0"


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """A migrated, empty MLflow database: made once, copied for each test."""
    from mlflow.tracking._tracking_service.utils import _get_sqlalchemy_store

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    store = _get_sqlalchemy_store(f"sqlite:///{path}", (path.parent / "artifacts").as_uri())
    store.engine.dispose()
    return path


@pytest.fixture
def mlflow_store(empty_database, tmp_path, monkeypatch) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    return uri


@dataclass
class Stages:
    """Runs the command lines of evaluation in this process, on a warehouse of two days."""

    warehouse: Path
    runs: Path
    raw: Path
    monkeypatch: pytest.MonkeyPatch

    def train(self, attempt: str, dt: str = DT, seed: int = 1) -> None:
        """Write what `training.train` would: packages of untrained models and training.json."""
        store = TableStore(str(self.warehouse), DATASET)
        items = store.read(store.require("items", dt))
        sequences = Sequences.from_arrow(store.read(store.require("sequences", dt)))
        vocabulary = vocabulary_of(items, sequences)
        example = request_of(items, sequences, 2)
        models = {}
        for name in ("vql", "softmax_attention", "mean_pooling"):
            torch.manual_seed(seed)
            model = Ranker(FieldSizes.of(vocabulary), ModelConfig(interest=name, codes=16)).eval()
            if model.coded is not None:
                model.coded.quantizer.started.fill_(1)
            folder = run_folder(str(self.runs), dataset(DATASET), dt, attempt, "c0")
            with folder.written_folder(f"models/{name}") as package:
                save_package(package, model, vocabulary, Cutoff(), example)
            models[name] = {
                "package": folder.address_of(f"models/{name}"),
                "epochs": 1,
                "best_epoch": 0,
                "train_seconds": 1.0,
                "validation_logloss": 0.7,
            }
        with attempt_run(
            dataset(DATASET),
            dt,
            attempt,
            {"data.snapshot_digest": store.require("sequences", dt).data_digest, "config_digest": "c0"},
        ) as run:
            run_id = run.info.run_id
        training = {
            "config": {"vocabulary": {"min_occurrences": 5}},
            "config_digest": "c0",
            "models": models,
            "primary": "vql",
            "seed": seed,
            "warm_start": "none",
            "mlflow_run_id": run_id,
        }
        folder.write_text("training.json", json.dumps(training))

    def without_user_fields(self, dt: str = DT) -> None:
        """Publish the partition again as that of a data set which knows nothing of its users."""
        store = TableStore(str(self.warehouse), DATASET)
        manifest = store.require("sequences", dt)
        rows = store.read(manifest)
        nothing = pa.array([[]] * rows.num_rows, rows.schema.field("user_fields").type)
        _publish(
            store,
            "sequences",
            dt,
            rows.set_column(1, rows.schema.field("user_fields"), nothing),
            inputs=dict(manifest.inputs),
            settings=manifest.settings,
        )

    def run(self, module: str, attempt: str, dt: str = DT) -> None:
        arguments = [
            "--dataset",
            DATASET,
            "--warehouse",
            str(self.warehouse),
            "--dt",
            dt,
            "--attempt",
            attempt,
            "--runs",
            str(self.runs),
        ]
        if module == "evaluate":
            arguments += ["--raw", str(self.raw)]
        self.monkeypatch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(f"evaluation.{module}").main()

    def json(self, attempt: str, name: str) -> dict:
        return json.loads(Folder(str(self.runs), "--runs").read_text(f"{attempt}/{name}.json") or "null")


@pytest.fixture
def stages(tmp_path, mlflow_store, monkeypatch) -> Stages:
    return stages_below(tmp_path, monkeypatch)


def stages_below(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    """Publish the two days in a warehouse below a folder."""
    warehouse, raw = folder / "warehouse", folder / "raw"
    raw.mkdir()
    # An environment of its own takes seconds and an index: test_mechanical_gate.py makes some.
    monkeypatch.setenv(settings.MODEL_ENVIRONMENT, settings.PIPELINE)
    (raw / "SIMULATED.json").write_text(json.dumps({"best_auc_by_dt": {DT: 0.8}}))
    store = TableStore(str(warehouse), DATASET)
    event_days = [add_days(DT, -1), DT]
    for day in event_days:
        _publish(
            store,
            "events",
            day,
            TABLES["events"].empty_table(),
            counts={"rows_read": 10, "events": 7, "duplicates": 2, "quarantined": 1},
        )
    for dt in (DT, NEXT_DT):
        items, sequences = random_partition(users=12)
        sequences = _with_last_targets_on(sequences, dt)
        _publish(store, "items", dt, items)
        trained_on = pc.list_flatten(sequences["target_split"]).to_pylist().count(TRAIN)
        _publish(
            store,
            "sequences",
            dt,
            sequences,
            counts={"train_targets": trained_on},
            inputs={f"events/dt={day}": "x" for day in event_days},
            settings={"cutoff": "event", "availability_lag_ms": 0, "max_events": 60},
        )
    return Stages(warehouse, folder / "runs", raw, monkeypatch)


@pytest.fixture
def same_process(monkeypatch):
    in_same_process(monkeypatch)


def in_same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the fresh process where a test is about something else."""
    monkeypatch.setattr(promote, "mechanical_gate", lambda *args: Decision(True, "not checked"))


@pytest.fixture
def lenient(monkeypatch):
    judge_leniently(monkeypatch)


def judge_leniently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained models have an AUC near 0.5 on 48 targets: let them pass the quality gate."""
    monkeypatch.setattr(promote, "quality_gate", lambda evaluation, primary: Decision(True, "lenient"))


def chain(stages: Stages, attempt: str, dt: str = DT, seed: int = 1) -> None:
    """Train an attempt and take it to its promotion."""
    stages.train(attempt, dt, seed)
    for module in ("evaluate", "release.register", "release.promote"):
        stages.run(module, attempt, dt)


def _with_last_targets_on(sequences: pa.Table, dt: str) -> pa.Table:
    """Move the last four targets of every user to the evaluation day, and the others before it."""
    start = day_number(dt) * MS_PER_DAY
    times = [
        [*sorted(min(t, start - 1) for t in row[:4]), *(start + 1000 * j for j in range(4))]
        for row in sequences["target_time_ms"].to_pylist()
    ]
    ends = [
        [int(np.searchsorted(history, time, side="left")) for time in row]
        for history, row in zip(sequences["history_time_ms"].to_pylist(), times, strict=True)
    ]
    splits = [[EVALUATION if time >= start else TRAIN for time in row] for row in times]
    for name, values in (("target_time_ms", times), ("target_split", splits), ("target_history_end", ends)):
        place = sequences.schema.get_field_index(name)
        sequences = sequences.set_column(place, name, pa.array(values, sequences.schema.field(name).type))
    return sequences


def _publish(store: TableStore, table: str, dt: str, rows, counts=None, inputs=None, settings=None) -> None:
    work = store.begin_try("setup", [table], [dt])
    file = store.write_file(work, table, dt, 0, rows)
    store.write_staged_manifest(
        work,
        Manifest(
            store.dataset,
            table,
            dt,
            "setup",
            schema_fingerprint(rows.schema),
            "test",
            (file,),
            counts or {},
            inputs or {},
            settings=settings or {},
        ),
    )
    store.publish("setup", table, dt)

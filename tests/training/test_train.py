"""The training command line on a tiny published partition: in one process, and with two Ray Train workers."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient

import training.ray_cluster
import training.ray_workers
from etl.stage.errors import EXIT_TRY_AGAIN, StageError, TryAgainError
from etl.stage.folder import Folder
from etl.stage.local_files import replace_text
from etl.warehouse.schemas import schema_fingerprint
from etl.warehouse.store import Manifest, TableStore
from tests.processes import Started, free_port, runs, start
from tests.s3 import BUCKET, s3_server
from tests.training.conftest import DT, random_partition
from tests.training.held_training import steps_of_a_model
from tests.waiting import PATIENCE_S, wait_for
from training.configs import tiny
from training.job import Job, load_training_data
from training.loop import Worker, WorkerLostError
from training.model_runs import parameters_of
from training.package import Cutoff
from training.ray_workers import _cause_of, train_with_ray
from training.ray_workers import _ray_worker as real_worker
from training.resume import flat
from training.scoring import load_scorer
from training.tracking import runs_below

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def warehouse(tmp_path, request) -> str:
    users = getattr(request, "param", 24)
    items, sequences = random_partition(users=users, longest=40)
    store = TableStore(str(tmp_path / "warehouse"), "kuairand")
    settings = {"cutoff": "day_start", "availability_lag_ms": 60_000, "max_events": 30}
    for table, rows in (("items", items), ("sequences", sequences)):
        publish(store, table, rows, settings)
    return store.warehouse


def publish(store: TableStore, table: str, rows: pa.Table, settings: Mapping[str, Any]) -> None:
    work = store.begin_try("t", [table], [DT])
    file = store.write_file(work, table, DT, 0, rows)
    counts = {"train_targets": 24 * 7}
    store.write_staged_manifest(
        work,
        Manifest(store.dataset, table, DT, "t", schema_fingerprint(rows.schema), "v", (file,), counts, {}, settings),
    )
    store.publish("t", table, DT)


def command(tmp_path: Path, warehouse: str, *more: str) -> tuple[list[str], dict[str, str]]:
    """Return command line and environment of a training; OMP_NUM_THREADS as on the smallest machine."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "OMP_NUM_THREADS": "1",
    }
    words = [
        "--dataset",
        "kuairand",
        "--warehouse",
        warehouse,
        "--dt",
        DT,
        "--attempt",
        "t",
        "--runs",
        str(tmp_path / "runs"),
        "--config",
        "tiny",
    ]
    return [sys.executable, "-m", "training.train", *words, *more], env


def train(tmp_path: Path, warehouse: str, *more: str) -> subprocess.CompletedProcess:
    words, env = command(tmp_path, warehouse, *more)
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def check_run(tmp_path: Path, done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "runs" / "t" / "training.json").read_text())
    assert list(summary["models"]) == ["vql", "softmax_attention", "mean_pooling"]
    for model in summary["models"].values():
        scorer = load_scorer(model["package"])
        assert len(scorer.score_request(scorer.example_request())) >= 1
        assert scorer.cutoff == Cutoff("day_start", 60_000, 30)  # as the manifest of sequences says
    return summary


def bits(tmp_path: Path) -> dict[str, bytes]:
    return {
        path.parent.name: path.read_bytes() for path in (tmp_path / "runs" / "t" / "models").glob("*/model.safetensors")
    }


def check_same_models(one: Path, other: Path) -> None:
    """Compare the packages of two runs.

    Bit for bit on the CPU; a GPU adds up in any order unless the configuration is `deterministic`.
    """
    left, right = bits(one), bits(other)
    assert left.keys() == right.keys()
    if not torch.cuda.is_available():
        assert left == right
    for name in left:
        weights = [safetensors.torch.load(package[name]) for package in (left, right)]
        for key, weight in weights[0].items():
            assert torch.allclose(weight.float(), weights[1][key].float(), rtol=1e-3, atol=1e-3), (name, key)


def checkpoints(runs: Path | str) -> list[str]:
    folder = Folder(str(runs), "--runs").below("t/checkpoints")
    return [name for name in folder.names() if name.endswith(".pt")]


def killed(
    tmp_path: Path,
    warehouse: str,
    workers: str,
    newer_than: int,
    whom: Callable[[Started], list[psutil.Process]],
    runs: str = "",
) -> Started:
    """Start a training and SIGKILL some of its processes once a checkpoint newer than a number is there."""
    runs = runs or str(tmp_path / "runs")
    words, env = command(tmp_path, warehouse, "--workers", workers, "--runs", runs)
    running = start(words, tmp_path / "log", ROOT, env)
    wait_for(
        "checkpoint",
        lambda: (
            running.process.poll() is not None
            or any(int(name.split("-")[0]) > newer_than for name in checkpoints(runs))
        ),
        every=0.01,
    )
    for process in wait_for("process to kill", functools.partial(whom, running)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return running


def test_a_retry_continues_the_mlflow_run_and_other_settings_are_refused_side_by_side(tmp_path, warehouse):
    first = check_run(tmp_path, train(tmp_path, warehouse, "--workers", "0"))
    weights = bits(tmp_path)
    again = train(tmp_path, warehouse, "--workers", "0")
    second = check_run(tmp_path, again)
    assert first["mlflow_run_id"] == second["mlflow_run_id"]
    assert first["models"] == second["models"] and weights == bits(tmp_path)
    assert again.stdout.count("epoch 2/2") == 0  # all is done
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(first["mlflow_run_id"])
    assert run.data.params == flat(tiny.config().deciding)
    store = TableStore(warehouse, "kuairand")
    digests = {store.require(table, DT).data_digest[:36] for table in ("sequences", "items")}
    assert len(run.inputs.dataset_inputs) == 2 and {one.dataset.digest for one in run.inputs.dataset_inputs} == digests
    assert {tag.value for one in run.inputs.dataset_inputs for tag in one.tags} == {"training"}
    assert all(json.loads(one.dataset.schema)["mlflow_colspec"] for one in run.inputs.dataset_inputs)
    assert run.info.run_name == f"{DT} tiny t"
    assert run.data.tags["mlflow.source.name"] == "training.train" and run.data.tags["config"] == "tiny"
    assert run.data.tags["pipeline.command"].startswith("python -m training.train --dataset kuairand --warehouse ")
    below = {one.data.tags["pipeline.model"]: one for one in runs_below(client, run)}
    assert below.keys() == first["models"].keys()
    for name, one in below.items():
        assert one.data.params == parameters_of(tiny.config().deciding, name)
        assert one.data.params["interest"] == repr(tiny.config().models[name].interest)
        assert {"train_loss", "validation_logloss"} <= one.data.metrics.keys() and one.inputs.dataset_inputs
        assert one.info.run_name == f"{DT} {name}" and one.data.tags["config"] == "tiny"
    assert not [key for key in run.data.metrics if key.startswith("vql/")]
    other = train(tmp_path, warehouse, "--workers", "0", "--seed", "8")
    assert other.returncode == 2
    assert "attempt t belongs to config" in other.stderr and "--attempt" in other.stderr
    publish(
        store, "sequences", random_partition(users=24, longest=40, seed=1)[1], store.require("sequences", DT).settings
    )
    other = train(tmp_path, warehouse, "--workers", "0")
    assert other.returncode == 2
    assert re.search(
        r"checkpoints of another training:\n +data of sequences: '?\w+'? there, '?\w+'? now\n", other.stderr
    ), other.stderr
    assert weights == bits(tmp_path)


@pytest.mark.slow
def test_a_training_on_s3_killed_at_any_moment_goes_on_to_the_bits_of_one_on_a_disk(tmp_path, warehouse):
    whole = tmp_path / "whole"
    whole.mkdir()
    check_run(whole, train(whole, warehouse, "--workers", "0"))
    with s3_server() as query:
        runs = f"s3://{BUCKET}/runs{query}"
        folder = Folder(runs, "--runs").below("t")
        for after in (0, 2, 5):
            killed(tmp_path, warehouse, "0", after, lambda running: running.family(), runs).process.wait()
        done = train(tmp_path, warehouse, "--workers", "0", "--runs", runs)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert "going on with" in done.stdout or done.stdout.count(" epoch ") < 6  # not from the beginning
        assert len(checkpoints(runs)) <= 2
        with folder.read_locally() as copy:
            shutil.copytree(copy, tmp_path / "runs" / "t")
        lines = (tmp_path / "runs" / "t" / "progress.log").read_text()
        assert all(line in lines for line in done.stdout.splitlines() if " epoch " in line)
    assert bits(tmp_path) == bits(whole)


def driver(running: Started) -> list[psutil.Process]:
    return [psutil.Process(running.process.pid)]


def ended(running: Started, what: str) -> bool:
    return not of_ray(what)(running)


def of_ray(what: str) -> Callable[[Started], list[psutil.Process]]:
    """Return what finds one process of Ray that a training started."""
    return lambda running: [process for process in running.family() if runs(process, what)][:1]


KILLS = {  # whom of a training, and the exit code of the command that ends with it; None: it goes on
    "worker": (of_ray("RayTrainWorker"), None),
    "driver": (driver, -signal.SIGKILL),
    "head": (of_ray("gcs_server"), EXIT_TRY_AGAIN),
}
STEPS_TO_MISS = 3  # that a training may take behind the point of a kill


def drawn_kills(steps: int, seed: int) -> list[tuple[str, int]]:
    """Return whom of a training to kill, each once in each of its three models in any order, and the step: a random one
    of each ninth.
    """
    rng, ninth = np.random.default_rng(seed), steps // 9
    points = np.arange(9) * ninth + rng.integers(1, ninth - STEPS_TO_MISS, 9)
    whom = rng.permuted([list(KILLS)] * 3, axis=1)
    return list(zip(whom.ravel().tolist(), points.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("warehouse", [200], ids=["200 users"], indirect=True)
def test_nine_kills_of_workers_driver_and_head_end_in_the_bits_of_an_undisturbed_torchrun(tmp_path, warehouse):
    whole = tmp_path / "whole"
    whole.mkdir()
    words, env = command(whole, warehouse)
    words[1:3] = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "training.torchrun"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    summary = check_run(whole, done)
    assert "2 worker(s)" in done.stdout
    assert all(model["epochs"] == 2 for model in summary["models"].values())
    assert all(model.dropout > 0 for model in tiny.config().models.values())
    steps = 3 * steps_of_a_model(load_training_data(warehouse, "kuairand", DT, tiny.config())[0], tiny.config())

    seed = int(os.environ.get("KILLS_SEED", secrets.randbelow(1_000_000)))
    kills = drawn_kills(steps, seed)
    print(f"the same kills again with KILLS_SEED={seed}: {kills}")
    limit, lost = tmp_path / "limit", 0
    with contextlib.ExitStack() as cleanup:

        def held() -> Started:
            words, env = command(tmp_path, warehouse, "--workers", "2")
            words[2] = "tests.training.held_training"
            started = start(words, tmp_path / "log", ROOT, env | {"HELD_FOLDER": str(tmp_path)})
            cleanup.callback(started.stop)
            return started

        running: Started | None = None
        for name, point in kills:
            replace_text(limit, str(point + STEPS_TO_MISS))
            running = running or held()
            wait_for(f"step {point}", functools.partial(has_reached, running, point), every=0.01)
            whom, ends_with = KILLS[name]
            for process in wait_for("process to kill", functools.partial(whom, running)):
                process.kill()
            if ends_with is None:
                lost += 1
                continue
            code, said = running.finish()
            assert code == ends_with and "Traceback" not in said, said
            assert said.count("warning: training lost ") == lost, said
            assert ("error: the head of the Ray cluster, " in said) == (name == "head"), said
            wait_for("end of what it had started", functools.partial(ended, running, "RayTrainWorker"))
            running, lost = None, 0
        replace_text(limit, str(steps + 1))
        check_run(tmp_path, subprocess.CompletedProcess("held", *(running or held()).finish(), ""))
    progress = (tmp_path / "runs" / "t" / "progress.log").read_text()
    assert progress.count("going on with") >= 6  # it began no model anew
    assert all(f"going on with {name} after" in progress for name in tiny.config().models)
    check_same_models(tmp_path, whole)


def has_reached(running: Started, step: int) -> bool:
    """Return whether a held training has come to a step; it has not ended."""
    assert running.process.poll() is None, running.log.read_text()
    reached = running.log.with_name("reached")
    return reached.exists() and int(reached.read_text()) >= step


@pytest.mark.ray
def test_an_error_of_ours_is_told_as_it_is_and_a_lost_worker_is_worth_another_try():
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    def cause(**failures: Exception) -> Exception:
        return _cause_of(WorkerGroupError("", {int(rank[1:]): failure for rank, failure in failures.items()}))

    wrong, waits = StageError("no such column", "name another"), WorkerLostError("in vain")
    bug = RuntimeError("ValueError: shape")  # as a worker names it
    died = WorkerHealthCheckFailedError("worker 1 died", RuntimeError("SIGKILL"))
    assert cause(r0=waits, r1=wrong) is wrong
    assert type(cause(r0=waits, r1=bug)) is RuntimeError and "worker 1 failed: ValueError: shape" in str(cause(r1=bug))
    for lost in (cause(r0=waits, r1=died), cause(r0=waits)):
        assert isinstance(lost, TryAgainError)
    assert "lost worker 1: worker 1 died" in cause(r0=waits, r1=died).what


class TwoArgumentsError(Exception):
    """Does not come back by pickle, which gives it one argument."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


def worker_that_fails(config: dict[str, Any]) -> None:
    """Train as a worker of Ray does, to an error whose class its driver cannot make."""

    def fails(job: Job, worker: Worker) -> None:
        (Path(job.run_dir) / "tries").open("a").write("x")
        if job.attempt == "two arguments":
            raise TwoArgumentsError("no memory", "step 3")
        module = sys.modules["only_here"] = types.ModuleType("only_here")
        module.OnlyHereError = type("OnlyHereError", (Exception,), {"__module__": "only_here"})  # type: ignore[attr-defined]
        raise module.OnlyHereError("no memory at step 3")

    training.ray_workers.train_all = fails
    real_worker(config)


@pytest.mark.ray
@pytest.mark.parametrize("attempt", ["two arguments", "a module of the worker alone"])
def test_an_error_that_does_not_come_back_by_pickle_is_said_and_trained_once(tmp_path, monkeypatch, attempt):
    monkeypatch.setenv("RAY_ADDRESS", "")  # no cluster, as if it were not set
    monkeypatch.setattr(training.ray_workers, "_ray_worker", worker_that_fails)
    job = Job("w", "kuairand", DT, attempt, str(tmp_path), tiny.config(), "", None, None, False)
    name = "TwoArgumentsError" if attempt == "two arguments" else "OnlyHereError"
    with pytest.raises(RuntimeError, match=f"^worker 0 failed: {name}: no memory at step 3$"):
        train_with_ray(job, 1, 1)
    assert (tmp_path / "tries").read_text() == "x"


def in_its_folder(tmp_path: Path, *more: str) -> subprocess.CompletedProcess:
    """Train in a folder, to which every path is relative: workers of Ray work in another one."""
    words, env = command(Path(), "warehouse", *more)
    return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.ray
def test_paths_may_be_relative_and_what_a_worker_cannot_do_is_tried_once(tmp_path, warehouse):
    assert warehouse == str(tmp_path / "warehouse")
    done = in_its_folder(tmp_path, "--workers", "2", "--warm-start", "nothing")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"error: {tmp_path}/nothing holds no model package" in done.stderr and "Traceback" not in done.stderr
    assert "starting the workers again" not in done.stdout
    summary = check_run(tmp_path, in_its_folder(tmp_path, "--workers", "2"))
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    below = runs_below(client, client.get_run(summary["mlflow_run_id"]))
    assert len(below) == 3 and all("train_loss" in one.data.metrics for one in below)


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_that_does_not_start_in_time_is_worth_another_try(tmp_path, warehouse):
    words, env = command(tmp_path, warehouse, "--workers", "1")
    running = start(words, tmp_path / "log", ROOT, env)
    try:
        for process in wait_for("raylet", functools.partial(of_ray("raylet/raylet"), running), every=0.005):
            process.suspend()  # as on a machine with far too much to do
        code, said = running.finish()
    finally:
        running.stop()
    assert code == EXIT_TRY_AGAIN and "error: Ray did not start in this machine: " in said, said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_without_room_for_the_workers_is_told_with_what_it_has(monkeypatch):
    import ray
    from ray.util.placement_group import placement_group

    found = training.ray_cluster.wait_for_workers
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        monkeypatch.setattr(training.ray_cluster, "SETTLING_SECONDS", PATIENCE_S)
        assert [found(2, 2, gpus=False), found(1, 4, gpus=False), found(1, 4, gpus=True)] == [2, 2, 1]
        assert placement_group([{"CPU": 1.0}]).wait(PATIENCE_S)  # of another training
        monkeypatch.setattr(training.ray_cluster, "SETTLING_SECONDS", 1)
        assert found(1, 4, gpus=False) == 1
        monkeypatch.setattr(training.ray_cluster, "PLACEMENT_SECONDS", 1)
        with pytest.raises(TryAgainError, match=r"no room for 2 worker\(s\) of 1 CPU each .* has 2 CPU, free 1 CPU"):
            found(2, 4, gpus=False)
        with pytest.raises(
            StageError,
            match=(
                r"no room for 2 worker\(s\) of 1 CPU and 1 GPU each .* has 2 CPU and 1 GPU, free .*\n  remedy: take"
                r" --workers 1 "
            ),
        ):
            found(2, 4, gpus=True)
        with pytest.raises(TryAgainError, match="remedy: run the same command again once lost nodes are back"):
            found(2, 4, gpus=True, had_room=True)
    finally:
        ray.shutdown()


@pytest.mark.ray
def test_a_ray_address_without_a_cluster_is_said_at_once():
    with pytest.raises(TryAgainError, match=r"no Ray cluster answers at RAY_ADDRESS 127\.0\.0\.1:1\b"):
        training.ray_cluster.join_cluster("127.0.0.1:1")
    with pytest.raises(StageError, match="an address of Ray Client\n  remedy: set HOST:PORT of the cluster's head"):
        training.ray_cluster.join_cluster("ray://127.0.0.1:10001")


def may_mount(folder: Path) -> bool:
    words = ["unshare", "--mount", "mount", "--bind", str(folder), str(folder)]
    return (
        shutil.which("unshare") is not None and subprocess.run(words, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_that_has_none_of_this_code_trains_for_who_knows_its_token(tmp_path, warehouse):
    (tmp_path / "hidden").mkdir()
    if not may_mount(tmp_path / "hidden"):
        pytest.skip("hides the code from the cluster by a mount, which this user may not make")
    port, code = free_port(), [ROOT / name for name in training.ray_cluster.CODE]
    hide = " && ".join(f"mount --bind {tmp_path / 'hidden'} {folder}" for folder in code)
    head = f"start --head --block --port={port} --num-cpus=4 --include-dashboard=false --object-store-memory=200000000"
    words, env = command(tmp_path, warehouse, "--workers", "2")
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(24)}
    # A socket's path has at most 107 characters.
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        ray = f"{sys.executable} -m ray.scripts.scripts {head} --temp-dir={short}"
        cluster = start(
            ["unshare", "--mount", "sh", "-c", f"{hide} && exec {ray}"], tmp_path / "ray.log", Path("/"), env
        )
        try:
            wait_for("cluster", lambda: training.ray_cluster.answers(f"127.0.0.1:{port}"))
            joined = env | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
            done = subprocess.run(words, cwd=ROOT, env=joined, capture_output=True, text=True, check=False)
            summary = check_run(tmp_path, done)
            assert "2 worker(s)" in done.stdout and summary["primary"] == "vql"
        finally:
            cluster.stop()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--config", "nonsense"], "unknown training configuration 'nonsense'"),
        (["--models", "vql,din"], "unknown model 'din'"),
        (["--dt", "2022-04-22"], "dt=2022-04-22 of kuairand/sequences is not published"),
        (["--workers", "4:2"], "--workers 4:2 is not a whole number from 1 to 64, or two of them, MIN:MAX: the first"),
    ],
)
def test_wrong_arguments_give_one_clear_message(tmp_path, warehouse, more, says):
    done = train(tmp_path, warehouse, "--workers", "0", *more)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr

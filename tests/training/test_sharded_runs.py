"""Runs whose tables are sharded over workers: checkpoints, packages and warm starts are those of whole tables."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessExitedException

import training.job
from tests.processes import free_port
from tests.training.partitions import DT, published, random_partition
from tests.training.test_sharded_tables import MOST_OFF, off_by
from training.configs import tiny
from training.job import Job, train_all
from training.loop import Training, Worker, train_model

pytestmark = pytest.mark.slow  # the processes of six trainings


def _job_as_rank(rank: int, world: int, port: int, job: Job, killed_at: int | None) -> None:
    """Train a job as a worker of a command line does; the last worker dies of it behind a step."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)

    def dying(*args, **kwargs):
        *others, on_step, start = args

        def look(now: Training) -> None:
            on_step(now)
            if now.step == killed_at and rank == world - 1:
                os._exit(9)

        return train_model(*others, look, start, **kwargs)

    training.job.train_model = dying if killed_at is not None else train_model
    train_all(job, Worker(rank, world))


def partition_of(folder: Path, items: int, seed: int) -> str:
    """Publish a random partition of so many items; return the warehouse."""
    rows = random_partition(users=24, items=items, longest=40, seed=seed)
    return published(folder, rows, buckets=2).warehouse


def run(
    folder: Path, warehouse: str, world: int, warm_start: Path | None = None, killed_at: int | None = None
) -> dict[str, torch.Tensor]:
    """Train one model of the tiny configuration, its tables sharded where there are several workers; return it."""
    config = tiny.config()
    models = {"vql": dataclasses.replace(config.models["vql"], dropout=0.0)}
    config = dataclasses.replace(config, models=models, sharded_from_rows=100, max_epoch_steps=12)
    older = None if warm_start is None else str(warm_start / "models" / "vql")
    job = Job(warehouse, "kuairand", DT, "t", str(folder), config, "", None, older, prints=False)
    if world == 1:
        _job_as_rank(0, world, 0, job, killed_at)
    else:
        mp.spawn(_job_as_rank, args=(world, free_port(), job, killed_at), nprocs=world)
    return load_file(folder / "models" / "vql" / "model.safetensors")


def test_a_run_that_lost_a_worker_goes_on_to_the_same_package(tmp_path):
    warehouse = partition_of(tmp_path, items=40, seed=0)
    whole, sharded = run(tmp_path / "whole", warehouse, 1), run(tmp_path / "sharded", warehouse, 2)
    assert off_by(whole, sharded) < MOST_OFF
    with pytest.raises(ProcessExitedException):
        run(tmp_path / "killed", warehouse, 2, killed_at=8)
    again = run(tmp_path / "killed", warehouse, 2)
    assert "going on with vql after step 6" in (tmp_path / "killed" / "progress.log").read_text()
    assert off_by(sharded, again) == 0


def test_a_warm_start_keeps_rows_and_extends_sharded_tables(tmp_path):
    before = run(tmp_path / "before", partition_of(tmp_path, items=40, seed=0), 2)
    later = partition_of(tmp_path / "later", items=90, seed=3)
    whole = run(tmp_path / "whole", later, 1, warm_start=tmp_path / "before")
    sharded = run(tmp_path / "sharded", later, 2, warm_start=tmp_path / "before")
    assert len(whole["items.tables.0.weight"]) > len(before["items.tables.0.weight"])
    assert off_by(whole, sharded) < MOST_OFF

"""Speed of the whole training loop (loader, step, exchange between workers) on CPU workers, one thread each: samples a
second, and a second of processor time of the first worker, which other programs disturb less.

    python -m benchmarks.train_loop --workers 1,2 --models vql,softmax_attention

Random users whose labels follow a taste; the configuration `default`. Compare figures of one quiet machine only. A
table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from etl.warehouse.partitions import MS_PER_DAY
from etl.warehouse.schemas import SEQUENCES, TRAIN, VALIDATION, WATCH_BUCKETS
from training.config import ModelConfig, TrainConfig, load_config
from training.data import Chosen, Sequences
from training.loop import EpochResult, Taken, Training, TrainingData, Worker, train_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--length", type=int, default=500, help="events of a user, each of them a target, too")
    parser.add_argument("--items", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--models", default="vql,softmax_attention,mean_pooling")
    args = parser.parse_args()
    found = []
    print(f"{'model':<20}{'workers':>8}{'samples/s':>12}{'samples/CPU-s':>15}{'train loss':>12}")
    for name in args.models.split(","):
        for workers in map(int, args.workers.split(",")):
            figures = measured(name, workers, args)
            found.append({"model": name, "workers": workers, **figures})
            print(
                f"{name:<20}{workers:>8}{figures['samples_per_s']:>12,.0f}{figures['samples_per_cpu_s']:>15,.0f}"
                f"{figures['train_loss']:>12.4f}",
                flush=True,
            )
    print(
        json.dumps(
            {
                "benchmark": "train_loop",
                "torch": torch.__version__,
                "users": args.users,
                "length": args.length,
                "runs": found,
            }
        )
    )


def measured(name: str, workers: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the best figures of the epochs after the first (validation is in their processor time), and the last
    training loss.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(_work, args=(name, workers, port, args, folder), nprocs=workers)
        epochs = json.loads((Path(folder) / "epochs.json").read_text())
    return {
        "samples_per_s": max(epoch["samples_per_s"] for epoch in epochs[1:]),
        "samples_per_cpu_s": max(
            epoch["samples_per_s"] * epoch["epoch_seconds"] / epoch["cpu_seconds"] for epoch in epochs[1:]
        ),
        "train_loss": epochs[-1]["train_loss"],
    }


def loop_rows(users: int, length: int, targets: int) -> pa.Table:
    """Return the partition that `loop_figures` trains on, from a Parquet file: nearly 512 steps an epoch.

    Args:
        users: of a batch. length: events of a user. targets: of a visit.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_partition(Path(folder) / "sequences.parquet", 8 * users, length, 64 * targets)
        return pq.read_table(Path(folder) / "sequences.parquet")


def loop_figures(
    name: str, targets: int, precision: str, users: int, length: int, device: str
) -> dict[str, float | str | None]:
    """Train from a Parquet file, and return samples a second, the share of time that the device waits for its host, and
    on a GPU the share in which no kernel runs: between those of a recorded step, too, and the rate over that of a step.

    Of the best of the epochs after the first, its begin included but for the waits, without validation; the kernels are
    those of some steps of the last epoch, and the step is one of its batches, taken again and again. On a CPU steps
    wait for their batches.

    Args:
        users, length, targets: as in `loop_rows`.
    """
    on_gpu = device == "cuda"
    epochs, profiled, steps = (6, 20, None) if on_gpu else (3, 0, 15)
    config = dataclasses.replace(
        load_config("default"), models={name: ModelConfig(interest=name, codes=128)}, users_per_step=users,
        targets_per_visit=targets, epochs=epochs, patience=epochs, warmup_steps=10, bf16=precision == "bf16",
        max_epoch_steps=steps,
    )  # fmt: skip
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    rows = loop_rows(users, length, targets)
    data = TrainingData.of(Sequences.from_arrow(rows), items_table(20_000), config)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    begun: dict[int, Taken] = {}  # what all steps came to behind the first one of an epoch
    step_ms: list[float] = []

    def look(now: Training) -> None:
        if now.position == 1:
            begun[now.epoch] = now.taken()
        if not on_gpu or now.epoch < epochs - 1:
            return
        if now.position in (5, 5 + profiled):
            torch.cuda.synchronize()
            (profile.start if now.position == 5 else profile.stop)()
        elif now.position == 10 + profiled:
            step_ms.append(_step_ms(now))

    results: list[EpochResult] = []
    train_model(name, data, config, Worker(device=device), results.append, look)
    best = max(results[1:-1], key=lambda result: result.metrics["samples_per_s"])
    rate = best.metrics["samples_per_s"]
    case: dict[str, float | str | None] = {"model": name, "length": length, "targets": targets, "precision": precision}
    case |= {"loop_samples_per_s": rate, "device_idle_share": best.metrics["data_wait_share"]}
    case |= {"no_kernel_share": None, "loop_over_step": None}
    said = ""
    if on_gpu:
        before, after = begun[best.epoch], begun[best.epoch + 1]
        waited, worked = after.waiting_ms - before.waiting_ms, after.working_ms - before.working_ms
        busy_ms = sum(event.self_device_time_total for event in profile.key_averages()) / 1_000 / profiled
        idle = 1 - busy_ms * rate / (1_000 * users * targets)
        case |= {"gpu_ms": busy_ms, "device_idle_share": waited / (waited + worked), "no_kernel_share": idle}
        case["loop_over_step"] = rate * step_ms[0] / (1_000 * users * targets)
        said = f", no kernel {idle:.1%}, {case['loop_over_step']:.1%} of its step"
    print(
        f"loop {name:<22}{length:>8}{targets:>8}{precision:>6}{rate:>12,.0f} samples/s"
        f", waits {case['device_idle_share']:.1%}{said}",
        flush=True,
    )
    return case


def _step_ms(now: Training, runs: int = 20) -> float:
    """Return the median time of a training's recorded step on its next batch, one after another, in ms."""
    assert now.recorded is not None
    chosen = Chosen.of(now.data.joined.sequences, *now.order(now.epoch).visited(now.position))
    step = functools.partial(now.recorded, now.recorded.prepared(chosen), now.model.coded is not None)
    for _ in range(3):  # the first ones of a size are run, and recorded
        step()
    return in_a_row_ms(step, runs)


def in_a_row_ms(step: Callable[[], None], runs: int) -> float:
    """Return the median time of a step on a GPU, one after another, in ms."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    for mark in marks:
        mark.record()
        step()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(other) for one, other in itertools.pairwise(marks))


def _work(rank: int, name: str, workers: int, port: int, args: argparse.Namespace, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", rank=rank, world_size=workers)
    config = dataclasses.replace(load_config("default"), epochs=args.epochs, patience=args.epochs, warmup_steps=10)
    data = make_data(args.users, args.length, args.items, config)
    epochs: list[dict[str, float]] = []
    spent = time.process_time()

    def note(result: EpochResult) -> None:
        nonlocal spent
        epochs.append(result.metrics | {"cpu_seconds": time.process_time() - spent})
        spent = time.process_time()

    train_model(name, data, config, Worker(rank, workers), note)
    if rank == 0:
        (Path(folder) / "epochs.json").write_text(json.dumps(epochs))
    if workers > 1:
        dist.destroy_process_group()


def make_data(users: int, length: int, items: int, config: TrainConfig) -> TrainingData:
    """Return users of equal length; every event is a target that sees the events before its day."""
    rng = np.random.default_rng(0)
    item = rng.integers(0, items, (users, length))
    days = np.sort(rng.integers(0, 14, (users, length)), 1)
    times = np.sort(days * MS_PER_DAY + rng.integers(0, MS_PER_DAY, (users, length)), 1)
    taste = rng.normal(0, 2, (users, 16))
    label = rng.random((users, length)) < 1 / (1 + np.exp(-np.take_along_axis(taste, item % 16, 1)))
    rows = [
        {
            "user_id": user,
            "user_fields": ["a"],
            "history_item_index": item[user],
            "history_time_ms": times[user],
            "history_feedback": label[user].astype(int),
            "history_watch_bucket": item[user] % WATCH_BUCKETS,
            "target_item_index": item[user],
            "target_time_ms": times[user],
            "target_label": label[user].astype(int),
            "target_context": np.ones(length, int),
            "target_is_random": np.zeros(length, bool),
            "target_split": np.full(length, TRAIN),
            "target_history_end": np.searchsorted(times[user], times[user] // MS_PER_DAY * MS_PER_DAY),
        }
        for user in range(users)
    ]
    sequences = Sequences.from_arrow(pa.Table.from_pylist(rows, schema=SEQUENCES))
    return TrainingData.of(sequences, items_table(items), config)


def items_table(items: int) -> pa.Table:
    """Return items with an author, a category and a length each."""
    index = np.arange(items)
    category = pa.array([str(number) for number in range(16)]).take(pa.array(index % 16))
    return pa.table(
        {
            "item_index": index.astype(np.int32),
            "item_id": index,
            "train_occurrences": np.full(items, 9),
            "author_id": index // 3,
            "categories": pa.ListArray.from_arrays(np.arange(items + 1, dtype=np.int32), category),
            "duration_ms": np.random.default_rng(1).random(items),
        }
    )


def write_partition(path: Path, users: int, length: int, targets: int, items: int = 20_000) -> None:
    """Write users of equal length, whose targets lie on the last tenth of their histories, the last one held out."""
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(0, 30 * MS_PER_DAY, (users, length)), 1)
    ends = np.sort(rng.integers(int(0.9 * length), length + 1, (users, targets)), 1)
    split = np.where(np.arange(targets) < targets - 1, TRAIN, VALIDATION)
    columns = {
        "history_item_index": rng.integers(0, items, (users, length)),
        "history_time_ms": times,
        "history_feedback": rng.integers(0, 2, (users, length)),
        "history_watch_bucket": rng.integers(0, WATCH_BUCKETS, (users, length)),
        "target_item_index": rng.integers(0, items, (users, targets)),
        "target_time_ms": np.take_along_axis(times, ends - 1, 1) + 1,
        "target_label": rng.integers(0, 2, (users, targets)),
        "target_context": np.ones((users, targets)),
        "target_is_random": np.zeros((users, targets)),
        "target_split": np.broadcast_to(split, (users, targets)),
        "target_history_end": ends,
    }
    rows = {"user_id": pa.array(np.arange(users)), "user_fields": pa.array([["a"]] * users)}
    for name, values in columns.items():
        flat = pa.array(values.ravel()).cast(SEQUENCES.field(name).type.value_type)
        starts = np.arange(users + 1, dtype=np.int32) * values.shape[1]
        rows[name] = pa.ListArray.from_arrays(pa.array(starts), flat)
    pq.write_table(pa.table(rows).cast(SEQUENCES), path)


if __name__ == "__main__":
    main()

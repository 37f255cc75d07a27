"""Training on several GPUs of one machine against one: speed at a fixed batch a GPU, equality at a fixed batch.

    make bench-multigpu ARGS="--gpus 1,2 --items 20000,4000000 --tables whole,sharded"

Random users from a Parquet file (benchmarks/train_loop.py), exact attention and VQL, the whole loop over NCCL. A table,
and one JSON line last. With `--memory-gb` a GPU has no more than that, which sharded tables may fit where whole ones do
not. Efficiency is the samples a second of N GPUs over N times those of one; the share of the
communication is the time of a step's exchange alone over the time of a step, idle the share in which the first device
waits for its host. On a machine without a GPU the workers
are processes of the CPU over gloo, which tries the code and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.train_loop import items_table, write_partition
from training.config import ModelConfig, TrainConfig, load_config
from training.data import Sequences
from training.loop import Training, TrainingData, Worker, train_model
from training.recorded_steps import most_rows

WARM_STEPS, EXCHANGES = 200, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--gpus", default=",".join(str(n) for n in (1, 2, 4, 8) if n == 1 or n <= gpus))
    parser.add_argument("--items", default="20000")
    parser.add_argument("--models", default="softmax_attention,vql")
    parser.add_argument("--users", type=int, default=32, help="of a batch of one GPU")
    parser.add_argument("--length", type=int, default=4_096)
    parser.add_argument("--targets", type=int, default=64, help="of a visit")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--id-width", type=int, default=16, help="of a row of the tables of ids")
    parser.add_argument("--tables", default="whole", help="whole, sharded (over several GPUs) or both, by commas")
    parser.add_argument("--memory-gb", type=float, help="of each GPU that may be used")
    parser.add_argument("--table-learning-rate", type=float, help="move ids by row-wise Adagrad; default: by AdamW")
    args = parser.parse_args()
    counts = [int(count) for count in args.gpus.split(",")]
    found = []
    print(
        f"{'model':<20}{'items':>10}{'gpus':>6}{'tables':>9}{'step ms':>9}{'idle':>7}{'samples/s':>12}"
        f"{'efficiency':>12}{'exchange':>10}{'equal':>7}{'loss off by':>13}{'tables GB':>11}{'peak GB':>9}"
    )
    for items in args.items.split(","):
        for name in args.models.split(","):
            found += compared(name, int(items), counts, args)
    device = torch.cuda.get_device_name() if gpus else "CPU"
    best = [run for run in found if run["gpus"] == max(counts)]
    figures = {
        "gpus": max(counts),
        "scaling_efficiency": min(run["scaling_efficiency"] for run in best),
        "communication_share": max(run["communication_share"] for run in best),
        "ranks_equal": all(run["ranks_equal"] for run in found),
        "loss_difference": max(run["loss_difference"] for run in found),
    }
    print(json.dumps({"benchmark": "multi_gpu", "device": device, "items": args.items, **figures, "runs": found}))


def compared(name: str, items: int, counts: list[int], args: argparse.Namespace) -> list[dict]:
    """Train one model with each number of GPUs; print and return what was seen."""
    found: list[dict] = []
    wanted = args.tables.split(",")
    ways = [(gpus, tables) for gpus in counts for tables in (wanted if gpus > 1 else ["whole"])]
    for count, tables in ways:
        speed = trained(name, items, count, tables, args.users * count, args)
        equal = trained(name, items, count, tables, args.users, args) if count > 1 else speed
        one = found[0] if found else speed | {"train_loss": equal["train_loss"]}
        run = {
            "model": name,
            "items": items,
            "gpus": count,
            "tables": tables,
            "tables_gb": speed["tables_gb"],
            "peak_gb": speed["peak_gb"],
            "step_ms": speed["step_ms"],
            "device_idle_share": speed["idle_ms"] / speed["step_ms"],
            "samples_per_s": count * args.users * args.targets / speed["step_ms"] * 1_000,
            "scaling_efficiency": one["step_ms"] / speed["step_ms"],
            "communication_share": speed["exchange_ms"] / speed["step_ms"],
            "ranks_equal": speed["ranks_equal"] and equal["ranks_equal"],
            "train_loss": equal["train_loss"],
            "loss_difference": abs(equal["train_loss"] - one["train_loss"]),
        }
        found.append(run)
        print(
            f"{name:<20}{items:>10}{count:>6}{tables:>9}{run['step_ms']:>9.2f}{run['device_idle_share']:>7.1%}"
            f"{run['samples_per_s']:>12,.0f}"
            f"{run['scaling_efficiency']:>12.3f}{run['communication_share']:>10.1%}{run['ranks_equal']!s:>7}"
            f"{run['loss_difference']:>13.2e}{run['tables_gb']:>11.3f}{run['peak_gb']:>9.2f}",
            flush=True,
        )
    return found


def trained(name: str, items: int, count: int, tables: str, users_per_step: int, args: argparse.Namespace) -> dict:
    """Train with so many GPUs and so many users of a global batch; return what the first worker measured."""
    model = ModelConfig(interest=name, id_width=args.id_width, dropout=0.0)
    config = dataclasses.replace(
        load_config("default"), models={name: model}, users_per_step=users_per_step,
        targets_per_visit=args.targets, table_learning_rate=args.table_learning_rate,
        sharded_from_rows=1 if tables == "sharded" else None, epochs=1, warmup_steps=10, min_epoch_steps=args.steps,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, args=(name, items, count, config, args, folder), nprocs=count)
        figures = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    return figures[0] | {"ranks_equal": len({each["bits"] for each in figures}) == 1}


def _work(
    rank: int, name: str, items: int, count: int, config: TrainConfig, args: argparse.Namespace, folder: str
) -> None:
    worker = _join(rank, count, folder)
    if args.memory_gb is not None:
        whole = torch.cuda.get_device_properties(rank).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_gb * 1e9 / whole)
    data = _data(items, args, config, Path(folder) / f"{rank}.parquet")
    marks: dict[int, tuple[float, float]] = {}  # of a step: the time, and what the device has waited
    bits, exchanged, held = hashlib.sha256(), {}, {}

    def look(now: Training) -> None:
        if now.step in (WARM_STEPS, args.steps):
            waited_ms = now.taken().waiting_ms  # which waits for the device
            marks[now.step] = time.perf_counter(), waited_ms
        if now.step == args.steps:
            for tensor in held_by_all(now):
                bits.update(tensor.detach().cpu().numpy().tobytes())
            exchanged.update(sizes_of_exchange(now))
            held["tables_gb"] = bytes_of_tables(now) / 1e9

    losses: list[float] = []
    note = lambda result: losses.append(result.metrics["train_loss"])  # noqa: E731
    train_model(name, data, config, worker, note, look)
    (began, before_ms), (ended, waited_ms) = marks[WARM_STEPS], marks[args.steps]
    figures = {
        "step_ms": (ended - began) / (args.steps - WARM_STEPS) * 1_000,
        "idle_ms": (waited_ms - before_ms) / (args.steps - WARM_STEPS),
        "exchange_ms": _exchange_ms(worker, **exchanged),
        "train_loss": losses[-1],
        "bits": bits.hexdigest(),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if worker.device != "cpu" else 0.0,
        **held,
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(figures))
    if count > 1:
        dist.destroy_process_group()


def _join(rank: int, count: int, folder: str) -> Worker:
    on_gpu = torch.cuda.is_available()
    torch.set_float32_matmul_precision("high")
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    if count > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("nccl" if on_gpu else "gloo", meeting, rank=rank, world_size=count)
    return Worker(rank, count, f"cuda:{rank}" if on_gpu else "cpu")


def _data(items: int, args: argparse.Namespace, config: TrainConfig, path: Path) -> TrainingData:
    """Return a partition of as many users as four batches of two GPUs."""
    write_partition(path, 8 * args.users, args.length, 8 * args.targets + 1, items)
    return TrainingData.of(Sequences.from_arrow(pq.read_table(path)), items_table(items), config)


def held_by_all(run: Training) -> list[Tensor]:
    """Return the weights and state that every worker has whole."""
    if run.sharded is None:
        return [*run.model.state_dict().values(), *([] if run.row_wise is None else run.row_wise.sums)]
    return [tensor for tensor in (*run.model.parameters(), *run.model.buffers()) if run.sharded.rows_of(tensor) is None]


def bytes_of_tables(run: Training) -> int:
    """Return the memory that this worker's rows of ids take: weights, state, gradients, and places in a batch."""
    tables = [table.weight for table in run.model.items.of_ids()]
    sums = [] if run.row_wise is None else run.row_wise.sums
    places = [*run.sums.by_rows.last, *([] if run.sharded is None else run.sharded.last)]
    moments = [moment for table in tables for moment in run.optimizer.state.get(table, {}).values()]
    return sum(tensor.nbytes for tensor in (*tables, *moments, *sums, *run.sums.whole, *places))


def sizes_of_exchange(run: Training) -> dict[str, int]:
    """Return how many numbers a step sums over the workers, how many each sends to all others, and how many rows of
    sharded tables each gives away."""
    rows = most_rows(run.order(0).shares(0)) if run.sums.tables else 0
    sent = rows * sum(1 + table.embedding_dim for table in run.sums.tables)
    given = 0 if run.sharded is None else run.worker.world * rows * run.sharded.width
    return {"summed": len(run.sums.flat), "sent": sent, "given": given}


def _exchange_ms(worker: Worker, summed: int, sent: int, given: int) -> float:
    """Return the time of an exchange of so many numbers alone."""
    if worker.world == 1:
        return 0.0
    flat, mine, rows = (torch.zeros(size, device=worker.device) for size in (summed, sent, given))
    theirs, got = mine.new_empty(worker.world * sent), torch.empty_like(rows)
    wait = torch.cuda.synchronize if worker.device != "cpu" else lambda: None
    for turn in range(EXCHANGES + 3):
        if turn == 3:  # those before it connect the workers
            wait()
            began = time.perf_counter()
        if given:
            dist.all_to_all_single(got, rows)
        dist.all_reduce(flat)
        if sent:
            dist.all_gather_into_tensor(theirs, mine)
    wait()
    return (time.perf_counter() - began) / EXCHANGES * 1_000


if __name__ == "__main__":
    main()

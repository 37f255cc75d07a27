"""Time of one training step (forward, backward, clipping, optimizer) of the ranker by kind of interest, targets and
length of history.

    make bench-train ARGS=--plain
    python -m benchmarks.train_step --targets 64 --lengths 1024,4096,16384,32768,65536

Random users of equal length, targets spread over the last tenth of the history. On a GPU a step is recorded as the
loop records them, and the whole loop from a Parquet file is measured (benchmarks/train_loop.py). Tables, one JSON line
last.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.train_loop import loop_figures
from etl.warehouse.schemas import WATCH_BUCKETS
from training.config import ModelConfig
from training.data import INTERACTIONS, Batch, Chosen, Joined, Sequences
from training.device_batches import DeviceRows
from training.model import fused
from training.model.ranker import FieldSizes, Ranker
from training.recorded_steps import RecordedSteps
from training.vocabulary import ItemFeatures

MODELS = {
    "softmax_attention": ModelConfig(interest="softmax_attention", codes=128),
    "vql": ModelConfig(codes=128),
    "vql_no_kernel": ModelConfig(codes=128, kernel_components=0),
    "softmax_no_kernel": ModelConfig(interest="softmax_attention", kernel_components=0),
    "recent_attention_200": ModelConfig(interest="recent_attention", recent_window=200),
}


PASSES = ("recorded", "fused", "plain")  # a graph of the fused step; its launches one by one; without fused kernels
CPU_PASSES = ("plain", "blocks")  # one user after another; all users at once in blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--targets", default="64,1024")
    parser.add_argument("--cut-offs", type=int, default=8, help="distinct cut-offs of a user")
    parser.add_argument("--lengths", default="16384")
    parser.add_argument("--models", default="softmax_attention,vql", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--precisions", default="tf32,bf16", help="of fp32, tf32, bf16; a CPU has fp32")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="measure the other passes, too: launches one by one, unfused ones; on a CPU all users in blocks",
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--loop", default="64,256", help="measure the whole loop on a GPU with so many targets a visit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    found = steps(args, on_gpu)
    loops = [
        loop_figures(name, int(targets), precision, args.users)
        for targets in args.loop.split(",")
        for name in args.models.split(",")
        for precision in args.precisions.split(",")
        if on_gpu and targets
    ]
    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU thread(s)"
    figures = {"users": args.users, "cut_offs": args.cut_offs, **best_steps(found), **best_loop(loops)}
    if (fit := linear_fit(found)) is not None:
        figures["r2_step_vs_length"] = fit
    print(json.dumps({"benchmark": "train_step", "device": device, **figures, "loops": loops, "runs": found}))


def steps(args: argparse.Namespace, on_gpu: bool) -> list[dict]:
    """Measure every case, print its line, and return them."""
    precisions = args.precisions.split(",") if on_gpu else ["fp32"]
    passes = (PASSES if on_gpu else CPU_PASSES) if args.plain else ("recorded",) if on_gpu else ("plain",)
    found: list[dict] = []
    print(
        f"{'model':<22}{'L':>8}{'targets':>8}{'':>6}{'pass':>9}{'step ms':>9}{'waited':>8}{'GPU ms':>8}"
        f"{'samples/s':>12}{'peak MB':>9}"
    )
    cases = itertools.product(
        args.lengths.split(","), args.targets.split(","), args.models.split(","), precisions, passes
    )
    for length, targets, name, precision, how in cases:
        batch = make_batch(args.users, int(length), int(targets), args.cut_offs)
        plainly = patch.object(fused, "available", lambda like: False) if how == "plain" else contextlib.nullcontext()
        with plainly:
            figures = measure(MODELS[name], batch, args.runs, args.device, precision, how)
        rate = args.users * int(targets) / figures["step_ms"] * 1_000
        case = {"model": name, "length": int(length), "targets": int(targets), "precision": precision, "pass": how}
        found.append(case | {"samples_per_s": rate} | figures)
        print(
            f"{name:<22}{length:>8}{targets:>8}{precision:>6}{how:>9}{figures['step_ms']:>9.2f}"
            f"{figures['waited_ms']:>8.2f}{figures['gpu_ms']:>8.2f}"
            f"{rate:>12,.0f}{figures['peak_mb']:>9.0f}",
            flush=True,
        )
    return found


def best_steps(found: list[dict]) -> dict[str, float]:
    """Return step_ms_KIND_TARGETS, the fastest precision at 16,384 events, or at the longest histories measured, of the
    pass that is measured first.
    """
    lengths = {run["length"] for run in found}
    length = 16_384 if 16_384 in lengths else max(lengths)
    best: dict[str, float] = {}
    for run in found:
        kind = {"softmax_attention": "exact", "vql": "vql"}.get(run["model"])
        if kind and run["length"] == length and run["pass"] == found[0]["pass"]:
            key = f"step_ms_{kind}_{run['targets']}"
            best[key] = min(run["step_ms"], best.get(key, run["step_ms"]))
    return best


def best_loop(loops: list[dict]) -> dict[str, float]:
    """Return samples a second of the fastest loop with the fewest targets, and the share of time its device waits."""
    if not loops:
        return {}
    fewest = min(run["targets"] for run in loops)
    best = max((run for run in loops if run["targets"] == fewest), key=lambda run: run["loop_samples_per_s"])
    return {name: best[name] for name in ("loop_samples_per_s", "device_idle_share")}


def linear_fit(found: list[dict]) -> float | None:
    """Return the lowest R2, over models and precisions, of a line through step time against length; None for less than
    three lengths.
    """
    groups: dict[tuple, list[tuple[int, float]]] = {}
    for run in found:
        key = run["model"], run["targets"], run["precision"], run["pass"]
        groups.setdefault(key, []).append((run["length"], run["step_ms"]))
    squares = [np.corrcoef(np.array(points).T)[0, 1] ** 2 for points in groups.values() if len(points) > 2]
    return float(min(squares)) if squares else None


def make_batch(users: int, length: int, targets: int, cut_offs: int, items: int = 20_000) -> Batch:
    """Return a random batch; every item has an id and a category."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.choice(np.linspace(0.9 * length, length, cut_offs).astype(np.int64), (users, targets)), 1)
    times = np.sort(rng.integers(0, 30 * 86_400_000, (users, length)), 1)
    target_time = np.take_along_axis(times, ends - 1, 1) + 1
    return Batch(
        items=ItemFeatures({"item_id": np.arange(items), "category": rng.integers(0, 50, items)}),
        event_item=rng.integers(0, items, users * length),
        event_interaction=rng.integers(0, INTERACTIONS, users * length) // WATCH_BUCKETS,
        event_time_ms=times.ravel(),
        event_start=[u * length for u in range(users + 1)],
        target_item=rng.integers(0, items, users * targets),
        target_time_ms=target_time.ravel(),
        target_context=np.zeros(users * targets, np.int64),
        target_first=np.zeros(users * targets, np.int64),
        target_end=ends.ravel(),
        target_label=rng.integers(0, 2, users * targets).astype(np.float32),
        user_rows=np.zeros((users * targets, 0), np.int64),
        target_start=[u * targets for u in range(users + 1)],
        cut_offs=[len(np.unique(e)) for e in ends],
        shared_from=[0] * users,
    )


def joined_of(batch: Batch) -> Joined:
    """Return a partition of the batch's rows alone."""
    users, targets = len(batch.event_start) - 1, len(batch.target_item)
    sequences = Sequences(
        user_id=np.arange(users),
        user_fields=[[]] * users,
        history_start=np.array(batch.event_start),
        history_item=batch.event_item.astype(np.int32),
        history_time_ms=batch.event_time_ms,
        history_interaction=batch.event_interaction.astype(np.int32),
        target_start=np.array(batch.target_start),
        target_item=batch.target_item.astype(np.int32),
        target_time_ms=batch.target_time_ms,
        target_label=batch.target_label.astype(np.int8),
        target_context=np.zeros(targets, np.int16),
        target_split=np.zeros(targets, np.int8),
        target_first=batch.target_first.astype(np.int32),
        target_end=batch.target_end.astype(np.int32),
    )
    return Joined(sequences, batch.items, np.zeros((users, 0), np.int64), np.zeros(targets, np.int64))


def measure(config: ModelConfig, batch: Batch, runs: int, device: str, precision: str, how: str) -> dict[str, float]:
    """Return the medians of a step in ms after three to warm up, and the peak of GPU memory in MB (0 on a CPU).

    A step is forward pass, backward pass, clipping, optimizer and, if it is recorded, the gathering of the batch from
    rows in the device's memory. `step_ms`: one step after another, as training goes; `waited_ms`: each waited for
    before the next begins; `gpu_ms`: the time of its kernels.
    """
    on_gpu = device == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    step = stepper(config, batch, device, precision, how)

    def waited() -> float:
        wait()
        began = time.perf_counter()
        step()
        wait()
        return 1_000 * (time.perf_counter() - began)

    for _ in range(3):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    single = statistics.median(waited() for _ in range(runs))
    if not on_gpu:
        return {"step_ms": single, "waited_ms": single, "gpu_ms": 0.0, "peak_mb": 0.0}
    peak = torch.cuda.max_memory_allocated() / 2**20
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    for mark in marks:
        mark.record()
        step()
    wait()
    row = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step()
        wait()
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 3_000
    return {"step_ms": row, "waited_ms": single, "gpu_ms": busy, "peak_mb": peak}


def stepper(config: ModelConfig, batch: Batch, device: str, precision: str, how: str) -> Callable[[], None]:
    """Return what takes a training step on a new model."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    model = Ranker(FieldSizes((("id", 20_000), ("category", 50)), (), 1), config).to(device).train()
    model.interest.always_at_once = how == "blocks"
    there = batch.to(device)
    if model.coded is not None:
        with torch.no_grad():
            model.coded.quantizer.start_from_keys(
                model.coded.keys(model.items(there.items)), torch.Generator().manual_seed(0)
            )
    optimizer = torch.optim.AdamW(model.parameters(), fused=device == "cuda", capturable=device == "cuda")

    def learn(batch: Batch, _most: int = 0) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits, auxiliary = model(batch)
        weight = None if batch.padding is None else batch.padding.target_weight
        count = len(logits) if batch.padding is None else batch.padding.count[0]
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.target_label, weight, reduction="sum")
        (loss / count + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    if how != "recorded":
        return lambda: learn(there)
    joined, users = joined_of(batch), np.arange(len(batch.event_start) - 1)
    steps = RecordedSteps(DeviceRows(joined, torch.device(device)), len(users), model.interest, learn)
    targets = [np.arange(*ends) for ends in itertools.pairwise(batch.target_start)]
    return lambda: steps(steps.prepared(Chosen.of(joined.sequences, users, targets)), None)


if __name__ == "__main__":
    main()

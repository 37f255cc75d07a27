"""Speed of training: a step by kind of interest, targets and length of history; the loop; peers; and what it comes to.

    make bench-train
    make bench-train ARGS='--package var/peers'    # with FuxiCTR's models: benchmarks/peer_steps.py says how to get it
    python -m benchmarks.train_step --plain --targets 64 --lengths 4096,16384 --loop "" --models vql

Random users of equal length, targets spread over the last tenth of the history. A step is forward pass, backward pass,
clipping and optimizer; on a GPU it is recorded as the loop records it, on a CPU it has one thread. Tables, then one
JSON line:

    step_ms_KIND_TARGETS  exact attention and VQL, the fastest precision at `length` events
    share_of_floor        of the card's datasheet (training/floor.py) over the step of exact attention with the fewest
                          targets; _KIND_TARGETS of each; null on a card whose datasheet is not known, and on a CPU
    fat_rows_ratio        samples a second of the first model's step with the fewest targets, over those of its step
                          on one row a target, each with its own copy of the history
    r2_step_vs_length     of a line through the times of steps, the lowest over models and precisions; _KIND the lowest
                          of a kind
    r2_step_vs_length_vql_PASS  the same of the kernels of VQL's steps by one pass at every length, over events or over
                          codes: a step takes the cheaper one, so that times of steps bend where that changes; null on a
                          CPU, with fewer than three lengths and without VQL
    length_exponent_KIND  the largest power of the length that the time grows by from one length to the next: up to 1 it
                          grows no faster than a line, though it may lie off one
    loop_samples_per_s    of the whole loop from Parquet, the fastest with the fewest targets a visit
    loop_over_step        samples a second of a loop over those of its own step on one batch again and again, the lowest
                          of all; null on a CPU
    travelling_rows_rate  samples a second of loops whose rows are not in the memory of the GPU but travel with a batch,
                          over those of the same loops with resident rows, the lowest; null on a CPU
    device_idle_share     of that loop: the share of the GPU's time between the end of a step and the begin of the next,
                          when it waits for its host, as a training's lines have it; on a CPU steps wait for batches
    no_kernel_share       of that loop: the share of time in which no kernel runs, gaps between those of a step and
                          begins of epochs included; null on a CPU
    peer_ratio            that loop over the bare step of the fastest of FuxiCTR's models on the same rows; _TARGETS the
                          fastest loop of so many; null without --package
    resume_bit_equal      deterministic trainings of all models that go on from a checkpoint come to the bits of
                          undisturbed ones
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.peer_steps import peer_figures
from benchmarks.resumed import apart
from benchmarks.train_loop import in_a_row_ms, loop_figures, loop_rows
from etl.warehouse.schemas import WATCH_BUCKETS
from training import device_batches
from training.config import ModelConfig
from training.data import INTERACTIONS, Batch, Chosen, Joined, Sequences
from training.device_batches import DeviceRows
from training.floor import Counts, card_of, least_ms
from training.model import fused
from training.model.interests import vql
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
KINDS = {"softmax_attention": "exact", "vql": "vql"}  # in the names of figures
FAT_ROWS = 4  # for each user of the other batch: so many that what a step takes anyway does not count for much


@dataclass(frozen=True)
class Sizes:
    """What is measured by default.

    Attributes:
        users: of a batch; lengths: of histories; loop: targets of a visit in the whole loop, over `loop_length` events.
        runs: of a step; peer_batches: samples of a peer's batch.
    """

    users: int
    lengths: str
    loop: str
    loop_length: int
    runs: int
    peer_batches: tuple[int, ...]


GPU = Sizes(32, "1024,4096,16384,65536", "64,256", 4_096, 20, (256, 512, 1_024, 2_048))
CPU = Sizes(4, "512,1024,2048", "64", 512, 5, (16, 64, 256))


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    sizes, on_gpu = args.sizes, args.device == "cuda"
    if not on_gpu:  # two beside another program wait for each other: a step took 80 ms, and 1,000 a minute later
        torch.set_num_threads(1)
    found = steps(args, on_gpu)
    best = best_steps(found)
    loops = [
        loop_figures(name, int(targets), precision, args.users, sizes.loop_length, args.device)
        for targets in args.loop.split(",")
        for name in args.models.split(",")
        for precision in args.precisions.split(",")
        if targets
    ]
    peers = _peers(args) if loops and args.package else []
    if not peers:
        print("peer_ratio is null without the loop and --package: benchmarks/peer_steps.py says how to get FuxiCTR")
    figures = {
        "users": args.users, "cut_offs": args.cut_offs, "length": stated_length(found),
        **{f"step_ms_{case}": run["step_ms"] for case, run in best.items()},
        **loop_summary(loops), "loop_over_step": loop_over_step(loops),
        "travelling_rows_rate": travelling_rows_rate(args, loops),
        **floor_shares(best), **peer_ratios(loops, peers),
        "fat_rows_ratio": fat_rows_ratio(args, found), **growth_with_length(found),
        **growth_of_each_pass(args),
        "resume_bit_equal": apart([MODELS[name] for name in args.models.split(",")], args.device),
    }  # fmt: skip
    device = torch.cuda.get_device_name() if on_gpu else "one CPU thread"
    line = {"benchmark": "train_step", "device": device} | figures
    print(json.dumps(line | {"loops": loops, "peers": peers, "runs": found}))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, help="of a batch; default: 32, on a CPU 4")
    parser.add_argument(
        "--targets", default="64,1024", help="more than the fewest only at one length: 16384, or the longest"
    )
    parser.add_argument("--cut-offs", type=int, default=8, help="distinct cut-offs of a user")
    parser.add_argument("--lengths", help=f"default: {GPU.lengths}, on a CPU {CPU.lengths}")
    parser.add_argument("--models", default="softmax_attention,vql", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--precisions", default="tf32,bf16", help="of fp32, tf32, bf16; a CPU has fp32")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="measure the other passes, too: launches one by one, unfused ones; on a CPU all users in blocks",
    )
    parser.add_argument("--runs", type=int, help="default: 20, on a CPU 5")
    parser.add_argument(
        "--loop", help="targets of a visit in the whole loop; '' for no loop; default: 64,256, on a CPU 64"
    )
    parser.add_argument("--package", type=Path, help="folder with FuxiCTR in it, to measure its models, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    args.sizes = GPU if args.device == "cuda" else CPU
    for name in ("users", "lengths", "loop", "runs"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args.sizes, name))
    if args.device != "cuda":
        args.precisions = "fp32"
    return args


def steps(args: argparse.Namespace, on_gpu: bool) -> list[dict]:
    """Measure every case, print its line, and return them."""
    passes = (PASSES if on_gpu else CPU_PASSES) if args.plain else ("recorded",) if on_gpu else ("plain",)
    found: list[dict] = []
    print(
        f"{'model':<22}{'L':>8}{'targets':>8}{'':>6}{'pass':>9}{'step ms':>9}{'waited':>8}{'GPU ms':>8}"
        f"{'samples/s':>12}{'peak MB':>9}{'floor ms':>10}"
    )
    lengths, counts = _numbers(args.lengths), _numbers(args.targets)
    sizes = [
        (length, count) for length in lengths for count in counts if count == min(counts) or length == stated(lengths)
    ]
    batches = {size: make_batch(args.users, *size, args.cut_offs) for size in sizes}
    cases = itertools.product(batches.items(), args.models.split(","), args.precisions.split(","), passes)
    for ((length, targets), batch), name, precision, how in cases:
        plainly = patch.object(fused, "available", lambda like: False) if how == "plain" else contextlib.nullcontext()
        with plainly:
            figures = measure(MODELS[name], batch, args.runs, args.device, precision, how)
        rate = args.users * targets / figures["step_ms"] * 1_000
        card = card_of(args.device)
        count = sum(p.numel() for p in ranker(MODELS[name]).parameters())
        least = None if card is None else least_ms(card, Counts.of(batch), MODELS[name], precision, count)
        case = {"model": name, "length": length, "targets": targets, "precision": precision, "pass": how}
        found.append(case | {"samples_per_s": rate, "floor_ms": least} | figures)
        print(
            f"{name:<22}{length:>8}{targets:>8}{precision:>6}{how:>9}{figures['step_ms']:>9.2f}"
            f"{figures['waited_ms']:>8.2f}{figures['gpu_ms']:>8.2f}"
            f"{rate:>12,.0f}{figures['peak_mb']:>9.0f}{'' if least is None else f'{least:.3f}':>10}",
            flush=True,
        )
    return found


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def stated(lengths: list[int]) -> int:
    """Return the length whose steps are the figures: 16,384, or the longest."""
    return 16_384 if 16_384 in lengths else max(lengths)


def stated_length(found: list[dict]) -> int:
    return stated([run["length"] for run in found])


def best_steps(found: list[dict]) -> dict[str, dict]:
    """Return KIND_TARGETS -> the run with the fastest precision at the stated length, of the pass measured first."""
    best: dict[str, dict] = {}
    for run in found:
        if run["model"] in KINDS and run["length"] == stated_length(found) and run["pass"] == found[0]["pass"]:
            key = f"{KINDS[run['model']]}_{run['targets']}"
            best[key] = min(run, best.get(key, run), key=lambda one: one["step_ms"])
    return best


def floor_shares(best: dict[str, dict]) -> dict[str, float | None]:
    """Return what the floor is of each step of `best_steps`, and of exact attention with the fewest targets."""
    shares = {
        f"share_of_floor_{case}": None if run["floor_ms"] is None else run["floor_ms"] / run["step_ms"]
        for case, run in best.items()
    }
    exact = [run["targets"] for case, run in best.items() if case.startswith("exact")]
    return {"share_of_floor": shares[f"share_of_floor_exact_{min(exact)}"] if exact else None} | shares


def fat_rows_ratio(args: argparse.Namespace, found: list[dict]) -> float:
    """Return samples a second of users with their targets, over those of as many users as targets.

    Of the first model, the pass measured first and the fastest precision of each, at the stated length with the fewest
    targets. A fat row has one target, and a history of its own.
    """
    first, length = found[0], stated_length(found)
    same = [run for run in found if all(run[name] == first[name] for name in ("model", "pass", "targets"))]
    rate = max(run["samples_per_s"] for run in same if run["length"] == length)
    rows = FAT_ROWS * args.users
    fat = min(
        measure(
            MODELS[first["model"]], make_batch(rows, length, 1, 1), args.runs, args.device, precision, first["pass"]
        )["step_ms"]
        for precision in args.precisions.split(",")
    )
    print(f"{rows} fat rows of {length} events: {fat:.2f} ms, {rows / fat * 1_000:,.0f} samples/s", flush=True)
    return rate * fat / (1_000 * rows)


def _fastest_loops(loops: list[dict]) -> dict[int, dict]:
    """Return targets of a visit -> the fastest loop, in order."""
    by_rate = sorted(loops, key=lambda run: run["loop_samples_per_s"])
    return dict(sorted({run["targets"]: run for run in by_rate}.items()))


def loop_summary(loops: list[dict]) -> dict[str, float | None]:
    """Return samples a second of the fastest loop with the fewest targets, and the shares of time in which its device
    waits, and has no kernel.
    """
    best = next(iter(_fastest_loops(loops).values()), {})
    return {name: best.get(name) for name in ("loop_samples_per_s", "device_idle_share", "no_kernel_share")}


def loop_over_step(loops: list[dict]) -> float | None:
    """Return the lowest share of its step's samples a second that a loop comes to; None where no step was measured."""
    shares = (loop["loop_over_step"] for loop in loops)
    return min((share for share in shares if share is not None), default=None)


def travelling_rows_rate(args: argparse.Namespace, loops: list[dict]) -> float | None:
    """Return samples a second of loops whose rows travel with their batches over those of the fastest loops of so many
    targets, the lowest; None on a CPU, which holds the rows.
    """
    if args.device != "cuda":
        return None
    rates = []
    with patch.object(device_batches, "LARGEST_SHARE", 0.0):
        for loop in _fastest_loops(loops).values():
            case = loop["model"], loop["targets"], loop["precision"], args.users, loop["length"], args.device
            rates.append(loop_figures(*case)["loop_samples_per_s"] / loop["loop_samples_per_s"])
    return min(rates, default=None)


def peer_ratios(loops: list[dict], peers: list[dict]) -> dict[str, Any]:
    """Return samples a second of the fastest loops over those of the fastest peer, which is named."""
    if not (loops and peers):
        return {"peer_ratio": None}
    fastest = max(peers, key=lambda peer: peer["samples_per_s"])
    rates = {targets: run["loop_samples_per_s"] for targets, run in _fastest_loops(loops).items()}
    ratios = {f"peer_ratio_{targets}": rate / fastest["samples_per_s"] for targets, rate in rates.items()}
    return {"peer_ratio": next(iter(ratios.values())), **ratios, "fastest_peer": fastest["model"]}


def _peers(args: argparse.Namespace) -> list[dict]:
    """Measure FuxiCTR's models on the rows of the loop with the fewest targets a visit."""
    targets = min(int(targets) for targets in args.loop.split(","))
    rows = Sequences.from_arrow(loop_rows(args.users, args.sizes.loop_length, targets))
    return peer_figures(args.package, rows, args.device, args.sizes.peer_batches)


def growth_with_length(found: list[dict]) -> dict[str, float | None]:
    """Return R2 of a line through step time against length, the lowest of all and of each kind, and the largest power
    of the length that a kind's time grows by from one length to the next.

    Of models and precisions with three lengths or more; R2 of all is None where there is none.
    """
    groups: dict[tuple, list[tuple[int, float]]] = {}
    for run in found:
        key = run["model"], run["targets"], run["precision"], run["pass"]
        groups.setdefault(key, []).append((run["length"], run["step_ms"]))
    squares, powers = defaultdict(list), defaultdict(list)
    for (model, *_), points in groups.items():
        if len(points) > 2:
            length_N, ms_N = np.array(sorted(points)).T
            kind = KINDS.get(model, model)
            squares[kind].append(_r2(length_N, ms_N))
            powers[kind].append(float((np.diff(np.log(ms_N)) / np.diff(np.log(length_N))).max()))
    lowest = {f"r2_step_vs_length_{kind}": min(of_kind) for kind, of_kind in squares.items()}
    largest = {f"length_exponent_{kind}": max(of_kind) for kind, of_kind in powers.items()}
    return {"r2_step_vs_length": min(lowest.values(), default=None)} | lowest | largest


def growth_of_each_pass(args: argparse.Namespace) -> dict[str, float | None]:
    """Return R2 of a line through what the kernels of VQL's steps take against length, by each of its two passes at
    every length; the lowest of the precisions.
    """
    lengths, targets = _numbers(args.lengths), min(_numbers(args.targets))
    squares: dict[str, list[float]] = {"events": [], "codes": []}
    if args.device == "cuda" and "vql" in args.models.split(",") and len(lengths) > 2:
        batches = [make_batch(args.users, length, targets, args.cut_offs) for length in lengths]
        for name, precision in itertools.product(squares, args.precisions.split(",")):
            by_codes = np.full(args.users, name == "codes")
            with patch.object(vql, "preferred", lambda *_, chosen_U=by_codes: chosen_U):
                kernels_ms = [
                    measure(MODELS["vql"], batch, args.runs, args.device, precision, "recorded")["gpu_ms"]
                    for batch in batches
                ]
            squares[name].append(_r2(np.array(lengths), np.array(kernels_ms)))
            print(f"vql over {name:<7}{precision:>6}", *(f"{one:.2f} ms" for one in kernels_ms), flush=True)
    return {f"r2_step_vs_length_vql_{name}": min(found, default=None) for name, found in squares.items()}


def _r2(length_N: np.ndarray, ms_N: np.ndarray) -> float:
    return float(np.corrcoef(length_N, ms_N)[0, 1] ** 2)


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
    row = in_a_row_ms(step, runs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step()
        wait()
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 3_000
    return {"step_ms": row, "waited_ms": single, "gpu_ms": busy, "peak_mb": peak}


def ranker(config: ModelConfig) -> Ranker:
    """Return a new model of `make_batch`'s items."""
    return Ranker(FieldSizes((("id", 20_000), ("category", 50)), (), 1), config)


def stepper(config: ModelConfig, batch: Batch, device: str, precision: str, how: str) -> Callable[[], None]:
    """Return what takes a training step on a new model."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    model = ranker(config).to(device).train()
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

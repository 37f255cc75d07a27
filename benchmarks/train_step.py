"""Time of one training step (forward and backward) of the ranker by kind of interest and length of history.

    python -m benchmarks.train_step --users 32 --targets 64 --lengths 1024,4096,16384

Random users of equal length, targets spread over the last tenth of the history. A table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

from etl.warehouse.schemas import WATCH_BUCKETS
from training.config import ModelConfig
from training.data import INTERACTIONS, Batch
from training.model.ranker import FieldSizes, Ranker
from training.vocabulary import ItemFeatures

MODELS = {
    "softmax_attention": ModelConfig(interest="softmax_attention", codes=128),
    "vql": ModelConfig(codes=128),
    "vql_no_kernel": ModelConfig(codes=128, kernel_components=0),
    "softmax_no_kernel": ModelConfig(interest="softmax_attention", kernel_components=0),
    "recent_attention_200": ModelConfig(interest="recent_attention", recent_window=200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--targets", type=int, default=64)
    parser.add_argument("--cut-offs", type=int, default=8, help="distinct cut-offs of a user")
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    found = []
    print(f"{'model':<24}{'L':>8}{'median ms':>12}{'samples/s':>12}{'peak MB':>10}")
    for length in map(int, args.lengths.split(",")):
        batch = make_batch(args.users, length, args.targets, args.cut_offs).to(args.device)
        for name in args.models.split(","):
            milliseconds, peak = measure(MODELS[name], batch, args.runs, args.device)
            rate = args.users * args.targets / milliseconds * 1_000
            found.append({"model": name, "length": length, "ms": milliseconds, "samples_per_s": rate, "peak_mb": peak})
            print(f"{name:<24}{length:>8}{milliseconds:>12.1f}{rate:>12,.0f}{peak:>10.0f}", flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(json.dumps({"benchmark": "train_step", "device": device, "users": args.users, "targets": args.targets, "cut_offs": args.cut_offs, "runs": found}))


def make_batch(users: int, length: int, targets: int, cut_offs: int, items: int = 20_000) -> Batch:
    """Return a random batch; every item has an id and a category."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.choice(np.linspace(0.9 * length, length, cut_offs).astype(np.int64), (users, targets)), 1)
    times = np.sort(rng.integers(0, 30 * 86_400_000, (users, length)), 1)
    target_time = np.take_along_axis(times, ends - 1, 1) + 1
    return Batch(
        items=ItemFeatures({"item_id": np.arange(items), "category": rng.integers(0, 50, items)}),
        event_item=rng.integers(0, items, users * length), event_interaction=rng.integers(0, INTERACTIONS, users * length) // WATCH_BUCKETS,
        event_time_ms=times.ravel(), event_start=[u * length for u in range(users + 1)],
        target_item=rng.integers(0, items, users * targets), target_time_ms=target_time.ravel(), target_context=np.zeros(users * targets, np.int64),
        target_first=np.zeros(users * targets, np.int64), target_end=ends.ravel(), target_label=rng.integers(0, 2, users * targets).astype(np.float32),
        user_rows=np.zeros((users * targets, 0), np.int64), target_start=[u * targets for u in range(users + 1)],
        cut_offs=[len(np.unique(e)) for e in ends], shared_from=[0] * users)  # fmt: skip


def measure(config: ModelConfig, batch: Batch, runs: int, device: str) -> tuple[float, float]:
    """Return the median milliseconds of a step after two to warm up, and the peak of GPU memory in MB (0 on a CPU)."""
    torch.manual_seed(0)
    model = Ranker(FieldSizes((("id", 20_000), ("category", 50)), (), 1), config).to(device).train()
    if model.coded is not None:
        with torch.no_grad():
            model.coded.quantizer.start_from_keys(model.coded.keys(model.items(batch.items)), torch.Generator().manual_seed(0))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(runs + 2):
        wait()
        began = time.perf_counter()
        logits, auxiliary = model(batch)
        (F.binary_cross_entropy_with_logits(logits, batch.target_label) + auxiliary).backward()
        wait()
        seconds.append(time.perf_counter() - began)
        model.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    return 1_000 * statistics.median(seconds[2:]), peak


if __name__ == "__main__":
    main()

"""Latency of scoring and memory of training by length of the history, one layer of attention and one step.

Legend: L events, T targets, H heads, d head width, C codes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from etl.warehouse.partitions import MS_PER_DAY
from training.model.attention import cache_attention, event_attention
from training.model.blocks import Layout, block_attention
from training.model.cache import build_cache, stored, to_sparse
from training.model.fused import Seen
from training.model.history import one_user
from training.model.kernel import MixtureKernel
from training.model.refined import CodedHistory, index_events, refined_cache_part

HEADS, WIDTH, CODES, CANDIDATES, ROUNDS = 4, 16, 128, 500, 5
LENGTHS = (1_000, 4_000, 16_000, 64_000)
NOW_MS = 1_650_000_000_000
USERS, TARGETS = 64, 64


def measure(results: Path, device: str) -> None:
    """Write latency.json (one CPU thread) and memory.json, unless they are there.

    A GPU's allocator is asked, else autograd.
    """
    results.mkdir(parents=True, exist_ok=True)
    on = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    for name, where, take in (("memory", on, lambda: memory(device)), ("latency", "one CPU thread", latency)):
        if not (results / f"{name}.json").exists():
            (results / f"{name}.json").write_text(
                json.dumps({"torch": torch.__version__, "device": where, "rows": take()}, indent=1)
            )


@torch.no_grad()
def latency() -> list[dict]:
    """Milliseconds to score the candidates of one user, medians of turns that all methods take together."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for length in LENGTHS:
        runs, cache_bytes = _scorers(length)
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(ROUNDS + 1):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                if turn:  # the first is warm-up
                    taken[name].append((time.perf_counter() - began) * 1e3)
        rows.append(
            {
                "length": length,
                "cache_bytes": cache_bytes,
                **{name: statistics.median(ms) for name, ms in taken.items()},
            }
        )
        print(f"latency, L = {length:,}: " + ", ".join(f"{name} {rows[-1][name]:.1f} ms" for name in runs), flush=True)
    torch.set_num_threads(threads)
    return rows


def _scorers(length: int) -> tuple[dict[str, Callable[[], object]], int]:
    torch.manual_seed(0)
    query_THd, key_LHd, value_LHd = (torch.randn(n, HEADS, WIDTH) * WIDTH**-0.25 for n in (CANDIDATES, length, length))
    codebook_HCd = torch.randn(HEADS, CODES, WIDTH) * WIDTH**-0.25
    codes_LG = torch.randint(CODES, (length, HEADS))
    times = torch.sort(NOW_MS - (torch.rand(length) * 400 * MS_PER_DAY).long()).values
    at, ends = torch.full((CANDIDATES,), NOW_MS), torch.full((CANDIDATES,), length)
    one, two = MixtureKernel(HEADS, (2.0,)), MixtureKernel(HEADS, (2.0, 180.0))
    caches = {
        1: build_cache(codes_LG, value_LHd, times, NOW_MS, CODES, one),
        2: build_cache(codes_LG, value_LHd, times, NOW_MS, CODES, two),
    }
    history = CodedHistory(caches[2], index_events(codes_LG, CODES), key_LHd, value_LHd, times)

    def refined(count: int) -> Callable[[], object]:
        return lambda: refined_cache_part(query_THd, codebook_HCd, history, at, two, count)

    runs: dict[str, Callable[[], object]] = {
        "exact": lambda: event_attention(query_THd, key_LHd, *one_user(value_LHd, times, at, ends), two),
        "vql_1_exponential": lambda: cache_attention(query_THd, codebook_HCd, caches[1], at, one),
        "vql": lambda: cache_attention(query_THd, codebook_HCd, caches[2], at, two),
        "vql_refined_16": refined(16),
        "vql_refined_64": refined(64),
        "cache_build": lambda: build_cache(codes_LG, value_LHd, times, NOW_MS, CODES, two),
    }
    sparse = to_sparse(stored(caches[2], torch.float16))
    return runs, sparse.entry_K.nbytes + sparse.log_count_K.nbytes + sparse.mean_Kd.nbytes


def memory(device: str) -> list[dict]:
    """Bytes that one forward and backward pass holds at most, for users of one length and for one long user among short
    ones.
    """
    rows = []
    for mean in (512, 1_024, 2_048, 4_096):
        total = mean * USERS
        skewed = [total - (USERS - 1) * (mean // 8), *[mean // 8] * (USERS - 1)]
        for shape, lengths in (("equal", [mean] * USERS), ("one long", skewed)):
            held = _peak(lengths, device)
            rows.append({"shape": shape, "events": sum(lengths), "longest": max(lengths), "bytes": held})
            print(
                f"memory, {shape}: {sum(lengths):,} events, longest {max(lengths):,}: {held / 2**20:,.0f} MiB",
                flush=True,
            )
    return rows


def _peak(lengths: list[int], device: str) -> int:
    torch.manual_seed(0)
    starts = [0, *accumulate(lengths)]
    query_THd, key_EHd, value_EHd = (
        torch.randn(n, HEADS, WIDTH, device=device, requires_grad=True)
        for n in (USERS * TARGETS, starts[-1], starts[-1])
    )
    times = torch.cat([torch.sort(NOW_MS - (torch.rand(n) * 400 * MS_PER_DAY).long()).values for n in lengths]).to(
        device
    )
    ends = torch.tensor(lengths).repeat_interleave(TARGETS).to(device)
    at = torch.full((USERS * TARGETS,), NOW_MS, device=device)
    kernel = MixtureKernel(HEADS, (2.0, 180.0)).to(device)
    layouts = Layout.of(starts, list(range(0, USERS * TARGETS + 1, TARGETS)), torch.device(device))
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        parts = [
            block_attention(layout, query_THd, key_EHd, value_EHd, Seen(times, at, ends), kernel) for layout in layouts
        ]
        out = torch.cat(parts)
    F.mse_loss(out, torch.zeros_like(out)).backward()
    return torch.cuda.max_memory_allocated() if device == "cuda" else sum(saved.values())

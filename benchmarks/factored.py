"""Time of one user's training pass: exact attention, item-level straight-through, factored; forward and backward on the
CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.factored     # two minutes; prints a table, then one JSON line

Every figure is the median of runs that take turns, so that other work on the machine meets all passes alike. More
threads than idle cores make every figure a lottery: torch's threads wait for each other.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from etl.warehouse.partitions import MS_PER_DAY
from training.model.attention import CodedKeys, event_attention
from training.model.factored import factored_attention
from training.model.history import one_user
from training.model.kernel import MixtureKernel

LENGTH, HEADS, WIDTH, CODES, GROUPS, DAYS = 16_384, 4, 16, 128, 4, 14
ROUNDS = 7
NOW_MS = 1_650_000_000_000
Key = TypeVar("Key")


def passes(targets: int, cut_offs: int, half_lives: tuple[float, ...]) -> dict[str, Callable[[], Tensor]]:
    """Return the passes over the same data; `cut_offs` 0 = every target its own."""
    torch.manual_seed(0)
    query_THd, key_LHd, value_LHd = (
        torch.randn(n, HEADS, WIDTH).mul_(WIDTH**-0.25).requires_grad_(True) for n in (targets, LENGTH, LENGTH)
    )
    codebook_HCd = torch.randn(HEADS, CODES, WIDTH) * WIDTH**-0.25
    codes_LG = torch.randint(CODES, (LENGTH, GROUPS))
    times = torch.sort(NOW_MS - (torch.rand(LENGTH) * DAYS * MS_PER_DAY).long()).values
    end_T = torch.full((targets,), LENGTH)
    if cut_offs != 1:
        choices = torch.linspace(LENGTH / 2, LENGTH, cut_offs or targets).long()
        end_T = choices[torch.arange(targets) * len(choices) // targets]
    target_times = times[end_T - 1] + 1000
    kernel = MixtureKernel(HEADS, half_lives) if half_lives else None
    seen, coded = one_user(value_LHd, times, target_times, end_T), CodedKeys(key_LHd, codebook_HCd, codes_LG)

    def exact() -> Tensor:
        if kernel is None and cut_offs == 1:  # nothing to mask: the fastest form there is
            query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query_THd, key_LHd, value_LHd))
            return F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return event_attention(query_THd, key_LHd, *seen, kernel)

    def item_level() -> Tensor:
        return event_attention(query_THd, coded.hard_LHd(), *seen, kernel)

    def factored() -> Tensor:
        return factored_attention(query_THd, coded, *seen, kernel).out_THd

    return {"exact": exact, "item_level": item_level, "factored": factored}


def measure(runs: dict[Key, Callable[[], Tensor]], rounds: int) -> dict[Key, float]:
    """Return the median milliseconds of forward and backward of each."""
    taken: dict[Key, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run().square().sum().backward()
            if turn:  # the first is warm-up
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(ms), 1) for name, ms in taken.items()}


def main() -> None:
    threads = torch.get_num_threads()
    print(f"L={LENGTH}, H={HEADS}, d={WIDTH}, C={CODES}, G={GROUPS}, {threads} threads; median ms of {ROUNDS}")
    columns = ("exact", "item_level", "factored")
    print(
        f"{'components':>11} {'cut-offs':>9} {'T':>6}" + "".join(f"{name:>12}" for name in columns) + "  exact/factored"
    )
    rows = []
    for half_lives, sizes in (
        ((), (64, 256, 1024)),
        ((2.0, 180.0), (64, 256)),
    ):  # with a kernel a pass of 1,024 takes seconds
        for cut_offs in (1, DAYS, 0):
            runs = {
                (targets, name): run for targets in sizes for name, run in passes(targets, cut_offs, half_lives).items()
            }
            medians = measure(runs, ROUNDS)
            for targets in sizes:
                ms = {name: medians[targets, name] for name in columns}
                speed_up = round(ms["exact"] / ms["factored"], 1)
                growth = round(ms["factored"] / medians[sizes[0], "factored"], 2)
                row = {"components": len(half_lives), "cut_offs": cut_offs or targets, "targets": targets, **ms}
                rows.append({**row, "exact_over_factored": speed_up, "over_64_targets": growth})
                print(
                    f"{len(half_lives):>11} {row['cut_offs']:>9} {targets:>6}"
                    + "".join(f"{ms[n]:>12}" for n in columns)
                    + f"{speed_up:>16}"
                )
    print(json.dumps({"length": LENGTH, "codes": CODES, "threads": threads, "rows": rows}))


if __name__ == "__main__":
    main()

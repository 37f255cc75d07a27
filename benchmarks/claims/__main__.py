"""The claims report: every claim of the method, measured on the data at hand, on one page.

    python -m benchmarks.claims    # all steps; hours on two CPU cores, some twelve minutes on one GPU
    python -m benchmarks.claims --steps page          # the page again, from results that are there
    python -m benchmarks.claims --seeds 1 --variants exact,vql --sets simulated --steps prepare,train,page

Steps: `prepare` makes the partitions (needs Spark for real rows), `train` trains every model several times (needs torch
alone, so it also runs where there is a GPU and nothing else), `measure` takes latency and memory, `page` writes
OUT/index.html. Whatever a results file already holds is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.claims.train import grid, missing, train
from benchmarks.claims.variants import VARIANTS

STEPS = ("prepare", "train", "measure", "page")
SETS = ("simulated", "drifting", "kuairand", "movielens", "buildroot")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("var/claims"), help="folder of partitions and of the page")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results/claims"), help="folder of what was measured"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of real rows")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    steps, sets, variants = args.steps.split(","), args.sets.split(","), args.variants.split(",")
    for given, known in ((steps, STEPS), (sets, SETS), (variants, tuple(VARIANTS))):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    trainings = args.results / "trainings.jsonl"
    runs = missing(grid(sets, args.out, args.seeds, variants), trainings)
    if "prepare" in steps:
        from benchmarks.claims.partitions import prepare

        prepare(args.out, args.data, sorted({run.data_set for run in runs}), args.seeds)
    if "train" in steps and runs:
        train([run for run in runs if (run.folder / "sequences.parquet").exists()], trainings, args.jobs, args.device)
    if "measure" in steps:
        from benchmarks.claims.costs import measure

        measure(args.results, args.device)
    if "page" in steps:
        from benchmarks.claims.page import write_page

        print(f"page: {write_page(args.results, args.out)}")


if __name__ == "__main__":
    main()

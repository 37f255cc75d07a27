"""What an evaluation takes: the table of metrics, intervals and slices over so many scores, its time and peak memory.

    python -m benchmarks.evaluation --targets 100000000 --users 1000000

The scores are drawn, a chunk at a time, and rounded so that there are ties; the figures are those of
`evaluation.evaluate.compare`, which every evaluation makes, in this one process.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from types import SimpleNamespace

import numpy as np

from evaluation.evaluate import compare

CHUNK = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=100_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--models", type=int, default=1, help="models over the same targets (default: 1)")
    args = parser.parse_args()
    targets, scores = drawn(args.targets, args.users, args.models)
    before = peak_gb()
    began, worked = time.perf_counter(), time.process_time()
    nowhere = np.zeros(args.targets, bool)  # random traffic
    found = compare(targets, scores, "model_0", {}, nowhere)  # type: ignore[arg-type]
    figures = {name: found["models"][0][name] for name in ("auc", "auc_low", "auc_high", "gauc", "logloss", "users")}
    measured = {
        "targets": args.targets,
        "models": args.models,
        "peak_gb": round(peak_gb(), 2),
        "peak_gb_of_the_scores_alone": round(before, 2),
        "wall_s": round(time.perf_counter() - began, 1),
        "process_s": round(time.process_time() - worked, 1),
    }
    print(json.dumps(measured | figures, indent=1))


def drawn(targets: int, users: int, models: int) -> tuple[SimpleNamespace, dict[str, np.ndarray]]:
    """Return columns of an evaluation, as `scores.parquet` has them, and a score by each model."""
    rng = np.random.default_rng(0)
    label, length = np.empty(targets, np.int8), np.empty(targets, np.int32)
    scores = {f"model_{number}": np.empty(targets, np.float32) for number in range(models)}
    user = np.empty(targets, np.int64)
    for start in range(0, targets, CHUNK):
        part = slice(start, min(start + CHUNK, targets))
        logit = rng.normal(size=part.stop - part.start)
        user[part] = np.arange(part.start, part.stop) * users // targets
        label[part] = rng.uniform(size=len(logit)) < 1 / (1 + np.exp(-1.5 * logit))
        length[part] = rng.integers(0, 10_000, len(logit))
        for score in scores.values():
            score[part] = np.round(1 / (1 + np.exp(-logit - rng.normal(size=len(logit)))), 5)
    return SimpleNamespace(user_id=user, label=label, history_length=length), scores


def peak_gb() -> float:
    """Return the most memory that this process has had, GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    main()

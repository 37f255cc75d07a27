"""What an evaluation takes: metrics, intervals, slices and groups over so many scores, its time and peak memory.

    python -m benchmarks.evaluation --targets 100000000 --users 1000000

The scores are drawn, a chunk at a time, rounded so that there are ties, and written as `scores.parquet`; what reads
them is `evaluation.evaluate.judge`, as in every evaluation, in this one process.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.stage.folder import Folder
from etl.warehouse.partitions import MS_PER_DAY
from evaluation.day_scores import SCORES_FILE, TARGET_COLUMNS
from evaluation.evaluate import judge

CHUNK = 1 << 20
RARE_BELOW = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=100_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--models", type=int, default=1, help="models over the same targets (default: 1)")
    args = parser.parse_args()
    training = {"primary": "model_0", "config": {"vocabulary": {"min_occurrences": RARE_BELOW}}}
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / SCORES_FILE, args.targets, args.users, args.models)
        before = peak_gb()
        began, worked = time.perf_counter(), time.process_time()
        _, found = judge(Folder(folder, "--runs"), "2022-04-21", {}, training)
        spent_s, processed_s = time.perf_counter() - began, time.process_time() - worked
    figures = {name: found["models"][0][name] for name in ("auc", "auc_low", "auc_high", "gauc", "logloss", "users")}
    measured = {
        "targets": args.targets,
        "models": args.models,
        "groups": len(found["groups"]),
        "peak_gb": round(peak_gb(), 2),
        "peak_gb_before": round(before, 2),
        "wall_s": round(spent_s, 1),
        "process_s": round(processed_s, 1),
    }
    print(json.dumps(measured | figures, indent=1))


def draw(path: Path, targets: int, users: int, models: int) -> None:
    """Write scores of an evaluation, ordered by user as they are, with a score by each model."""
    rng = np.random.default_rng(0)
    names = [f"model_{number}" for number in range(models)]
    schema = pa.schema([*TARGET_COLUMNS.items(), *((name, pa.float32()) for name in names)])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, targets, CHUNK):
            rows = min(CHUNK, targets - start)
            logit = rng.normal(size=rows)
            columns = {
                "user_id": np.arange(start, start + rows) * users // targets,
                "item_id": rng.integers(0, 1_000_000, rows),
                "time_ms": rng.integers(0, MS_PER_DAY, rows),
                "label": rng.uniform(size=rows) < 1 / (1 + np.exp(-1.5 * logit)),
                "history_length": rng.integers(0, 10_000, rows),
                "is_random": np.zeros(rows, bool),
                "context": rng.integers(0, 12, rows),
                "train_occurrences": rng.geometric(0.02, rows) - 1,  # nine in ten are in one group
            }
            for name in names:
                columns[name] = np.round(1 / (1 + np.exp(-logit - rng.normal(size=rows))), 5)
            arrays = [columns[field.name].astype(field.type.to_pandas_dtype()) for field in schema]
            writer.write_table(pa.table(arrays, schema=schema))


def peak_gb() -> float:
    """Return the most memory that this process has had, GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    main()

"""One user with a million events passes within the memory limit given; no task holds more than a bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from etl.datasets.definition import dataset
from etl.warehouse.partitions import MS_PER_DAY, day_number
from etl.warehouse.store import TableStore

pytestmark = [pytest.mark.slow, pytest.mark.spark]

ROOT = Path(__file__).resolve().parents[2]
DT, DAYS, HEAVY_EVENTS, LIGHT_USERS = "2022-04-12", 5, 1_000_000, 2_000
TASK_GB = 2.0  # address space of a Python worker
# Runs a job in a process of its own and prints the kB of the largest one below it: this process has other tests' too.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, "-m", *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def write_log(folder: Path) -> int:
    rng = np.random.default_rng(1)
    user = np.concatenate([np.zeros(HEAVY_EVENTS, np.int64), np.repeat(np.arange(1, LIGHT_USERS + 1), 50)])
    n = len(user)
    time_ms = day_number("2022-04-08") * MS_PER_DAY + rng.integers(0, DAYS * MS_PER_DAY - 1, n)
    columns = {name: np.zeros(n, np.int64) for name in dataset("kuairand").logs.columns}
    columns |= {
        "user_id": user,
        "video_id": rng.integers(0, 50_000, n),
        "time_ms": time_ms,
        "is_click": rng.integers(0, 2, n),
        "play_time_ms": rng.integers(0, 60_000, n),
        "duration_ms": rng.integers(1_000, 60_000, n),
        "tab": np.ones(n, np.int64),
    }
    table = pa.table(columns)
    pacsv.write_csv(table, folder / "log_standard_4_08_to_4_13_big.csv", pacsv.WriteOptions(quoting_style="none"))
    return n


def test_a_user_with_a_million_events(tmp_path):
    rows = write_log(tmp_path)
    warehouse = tmp_path / "w"
    base = [
        "--dataset",
        "kuairand",
        "--warehouse",
        str(warehouse),
        "--dt",
        DT,
        "--attempt",
        "big",
        "--raw",
        str(tmp_path),
        "--lookback-days",
        str(DAYS),
    ]

    store, peaks_gb = TableStore(str(warehouse), "kuairand"), []
    env = {**os.environ, "LONGVIEW_SPARK_MEMORY": "1g", "PYTHONPATH": str(ROOT)}
    for module, more, tables in (
        ("etl.jobs.events", ["--buckets", "8"], ("events",)),
        ("etl.jobs.sequences", ["--target-days", "2", "--max-history", "1000000"], ("items", "sequences")),
    ):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, module, *base, *more], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peaks_gb.append(int(done.stdout.splitlines()[-1]) / 1e6)
        for table in tables:
            for day in store.staged_days("big", table):
                store.publish("big", table, day)
    events = sum(store.require("events", day).rows for day in store.days("events"))
    assert events <= rows
    assert events > 0.99 * rows
    sequences = store.read(store.require("sequences", DT))
    heavy = sequences.filter(pa.array(sequences["user_id"].to_numpy() == 0)).to_pylist()[0]
    assert len(heavy["history_time_ms"]) > 900_000
    assert heavy["target_history_end"] == sorted(heavy["target_history_end"])
    assert max(peaks_gb) < TASK_GB, f"a process of the two jobs took {max(peaks_gb):.1f} GB"

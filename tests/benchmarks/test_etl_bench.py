"""`make bench-etl`: its logs are what it says, it separates different results, and the quick run ends in one JSON line.

python -m pytest tests/benchmarks/test_etl_bench.py -m "not slow"    # seconds; the quick run takes minutes
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from benchmarks.etl import BARS, missed, require_equal
from benchmarks.logs import DATASET, Plan, write_logs
from benchmarks.processes import tree
from etl.datasets.definition import dataset
from etl.datasets.simulate import PAGE_SIZES
from etl.ingest.raw import RawLocation
from etl.stage.errors import StageError
from etl.warehouse.partitions import MS_PER_DAY, add_days, day_number, days_between
from etl.warehouse.schemas import SEQUENCES

ROOT = Path(__file__).resolve().parents[2]
PLAN = Plan(rows=100_000, users=20, days=5, items=1_000)
KEYS = {
    "rows_per_s",
    "rows_per_s_vs_duckdb",
    "bytes_per_impression",
    "bytes_ratio_vs_fat_rows",
    "day30_vs_day2_events_job",
    "sequence_job_shuffle_bytes",
    "peak_rss_gb",
    "validation_share",
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "raw"
    write_logs(PLAN, folder, print)
    return folder


def test_every_day_opens_two_files_and_all_days_have_as_many_rows(raw):
    definition = dataset(DATASET)
    files = RawLocation(str(raw)).logs(definition)
    assert len(files) == PLAN.days + 1
    for dt in days_between(PLAN.first_dt, PLAN.last_dt):
        assert [file.first_dt for file in files if file.may_hold(dt)] == [dt, add_days(dt, 1)]
    tables = {file.name: pacsv.read_csv(file.path) for file in files}
    for file in files:
        table = tables[file.name]
        assert table.column_names == list(definition.logs.columns)
        days = np.unique(table["time_ms"].to_numpy() // MS_PER_DAY)
        assert day_number(file.first_utc_dt) <= days.min() and days.max() <= day_number(file.last_utc_dt)
    # The file after the last UTC day's own is a whole one, too.
    assert tables[files[-1].name].num_rows == pytest.approx(tables[files[-2].name].num_rows, rel=0.05)
    rows = pa.concat_tables(tables.values())
    distinct = rows.group_by(rows.column_names).aggregate([])
    counts = np.bincount(distinct["time_ms"].to_numpy() // MS_PER_DAY - day_number(PLAN.first_dt))[: PLAN.days]
    assert counts.sum() >= PLAN.rows and np.ptp(counts) <= 2 * max(PAGE_SIZES)
    assert rows.num_rows > distinct.num_rows  # exact duplicates


def test_pages_share_a_time_and_long_histories_exist(raw):
    rows = pa.concat_tables(
        [
            pacsv.read_csv(path, convert_options=pacsv.ConvertOptions(include_columns=["user_id", "time_ms"]))
            for path in raw.glob("log_*.csv")
        ]
    )
    sizes = rows.group_by(["user_id", "time_ms"]).aggregate([([], "count_all")])["count_all"].to_numpy()
    assert 3 < sizes.mean() < 6
    assert rows.group_by("user_id").aggregate([([], "count_all")])["count_all"].to_numpy().max() > 10_000


def test_the_same_plan_gives_the_same_bytes(raw, tmp_path):
    write_logs(PLAN, tmp_path / "raw", print)
    for path in raw.iterdir():
        assert path.read_bytes() == (tmp_path / "raw" / path.name).read_bytes()


def test_different_sequences_are_told_apart(tmp_path):
    values = {
        field.name: (
            [1, 2]
            if not pa.types.is_list(field.type)
            else [["a"], ["b"]]
            if field.name == "user_fields"
            else [[True, False], [True]]
            if field.name == "target_is_random"
            else [[3, 4], [5]]
        )
        for field in SEQUENCES
    }
    ours = pa.table(values, schema=SEQUENCES)
    pq.write_table(ours.take([1, 0]), tmp_path / "same.parquet")
    require_equal(ours, tmp_path / "same.parquet")
    for name in ("history_time_ms", "target_label", "target_history_end"):
        other = ours.set_column(
            ours.schema.get_field_index(name), name, pa.array([[3, 4], [6]], SEQUENCES.field(name).type)
        )
        pq.write_table(other, tmp_path / "other.parquet")
        with pytest.raises(StageError, match=f"differ in {name}"):
            require_equal(ours, tmp_path / "other.parquet")
    pq.write_table(ours.slice(0, 1), tmp_path / "short.parquet")
    with pytest.raises(StageError, match="differ"):
        require_equal(ours, tmp_path / "short.parquet")


def test_memory_and_time_of_a_tree_count_children():
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(200 << 20); sum(range(10**7));"
        " print(1, flush=True); input()'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        rss, cpu_s = tree(process.pid)
        assert rss > 200 << 20 and cpu_s > 0.1
        process.communicate(b"\n")


def test_bars():
    at_the_bars = {key: bar for key, _, _, bar in BARS}
    assert missed(at_the_bars) == []
    assert missed({**at_the_bars, "rows_per_s_vs_duckdb": 0.79, "sequence_job_shuffle_bytes": 1}) == [
        "rows_per_s_vs_duckdb",
        "sequence_job_shuffle_bytes",
    ]


@pytest.mark.slow
@pytest.mark.spark
def test_quick_run_ends_in_one_json_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.etl", "--quick", "--work", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() >= KEYS
    assert result["equal"] is True and result["quick"] is True and result["targets"] > 0
    assert (
        result["rows"] >= 200_000
        and result["sequence_job_shuffle_bytes"] == 0
        and result["events_job_shuffle_bytes"] > 0
    )
    assert all(result[key] > 0 for key in KEYS - {"sequence_job_shuffle_bytes"})
    assert result["bytes_ratio_vs_fat_rows"] < 1 / 20

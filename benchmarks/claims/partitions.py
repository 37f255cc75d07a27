"""Partitions that the claims are measured on.

Simulated ones, and the real rows at hand through the ETL's own stages.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.claims.variants import MAX_EVENTS, SIMULATED
from etl.datasets.definition import dataset
from etl.warehouse.store import TableStore


@dataclass(frozen=True)
class RealSet:
    """Real rows below the folder of shared data."""

    folder: str
    definition: str
    dt: str


REAL = {
    "kuairand": RealSet("kuairand", "kuairand", "2022-04-21"),
    "movielens": RealSet("movielens_latest_small", "movielens", "2018-09-24"),
    "buildroot": RealSet("gitlog_buildroot", "docs/definitions/buildroot.yaml", "2026-08-22"),
}


def prepare(out: Path, data: Path, sets: Sequence[str], seeds: int) -> None:
    """Make the folders (items.parquet, sequences.parquet) that are not there yet.

    A simulated set has one a seed, a real set one.
    """
    for name in sets:
        if name in SIMULATED:
            for seed in range(seeds):
                _simulated(out / f"{name}_{seed}", seed, SIMULATED[name])
        elif not (out / name / "sequences.parquet").exists():
            real = REAL[name]
            if (data / real.folder).is_dir():
                _built(out / name, real, data / real.folder)
            else:
                print(f"{name}: left out, there is no {data / real.folder}")


def _built(folder: Path, real: RealSet, raw: Path) -> Path:
    """Build a real set's partition by the jobs and gates of the pipeline."""
    with tempfile.TemporaryDirectory() as warehouse:
        common = ["--dataset", real.definition, "--warehouse", warehouse, "--dt", real.dt, "--attempt", "claims"]
        window = dataset(real.definition).window
        lookback = ["--raw", str(raw.absolute()), "--lookback-days", str(window.lookback_days)]
        reports = ["--reports", f"{warehouse}/reports"]
        for stage, more in (
            ("etl.jobs.events", lookback),
            ("etl.quality.judge.audit", ["--stage", "events", *reports]),
            (
                "etl.jobs.sequences",
                [*lookback, "--target-days", str(window.target_days), "--evaluation-days", str(window.evaluation_days)],
            ),
            ("etl.quality.judge.audit", ["--stage", "sequences", *reports]),
        ):
            print(f"{folder.name}: {stage}", flush=True)
            subprocess.run([sys.executable, "-m", stage, *common, *more], check=True)
        store = TableStore(warehouse, dataset(real.definition).name)
        tables = {
            name: store.read_files(
                sorted(store.require(name, real.dt).files, key=lambda file: (file.bucket, file.path))
            )
            for name in ("items", "sequences")
        }
        max_events = int(store.require("sequences", real.dt).settings["max_events"])
    return written(folder, tables["items"], tables["sequences"], max_events)


def _simulated(folder: Path, seed: int, taste_days: float) -> Path:
    """Write a simulated partition of KuaiRand's layout through the functions that the jobs call, without Spark."""
    if (folder / "sequences.parquet").exists():
        return folder
    from etl.datasets.simulate import Simulation, write_simulation
    from etl.ingest.event_rows import EVENT, events_schema, parse_split, write_day_bucket
    from etl.ingest.features import read_features
    from etl.ingest.raw import RawLocation
    from etl.sequences.items import counted, item_rows, merged
    from etl.sequences.sequence_rows import sequence_rows
    from etl.warehouse.buckets import Layout
    from etl.warehouse.partitions import MS_PER_DAY, Window, day_number, days_between
    from etl.warehouse.store import DataFile

    definition, dt = dataset("kuairand_simulated"), "2022-04-21"
    window = Window(dt, 14, 14)
    with tempfile.TemporaryDirectory() as work:
        write_simulation(Simulation(seed=seed, taste_days=taste_days), Path(work) / "raw")
        place, store = RawLocation(f"{work}/raw"), TableStore(f"{work}/w", definition.name)
        days = frozenset(day_number(day) for day in days_between("2022-04-08", dt))
        splits = place.splits(
            place.logs(definition), definition.logs, lambda ranges: [place.count_newlines(*r) for r in ranges]
        )
        rows = pa.concat_tables(
            [t for split in splits for t in parse_split(place, split, definition, days, dt, Layout(1))]
        )
        rows = rows.filter(pa.array(rows["kind"].to_numpy() == EVENT))
        staging = store.begin_try("a", ["events"], days_between("2022-04-08", dt))
        results = [
            write_day_bucket(rows.filter(pa.array(rows["day"].to_numpy() == day)), store, definition, staging, day, 0)
            for day in sorted(days)
        ]
        events = store.read_files([DataFile(**r["events_file"]) for r in results]).select(
            events_schema(definition).names
        )
        counts = merged(
            [counted(events, day_number(window.first_evaluation_dt) * MS_PER_DAY, definition.events.item_fields)]
        )
        items = item_rows(counts, [read_features(place, rule) for rule in definition.items], definition)
        users = read_features(place, definition.users[0])
        assert users is not None
        columns = [users[rule.column].to_pylist() for rule in definition.users[0].fields.values()]
        fields = {
            int(user): list(values)
            for user, values in zip(users["user_id"].to_pylist(), zip(*columns, strict=True), strict=True)
        }
        sequences, _ = sequence_rows(
            events, items["item_id"].to_numpy(), items["train_occurrences"].to_numpy(), fields, window, definition
        )
    return written(folder, items, sequences, definition.history.max_events)


def written(folder: Path, items: pa.Table, sequences: pa.Table, max_events: int) -> Path:
    """Write a partition, and of how many events a target sees at most."""
    sequences = sequences.replace_schema_metadata({MAX_EVENTS: str(max_events)})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(items, folder / "items.parquet", compression="zstd")
    pq.write_table(sequences, folder / "sequences.parquet", compression="zstd")
    return folder

"""Every kind of interest on seven data sets, five seeds each: tables and plots of docs/comparison.md.

    python -m benchmarks.comparison prepare --to var/comparison  # Spark; an hour on two busy cores
    python -m benchmarks.comparison train --to var/comparison    # torch alone; minutes on a GPU with --jobs 14
    python -m benchmarks.comparison show --to var/comparison     # tables and plots of what was trained

`prepare` builds partitions by the jobs and gates of the pipeline and leaves `items` and `sequences` with their
manifests below TO/warehouse, which is all that `train` reads. All results are lines of one file below TO/results: calls
of other --sets may run at the same time.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
SEEDS = "1,2,3,4,5"
# Those whose AUC is shown against the length, besides that of all kinds at the longest: one of each family.
SWEPT = "vql,softmax_attention,din,sdim,eta,mean_pooling"


@dataclass(frozen=True)
class DataSet:
    """One partition that is compared on.

    Attributes:
        definition: a name or the path of one.
        raw: folder of published rows below --data, or what writes generated ones into a folder.
        lookback, target, evaluation: days of the window.
        longest: events that a target of the table sees at most; None: as many as the definition says.
        lengths: shorter ones for the plot.
    """

    definition: str
    raw: str | Callable[[Path], None]
    dt: str
    lookback: int
    target: int
    evaluation: int
    longest: int | None
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        return Path(self.definition).stem


def simulated(**settings: float) -> Callable[[Path], None]:
    """Return what writes the logs of a simulation."""

    def write(folder: Path) -> None:
        from etl.datasets.simulate import Simulation, write_simulation

        write_simulation(Simulation(**settings), folder)  # type: ignore[arg-type]

    return write


def yambda_rows(folder: Path) -> None:
    """Write rows of Yambda's columns and types from a simulation: 150 users, some 6,000 listens each.

    A click is a listen of at least half of the track. An artist has tracks of one topic; nothing else says which.
    """
    from etl.datasets.definition import SIMULATED_MARKER
    from etl.datasets.simulate import Simulation, write_simulation

    logs = folder.with_name(f"{folder.name}_logs")
    write_simulation(Simulation(users=150, days=28, length_scale=0.5, items=20_000, seed=7), logs)
    log = pa.concat_tables([pacsv.read_csv(path) for path in sorted(logs.glob("log_*.csv"))])
    log = log.sort_by([("user_id", "ascending"), ("time_ms", "ascending")])
    columns = {
        name: log[name].to_numpy() for name in ("user_id", "video_id", "time_ms", "is_click", "duration_ms", "tab")
    }
    rng = np.random.default_rng(7)
    first_ms = int(np.datetime64("2022-04-08", "ms").astype(np.int64))
    seconds = (columns["time_ms"] - first_ms) // 5_000 * 5
    ratio = np.where(columns["is_click"] == 1, rng.integers(50, 101, log.num_rows), rng.integers(0, 50, log.num_rows))
    track = np.where(columns["duration_ms"] > 0, columns["duration_ms"] // 1_000, 200)
    kind = pa.DictionaryArray.from_arrays(pa.array(np.zeros(log.num_rows, np.int8)), ["listen"])
    table = pa.table(
        {
            "uid": columns["user_id"].astype(np.uint32),
            "timestamp": seconds.astype(np.uint32),
            "item_id": columns["video_id"].astype(np.uint32),
            "is_organic": (columns["tab"] == 1).astype(np.uint8),
            "event_type": kind,
            "played_ratio_pct": ratio.astype(np.uint16),
            "track_length_seconds": track.astype(np.uint32),
        }
    )
    folder.mkdir(parents=True)
    shutil.copy(logs / SIMULATED_MARKER, folder)
    pq.write_table(table, folder / "multi_event.parquet")
    items = pacsv.read_csv(next(logs.glob("video_features_basic_*")))
    item_id = items["video_id"].to_numpy()
    topic = np.array([int(str(tag or -1).split(",")[0]) for tag in items["tag"].to_pylist()])  # some have none
    topic[topic < 0] = topic.max() + 1
    for name, of_item in (("artist", topic * 20 + item_id % 20), ("album", item_id // 8)):
        mapping = {f"{name}_id": of_item.astype(np.uint32), "item_id": item_id.astype(np.uint32)}
        pq.write_table(pa.table(mapping), folder / f"{name}_item_mapping.parquet")


def _own(name: str) -> str:
    return str(HERE / "definitions" / f"{name}.yaml")


SETS = (
    DataSet("kuairand_simulated", simulated(), "2022-04-21", 14, 14, 1, None, (20, 100, 500)),
    DataSet(_own("kuairand_drifting"), simulated(taste_days=4.0), "2022-04-21", 14, 14, 1, None, (20, 100, 500)),
    DataSet(
        _own("kuairand_random_simulated"), simulated(random_share=0.2), "2022-04-21", 14, 14, 1, None, (20, 100, 500)
    ),
    DataSet("kuairand", "kuairand", "2022-04-21", 14, 14, 1, None, (10, 50)),
    DataSet("movielens", "movielens_latest_small", "2018-09-24", 8216, 1800, 365, None, (20, 200)),
    DataSet(_own("buildroot_authors"), "gitlog_buildroot", "2026-08-22", 1460, 730, 180, None, (50, 500)),
    DataSet(_own("yambda_simulated"), yambda_rows, "2024-01-28", 28, 7, 1, 4_000, (100, 1_000, 16_384)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "train", "show"))
    parser.add_argument("--to", type=Path, default=Path("var/comparison"), help="folder of partitions and results")
    parser.add_argument("--results", type=Path, help="folder of the results (default: TO/results)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of published rows")
    parser.add_argument("--sets", default=",".join(each.name for each in SETS))
    parser.add_argument("--models", help="with commas (default: every kind)")
    parser.add_argument("--seeds", default=SEEDS)
    parser.add_argument("--no-sweep", action="store_true", help="train at the longest length alone")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    args = parser.parse_args()
    known = {each.name: each for each in SETS}
    if unknown := set(args.sets.split(",")) - known.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted = [known[name] for name in args.sets.split(",")]
    results = args.results or args.to / "results"
    if args.step == "show":
        from benchmarks.comparison_page import write_page

        print(write_page(results, [each.name for each in wanted], args.to))
        return
    for each in wanted:
        if args.step == "prepare":
            prepare(each, args.to, args.data)
        else:
            train(each, results, args)


def prepare(data_set: DataSet, to: Path, data: Path) -> None:
    """Build a partition and keep of it what training reads; one that is there is not built again."""
    kept = to / "warehouse" / data_set.name
    if kept.exists():
        return
    work = to / "work"
    raw = data / data_set.raw if isinstance(data_set.raw, str) else work / f"raw_{data_set.name}"
    if not isinstance(data_set.raw, str) and not raw.exists():
        raw.parent.mkdir(parents=True, exist_ok=True)
        data_set.raw(raw)
    common = ["--dataset", data_set.definition, "--warehouse", str(work), "--dt", data_set.dt]
    common += ["--attempt", "comparison"]
    events = ["--raw", str(raw.absolute()), "--lookback-days", str(data_set.lookback)]
    targets = ["--target-days", str(data_set.target), "--evaluation-days", str(data_set.evaluation)]
    gate = ["--reports", str(work / "reports")]
    for stage, more in (
        ("etl.jobs.events", events),
        ("etl.quality.judge.audit", ["--stage", "events", *gate]),
        ("etl.jobs.sequences", [*events, *targets]),
        ("etl.quality.judge.audit", ["--stage", "sequences", *gate]),
    ):
        print(f"{data_set.name}: {stage}", flush=True)
        subprocess.run([sys.executable, "-m", stage, *common, *more], check=True)
    for part in ("items", "sequences", "_manifests/items", "_manifests/sequences"):
        shutil.copytree(work / data_set.name / part, kept / part)


def train(data_set: DataSet, out: Path, args: argparse.Namespace) -> None:
    """Train every kind at the longest length, and some at shorter ones; what finds no memory is left to a next call."""
    if not (args.to / "warehouse" / data_set.name).exists():
        print(f"{data_set.name}: left out, there is no {args.to / 'warehouse' / data_set.name}", flush=True)
        return
    common = ["--dataset", data_set.name, "--warehouse", str(args.to / "warehouse"), "--dt", data_set.dt]
    common += ["--out", str(out), "--seeds", args.seeds, "--jobs", str(args.jobs)]
    longest = ["--lengths", str(data_set.longest)] if data_set.longest else []
    calls = [[*(["--models", args.models] if args.models else []), *longest]]
    if not args.no_sweep:
        calls += [["--models", args.models or SWEPT, "--lengths", ",".join(map(str, data_set.lengths))]]
    for more in calls:
        subprocess.run([sys.executable, "-m", "evaluation.trials", *common, *more], check=False)


if __name__ == "__main__":
    main()

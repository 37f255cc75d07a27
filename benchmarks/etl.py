"""Speed and size of the Spark jobs on a large simulated log, against their bars and against DuckDB on the same cores.

    python -m benchmarks.etl                     # 20 M rows over 30 days; about 15 minutes on 2 cores
    python -m benchmarks.etl --quick             # 200,000 rows, one round: does it work at all?

Writes logs, publishes every day but the last, then times in turns: the events job of day 2 and of the last day, each
with all earlier days published; the sequences job of the last day and DuckDB's `sequences` of the same files, which
must be equal; both jobs once more with their gates. Spark's start is measured inside the jobs and left out of their
times. What validation adds is wall time of whole processes: a job that judges, less the same job that does not, and its
gate's own process; imports, pages and the raw files' gate are in it. Prints a table, then one JSON line, stored as
benchmarks/results/etl-<date>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import stored_bytes
from benchmarks.logs import DATASET, MEAN_HISTORY, Plan, write_logs
from benchmarks.processes import peak_rss
from etl.datasets.definition import SIMULATED_MARKER, dataset
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError
from etl.warehouse.partitions import add_days, days_between
from etl.warehouse.store import Manifest, TableStore

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_ROWS = 200_000
MIN_USERS = 40  # fewer than the rows ask for would leave most buckets empty
ROWS_PER_ITEM = 20
LEAST, MOST = "at least", "at most"
# What is compared with a bar: key of the result, what people read, which way, the bar.
BARS = (
    ("rows_per_s_vs_duckdb", "sequences: rows/s against DuckDB", LEAST, 0.8),
    ("sequence_job_shuffle_bytes", "sequences: shuffle bytes", MOST, 0),
    ("day30_vs_day2_events_job", "events: last day / day 2", MOST, 1.2),
    ("validation_share", "validation adds to the ETL", MOST, 0.25),
    ("bytes_ratio_vs_fat_rows", "bytes: user rows / row per sample", MOST, 1 / 20),
)


@dataclass(frozen=True)
class Done:
    """A process that has ended well.

    Attributes:
        wall_s: from its start to its end.
        peak_rss: bytes, its children included; pages that they share count for each.
        figures: what it has written for us.
    """

    wall_s: float
    peak_rss: int
    figures: dict[str, float]


class Bench:
    """One run of the benchmark in one folder: the logs, a warehouse of all days, and one that ends before day 2."""

    def __init__(self, plan: Plan, work: Path, rounds: int, buckets: int | None) -> None:
        self.plan, self.work, self.rounds, self.buckets = plan, work, rounds, buckets
        self.definition = dataset(DATASET)
        self.raw, self.logs = work / "raw", work / "logs"
        self.store, self.early = (TableStore(str(work / name), DATASET) for name in ("warehouse", "warehouse_early"))
        self.stamp = time.strftime("%Y%m%d%H%M%S")
        self.peaks: dict[str, int] = {}

    # ---- processes -----------------------------------------------------------------------------------------------

    def run(self, name: str, module: str, *arguments: str, figures: bool = True) -> Done:
        """Run a module to its end.

        Raises:
            StageError: it fails.
        """
        self.logs.mkdir(exist_ok=True)
        out, found = self.logs / f"{name}.log", self.logs / f"{name}.json"
        found.unlink(missing_ok=True)
        command = [sys.executable, "-m", module, *([str(found)] if figures else []), *arguments]
        began = time.perf_counter()
        with (
            out.open("wb") as stream,
            subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT) as process,
            peak_rss(process.pid) as peak,
        ):
            code = process.wait()
            wall_s = time.perf_counter() - began
        if code:
            raise StageError(
                f"{name} failed with exit code {code}: {out.read_text(errors='replace')[-1_500:]}",
                f"see {out}; with --work the folder is kept",
            )
        done = Done(wall_s, peak[0], json.loads(found.read_text()) if figures else {})
        inside = f", {done.figures['work_s']:.1f} s without start and stop" if "work_s" in done.figures else ""
        log(f"{name}: {wall_s:.1f} s{inside}, peak {peak[0] / 1e9:.2f} GB")
        return done

    def events(self, name: str, store: TableStore, dt: str, *more: str) -> tuple[Done, Manifest]:
        buckets = ["--buckets", str(self.buckets)] if self.buckets else []
        done = self.run(
            name,
            "benchmarks.etl_job",
            "events",
            *self._partition(name, store, dt),
            "--raw",
            str(self.raw),
            *buckets,
            *more,
        )
        self.peaks["events"] = max(self.peaks.get("events", 0), done.peak_rss)
        return done, staged(store, self._attempt(name), "events", dt)

    def sequences(self, name: str, dt: str, *more: str) -> tuple[Done, Manifest]:
        done = self.run(
            name,
            "benchmarks.etl_job",
            "sequences",
            *self._partition(name, self.store, dt),
            "--raw",
            str(self.raw),
            *more,
        )
        self.peaks["sequences"] = max(self.peaks.get("sequences", 0), done.peak_rss)
        return done, staged(self.store, self._attempt(name), "sequences", dt)

    def audit(self, name: str, stage: str, dt: str) -> Done:
        return self.run(
            f"{name}-audit",
            "etl.quality.judge.audit",
            *self._partition(name, self.store, dt),
            "--stage",
            stage,
            *self._reports,
            figures=False,
        )

    def duckdb(self, name: str, dt: str) -> tuple[Done, Path]:
        out = self.work / "duckdb.parquet"
        done = self.run(
            name,
            "benchmarks.duckdb_sequences",
            str(out),
            "--warehouse",
            self.store.warehouse,
            "--raw",
            str(self.raw),
            "--dt",
            dt,
        )
        self.peaks["duckdb"] = max(self.peaks.get("duckdb", 0), done.peak_rss)
        return done, out

    @property
    def _reports(self) -> list[str]:
        return ["--reports", str(self.work / "reports")]

    def _attempt(self, name: str) -> str:
        return f"{name}-{self.stamp}"

    def _partition(self, name: str, store: TableStore, dt: str) -> list[str]:
        return ["--dataset", DATASET, "--warehouse", store.warehouse, "--dt", dt, "--attempt", self._attempt(name)]

    # ---- steps ---------------------------------------------------------------------------------------------------

    def write_raw(self) -> None:
        """Write the logs; those of an earlier run with the same plan are taken as they are."""
        marker = self.raw / SIMULATED_MARKER
        if marker.exists() and json.loads(marker.read_text())["parameters"] == asdict(self.plan):
            log(f"the logs in {self.raw} are of this plan already")
            return
        for store in (self.store, self.early):
            shutil.rmtree(store.warehouse, ignore_errors=True)
        shutil.rmtree(self.raw, ignore_errors=True)
        began = time.perf_counter()
        rows = write_logs(self.plan, self.raw, log)
        size = sum(path.stat().st_size for path in self.raw.glob("log_*.csv"))
        log(
            f"{sum(rows.values()):,} rows of {self.plan.users:,} users in {len(rows)} log files, {size:,} bytes,"
            f" written in {time.perf_counter() - began:.0f} s"
        )

    def publish_earlier_days(self) -> dict[str, float | None]:
        """Publish all days before the last in one warehouse, and day 1 in the other."""
        day = add_days(self.plan.last_dt, -1)
        before = self.store.days("events")
        done, manifest = self.events("earlier-days", self.store, day)
        rows = sum(self.store.require("events", dt).rows for dt in self._judged_days("earlier-days", day))
        self.buckets = int(
            manifest.settings["buckets"]
        )  # as the job has sized them; one day's files would ask for fewer
        self.events("day1", self.early, self.plan.first_dt)
        publish(self.early, self._attempt("day1"))
        return {"backfill_rows_per_s": None if before else round(rows / done.figures["work_s"])}

    def _judged_days(self, name: str, dt: str) -> list[str]:
        """Publish what an attempt has staged through its gate, so that the days before are there to be compared with.

        Return the days.
        """
        days = self.store.staged_days(self._attempt(name), "events")
        self.audit(name, "events", dt)
        return days

    def time_events(self) -> dict[str, Any]:
        """Time day 2 and the last day in turns; audit and publish the last day."""
        days = {"day2": (self.early, add_days(self.plan.first_dt, 1)), "day30": (self.store, self.plan.last_dt)}
        runs: dict[str, list[Done]] = {name: [] for name in days}
        audits, judged = [], []
        manifests: dict[str, Any] = {}
        for turn in range(self.rounds):
            for kind in sorted(days, reverse=bool(turn % 2)):
                name, (store, dt) = f"{kind}-{turn}", days[kind]
                done, manifest = self.events(name, store, dt)
                runs[kind].append(done)
                if manifests.setdefault(kind, manifest).data_digest != manifest.data_digest:
                    raise StageError(
                        f"two runs of the events job of dt={dt} wrote different data",
                        "find out which rows differ: the job must be deterministic",
                    )
                if kind == "day30":
                    judged.append(self.events(f"{name}-judged", store, dt, *self._reports)[0])
                    audits.append(self.audit(f"{name}-judged", "events", dt))
        medians = {kind: median(runs[kind], "work_s") for kind in days}
        return {
            "day30_vs_day2_events_job": round(medians["day30"] / medians["day2"], 3),
            "day30_vs_day2_cpu": round(median(runs["day30"], "work_cpu_s") / median(runs["day2"], "work_cpu_s"), 3),
            "events_job_cpu_s": {kind: seconds(runs[kind], "work_cpu_s") for kind in days},
            "events_job_s": {kind: seconds(runs[kind], "work_s") for kind in days},
            "events_job_session_s": round(median(runs["day30"], "session_s"), 2),
            "events_new_rows": {kind: manifests[kind].rows for kind in days},
            "events_job_shuffle_bytes": runs["day30"][-1].figures["shuffle_write_bytes"],
            **processes("events", runs["day30"], judged, audits),
        }

    def time_sequences(self) -> dict[str, Any]:
        """Time the sequences job and DuckDB in turns and compare what they have written.

        Raises:
            StageError: they differ, or two runs of the job do.
        """
        dt = self.plan.last_dt
        rows = sum(
            self.store.require("events", day).rows
            for day in days_between(add_days(dt, 1 - self.definition.window.lookback_days), dt)
        )
        ours: list[Done] = []
        theirs: list[Done] = []
        audits: list[Done] = []
        judged: list[Done] = []
        first: Manifest | None = None
        for turn in range(self.rounds):
            name = f"sequences-{turn}"
            done, manifest = self.sequences(name, dt)
            first = first or manifest
            if first.data_digest != manifest.data_digest:
                raise StageError(
                    f"two runs of the sequences job of dt={dt} wrote different data",
                    "find out which rows differ: the job must be deterministic",
                )
            ours.append(done)
            yardstick, out = self.duckdb(f"duckdb-{turn}", dt)
            theirs.append(yardstick)
            if turn == self.rounds - 1:
                require_equal(self.store.read(manifest), out)
                log(
                    f"equal: all columns of {manifest.rows:,} users with {manifest.counts['targets']:,} targets and"
                    f" {manifest.counts['history_events']:,} history events"
                )
            judged.append(self.sequences(f"{name}-judged", dt, *self._reports)[0])
            audits.append(self.audit(f"{name}-judged", "sequences", dt))
        job_s, duckdb_s = median(ours, "work_s"), median(theirs, "work_s")
        turns = [their.figures["work_s"] / our.figures["work_s"] for our, their in zip(ours, theirs, strict=True)]
        return {
            "rows_per_s": round(rows / job_s),
            "rows_per_s_vs_duckdb": round(duckdb_s / job_s, 3),
            "rows_per_s_vs_duckdb_turns": [round(ratio, 3) for ratio in turns],
            "cpu_s_of_duckdb_vs_job": round(median(theirs, "work_cpu_s") / median(ours, "work_cpu_s"), 3),
            "sequence_job_cpu_s": seconds(ours, "work_cpu_s"),
            "duckdb_cpu_s": seconds(theirs, "work_cpu_s"),
            "equal": True,
            "rows": rows,
            "sequence_job_shuffle_bytes": max(int(d.figures["shuffle_write_bytes"]) for d in ours),
            "sequence_job_s": seconds(ours, "work_s"),
            "duckdb_s": seconds(theirs, "work_s"),
            "sequence_job_session_s": round(median(ours, "session_s"), 2),
            "users_with_targets": first.rows if first else 0,
            "targets": first.counts["targets"] if first else 0,
            "history_events": first.counts["history_events"] if first else 0,
            **processes("sequences", ours, judged, audits),
            "training_input_audit_s": round(self.audit(name, "training_input", dt).wall_s, 2),
        }


def staged(store: TableStore, attempt: str, table: str, dt: str) -> Manifest:
    manifest = store.staged_manifest(attempt, table, dt)
    assert manifest is not None, f"the job staged no {table} of {dt}"
    return manifest


def publish(store: TableStore, attempt: str) -> int:
    """Publish all days of events that an attempt has staged; return their rows."""
    rows = 0
    for table in ("quarantine", "events"):
        for day in store.staged_days(attempt, table):
            rows += store.publish(attempt, table, day).rows
    return rows


def require_equal(ours: pa.Table, path: Path) -> None:
    """Compare all columns of `sequences` of all users.

    Raises:
        StageError: they differ.
    """
    theirs = pq.read_table(path)
    mine, other = (table["user_id"].combine_chunks() for table in (ours, theirs))
    order = {"ours": pc.sort_indices(mine), "theirs": pc.sort_indices(other)}
    differing = []
    for field in ours.schema:
        column = ours[field.name].combine_chunks().take(order["ours"])
        if field.name not in theirs.column_names or not column.equals(
            theirs[field.name].combine_chunks().take(order["theirs"]).cast(field.type)
        ):
            differing.append(field.name)
    if differing:
        raise StageError(
            f"the sequences job and DuckDB differ in {', '.join(differing)} ({ours.num_rows:,} and {theirs.num_rows:,}"
            " users)",
            "one of the two is wrong: compare the users whose rows differ",
        )


def processes(stage: str, plain: list[Done], judged: list[Done], audits: list[Done]) -> dict[str, float]:
    """Return the wall times of a stage's whole processes, and what its gates add to it."""
    job_s, judged_s, audit_s = (statistics.median(done.wall_s for done in runs) for runs in (plain, judged, audits))
    found = {
        "process_s": job_s,
        "judged_process_s": judged_s,
        "audit_s": audit_s,
        "validation_s": judged_s - job_s + audit_s,
    }
    return {f"{stage}_{name}": round(value, 2) for name, value in found.items()}


def median(runs: list[Done], figure: str) -> float:
    return statistics.median(done.figures[figure] for done in runs)


def seconds(runs: list[Done], figure: str) -> list[float]:
    return [round(done.figures[figure], 2) for done in runs]


def machine() -> dict[str, Any]:
    import duckdb
    import pyspark

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": names[0] if names else platform.machine(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "python": platform.python_version(),
        "pyspark": pyspark.__version__,
        "duckdb": duckdb.__version__,
        "pyarrow": pa.__version__,
    }


def missed(result: dict[str, Any]) -> list[str]:
    """Return the keys of the bars that do not hold."""
    return [key for key, _, way, bar in BARS if (result[key] < bar if way == LEAST else result[key] > bar)]


def table(result: dict[str, Any]) -> str:
    lines = [f"{'what':<36} {'measured':>12} {'bar':>16}"]
    for key, what, way, bar in BARS:
        lines.append(
            f"{what:<36} {_shown(result[key]):>12}"
            f" {f'{way} {_shown(bar)}':>16}{'  MISSED' if key in result['missed'] else ''}"
        )
    others = (
        ("sequences: rows/s", "rows_per_s"),
        ("stored bytes an impression, L=10,000", "bytes_per_impression"),
        ("peak memory of a job, GB", "peak_rss_gb"),
    )
    return "\n".join(lines + [f"{what:<36} {_shown(result[key]):>12}" for what, key in others])


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}" if value >= 10 else f"{value:.4g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, default=20_000_000, help="distinct rows within the days (default: %(default)s)"
    )
    parser.add_argument("--days", type=int, default=30, help="UTC days (default: %(default)s)")
    parser.add_argument(
        "--users", type=int, help=f"default: one for each {MEAN_HISTORY:,.0f} rows, KuaiRand-27K's mean"
    )
    parser.add_argument("--buckets", type=int, help="user buckets of a day (default: as the events job sizes them)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of everything that is compared (default: %(default)s)"
    )
    parser.add_argument(
        "--work", help="folder for logs and tables; kept, and its logs and published days are used again"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROWS:,} rows and one round; the figures say nothing and are not stored",
    )
    return parser


def main() -> None:
    args = _parser().parse_args()
    rows, rounds = (QUICK_ROWS, 1) if args.quick else (args.rows, args.rounds)
    users = args.users or max(MIN_USERS, round(rows / MEAN_HISTORY))
    if args.days < 3 or rounds < 1 or rows < args.days * users:
        raise StageError("at least 3 days, 1 round and a row per user and day are needed", "give larger numbers")
    plan = Plan(rows, users, args.days, items=max(1_000, rows // ROWS_PER_ITEM))
    with contextlib.ExitStack() as stack:
        work = (
            Path(args.work).resolve()
            if args.work
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longview-bench-")))
        )
        work.mkdir(parents=True, exist_ok=True)
        result = measure(Bench(plan, work, rounds, args.buckets), args.quick)
    print(table(result))
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"etl-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


def measure(bench: Bench, quick: bool) -> dict[str, Any]:
    """Run all steps; return what was measured, with the plan, the machine and the bars that were missed."""
    began, load, plan = time.perf_counter(), os.getloadavg()[0], bench.plan
    log(
        f"{plan.rows:,} rows of {plan.users:,} users over {plan.days} days in {bench.work}; load {load:.1f} on"
        f" {len(os.sched_getaffinity(0))} cores"
    )
    bench.write_raw()
    found: dict[str, Any] = {**bench.publish_earlier_days(), **bench.time_events(), **bench.time_sequences()}
    stored = stored_bytes.measure(8 if quick else 64, 200 if quick else 1_000, bench.work, log)
    validation_s, jobs_s = (
        sum(found[f"{stage}_{what}_s"] for stage in ("events", "sequences")) for what in ("validation", "process")
    )
    result = {
        "benchmark": "etl",
        "date": time.strftime("%Y-%m-%d"),
        "quick": quick,
        **{key: found[key] for key in ("rows_per_s", "rows_per_s_vs_duckdb")},
        "bytes_per_impression": round(stored["bytes_per_impression"], 2),
        "bytes_ratio_vs_fat_rows": round(stored["ratio"], 5),
        **found,
        "peak_rss_gb": round(max(bench.peaks["events"], bench.peaks["sequences"]) / 1e9, 2),
        "peak_rss_gb_of": {name: round(peak / 1e9, 2) for name, peak in bench.peaks.items()},
        "validation_share": round(validation_s / jobs_s, 3),
        "stored": {name: round(value, 5) for name, value in stored.items()},
        "rounds": bench.rounds,
        "plan": dataclasses.asdict(plan),
        "buckets": bench.buckets,
        "machine": machine(),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "seconds": round(time.perf_counter() - began),
    }
    result["missed"] = missed(result)
    return result


if __name__ == "__main__":
    run_stage(main)

"""The same stages on a Spark standalone cluster of real processes, on S3, and with an executor that is killed.

Everything binds to 127.0.0.1 on free ports: one master, two workers with a core each, an S3 server in a thread. The
workers start outside the repository and without PYTHONPATH: what their executors know of `etl`, the job has sent them.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.fs as pafs
import pytest

from etl.datasets.simulate import Simulation, write_simulation
from etl.quality.judge import audit
from etl.warehouse.partitions import Window
from etl.warehouse.store import TableStore
from tests import processes
from tests.processes import Started, free_port, runs
from tests.s3 import AWS, BUCKET, s3_server
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.spark]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NAME, DT, LOOKBACK_DAYS, BUCKETS = "kuairand_simulated", "2022-04-11", 5, 4
DAYS = Window(DT, 2, LOOKBACK_DAYS).event_days
FAST_JVM = "-XX:TieredStopAtLevel=1"  # these JVMs live for seconds
# As in any environment with a role or a key; the server takes every key.
SPARK = {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
DEFAULTS = (
    f"spark.ui.enabled false\nspark.driver.extraJavaOptions {FAST_JVM}\nspark.executor.extraJavaOptions {FAST_JVM}\n"
)


# ---- processes
# ---------------------------------------------------------------------------------------------------------


def start(words: list[str], log: Path, cwd: Path, **changes: str | None) -> Started:
    wished = {**os.environ, **SPARK, **AWS, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **changes}
    return processes.start(words, log, cwd, {name: value for name, value in wished.items() if value is not None})


@dataclass
class Cluster:
    """A standalone master and its workers; `settings` are the environment of a job that runs there."""

    master: str
    folder: Path
    daemons: list[Started] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, str]:
        return {"SPARK_CONF_DIR": str(self.folder)}

    def executors(self) -> list[psutil.Process]:
        """Executor JVMs whose Python is at work."""
        found = []
        for daemon in self.daemons:
            for member in daemon.family():
                try:
                    at_work = any(runs(child, "pyspark.daemon") for child in member.children())
                    if at_work and runs(member, "CoarseGrainedExecutorBackend"):
                        found.append(member)
                except psutil.NoSuchProcess:
                    continue
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    port, web = free_port(), free_port()
    found = Cluster(f"spark://127.0.0.1:{port}", folder)
    (folder / "spark-defaults.conf").write_text(DEFAULTS)
    env = {
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_DAEMON_JAVA_OPTS": f"-Dspark.master.rest.enabled=false {FAST_JVM}",
        "SPARK_LOCAL_DIRS": str(folder),
        "PYTHONPATH": None,
    }

    def daemon(name: str, *words: str) -> None:
        command = [
            str(BIN / "spark-class"),
            f"org.apache.spark.deploy.{name.rstrip('12')}",
            "--host",
            "127.0.0.1",
            *words,
        ]
        found.daemons.append(start(command, folder / f"{name}.log", folder, **env))

    def two_alive() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{web}/json/", timeout=2) as answer:
                return json.load(answer)["aliveworkers"] == 2
        except OSError:
            return False

    try:
        daemon("master.Master", "--port", str(port), "--webui-port", str(web))
        for number in ("1", "2"):
            daemon(
                f"worker.Worker{number}",
                "--port",
                "0",
                "--webui-port",
                "0",
                "--cores",
                "1",
                "--memory",
                "1g",
                "--work-dir",
                str(folder / number),
                found.master,
            )
        wait_for("master with two workers", two_alive)
        yield found
    finally:
        for one in reversed(found.daemons):
            one.stop()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as query:
        yield query


# ---- stages
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Simulated logs of four days; some lines are broken, so that every table has rows."""
    folder = tmp_path_factory.mktemp("raw") / "logs"
    write_simulation(Simulation(users=60, days=4, items=200, length_scale=0.01), folder)
    for path in folder.glob("log_standard_*.csv"):
        lines = path.read_text().splitlines()
        for index in range(300, len(lines), 300):
            lines[index] = lines[index].replace(",", ",x", 1)
        path.write_text("\n".join(lines) + "\n")
    return folder


def plain(module: str) -> list[str]:
    return [sys.executable, "-m", f"etl.jobs.{module}"]


def submitted(cluster: Cluster, module: str) -> list[str]:
    options = [
        "--master",
        cluster.master,
        "--driver-memory",
        "512m",
        "--executor-memory",
        "640m",
        "--name",
        "submitted",
    ]
    return [str(BIN / "spark-submit"), *options, str(ROOT / "etl" / "jobs" / f"{module}.py")]


def partition(warehouse: str, attempt: str) -> list[str]:
    return ["--dataset", NAME, "--warehouse", warehouse, "--dt", DT, "--attempt", attempt]


def events(warehouse: str, attempt: str, raw: str) -> list[str]:
    return [
        *partition(warehouse, attempt),
        "--raw",
        raw,
        "--lookback-days",
        str(LOOKBACK_DAYS),
        "--buckets",
        str(BUCKETS),
    ]


def publish(warehouse: str, attempt: str, stage: str, folder: Path) -> None:
    audit.main([*partition(warehouse, attempt), "--stage", stage, "--reports", str(folder / "reports")])


def run(words: list[str], folder: Path, **changes: str) -> str:
    started = start(words, folder / f"{len(list(folder.iterdir()))}.log", folder, **changes)
    try:
        code, output = started.finish()
    finally:
        started.stop()
    assert code == 0, output
    return output


def whole_partition(
    job: Callable[[str], list[str]], warehouse: str, attempt: str, raw: str, folder: Path, **changes: str
) -> dict[str, str]:
    run([*job("events"), *events(warehouse, attempt, raw)], folder, **changes)
    publish(warehouse, attempt, "events", folder)
    window = ["--lookback-days", str(LOOKBACK_DAYS), "--target-days", "3"]
    run([*job("sequences"), *partition(warehouse, attempt), "--raw", raw, *window], folder, **changes)
    publish(warehouse, attempt, "sequences", folder)
    return digests(warehouse, "events", "quarantine", "items", "sequences")


def digests(warehouse: str, *tables: str) -> dict[str, str]:
    """The digest of every published partition of these tables; a day without refused rows may have no quarantine."""
    store = TableStore(warehouse, NAME)
    found = {f"{table}/{day}": manifest for table in tables for day in DAYS if (manifest := store.manifest(table, day))}
    assert {f"{table}/{DT}" for table in tables} <= found.keys()
    for manifest in found.values():  # what is listed is there, whole
        assert store.read(manifest).num_rows == manifest.rows
    return {name: manifest.data_digest for name, manifest in found.items()}


@pytest.fixture(scope="module")
def expected(raw, tmp_path_factory) -> dict[str, str]:
    """The digests of a local run in a local folder."""
    folder = tmp_path_factory.mktemp("local")
    return whole_partition(plain, str(folder / "warehouse"), "local", str(raw), folder)


def test_spark_submit_on_a_standalone_cluster_gives_the_same_bytes(cluster, expected, raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths are the driver's, whatever folder the executors work in

    def job(module: str) -> list[str]:
        return submitted(cluster, module)

    assert (
        whole_partition(job, "warehouse", "standalone", os.path.relpath(raw), tmp_path, **cluster.settings) == expected
    )
    assert len(list(cluster.folder.glob("[12]/app-*/*/longview_etl.zip"))) >= 2, (
        "the executors got no code of this driver"
    )
    launched = "".join(daemon.log.read_text() for daemon in cluster.daemons)
    assert "Asked to launch executor" in launched
    assert "for submitted" in launched, "the name that spark-submit was given is lost"
    assert "-Xmx640M" in launched, "the memory that spark-submit was given is lost"


def test_logs_and_tables_on_s3_give_the_same_bytes(s3, expected, raw, tmp_path):
    fs, _ = pafs.FileSystem.from_uri(f"s3://{BUCKET}{s3}")
    pafs.copy_files(str(raw), f"{BUCKET}/raw", source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)
    assert whole_partition(plain, f"s3://{BUCKET}/warehouse{s3}", "s3", f"s3://{BUCKET}/raw{s3}", tmp_path) == expected
    left = fs.get_file_info(
        pafs.FileSelector(f"{BUCKET}/warehouse/{NAME}/_staging", recursive=True, allow_not_found=True)
    )
    assert not [info.path for info in left if info.path.endswith(".parquet")]


def test_killed_executors_cost_time_and_no_row(cluster, s3, expected, raw, tmp_path):
    """One is killed when its Python has just started, then both, with all they have parsed, once a file is written."""
    warehouse = f"s3://{BUCKET}/killed{s3}"
    store = TableStore(warehouse, NAME)
    staging = pafs.FileSelector(f"{store.root}/_staging", recursive=True, allow_not_found=True)

    def with_a_file_written() -> list[psutil.Process]:
        written = any(info.base_name == "part.parquet" for info in store.fs.get_file_info(staging))
        return cluster.executors() if written else []

    def nothing_visible() -> bool:
        return not any(store.manifest("events", day) for day in DAYS) and not store.staged_days("killed", "events")

    words = [*plain("events"), *events(warehouse, "killed", str(raw))]
    settings = {"SPARK_MASTER": cluster.master, "LONGVIEW_SPARK_MEMORY": "512m", **cluster.settings}
    job = start(words, tmp_path / "job.log", tmp_path, **settings)
    try:
        wait_for("executor at work", cluster.executors, every=0.02)[0].kill()
        for executor in wait_for("staged file", with_a_file_written, every=0.02):
            executor.kill()
        assert nothing_visible()
        code, output = job.finish()
    finally:
        job.stop()
    assert output.count("Lost executor") >= 2, output
    if code != 0:  # a failure is a failure: nothing is there, and the same attempt starts over
        assert nothing_visible()
        run(words, tmp_path, **settings)
    assert not any(store.manifest("events", day) for day in DAYS), "published before its audit"
    publish(warehouse, "killed", "events", tmp_path)
    both = ("events", "quarantine")
    assert digests(warehouse, *both) == {name: digest for name, digest in expected.items() if name.startswith(both)}

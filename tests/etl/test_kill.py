"""SIGKILL in a known phase of a job.

What is published stays untouched, and running again gives the bytes of an undisturbed run.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from etl.datasets.simulate import Simulation, write_simulation
from etl.warehouse.store import TableStore
from tests import processes
from tests.processes import Started, runs
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.spark]

ROOT = Path(__file__).resolve().parents[2]
NAME, DT = "kuairand_simulated", "2022-04-10"
EVENTS, SEQUENCES = "etl.jobs.events", "etl.jobs.sequences"
BUILDS = {EVENTS: ("events",), SEQUENCES: ("items", "sequences")}
PARSING, WRITING, STAGED = (
    "Python workers run, no file is staged",
    "a file is staged, no manifest is",
    "the manifest is staged",
)
AIMS = [
    (EVENTS, "driver", PARSING),
    (EVENTS, "driver", STAGED),
    (EVENTS, "jvm", WRITING),
    (EVENTS, "worker", WRITING),
    (SEQUENCES, "driver", WRITING),
    (SEQUENCES, "driver", STAGED),
    (SEQUENCES, "worker", WRITING),
]
SHOTS = 12  # a shot that finds its phase over kills nothing and is repeated


def start(module: str, warehouse: Path, raw: Path, attempt: str, log: Path, dt: str = DT) -> Started:
    words = [
        sys.executable,
        "-m",
        module,
        "--dataset",
        NAME,
        "--warehouse",
        str(warehouse),
        "--dt",
        dt,
        "--attempt",
        attempt,
        "--raw",
        str(raw),
        "--lookback-days",
        "3",
    ]
    words += ["--buckets", "4"] if module == EVENTS else ["--target-days", "2"]
    return processes.start(words, log / f"{attempt}-{module}.log", ROOT)


def ends_well(job: Started) -> None:
    code, output = job.finish()
    assert code == 0, output


def publish(store: TableStore, attempt: str, tables: tuple[str, ...]) -> dict[str, str]:
    return {
        f"{t}/{day}": store.publish(attempt, t, day).data_digest
        for t in tables
        for day in store.staged_days(attempt, t)
    }


@dataclass
class Shot:
    """One job that is to be killed in one phase.

    Attributes:
        table: the last table that the job builds.
    """

    job: Started
    store: TableStore
    attempt: str
    table: str

    def victims(self, name: str) -> list[psutil.Process]:
        family = self.job.family()
        if name == "driver":
            return [process for process in family if process.pid == self.job.process.pid]
        return [process for process in family if runs(process, {"jvm": "java", "worker": "pyspark.daemon"}[name])]

    def phase(self) -> str | None:
        """Return what the job is at, by what stands on disk and which processes live; None before and after."""
        if self.job.process.poll() is not None:
            return None
        if self.store.staged_days(self.attempt, self.table):
            return STAGED
        if any(
            f"/{self.attempt}/" in path.as_posix() and f"/{self.table}/" in path.as_posix()
            for path in Path(self.store.root).rglob("*.parquet")
        ):
            return WRITING
        return PARSING if len(self.victims("worker")) > 1 else None  # the daemon, and those that it forked

    def fire(self, victim: str, aim: str) -> int | None:
        """Kill `victim` in the phase aimed at; return the job's exit code, or None when that phase was over.

        The whole job stands still while it is looked at, so that it is killed in the phase that was seen.
        """
        order = [None, PARSING, WRITING, STAGED]
        wait_for(
            f"phase of {self.job.log}: {aim}",
            lambda: self.job.process.poll() is not None or order.index(self.phase()) >= order.index(aim),
            every=0.005,
        )
        self.job.signal_all(signal.SIGSTOP)
        shot = self.victims(victim)
        if self.phase() != aim or not shot:
            return None
        for process in shot:
            process.kill()
        self.job.signal_all(signal.SIGCONT)
        code, output = self.job.finish()
        # A worker that had handed its rows over is missed by nobody: then the job ends well.
        assert {"driver": code == -signal.SIGKILL, "jvm": code > 0, "worker": code >= 0}[victim], (
            f"{victim} was killed while {aim}, but the job ended with {code}\n{output}"
        )
        return code


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "logs"
    write_simulation(Simulation(users=400, days=3, items=300, length_scale=0.03), folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(raw, tmp_path_factory) -> tuple[Path, dict[str, dict[str, str]]]:
    """A warehouse, and the digests of both jobs."""
    warehouse, log = tmp_path_factory.mktemp("w"), tmp_path_factory.mktemp("logs")
    store, digests = TableStore(str(warehouse), NAME), {}
    for module, tables in BUILDS.items():
        ends_well(start(module, warehouse, raw, "calm", log))
        digests[module] = publish(store, "calm", tables)
    return warehouse, digests


def test_neighbours_built_at_the_same_time_have_the_bytes_of_one_after_the_other(raw, tmp_path):
    found = {}
    for how in ("together", "in turn"):
        store = TableStore(str(tmp_path / how), NAME)
        days = ["2022-04-09", DT]
        for module, tables in ((EVENTS, ("quarantine", "events")), (SEQUENCES, ("items", "sequences"))):
            jobs = []
            for day in days:
                jobs.append(start(module, tmp_path / how, raw, f"{how[:2]}-{day}", tmp_path, day))
                if how == "in turn":
                    ends_well(jobs[-1])
            for job in jobs:
                ends_well(job)
            for day in days:  # both staged the days that they share; whoever publishes last publishes the same
                found.setdefault(how, {}).update(publish(store, f"{how[:2]}-{day}", tables))
    assert found["together"] == found["in turn"]
    assert {key.split("/")[0] for key in found["together"]} == {"events", "items", "sequences"}


@pytest.mark.parametrize(
    ("module", "victim", "aim"), AIMS, ids=["-".join(words).replace(",", "").replace(" ", "_") for words in AIMS]
)
def test_a_killed_job_leaves_nothing_half_and_repeats_to_the_same_bytes(
    undisturbed, raw, module, victim, aim, tmp_path
):
    warehouse, digests = undisturbed
    store, tables = TableStore(str(warehouse), NAME), BUILDS[module]
    before = {t: [store.require(t, day) for day in store.days(t)] for t in tables}
    for number in range(SHOTS):
        attempt = f"{victim}-{number}-{len(aim)}"
        shot = Shot(start(module, warehouse, raw, attempt, tmp_path), store, attempt, tables[-1])
        try:
            if (code := shot.fire(victim, aim)) is not None:
                break
        finally:
            shot.job.stop()  # also the JVM of a dead driver
    else:
        raise AssertionError(f"none of {SHOTS} jobs could be killed while {aim}")
    assert {t: [store.require(t, day) for day in store.days(t)] for t in tables} == before, "what is published changed"
    staged = store.staged_days(attempt, tables[-1])
    assert staged == ([DT] if aim == STAGED or code == 0 else []), "what is not whole claims to be"
    for table in tables:
        for day in store.staged_days(attempt, table):  # what claims to be complete is
            manifest = store.staged_manifest(attempt, table, day)
            assert store.read(manifest).num_rows == manifest.rows
    ends_well(start(module, warehouse, raw, attempt, tmp_path))
    again = publish(store, attempt, tables)
    assert again == {key: digests[module][key] for key in again}
    assert again.keys() >= {f"{tables[-1]}/{DT}"}

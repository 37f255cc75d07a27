"""SIGKILL at random points: what is published stays untouched, and running again gives the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etl.simulate import Simulation, write_simulation
from etl.store import TableStore

pytestmark = [pytest.mark.slow, pytest.mark.spark]

ROOT = Path(__file__).resolve().parents[2]
NAME, DT = "kuairand_simulated", "2022-04-10"
KILLS = 4


def start(module: str, warehouse: Path, raw: Path, attempt: str, dt: str = DT) -> subprocess.Popen:
    words = [sys.executable, "-m", module, "--dataset", NAME, "--warehouse", str(warehouse), "--dt", dt, "--attempt", attempt, "--raw", str(raw), "--lookback-days", "3"]
    words += ["--buckets", "4"] if module.endswith("events") else ["--target-days", "2"]
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def descendants(pid: int) -> list[tuple[int, str]]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found.append((int(child), Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")))
        found += descendants(int(child))
    return found


def publish(store: TableStore, attempt: str, tables: tuple[str, ...]) -> dict[str, str]:
    return {f"{t}/{day}": store.publish(attempt, t, day).data_digest for t in tables for day in store.staged_days(attempt, t)}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "logs"
    write_simulation(Simulation(users=400, days=3, items=300, length_scale=0.03), folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(raw, tmp_path_factory) -> tuple[Path, dict[str, dict[str, str]], dict[str, float]]:
    """Digests of both jobs, and the seconds that each takes."""
    warehouse = tmp_path_factory.mktemp("w")
    store, digests, seconds = TableStore(str(warehouse), NAME), {}, {}
    for module, tables in (("etl.jobs.events", ("events",)), ("etl.jobs.sequences", ("items", "sequences"))):
        began = time.monotonic()
        assert start(module, warehouse, raw, "calm").wait() == 0
        seconds[module] = time.monotonic() - began
        digests[module] = publish(store, "calm", tables)
    return warehouse, digests, seconds


def test_neighbours_built_at_the_same_time_have_the_bytes_of_one_after_the_other(raw, tmp_path):
    found = {}
    for how in ("together", "in turn"):
        store = TableStore(str(tmp_path / how), NAME)
        days = ["2022-04-09", DT]
        for module, tables in (("etl.jobs.events", ("quarantine", "events")), ("etl.jobs.sequences", ("items", "sequences"))):
            jobs = []
            for day in days:
                jobs.append(start(module, tmp_path / how, raw, f"{how[:2]}-{day}", day))
                if how == "in turn":
                    assert jobs[-1].wait() == 0
            assert [job.wait() for job in jobs] == [0, 0]
            for day in days:  # both staged the days that they share; whoever publishes last publishes the same
                found.setdefault(how, {}).update(publish(store, f"{how[:2]}-{day}", tables))
    assert found["together"] == found["in turn"]
    assert {key.split("/")[0] for key in found["together"]} == {"events", "items", "sequences"}


@pytest.mark.parametrize("victim", ["driver", "jvm", "executor"])
@pytest.mark.parametrize("module", ["etl.jobs.events", "etl.jobs.sequences"])
def test_a_killed_job_leaves_nothing_half_and_repeats_to_the_same_bytes(undisturbed, raw, victim, module):
    warehouse, digests, seconds = undisturbed
    store = TableStore(str(warehouse), NAME)
    tables = ("events",) if module.endswith("events") else ("items", "sequences")
    before = {t: [store.require(t, day) for day in store.days(t)] for t in tables}
    rng = random.Random(f"{victim} {module}")
    for kill in range(KILLS):
        attempt = f"{victim}{kill}"
        job = start(module, warehouse, raw, attempt)
        deadline = time.monotonic() + rng.uniform(0.2, 0.95) * seconds[module]
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if job.poll() is None:
            victims = {"driver": lambda _: False, "jvm": lambda c: "java" in c, "executor": lambda c: "pyspark.daemon" in c}[victim]
            pids = [pid for pid, command in descendants(job.pid) if victims(command)] or [job.pid]
            for pid in pids if victim == "executor" else pids[:1]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        job.wait(timeout=120)
        try:
            os.killpg(job.pid, signal.SIGKILL)  # the JVM of a dead driver
        except ProcessLookupError:
            pass
        assert {t: [store.require(t, day) for day in store.days(t)] for t in tables} == before, "what is published changed"
        for table in tables:
            for day in store.staged_days(attempt, table):  # what claims to be complete is
                manifest = store.staged_manifest(attempt, table, day)
                assert store.read(manifest).num_rows == manifest.rows
    assert start(module, warehouse, raw, attempt).wait() == 0
    again = publish(store, attempt, tables)
    assert again == {key: digests[module][key] for key in again}
    assert again.keys() >= {f"{tables[-1]}/{DT}"}

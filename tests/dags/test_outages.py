"""Services that end or hang under a run at work: it goes on, in its attempt, and its end is reported as it was."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from infra.airflow_api import InfraError
from infra.local import services
from tests.dags.test_scheduler import Project, attempts_of, modules_of
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.airflow]
HELD = "evaluation.evaluate"  # the stage that a run stands at while its services end


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Project]:
    """A home whose supervisor takes a service for one that hangs after a minute instead of three."""
    made = Project(tmp_path_factory.mktemp("outages"))
    path, line = made.root / "infra" / "local" / "supervisor.py", "HUNG_AFTER_SECONDS = 180.0\n"
    assert line in path.read_text()
    path.write_text(path.read_text().replace(line, "HUNG_AFTER_SECONDS = 60.0\n"))
    yield made
    made.python("-m", "infra.local.stack", "down")


@contextlib.contextmanager
def held(project: Project) -> Iterator[None]:
    """Hold the evaluation of a run, from when it is at work to the end of the block."""
    (project.root / "held").unlink(missing_ok=True)
    (project.root / "hold").write_text(HELD)
    yield
    (project.root / "hold").unlink()


def at_work(project: Project) -> None:
    file = project.root / "held"
    wait_for("the evaluation at work", lambda: file.exists() and file.read_text() == HELD)


def test_make_run_goes_on_when_its_scheduler_and_its_server_end(project):
    """A scheduler over SQLite ends when a page of the browser keeps the database locked for too long."""
    log = project.root / "run.log"
    with log.open("w") as out, held(project):
        run = subprocess.Popen(
            [sys.executable, "-m", "infra.local.run"], cwd=project.root, env=project.env, stdout=out, stderr=out
        )
        at_work(project)
        below = {
            json.loads(process.environ()[services.MARK])["service"]: process
            for process in psutil.Process(run.pid).children()
        }
        for name in ("scheduler", "api-server"):
            below[name].kill()
        for name in ("scheduler", "api-server"):
            wait_for(f"another {name}", lambda name=name: f"{name} started (process" in log.read_text())
    assert run.wait() == 0, log.read_text()
    said = log.read_text()
    assert f"scheduler (process {below['scheduler'].pid}) ended with code -9; started again in 1 s" in said
    assert "done in" in said
    calls = project.calls()
    assert len(attempts_of(calls)) == 1
    assert modules_of(calls).count("evaluation.release.promote") == 1


@pytest.fixture
def stack(project: Project) -> Project:
    """The services of `make up`; what an earlier test did is forgotten."""
    project.up()
    project.pause(False)
    project.calls()
    return project


def supervised(project: Project) -> str:
    """Return what the supervisor has said."""
    return (project.root / "var" / "airflow" / "logs" / "supervisor.out").read_text()


def pid_of(project: Project, service: str) -> int:
    return int((project.root / "var" / "run" / f"{service}.pid").read_text().split()[0])


def ended(project: Project, run: str) -> str:
    """Return the final state of a run, asked for also while Airflow does not answer."""

    def state() -> str | None:
        with contextlib.suppress(OSError, InfraError):
            return found if (found := project.api.call("GET", run)["state"]) in ("success", "failed") else None
        return None

    return wait_for(f"end of {run}", state, every=1)


def suspend(pid: int) -> None:
    """Stop a process and all that is below it: it hangs."""
    service = psutil.Process(pid)
    for process in [service, *service.children(recursive=True)]:  # MLflow's answers come from a child
        with contextlib.suppress(psutil.NoSuchProcess):  # one of PostgreSQL's may just end
            process.suspend()


def test_a_run_goes_on_when_the_database_ends_and_when_it_or_services_hang(stack):
    """One run stands at work through all of it."""
    number = stack.root / "var" / "postgres" / "data" / "postmaster.pid"

    def database() -> int:
        return int(number.read_text().splitlines()[0])

    with held(stack):
        run = stack.trigger("2022-04-20")
        at_work(stack)
        for times, end in enumerate((lambda pid: psutil.Process(pid).kill(), suspend), 1):
            before = database()
            end(before)
            wait_for("another PostgreSQL", lambda times=times: supervised(stack).count("postgres started") == times)
            assert database() != before
        assert f"postgres (process {before}) has given no sign of life for" in supervised(stack)
        hang = {service: pid_of(stack, service) for service in ("scheduler", "mlflow")}
        for pid in hang.values():
            suspend(pid)
        for service, pid in hang.items():
            wait_for(
                f"end of {service}",
                lambda service=service, pid=pid: (
                    f"{service} (process {pid}) has given no sign of life for" in supervised(stack)
                ),
            )
            wait_for(f"another {service}", lambda service=service, pid=pid: pid_of(stack, service) != pid)
    assert ended(stack, run) == "success"
    calls = stack.calls()
    assert len(attempts_of(calls)) == 1
    assert modules_of(calls).count("evaluation.release.promote") == 1

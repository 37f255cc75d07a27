"""Start, watch and stop the services of the embedded stack: Airflow's components and the MLflow server."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from etl.stage.errors import StageError
from infra import settings
from infra.airflow_api import HEALTHY_WITHIN_SECONDS, AirflowApi, InfraError

STOP_SECONDS = 12
MARK = "LONGVIEW_SERVICE"  # in the environment of everything below a service: whose it is
POSTGRES = "postgres"  # the service that infra.local.database alone starts and ends
MIGRATE = ("airflow", "db", "migrate")  # creates or upgrades Airflow's database
MEMORY_NEEDED_GB = 6
DISK_NEEDED_GB = 3


def exit_code(work: Callable[[], object]) -> int:
    """Do the work of a command line; return 0, or 1 with what the user can correct printed."""
    try:
        work()
    except (InfraError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@dataclass(frozen=True)
class Service:
    """One long-running process.

    Attributes:
        name: names its log `<name>.out` and its pid file.
        arguments: what follows the program.
        program: the interpreter where nothing else is said.
    """

    name: str
    arguments: tuple[str, ...]
    program: str = sys.executable


API_SERVER = Service("api-server", ("-m", "airflow", "api-server"))
SCHEDULER = Service("scheduler", ("-m", "airflow", "scheduler", "--skip-serve-logs"))
DAG_PROCESSOR = Service("dag-processor", ("-m", "airflow", "dag-processor"))
TRIGGERER = Service("triggerer", ("-m", "airflow", "triggerer", "--skip-serve-logs"))


def mlflow_server() -> Service:
    """Return the tracking server over the same store that the stages write."""
    return Service(
        "mlflow",
        (
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(settings.mlflow_port()),
            "--workers",
            "1",
            "--backend-store-uri",
            settings.tracking_uri(),
            "--default-artifact-root",
            settings.artifact_root().as_uri(),
        ),
    )


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_port(port: int, variable: str) -> None:
    """Raise an InfraError that names who holds the port and how to choose another."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            pass
        else:
            return
    raise InfraError(
        f"port {port} of 127.0.0.1 is in use{_port_owner(port)}",
        f"stop that process (`make down` if it is this project's), or choose another port: {variable}={port + 10}",
    )


def _port_owner(port: int) -> str:
    with contextlib.suppress(Exception):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == "LISTEN" and connection.pid:
                process = psutil.Process(connection.pid)
                return f" by process {connection.pid} ({' '.join(process.cmdline())[:90] or process.name()})"
    return ""


def check_room() -> list[str]:
    """Raise when the disk is too full for a run; return warnings about memory."""
    settings.home().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.home()).free / 1e9
    if free < DISK_NEEDED_GB:
        raise InfraError(
            f"{free:.1f} GB free under {settings.home()}, {DISK_NEEDED_GB} GB are needed",
            "free some space, or set LONGVIEW_HOME to a folder on a larger disk",
        )
    available = available_memory_gb()
    if available is not None and available < MEMORY_NEEDED_GB:
        return [f"{available:.1f} GB of memory available; {MEMORY_NEEDED_GB} GB or more are advised"]
    return []


def available_memory_gb() -> float | None:
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(found[1]) * 1024 / 1e9
    return None


# ---- processes -------------------------------------------------------------------------------------------------------


def log_path(service: Service) -> Path:
    return settings.airflow_home() / "logs" / f"{service.name}.out"


def start(service: Service, env: dict[str, str], stays: bool = False) -> subprocess.Popen[bytes]:
    """Start a service in a session of its own, its output appended to its log.

    Args:
        stays: it is one of `make up`, else it belongs to this process. Everything below it carries that in its
            environment.
    """
    path = log_path(service)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = {
        "home": str(settings.home()),
        "service": service.name,
        "of": None if stays else [os.getpid(), started(os.getpid())],
    }
    with path.open("ab") as log:
        return subprocess.Popen(
            [service.program, *service.arguments],
            cwd=settings.ROOT,
            env=env | {MARK: json.dumps(mark)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _marked() -> Iterator[tuple[psutil.Process, dict[str, Any]]]:
    """Yield every process below a service of this home, with its mark, but not this one and those above it.

    A process is known by the mark in its environment, which it has from the service above it, whatever became of those
    between.
    """
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, ValueError, KeyError, TypeError):
            mark = json.loads(process.environ()[MARK])
            if mark["home"] == str(settings.home()) and mark["service"] != POSTGRES and process.pid not in own:
                yield process, mark


def users_of_home() -> list[str]:
    """Return the names of this home's services that run, of `make up` and of any `make run`; its database is none."""
    return sorted({mark["service"] for process, mark in _marked() if alive(process.pid)})


def end_left_behind(names: Iterable[str] = ()) -> list[int]:
    """End at once what outlived its service: all of a `make run` of this home that was killed; of one that is this
    process, and of `make up`, the named services; without names all of this process's.

    Returns what was ended.
    """
    names, ended = set(names), []
    for process, mark in _marked():
        of, named = mark["of"], mark["service"] in names
        if named if of is None else (named or not names) if of[0] == os.getpid() else not still_runs(*of):
            with contextlib.suppress(psutil.Error):
                process.kill()  # the very process whose environment was read: psutil compares its start
                ended.append(process.pid)
    _wait_for_end(ended, STOP_SECONDS)
    return ended


def stop(pids: Iterable[int], ask: signal.Signals = signal.SIGTERM, seconds: float | None = None) -> None:
    """End processes with everything below them: ask first, then, after STOP_SECONDS or `seconds`, force."""
    roots = [pid for pid in pids if alive(pid)]
    family = {pid: began for root in roots for pid, began in _family(root).items()}
    for pid in roots:
        _signal(pid, ask)
    _wait_for_end(roots, STOP_SECONDS if seconds is None else seconds)
    forced = [pid for pid, began in family.items() if started(pid) == began]
    for pid in forced:
        _signal(pid, signal.SIGKILL)
    _wait_for_end(forced, STOP_SECONDS)


def _wait_for_end(pids: Sequence[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """True while a process runs or holds anything; a finished child of ours is reaped on the way.

    A killed process of several threads counts as ended (Z) as soon as its first thread has; its ports and files stay
    taken until its last one has.
    """
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return fields[0] != "Z" or int(fields[17]) > 1  # state, num_threads: proc_pid_stat(5)
    except OSError:
        pass
    if Path("/proc/self").exists():
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def _signal(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signum)


def started(pid: int) -> float | None:
    """Return when a process began (Unix seconds)."""
    try:
        return psutil.Process(pid).create_time()
    except Exception:
        return None


def still_runs(pid: int, began: float) -> bool:
    """True while the process that began then runs; one that took over its number is not it, nor is one that has ended
    and that nobody has asked for its end."""
    return alive(pid) and started(pid) == began


def _family(pid: int) -> dict[int, float]:
    try:
        root = psutil.Process(pid)
        return {process.pid: process.create_time() for process in [root, *root.children(recursive=True)]}
    except Exception:
        return {}


def memory_gb(pids: Iterable[int]) -> float:
    """Return the memory of process trees, shared pages counted once (PSS); 0 where it cannot be read."""
    total = 0
    for pid in {member for root in pids for member in _family(root)}:
        with contextlib.suppress(OSError, AttributeError):
            if found := re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M):
                total += int(found[1]) * 1024
    return total / 1e9


# ---- Airflow ---------------------------------------------------------------------------------------------------------


def migrate(env: dict[str, str]) -> None:
    """Create or upgrade Airflow's database; at once when this version of Airflow did so before."""
    stamp = settings.airflow_home() / ".migrated"
    address = env["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"]
    wanted = f"{version('apache-airflow')} {hashlib.sha256(address.encode()).hexdigest()}"  # it may hold a password
    database = address.removeprefix("sqlite:///")
    if stamp.exists() and stamp.read_text() == wanted and ("://" in database or Path(database).exists()):
        return
    anew = "" if "://" in database else f"; or delete {database} (the history of runs, nothing else) and try again"
    upgrade(MIGRATE, env, f"correct what it says{anew}")
    stamp.write_text(wanted)


def upgrade(command: Sequence[str], env: Mapping[str, str] | None, remedy: str) -> None:
    """Bring a database to what the program over it asks for.

    Args:
        command: the program's module with its arguments, the first two of which say what it does (MIGRATE).
        env: None: that of this process.
        remedy: what to do when it fails.

    Raises:
        InfraError: it failed, with the end of what it said.
    """
    words = [sys.executable, "-m", *command]
    done = subprocess.run(words, env=env, cwd=settings.ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise InfraError(f"{' '.join(command[:3])} failed:\n" + (done.stdout + done.stderr)[-3000:], remedy)


def wait_healthy(api: AirflowApi, processes: dict[Service, int], *components: str, since: float) -> None:
    """Wait until the components are healthy; a component that ends is reported at once, with the end of its log.

    Args:
        since: when they were started (Unix seconds): the last heartbeat of those before them stays fresh for a while.
    """
    deadline = time.monotonic() + HEALTHY_WITHIN_SECONDS
    while not api.healthy(*components, since=since):
        check_alive(processes)
        if time.monotonic() > deadline:
            raise InfraError(
                f"Airflow is not healthy after {HEALTHY_WITHIN_SECONDS} s",
                f"see {settings.airflow_home() / 'logs'}/*.out",
            )
        time.sleep(0.5)


def check_alive(processes: dict[Service, int]) -> None:
    for service, pid in processes.items():
        if not alive(pid):
            tail = "\n".join(log_path(service).read_text(errors="replace").splitlines()[-25:])
            raise InfraError(
                f"{service.name} ended on its own; the end of its log:\n{tail}", f"see {log_path(service)}"
            )


def http_ok(url: str, within_seconds: float = 5) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return opener.open(url, timeout=within_seconds).status < 400
    return False


# ---- pid files of `make up` ------------------------------------------------------------------------------------------


def pid_file(service: Service) -> Path:
    return settings.home() / "run" / f"{service.name}.pid"


def write_pid(service: Service, pid: int) -> None:
    pid_file(service).parent.mkdir(parents=True, exist_ok=True)
    whole = pid_file(service).with_suffix(".new")  # others read it while it is written
    whole.write_text(f"{pid} {started(pid)}")
    whole.replace(pid_file(service))


def running_pid(service: Service) -> int | None:
    """Return the pid of a service of `make up` that still runs; a number that another process took over is not it."""
    with contextlib.suppress(OSError, ValueError):
        pid, began = pid_file(service).read_text().split()
        return int(pid) if still_runs(int(pid), float(began)) else None
    return None

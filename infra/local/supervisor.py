"""The process that `make up` leaves behind: it starts the services, and starts again what ends on its own or hangs.

    python -m infra.local.supervisor

Its environment is that of Airflow. SIGTERM ends the services and then itself; SIGHUP starts at once what waits. When it
is killed, all that it started ends, too. What it does stands in its log.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from infra import settings
from infra.airflow_api import HEALTHY_WITHIN_SECONDS, AirflowApi, InfraError
from infra.local import database, services
from infra.local.services import Service

SUPERVISOR = Service("supervisor", ("-m", "infra.local.supervisor"))
LOOK_EVERY_SECONDS = 0.5
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
STEADY_SECONDS = 300.0  # a service that worked so long had no trouble with its start
ASK_EVERY_SECONDS = 15.0  # for a sign of life, which has as long to come
HUNG_AFTER_SECONDS = 180.0
FIRST_SIGN_WITHIN_SECONDS = float(HEALTHY_WITHIN_SECONDS)  # of its start


@dataclass
class Signs:
    """The signs of life of a process that is asked for them.

    Attributes:
        lives: whether it has given one since it was last asked; None: nobody can know now, or ever asks.
        pid: the process that is asked; None while there is none.
        silent_seconds: since its last sign of life, or its beginning.
        came: whether it has given one at all.
    """

    lives: Callable[[], bool | None] | None = None
    pid: int | None = None
    silent_seconds: float = 0.0
    came: bool = False

    def begin(self, pid: int | None, came: bool = False) -> None:
        """Listen to another process from now on."""
        self.pid, self.silent_seconds, self.came = pid, 0.0, came

    def hangs(self) -> bool:
        return self.silent_seconds >= (HUNG_AFTER_SECONDS if self.came else FIRST_SIGN_WITHIN_SECONDS)

    def heard(self, pid: int | None, lives: bool | None, seconds: float) -> None:
        """Note what became of a question to a process: `lives`, after so many seconds since the one before.

        A machine that stood still itself has not listened: no question counts for longer than it may take.
        """
        if pid is None or pid != self.pid or lives is None:
            return
        self.silent_seconds = 0.0 if lives else self.silent_seconds + min(seconds, 2 * ASK_EVERY_SECONDS)
        self.came = self.came or lives

    def listen(self) -> None:
        """Ask for ever, in a thread of its own: what hangs lets one wait."""
        before = time.monotonic()
        while self.lives is not None:
            time.sleep(ASK_EVERY_SECONDS)
            pid = self.pid
            lives, now = self.lives(), time.monotonic()
            self.heard(pid, lives, now - before)
            before = now


@dataclass
class Watched:
    """A service that is to run.

    Attributes:
        environment: what it is started with.
        stays: it is one of `make up`, else it belongs to this process.
        signs: of its life.
        process: its process; None while there is none.
        wait_seconds: before its next start, from its end.
        started, due: when it was started, and when it is to be (monotonic seconds).
    """

    service: Service
    environment: dict[str, str]
    stays: bool = True
    signs: Signs = field(default_factory=Signs)
    process: subprocess.Popen[bytes] | None = None
    wait_seconds: float = 0.0
    started: float = 0.0
    due: float = 0.0

    def look(self, now: float) -> None:
        """Start the service when it is due; end it when it hangs; note its end."""
        name = self.service.name
        if self.process is not None and self.signs.hangs() and self.process.poll() is None:
            say_hung(name, self.signs)
            self.process.kill()  # what hangs does not hear SIGTERM
            self.process.wait()
        if self.process is not None and (code := self.process.poll()) is not None:
            self.wait_seconds = next_wait(self.wait_seconds, now - self.started)
            self.due = now + self.wait_seconds
            say(f"{name} (process {self.process.pid}) ended with code {code}; started again in {self.wait_seconds:g} s")
            services.end_left_behind([name])  # what was below it
            self.process = None
        if self.process is None and now >= self.due:
            self.process = services.start(self.service, self.environment, self.stays)
            self.started = now
            self.signs.begin(self.process.pid)
            if self.stays:
                services.write_pid(self.service, self.process.pid)
            say(f"{name} started (process {self.process.pid})")


def next_wait(wait_seconds: float, worked_seconds: float) -> float:
    """Return how long to wait before a service is started again.

    Twice as long as before, unless it worked for a while.
    """
    if worked_seconds >= STEADY_SECONDS:
        return FIRST_WAIT_SECONDS
    return min(max(2 * wait_seconds, FIRST_WAIT_SECONDS), LONGEST_WAIT_SECONDS)


def say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def say_hung(name: str, signs: Signs) -> None:
    say(f"{name} (process {signs.pid}) has given no sign of life for {signs.silent_seconds:.0f} s; killed")


def watch(watched: Iterable[Watched], base: DatabaseWatch | None = None) -> None:
    """Keep services at work until SIGTERM, then end them with everything below them.

    Args:
        base: the database below them, looked at first; whoever ends them ends it.
    """
    watched = list(watched)
    stopping, hurry = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGHUP, lambda *_: hurry.set())
    _end_when_this_ends([one.service.name for one in watched])
    for signs in [one.signs for one in (*watched, base) if one is not None]:
        threading.Thread(target=signs.listen, daemon=True).start()
    while not stopping.is_set():
        if hurry.is_set():
            hurry.clear()
            for one in watched:
                one.due = 0.0
        if base is not None:
            base.look(time.monotonic())
        for one in watched:
            one.look(time.monotonic())
        stopping.wait(LOOK_EVERY_SECONDS)
    services.stop(one.process.pid for one in watched if one.process is not None)


def _end_when_this_ends(names: list[str]) -> None:
    """Fork a process that waits for the end of this one, however it comes, and ends what then still runs of it.

    Nothing else sees the end of a process that is killed; and what Linux could send the services then would not reach
    what is below them.
    """
    ours, theirs = os.pipe()  # no program that is started here gets the writing end: it closes with this process
    if os.fork() != 0:
        os.close(ours)
        return
    os.close(theirs)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    os.read(ours, 1)
    services.end_left_behind(names)
    if database.stop():
        say(f"{services.POSTGRES} stopped")
    os._exit(0)


class Heartbeat:
    """Whether a component of Airflow has written another heartbeat into the database since this was last called.

    None where Airflow cannot say: its server or its database is away, which is no fault of the component.

    Args:
        component: its name in Airflow's health.
    """

    def __init__(self, component: str) -> None:
        self.component = component
        self.last: str | None = None

    def __call__(self) -> bool | None:
        with contextlib.suppress(Exception):  # whatever is wrong with an answer says nothing of the component
            health = AirflowApi().call("GET", "/api/v2/monitor/health", timeout=ASK_EVERY_SECONDS)
            if health["metadatabase"]["status"] == "healthy":
                latest = health[self.component][f"latest_{self.component}_heartbeat"]
                another, self.last = latest != self.last, latest
                return another
        return None


class DatabaseWatch:
    """Starts the home's PostgreSQL again when it has ended on its own, or hangs."""

    def __init__(self) -> None:
        self.wanted = database.server_pid(settings.postgres_data()) is not None
        self.due = 0.0
        self.signs = Signs(functools.partial(database.answers, ASK_EVERY_SECONDS) if self.wanted else None)

    def look(self, now: float) -> None:
        """Start the server when it does not run; end it when it hangs."""
        if not self.wanted:
            return
        if (pid := database.server_pid(settings.postgres_data())) != self.signs.pid:
            self.signs.begin(pid, came=True)  # who starts it waits for its first answer
        if pid is not None and self.signs.hangs():
            say_hung(services.POSTGRES, self.signs)
            services.stop([pid], signal.SIGKILL)  # its children too: what is stopped does not see its end
            pid = None
        if pid is not None or now < self.due:
            return
        self.due = now + LONGEST_WAIT_SECONDS
        say(f"{services.POSTGRES} does not run")
        try:
            if database.ensure(create=False):
                say(f"{services.POSTGRES} started")
        except InfraError as error:
            say(f"error: {error}")


def signs_of_life() -> dict[str, Callable[[], bool | None]]:
    """Return what says of each service of `make up`, by its name, whether it works."""
    answers = functools.partial(services.http_ok, within_seconds=ASK_EVERY_SECONDS)
    return {
        services.API_SERVER.name: functools.partial(answers, settings.airflow_url() + "/api/v2/version"),
        services.SCHEDULER.name: Heartbeat("scheduler"),
        services.DAG_PROCESSOR.name: Heartbeat("dag_processor"),
        services.TRIGGERER.name: Heartbeat("triggerer"),
        "mlflow": functools.partial(answers, settings.mlflow_url() + "/health"),
    }


def main() -> None:
    from infra.local.stack import stack

    env, lives = dict(os.environ), signs_of_life()
    mine = {"mlflow": settings.stage_environment(env)}
    watch(
        [Watched(service, mine.get(service.name, env), signs=Signs(lives[service.name])) for service in stack()],
        DatabaseWatch(),
    )


if __name__ == "__main__":
    main()

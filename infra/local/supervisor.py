"""The process that `make up` leaves behind: it starts the services, and starts again what ends on its own.

    python -m infra.local.supervisor

Its environment is that of Airflow. SIGTERM ends the services and then itself; SIGHUP starts at once what waits. When it
is killed, all that it started ends, too. What it does stands in its log.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from infra import settings
from infra.airflow_api import InfraError
from infra.local import database, services
from infra.local.services import Service

SUPERVISOR = Service("supervisor", ("-m", "infra.local.supervisor"))
LOOK_EVERY_SECONDS = 0.5
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
STEADY_SECONDS = 300.0  # a service that worked so long had no trouble with its start


@dataclass
class Watched:
    """A service that is to run.

    Attributes:
        environment: what it is started with.
        process: its process; None while there is none.
        wait_seconds: before its next start, from its end.
        started, due: when it was started, and when it is to be (monotonic seconds).
    """

    service: Service
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    wait_seconds: float = 0.0
    started: float = 0.0
    due: float = 0.0

    def look(self, now: float) -> None:
        """Start the service when it is due; note its end."""
        name = self.service.name
        if self.process is not None and (code := self.process.poll()) is not None:
            self.wait_seconds = next_wait(self.wait_seconds, now - self.started)
            self.due = now + self.wait_seconds
            say(f"{name} (process {self.process.pid}) ended with code {code}; started again in {self.wait_seconds:g} s")
            services.end_left_behind([name])  # what was below it
            self.process = None
        if self.process is None and now >= self.due:
            self.process = services.start(self.service, self.environment, stays=True)
            self.started = now
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


def watch(watched: Iterable[Watched], first: Callable[[float], object] = lambda now: None) -> None:
    """Keep services running until SIGTERM, then end them with everything below them.

    Args:
        first: called with the monotonic seconds before each look at the services.
    """
    watched = list(watched)
    stopping, hurry = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGHUP, lambda *_: hurry.set())
    _end_when_this_ends([one.service.name for one in watched])
    while not stopping.is_set():
        if hurry.is_set():
            hurry.clear()
            for one in watched:
                one.due = 0.0
        first(time.monotonic())
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


class DatabaseWatch:
    """Starts the home's PostgreSQL again when it has ended on its own."""

    def __init__(self) -> None:
        self.wanted = database.server_pid(settings.postgres_data()) is not None
        self.due = 0.0

    def __call__(self, now: float) -> None:
        if not self.wanted or now < self.due or database.server_pid(settings.postgres_data()):
            return
        self.due = now + LONGEST_WAIT_SECONDS
        say(f"{services.POSTGRES} does not run")
        try:
            if database.ensure(create=False):
                say(f"{services.POSTGRES} started")
        except InfraError as error:
            say(f"error: {error}")


def main() -> None:
    from infra.local.stack import stack

    env = dict(os.environ)
    mine = {"mlflow": settings.stage_environment(env)}
    watch([Watched(service, mine.get(service.name, env)) for service in stack()], DatabaseWatch())


if __name__ == "__main__":
    main()

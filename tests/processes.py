"""Real processes of tests.

Each leads a session of its own, so that all that it started is found, whatever group it is in.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.waiting import PATIENCE_S


@dataclass
class Started:
    """A process that leads a session of its own, and its output in a file."""

    process: subprocess.Popen
    log: Path

    def family(self) -> list[psutil.Process]:
        """Return every living process of its session.

        Python workers of Spark leave the process group, not the session.
        """
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(pid) == self.process.pid:
                    found.append(psutil.Process(pid))
        return found

    def signal_all(self, signum: signal.Signals) -> None:
        for member in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signum)

    def stop(self) -> None:
        self.signal_all(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return exit code and output."""
        code = self.process.wait(PATIENCE_S)
        return code, self.log.read_text()


def start(words: list[str], log: Path, cwd: Path, env: dict[str, str] | None = None) -> Started:
    with log.open("w") as stream:
        process = subprocess.Popen(
            words,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
    return Started(process, log)


def runs(process: psutil.Process, what: str) -> bool:
    """Return whether a word of a process's command line holds `what`; False when it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(what in word for word in process.cmdline())
    return False


def free_port() -> int:
    """Return a port that is free, and that no outgoing connection takes until it is used: those are above 32,767, and
    Ray's workers below 20,000.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

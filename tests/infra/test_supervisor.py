"""What watches the services of `make up`: what ends is started again, and all ends with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from infra import settings
from infra.local import services
from infra.local.supervisor import LONGEST_WAIT_SECONDS, STEADY_SECONDS, next_wait
from tests.waiting import wait_for

SUPERVISOR = """
import os
from infra.local import supervisor
from infra.local.services import Service
supervisor.LOOK_EVERY_SECONDS, supervisor.FIRST_WAIT_SECONDS = 0.05, 0.1
# Below it a process in a session of its own that ignores SIGTERM, as the executors of Airflow are.
child = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('child', flush=True); time.sleep(900)")
steady = (f"import subprocess, sys, time; "
    f"subprocess.Popen([sys.executable, '-S', '-c', {child!r}], start_new_session=True); time.sleep(900)")
services = {"steady": steady, "broken": "raise SystemExit(3)"}
supervisor.watch(
    supervisor.Watched(Service(name, ("-S", "-c", code)), dict(os.environ)) for name, code in services.items())
"""


def test_a_service_that_ends_soon_waits_twice_as_long_each_time_and_a_steady_one_does_not():
    waits = [0.0]
    for _ in range(8):
        waits.append(next_wait(waits[-1], worked_seconds=2))
    assert waits[1:] == [1, 2, 4, 8, 16, 32, LONGEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS]
    assert next_wait(LONGEST_WAIT_SECONDS, STEADY_SECONDS) == 1


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_is_started_again_and_all_ends_with_the_supervisor(monkeypatch, tmp_path, end):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    log, said = tmp_path / "supervisor.out", tmp_path / "airflow" / "logs" / "steady.out"
    with log.open("wb") as out:
        supervisor = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR], cwd=settings.ROOT, env=dict(os.environ), stdout=out, stderr=out
        )
    steady = services.Service("steady", ())

    def families(number: int) -> list[psutil.Process]:
        """Return the service and what is below it once that was started so often."""
        wait_for("the service", lambda: said.exists() and said.read_text().count("child") == number)
        service = psutil.Process(services.running_pid(steady))
        return [service, *service.children(recursive=True)]

    try:
        first = families(1)
        assert len(first) == 2
        first[0].kill()
        second = families(2)
        assert first[0].pid != second[0].pid
        wait_for("end of the first", lambda: not any(services.alive(process.pid) for process in first))
        waits = wait_for(
            "some starts",
            lambda: (
                found
                if len(found := re.findall(r"broken .* code 3; started again in (\S+) s", log.read_text())) >= 3
                else None
            ),
        )
        assert waits[:3] == ["0.1", "0.2", "0.4"]
        assert re.search(
            rf"steady \(process {first[0].pid}\) ended with code -9; started again in 0.1 s", log.read_text()
        )
    finally:
        supervisor.send_signal(end)
    assert supervisor.wait() == (0 if end == signal.SIGTERM else -signal.SIGKILL)
    wait_for(
        "end of all",
        lambda: not any(services.alive(process.pid) for process in second) and services.users_of_home() == [],
    )

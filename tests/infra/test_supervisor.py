"""What watches the services of `make up`: what ends or hangs is started again, and all ends with it."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from infra import settings
from infra.local import services
from infra.local.supervisor import (
    ASK_EVERY_SECONDS,
    FIRST_SIGN_WITHIN_SECONDS,
    HUNG_AFTER_SECONDS,
    LONGEST_WAIT_SECONDS,
    STEADY_SECONDS,
    Heartbeat,
    Signs,
    next_wait,
)
from tests.processes import free_port
from tests.waiting import wait_for

SUPERVISOR = """
import os
from infra.local import services, supervisor
from infra.local.services import Service
supervisor.LOOK_EVERY_SECONDS, supervisor.FIRST_WAIT_SECONDS = 0.05, 0.1
supervisor.ASK_EVERY_SECONDS, supervisor.HUNG_AFTER_SECONDS, supervisor.FIRST_SIGN_WITHIN_SECONDS = 0.5, 3.0, 10.0
# Below it a process in a session of its own that ignores SIGTERM, as the executors of Airflow are.
child = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('child', flush=True); time.sleep(900)")
steady = (f"import subprocess, sys, time; "
    f"subprocess.Popen([sys.executable, '-S', '-c', {child!r}], start_new_session=True); time.sleep(900)")
deaf = "import http.server as h; h.HTTPServer(('127.0.0.1', PORT), h.SimpleHTTPRequestHandler).serve_forever()"
programs = {"steady": steady, "broken": "raise SystemExit(3)", "deaf": deaf}
lives = {"deaf": lambda: services.http_ok("http://127.0.0.1:PORT/", 0.5)}
supervisor.watch(
    supervisor.Watched(Service(name, ("-S", "-c", code)), dict(os.environ), signs=supervisor.Signs(lives.get(name)))
    for name, code in programs.items())
"""


def test_a_service_that_ends_soon_waits_twice_as_long_each_time_and_a_steady_one_does_not():
    waits = [0.0]
    for _ in range(8):
        waits.append(next_wait(waits[-1], worked_seconds=2))
    assert waits[1:] == [1, 2, 4, 8, 16, 32, LONGEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS]
    assert next_wait(LONGEST_WAIT_SECONDS, STEADY_SECONDS) == 1


def test_silence_counts_as_long_as_it_was_listened_to():
    """A machine that was stopped for an hour has heard nothing, and nobody hangs; a process has its own silence."""
    signs = Signs(lambda: True)
    signs.begin(7)
    for lives, silent_seconds in ((False, 15), (None, 15), (False, 30), (True, 0), (False, 15)):
        signs.heard(7, lives, 15.0)
        assert signs.silent_seconds == silent_seconds
    signs.heard(7, False, 3_600.0)
    assert signs.silent_seconds == 15 + 2 * ASK_EVERY_SECONDS < HUNG_AFTER_SECONDS
    assert not signs.hangs()
    while signs.silent_seconds < HUNG_AFTER_SECONDS:
        signs.heard(7, False, 15.0)
    assert signs.hangs()
    signs.begin(8)  # its beginning may take longer than an answer
    assert not signs.hangs()
    signs.heard(7, False, 15.0)
    assert signs.silent_seconds == 0
    while signs.silent_seconds < FIRST_SIGN_WITHIN_SECONDS:
        assert not signs.hangs()
        signs.heard(8, False, 15.0)
    assert signs.hangs()


@pytest.fixture
def airflow(monkeypatch):
    """A server that says of Airflow's health what a test puts there, bytes of an answer."""
    answers: list[bytes] = []

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[-1])

        def log_message(self, *_) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        monkeypatch.setenv("LONGVIEW_AIRFLOW_PORT", str(server.server_port))
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield answers
        server.shutdown()


def test_a_component_lives_while_its_heartbeat_moves_and_nobody_knows_without_the_database(airflow):
    def health(beat: str | None, database: str = "healthy") -> bytes:
        scheduler = {"status": "unhealthy", "latest_scheduler_heartbeat": beat}
        return json.dumps({"metadatabase": {"status": database}, "scheduler": scheduler}).encode()

    lives, found = Heartbeat("scheduler"), []
    for answer in (health("1"), health("1"), health("2"), health(None, "unhealthy"), b"not JSON", health("2")):
        airflow.append(answer)
        found.append(lives())
    assert found == [True, False, True, None, None, False]


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_is_started_again_and_all_ends_with_the_supervisor(monkeypatch, tmp_path, end):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    log, said = tmp_path / "supervisor.out", tmp_path / "airflow" / "logs" / "steady.out"
    port = str(free_port())
    with log.open("wb") as out:
        supervisor = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR.replace("PORT", port)],
            cwd=settings.ROOT,
            env=dict(os.environ),
            stdout=out,
            stderr=out,
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
        deaf = services.Service("deaf", ())
        wait_for("an answer", lambda: services.http_ok(f"http://127.0.0.1:{port}/"))
        hangs = services.running_pid(deaf)
        os.kill(hangs, signal.SIGSTOP)
        wait_for(
            "an answer of another",
            lambda: services.running_pid(deaf) not in (None, hangs) and services.http_ok(f"http://127.0.0.1:{port}/"),
        )
        assert re.search(rf"deaf \(process {hangs}\) has given no sign of life for \d+ s; killed", log.read_text())
        assert re.search(rf"deaf \(process {hangs}\) ended with code -9; started again in", log.read_text())
    finally:
        supervisor.send_signal(end)
    assert supervisor.wait() == (0 if end == signal.SIGTERM else -signal.SIGKILL)
    wait_for(
        "end of all",
        lambda: not any(services.alive(process.pid) for process in second) and services.users_of_home() == [],
    )

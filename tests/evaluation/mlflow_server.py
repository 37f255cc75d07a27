"""A real MLflow server of a test's own, killed at the moment that the test names."""

from __future__ import annotations

import http.client
import http.server
import os
import sys
import threading
from pathlib import Path

from infra import settings
from infra.local.services import http_ok
from tests.processes import Started, free_port, start
from tests.waiting import wait_for

NOT_PASSED_ON = ("host", "accept-encoding", "transfer-encoding", "content-length")


def proxy_of(server: MlflowServer) -> type[http.server.BaseHTTPRequestHandler]:
    """Return what passes requests on to a server, and kills it at the chosen one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            self.close_connection = True  # whatever happens below, no client waits on this connection
            body = self.body()
            chosen = server.is_chosen(f"{self.command} {self.path} {body[:1000].decode('latin-1')}")
            if chosen and not server.answered:
                return server.kill()
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            try:
                connection.request(
                    self.command,
                    self.path,
                    body,
                    {k: v for k, v in self.headers.items() if k.lower() not in NOT_PASSED_ON},
                )
                answer = connection.getresponse()
                text = answer.read()
            except (OSError, http.client.HTTPException):
                return None  # no server: the client gets no answer either
            finally:
                connection.close()
            if chosen:
                return server.kill()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(text)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":  # which empty files are sent as
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts: list[bytes] = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *args: object) -> None:
            pass

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on

    return Handler


class MlflowServer:
    """An MLflow server over a SQLite file, which keeps the artifacts itself, behind a proxy that kills it when a
    request comes.

    Attributes:
        uri: address of the proxy, which stays the same when the server is started again.
        killed_at: "METHOD path" of the request that the server was killed at; None: it was not killed since `kill_at`.
    """

    def __init__(self, database: Path) -> None:
        self.database, self.port = database, free_port()
        self.process: Started | None = None
        self.killed_at: str | None = None
        self._words: tuple[str, ...] = ()
        self.answered = False
        self._lock = threading.Lock()
        self._proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), proxy_of(self))
        self._proxy.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._proxy.server_port}"
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    def start(self) -> None:
        self.kill()
        words = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{self.database}",
            "--artifacts-destination",
            str(self.database.parent / "served"),
        ]
        env = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_TRACKING_URI": "",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self.process = start(words, self.database.parent / "server.log", settings.ROOT, env)
        wait_for("MLflow server", lambda: http_ok(f"http://127.0.0.1:{self.port}/health"))

    def kill_at(self, *words: str, answered: bool) -> None:
        """Kill the server when a request comes whose method, path and body hold all these words.

        Args:
            answered: True: the server has done it, its answer is lost; False: the server does not get it.
        """
        self._words, self.answered, self.killed_at = words, answered, None

    def is_chosen(self, request: str) -> bool:
        with self._lock:
            chosen = bool(self._words) and all(word in request for word in self._words)
            if chosen:
                self._words, self.killed_at = (), request.partition("{")[0].strip()
            return chosen

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self.process is not None:
            self.process.stop()

    def close(self) -> None:
        self.kill()
        self._proxy.shutdown()
        self._proxy.server_close()

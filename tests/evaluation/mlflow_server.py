"""A real MLflow server of a test's own, and a wire to it that breaks where it is told to."""

from __future__ import annotations

import http.client
import http.server
import os
import sys
import threading
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from infra import settings
from infra.services import http_ok
from tests.processes import Started, free_port, start
from tests.waiting import wait_for


@dataclass
class MlflowServer:
    """An MLflow server over a SQLite file, which keeps the artifacts itself; it can be stopped and started again."""

    database: Path
    port: int = field(default_factory=free_port)
    process: Started | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(self.database.parent / "served")]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_TRACKING_URI": "", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process = start(words, self.database.parent / "server.log", settings.ROOT, env)
        wait_for("MLflow server", lambda: http_ok(f"{self.uri}/health"))

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()


class Wire:
    """An HTTP proxy that is cut at the n-th request that changes something, and stays cut until it is mended.

    Attributes:
        cut_at: number of that request, counted from 1; None: never.
        lost: True: the server gets that request and its answer is lost; False: it does not get it.
        changes: what has been asked for since `mend`, oldest first.
    """

    def __init__(self, upstream: str) -> None:
        self.cut_at: int | None = None
        self.lost, self.down, self.changes = False, False, list[str]()
        address, wire = urllib.parse.urlsplit(upstream), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                cut = wire.is_cut(self.command, self.path)
                if cut and not (wire.lost and not wire.down):
                    wire.down = True
                    return self.drop()
                connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
                connection.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() not in ("host", "accept-encoding")})
                answer = connection.getresponse()
                text = answer.read()
                connection.close()
                if cut:
                    wire.down = True
                    return self.drop()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def drop(self) -> None:
                self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def is_cut(self, method: str, path: str) -> bool:
        if self.down:
            return True
        what = path.partition("?")[0].rpartition("/api/2.0/")[2]
        is_file = what.startswith("mlflow-artifacts/")
        if method == "GET" or "/search" in path or (is_file and self.changes and self.changes[-1].startswith(f"{method} mlflow-artifacts/")):
            return False  # of files that are sent side by side, the first stands for all
        self.changes.append(f"{method} {what}")
        return len(self.changes) == self.cut_at

    def cut(self, at: int, lost: bool) -> None:
        self.cut_at, self.lost, self.down, self.changes = at, lost, False, []

    def mend(self) -> None:
        self.cut_at, self.down, self.changes = None, False, []

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

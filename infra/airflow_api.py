"""The few calls of Airflow's REST API that the DAGs, `make run` and `make up` need."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from infra import settings

HEALTHY_WITHIN_SECONDS = 300  # a service that ends is reported at once; one that only takes long is on a busy machine
ANSWER_WITHIN_SECONDS = 120
CHANGES_ASKED = 5  # times, as Airflow's own tasks ask


class InfraError(Exception):
    """Something that the user can correct; printed as `error:` and `remedy:`.

    Attributes:
        status: with which Airflow's server refused; 0 where none did.
    """

    status = 0

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}\n  remedy: {remedy}")


class AirflowApi:
    """The few calls of Airflow's REST API that are needed here."""

    def __init__(self, url: str | None = None) -> None:
        self.url = url or settings.airflow_url()
        self._token = ""
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, method: str, path: str, body: Any = None, timeout: float = ANSWER_WITHIN_SECONDS) -> Any:
        """Return the JSON answer.

        Raises:
            InfraError: the server refused, with what it said.
            OSError: no answer.
        """
        if not self._token and path != "/auth/token" and not path.startswith("/api/v2/monitor"):
            # Where no login is asked for, any will do.
            self._token = self.call(
                "POST", "/auth/token", {"username": settings.AIRFLOW_USER, "password": settings.password()}
            )["access_token"]
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, TypeError, KeyError):
                text = str(json.loads(text)["detail"])
            refusal = InfraError(
                f"Airflow answered {error.code} to {method} {path}: {text[:1500]}",
                f"see {settings.airflow_home() / 'logs' / 'api-server.out'}",
            )
            refusal.status = error.code
            raise refusal from None

    def change(self, method: str, path: str, body: Any, timeout: float = ANSWER_WITHIN_SECONDS) -> None:
        """Make a call that changes something, and again while the server answers that it could not (500 and above).

        Over SQLite that is no rare answer: before each change Airflow's server writes who asked for it, from the thread
        that also has to end its other requests. Where one of those has the database at that moment, the server waits
        for itself until SQLite gives up (5 s; a longer timeout makes it wait longer).

        Raises:
            InfraError: the server refused: at once, or (409) since what is asked for is there already, from a call
                before this one.
            OSError: no answer.
        """
        for asked in range(1, CHANGES_ASKED + 1):
            try:
                self.call(method, path, body, timeout)
                return
            except InfraError as error:
                if error.status == 409 and asked > 1:
                    return  # it was done when it was asked for before
                if error.status < 500 or asked == CHANGES_ASKED:
                    raise
            time.sleep(1)

    def healthy(self, *components: str, since: float = 0.0) -> bool:
        """True when the server answers and every component has a fresh heartbeat, none older than `since` (Unix
        seconds).
        """
        try:
            health = self.call("GET", "/api/v2/monitor/health", timeout=5)
        except (OSError, ValueError, InfraError):
            return False
        beats = [_unix((health.get(name) or {}).get(f"latest_{name}_heartbeat")) for name in components]
        return all(
            (health.get(name) or {}).get("status") == "healthy" for name in ("metadatabase", *components)
        ) and all(beat >= since for beat in beats)

    def set_pools(self) -> None:
        """Create the pools that the tasks name; one that is there keeps its size."""
        for name, (slots, description) in settings.POOLS.items():
            body = {"name": name, "slots": slots, "description": description, "include_deferred": False}
            try:
                self.change("POST", "/api/v2/pools", body)
            except InfraError as error:
                if error.status != 409:
                    raise

    def wait_for_dag(self, dag_id: str, file: str, since: float, alive_check: Any = None) -> dict[str, Any]:
        """Return the DAG of `file` once it was parsed after `since` (Unix seconds), or say why it was not.

        Other files may be broken.
        """
        deadline = time.monotonic() + HEALTHY_WITHIN_SECONDS
        while time.monotonic() < deadline:
            if alive_check:
                alive_check()
            try:
                dag = self.call("GET", f"/api/v2/dags/{dag_id}")
                if not dag.get("is_stale") and _unix(dag.get("last_parsed_time")) >= since:
                    return dag
            except InfraError as error:
                if error.status != 404:
                    raise
            broken = self.call("GET", "/api/v2/importErrors").get("import_errors") or []
            if recent := [
                entry
                for entry in broken
                if Path(str(entry.get("filename"))).name == file and _unix(entry.get("timestamp")) >= since
            ]:
                raise InfraError(
                    f"{recent[0].get('filename')} does not import:\n{recent[0].get('stack_trace')}",
                    "correct the DAG file",
                )
            time.sleep(0.5)
        raise InfraError(
            f"Airflow did not parse the DAG {dag_id} within {HEALTHY_WITHIN_SECONDS} s",
            f"see {settings.airflow_home() / 'logs' / 'dag-processor.out'}",
        )


def _unix(text: str | None) -> float:
    import datetime as dtm

    return dtm.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() if text else 0.0

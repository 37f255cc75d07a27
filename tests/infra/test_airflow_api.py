"""Airflow's database: one that cannot be used, and one that another process holds."""

from __future__ import annotations

import contextlib
import sqlite3
import threading

import pytest

from infra import settings
from infra.airflow_api import AirflowApi, InfraError
from infra.local import services
from infra.local.services import API_SERVER
from tests.processes import free_port
from tests.waiting import wait_for


@pytest.fixture
def api(monkeypatch, tmp_path):
    """Of a server of its own."""
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    monkeypatch.setenv("LONGVIEW_AIRFLOW_PORT", str(free_port()))
    for name in (settings.DATABASE, settings.EMBEDDED):
        monkeypatch.delenv(name, raising=False)
    env = settings.environment()
    services.migrate(env)
    server = services.start(API_SERVER, env)
    api = AirflowApi()
    wait_for("an answer", api.healthy)
    yield api
    services.stop([server.pid])


@pytest.mark.parametrize("given", [None, "postgresql+psycopg2://airflow:hunter2@127.0.0.1:1/airflow"])
def test_a_database_that_cannot_be_upgraded_is_named_without_its_password(monkeypatch, tmp_path, given):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    monkeypatch.setenv(settings.DATABASE, given or "")
    monkeypatch.delenv(settings.EMBEDDED, raising=False)
    env = settings.environment()
    settings.airflow_sqlite().write_text("no database " * 1_000)
    with pytest.raises(InfraError, match="airflow db migrate failed:") as failed:
        services.migrate(env)
    assert (f"; or delete {settings.airflow_sqlite()} " in str(failed.value)) == (given is None)
    assert "hunter2" not in str(failed.value)


@pytest.mark.slow
def test_a_change_that_the_server_had_no_database_for_is_asked_for_again(api):
    """Airflow 3.3's server holds it itself while it writes its log of calls: make run failed with answer 500."""

    def refused() -> int:
        return services.log_path(API_SERVER).read_text().count("Error with id")

    (first, *_), asked = settings.POOLS, {"slots": 1, "description": "", "include_deferred": False}
    with contextlib.closing(sqlite3.connect(settings.airflow_sqlite(), check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InfraError, match="answered 500 to POST /api/v2/pools"):
            api.call("POST", "/api/v2/pools", {"name": first, **asked})
        release = threading.Thread(target=lambda: wait_for("2nd refusal", lambda: refused() > 1) and other.rollback())
        release.start()
        api.set_pools()
        release.join()
    slots = {pool["name"]: pool["slots"] for pool in api.call("GET", "/api/v2/pools")["pools"]}
    assert slots.items() >= {name: slots for name, (slots, _) in settings.POOLS.items()}.items()
    before = refused()
    for wrong, answer in (({"name": first, **asked}, 409), ({}, 422)):
        with pytest.raises(InfraError, match=f"answered {answer}"):
            api.change("POST", "/api/v2/pools", wrong)
    assert refused() == before + 1  # a line for the 409: what the server does not want is asked for once

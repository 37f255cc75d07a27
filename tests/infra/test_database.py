"""The home's own PostgreSQL.

Who reaches it, what it survives, what moves into it, backup and restore. The real server, no stand-in.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dtm
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from infra import settings
from infra.airflow_api import InfraError
from infra.local import database, services, stack, supervisor
from tests.processes import runs
from tests.waiting import wait_for


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home in a folder with a space and a percent sign; its server ends with the test."""
    folder = tmp_path / "my home 100%"
    monkeypatch.setenv("LONGVIEW_HOME", str(folder))
    for name in (settings.DATABASE, settings.EMBEDDED, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    database.stop()
    shutil.rmtree(settings.postgres_socket(), ignore_errors=True)


def query(statement: str, name: str = "airflow") -> list[tuple]:
    engine = sa.create_engine(settings.postgres_address(name))
    try:
        with engine.begin() as connection:
            result = connection.execute(sa.text(statement))
            return [tuple(row) for row in result] if result.returns_rows else []
    finally:
        engine.dispose()


def pid_of_server() -> int:
    pid = database.server_pid(settings.postgres_data())
    assert pid
    return pid


def test_a_home_has_sqlite_until_make_up_and_a_given_address_wins(home, monkeypatch):
    assert settings.tracking_uri() == f"sqlite:///{home}/mlflow.db"
    assert settings.airflow_database() == f"sqlite:///{home}/airflow/airflow.db"
    assert database.ensure(create=False) == {}  # `make run` makes none
    monkeypatch.setenv(settings.EMBEDDED, "sqlite")
    assert database.ensure(create=True) == {}
    monkeypatch.setenv(settings.EMBEDDED, "mysql")
    with pytest.raises(SystemExit, match="LONGVIEW_DB='mysql' is unknown"):
        settings.tracking_uri()
    monkeypatch.delenv(settings.EMBEDDED)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv(settings.DATABASE, "postgresql+psycopg2://airflow:hunter2@db/airflow")
    assert database.ensure(create=True) == {}  # nothing would use it

    settings.postgres_data().mkdir(parents=True)
    (settings.postgres_data() / "PG_VERSION").write_text("18\n")
    assert settings.tracking_uri() == "http://mlflow:5000"
    assert settings.airflow_database() == "postgresql+psycopg2://airflow:hunter2@db/airflow"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert settings.tracking_uri().startswith("postgresql+psycopg2:///mlflow?")
    assert "airflow" not in str(
        {
            name: value
            for name, value in settings.stage_environment(settings.environment()).items()
            if "postgresql" in value
        }
    )
    monkeypatch.setenv(settings.EMBEDDED, "sqlite")
    with pytest.raises(
        SystemExit, match=r"are in its PostgreSQL(.|\n)*LONGVIEW_HOME=folder"
    ):  # the models would be out of sight
        settings.tracking_uri()


@pytest.mark.parametrize(
    ("folder", "near"),
    [
        ("/srv/vql/var", True),
        ("/srv/" + "v" * 90, False),
        ("/srv/my var", False),
        ("/srv/a,b", False),
        ("/srv/50%", False),
    ],
)
def test_the_socket_has_a_short_and_plain_path(monkeypatch, folder, near):
    monkeypatch.setenv("LONGVIEW_HOME", folder)
    socket = settings.postgres_socket()
    assert (socket == Path(folder) / "postgres") is near
    assert len(os.fsencode(socket / ".s.PGSQL.5432")) <= settings.SOCKET_PATH_BYTES
    assert sa.make_url(settings.postgres_address("mlflow")).query["host"] == str(socket)


def test_only_its_owner_reaches_it_and_only_by_its_socket(home):
    database.ensure(create=True)
    for folder in (home / "postgres", settings.postgres_data(), settings.postgres_socket()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    assert query("SELECT current_user") == [("longview",)]
    server = psutil.Process(pid_of_server())
    assert server.uids().effective != 0
    if server.uids().real == os.getuid():  # what another user runs shows no sockets
        assert [c for c in server.net_connections("inet") if c.status == "LISTEN"] == []
    assert query("SHOW listen_addresses") == [("",)]

    async def asynchronous() -> str:
        from sqlalchemy.ext.asyncio import create_async_engine

        engine = create_async_engine(
            settings.postgres_address("airflow").replace("psycopg2", "asyncpg")
        )  # as Airflow derives it
        async with engine.connect() as connection:
            user = (await connection.execute(sa.text("SELECT current_user"))).scalar_one()
        await engine.dispose()
        return user

    assert asyncio.run(asynchronous()) == "longview"
    if os.getuid() == 0:
        # Even one whom the folder let in is refused: the server asks the kernel who calls. The server's own user is no
        # exception.
        settings.postgres_socket().chmod(0o755)
        (settings.postgres_socket() / ".s.PGSQL.5432").chmod(0o777)
        psql = [
            database.program("psql"),
            "-h",
            str(settings.postgres_socket()),
            "-U",
            "longview",
            "-d",
            "mlflow",
            "-c",
            "SELECT 1",
        ]
        for user in ("nobody", "daemon"):
            refused = subprocess.run(
                ["setpriv", "--reuid", user, "--clear-groups", "--regid", "12345", *psql],
                capture_output=True,
                text=True,
                cwd="/",
            )
            assert refused.returncode != 0
            assert "Peer authentication failed" in refused.stderr


def test_what_was_committed_survives_kill_9_and_a_foreign_process_under_its_number(home):
    [(_, pid)] = database.ensure(create=True).items()
    assert database.ensure(create=True) == database.ensure(create=False)  # it runs: the same one
    query("CREATE TABLE saved AS SELECT generate_series(1, 1000) AS n")
    os.kill(pid, signal.SIGKILL)
    wait_for("end of the server", lambda: not services.alive(pid))
    foreign = subprocess.Popen(database._unprivileged("sleep", "900"))  # of the server's own user
    try:
        for file in (settings.postgres_data() / "postmaster.pid", settings.postgres_socket() / ".s.PGSQL.5432.lock"):
            lines = file.read_text().splitlines()
            with file.open("r+") as number:  # as after a new start of the machine
                number.truncate()
                number.write("\n".join([str(foreign.pid), *lines[1:]]) + "\n")
        assert database.server_pid(settings.postgres_data()) is None
        assert database.stop() is False
        [(_, again)] = database.ensure(create=False).items()
        assert again not in (pid, foreign.pid)
        assert query("SELECT count(*) FROM saved") == [(1000,)]
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_a_server_that_hangs_is_started_again_and_one_that_has_no_room_is_not(home, monkeypatch):
    """Stopped, it keeps the connections that there are at work, and lets every new one wait."""
    monkeypatch.setattr(supervisor, "ASK_EVERY_SECONDS", 1.0)
    monkeypatch.setattr(supervisor, "HUNG_AFTER_SECONDS", 2.0)
    monkeypatch.setitem(database.SERVER_SETTINGS, "max_connections", "4")
    [(_, pid)] = database.ensure(create=True).items()
    query("CREATE TABLE saved AS SELECT generate_series(1, 1000) AS n")
    watch, server = supervisor.DatabaseWatch(), psutil.Process(pid)
    watch.look(0.0)
    assert watch.signs.came  # whoever started it had its answer: of a hang right behind that it is known in time

    def look() -> int:
        """Ask for a sign of life, as the supervisor's thread does, and look; return the server's process."""
        watch.look(0.0)
        watch.signs.heard(watch.signs.pid, watch.signs.lives(), 2.0)
        watch.look(0.0)
        return pid_of_server()

    [checkpointer] = wait_for(
        "checkpointer", lambda: [child for child in server.children() if runs(child, "checkpointer")]
    )
    engine, connections = sa.create_engine(settings.postgres_address("airflow"), poolclass=sa.NullPool), []
    with pytest.raises(sa.exc.OperationalError, match="FATAL"):
        for _ in range(5):
            connections.append(engine.connect())
    assert look() == pid
    server.suspend()
    checkpointer.suspend()  # which then does not see the end of the server
    assert connections[0].execute(sa.text("SELECT 1")).scalar_one() == 1
    assert look() != pid
    for connection in connections:
        connection.invalidate()  # they ended with it
    assert not services.alive(checkpointer.pid)
    assert query("SELECT count(*) FROM saved") == [(1000,)]


def test_the_cluster_of_another_version_is_left_alone_and_the_way_out_is_said(home):
    database.ensure(create=True)
    database.stop()
    version = settings.postgres_data() / "PG_VERSION"
    version.write_text("17\n")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in settings.postgres_data().iterdir())
    for work in (lambda: database.ensure(create=True), lambda: database.back_up(keep=1)):
        with pytest.raises(
            InfraError,
            match=r"made by PostgreSQL 17, .* those of 18\n  remedy: make backup with the environment that made it",
        ):
            work()
    assert sorted((path.name, path.stat().st_mtime_ns) for path in settings.postgres_data().iterdir()) == before
    version.write_text("18\n")
    assert database.ensure(create=False)


def test_it_ends_clean_though_a_client_holds_on(home):
    [(server, pid)] = database.ensure(create=True).items()
    engine = sa.create_engine(settings.postgres_address("mlflow"))
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        assert database.stop() is True
        assert not services.alive(pid)
        with contextlib.suppress(sa.exc.DBAPIError):
            connection.invalidate()
    engine.dispose()
    assert "database system is shut down" in services.log_path(server).read_text().splitlines()[-1]
    assert database.stop() is False


def test_make_down_names_the_server_that_the_supervisors_end_took_along(home, monkeypatch, capsys):
    """Two end it: `make down`, and the process that waits for the supervisor's end, which may be first."""
    database.ensure(create=True)
    end_services = services.end_left_behind
    monkeypatch.setattr(services, "end_left_behind", lambda names: (database.stop(), end_services(names))[1])
    stack.down()
    assert capsys.readouterr().out.splitlines()[-1] == "stopped: postgres"
    stack.down()
    assert capsys.readouterr().out.splitlines()[-1] == "stopped: nothing was running"


def test_the_server_of_a_living_run_is_neither_taken_nor_stopped(home):
    code = (
        "import sys; from infra.local import database; print(list(database.ensure(create=True).values())[0],"
        " flush=True); sys.stdin.read()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, "infra.local.run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=settings.ROOT,
    )
    pid = next(int(line) for line in run.stdout if line.strip().isdigit())
    assert pid == pid_of_server()
    with pytest.raises(InfraError, match=rf"a `make run` \(process {run.pid}\) uses"):
        database.ensure(create=True)
    assert database.stop() is False
    run.kill()
    run.wait()
    assert list(database.ensure(create=False).values()) == [pid]  # nobody's now
    assert database.stop() is True


@pytest.mark.skipif(os.getuid() != 0, reason="what root without rights meets")
def test_a_root_that_may_nothing_is_told_so_and_one_of_a_container_is_served(home):
    make = "from infra.local import database; print(*database.ensure(create=True).values()); database.stop()"
    container = (
        "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,"
        "+net_bind_service,+net_raw,+sys_chroot,+mknod,+audit_write,+setfcap"
    )
    refused, served = (
        subprocess.run(
            ["setpriv", f"--bounding-set={rights}", "--inh-caps=-all", sys.executable, "-c", make],
            cwd=settings.ROOT,
            capture_output=True,
            text=True,
        )
        for rights in ("-all", container)
    )
    assert "cannot be given to nobody" in refused.stderr
    assert "LONGVIEW_DB=sqlite" in refused.stderr
    assert served.returncode == 0, served.stderr
    assert settings.has_postgres()


def test_a_creation_that_was_cut_off_begins_anew(home, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(database, "_import_mlflow", cut)
    with pytest.raises(KeyboardInterrupt):
        database.ensure(create=True)
    assert not settings.has_postgres()
    monkeypatch.undo()
    monkeypatch.setenv("LONGVIEW_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database.ensure(create=True)
    assert settings.has_postgres()
    assert query("SELECT 1") == [(1,)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tuple[Path, str, str]:
    """One of everything that the pipeline logs; returns the file, the run and the experiment."""
    import mlflow
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.set_tracking_uri(f"sqlite:///{file}")  # registering looks the model up there
    client = MlflowClient()
    experiment = client.create_experiment("shop", artifact_location="file:///tmp/none")
    run = client.create_run(experiment, tags={"pipeline.attempt": "a", "text": "é ' \" \n 漢"})
    client.log_batch(
        run.info.run_id,
        metrics=[Metric("auc", value, 1, step) for step, value in enumerate((0.5, float("nan"), float("inf"), 1e-300))],
    )
    client.log_param(run.info.run_id, "lr", "0.1")
    client.log_inputs(
        run.info.run_id,
        [
            DatasetInput(
                Dataset("events", "d1", "manifest", '{"uri": "x"}'), [InputTag("mlflow.data.context", "training")]
            )
        ],
    )
    model = client.create_logged_model(
        experiment, name="vql", source_run_id=run.info.run_id, tags={"k": "v"}, params={"p": "q"}
    )
    client.create_registered_model("vql_shop")
    client.create_model_version("vql_shop", f"models:/{model.model_id}", run.info.run_id, tags={"gate": "passed"})
    client.set_registered_model_alias("vql_shop", "champion", "1")
    mlflow.set_tracking_uri(None)
    return file, run.info.run_id, experiment


def read_store(address: str, run_id: str) -> dict:
    import mlflow
    from mlflow import MlflowClient

    mlflow.set_tracking_uri(address)  # the registry looks models up there
    client = MlflowClient()
    run = client.get_run(run_id).to_dictionary()
    history = [(metric.step, repr(metric.value)) for metric in client.get_metric_history(run_id, "auc")]
    version = client.get_model_version_by_alias("vql_shop", "champion")
    [model] = client.search_logged_models([run["info"]["experiment_id"]])
    mlflow.set_tracking_uri(None)
    return {
        "run": repr(run),
        "history": sorted(history),
        "version": (version.version, version.run_id, version.tags, version.source),
        "model": (model.model_id, model.tags, model.params),
        "experiments": sorted((e.experiment_id, e.name) for e in client.search_experiments()),
    }


def test_the_models_of_make_run_move_into_it_once(home, store):
    file, run_id, experiment = store
    home.mkdir(parents=True)
    shutil.copy(file, settings.mlflow_sqlite())
    before = read_store(settings.tracking_uri(), run_id)
    database.ensure(create=True)
    new = settings.tracking_uri()
    assert new.startswith("postgresql+psycopg2:///mlflow?")
    assert read_store(new, run_id) == before
    assert not settings.mlflow_sqlite().exists()
    assert read_store(f"sqlite:///{home}/mlflow.db.imported", run_id) == before
    # What comes next does not meet the numbers of what was copied.
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=new, registry_uri=new)
    assert int(client.create_experiment("next", artifact_location="file:///tmp/none")) > int(experiment)
    # An SQLite file that appears later is nobody's business: it is never copied over what is there.
    sqlite3.connect(settings.mlflow_sqlite()).close()
    database.stop()
    database.ensure(create=True)
    assert read_store(new, run_id)["history"] == before["history"]


def test_the_runs_of_make_run_move_into_it_with_their_times(home, monkeypatch):
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")  # SQLite has Airflow's times in UTC, whatever the machine's clock shows
    services.migrate(settings.environment())
    began = dtm.datetime(2026, 11, 27, 1, 2, 3, 4)
    engine = sa.create_engine(settings.airflow_database())
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO dag_run (id, dag_id, run_id, run_type, state, run_after, start_date, conf)"
                """ VALUES (7, 'd', 'r', 'manual', 'success', :began, :began, '{"dt": "2022-04-21"}')"""
            ),
            {"began": str(began)},
        )
    engine.dispose()
    database.ensure(create=True)
    found = query("SELECT run_id, state, start_date AT TIME ZONE 'UTC', conf FROM dag_run")
    assert found == [("r", "success", began, {"dt": "2022-04-21"})]
    assert query("SELECT nextval(pg_get_serial_sequence('dag_run', 'id')) > 7") == [(True,)]
    assert not settings.airflow_sqlite().exists()
    assert settings.airflow_sqlite().with_name("airflow.db.imported").exists()


def test_a_store_that_cannot_be_copied_whole_stays_where_it_is(home, store):
    file, run_id, _ = store
    home.mkdir(parents=True)
    shutil.copy(file, settings.mlflow_sqlite())
    address = settings.tracking_uri()
    before = read_store(address, run_id)
    with contextlib.closing(sqlite3.connect(settings.mlflow_sqlite())) as connection, connection:
        connection.execute(
            "UPDATE tags SET value = 'a' || char(0) || 'b' WHERE key = 'text'"
        )  # PostgreSQL has no such text
    with pytest.raises(InfraError, match=r"could not be copied(.|\n)*LONGVIEW_DB=sqlite"):
        database.ensure(create=True)
    assert not settings.has_postgres()
    assert settings.tracking_uri() == address
    assert read_store(address, run_id)["version"] == before["version"]


@pytest.fixture(params=["postgresql", "sqlite"])
def kind(request, home, monkeypatch):
    """A home with both databases of a kind, one table in each."""
    if request.param == "postgresql":
        database.ensure(create=True)
    else:
        settings.private(settings.airflow_home())
    write("CREATE TABLE days (dt TEXT)", "INSERT INTO days VALUES ('2022-04-20')")
    return request.param


def write(*statements: str) -> None:
    for address in (settings.airflow_database(), settings.tracking_uri()):
        engine = sa.create_engine(address)
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(sa.text(statement))
        engine.dispose()


def days() -> list[list[str]]:
    found = []
    for address in (settings.airflow_database(), settings.tracking_uri()):
        engine = sa.create_engine(address)
        with engine.connect() as connection:
            found.append([row[0] for row in connection.execute(sa.text("SELECT dt FROM days ORDER BY dt"))])
        engine.dispose()
    return found


def test_backup_and_restore_bring_back_what_was(kind, home):
    ran = database.server_pid(settings.postgres_data())
    saved = database.back_up(keep=3)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in saved.iterdir()} == {0o600}
    write("INSERT INTO days VALUES ('2022-04-21')", "CREATE TABLE later (n INTEGER)")
    database.restore(saved)
    assert days() == [["2022-04-20"]] * 2
    for address in (settings.airflow_database(), settings.tracking_uri()):
        assert not sa.inspect(sa.create_engine(address, poolclass=sa.NullPool)).has_table("later")
    assert database.server_pid(settings.postgres_data()) == ran  # it goes on where it ran
    # What was there before the restore is a backup, too; and a server that was off is off again.
    database.stop()
    [undo] = [path for path in database.backups().iterdir() if path != saved]
    database.restore(undo)
    assert database.server_pid(settings.postgres_data()) is None
    database.ensure(create=False)
    assert days() == [["2022-04-20", "2022-04-21"]] * 2


def test_the_newest_backups_are_kept_and_other_folders_left_alone(kind, home):
    for name in ("20200101T000000Z", "20210101T000000Z", "mine"):
        (database.backups() / name).mkdir(parents=True)
    newest = database.back_up(keep=2)
    assert {path.name for path in database.backups().iterdir()} == {"20210101T000000Z", "mine", newest.name}
    with pytest.raises(InfraError, match="KEEP=0"):
        database.back_up(keep=0)


def test_a_damaged_backup_replaces_nothing(kind, home):
    saved = database.back_up(keep=3)
    write("INSERT INTO days VALUES ('2022-04-21')")
    for file in saved.iterdir():
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(InfraError):
        database.restore(saved)
    assert days() == [["2022-04-20", "2022-04-21"]] * 2


def test_nothing_is_restored_below_a_service_that_runs(kind, home):
    saved = database.back_up(keep=3)
    process = services.start(
        services.Service("scheduler", ("-c", "import time; time.sleep(900)")), dict(os.environ), stays=True
    )
    try:
        with pytest.raises(InfraError, match=r"scheduler of this home runs(.|\n)*make down"):
            database.restore(saved)
    finally:
        process.kill()
        process.wait()


def test_a_backup_says_what_it_does_not_hold(home, monkeypatch, capsys):
    with pytest.raises(InfraError, match="has no database yet"):
        database.back_up(keep=1)
    assert [path for path in database.backups().iterdir()] == []
    settings.private(settings.airflow_home())
    write("CREATE TABLE days (dt TEXT)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert [file.name for file in database.back_up(keep=1).iterdir()] == ["airflow.db"]
    assert "not in the backup: mlflow, which MLFLOW_TRACKING_URI keeps elsewhere" in capsys.readouterr().out
    with pytest.raises(InfraError, match=r"holds no backup of SQLite"):
        database.restore(home)

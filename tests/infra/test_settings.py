"""The environment of every process, and what the start-up checks say."""

from __future__ import annotations

import datetime as dtm
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from etl.datasets.definition import built_in_names, dataset
from etl.stage.errors import StageError
from infra import airflow_api, settings
from infra.airflow_api import AirflowApi, InfraError
from infra.local import run, services, stack
from infra.local.supervisor import ASK_EVERY_SECONDS, HUNG_AFTER_SECONDS
from tests.waiting import wait_for


def test_environment_keeps_airflow_to_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    monkeypatch.setenv("LONGVIEW_AIRFLOW_PORT", "18181")
    monkeypatch.setenv("AIRFLOW__CORE__PLUGINS_FOLDER", "/elsewhere")
    monkeypatch.setenv("AIRFLOW__CORE__DAG_CONCURRENCY", "7")  # of another installation
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    env = settings.environment()
    assert env["AIRFLOW__API__HOST"] == "127.0.0.1"
    assert env["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://127.0.0.1:18181/execution/"
    assert env["AIRFLOW__STATE_STORE__CLEAR_ON_SUCCESS"] == "True"
    assert env["AIRFLOW__CORE__LOAD_EXAMPLES"] == "False"
    assert env["AIRFLOW_HOME"] == str(tmp_path / "airflow")
    assert env["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert env["PYSPARK_PYTHON"] == sys.executable
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(settings.ROOT)
    assert env["AIRFLOW__CORE__PLUGINS_FOLDER"] == str(settings.ROOT / "dags" / "plugins")
    assert "AIRFLOW__CORE__DAG_CONCURRENCY" not in env


@pytest.mark.parametrize(("given", "address"), [(None, ""), ("", ""), ("10.0.0.1:6379", "10.0.0.1:6379")])
def test_an_empty_ray_address_is_no_cluster(monkeypatch, given, address):
    """Many templates of containers and CI set a variable that nobody gives to nothing."""
    if given is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert settings.ray_address() == address


def test_settings_name_options_that_airflow_has():
    from airflow.configuration import conf

    known = {
        f"AIRFLOW__{s.upper()}__{o.upper()}"
        for s, section in conf.configuration_description.items()
        for o in section["options"]
    }
    assert [name for name in settings.environment() if name.startswith("AIRFLOW__") and name not in known] == []


def test_a_task_at_work_waits_for_longer_than_a_hang_takes_to_be_noticed():
    from airflow.configuration import conf

    longest = HUNG_AFTER_SECONDS + 2 * ASK_EVERY_SECONDS
    waits = float(settings.airflow_options()["WORKERS__EXECUTION_API_TIMEOUT"])
    assert waits * conf.getint("workers", "execution_api_retries") > longest
    assert conf.getint("scheduler", "task_instance_heartbeat_timeout") > longest  # else it is taken for lost


def test_secrets_are_made_once_and_private(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    first = settings.secret("key")
    assert first == settings.secret("key")
    assert len(first) == 64
    assert stat.S_IMODE((tmp_path / "secrets" / "key").stat().st_mode) == 0o600


def test_folders_with_secrets_are_their_owners_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    (tmp_path / "airflow").mkdir(mode=0o755)  # as an older version left it
    (tmp_path / "secrets").mkdir(mode=0o755)
    settings.environment()
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()} == {
        "airflow": "0o700",
        "secrets": "0o700",
    }
    for path in (tmp_path / "secrets").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


SECRETS = {
    "LONGVIEW_AIRFLOW_DB": "postgresql://airflow:hunter2@db/airflow",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://airflow:hunter2@db/airflow",
    "AIRFLOW__API_AUTH__JWT_SECRET": "hunter2",
    "_AIRFLOW_PROCESS_CONTEXT": "hunter2",
    "AIRFLOW_CONN_SHOP": "mysql://me:hunter2@shop/x",
    "GITHUB_TOKEN": "hunter2",
    "DB_PASSWORD": "hunter2",
    "PGPASSWORD": "hunter2",
}


def test_a_stage_gets_what_it_needs_and_no_secret_of_others(monkeypatch):
    needed = {
        "PATH": "/bin",
        "HOME": "/me",
        "JAVA_HOME": "/java",
        "SPARK_MASTER": "spark://h:7077",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "LC_ALL": "C",
        "MLFLOW_TRACKING_URI": "http://h",
        "LONGVIEW_WAREHOUSE": "/w",
        "OMP_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "0",
        "no_proxy": "h",
        "TMPDIR": "/t",
    }
    assert settings.stage_environment({**SECRETS, **needed}) == needed
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert "hunter2" not in str(settings.stage_environment())
    assert "hunter2" not in str(settings.stage_environment(settings.environment()))


@pytest.mark.parametrize(
    ("variable", "take"),
    [
        ("LONGVIEW_RAW", lambda: settings.raw("tmall")),
        ("LONGVIEW_WAREHOUSE", settings.warehouse),
        ("LONGVIEW_RUNS", settings.runs),
        ("LONGVIEW_REPORTS", settings.reports),
        ("MLFLOW_TRACKING_URI", settings.tracking_uri),
        ("RAW", run.choose_data),
    ],
)
def test_an_address_with_a_secret_is_refused_by_the_name_of_its_variable(monkeypatch, variable, take):
    monkeypatch.setenv(variable, "s3://AKIA:hunter2@bucket/x")
    with pytest.raises(StageError, match=variable) as caught:
        take()
    assert "hunter2" not in str(caught.value)


def test_a_login_is_asked_for_where_other_people_have_one(monkeypatch):
    def user(name, uid, shell):
        return SimpleNamespace(pw_name=name, pw_uid=uid, pw_shell=shell)

    system = [
        user("me", os.getuid(), "/bin/bash"),
        user("postgres", 101, "/bin/bash"),
        user("nobody", 65_534, "/usr/sbin/nologin"),
        user("ftp", 1_002, "/bin/false"),
    ]
    monkeypatch.delenv("LONGVIEW_LOGIN", raising=False)
    monkeypatch.setattr(settings.pwd, "getpwall", lambda: system)
    assert settings.login() is False
    assert settings.environment()["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS"] == "True"
    monkeypatch.setattr(settings.pwd, "getpwall", lambda: [*system, user("anna", 1_001, "/bin/zsh")])
    assert settings.other_logins() == ["anna"]
    assert settings.environment()["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS"] == "False"
    for text, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("LONGVIEW_LOGIN", text)
        assert settings.login() is expected
    monkeypatch.setenv("LONGVIEW_LOGIN", "yes")
    with pytest.raises(SystemExit, match="LONGVIEW_LOGIN='yes' is neither 0 nor 1"):
        settings.login()


def test_a_bad_port_is_named(monkeypatch):
    monkeypatch.setenv("LONGVIEW_AIRFLOW_PORT", "http")
    with pytest.raises(SystemExit, match="LONGVIEW_AIRFLOW_PORT='http' is not a port"):
        settings.airflow_port()


def test_a_port_in_use_is_named_with_its_owner_and_the_remedy():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(
            InfraError,
            match=rf"port {port} of 127.0.0.1 is in use by process {os.getpid()}(.|\n)*LONGVIEW_AIRFLOW_PORT=",
        ):
            services.check_port(port, "LONGVIEW_AIRFLOW_PORT")
    services.check_port(port, "LONGVIEW_AIRFLOW_PORT")


@pytest.mark.parametrize("stop", [False, True], ids=["killed", "stopped"])
def test_what_counts_as_ended_holds_no_port(stop):
    """A process of several threads is a zombie before the last of them gives back its memory and then its ports."""
    holder = (
        "import signal, socket, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "memory = b'x' * 200_000_000; listener = socket.create_server(('127.0.0.1', 0));"
        "[threading.Thread(target=signal.pause, daemon=True).start() for _ in range(16)];"
        "print(listener.getsockname()[1], flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    port = int(process.stdout.readline())
    if stop:
        services.stop([process.pid], seconds=0)
    else:
        process.kill()
        while services.alive(process.pid):
            pass
    services.check_port(port, "LONGVIEW_AIRFLOW_PORT")
    process.wait()


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    monkeypatch.setattr(services.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(InfraError, match="LONGVIEW_HOME"):
        services.check_room()


def test_run_chooses_simulated_data_without_raw(monkeypatch):
    for name in ("RAW", "DT", "DATASET"):
        monkeypatch.delenv(name, raising=False)
    choice = run.choose_data()
    assert (choice.definition.name, choice.own, choice.dt, choice.simulate) == (
        "kuairand_simulated",
        None,
        settings.SIMULATED_DT,
        True,
    )
    assert choice.raw.endswith("raw/kuairand_simulated")


def test_run_takes_raw_for_real_data_and_refuses_what_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("RAW", str(tmp_path))
    monkeypatch.setenv("DT", "2022-04-25")
    assert run.choose_data() == run.Choice(dataset("kuairand"), None, "2022-04-25", str(tmp_path), False)
    (tmp_path / "SIMULATED.json").write_text("{}")
    with pytest.raises(InfraError, match="written by the simulator"):
        run.choose_data()
    monkeypatch.setenv("RAW", str(tmp_path / "none"))
    with pytest.raises(InfraError, match="not a folder"):
        run.choose_data()


def test_dt_is_by_default_the_last_day_and_never_outside_the_data_set(monkeypatch):
    monkeypatch.setenv("DATASET", "tmall")
    choice = run.choose_data()
    assert (choice.dt, choice.simulate, choice.raw) == ("2014-11-12", False, settings.raw("tmall"))
    for dt in ("2014-05-11", "2014-11-12"):
        monkeypatch.setenv("DT", dt)
        assert run.choose_data().dt == dt
    for dt in ("2014-05-10", "2014-11-13", "2022-04-21"):
        monkeypatch.setenv("DT", dt)
        with pytest.raises(InfraError, match=rf"DT={dt} is outside the data set tmall: 2014-05-11 .. 2014-11-12"):
            run.choose_data()
    monkeypatch.setenv("DT", "yesterday")
    with pytest.raises(StageError, match="'yesterday' is not a day"):
        run.choose_data()


def test_an_unknown_data_set_is_told_with_those_there_are(monkeypatch):
    monkeypatch.setenv("DATASET", "kuairandom")
    with pytest.raises(StageError, match=rf"unknown data set 'kuairandom'(.|\n)*{', '.join(built_in_names())}"):
        run.choose_data()


def own_definition(folder: Path, name: str = "shop", file: str | None = None, **fields: str) -> Path:
    path = folder / (file or f"{name}.yaml")
    lines = {
        "extends": "kuairand",
        "name": name,
        "title": "My shop",
        "first_day": "2023-01-02",
        "last_day": "null",
        **fields,
    }
    path.write_text("\n".join(f"{field}: {value}" for field, value in lines.items()))
    return path


def test_an_own_definition_is_given_by_its_path(monkeypatch, tmp_path):
    path = own_definition(tmp_path)
    monkeypatch.setenv("RAW", str(tmp_path))
    monkeypatch.setenv("DT", "2023-02-01")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (str(path), "shop.yaml", "./shop.yaml", "~/shop.yaml"):
        monkeypatch.setenv("DATASET", given)
        choice = run.choose_data()
        assert (choice.definition.name, choice.own, choice.dt, choice.raw, choice.simulate) == (
            "shop",
            path,
            "2023-02-01",
            str(tmp_path),
            False,
        )
    monkeypatch.setenv("RAW", "")
    assert run.choose_data().raw == settings.raw("shop")
    # It has a first day and goes on until today: a later day would be refused by the first task of its run.
    today = dtm.datetime.now(dtm.UTC).date()
    monkeypatch.setenv("DT", str(today))
    assert run.choose_data().dt == str(today)
    for dt in ("2023-01-01", str(today + dtm.timedelta(days=2))):
        monkeypatch.setenv("DT", dt)
        with pytest.raises(InfraError, match=rf"DT={dt} is outside the data set shop: 2023-01-02 .. today"):
            run.choose_data()
    monkeypatch.setenv("DT", "")
    with pytest.raises(InfraError, match=r"DT has no default(.|\n)*DT=YYYY-MM-DD"):
        run.choose_data()


def test_a_wrong_own_definition_is_told_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("DT", "2023-02-01")
    for path, says in [
        (own_definition(tmp_path, "wrong", targets="{label: clicked}"), "targets.label: 'clicked' is not among"),
        (own_definition(tmp_path, "other", file="shop.yaml"), "has the name 'other'"),
        (tmp_path / "none.yaml", "cannot be read"),
    ]:
        monkeypatch.setenv("DATASET", str(path))
        with pytest.raises(StageError, match=says):
            run.choose_data()


@pytest.mark.parametrize("name", ["kuairand", "tmall", "kuairand_simulated"])
def test_an_own_definition_cannot_take_the_name_of_a_built_in_one(monkeypatch, tmp_path, name):
    monkeypatch.setenv("DATASET", str(own_definition(tmp_path, name, extends="kuairand_1k")))
    monkeypatch.setenv("DT", "2023-02-01")
    with pytest.raises(InfraError, match="has the name of a data set that comes with the project"):
        run.choose_data()
    assert not (settings.definitions() / f"{name}.yaml").exists()


@pytest.mark.parametrize("file", ["shop.yaml", "shop.yml"])
def test_an_own_definition_is_registered_where_its_dag_is_made_from(monkeypatch, tmp_path, file):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LONGVIEW_DEFINITIONS", raising=False)
    path = own_definition(tmp_path, file=file, run="{raw: /data/shop}")
    assert run.register(path, "/elsewhere") is True
    target = tmp_path / "home" / "definitions" / "shop.yaml"
    assert target.read_bytes() == path.read_bytes()  # it names its folder itself
    assert settings.environment()["LONGVIEW_DEFINITIONS"] == str(target.parent)
    # The same again changes nothing; a running Airflow need not be waited for.
    before = target.stat()
    assert run.register(path, "/elsewhere") is False
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    own_definition(tmp_path, file=file, title="Renamed")
    assert run.register(path, "/data") is True
    assert dataset(str(target)).title == "Renamed"
    assert [entry.name for entry in target.parent.iterdir()] == ["shop.yaml"]
    # Given where it already is, it may have been edited in place.
    assert run.register(target, "/data") is True
    assert dataset(str(target)).title == "Renamed"


def test_the_dag_of_an_own_data_set_remembers_the_folder_of_its_last_run(monkeypatch, tmp_path):
    # Else a backfill, or a scheduled run, of a data set that ran well would look into a folder that nobody named.
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LONGVIEW_DEFINITIONS", raising=False)
    path = own_definition(tmp_path)
    monkeypatch.setenv("DATASET", str(path))
    monkeypatch.setenv("DT", "2023-02-01")
    monkeypatch.delenv("RAW", raising=False)
    assert run.choose_data().raw == settings.raw("shop")
    for folder in ("/data/mine \u00e9", "s3://bucket/logs?region=eu-central-1"):
        assert run.register(path, folder) is True
        assert run.register(path, folder) is False
        assert dataset(str(tmp_path / "home" / "definitions" / "shop.yaml")).run.raw == folder
        assert run.choose_data().raw == folder  # the next one without RAW, too
    assert dataset(str(path)).run.raw is None  # the file of its owner stays as it is


@pytest.mark.parametrize(
    "given",
    [
        "name: shop # mine\ntitle: x\n",
        "name: shop\nrun:\n  # at six\n  hour: 6\n  workers: 3\n",
        "name: shop\nrun: {hour: 6}",
        "name: shop\nrun: {}\n",
        "{name: shop, title: x}",
        "  name: shop\n  title: x\n",
        "# a comment\n---\nname: shop\n",
        "run:\n    hour: 6\nname: shop\n",
    ],
)
def test_a_folder_is_written_into_a_definition_of_any_style(tmp_path, given):
    from etl.datasets.definition_yaml import read_yaml, with_raw

    before, after = tmp_path / "before.yaml", tmp_path / "after.yaml"
    before.write_text(given)
    after.write_text(with_raw(given, "/data/\U0001f600 x"))
    expected = read_yaml(before)
    expected["run"] = {**expected.get("run", {}), "raw": "/data/\U0001f600 x"}
    assert read_yaml(after) == expected
    assert after.read_text().count("#") == given.count("#")


def test_the_folder_of_raw_logs_is_one_for_each_data_set(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    assert settings.raw("tmall") == f"{tmp_path}/raw/tmall"
    monkeypatch.setenv("LONGVIEW_RAW", "s3://logs")
    assert (settings.raw("tmall"), settings.raw("kuairand")) == ("s3://logs/tmall", "s3://logs/kuairand")
    monkeypatch.setenv("LONGVIEW_RAW", "s3://logs/all?region=us-east-1&scheme=http")
    assert settings.raw("tmall") == "s3://logs/all/tmall?region=us-east-1&scheme=http"
    monkeypatch.setenv("LONGVIEW_RAW", "logs")  # the services and a shell work in different folders
    with pytest.raises(StageError, match=r"LONGVIEW_RAW: 'logs' is relative(.|\n)*absolute path"):
        settings.raw("tmall")


def test_waiting_for_a_dag_tells_its_own_files_error_and_no_others(monkeypatch):
    api = AirflowApi("http://nowhere")
    answers = {
        "/api/v2/importErrors": {
            "import_errors": [
                {"filename": "vql_daily_own.py", "timestamp": "2030-01-01T00:00:00Z", "stack_trace": "bad field"}
            ]
        }
    }
    parsed = {"is_stale": False, "last_parsed_time": "2030-01-01T00:00:00Z"}

    def call(method: str, path: str, body=None):
        if path in answers:
            return answers[path]
        absent = InfraError("no such DAG", "wait")
        absent.status = 404
        asked.append(path)
        if "own" in path or len(asked) < 3:
            raise absent
        return parsed

    asked: list[str] = []
    monkeypatch.setattr(api, "call", call)
    monkeypatch.setattr(airflow_api.time, "sleep", lambda _: None)
    assert api.wait_for_dag("vql_daily_kuairand", "vql_daily.py", 1.0) is parsed
    with pytest.raises(InfraError, match=r"vql_daily_own.py does not import:\nbad field"):
        api.wait_for_dag("vql_daily_own_shop", "vql_daily_own.py", 1.0)


def test_the_heartbeat_of_a_killed_scheduler_is_not_taken_for_that_of_the_next(monkeypatch):
    api = AirflowApi("http://nowhere")
    health = {
        "metadatabase": {"status": "healthy"},
        "scheduler": {"status": "healthy", "latest_scheduler_heartbeat": "2030-01-01T00:00:09Z"},
    }
    monkeypatch.setattr(api, "call", lambda *_, **__: health)
    killed = airflow_api._unix("2030-01-01T00:00:10Z")
    assert api.healthy("scheduler")
    assert not api.healthy("scheduler", since=killed)
    health["scheduler"]["latest_scheduler_heartbeat"] = "2030-01-01T00:00:10.5Z"
    assert api.healthy("scheduler", since=killed)
    assert not api.healthy("scheduler", "triggerer")


def test_a_service_that_ends_is_told_with_its_log(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    service = services.Service("broken", ("-c", "print('no database'); raise SystemExit(1)"))
    process = services.start(service, dict(os.environ))
    process.wait()
    with pytest.raises(InfraError, match=r"broken ended on its own(.|\n)*no database"):
        services.check_alive({service: process.pid})


def test_stop_ends_the_whole_family(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    note = tmp_path / "child"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0));"
        "c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(900)'], start_new_session=True);"
        f"open({str(note)!r}, 'w').write(str(c.pid)); time.sleep(900)"
    )
    process = services.start(services.Service("family", ("-c", code)), dict(os.environ))
    child = int(wait_for("child", lambda: note.exists() and note.read_text()))
    services.stop([process.pid])
    assert not services.alive(process.pid)
    wait_for("end of the child", lambda: not services.alive(child))


def left_by(monkeypatch, home: Path, stays: bool, service: str = "scheduler") -> int:
    """Start a service in a home and kill it.

    Return what it leaves: a grandchild in a session of its own that ignores SIGTERM.
    """
    monkeypatch.setenv("LONGVIEW_HOME", str(home))
    home.mkdir(parents=True, exist_ok=True)
    note = home / "child"
    child = (
        f"import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(note)!r} + '.tmp',"
        f" 'w').write(str(os.getpid()));os.rename({str(note)!r} + '.tmp', {str(note)!r}); time.sleep(900)"
    )
    between = (
        "import setproctitle, subprocess, sys; setproctitle.setproctitle('idle'); subprocess.Popen([sys.executable,"
        f" '-c', {child!r}], start_new_session=True)"
    )
    of = services.Service(
        service,
        ("-c", f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {between!r}]); time.sleep(900)"),
    )
    process = services.start(of, {**os.environ, "SPT_NOENV": "1"}, stays)
    services.write_pid(of, process.pid)
    left = int(wait_for("child", lambda: note.exists() and note.read_text()))
    process.kill()
    process.wait()
    note.unlink()
    return left


def test_what_a_killed_service_left_ends_with_make_down_and_nothing_else(monkeypatch, tmp_path):
    elsewhere = left_by(monkeypatch, tmp_path / "other", stays=True)
    foreign = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
    left = left_by(monkeypatch, tmp_path / "home", stays=True)
    try:
        stack.down()
        assert not services.alive(left)
        assert services.alive(elsewhere)
        assert services.alive(foreign.pid)
    finally:
        foreign.kill()
        foreign.wait()
        monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path / "other"))
        stack.down()
    assert not services.alive(elsewhere)


def test_make_up_ends_what_is_left_of_a_missing_service_and_keeps_those_that_run(monkeypatch, tmp_path):
    left = left_by(monkeypatch, tmp_path, stays=True)
    triggerer = left_by(monkeypatch, tmp_path, stays=True, service="triggerer")  # stands for one that runs
    assert services.end_left_behind(["scheduler"]) == [left]
    assert services.users_of_home() == ["triggerer"]
    assert services.end_left_behind(["triggerer"]) == [triggerer]


def test_the_next_run_ends_what_a_killed_run_left(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    run_of = (
        "import os, subprocess, sys; from infra.local import services;"
        "service = services.Service('scheduler', ('-c', 'import time; time.sleep(900)'));"
        "print(services.start(service, dict(os.environ)).pid, flush=True); sys.stdin.read()"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", run_of], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=settings.ROOT
        )
        for _ in range(2)
    ]
    killed, working = (int(process.stdout.readline()) for process in runs)
    runs[0].kill()
    # Whoever started it has not asked for its end: for a while after a kill, or for ever in a container.
    wait_for("its end", lambda: psutil.Process(runs[0].pid).status() == psutil.STATUS_ZOMBIE)
    assert services.end_left_behind() == [killed]
    runs[0].wait()
    assert services.alive(working)
    runs[1].kill()
    runs[1].wait()
    assert services.end_left_behind() == [working]


def test_a_reused_pid_is_not_taken_for_a_service(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    services.write_pid(services.API_SERVER, os.getpid())
    assert services.running_pid(services.API_SERVER) == os.getpid()
    services.pid_file(services.API_SERVER).write_text(f"{os.getpid()} 1.0")
    assert services.running_pid(services.API_SERVER) is None


def test_bootstrap_names_what_is_missing_and_how_to_mend_it(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "uname", "dirname", "sed", "head", "awk", "df", "cut", "cat", "tr", "sha256sum", "env", "git"):
        found = next(
            Path(folder) / name for folder in os.environ["PATH"].split(os.pathsep) if (Path(folder) / name).exists()
        )
        (tools / name).symlink_to(found)
    env = {"PATH": str(tools), "LONGVIEW_VENV": str(tmp_path / "venv"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [str(tools / "bash"), str(settings.ROOT / "infra" / "local" / "bootstrap.sh")],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: java was not found" in done.stderr
    assert "error: python3.11 was not found" in done.stderr
    assert "remedy: " in done.stderr
    assert "install" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_no_index_address_is_written_down():
    for name in ("infra/local/bootstrap.sh", "requirements.txt", "Makefile", "pyproject.toml"):
        text = (settings.ROOT / name).read_text()
        assert "pypi" not in text.lower(), name
        assert "--index-url" not in text, name


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("WORKERS", "x", "WORKERS=x is not a whole number"),
        ("CONFIG", "nope", "use one of: default, .*tiny"),
        ("ON_WARNING", "ask", "is not continue or approve"),
    ],
)
def test_wrong_options_are_told_before_anything_starts(monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    with pytest.raises(run.InfraError, match=says):
        run.choose_options()


def test_options_are_typed(monkeypatch):
    for name, value in (
        ("CONFIG", "tiny"),
        ("WORKERS", "1"),
        ("TARGET_DAYS", ""),
        ("LOOKBACK_DAYS", "9"),
        ("EVALUATION_DAYS", "2"),
        ("MAX_HISTORY", ""),
        ("ON_WARNING", "approve"),
    ):
        monkeypatch.setenv(name, value)
    assert run.choose_options() == {
        "config": "tiny",
        "workers": "1",
        "lookback_days": 9,
        "evaluation_days": 2,
        "on_warning": "approve",
    }


def test_a_relative_folder_is_of_who_gave_it_wherever_a_task_works(monkeypatch, tmp_path):
    names = "DEFINITIONS", "REPORTS", "RUNS", "WAREHOUSE"
    for name in names:
        monkeypatch.setenv(f"LONGVIEW_{name}", f"mine/{name}")
    monkeypatch.chdir(tmp_path)
    env = settings.environment()
    monkeypatch.chdir("/")
    assert {name: env[f"LONGVIEW_{name}"] for name in names} == {name: f"{tmp_path}/mine/{name}" for name in names}
    monkeypatch.setenv("LONGVIEW_RUNS", "s3://bucket/runs?region=us-east-1")
    assert settings.runs() == "s3://bucket/runs?region=us-east-1"

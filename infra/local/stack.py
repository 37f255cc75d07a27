"""`make up` and `make down`: Airflow and MLflow in the background, on the loopback, over the files of `var/`."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable

from infra import settings
from infra.airflow_api import HEALTHY_WITHIN_SECONDS, AirflowApi, InfraError
from infra.local import database, services
from infra.local.services import API_SERVER, DAG_PROCESSOR, SCHEDULER, TRIGGERER, Service
from infra.local.supervisor import SUPERVISOR


def stack() -> list[Service]:
    return [API_SERVER, SCHEDULER, DAG_PROCESSOR, TRIGGERER, services.mlflow_server()]


def up() -> None:
    """Start what does not run yet, wait until all is healthy and say where it is."""
    for warning in services.check_room():
        print(f"warning: {warning}", flush=True)
    supervisor = services.running_pid(SUPERVISOR)
    if supervisor is None:
        services.end_left_behind(service.name for service in (SUPERVISOR, *stack()))
        services.check_port(settings.airflow_port(), "LONGVIEW_AIRFLOW_PORT")
        services.check_port(settings.mlflow_port(), "LONGVIEW_MLFLOW_PORT")
    else:
        os.kill(supervisor, signal.SIGHUP)
    base = database.ensure(create=supervisor is None)  # what runs over SQLite goes on over it, until `make down`
    before = _pids()
    if supervisor is None:
        env = settings.environment()
        print("preparing Airflow's database ...", flush=True)
        services.migrate(env)
        supervisor = services.start(SUPERVISOR, env, stays=True).pid
        services.write_pid(SUPERVISOR, supervisor)
    base[SUPERVISOR] = supervisor
    wait_until(lambda: len(_pids()) == len(stack()), base, "the services do not start", SUPERVISOR)
    for service, pid in (now := _pids()).items():
        if before.get(service) != pid:
            print(f"started {service.name} (process {pid}, log {services.log_path(service)})", flush=True)
    processes = base | now
    api = AirflowApi()
    since = max(services.started(pid) or 0.0 for pid in now.values())
    services.wait_healthy(api, processes, "scheduler", "dag_processor", "triggerer", since=since)
    api.set_pools()
    mlflow_answers = functools.partial(services.http_ok, settings.mlflow_url() + "/health")
    wait_until(mlflow_answers, processes, "the MLflow server does not answer", services.mlflow_server())
    print(f"""
Airflow    {settings.airflow_url()}/dags   ({_who_may()})
MLflow     {settings.mlflow_url()}   (no login: every user of this machine may read and change it)
reports    {settings.reports() / "index.html"}   (every partition, with its Data Docs)
database   {settings.postgres_data() if base else "SQLite, or what was given"}   (make backup)
logs       {settings.airflow_home() / "logs"}
stop       make down""")


def _pids() -> dict[Service, int]:
    return {service: pid for service in stack() if (pid := services.running_pid(service))}


def wait_until(there: Callable[[], bool], processes: dict[Service, int], otherwise: str, log_of: Service) -> None:
    """Wait for something that processes are to do.

    Raises:
        InfraError: one of them ended, or it takes too long: `otherwise`.
    """
    deadline = time.monotonic() + HEALTHY_WITHIN_SECONDS
    while not there():
        services.check_alive(processes)
        if time.monotonic() > deadline:
            raise InfraError(otherwise, f"see {services.log_path(log_of)}")
        time.sleep(0.5)


def _who_may() -> str:
    if settings.login():
        return f"user {settings.AIRFLOW_USER}, password in {settings.passwords_file()}"
    return (
        "no login: it listens on 127.0.0.1 only, and every user of this machine is its administrator; LONGVIEW_LOGIN=1"
        " asks for a password"
    )


def down() -> None:
    """Stop everything that `up` started, with all that is below it; the database last."""
    running, had_database = _pids(), database.free_server() is not None
    if supervisor := services.running_pid(SUPERVISOR):
        running[SUPERVISOR] = supervisor
        services.stop([supervisor], seconds=2 * services.STOP_SECONDS)  # it gives the services half of that
    left = services.end_left_behind(service.name for service in (SUPERVISOR, *stack()))
    stopped = [service.name for service in running] + [f"{len(left)} processes that a killed one left"] * bool(
        left and not running
    )
    if database.stop() or had_database:  # what watches over the supervisor's end may have been first
        stopped.append(services.POSTGRES)
    for service in (SUPERVISOR, *stack()):
        services.pid_file(service).unlink(missing_ok=True)
    print(f"stopped: {', '.join(stopped) or 'nothing was running'}")


def main() -> int:
    if sys.argv[1:] not in (["up"], ["down"]):
        print("usage: python -m infra.local.stack up|down", file=sys.stderr)
        return 2
    return services.exit_code(up if sys.argv[1] == "up" else down)


if __name__ == "__main__":
    sys.exit(main())

"""`make up` and `make down`: Airflow and MLflow in the background, on the loopback, over the files of `var/`."""

from __future__ import annotations

import sys
import time

from infra import settings
from infra.airflow_api import HEALTHY_WITHIN_SECONDS, AirflowApi, InfraError
from infra.local import database, services
from infra.local.services import API_SERVER, DAG_PROCESSOR, SCHEDULER, TRIGGERER, Service


def stack() -> list[Service]:
    return [API_SERVER, SCHEDULER, DAG_PROCESSOR, TRIGGERER, services.mlflow_server()]


def up() -> None:
    """Start what does not run yet, wait until all is healthy and say where it is."""
    for warning in services.check_room():
        print(f"warning: {warning}", flush=True)
    running = {service.name: pid for service in stack() if (pid := services.running_pid(service))}
    services.end_left_behind(service.name for service in stack() if service.name not in running)
    for service in stack():
        if service is API_SERVER and service.name not in running:
            services.check_port(settings.airflow_port(), "LONGVIEW_AIRFLOW_PORT")
        if service.name == "mlflow" and service.name not in running:
            services.check_port(settings.mlflow_port(), "LONGVIEW_MLFLOW_PORT")
    base = database.ensure(create=not running)  # what runs over SQLite goes on over it, until `make down`
    processes = {service: running.get(service.name, 0) for service in stack()}
    env = settings.environment()
    started = 0.0
    if not all(processes.values()):
        started = time.time()
        print("preparing Airflow's database ...", flush=True)
        services.migrate(env)
    for service in [service for service, pid in processes.items() if not pid]:
        processes[service] = services.start(service, settings.stage_environment(env) if service.name == "mlflow" else env, stays=True).pid
        services.write_pid(service, processes[service])
        print(f"started {service.name} (process {processes[service]}, log {services.log_path(service)})", flush=True)
    api = AirflowApi()
    services.wait_healthy(api, base | processes, "scheduler", "dag_processor", "triggerer", since=started)
    api.set_pools()
    deadline = time.monotonic() + HEALTHY_WITHIN_SECONDS
    while not services.http_ok(settings.mlflow_url() + "/health"):
        services.check_alive(base | processes)
        if time.monotonic() > deadline:
            raise InfraError("the MLflow server does not answer", f"see {services.log_path(services.mlflow_server())}")
        time.sleep(0.5)
    print(f"""
Airflow    {settings.airflow_url()}/dags   ({_who_may()})
MLflow     {settings.mlflow_url()}   (no login: every user of this machine may read and change it)
reports    {settings.reports() / "index.html"}   (every partition, with its Data Docs)
database   {settings.postgres_data() if base else "SQLite, or what was given"}   (make backup)
logs       {settings.airflow_home() / "logs"}
stop       make down""")


def _who_may() -> str:
    if settings.login():
        return f"user {settings.AIRFLOW_USER}, password in {settings.passwords_file()}"
    return "no login: it listens on 127.0.0.1 only, and every user of this machine is its administrator; LONGVIEW_LOGIN=1 asks for a password"


def down() -> None:
    """Stop everything that `up` started, with all that is below it; the database last."""
    running = {service: pid for service in stack() if (pid := services.running_pid(service))}
    services.stop(running.values())
    left = services.end_left_behind(service.name for service in stack())
    stopped = [service.name for service in running] + [f"{len(left)} processes that a killed one left"] * bool(left and not running)
    if database.stop():
        stopped.append(services.POSTGRES)
    for service in stack():
        services.pid_file(service).unlink(missing_ok=True)
    print(f"stopped: {', '.join(stopped) or 'nothing was running'}")


def main() -> int:
    if sys.argv[1:] not in (["up"], ["down"]):
        print("usage: python -m infra.local.stack up|down", file=sys.stderr)
        return 2
    return services.exit_code(up if sys.argv[1] == "up" else down)


if __name__ == "__main__":
    sys.exit(main())

"""`make run`: one partition through Airflow's real scheduler, shown live, with a table at the end.

RAW=folder DT=YYYY-MM-DD DATASET=kuairand choose the data; without RAW the simulator writes a small data set first.
"""

from __future__ import annotations

import contextlib
import datetime as dtm
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.datasets.definition import SIMULATED_MARKER, DatasetDefinition, built_in_names, dataset, definition_name
from etl.datasets.definition_yaml import with_raw
from etl.stage.errors import StageError
from etl.stage.identity import report_page
from etl.stage.uris import without_secrets
from etl.warehouse.partitions import parse_dt
from infra import settings
from infra.airflow_api import HEALTHY_WITHIN_SECONDS, AirflowApi, InfraError
from infra.local import database, services
from infra.local.services import API_SERVER, DAG_PROCESSOR, SCHEDULER, Service
from infra.local.supervisor import Watched
from infra.options import OPTIONS

if TYPE_CHECKING:
    from etl.stage.folder import Folder

WAITING = "awaiting_input"
# Of a run: its day and its attempt, which its first task has handed on.
STARTED_AS = f"taskInstances/{settings.START}/xcomEntries/return_value?deserialize=true"
FINISHED = ("success", "failed", "skipped", "upstream_failed", "removed")
LOG_LINES = 30
MEMORY_EVERY_SECONDS = 6
QUIET_SECONDS = 20
GIVE_UP_AT_SECONDS = 10.0  # before a next start: the service has ended five times


def say(message: str) -> None:
    print(time.strftime("%H:%M:%S"), message, flush=True)


@dataclass(frozen=True)
class Choice:
    """What a run is about.

    Attributes:
        definition: of the data set; `own` is its file when it is the user's.
        simulate: the simulator has to write the raw logs first.
    """

    definition: DatasetDefinition
    own: Path | None
    dt: str
    raw: str
    simulate: bool


def choose_data() -> Choice:
    """Return what RAW, DT and DATASET choose; DT defaults to the data set's last day.

    Raises:
        InfraError, StageError: they do not fit together; says what to give.
    """
    raw, wanted = os.environ.get("RAW") or "", os.environ.get("DATASET") or ""
    definition = dataset(wanted or ("kuairand" if raw else "kuairand_simulated"))
    own = Path(wanted).expanduser().absolute() if definition_name(wanted) != wanted else None
    if own is not None and definition.name in built_in_names():
        raise InfraError(
            f"{own} has the name of a data set that comes with the project",
            "give it another name (name: and file name)",
        )
    last = (
        settings.SIMULATED_DT
        if definition.simulated or definition.last_day is None
        else definition.last_day.isoformat()
    )
    if not os.environ.get("DT") and definition.last_day is None:
        raise InfraError(f"the data set {definition.name} goes on, so DT has no default", "give DT=YYYY-MM-DD")
    dt = parse_dt(os.environ.get("DT") or last)
    if outside := definition.outside(dt, dtm.datetime.now(dtm.UTC).date().isoformat()):
        raise InfraError(f"DT={dt} {outside}", "choose a day in between")
    if not raw:
        return Choice(definition, own, dt, _remembered_raw(definition, own), definition.simulated)
    without_secrets(raw, "RAW")
    if "://" not in raw:
        folder = Path(raw).expanduser().absolute()
        if not folder.is_dir():
            raise InfraError(
                f"RAW={raw} is not a folder",
                "give the folder that holds the raw logs, for example RAW=/data/KuaiRand-1K/data",
            )
        if (folder / SIMULATED_MARKER).exists() and not definition.simulated:
            raise InfraError(
                f"{folder} was written by the simulator ({SIMULATED_MARKER})", "give DATASET=kuairand_simulated"
            )
        raw = str(folder)
    return Choice(definition, own, dt, raw, False)


def _remembered_raw(definition: DatasetDefinition, own: Path | None) -> str:
    """Return the folder that the definition names, or its copy that an earlier `make run` of it wrote, or the default
    one.
    """
    copy = _copy_of(own) if own is not None else None
    remembered = dataset(str(copy)).run.raw if copy is not None and copy.exists() else None
    return definition.run.raw or remembered or settings.raw(definition.name)


def _copy_of(own: Path) -> Path:
    return settings.definitions() / f"{own.stem}.yaml"


def register(own: Path, raw: str) -> bool:
    """Put an own definition where its DAG is made from; return whether a running Airflow may know an older one.

    Args:
        raw: folder of the raw logs: the copy remembers it for the DAG's other runs, where the definition names none.
    """
    target = _copy_of(own)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = own.read_bytes()
    if dataset(str(own)).run.raw is None:
        text = with_raw(text.decode("utf-8-sig"), raw).encode()
    if target.exists() and target.read_bytes() == text:
        return target.samefile(own)  # edited in place
    temporary = target.with_suffix(".tmp")
    temporary.write_bytes(text)
    os.replace(temporary, target)
    return True


def choose_options() -> dict[str, str | int]:
    """Return the run's other options, from the variables that `infra.options` names.

    Raises:
        InfraError: a value is not allowed; says what is.
    """
    chosen: dict[str, str | int] = {}
    for option in OPTIONS.values():
        text = os.environ.get(option.variable)
        if not text or option.name in ("dt", "raw"):  # `choose_data` has these
            continue
        try:
            chosen[option.name] = option.parsed(text)
        except ValueError as error:
            raise InfraError(str(error), "correct it; `make help` and docs/operations.md list the options") from None
    known = settings.training_configs()
    if chosen.get("config", known[0]) not in known:
        raise InfraError(f"unknown training configuration CONFIG={chosen['config']}", f"use one of: {', '.join(known)}")
    return chosen


class TaskLog:
    """The log file of one try of a task, read line by line as it grows."""

    def __init__(self, dag_id: str, run_id: str, task: dict[str, Any]) -> None:
        self.path = (
            settings.airflow_home()
            / "logs"
            / f"dag_id={dag_id}"
            / f"run_id={run_id}"
            / f"task_id={task['task_id']}"
            / f"attempt={task['try_number']}.log"
        )

    def progress(self) -> list[str]:
        """Return the lines that the stage itself logged (`etl.stage.commands.log` puts the time first), not its
        libraries' noise.
        """
        return [line for line in self.lines() if re.match(r"\d\d:\d\d:\d\d ", line)]

    def lines(self) -> list[str]:
        """Return the messages so far; each line of the file is one JSON object."""
        try:
            text = self.path.read_text(errors="replace")
        except OSError:
            return []
        messages = []
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                messages.append(str(entry.get("event", line)))
                messages += [f"{e.get('exc_type')}: {e.get('exc_value')}" for e in entry.get("error_detail") or []]
            except (ValueError, AttributeError):
                messages.append(line)
        return messages


class Run:
    """One DAG run: triggered, followed to its end, and shown."""

    def __init__(self, api: AirflowApi, dataset: str, dt: str, raw: str, options: dict[str, str | int]) -> None:
        self.api, self.dataset, self.dt, self.raw, self.options = api, dataset, dt, raw, options
        self.run_id = f"run__{dataset}__{dt}__{dtm.datetime.now(dtm.UTC):%Y%m%dT%H%M%S}"
        self.attempt = ""  # its first task names it
        self.dag_id = settings.dag_id(dataset)
        self.path = f"/api/v2/dags/{self.dag_id}/dagRuns/{self.run_id}"
        self.tasks: list[dict[str, Any]] = []
        self.triggered = self.was_paused = False
        self.peak_gb = 0.0

    def trigger(self) -> None:
        conf = {"dt": self.dt, "raw": self.raw, **self.options}
        self.was_paused = bool(self.api.call("GET", f"/api/v2/dags/{self.dag_id}")["is_paused"])
        self.api.change(
            "POST",
            f"/api/v2/dags/{self.dag_id}/dagRuns",
            {"dag_run_id": self.run_id, "logical_date": None, "conf": conf},
        )
        self.triggered = True
        self.api.change("PATCH", f"/api/v2/dags/{self.dag_id}?update_mask=is_paused", {"is_paused": False})

    def follow(self, keep: Callable[[], None], measure: bool) -> str:
        """Print what happens until the run ends; return its final state.

        Args:
            keep: keeps Airflow at work, or raises; called often.
            measure: the memory of this process and all below it.
        """
        shown: dict[str, tuple[str, int]] = {}
        last_line, quiet_since, next_memory = "", time.monotonic(), 0.0
        while True:
            if measure and time.monotonic() >= next_memory:
                self.peak_gb = max(self.peak_gb, services.memory_gb([os.getpid()]))
                next_memory = time.monotonic() + MEMORY_EVERY_SECONDS
            state = self._asked(self.path, keep)["state"]
            self.tasks = sorted(
                self._asked(f"{self.path}/taskInstances", keep)["task_instances"],
                key=lambda task: task["start_date"] or "9",
            )
            for task in self.tasks:
                now = (task["state"] or "", task["try_number"])
                if (
                    task["state"] in ("running", "up_for_retry", WAITING, *FINISHED)
                    and shown.get(task["task_id"]) != now
                ):
                    shown[task["task_id"]] = now
                    say(f"{task['task_id']:<30} {task['state']}{_seconds(task)}")
                    if task["state"] == WAITING:
                        say(f"{'':<30}   a gate warned: approve or reject at {self._page(task)}/required_actions")
                    last_line, quiet_since = "", time.monotonic()
            for task in self.tasks:
                if task["state"] == "running" and (lines := TaskLog(self.dag_id, self.run_id, task).progress()):
                    if lines[-1] != last_line and time.monotonic() - quiet_since > QUIET_SECONDS:
                        last_line, quiet_since = lines[-1], time.monotonic()
                        say(f"{'':<30}   {lines[-1][9:][:150]}")
            if not self.attempt and any(
                task["task_id"] == settings.START and task["state"] == "success" for task in self.tasks
            ):
                self.attempt = self._asked(f"{self.path}/{STARTED_AS}", keep)["value"]["attempt"]
            if state in ("success", "failed"):
                return state
            time.sleep(1)

    def _asked(self, path: str, keep: Callable[[], None]) -> Any:
        """Ask Airflow, and again while its server or its database is away: they may be on their way back."""
        deadline = time.monotonic() + HEALTHY_WITHIN_SECONDS
        while True:
            keep()
            try:
                return self.api.call("GET", path)
            except (OSError, InfraError) as error:
                if getattr(error, "status", 500) < 500 or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def _report(self) -> Path | str:
        return (
            report_page(settings.reports(), self.dataset, self.dt, self.attempt)
            if self.attempt
            else "none, as the run has no attempt"
        )

    def _page(self, task: dict[str, Any]) -> str:
        return f"{settings.airflow_url()}/dags/{self.dag_id}/runs/{self.run_id}/tasks/{task['task_id']}"

    def abandon(self) -> None:
        """End a run that nobody follows any more; it would hold back the next one. A DAG that slept sleeps again."""
        if self.triggered:
            with contextlib.suppress(Exception):
                if self.was_paused and not self._others():
                    self.api.change("PATCH", f"/api/v2/dags/{self.dag_id}?update_mask=is_paused", {"is_paused": True})
            with contextlib.suppress(Exception):
                if self.api.call("GET", self.path)["state"] not in ("success", "failed"):
                    self.api.change("PATCH", f"{self.path}?update_mask=state", {"state": "failed"})

    def _others(self) -> bool:
        """Whether the DAG has runs of other people, which would stand still in a DAG that sleeps."""
        active = self.api.call("GET", f"/api/v2/dags/{self.dag_id}/dagRuns?state=running&state=queued&limit=2")[
            "dag_runs"
        ]
        return any(run["dag_run_id"] != self.run_id for run in active)

    def tell_failure(self) -> None:
        for task in (task for task in self.tasks if task["state"] == "failed"):
            log = TaskLog(self.dag_id, self.run_id, task)
            print(f"\nFAILED  {task['task_id']}  (try {task['try_number']}); the end of {log.path}:\n")
            print("\n".join(f"    {line}" for line in log.lines()[-LOG_LINES:]))
        print(f"\nreport of the partition: {self._report()}")
        print(
            f"error: the run {self.run_id} failed\n  remedy: correct what the log says, then repeat `make run`;"
            " published tables stay"
        )

    def tell_success(self) -> None:
        if skipped := [task["task_id"] for task in self.tasks if task["state"] == "skipped"]:
            print(f"\nrejected: a person refused to train on this partition; not run: {', '.join(skipped)}")
            print(f"  report         {self._report()}")
            return
        from etl.stage.folder import Folder  # with Arrow, which the start of a run does not wait for

        folder = Folder(settings.runs(), "LONGVIEW_RUNS").below(self.attempt)
        evaluation, registration = _json(folder, "evaluation.json"), _json(folder, "registration.json")
        print(
            f"\n{self.dataset}  dt={self.dt}  attempt {self.attempt}"
            + ("   SIMULATED DATA" if evaluation.get("simulated") else "")
        )
        if rows := evaluation.get("rows"):
            total = sum(int(rows.get(name) or 0) for name in ("events", "duplicates", "quarantined"))
            print(
                f"raw rows {total:,} = {_count(rows, 'events')} events + {_count(rows, 'duplicates')} duplicates "
                f"+ {_count(rows, 'quarantined')} quarantined"
            )
        if models := evaluation.get("models"):
            print(f"\n{'model':<28} {'AUC':>7} {'95 % interval':>17} {'GAUC':>7} {'log loss':>9}")
            for model in models:
                print(
                    f"{model.get('name', '?'):<28} {_number(model.get('auc'))} "
                    f"{_number(model.get('auc_low')) + ' -' + _number(model.get('auc_high')):>17} "
                    f"{_number(model.get('gauc'))} {_number(model.get('logloss')):>9}"
                )
        if evaluation.get("best_auc") is not None:
            print(f"the best AUC that this simulation allows: {evaluation['best_auc']:.4f}")
        print(f"\n{'task':<30} {'seconds':>8}")
        for task in self.tasks:
            print(f"{task['task_id']:<30} {task.get('duration') or 0:>8.1f}")
        if self.peak_gb:
            print(f"peak memory of all processes: {self.peak_gb:.1f} GB")
        print("\nwhere to look next")
        if registration:
            aliases = ", ".join(registration.get("aliases") or []) or "none"
            print(f"  MLflow run     {registration.get('run_id')}  {registration.get('run_url') or ''}")
            print(
                f"  model          {registration.get('model_name')} version {registration.get('version')}, aliases:"
                f" {aliases}"
            )
        print(f"  report         {self._report()}")
        print(f"  all partitions {settings.reports() / 'index.html'}")
        print(f"  checkpoints    {folder.address}")
        print("  Airflow and MLflow in the browser: make up")


def _json(folder: Folder, name: str) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(folder.read_text(name) or "{}")
    return {}


def _number(value: float | None) -> str:
    return f"{value:>7.4f}" if value is not None else f"{'-':>7}"


def _count(rows: dict[str, Any], name: str) -> str:
    return f"{int(rows.get(name) or 0):,}"


def _seconds(task: dict[str, Any]) -> str:
    return f"  {task['duration']:.0f} s" if task["state"] in FINISHED and task.get("duration") else ""


def sleeping_schedule(api: AirflowApi, definition: DatasetDefinition) -> bool:
    """Whether un-pausing the data set's DAG would start scheduled runs."""
    dag = api.call("GET", f"/api/v2/dags/{settings.dag_id(definition.name)}")
    return bool(dag["is_paused"]) and dag["next_dagrun_run_after"] is not None


def make_way(api: AirflowApi, choice: Choice, shared: bool) -> None:
    """End runs of earlier `make run` calls that were killed, and say which runs go first: only one is active at a time.

    Args:
        shared: with the Airflow of `make up`, where what a killed call has left goes on, as does that of another one.
    """
    runs = f"/api/v2/dags/{settings.dag_id(choice.definition.name)}/dagRuns"
    for run in api.call("GET", f"{runs}?state=running&state=queued&limit=100")["dag_runs"]:
        if run["dag_run_id"].startswith("run__") and not shared:
            say(f"ending the abandoned run {run['dag_run_id']}")
            path = f"{runs}/{run['dag_run_id']}"
            api.change("PATCH", f"{path}?update_mask=state", {"state": "failed"})
            _end_in_mlflow(api, path, str(_copy_of(choice.own)) if choice.own else choice.definition.name)
        else:
            say(f"note: the run {run['dag_run_id']} is still {run['state']}; it goes first")


def _end_in_mlflow(api: AirflowApi, path: str, dataset: str) -> None:
    """Begin to end the MLflow run of an abandoned run: Airflow calls nothing of one that is marked as failed."""
    with contextlib.suppress(InfraError):  # it was killed before its first task had named an attempt
        about = api.call("GET", f"{path}/{STARTED_AS}")["value"]
        words = ["--dataset", dataset, "--warehouse", settings.warehouse(), "--dt", about["dt"]]
        words += ["--attempt", about["attempt"], "--status", "KILLED"]
        env = settings.stage_environment(settings.environment())
        subprocess.Popen([sys.executable, "-m", "training.ended", *words], cwd=settings.ROOT, env=env)


def keep_at_work(watched: Iterable[Watched], children: dict[Service, int]) -> None:
    """Start again what has ended on its own; note its new process.

    Raises:
        InfraError: it ends again and again, with the end of its log; or the database has ended.
    """
    for one in watched:
        one.look(time.monotonic())
        if one.process is not None:
            children[one.service] = one.process.pid
        elif one.wait_seconds > GIVE_UP_AT_SECONDS:
            services.check_alive({one.service: children[one.service]})
    services.check_alive({service: pid for service, pid in children.items() if service.name == services.POSTGRES})


def run_partition(children: dict[Service, int]) -> int:
    """Run what RAW, DT, DATASET and the options choose; return 0, or 1 when the run failed.

    Args:
        children: takes every process that is started, for whoever ends them.
    """
    began = time.monotonic()
    choice, options = choose_data(), choose_options()
    news = choice.own is not None and register(choice.own, choice.raw)
    for warning in services.check_room():
        say(f"warning: {warning}")
    api = AirflowApi()
    shared = services.running_pid(API_SERVER) is not None and api.healthy("scheduler", "dag_processor")
    if not shared:
        services.end_left_behind()
        services.check_port(settings.airflow_port(), "LONGVIEW_AIRFLOW_PORT")
    airflow, watched = {} if shared else database.ensure(create=False), []
    children.update(airflow)
    # Of an Airflow of its own: one run, and no other by itself.
    env = settings.environment() | {"LONGVIEW_SCHEDULE": "0"}
    simulator = _start_simulator(choice, env, children)
    started = time.time()
    if shared:
        say(f"using the Airflow of `make up` at {settings.airflow_url()}")
        started = started if news else 0.0  # what was parsed before is the DAG of the old definition
    else:
        say("starting Airflow (api-server, scheduler, dag-processor) ...")
        services.migrate(env)
        for service in (API_SERVER, DAG_PROCESSOR, SCHEDULER):
            process = services.start(service, env)
            airflow[service] = children[service] = process.pid
            watched.append(Watched(service, env, stays=False, process=process, started=time.monotonic()))
    if simulator is not None and simulator.wait() != 0:
        raise InfraError(f"the simulator ended with code {simulator.returncode}", "read what it says above")
    services.wait_healthy(api, airflow, "scheduler", "dag_processor", since=0.0 if shared else started)
    _prepare_dag(api, choice, airflow, shared, started)
    run = Run(api, choice.definition.name, choice.dt, choice.raw, options)
    try:
        run.trigger()
        say(f"Airflow is up after {time.monotonic() - began:.0f} s; triggered {run.run_id}")
        state = run.follow(functools.partial(keep_at_work, watched, children), measure=not shared)
    finally:
        run.abandon()
    if state != "success":
        run.tell_failure()
        return 1
    run.tell_success()
    print(f"\ndone in {time.monotonic() - began:.0f} s")
    return 0


def _start_simulator(choice: Choice, env: dict[str, str], children: dict[Service, int]) -> subprocess.Popen | None:
    """Start to write simulated logs, where the choice is for them; else look that there are logs."""
    raw = choice.raw
    if choice.simulate:
        say(f"simulating raw logs under {raw} (kept when they are there already)")
        command = [sys.executable, "-m", "etl.datasets.simulate", "--out", raw]
        env = settings.stage_environment(env)
        simulator = subprocess.Popen(command, env=env, cwd=settings.ROOT, start_new_session=True)
        children[Service("simulator", ())] = simulator.pid
        return simulator
    if "://" not in raw and not Path(raw).is_dir():
        remedy = "give RAW=folder, fetch them with make data, or try DATASET=kuairand_simulated"
        raise InfraError(f"no raw logs under {raw}", remedy)
    return None


def _prepare_dag(
    api: AirflowApi, choice: Choice, airflow: dict[Service, int], shared: bool, parsed_since: float
) -> None:
    """Wait for the DAG, and see that nothing but this run starts with it."""
    dag_id = settings.dag_id(choice.definition.name)
    api.set_pools()
    file = "vql_daily_own.py" if choice.own else "vql_daily.py"
    api.wait_for_dag(dag_id, file, parsed_since, lambda: services.check_alive(airflow))
    if shared and sleeping_schedule(api, choice.definition):
        raise InfraError(
            f"the DAG {dag_id} is paused and has a schedule, which would start with this run",
            "un-pause it in the browser when the schedule shall start; "
            "or `make down`, and `make run` alone, which starts no schedule",
        )
    make_way(api, choice, shared)


def main() -> int:
    children: dict[Service, int] = {}

    def interrupted(signum: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt(signum)

    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGINT, interrupted)
    try:
        return run_partition(children)
    except (InfraError, StageError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        print(
            f"error: Airflow does not answer: {error}\n  remedy: see {settings.airflow_home() / 'logs'}/*.out",
            file=sys.stderr,
            flush=True,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; stopping", file=sys.stderr, flush=True)
        return 130
    finally:
        services.stop(pid for service, pid in children.items() if service.name != services.POSTGRES)
        services.end_left_behind()
        if any(service.name == services.POSTGRES for service in children):
            database.stop()


if __name__ == "__main__":
    sys.exit(main())

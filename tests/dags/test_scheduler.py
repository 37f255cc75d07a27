"""The DAG under Airflow's real scheduler, in a copy of the project whose stages only write down how they were
called."""

from __future__ import annotations

import contextlib
import datetime as dtm
import itertools
import json
import os
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import psutil
import pytest

from etl.stage.errors import EXIT_CORRECT
from etl.stage.local_files import replace_text
from etl.warehouse.store import TableStore
from infra import settings
from infra.airflow_api import AirflowApi, InfraError
from infra.local import services
from tests.processes import free_port, start
from tests.training.conftest import DT, random_partition
from tests.training.test_train import publish
from tests.waiting import PATIENCE_S, wait_for
from training.configs import tiny

pytestmark = [pytest.mark.slow, pytest.mark.airflow]

STAGES = (
    "etl.jobs.events",
    "etl.quality.judge.audit",
    "etl.jobs.sequences",
    "training.train",
    "evaluation.evaluate",
    "evaluation.release.register",
    "evaluation.release.promote",
    "evaluation.user_caches",
    "evaluation.prune",
    "evaluation.release.by_hand",
    "evaluation.compare",
)
STAGE = """
import contextlib, json, os, sys, time
from pathlib import Path
root = Path(__file__).resolve().parents[len(__spec__.name.split(".")) - 1]
if any("hunter2" in value or "///airflow?" in value for value in os.environ.values()):
    sys.exit("error: the address of Airflow's database is in the environment of a stage")
with (root / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([__spec__.name, *sys.argv[1:]]) + "\\n")
fault = root / "fault.json"
if fault.exists():
    module, code, once, words = json.loads(fault.read_text())
    if module == __spec__.name and {*words} <= {*sys.argv}:
        if once:
            fault.unlink()
        print("error: a fault was asked for\\n  remedy: none", file=sys.stderr)
        sys.exit(code)
def hold():
    "Wait while the stage is held, which a file of the root names."
    (root / "held").write_text(__spec__.name)
    with contextlib.suppress(FileNotFoundError):
        while (root / "hold").read_text() == __spec__.name:
            time.sleep(0.2)
if __spec__.name != "training.train":
    hold()
"""
# Training begins the attempt's run in MLflow, as the real one does.
TRAIN = (
    STAGE
    + """
if (root / "training" / "tracking.py").exists():
    from etl.datasets.arguments import partition_parser
    from training.tracking import attempt_run
    args, _ = partition_parser("").parse_known_args()
    with attempt_run(args.definition, args.dt, args.attempt, {}):
        hold()
"""
)
# A gate keeps its outcome, a warning when it is asked to, as the real one does; what asks a person then reads it with
# the real code.
GATE = (
    STAGE
    + """
if (root / "gates").exists():
    from etl.datasets.arguments import partition_parser, store_of
    from etl.quality.judge.outcomes import Outcome, StageOutcome, write_outcome
    parser = partition_parser("")
    parser.add_argument("--stage")
    args, _ = parser.parse_known_args()
    odd = Outcome(
        "events_days", "between", "hours_covered", "warning", False, 11, 12, "look", "hours_covered is `11`", None)
    found = ("warning", (odd,)) if (root / "warn").exists() else (None, ())
    write_outcome(store_of(args), StageOutcome(args.dataset, True, args.dt, args.attempt, args.stage, 1, *found))
"""
)
# Promotion leaves what the real one does; `outcome` of the root says which.
PROMOTE = (
    STAGE
    + """
champion, before = root / "champion", (root / "champion").read_text() if (root / "champion").exists() else ""
time.sleep(8 if (root / "slow_promotion").exists() else 0)
if before != (champion.read_text() if champion.exists() else ""):
    sys.exit("another promotion was at work")
champion.write_text(sys.argv[sys.argv.index("--attempt") + 1])
outcome = (root / "outcome").read_text() if (root / "outcome").exists() else "promoted"
folder = Path(sys.argv[sys.argv.index("--runs") + 1]) / sys.argv[sys.argv.index("--attempt") + 1]
folder.mkdir(parents=True, exist_ok=True)
(folder / "registration.json").write_text(json.dumps({
    "model_name": "vql_model", "version": "3", "run_id": "abc", "experiment_id": "7", "outcome": outcome,
    "digests": {"model.digest": "d1"},
    "aliases": ["champion"] if outcome == "promoted" else ["challenger"],
    "gate": {"passed": outcome != "refused", "reason": "the reason"}}))
"""
)
# A decision by hand leaves what the real one does.
BY_HAND = (
    STAGE
    + """
Path(sys.argv[sys.argv.index("--result") + 1]).write_text(json.dumps({
    "outcome": "rolled back to", "model": "vql_model", "version": "2", "by": "Ada", "reason": "complaints",
    "aliases": ["champion"], "dt": "2022-04-20", "attempt": "a", "digests": {"model.digest": "d2"}}))
"""
)
# A comparison is the real one, of the tree under test.
COMPARE = (
    STAGE
    + f"""
os.chdir({str(settings.ROOT)!r})
os.environ.update(PYTHONPATH=os.getcwd(), OMP_NUM_THREADS="1")
os.execv(sys.executable, [sys.executable, "-m", "evaluation.compare", *sys.argv[1:]])
"""
)
STAGE_OF = {
    "etl.quality.judge.audit": GATE,
    "training.train": TRAIN,
    "evaluation.release.promote": PROMOTE,
    "evaluation.release.by_hand": BY_HAND,
    "evaluation.compare": COMPARE,
}
ENDED = """
import sys
from pathlib import Path
with (Path(__file__).resolve().parents[1] / "ended").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
"""
PAGE = """
import json, sys
sys.stdin.read()
print(json.dumps({"experiment_id": "7", "run_id": "abc",
    "artifact": "validation/" + sys.argv[sys.argv.index("--attempt") + 1] + ".html"}))
"""
SECRET = "hunter2"  # stands in the address of Airflow's database
TASKS = 11  # that run a stage
APPROVAL, LAST_GATE = "train.approve_warnings", "train.audit_training_input"
DAG_ID = settings.dag_id("kuairand_simulated")
DAG_PATH = f"/api/v2/dags/{DAG_ID}"


class Project:
    """A copy of the project on ports of its own."""

    def __init__(self, root: Path, login: bool = False) -> None:
        self.root, self.login = root, login
        ports = [str(free_port()), str(free_port())]
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "LONGVIEW", "MLFLOW"))
        }
        self.env = inherited | {
            "PYTHONPATH": "",
            "LONGVIEW_AIRFLOW_PORT": ports[0],
            "LONGVIEW_MLFLOW_PORT": ports[1],
            "LONGVIEW_LOGIN": str(int(login)),
            "LONGVIEW_RETRY_WAITS": "1 2 3 4 5",
        }
        self.api = AirflowApi(f"http://127.0.0.1:{ports[0]}")
        for folder in ("dags", "infra", "etl"):
            shutil.copytree(settings.ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
        wait = root / "dags" / "_wait.py"
        often = wait.read_text().replace("LOOK_EVERY_SECONDS = 300", "LOOK_EVERY_SECONDS = 2")
        assert "LOOK_EVERY_SECONDS = 2\n" in often
        wait.write_text(often)
        for module in STAGES:
            path = root / f"{module.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(STAGE_OF.get(module, STAGE))
        shutil.copy(settings.ROOT / "evaluation" / "release" / "outcomes.py", root / "evaluation" / "release")
        shutil.copytree(
            settings.ROOT / "training" / "configs",
            root / "training" / "configs",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        (root / "training" / "log_report.py").write_text(PAGE)
        (root / "training" / "ended.py").write_text(ENDED)
        (root / "etl" / "datasets" / "simulate.py").write_text(
            "import os, sys; os.makedirs(sys.argv[2], exist_ok=True)"
        )

    def python(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def succeeds(self, *arguments: str) -> str:
        """Return what a command says that has to succeed."""
        done = self.python(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def up(self) -> str:
        """Start the services of `make up`, and log in where they ask for it; return what the command says."""
        said = self.succeeds("-m", "infra.local.stack", "up")
        if self.login:
            [(user, password)] = json.loads(self.passwords.read_text()).items()
            self.api._token = self.api.call("POST", "/auth/token", {"username": user, "password": password})[
                "access_token"
            ]
        return said

    @property
    def passwords(self) -> Path:
        return self.root / "var" / "secrets" / "airflow_passwords.json"

    def definition(self, file: str, text: str) -> Path:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def calls(self) -> list[list[str]]:
        """Return the stages' command lines since the last call of this method."""
        path = self.root / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def fault(self, module: str, code: int, once: bool, *words: str) -> None:
        """Let a stage fail, where its arguments hold these words."""
        (self.root / "fault.json").write_text(json.dumps([module, code, once, words]))

    def start_backfill(self, first: str, last: str, **body) -> int:
        asked = {
            "dag_id": DAG_ID,
            "from_date": f"{first}T00:00:00Z",
            "to_date": f"{last}T00:00:00Z",
            "max_active_runs": 1,
            **body,
        }
        return self.api.call("POST", "/api/v2/backfills", asked)["id"]

    def backfill(self, first: str, last: str, **body) -> None:
        identity = self.start_backfill(first, last, **body)
        wait_for(
            "end of the backfill",
            lambda: self.api.call("GET", f"/api/v2/backfills/{identity}")["completed_at"],
            every=1,
        )

    def runs_of_backfill(self, dt: str) -> list[str]:
        runs = self.api.call("GET", f"{DAG_PATH}/dagRuns?run_type=backfill")["dag_runs"]
        return [
            f"{DAG_PATH}/dagRuns/{urllib.parse.quote(run['dag_run_id'])}"
            for run in runs
            if run["logical_date"].startswith(dt)
        ]

    def pause(self, paused: bool, dag: str = DAG_PATH) -> None:
        self.api.call("PATCH", f"{dag}?update_mask=is_paused", {"is_paused": paused})

    def trigger(self, dt: str | None, logical_date: str | None = None, **conf) -> str:
        """Start a manual run; return its path in the API."""
        run = self.api.call("POST", f"{DAG_PATH}/dagRuns", {"logical_date": logical_date, "conf": {"dt": dt, **conf}})
        return f"{DAG_PATH}/dagRuns/{urllib.parse.quote(run['dag_run_id'])}"

    def clear(self, run: str, *tasks: str, downstream: bool = True, only_failed: bool = False) -> None:
        """Clear tasks of a run as the browser does; none: the whole run."""
        if tasks:
            self.api.call(
                "POST",
                f"{run.partition('/dagRuns/')[0]}/clearTaskInstances",
                {
                    "dry_run": False,
                    "dag_run_id": urllib.parse.unquote(run.rpartition("/")[2]),
                    "task_ids": list(tasks),
                    "only_failed": only_failed,
                    "include_downstream": downstream,
                    "include_upstream": False,
                    "reset_dag_runs": True,
                },
            )
        else:
            self.api.call("POST", f"{run}/clear", {"dry_run": False, "only_failed": only_failed})

    def stop(self, run: str) -> None:
        """End a run that has shown what it had to."""
        self.api.call("PATCH", f"{run}?update_mask=state", {"state": "failed"})
        wait_for(
            f"stop of {run}",
            lambda: not {"running", "queued", "scheduled", "restarting"} & set(self.states(run).values()),
            every=1,
        )

    def log(self, run: str, task: str, attempt: int = 1) -> str:
        dag, _, run_id = run.removeprefix("/api/v2/dags/").partition("/dagRuns/")
        return (
            self.root
            / f"var/airflow/logs/dag_id={dag}/run_id={urllib.parse.unquote(run_id)}"
            / f"task_id={task}/attempt={attempt}.log"
        ).read_text()

    def error(self, run: str, task: str, attempt: int = 1) -> str:
        """Return what a task that failed says of its error.

        One line at that level, then the remedy, and no trace anywhere.
        """
        said = [json.loads(line) for line in self.log(run, task, attempt).splitlines()]
        assert not [line for line in said if "error_detail" in line or "Traceback" in line["event"]]
        error, remedy, *_ = [line["event"] for line in said if line["level"] == "error"]
        assert error.startswith("error: ")
        assert remedy.startswith("  remedy: ")
        return error

    def ended(self, run: str) -> str:
        """Return the final state of a run."""
        return wait_for(
            f"end of {run}",
            lambda: state if (state := self.api.call("GET", run)["state"]) in ("success", "failed") else None,
            every=1,
        )

    def states(self, run: str) -> dict[str, str | None]:
        return {
            task["task_id"]: task["state"] for task in self.api.call("GET", f"{run}/taskInstances")["task_instances"]
        }

    def tries(self, run: str, task: str) -> int:
        return self.api.call("GET", f"{run}/taskInstances/{task}")["try_number"]

    def question(self, run: str) -> dict:
        """Return what a run that waits for a person shows them."""
        wait_for(
            f"question of {run}",
            lambda: self.states(run).get(APPROVAL) in ("awaiting_input", "success", "failed", "upstream_failed"),
            every=1,
        )
        assert self.states(run)[APPROVAL] == "awaiting_input"
        # Airflow 3.3.2 takes a task that is answered before its executor has reported its process's end for a lost one,
        # and asks again; no person is that fast.
        asked = self.api.call("GET", f"{run}/taskInstances/{APPROVAL}")
        began = asked["start_date"].replace("T", " ").removesuffix("Z")
        reported = f"map_index=-1, ti_id={asked['id']}, run_start_date={began}"
        log = self.root / "var" / "airflow" / "logs" / "scheduler.out"
        wait_for("the executor's report", lambda: reported in log.read_text())
        return self.api.call("GET", f"{run}/taskInstances/{APPROVAL}/-1/hitlDetails")

    def answer(self, run: str, option: str) -> None:
        self.api.call(
            "PATCH", f"{run}/taskInstances/{APPROVAL}/-1/hitlDetails", {"chosen_options": [option], "params_input": {}}
        )

    def mark(self, run: str, task: str, state: str) -> None:
        """Set the state of a task as a person does in the browser."""
        self.api.call("PATCH", f"{run}/taskInstances/{task}?update_mask=new_state", {"new_state": state})

    def training_slots(self, number: int) -> None:
        body = {"pool": "training", "slots": number, "description": "", "include_deferred": False}
        self.api.call("PATCH", "/api/v2/pools/training", body)

    def hold_at(self, module: str) -> None:
        """Let a stage wait once it is at work, until another is named or `let_go`."""
        wait_for(
            "what ends the run in MLflow", lambda: not any("training.ended" in one for one in processes_of(self.root))
        )
        (self.root / "held").write_text("")
        (self.root / "hold").write_text(module)

    def held(self, module: str) -> str:
        """Wait until a stage is at work; return its attempt."""
        wait_for(f"{module} at work", lambda: (self.root / "held").read_text() == module, every=0.2)
        return of(self.calls()[-1], "--attempt")

    def let_go(self) -> None:
        (self.root / "hold").unlink()

    def pid_of(self, service: str) -> int:
        return int((self.root / "var" / "run" / f"{service}.pid").read_text().split()[0])

    def ask_mlflow(self, what: str, body: dict) -> dict:
        url = f"http://127.0.0.1:{self.env['LONGVIEW_MLFLOW_PORT']}/api/2.0/mlflow/{what}/search"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=PATIENCE_S) as answer:
            return json.loads(answer.read())

    def status_in_mlflow(self, attempt: str) -> str:
        found = self.ask_mlflow("experiments", {"max_results": 100})["experiments"]
        experiments = [one["experiment_id"] for one in found]
        asked = {"experiment_ids": experiments, "filter": f"tags.`pipeline.attempt` = '{attempt}'"}
        [run] = self.ask_mlflow("runs", asked)["runs"]
        return run["info"]["status"]

    def link(self, run: str, task: str) -> str | None:
        """Return where the report's button on the page of a task leads."""
        return self.api.call("GET", f"{run}/taskInstances/{task}/links")["extra_links"]["Partition report"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = Project(tmp_path_factory.mktemp("project"), login=True)
    yield made
    made.python("-m", "infra.local.stack", "down")


def processes_of(root: Path) -> list[str]:
    """Return the command lines of what works below the services of a project, its database included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(root / "var") in process.environ().get(services.MARK, "") and services.alive(process.pid):
                found.append(" ".join(process.cmdline()))
    return found


def of(call: list[str], option: str) -> str:
    return call[call.index(option) + 1]


def test_make_run_from_nothing(project):
    broken = project.definition(
        "var/definitions/broken.yaml", "name: broken\nlogs: ["
    )  # breaks the DAGs of own data sets only
    (project.root / "var" / "airflow").mkdir()
    done = project.python(
        "-m", "infra.local.run", LONGVIEW_AIRFLOW_DB=f"sqlite:///{project.root}/var/airflow/{SECRET}.db"
    )
    broken.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    calls = project.calls()
    assert len(calls) == TASKS
    assert {of(call, "--dt") for call in calls} == {settings.SIMULATED_DT}
    assert {of(call, "--dataset") for call in calls} == {"kuairand_simulated"}
    assert len({of(call, "--attempt") for call in calls}) == 1
    assert "done in" in done.stdout
    home = project.root / "var"
    assert {oct((home / folder).stat().st_mode & 0o777) for folder in ("airflow", "secrets")} == {"0o700"}
    assert [
        path
        for path in home.rglob("*")
        if path.is_file()
        and path.suffix not in (".db", ".db-wal", ".db-shm")
        and SECRET in path.read_text(errors="replace")
    ] == []
    assert not project.api.healthy()  # it stopped what it started
    assert not (home / "postgres").exists()  # SQLite is the choice of a single run


def test_a_make_run_ends_what_a_killed_one_has_left_in_airflow_and_in_mlflow(project):
    env = {"LONGVIEW_AIRFLOW_DB": f"sqlite:///{project.root}/var/airflow/{SECRET}.db"}  # `make up` shall find no run
    project.hold_at("evaluation.evaluate")
    killed = start([sys.executable, "-m", "infra.local.run"], project.root / "log", project.root, project.env | env)
    attempt = project.held("evaluation.evaluate")
    killed.process.kill()
    project.let_go()
    done = project.python("-m", "infra.local.run", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ending the abandoned run run__kuairand_simulated__" in done.stdout
    ended, words = project.root / "ended", f"--dt {settings.SIMULATED_DT} --attempt {attempt} --status KILLED\n"
    wait_for("its end in MLflow", lambda: ended.exists() and ended.read_text().endswith(words))
    ended.unlink()
    killed.finish()
    project.calls()


def only_the_password_opens(project, said: str) -> None:
    """`make run` knows it."""
    [(user, password)] = json.loads(project.passwords.read_text()).items()
    assert str(project.passwords) in said
    assert password not in said
    strangers = AirflowApi(project.api.url)
    for body in (None, {"username": user, "password": "guess"}):
        with pytest.raises(InfraError, match=r"answered 40[13]"):
            strangers.call("POST" if body else "GET", "/auth/token", body)


def a_stage_error_fails_at_once_and_is_reported(project) -> None:
    """In the running stack, which `make run` uses."""
    project.fault("training.train", 2, once=False)
    failed = project.python("-m", "infra.local.run")
    assert failed.returncode == 1
    assert "using the Airflow of `make up`" in failed.stdout
    assert "FAILED  train.train_models  (try 1)" in failed.stdout
    assert "error: a fault was asked for" in failed.stdout
    assert [call[0] for call in project.calls()].count("training.train") == 1
    (project.root / "fault.json").unlink()


def known_runs(project) -> list[tuple[str, str]]:
    """Of all data sets."""
    return sorted(
        (run["dag_run_id"], run["state"]) for run in project.api.call("GET", "/api/v2/dags/~/dagRuns")["dag_runs"]
    )


def an_own_data_set_gets_a_dag_at_its_first_run_and_another_when_its_definition_has_changed(project) -> None:
    own = (
        "extends: kuairand\nname: shop\ntitle: My shop\nfirst_day: 2023-01-02\nlast_day: 2023-03-01\nwindow:"
        " {target_days: %d}"
    )
    for target_days in (5, 6):
        path = project.definition("shop.yaml", own % target_days)
        done = project.python("-m", "infra.local.run", DATASET=str(path), RAW=str(project.root), DT="2023-02-01")
        assert done.returncode == 0, done.stdout + done.stderr
        calls = project.calls()
        assert len(calls) == TASKS
        assert {of(call, "--dataset") for call in calls} == {str(project.root / "var" / "definitions" / "shop.yaml")}
        assert {of(call, "--dt") for call in calls} == {"2023-02-01"}
        [attempt] = {of(call, "--attempt") for call in calls}
        assert attempt.startswith("shop-2023-02-01-")
        assert [of(call, "--target-days") for call in calls if call[0] == "etl.jobs.sequences"] == [str(target_days)]
    assert project.api.call("GET", "/api/v2/dags/vql_daily_shop/details")["params"]["raw"]["value"] == str(
        project.root
    )  # for its other runs


def killed_services_come_again_by_themselves(project) -> None:
    """And their children end, though executors ignore SIGTERM."""
    scheduler, mlflow = (psutil.Process(project.pid_of(service)) for service in ("scheduler", "mlflow"))
    executors = wait_for("executors", lambda: scheduler.children(recursive=True))
    for service in (scheduler, mlflow):
        service.kill()
    wait_for("another scheduler", lambda: project.pid_of("scheduler") != scheduler.pid)
    wait_for("another MLflow", lambda: project.pid_of("mlflow") != mlflow.pid)
    wait_for("end of the executors", lambda: not any(services.alive(executor.pid) for executor in executors))
    said = (project.root / "var" / "airflow" / "logs" / "supervisor.out").read_text()
    assert f"scheduler (process {scheduler.pid}) ended with code -9; started again in 1 s" in said
    assert "started" not in project.up()  # waits until they are healthy


def test_the_stack_runs_backfills_retries_and_reprocesses(project):
    said = project.up()
    assert (project.root / "var" / "postgres" / "data" / "PG_VERSION").exists()

    only_the_password_opens(project, said)
    a_stage_error_fails_at_once_and_is_reported(project)

    # Two days, both ends included; a fault of another kind is retried in the same attempt.
    assert project.api.call("GET", DAG_PATH)["is_paused"]  # as `make run` found it
    project.pause(False)
    project.fault("etl.jobs.sequences", 1, once=True)
    project.backfill("2022-04-20", "2022-04-21")
    first = project.calls()
    assert sorted({of(call, "--dt") for call in first}) == ["2022-04-20", "2022-04-21"]
    assert len(first) == 2 * TASKS + 1
    attempts = {of(call, "--attempt") for call in first}
    assert len(attempts) == 2

    for dt in ("2022-04-20", "2022-04-21"):
        [run] = project.runs_of_backfill(dt)
        assert f"backfill__{dt}" in run
        assert dt in project.api.call("GET", run)["note"]

    at_backup = known_runs(project)
    project.succeeds("-m", "infra.local.database", "backup")

    # Reprocessing does all the work again, under new names, with the parameters of the new backfill.
    project.backfill("2022-04-20", "2022-04-20", reprocess_behavior="completed", dag_run_conf={"config": "tiny"})
    second = project.calls()
    assert len(second) == TASKS
    assert [of(call, "--config") for call in second if call[0] == "training.train"] == ["tiny"]
    again = {of(call, "--attempt") for call in second}
    assert len(again) == 1
    assert not again & attempts

    an_own_data_set_gets_a_dag_at_its_first_run_and_another_when_its_definition_has_changed(project)
    assert known_runs(project) != at_backup

    # A backfill cannot be made to build one day over and over, and nonsense is refused before it runs.
    with pytest.raises(Exception, match="param raw"):
        project.api.call(
            "POST", f"{DAG_PATH}/dagRuns", {"logical_date": None, "conf": {"raw": "/x; id", "dt": "2022-04-20"}}
        )

    killed_services_come_again_by_themselves(project)

    # Killed, what watches them takes them all along; so does `make down`.
    psutil.Process(project.pid_of("supervisor")).kill()
    wait_for("end of all", lambda: not processes_of(project.root))

    # Airflow starts over a backup, and shows the runs that there were; those of its next tests are made over it.
    [saved] = (project.root / "var" / "backups").iterdir()
    project.succeeds("-m", "infra.local.database", "restore", str(saved))
    assert "started scheduler" in project.up()
    assert known_runs(project) == at_backup
    down = project.succeeds("-m", "infra.local.stack", "down")
    assert "scheduler" in down
    assert "postgres" in down
    assert processes_of(project.root) == []


@pytest.fixture(scope="module")
def stack(project):
    """The services of `make up`, for all tests that follow."""
    project.up()
    project.pause(False)
    (project.root / "gates").touch()
    project.calls()
    return project


def rejected_in_a_backfill_the_run_ends_before_training(project) -> None:
    """And nothing is registered."""
    backfill = project.start_backfill("2022-04-18", "2022-04-18", dag_run_conf={"on_warning": "approve"})
    [run] = wait_for("run of the backfill", lambda: project.runs_of_backfill("2022-04-18"), every=1)
    project.question(run)
    project.answer(run, "Reject")
    assert project.ended(run) == "success"
    wait_for(
        "end of the backfill", lambda: project.api.call("GET", f"/api/v2/backfills/{backfill}")["completed_at"], every=1
    )
    assert {call[0] for call in project.calls()} == {"etl.jobs.events", "etl.quality.judge.audit", "etl.jobs.sequences"}
    ended = project.root / "ended"
    wait_for("end in MLflow", lambda: ended.exists() and ended.read_text().endswith("--status KILLED\n"))
    assert "rejected by a person before training" in project.api.call("GET", run)["note"].splitlines()[0]
    states = project.states(run)
    assert {task for task, state in states.items() if state == "skipped"} == {
        "train.train_models",
        "evaluate.evaluate_models",
        "register.register_model",
        "register.promote_model",
        "caches.build_user_caches",
        "prune",
    }


def what_stops_a_run_has_the_button_and_names_the_page_in_its_log(project, module: str, task: str) -> None:
    project.fault(module, 2, once=False)
    run = project.trigger("2022-04-19")
    assert project.ended(run) == "failed"
    assert project.states(run)[task] == "failed"
    link = project.link(run, task)
    assert "/runs/abc/artifacts/validation/" in link
    assert link in project.log(run, task)


def test_a_warning_waits_for_a_person_before_training(stack):
    project = stack

    # Approved: what warned and the report are shown, nothing trains meanwhile, then all the rest runs.
    (project.root / "warn").touch()
    run = project.trigger("2022-04-20", on_warning="approve")
    question = project.question(run)
    assert "2022-04-20" in question["subject"]
    assert "hours_covered is  11" in question["body"]  # all of it in one code mark
    assert project.link(run, LAST_GATE) in question["body"]
    called = project.calls()
    assert [call[0] for call in called].count("etl.quality.judge.audit") == 3
    assert "training.train" not in [call[0] for call in called]
    project.answer(run, "Approve")
    assert project.ended(run) == "success"
    assert [call[0] for call in project.calls()] == [
        "training.train",
        "evaluation.evaluate",
        "evaluation.release.register",
        "evaluation.release.promote",
        "evaluation.user_caches",
        "evaluation.prune",
    ]
    [attempt] = {of(call, "--attempt") for call in called}
    for task in ("ingest.audit_events", "sequences.audit_sequences", LAST_GATE, APPROVAL, "evaluate.evaluate_models"):
        assert project.link(run, task).endswith(
            f"/#/experiments/7/runs/abc/artifacts/validation/{attempt}.html?workflowType=machine_learning"
        )

    rejected_in_a_backfill_the_run_ends_before_training(project)

    # A warning that nobody is to be asked about, and an approval without a warning, wait for nobody.
    for conf in ({}, {"on_warning": "approve"}):
        assert project.ended(project.trigger("2022-04-19", **conf)) == "success"
        assert [call[0] for call in project.calls()].count("evaluation.user_caches") == 1
        (project.root / "warn").unlink(missing_ok=True)

    # A gate, and the job that judges the raw files.
    what_stops_a_run_has_the_button_and_names_the_page_in_its_log(
        project, "etl.quality.judge.audit", "ingest.audit_events"
    )
    what_stops_a_run_has_the_button_and_names_the_page_in_its_log(project, "etl.jobs.events", "ingest.build_events")
    (project.root / "fault.json").unlink()
    project.calls()


def test_make_run_says_which_run_of_make_up_it_waits_for(stack):
    """Such as that of a `make run` which was killed before the first `make up`: it goes on there."""
    stack.hold_at("etl.jobs.events")
    first = stack.trigger(settings.SIMULATED_DT)
    stack.held("etl.jobs.events")
    log = stack.root / "run.log"
    waits = start([sys.executable, "-m", "infra.local.run"], log, stack.root, stack.env)
    name = urllib.parse.unquote(first.rpartition("/")[2])
    wait_for("what it says", lambda: f"note: the run {name} is still running; it goes first" in log.read_text())
    stack.let_go()
    code, said = waits.finish()
    assert code == 0 and "ending the abandoned run" not in said and stack.ended(first) == "success"
    stack.calls()


def attempts_of(calls: list[list[str]]) -> set[str]:
    return {of(call, "--attempt") for call in calls}


def modules_of(calls: list[list[str]]) -> list[str]:
    return [call[0] for call in calls]


def each_clear_from_the_start_is_a_new_attempt(project, run: str, first: list[list[str]]) -> set[str]:
    """Clear the whole run, and its first task with what follows, with the run's parameters, judged anew.

    Args:
        first: the calls of the run's first attempt.

    Returns:
        the attempts that there were.
    """
    seen = attempts_of(first)
    for tasks in ((), ("start",)):
        project.clear(run, *tasks)
        project.question(run)
        calls = project.calls()
        assert sorted(modules_of(calls)) == sorted(modules_of(first))
        assert len(attempts_of(calls)) == 1
        assert not attempts_of(calls) & seen
        seen |= attempts_of(calls)
    return seen


def test_a_clear_of_a_later_task_goes_on_in_the_attempt_and_one_of_the_run_begins_another(stack):
    project = stack
    (project.root / "warn").touch()
    run = project.trigger("2022-04-17", on_warning="approve", config="tiny")
    asked = project.question(run)
    first = project.calls()
    [attempt] = attempts_of(first)

    # The question cleared while it waits: the same question.
    project.clear(run, APPROVAL)
    assert project.question(run)["body"] == asked["body"]
    assert project.calls() == []
    project.fault("evaluation.evaluate", 2, once=True)
    project.answer(run, "Approve")
    assert project.ended(run) == "failed"
    assert modules_of(project.calls()) == ["training.train", "evaluation.evaluate"]

    # Only what failed, with what follows: the training is not done again.
    project.clear(run, only_failed=True)
    assert project.ended(run) == "success"
    calls = project.calls()
    assert modules_of(calls) == [
        "evaluation.evaluate",
        "evaluation.release.register",
        "evaluation.release.promote",
        "evaluation.user_caches",
        "evaluation.prune",
    ]
    assert attempts_of(calls) == {attempt}

    # One task of a finished run, alone.
    project.clear(run, "register.promote_model", downstream=False)
    assert project.ended(run) == "success"
    calls = project.calls()
    assert (modules_of(calls), attempts_of(calls)) == (["evaluation.release.promote"], {attempt})

    # The question cleared after its answer, whatever it was: asked again, and nothing trains meanwhile.
    for answer in ("Reject", None):
        project.clear(run, APPROVAL)
        assert project.question(run)["body"] == asked["body"]
        if answer:
            project.answer(run, answer)
            assert project.ended(run) == "success"
        assert project.calls() == []

    seen = each_clear_from_the_start_is_a_new_attempt(project, run, first)
    # A question without what the gates of its attempt found is none: clear them away, and it fails instead of passing.
    shutil.rmtree(project.root / "var" / "warehouse")
    project.clear(run, APPROVAL)
    assert project.ended(run) == "failed"
    assert project.states(run)[APPROVAL] == "failed"
    assert "no outcome of the gates" in project.error(run, APPROVAL, project.tries(run, APPROVAL))
    assert project.calls() == []
    note = project.api.call("GET", run)["note"]
    assert all(f"dt=2022-04-17, attempt {name}" in note for name in seen)
    (project.root / "warn").unlink()


def test_a_run_of_any_logical_date_does_its_work_or_says_why_not(stack):
    project = stack

    def now() -> str:
        return dtm.datetime.now(dtm.UTC).isoformat()

    def note_of(run: str) -> str | None:
        return project.api.call("GET", run)["note"]

    project.fault("etl.jobs.events", 2, once=False)  # it has come to its work: that is all that is asked here

    # As the form is prefilled, with dt filled in; dt counts, whatever the logical date.
    for logical_date in ("2021-01-01T00:00:00Z", "2022-06-01T12:00:00Z", now()):
        run = project.trigger("2022-04-20", logical_date)
        assert project.ended(run) == "failed"
        assert [(call[0], of(call, "--dt")) for call in project.calls()] == [("etl.jobs.events", "2022-04-20")]
        log = project.log(run, "start")
        assert log.index("workers = ") < log.index("partition dt = 2022-04-20")  # what the run does stands first

    # Without dt: the day of the logical date, if it is one of the data set.
    run = project.trigger(None, "2022-04-21T10:00:00Z")
    assert project.ended(run) == "failed"
    assert [of(call, "--dt") for call in project.calls()] == ["2022-04-21"]
    for logical_date, reason in (
        ("2021-01-02T00:00:00Z", "2021-01-02 is outside the data set kuairand_simulated: 2022-04-08 .. 2022-05-08"),
        (now(), "is outside the data set"),
        (None, "names no partition"),
    ):
        run = project.trigger(None, logical_date)
        assert project.ended(run) == "failed"
        assert project.states(run)["start"] == "failed"
        assert reason in project.error(run, "start")
        wait_for("the reason on the run", lambda run=run, reason=reason: reason in (note_of(run) or ""), every=1)
    assert project.calls() == []

    # A backfill over the end of the data set: the days that it has are built, the others say so; a misspelt parameter
    # is named.
    project.backfill("2022-05-08", "2022-05-09", reprocess_behavior="completed")
    assert [of(call, "--dt") for call in project.calls()] == ["2022-05-08"]
    [run] = project.runs_of_backfill("2022-05-09")
    assert "2022-05-09 is outside" in project.error(run, "start")
    project.backfill("2022-05-08", "2022-05-08", reprocess_behavior="completed", dag_run_conf={"confg": "tiny"})
    [run] = project.runs_of_backfill("2022-05-08")
    assert "did you mean config" in project.error(run, "start", 2)
    project.backfill(
        "2022-05-08", "2022-05-08", reprocess_behavior="completed"
    )  # without the tick: the run keeps what it had
    assert "did you mean config" in project.error(run, "start", 3)
    assert project.calls() == []
    (project.root / "fault.json").unlink()


def test_what_became_of_a_run_stands_on_it_and_only_a_promotion_is_an_event(stack):
    asset = "longview://kuairand_simulated/champion"

    def events() -> list[dict]:
        found = stack.api.call("GET", "/api/v2/assets/events")["asset_events"]
        return [event for event in found if event["uri"] == asset and event["source_run_id"] in mine]

    mine: list[str] = []
    for outcome in ("promoted", "refused"):
        (stack.root / "outcome").write_text(outcome)
        stack.calls()
        stack.fault("evaluation.release.register", 75, once=True)  # what may pass is tried again, in the same attempt
        run = stack.trigger("2022-04-19")
        mine.append(urllib.parse.unquote(run.rpartition("/")[2]))
        assert stack.ended(run) == "success"
        calls = stack.calls()
        assert [call[0] for call in calls].count("evaluation.release.register") == 2
        [attempt] = {of(call, "--attempt") for call in calls}
        assert stack.error(run, "register.register_model") == "error: a fault was asked for"
        words = {
            "promoted": "vql_model version 3 promoted: the reason",
            "refused": "vql_model version 3 NOT promoted, stays challenger: the reason",
        }[outcome]
        assert words in stack.api.call("GET", run)["note"]
        assert words in stack.log(run, "register.promote_model")
        links = stack.api.call("GET", f"{run}/taskInstances/register.promote_model/links")["extra_links"]
        assert links["MLflow run"].endswith("/#/experiments/7/runs/abc?workflowType=machine_learning")
        assert links["Model version"].endswith(f"/#/models/vql_model/versions/3{settings.TRAININGS}")
        assert "/#/experiments/7/runs/abc/artifacts/evaluation/report.html" in links["Evaluation report"]
        [event] = events()  # still that of the promotion
        if outcome == "promoted":
            assert {"dt": "2022-04-19", "attempt": attempt, "version": "3", "model.digest": "d1"}.items() <= event[
                "extra"
            ].items()
    (stack.root / "outcome").unlink()

    # A stage that failed for good ends the run in MLflow, whether it can itself or not.
    stack.fault("etl.jobs.sequences", 2, once=True)
    run = stack.trigger("2022-04-19")
    assert stack.ended(run) == "failed"
    assert stack.states(run)["sequences.build_sequences"] == "failed"
    ended = wait_for(
        "end of the run in MLflow", lambda: (stack.root / "ended").exists() and (stack.root / "ended").read_text()
    )
    assert "--dt 2022-04-19" in ended
    assert ended.endswith("--status FAILED\n")


def test_a_decision_by_hand_is_an_event_and_its_clear_takes_it_no_second_time(stack):
    stack.calls()
    dag = "/api/v2/dags/vql_release"
    given = {"data_set": "kuairand_simulated", "action": "rollback", "by": "Ada", "reason": "complaints"}
    for wrong, says in (({"by": ""}, "by"), ({"action": "undo"}, "action"), ({"version": -1}, "version")):
        with pytest.raises(InfraError, match=says):
            stack.api.call("POST", f"{dag}/dagRuns", {"logical_date": None, "conf": given | wrong})
    stack.pause(False, dag)
    run = stack.api.call("POST", f"{dag}/dagRuns", {"logical_date": None, "conf": given})["dag_run_id"]
    path = f"{dag}/dagRuns/{urllib.parse.quote(run)}"
    assert stack.ended(path) == "success"
    said = "vql_model version 2 is the champion again: by Ada: complaints"
    assert said in stack.api.call("GET", path)["note"]
    found = stack.api.call("GET", "/api/v2/assets/events")["asset_events"]
    [event] = [event for event in found if event["source_run_id"] == run]
    assert event["uri"] == "longview://kuairand_simulated/champion"
    assert {"by": "Ada", "version": "2", "model.digest": "d2"}.items() <= event["extra"].items()
    links = stack.api.call("GET", f"{path}/taskInstances/decide/links")["extra_links"]
    assert links["Model version"].endswith(f"/#/models/vql_model/versions/2{settings.TRAININGS}")
    stack.clear(path)
    assert stack.ended(path) == "success"
    assert [of(call, "--decision") for call in stack.calls()] == [run, run]
    # What the form cannot know is refused in the task, by the field's name.
    conf = given | {"action": "promote"}
    run = stack.api.call("POST", f"{dag}/dagRuns", {"logical_date": None, "conf": conf})["dag_run_id"]
    path = f"{dag}/dagRuns/{urllib.parse.quote(run)}"
    assert stack.ended(path) == "failed"
    assert "version: which version to promote?" in stack.error(path, "decide")
    assert stack.calls() == []
    stack.pause(True, dag)


def test_a_manual_run_beside_a_backfill_and_a_scheduled_run_promotes_one_after_the_other(stack):
    """They may be at work at once, as a backfill counts apart.

    One trains and one promotes at a time, and the last is the champion.
    """
    raw, dag_id = stack.root / "meeting", "vql_daily_meeting"
    dag = f"/api/v2/dags/{dag_id}"
    raw.mkdir()
    (raw / "log.csv").touch()  # the scheduled run finds what it waits for
    stack.definition(
        "var/definitions/meeting.yaml",
        f"""
        extends: kuairand
        name: meeting
        title: Three runs at once
        first_day: 2023-01-02
        last_day: null
        logs: {{files: ['log*.csv'], days_in_name: null}}
        run: {{hour: 0, raw: '{raw}'}}
        """,
    )
    stack.api.wait_for_dag(dag_id, "vql_daily_own.py", since=0)
    stack.calls()
    (stack.root / "slow_promotion").touch()  # each is at it long enough for the others to come
    stack.start_backfill("2023-04-15", "2023-04-16", dag_id=dag_id, max_active_runs=2)
    stack.api.call("POST", f"{dag}/dagRuns", {"logical_date": None, "conf": {"dt": "2023-04-19"}})
    stack.pause(False, dag)
    runs = wait_for(
        "four runs",
        lambda: found if len(found := stack.api.call("GET", f"{dag}/dagRuns")["dag_runs"]) == 4 else None,
        every=1,
    )
    assert sorted(run["run_type"] for run in runs) == ["backfill", "backfill", "manual", "scheduled"]
    paths = [f"{dag}/dagRuns/{urllib.parse.quote(run['dag_run_id'])}" for run in runs]
    assert {stack.ended(path) for path in paths} == {"success"}
    (stack.root / "slow_promotion").unlink()

    def spans(of_one) -> list[tuple[str, str]]:
        return sorted((one["start_date"], one["end_date"]) for one in map(of_one, paths))

    def overlap(found: list[tuple[str, str]]) -> bool:
        return any(before[1] > after[0] for before, after in itertools.pairwise(found))

    assert overlap(spans(lambda path: stack.api.call("GET", path)))
    for task in ("train.train_models", "register.promote_model"):
        assert not overlap(spans(lambda path, task=task: stack.api.call("GET", f"{path}/taskInstances/{task}")))
    calls = stack.calls()
    assert len(calls) == 4 * TASKS
    assert len(attempts_of(calls)) == 4
    promoted = [of(call, "--attempt") for call in calls if call[0] == "evaluation.release.promote"]
    assert (stack.root / "champion").read_text() == promoted[-1]
    stack.pause(True, dag)


@pytest.fixture(scope="module")
def untrained(stack) -> str:
    """A run whose training has failed: to clear it is the shortest way to a training under the scheduler."""
    stack.fault("training.train", EXIT_CORRECT, once=True)
    run = stack.trigger(DT, config="tiny", workers="1")
    assert stack.ended(run) == "failed"
    return run


def test_a_state_that_a_person_sets_ends_the_run_in_mlflow_and_promotes_nothing(stack, untrained):
    for file in ("tracking", "ended"):
        shutil.copy(settings.ROOT / "training" / f"{file}.py", stack.root / "training")
    stack.calls()

    train, evaluate = "train.train_models", "evaluate.evaluate_models"
    stack.hold_at("training.train")
    run = untrained
    stack.clear(run, train)
    attempt = stack.held("training.train")
    stack.mark(run, train, "failed")
    assert stack.ended(run) == "failed"
    wait_for("end in MLflow", lambda: stack.status_in_mlflow(attempt) in ("KILLED", "FAILED"), every=1)

    # What was marked as success has no result: nothing goes on behind it.
    stack.hold_at("training.train")
    stack.clear(run, train)
    assert stack.held("training.train") == attempt
    stack.mark(run, train, "success")
    assert stack.ended(run) == "failed"
    assert f"attempt {attempt} has no result of the task `{train}`" in stack.error(run, evaluate)
    wait_for("end in MLflow", lambda: stack.status_in_mlflow(attempt) in ("KILLED", "FAILED"), every=1)
    assert stack.calls() == []

    # A task that has ended, marked as failed while a later one works: the run stops behind that.
    stack.hold_at("evaluation.evaluate")
    stack.clear(run, train)
    assert stack.held("evaluation.evaluate") == attempt
    assert stack.status_in_mlflow(attempt) == "RUNNING"
    stack.mark(run, train, "failed")
    stack.let_go()
    assert stack.ended(run) == "failed"
    assert f"the task `{train}` of this run is marked as failed" in stack.error(run, "register.register_model")
    wait_for("end in MLflow", lambda: stack.status_in_mlflow(attempt) in ("KILLED", "FAILED"), every=1)

    # A task that waits for a slot, of which there is no process that could end anything.
    stack.hold_at("training.train")
    stack.clear(run, train)
    assert stack.held("training.train") == attempt
    stack.training_slots(0)
    stack.let_go()
    wait_for("end of the training", lambda: stack.states(run)[train] == "success", every=1)
    assert stack.status_in_mlflow(attempt) == "RUNNING"
    stack.mark(run, evaluate, "failed")
    assert stack.ended(run) == "failed"
    wait_for("end in MLflow", lambda: stack.status_in_mlflow(attempt) == "FAILED", every=1)
    assert stack.calls() == []
    stack.training_slots(1)
    (stack.root / "training" / "tracking.py").unlink()
    (stack.root / "training" / "ended.py").write_text(ENDED)


# The real training, of the tree under test, held at a step.
HELD_TRAIN = (
    STAGE
    + f"""
os.chdir({str(settings.ROOT)!r})
os.environ.update(PYTHONPATH=os.getcwd(), HELD_FOLDER=str(root), OMP_NUM_THREADS="1")
os.execv(sys.executable, [sys.executable, "-m", "tests.training.held_training", *sys.argv[1:]])
"""
)


@pytest.fixture(scope="module")
def partition(stack) -> None:
    """Publish a day that real stages can train on."""
    items, sequences = random_partition(users=60, longest=40)
    store = TableStore(str(stack.root / "var" / "warehouse"), "kuairand_simulated")
    for table, rows in (("items", items), ("sequences", sequences)):
        publish(store, table, rows, {"cutoff": "day_start", "availability_lag_ms": 60_000, "max_events": 30})


@pytest.mark.usefixtures("partition")
def test_a_killed_training_is_tried_again_and_goes_on_to_the_bits_of_an_undisturbed_one(stack, untrained):
    (stack.root / "training" / "train.py").write_text(HELD_TRAIN)
    limit, reached = stack.root / "limit", stack.root / "reached"
    replace_text(limit, "12")
    stack.calls()
    run, task = untrained, "train.train_models"
    stack.clear(run, task, downstream=False)
    wait_for("step 12", lambda: reached.exists() and reached.read_text() == "12")
    [call] = stack.calls()
    runs, attempt, before = Path(of(call, "--runs")), of(call, "--attempt"), stack.tries(run, task)
    wait_for("a checkpoint", lambda: list((runs / attempt / "checkpoints").glob("*.pt")))
    held = {"tests.training.held_training", attempt}
    [driver] = [one for one in psutil.process_iter(["cmdline"]) if held <= {*(one.info["cmdline"] or ())}]
    driver.kill()

    words = [sys.executable, "-m", "training.train", *call[1:]]
    words[words.index(attempt)], words[words.index(str(runs))] = "alone", str(stack.root / "alone")
    env = stack.env | {"MLFLOW_TRACKING_URI": f"sqlite:///{stack.root / 'alone.db'}", "OMP_NUM_THREADS": "1"}
    code, said = start(words, stack.root / "alone.log", settings.ROOT, env | {"PYTHONPATH": ""}).finish()
    assert code == 0, said

    wait_for("another try", lambda: stack.tries(run, task) > before, every=1)
    replace_text(limit, "1000000")  # what the killed one had started has ended
    wait_for("its end", lambda: stack.states(run)[task] in ("success", "failed"), every=1)
    assert stack.states(run)[task] == "success"
    said = stack.log(run, task, before + 1)
    assert "going on with vql after step" in said and "Traceback" not in said
    for name in tiny.config().models:
        one, other = (
            (folder / "models" / name / "model.safetensors").read_bytes()
            for folder in (runs / attempt, stack.root / "alone" / "alone")
        )
        assert one == other, name
    (stack.root / "training" / "train.py").write_text(TRAIN)


@pytest.mark.usefixtures("partition")
def test_a_comparison_is_a_task_a_training_and_trains_nothing_twice(stack):
    dag = "/api/v2/dags/vql_compare"
    given = {"data_set": "kuairand_simulated", "dt": DT, "models": "vql,din", "lengths": "20", "config": "tiny"}
    with pytest.raises(InfraError, match="seeds"):
        stack.api.call("POST", f"{dag}/dagRuns", {"logical_date": None, "conf": given | {"seeds": "seven"}})
    stack.calls()
    stack.pause(False, dag)
    stack.fault("evaluation.compare", EXIT_CORRECT, False, "train", "vql", "8")  # of the training with these alone
    run = stack.api.call("POST", f"{dag}/dagRuns", {"logical_date": None, "conf": given | {"seeds": "7,8"}})
    path = f"{dag}/dagRuns/{urllib.parse.quote(run['dag_run_id'])}"
    assert stack.ended(path) == "failed"

    def trainings() -> list[dict]:
        found = stack.api.call("GET", f"{path}/taskInstances")["task_instances"]
        return sorted((task for task in found if task["task_id"] == "train"), key=lambda task: task["map_index"])

    tasks = trainings()
    assert [(task["rendered_map_index"], task["state"]) for task in tasks] == [
        ("vql L=20 seed 7", "success"),
        ("din L=20 seed 7", "success"),
        ("vql L=20 seed 8", "failed"),
        ("din L=20 seed 8", "success"),
    ]
    spans = sorted((task["start_date"], task["end_date"]) for task in tasks)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), "two trained at once"
    note = stack.api.call("GET", path)["note"]
    assert "3 of 4 trainings stand" in note and "train vql L=20 seed 8 failed: a fault was asked for" in note
    results = stack.root / "var" / "compare" / f"kuairand_simulated-{DT}"
    lines = (results / "results.jsonl").read_text()
    assert len(lines.splitlines()) == 3 and "| vql | 20 | 1 |" in (results / "table.md").read_text()

    # Cleared, it alone is trained; one that stands trains nothing.
    (stack.root / "fault.json").unlink()
    stack.clear(path, only_failed=True)
    assert stack.ended(path) == "success"
    after = (results / "results.jsonl").read_text()
    assert after.startswith(lines) and len(after.splitlines()) == 4
    assert "| vql | 20 | 2 |" in (results / "table.md").read_text()

    # One run in MLflow, and one a training below it; the buttons lead there, and they lead back.
    experiments = stack.ask_mlflow("experiments", {"max_results": 100})["experiments"]
    [experiment] = [one["experiment_id"] for one in experiments if one["name"] == "kuairand_simulated comparisons"]
    found = stack.ask_mlflow("runs", {"experiment_ids": [experiment]})["runs"]
    runs = {one["info"]["run_name"]: one["info"] for one in found}
    assert len(found) == len(runs) == 5 and {one["status"] for one in runs.values()} == {"FINISHED"}
    tags = {tag["key"]: tag["value"] for one in found for tag in one["data"]["tags"]}
    assert tags["airflow.run_url"].endswith(f"/dags/vql_compare/runs/{urllib.parse.quote(run['dag_run_id'])}")
    link = stack.api.call("GET", f"{path}/taskInstances/train/links?map_index=1")["extra_links"]["MLflow run"]
    assert f"/experiments/{experiment}/runs/{runs['din L=20 seed 7']['run_id']}" in link
    stack.pause(True, dag)


@pytest.mark.usefixtures("partition")
@pytest.mark.parametrize(("stands", "end"), [(False, "FAILED"), (True, "FINISHED")])
def test_a_comparison_that_is_marked_as_failed_between_its_tasks_ends_in_mlflow(stack, stands, end):
    def comparison() -> str:
        [experiment] = [
            one["experiment_id"]
            for one in stack.ask_mlflow("experiments", {"max_results": 100})["experiments"]
            if one["name"] == "kuairand_simulated comparisons"
        ]
        asked = {"experiment_ids": [experiment], "filter": "tags.`pipeline.comparison` LIKE '%'"}
        [run] = stack.ask_mlflow("runs", asked)["runs"]
        return run["info"]["status"]

    dag = "/api/v2/dags/vql_compare"
    given = {"data_set": "kuairand_simulated", "dt": DT, "models": "mean_pooling", "lengths": "10", "config": "tiny"}
    stack.pause(False, dag)
    stack.training_slots(int(stands))
    run = stack.api.call("POST", f"{dag}/dagRuns", {"logical_date": None, "conf": given | {"seeds": "1,2"}})
    path = f"{dag}/dagRuns/{urllib.parse.quote(run['dag_run_id'])}"
    if stands:  # one is trained, the other waits for a slot
        wait_for("a training", lambda: "running" in states_of_trainings(stack, path), every=0.2)
        stack.training_slots(0)
        wait_for("its end", lambda: "success" in states_of_trainings(stack, path), every=1)
    else:
        wait_for("trainings that wait", lambda: states_of_trainings(stack, path) == ["scheduled"] * 2, every=1)
    assert comparison() == "RUNNING"
    stack.api.call("PATCH", f"{path}?update_mask=state", {"state": "failed"})
    assert stack.ended(path) == "failed"
    wait_for("end in MLflow", lambda: comparison() != "RUNNING", every=1)
    assert comparison() == end

    # Cleared, what is missing is trained, by whichever task one begins with.
    stack.training_slots(1)
    if stands:
        stack.clear(path, "train", downstream=False)
        assert stack.ended(path) == "success" and comparison() == "FINISHED"
    stack.pause(True, dag)


def states_of_trainings(stack, run: str) -> list[str]:
    found = stack.api.call("GET", f"{run}/taskInstances")["task_instances"]
    return sorted(task["state"] or "" for task in found if task["task_id"] == "train" and task["map_index"] >= 0)


def test_a_schedule_starts_by_a_persons_hand_alone_and_waits_for_the_days_files(stack):
    stack.calls()  # those of the tests before
    project = stack
    now = dtm.datetime.now(dtm.UTC)
    raw, dag = project.root / "feed", "/api/v2/dags/vql_daily_feed"
    raw.mkdir()
    feed = (
        "extends: kuairand\nname: feed\ntitle: A feed\nfirst_day: 2023-01-02\nlast_day: null\nlogs: {files:"
        " ['log-*.csv'], days_in_name: {zone: UTC, late_minutes: 0, pattern:"
        " 'log-(?P<year>\\d{4})-(?P<month>\\d\\d)-(?P<day>\\d\\d)'}}\nrun: {hour: %d, wait_hours: %d, raw: '%s',"
        " config: tiny, workers: 3}\n"
    )
    # `make run` beside the services would start the schedule, and says so.
    path = project.definition("feed.yaml", feed % (now.hour, 23, raw))
    done = project.python("-m", "infra.local.run", DATASET=str(path), DT="2023-02-01")
    assert done.returncode == 1
    assert "is paused and has a schedule" in done.stderr
    assert project.api.call("GET", f"{dag}/dagRuns")["dag_runs"] == []

    # Started by hand: the day that has ended, by its name, waits without a slot until its file has come.
    project.pause(False, dag)
    run = wait_for("scheduled run", lambda: project.api.call("GET", f"{dag}/dagRuns")["dag_runs"], every=1)[0]
    dt = run["dag_run_id"].removeprefix("scheduled__")
    assert dt == str((now - dtm.timedelta(days=1)).date())
    run = f"{dag}/dagRuns/{run['dag_run_id']}"
    wait_for("waiting", lambda: project.states(run).get("ingest.wait_for_files") == "up_for_reschedule", every=0.2)
    (raw / f"log-{dt}.csv").touch()
    assert project.ended(run) == "success"
    calls = project.calls()
    assert len(calls) == TASKS
    assert {of(call, "--dt") for call in calls} == {dt}
    [train] = [call for call in calls if call[0] == "training.train"]
    assert (of(train, "--config"), of(train, "--workers")) == ("tiny", "3")
    assert {of(call, "--raw") for call in calls if "--raw" in call} == {str(raw)}

    # Cleared after the deadline, without its file: it fails, and says what it looked for.
    (raw / f"log-{dt}.csv").unlink()
    (raw / "log-2023-01-02.csv").touch()
    project.definition("var/definitions/feed.yaml", feed % (now.hour, 0, raw))
    project.clear(run, "ingest.wait_for_files")
    assert project.ended(run) == "failed"
    assert f"has {dt} in its name" in project.error(run, "ingest.wait_for_files", 2)
    assert project.calls() == []
    (raw / f"log-{dt}.csv").touch()
    project.clear(run, "ingest.wait_for_files")
    wait_for("the work behind it", (project.root / "calls.jsonl").exists)
    project.stop(run)
    assert attempts_of(project.calls()) == attempts_of(calls)

    # `make run` alone: that one run, no schedule, and the DAG sleeps on.
    project.api.call("DELETE", run)
    project.pause(True, dag)
    project.python("-m", "infra.local.stack", "down")
    done = project.python("-m", "infra.local.run", DATASET=str(path), DT="2023-02-01")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {of(call, "--dt") for call in project.calls()} == {"2023-02-01"}

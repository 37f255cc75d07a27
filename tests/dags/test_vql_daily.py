"""The DAGs: what they are made of, which day a run builds, what they refuse, and how a stage's end becomes a task's end."""

from __future__ import annotations

import datetime as dtm
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowFailException, ParamValidationError

from etl.datasets import built_in_names, dataset
from etl.errors import EXIT_GATE, EXIT_MEND, EXIT_TRY_AGAIN, StageError
from infra import settings
from tests.waiting import wait_for

pytestmark = pytest.mark.airflow

S3_RAW = "s3://bucket/logs?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9000&allow_delayed_open=true"  # as docs/cluster.md has it
GOLDEN = Path(__file__).parent / "golden" / "vql_daily_kuairand.json"
HEAVY = ("torch", "pyspark", "mlflow", "ray", "pandas", "great_expectations", "pyarrow")
MOST_MODULES = 100  # that a DAG file may import beside Airflow itself, which parses it every 15 seconds
EXPECTED_COMMANDS = {
    "ingest.build_events": "etl.jobs.events --raw /raw --lookback-days LOOKBACK --reports REPORTS",
    "ingest.audit_events": "etl.quality.audit --stage events --reports REPORTS",
    "sequences.build_sequences": "etl.jobs.sequences --raw /raw --target-days TARGET --lookback-days LOOKBACK --evaluation-days EVALUATION --max-history HISTORY --reports REPORTS",
    "sequences.audit_sequences": "etl.quality.audit --stage sequences --reports REPORTS",
    "train.audit_training_input": "etl.quality.audit --stage training_input --reports REPORTS",
    "train.train_models": "training.main --workers 2 --config default --warm-start none --runs RUNS",
    "evaluate.evaluate_models": "evaluation.main --runs RUNS --raw /raw --reports REPORTS",
    "register.register_model": "evaluation.register --runs RUNS",
    "register.promote_model": "evaluation.promote --runs RUNS",
    "caches.build_user_caches": "training.caches --runs RUNS",
}


OWN = """
extends: kuairand
name: shop
title: My shop
first_day: 2023-01-02
last_day: null
history: {max_events: 77}
window: {target_days: 5, lookback_days: 9, evaluation_days: 2}
"""


def dag_of(name: str):
    from dags import vql_daily

    return vars(vql_daily)[settings.dag_id(name)]


@pytest.fixture(scope="module")
def dag():
    return dag_of("kuairand")


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """An own definition in the folder that vql_daily_own.py reads."""
    monkeypatch.setenv("LONGVIEW_DEFINITIONS", str(tmp_path / "definitions"))
    path = tmp_path / "definitions" / "shop.yaml"
    path.parent.mkdir()
    path.write_text(OWN)
    return path


def own_dags() -> dict:
    """Import vql_daily_own.py anew; return its DAGs."""
    from airflow.sdk import DAG

    found = runpy.run_path(str(settings.ROOT / "dags" / "vql_daily_own.py"))
    return {name: value for name, value in found.items() if isinstance(value, DAG) and name != "dag"}


def graph_of(dag) -> dict:
    return {
        task.task_id: {
            "module": getattr(task, "module", type(task).__name__),
            "downstream": sorted(task.downstream_task_ids),
            "pool": task.pool,
            "retries": task.retries,
            "execution_timeout_s": task.execution_timeout.total_seconds(),
            "outlets": [outlet.name for outlet in task.outlets],
        }
        for task in dag.tasks
    }


def commands_of(dag, **context) -> dict[str, list[str]]:
    """Return the command line of every task, with the DAG's own defaults."""
    from jinja2.sandbox import SandboxedEnvironment

    from dags._common import StageOperator

    found = {}
    for task in (task for task in dag.tasks if isinstance(task, StageOperator)):
        made = context_of(**{"dt": "2022-04-21", **context})
        made = made | {"params": {**dag.params.dump(), **made["params"], "raw": "/raw"}}
        rendered = {name: task.render_template(getattr(task, name), made, SandboxedEnvironment()) for name in task.template_fields}
        found[task.task_id] = _copy(task, rendered).command(made)
    return found


def expected_commands(definition, argument: str, dt: str = "2022-04-21") -> dict[str, list[str]]:
    window = definition.window
    words = {"RUNS": settings.runs(), "REPORTS": str(settings.reports()), "TARGET": str(window.target_days), "LOOKBACK": str(window.lookback_days),
             "EVALUATION": str(window.evaluation_days), "HISTORY": str(definition.history.max_events)}  # fmt: skip
    partition = ["--dataset", argument, "--warehouse", settings.warehouse(), "--dt", dt, "--attempt", f"{definition.name}-{dt}-19b04f56-c0"]
    return {
        task: [sys.executable, "-m", text.split()[0], *partition, *(words.get(word, word) for word in text.split()[1:])]
        for task, text in EXPECTED_COMMANDS.items()
    }


def context_of(*, dt=None, start=None, run_type="manual", run_id="manual__1", clear_number=0, partition_key=None, **params):
    run = SimpleNamespace(dag_id="vql_daily_kuairand", run_id=run_id, clear_number=clear_number, partition_key=partition_key, run_type=run_type, data_interval_start=start)
    return {"dag_run": run, "params": {"dt": dt, **params}} | ({"data_interval_start": start} if start else {})


def day(text: str) -> dtm.datetime:
    return dtm.datetime.fromisoformat(text).replace(tzinfo=dtm.UTC)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_import_is_fast_and_light(own):
    code = (
        "import sys, json, airflow.sdk\n"
        "from airflow.sdk import DAG, BaseOperator, Asset, Param, TaskGroup, CronDataIntervalTimetable, chain\n"
        "before = set(sys.modules)\nimport dags.vql_daily, dags.vql_daily_own\n"
        f"print(json.dumps([sorted(set(sys.modules) - before), [m for m in {HEAVY!r} if m in sys.modules],"
        " dags.vql_daily_own.dag.dag_id]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=settings.ROOT, env=settings.environment(), capture_output=True, text=True, check=True)
    modules, heavy, last = json.loads(done.stdout.splitlines()[-1])
    assert last == "vql_daily_shop"
    assert heavy == []
    assert len(modules) < MOST_MODULES, modules


def test_graph_is_the_golden_one(dag):
    graph = graph_of(dag)
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(graph, indent=1) + "\n")
    assert graph == json.loads(GOLDEN.read_text()), "UPDATE_GOLDEN=1 rewrites the file; look at its diff"


def test_the_graph_of_every_data_set_is_the_same(own):
    golden = GOLDEN.read_text()
    for name in built_in_names():
        assert graph_of(dag_of(name)) == json.loads(golden.replace("_kuairand", f"_{name}"))
    assert graph_of(own_dags()["vql_daily_shop"]) == json.loads(golden.replace("_kuairand", "_shop"))


def test_every_built_in_data_set_has_a_dag_of_its_own_days_and_defaults():
    from dags import vql_daily

    assert {name for name in vars(vql_daily) if name.startswith("vql_daily_")} == {f"vql_daily_{name}" for name in built_in_names()}
    for name in built_in_names():
        definition, dag = dataset(name), dag_of(name)
        assert dag.dag_id == f"vql_daily_{name}" == settings.dag_id(name)
        assert dag.start_date == day(str(definition.first_day))
        assert dag.end_date == (day(str(definition.last_day)) if definition.last_day else None)
        assert definition.title in dag.dag_display_name
        assert name in dag.tags
        defaults = dag.params.dump()  # checks them, too
        assert {key: defaults[key] for key in ("target_days", "lookback_days", "evaluation_days", "max_history", "raw")} == {
            **definition.window.model_dump(), "max_history": definition.history.max_events, "raw": settings.raw(name),
        }  # fmt: skip
        assert settings.raw(name).endswith(f"/raw/{name}")
        outlets = {task.task_id: outlet for task in dag.tasks for outlet in task.outlets}
        assert outlets["sequences.audit_sequences"].uri == f"longview://{name}/sequences"
        assert outlets["register.promote_model"].name == f"vql_champion_{name}"  # an alias: events on promotion alone
        promote = dag.get_task("register.promote_model")
        assert promote.champion.uri == f"longview://{name}/champion"
        assert promote.max_active_tis_per_dag == 1
    # Values that were chosen with thought; a change of a definition shows here.
    starts = {name: (str(dag_of(name).start_date.date()), str(dag_of(name).end_date.date())) for name in ("kuairand", "kuairec_big", "tmall", "movielens")}
    assert starts == {"kuairand": ("2022-04-08", "2022-05-08"), "kuairec_big": ("2020-07-04", "2020-09-05"), "tmall": ("2014-05-11", "2014-11-12"),
                      "movielens": ("1996-03-29", "2018-09-24")}  # fmt: skip


def test_every_task_has_a_retry_a_timeout_and_a_pool_that_is_made(own):
    for dag in (*map(dag_of, built_in_names()), own_dags()["vql_daily_shop"]):
        for task in dag.tasks:
            assert task.retries == len(settings.retry_waits())
            assert task.has_retry_policy
            assert task.retry_delay <= dtm.timedelta(minutes=1)
            assert task.execution_timeout
            assert task.pool in {"default_pool", *settings.POOLS}
        assert (dag.max_active_runs, dag.catchup) == (1, False)
        assert dag.dagrun_timeout
        assert dag.doc_md
        assert dag.tags


@pytest.mark.parametrize("name", built_in_names())
def test_commands_are_those_of_the_stage_table(name):
    assert commands_of(dag_of(name)) == expected_commands(dataset(name), name)


def _copy(task, attributes):
    copy = type(task).__new__(type(task))
    copy.__dict__.update(task.__dict__)
    for name, value in attributes.items():
        object.__setattr__(copy, name, value)
    return copy


# ---- own data sets ---------------------------------------------------------------------------------------------------


def test_an_own_definition_has_a_dag_whose_stages_get_its_path(own):
    [(name, dag)] = own_dags().items()
    assert name == dag.dag_id == "vql_daily_shop"
    assert (dag.start_date, dag.end_date) == (day("2023-01-02"), None)
    assert dag.dag_display_name == "VQL daily: My shop"
    assert {"target_days": 5, "lookback_days": 9, "evaluation_days": 2, "max_history": 77}.items() <= dag.params.dump().items()
    commands = commands_of(dag, dt="2023-02-01")
    assert commands == expected_commands(dataset(str(own)), str(own), "2023-02-01")
    assert all(command[command.index("--attempt") + 1] == "shop-2023-02-01-19b04f56-c0" for command in commands.values())
    # What Airflow serializes, and reads again in a task's process, is the same.
    assert own_dags()[name].params.dump() == dag.params.dump()


def test_without_own_definitions_there_is_no_own_dag(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGVIEW_DEFINITIONS", str(tmp_path / "nowhere"))
    assert own_dags() == {}


def test_the_data_set_of_a_dag_is_no_parameter_and_no_template():
    # One DAG is one data set: its days, its defaults and its asset belong to it.
    from dags._common import StageOperator

    assert "dataset" not in dag_of("kuairand").params
    assert list(StageOperator.template_fields) == ["arguments"]


@pytest.mark.parametrize(
    ("file", "wrong", "says"),
    [
        ("broken", "name: broken\nlogs: [", "not YAML"),
        ("broken", OWN.replace("shop", "broken").replace("max_events: 77", "max_events: none"), "history.max_events"),
        ("broken", OWN, "has the name 'shop'"),
        ("tmall", OWN.replace("shop", "tmall"), "has the name of a data set that comes with the project"),
    ],
)
def test_a_wrong_own_definition_is_an_import_error_of_its_file_only(own, file, wrong, says):
    from airflow.dag_processing.dagbag import DagBag

    (own.parent / f"{file}.yaml").write_text(wrong)
    with pytest.raises(StageError, match=says):
        own_dags()
    bag = DagBag(dag_folder=str(settings.ROOT / "dags"))
    [(where, error)] = bag.import_errors.items()
    assert Path(where).name == "vql_daily_own.py"
    assert f"{file}.yaml" in error
    assert says in error
    assert set(bag.dags) == {f"vql_daily_{name}" for name in built_in_names()}
    (own.parent / f"{file}.yaml").unlink()
    mended = DagBag(dag_folder=str(settings.ROOT / "dags"))
    assert mended.import_errors == {}
    assert set(mended.dags) == {f"vql_daily_{name}" for name in (*built_in_names(), "shop")}


# ---- which day -------------------------------------------------------------------------------------------------------


def test_a_scheduled_run_builds_the_day_that_has_just_ended(dag):
    # A plain cron string would fire on the 22nd with ds = 22nd: the day that has only begun.
    from airflow.timetables.interval import CronDataIntervalTimetable

    timetable = CronDataIntervalTimetable("0 0 * * *", timezone="UTC")
    assert type(dag.timetable).__name__ == "CronDataIntervalTimetable"
    import pendulum

    interval = timetable.infer_manual_data_interval(run_after=pendulum.datetime(2022, 4, 22, 0, 0, tz="UTC"))
    from dags._common import partition_of

    assert partition_of(context_of(start=interval.start, run_type="scheduled")) == "2022-04-21"


def test_partition_comes_from_key_then_dt_then_interval():
    from dags._common import partition_of

    assert partition_of(context_of(partition_key="2022-04-19", dt="2022-04-20", start=day("2022-04-21"))) == "2022-04-19"
    assert partition_of(context_of(dt="2022-04-20", start=day("2022-04-21"))) == "2022-04-20"
    assert partition_of(context_of(start=day("2022-04-21"), run_type="backfill")) == "2022-04-21"


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (context_of(), "names no partition"),
        (context_of(dt="2022-02-30"), "not a day"),
        (context_of(dt="2022-04-20", start=day("2022-04-21"), run_type="backfill"), "leave dt empty"),
    ],
)
def test_a_run_without_one_clear_day_fails(context, message):
    from dags._common import partition_of

    with pytest.raises(AirflowFailException, match=message):
        partition_of(context)


def test_attempt_is_kept_over_retries_and_new_when_cleared():
    from dags._common import attempt_of

    first = attempt_of(context_of(), "kuairand", "2022-04-21")
    assert first == attempt_of(context_of(), "kuairand", "2022-04-21")
    assert first != attempt_of(context_of(clear_number=1), "kuairand", "2022-04-21")
    assert first != attempt_of(context_of(run_id="manual__2"), "kuairand", "2022-04-21")


# ---- the note of a run -----------------------------------------------------------------------------------------------


def test_of_a_note_that_gets_too_long_the_oldest_lines_go():
    from dags._notes import LONGEST_NOTE, with_line

    assert with_line([], "dt=2022-04-21") == "dt=2022-04-21"
    note = ""
    for number in range(200):
        note = with_line(note.splitlines(), f"line {number}")
    assert len(note) <= LONGEST_NOTE
    assert note.splitlines()[-1] == "line 199"
    assert len(with_line(["old"], "x" * 5_000)) == LONGEST_NOTE


def test_a_note_that_cannot_be_written_costs_the_task_nothing(monkeypatch, tmp_path, caplog):
    from dags._notes import append_note

    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path))
    monkeypatch.setenv("LONGVIEW_AIRFLOW_PORT", "1")  # nobody listens
    append_note({"dag_run": SimpleNamespace(dag_id="d", run_id="r")}, "promoted")
    assert "this log only" in caplog.text


# ---- the trigger form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("raw", "/data; rm -rf /"), ("raw", "/data/$(id)"), ("raw", "/data`id`"), ("raw", "/a|b"), ("raw", "/a&b"), ("raw", "relative/x"),
        ("raw", "--help"), ("raw", "/a\nb"), ("raw", "/a'b"), ("raw", '/a"b'), ("raw", "/a>b"), ("raw", ""), ("raw", "/a\n"), ("raw", "/a\\b"), ("raw", "/a*"), ("config", "a\n"),
        ("raw", "s3://key:secret@bucket"), ("raw", "s3://key@bucket/x"), ("raw", "s3://key:se/cret@bucket"), ("raw", "s3://bucket/x?region=$(id)"), ("raw", "s3://bucket/x?a=b;c"),
        ("raw", "/a?b"), ("raw", "s3://bucket/x?a=b\n"), ("raw", "s3://bucket/x&y"), ("raw", "abfss://box:secret@account.dfs.core.windows.net/x"),
        ("dt", "2022-04-21\n"),
        ("config", "../x"), ("config", "a;b"), ("config", ""), ("dt", "yesterday"), ("dt", "2022-4-1"), ("dt", "2022-04-21; ls"),
        ("warm_start", "other"), ("target_days", 1), ("target_days", "14"), ("workers", 0), ("max_history", 0), ("lookback_days", 1.5), ("lookback_days", 36_501),
        ("evaluation_days", 0), ("evaluation_days", "1"), ("on_warning", "wait"), ("on_warning", None),
    ],
)  # fmt: skip
def test_the_form_refuses(dag, name, value):
    param = dag.params.get_param(name)
    with pytest.raises(ParamValidationError):
        param.resolve(value)


@pytest.mark.parametrize(("name", "value"), [("raw", "/data/KuaiRand-1K/data"), ("raw", "s3://bucket/a/b=c"), ("raw", "/my data/é"), ("dt", "2022-04-21"), ("dt", None),
                                             ("raw", S3_RAW), ("raw", "s3://bucket?region=eu-central-1"), ("raw", "s3://bucket/me@example.org/x"),
                                             ("raw", "abfss://box@account.dfs.core.windows.net/x"), ("raw", "hdfs://namenode:9000/x")])  # fmt: skip
def test_the_form_accepts(dag, name, value):
    assert dag.params.get_param(name).resolve(value) == value


def test_raw_logs_of_all_data_sets_on_s3_are_the_forms_default(monkeypatch):
    monkeypatch.setenv("LONGVIEW_RAW", S3_RAW)
    found = runpy.run_path(str(settings.ROOT / "dags" / "vql_daily.py"))
    raw = found["vql_daily_tmall"].params.get_param("raw")
    assert raw.resolve() == S3_RAW.replace("/logs?", "/logs/tmall?")


def test_every_parameter_explains_itself():
    for dag in map(dag_of, built_in_names()):
        for name in dag.params:
            param = dag.params.get_param(name)
            assert param.schema["title"]
            assert param.description


# ---- a stage's end ---------------------------------------------------------------------------------------------------


def run_code(tmp_path, monkeypatch, code: str, dataset: str = "kuairand"):
    """Return a StageOperator whose stage is `code`, and a function that executes it."""
    from dags._common import StageOperator

    script = tmp_path / "stage.py"
    script.write_text(code)
    command = [sys.executable, str(script), "--dt", "2022-04-21", "--attempt", "a"]
    monkeypatch.setattr(StageOperator, "command", lambda self, context: command)
    operator = StageOperator(task_id="stage", module="stage", dataset=dataset)
    return operator, lambda: operator.execute(context_of(dt="2022-04-21"))


@pytest.mark.parametrize(("dataset", "name"), [("kuairand", "kuairand"), ("/home/me/shop.yaml", "shop")])
def test_success_returns_the_partition(tmp_path, monkeypatch, dataset, name):
    _, execute = run_code(tmp_path, monkeypatch, "print('fine')", dataset)
    assert execute() == {"dataset": name, "dt": "2022-04-21", "attempt": "a"}


def test_what_a_stage_says_of_an_error_stands_at_that_level_in_the_log(tmp_path, monkeypatch):
    from structlog.testing import capture_logs

    code = "import sys\nprint('noise')\nprint('error: no raw rows', file=sys.stderr)\nprint('  remedy: give RAW', file=sys.stderr)\nprint('late', file=sys.stderr)\nsys.exit(2)"
    _, execute = run_code(tmp_path, monkeypatch, code)
    with capture_logs() as records, pytest.raises(SystemExit) as ended:
        execute()
    assert ended.value.code == EXIT_MEND
    said = {record["event"]: record["log_level"] for record in records}
    assert {"noise": "info", "error: no raw rows": "error", "  remedy: give RAW": "error", "late": "info"}.items() <= said.items()
    assert said["stage found something to mend and is not tried again (exit code 2)"] == "error"


def test_what_may_pass_by_itself_is_retried_for_ten_minutes_a_crash_once_and_the_rest_never():
    from airflow.sdk import RetryAction

    [(policy, retries)] = {(task.retry_policy, task.retries) for task in dag_of("kuairand").tasks}
    waits = settings.retry_waits()
    assert retries == len(waits)
    assert sum(waits) >= 600
    assert waits == sorted(waits)

    def after(code: int | None, tried: int, cleared_after: int = 0):
        decision = policy.evaluate(SystemExit(code) if code is not None else RuntimeError("odd"), cleared_after + tried, cleared_after + retries)
        return decision.action, decision.retry_delay and decision.retry_delay.total_seconds()

    for cleared_after in (0, 3):  # clearing a task begins the count anew
        assert [after(EXIT_TRY_AGAIN, tried, cleared_after) for tried in range(1, retries + 1)] == [(RetryAction.RETRY, wait) for wait in waits]
        for code in (EXIT_MEND, EXIT_GATE):
            assert after(code, 1, cleared_after)[0] is RetryAction.FAIL
        for code in (1, -9, None):
            assert after(code, 1, cleared_after) == (RetryAction.RETRY, 20)
            assert after(code, 2, cleared_after)[0] is RetryAction.FAIL


@pytest.mark.parametrize("code", [0, EXIT_MEND, EXIT_GATE, EXIT_TRY_AGAIN, 1])
def test_a_report_that_does_not_get_into_mlflow_changes_nothing_of_a_gates_end(tmp_path, monkeypatch, code):
    from dags._common import StageOperator
    from dags._gates import GateOperator, ReportLink

    script = tmp_path / "gate.py"
    script.write_text(f"import sys; sys.exit({code})")
    monkeypatch.setattr(StageOperator, "command", lambda self, context: [sys.executable, str(script), "--dt", "2022-04-21", "--attempt", "a"])
    gate = GateOperator(task_id="gate", module="gate", dataset="kuairand", reports=str(tmp_path / "no reports"))
    if code == 0:
        assert gate.execute(context_of(dt="2022-04-21"))["attempt"] == "a"
    else:
        with pytest.raises(SystemExit) as ended:
            gate.execute(context_of(dt="2022-04-21"))
        assert ended.value.code == code
    assert ReportLink().get_link(gate, ti_key=None) == ""


@pytest.mark.parametrize(("code", "expected"), [("raise ValueError('odd')", 1), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9)])
def test_a_crash_has_a_code_of_its_own(tmp_path, monkeypatch, code, expected):
    _, execute = run_code(tmp_path, monkeypatch, code)
    with pytest.raises(SystemExit) as ended:
        execute()
    assert ended.value.code == expected


def test_the_stage_does_not_see_airflows_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "s3cret")
    _, execute = run_code(tmp_path, monkeypatch, "import os, sys; sys.exit(any(n.startswith('AIRFLOW__') for n in os.environ))")
    execute()


def test_killing_the_task_ends_the_stage_and_its_children(tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(900)'])\n"
        f"open({str(pids)!r} + '.tmp', 'w').write(f'{{os.getpid()}} {{child.pid}}'); os.rename({str(pids)!r} + '.tmp', {str(pids)!r})\n"
        "time.sleep(900)\n"
    )
    operator, execute = run_code(tmp_path, monkeypatch, code)

    def kill(_signum, _frame):
        operator.on_kill()

    def kill_when_it_runs():
        wait_for("stage", pids.exists)
        os.kill(os.getpid(), signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, kill)
    killer = threading.Thread(target=kill_when_it_runs)
    killer.start()
    try:
        with pytest.raises(SystemExit):
            execute()
    finally:
        killer.join()
        signal.signal(signal.SIGALRM, previous)
    from infra.services import alive

    wait_for("end of stage and child", lambda: not any(alive(pid) for pid in map(int, pids.read_text().split())))


# ---- what became of a model ------------------------------------------------------------------------------------------


def promote_task(tmp_path, monkeypatch, outcome: str, aliases: list[str], code: str = "print('fine')"):
    """Return the task of promotion whose stage is `code`, what executes it, and its context."""
    from airflow.sdk import Asset
    from airflow.sdk.execution_time.context import OutletEventAccessors

    from dags._common import StageOperator
    from dags._release import PromoteOperator

    (tmp_path / "stage.py").write_text(code)
    (tmp_path / "a").mkdir()
    registration = {"model_name": "vql_kuairand", "version": "3", "run_id": "abc", "experiment_id": "7", "aliases": aliases, "outcome": outcome,
                    "gate": {"passed": outcome != "refused", "reason": "the reason"}, "digests": {"model.digest": "d"}}  # fmt: skip
    (tmp_path / "a" / "registration.json").write_text(json.dumps(registration))
    monkeypatch.setattr(StageOperator, "command", lambda self, context: [sys.executable, str(tmp_path / "stage.py"), "--dt", "2022-04-21", "--attempt", "a"])
    task = PromoteOperator(task_id="promote", module="evaluation.promote", dataset="kuairand", runs=str(tmp_path), champion=Asset(name="c", uri="longview://c/champion"))
    context = context_of(dt="2022-04-21") | {"outlet_events": OutletEventAccessors()}
    return task, lambda: task.execute(context), context


@pytest.mark.parametrize(("outcome", "aliases", "event"), [("promoted", ["challenger", "champion"], True), ("promoted", ["previous_champion"], False),
                                                           ("kept", ["challenger"], False), ("refused", ["challenger"], False)])  # fmt: skip
def test_the_outcome_of_a_promotion_stands_on_the_run_and_only_a_promotion_is_an_event(tmp_path, monkeypatch, outcome, aliases, event):
    from dags import _release
    from dags._links import MlflowRunLink, ModelVersionLink
    from evaluation import promote

    assert set(_release.SAID) == set(promote.SAID)
    notes: list[str] = []
    monkeypatch.setattr(_release, "append_note", lambda context, line: notes.append(line))
    task, execute, context = promote_task(tmp_path, monkeypatch, outcome, aliases)
    found = execute()
    assert {"outcome": outcome, "reason": "the reason", "version": "3", "dt": "2022-04-21"}.items() <= found.items()
    assert notes == [f"{_release.SAID[outcome]}: vql_kuairand version 3, the reason"]
    events = context["outlet_events"][task.alias].asset_alias_events
    assert [one.dest_asset_key.uri for one in events] == ["longview://c/champion"] * event
    for one in events:
        assert {"dt": "2022-04-21", "attempt": "a", "version": "3", "model.digest": "d"}.items() <= one.extra.items()
    assert MlflowRunLink().get_link(task, ti_key=None).endswith("/#/experiments/7/runs/abc")
    assert ModelVersionLink().get_link(task, ti_key=None).endswith("/#/models/vql_kuairand/versions/3")


def test_a_promotion_that_failed_says_nothing_and_still_leads_to_its_run(tmp_path, monkeypatch):
    task, execute, context = promote_task(tmp_path, monkeypatch, "promoted", ["champion"], "import sys; sys.exit(75)")
    with pytest.raises(SystemExit):
        execute()
    assert not context["outlet_events"][task.alias].asset_alias_events
    assert task.run_url.endswith("/runs/abc")


def test_a_stage_knows_the_address_of_its_run(tmp_path, monkeypatch):
    _, execute = run_code(tmp_path, monkeypatch, f"import os; open({str(tmp_path / 'url')!r}, 'w').write(os.environ['LONGVIEW_AIRFLOW_RUN_URL'])")
    execute()
    assert (tmp_path / "url").read_text() == f"{settings.airflow_url()}/dags/vql_daily_kuairand/runs/manual__1"


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_mlflow_run_of_a_task_that_failed_or_was_killed_ends(tmp_path, monkeypatch, status):
    """Airflow asks for the first when the task has failed for good, for the second when it is marked as failed or times out."""
    operator, execute = run_code(tmp_path, monkeypatch, "import sys; sys.exit(1)")
    said = tmp_path / "said"
    monkeypatch.setattr(operator, "_ended", lambda status: [sys.executable, "-c", f"open({str(said)!r}, 'w').write({status!r})"])
    with pytest.raises(SystemExit):
        execute()
    if status == "KILLED":
        operator.on_kill()
    [callback] = operator.on_failure_callback
    callback({"task": operator})
    wait_for("end of the run", lambda: said.exists() and said.read_text())
    assert said.read_text() == status

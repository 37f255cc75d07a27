"""The DAG: what it is made of, which day it builds, what it refuses, and how a stage's end becomes a task's end."""

from __future__ import annotations

import datetime as dtm
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, ParamValidationError

from etl.cli import EXIT_STAGE_ERROR
from infra import settings

pytestmark = pytest.mark.airflow

GOLDEN = Path(__file__).parent / "golden" / "vql_daily_kuairand.json"
HEAVY = ("torch", "pyspark", "mlflow", "ray", "pandas", "great_expectations", "pyarrow")
EXPECTED_COMMANDS = {
    "ingest.build_events": "etl.jobs.events --raw /raw --lookback-days 30",
    "ingest.audit_events": "etl.quality.audit --stage events --reports REPORTS",
    "sequences.build_sequences": "etl.jobs.sequences --raw /raw --target-days 14 --lookback-days 30 --max-history 4000",
    "sequences.audit_sequences": "etl.quality.audit --stage sequences --reports REPORTS",
    "train.audit_training_input": "etl.quality.audit --stage training_input --reports REPORTS",
    "train.train_models": "training.main --runs RUNS --workers 2 --config default",
    "evaluate.evaluate_models": "evaluation.main --runs RUNS --raw /raw",
    "register.register_model": "evaluation.register --runs RUNS",
    "register.promote_model": "evaluation.promote --runs RUNS",
    "caches.build_user_caches": "training.caches --runs RUNS",
}


@pytest.fixture(scope="module")
def dag():
    from dags import vql_daily

    return vql_daily.ingest.dag


def context_of(*, dt=None, start=None, run_type="manual", run_id="manual__1", clear_number=0, partition_key=None, **params):
    run = SimpleNamespace(run_id=run_id, clear_number=clear_number, partition_key=partition_key, run_type=run_type, data_interval_start=start)
    return {"dag_run": run, "params": {"dt": dt, **params}} | ({"data_interval_start": start} if start else {})


def day(text: str) -> dtm.datetime:
    return dtm.datetime.fromisoformat(text).replace(tzinfo=dtm.UTC)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_import_is_fast_and_light():
    code = (
        "import sys, time, json, airflow.sdk\n"
        "from airflow.sdk import DAG, BaseOperator, Asset, Param, TaskGroup, CronDataIntervalTimetable, chain\n"
        "start = time.process_time()\nimport dags.vql_daily\n"
        f"print(json.dumps([time.process_time() - start, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=settings.ROOT, env=settings.environment(), capture_output=True, text=True, check=True)
    seconds, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    assert seconds < 1.0


def test_graph_is_the_golden_one(dag):
    graph = {
        task.task_id: {
            "module": task.module,
            "downstream": sorted(task.downstream_task_ids),
            "pool": task.pool,
            "retries": task.retries,
            "execution_timeout_s": task.execution_timeout.total_seconds(),
            "outlets": [outlet.name for outlet in task.outlets],
        }
        for task in dag.tasks
    }
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(graph, indent=1) + "\n")
    assert graph == json.loads(GOLDEN.read_text()), "UPDATE_GOLDEN=1 rewrites the file; look at its diff"


def test_every_task_has_a_retry_a_timeout_and_a_pool_that_is_made(dag):
    for task in dag.tasks:
        assert task.retries == 1
        assert task.retry_delay <= dtm.timedelta(minutes=1)
        assert task.execution_timeout
        assert task.pool in {"default_pool", *settings.POOLS}
    assert (dag.max_active_runs, dag.catchup) == (1, False)
    assert dag.dagrun_timeout
    assert dag.doc_md
    assert dag.tags


def test_commands_are_those_of_the_stage_table(dag):
    from jinja2.sandbox import SandboxedEnvironment

    context = context_of(dt="2022-04-21") | {"params": {**dag.params.dump(), "dt": "2022-04-21", "raw": "/raw"}}
    for task in dag.tasks:
        rendered = task.render_template([task.dataset, *task.arguments], context, SandboxedEnvironment())
        task = _copy(task, rendered[0], rendered[1:])
        command = task.command(context)
        module, rest = EXPECTED_COMMANDS[task.task_id].split(" ", 1)
        partition = ["--dataset", "kuairand", "--warehouse", settings.warehouse(), "--dt", "2022-04-21",
                     "--attempt", "kuairand-2022-04-21-19b04f56-c0"]  # fmt: skip
        assert command == [sys.executable, "-m", module, *partition, *rest.replace("RUNS", settings.runs()).replace("REPORTS", str(settings.reports())).split()]


def _copy(task, dataset, arguments):
    from dags._common import StageOperator

    copy = StageOperator.__new__(StageOperator)
    copy.__dict__.update(task.__dict__)
    object.__setattr__(copy, "dataset", dataset)
    object.__setattr__(copy, "arguments", arguments)
    return copy


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


# ---- the trigger form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("raw", "/data; rm -rf /"), ("raw", "/data/$(id)"), ("raw", "/data`id`"), ("raw", "/a|b"), ("raw", "/a&b"), ("raw", "relative/x"),
        ("raw", "--help"), ("raw", "/a\nb"), ("raw", "/a'b"), ("raw", '/a"b'), ("raw", "/a>b"), ("raw", ""), ("raw", "/a\n"), ("raw", "/a\\b"), ("raw", "/a*"), ("config", "a\n"),
        ("dt", "2022-04-21\n"),
        ("config", "../x"), ("config", "a;b"), ("config", ""), ("dt", "yesterday"), ("dt", "2022-4-1"), ("dt", "2022-04-21; ls"),
        ("dataset", "other"), ("target_days", 1), ("target_days", "14"), ("workers", 0), ("max_history", 0), ("lookback_days", 1.5),
    ],
)  # fmt: skip
def test_the_form_refuses(dag, name, value):
    param = dag.params.get_param(name)
    with pytest.raises(ParamValidationError):
        param.resolve(value)


@pytest.mark.parametrize(("name", "value"), [("raw", "/data/KuaiRand-1K/data"), ("raw", "s3://bucket/a/b=c"), ("raw", "/my data/é"), ("dt", "2022-04-21"), ("dt", None)])
def test_the_form_accepts(dag, name, value):
    assert dag.params.get_param(name).resolve(value) == value


def test_every_parameter_explains_itself(dag):
    for name in dag.params:
        param = dag.params.get_param(name)
        assert param.schema["title"]
        assert param.description


# ---- a stage's end ---------------------------------------------------------------------------------------------------


def run_code(tmp_path, monkeypatch, code: str):
    """Return a StageOperator whose stage is `code`, and a function that executes it."""
    from dags._common import StageOperator

    script = tmp_path / "stage.py"
    script.write_text(code)
    command = [sys.executable, str(script), "--dt", "2022-04-21", "--attempt", "a"]
    monkeypatch.setattr(StageOperator, "command", lambda self, context: command)
    operator = StageOperator(task_id="stage", module="stage", dataset="kuairand")
    return operator, lambda: operator.execute({})


def test_the_exit_code_is_that_of_the_stages():
    from dags import _common

    assert _common.EXIT_STAGE_ERROR == EXIT_STAGE_ERROR


def test_success_returns_the_partition(tmp_path, monkeypatch):
    _, execute = run_code(tmp_path, monkeypatch, "print('fine')")
    assert execute() == {"dataset": "kuairand", "dt": "2022-04-21", "attempt": "a"}


def test_a_stage_error_fails_without_retry_and_says_why(tmp_path, monkeypatch):
    code = "import sys\nprint('noise')\nprint('error: no raw rows', file=sys.stderr)\nprint('  remedy: give RAW', file=sys.stderr)\nsys.exit(2)"
    _, execute = run_code(tmp_path, monkeypatch, code)
    with pytest.raises(AirflowFailException, match=r"error: no raw rows\n  remedy: give RAW"):
        execute()


@pytest.mark.parametrize("code", ["raise ValueError('odd')", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_other_failures_may_be_retried(tmp_path, monkeypatch, code):
    _, execute = run_code(tmp_path, monkeypatch, code)
    with pytest.raises(AirflowException) as caught:
        execute()
    assert not isinstance(caught.value, AirflowFailException)


def test_the_stage_does_not_see_airflows_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "s3cret")
    _, execute = run_code(tmp_path, monkeypatch, "import os, sys; sys.exit(any(n.startswith('AIRFLOW__') for n in os.environ))")
    execute()


def test_killing_the_task_ends_the_stage_and_its_children(tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pids)!r} + '.tmp', 'w').write(f'{{os.getpid()}} {{child.pid}}'); os.rename({str(pids)!r} + '.tmp', {str(pids)!r})\n"
        "time.sleep(60)\n"
    )
    operator, execute = run_code(tmp_path, monkeypatch, code)

    def kill(_signum, _frame):
        operator.on_kill()

    previous = signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(AirflowException):
            execute()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    time.sleep(0.2)
    from infra.services import alive

    assert [pid for pid in map(int, pids.read_text().split()) if alive(pid)] == []

"""The DAGs.

What they are made of, which day a run builds, what they refuse, and how a stage's end becomes a task's end.
"""

from __future__ import annotations

import contextlib
import datetime as dtm
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import ParamValidationError
from structlog.testing import capture_logs

from etl.datasets.definition import SHORTEST_RETENTION_DAYS, built_in_names, dataset
from etl.stage.errors import EXIT_CORRECT, EXIT_GATE, EXIT_TRY_AGAIN, StageError
from infra import settings
from tests.waiting import wait_for

pytestmark = pytest.mark.airflow

# as docs/cluster.md has it
S3_RAW = "s3://bucket/logs?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9000&allow_delayed_open=true"
START = "start"
GOLDEN = Path(__file__).parent / "golden" / "vql_daily_kuairand.json"
HEAVY = ("torch", "pyspark", "mlflow", "ray", "pandas", "great_expectations", "pyarrow")
MOST_MODULES = 100  # that a DAG file may import besides Airflow itself, which parses it every 15 seconds
EXPECTED_COMMANDS = {
    "ingest.build_events": "etl.jobs.events --raw /raw --lookback-days LOOKBACK --reports REPORTS",
    "ingest.audit_events": "etl.quality.judge.audit --stage events --reports REPORTS",
    "sequences.build_sequences": (
        "etl.jobs.sequences --raw /raw --target-days TARGET --lookback-days LOOKBACK --evaluation-days EVALUATION"
        " --max-history HISTORY --reports REPORTS"
    ),
    "sequences.audit_sequences": "etl.quality.judge.audit --stage sequences --reports REPORTS",
    "train.audit_training_input": "etl.quality.judge.audit --stage training_input --reports REPORTS",
    "train.train_models": "training.train --workers 2 --config default --warm-start none --runs RUNS",
    "evaluate.evaluate_models": "evaluation.evaluate --runs RUNS --raw /raw --reports REPORTS",
    "register.register_model": "evaluation.release.register --runs RUNS",
    "register.promote_model": "evaluation.release.promote --runs RUNS",
    "caches.build_user_caches": "evaluation.user_caches --runs RUNS",
    "prune": "evaluation.prune --runs RUNS --reports REPORTS",
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
    from dags._common import StageOperator

    found = {}
    for task in (task for task in dag.tasks if isinstance(task, StageOperator)):
        made = context_of(**{"dt": "2022-04-21", **context})
        made = made | {
            "ti": ti_of(
                attempt(dag.dag_id.removeprefix("vql_daily_"), made["params"]["dt"]),
                made["params"]["dt"],
                {**dag.params.dump(), "raw": "/raw"},
            )
        }
        prepared = task.prepare_for_execution()
        prepared.render_template_fields(made)
        found[task.task_id] = prepared.command()
    return found


def executed(task, context):
    """Do a task's work as Airflow does it."""
    task.render_template_fields(context)
    return task.execute(context)


def expected_commands(definition, argument: str, dt: str = "2022-04-21") -> dict[str, list[str]]:
    window = definition.window
    words = {
        "RUNS": settings.runs(),
        "REPORTS": str(settings.reports()),
        "TARGET": str(window.target_days),
        "LOOKBACK": str(window.lookback_days),
        "EVALUATION": str(window.evaluation_days),
        "HISTORY": str(definition.history.max_events),
    }
    partition = [
        "--dataset",
        argument,
        "--warehouse",
        settings.warehouse(),
        "--dt",
        dt,
        "--attempt",
        attempt(definition.name, dt),
    ]
    return {
        task: [sys.executable, "-m", text.split()[0], *partition, *(words.get(word, word) for word in text.split()[1:])]
        for task, text in EXPECTED_COMMANDS.items()
    }


def attempt(dataset: str, dt: str) -> str:
    return f"{dataset}-{dt}-0123456789ab"


def ti_of(name: str = "", dt: str = "2022-04-21", params=None, id="1"):
    """Return a task instance as far as it is looked at: its id, and what the first task of its run has handed on."""
    handed = {"dt": dt, "attempt": name, "params": params or {}} if name else None
    done = {"attempt": name}  # by every task
    return SimpleNamespace(
        id=id,
        xcom_pull=lambda task_ids=START, key="return_value": (
            {START: handed}.get(task_ids, done) if key == "return_value" else None
        ),
        get_task_states=lambda dag_id, run_ids, task_ids: {run_ids[0]: dict.fromkeys(task_ids, "success")},
    )


def context_of(*, dt=None, start=None, run_type="manual", ti=None, conf=None, **params):
    run = SimpleNamespace(
        dag_id="d", run_id="manual__1", run_type=run_type, data_interval_start=start, run_after=start, conf=conf or {}
    )
    return {
        "dag_run": run,
        "params": {"dt": dt, **params},
        "ti": ti or ti_of(attempt("kuairand", dt or "2022-04-21"), dt or "2022-04-21"),
    } | ({"data_interval_start": start} if start else {})


def day(text: str) -> dtm.datetime:
    return dtm.datetime.fromisoformat(text).replace(tzinfo=dtm.UTC)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_cluster_scores_and_makes_caches_with_the_workers_of_the_run(own, monkeypatch):
    spread = {"evaluate.evaluate_models", "register.promote_model", "caches.build_user_caches"}
    alone = commands_of(own_dags()["vql_daily_shop"])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    over_ray = commands_of(own_dags()["vql_daily_shop"])
    assert {task for task, command in over_ray.items() if command != alone[task]} == spread
    for task in spread:
        command = over_ray[task]
        place = command.index("--workers")
        assert command[place + 1] == "2" and [*command[:place], *command[place + 2 :]] == alone[task]


def test_import_is_fast_and_light(own):
    code = (
        "import sys, json, airflow.sdk\nfrom airflow.sdk import DAG, BaseOperator, BaseSensorOperator, Asset, Param,"
        " TaskGroup, chain\nimport airflow.timetables.base\nbefore = set(sys.modules)\nimport dags.vql_daily,"
        " dags.vql_daily_own, dags.vql_release, dags.vql_compare\nprint(json.dumps([sorted(set(sys.modules) - before),"
        f" [m for m in {HEAVY!r} if m in sys.modules], dags.vql_daily_own.dag.dag_id]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=settings.ROOT,
        env=settings.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
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

    assert {name for name in vars(vql_daily) if name.startswith("vql_daily_")} == {
        f"vql_daily_{name}" for name in built_in_names()
    }
    for name in built_in_names():
        definition, dag = dataset(name), dag_of(name)
        assert dag.dag_id == f"vql_daily_{name}" == settings.dag_id(name)
        assert {moment for task in (dag, *dag.tasks) for moment in (task.start_date, task.end_date)} == {
            None
        }  # tasks outside them are skipped, and the run is green
        assert definition.title in dag.dag_display_name
        assert name in dag.tags
        defaults = dag.params.dump()  # checks them, too
        assert {
            key: defaults[key] for key in ("target_days", "lookback_days", "evaluation_days", "max_history", "raw")
        } == {
            **definition.window.model_dump(),
            "max_history": definition.history.max_events,
            "raw": settings.raw(name),
        }
        assert settings.raw(name).endswith(f"/raw/{name}")
        outlets = {task.task_id: outlet for task in dag.tasks for outlet in task.outlets}
        assert outlets["sequences.audit_sequences"].uri == f"longview://{name}/sequences"
        assert outlets["register.promote_model"].name == f"vql_champion_{name}"  # an alias: events on promotion alone
        promote = dag.get_task("register.promote_model")
        assert promote.champion.uri == f"longview://{name}/champion"
        assert promote.max_active_tis_per_dag == 1
    # Values that were chosen with thought; a change of a definition shows here.
    days = {
        name: (dag_of(name).timetable.first_day, dag_of(name).timetable.last_day)
        for name in ("kuairand", "kuairec_big", "tmall", "movielens")
    }
    assert days == {
        "kuairand": ("2022-04-08", "2022-05-08"),
        "kuairec_big": ("2020-07-04", "2020-09-05"),
        "tmall": ("2014-05-11", "2014-11-12"),
        "movielens": ("1996-03-29", "2018-09-24"),
    }


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


# ---- own data sets ---------------------------------------------------------------------------------------------------


def test_an_own_definition_has_a_dag_whose_stages_get_its_path(own):
    [(name, dag)] = own_dags().items()
    assert name == dag.dag_id == "vql_daily_shop"
    assert dag.timetable.serialize() == {"first_day": "2023-01-02", "last_day": None, "hour": None}
    assert dag.dag_display_name == "VQL daily: My shop"
    assert {
        "target_days": 5,
        "lookback_days": 9,
        "evaluation_days": 2,
        "max_history": 77,
    }.items() <= dag.params.dump().items()
    commands = commands_of(dag, dt="2023-02-01")
    assert commands == expected_commands(dataset(str(own)), str(own), "2023-02-01")
    # What Airflow serializes, and reads again in a task's process, is the same.
    assert own_dags()[name].params.dump() == dag.params.dump()


def test_only_files_with_dags_are_parsed_every_few_seconds():
    from airflow.utils.file import find_dag_file_paths

    found = find_dag_file_paths(settings.ROOT / "dags", safe_mode=True)
    assert {Path(path).name for path in found} == {
        "vql_daily.py",
        "vql_daily_own.py",
        "vql_release.py",
        "vql_compare.py",
    }


def test_without_own_definitions_there_is_no_own_dag(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGVIEW_DEFINITIONS", str(tmp_path / "nowhere"))
    assert own_dags() == {}


def test_a_task_makes_its_own_dag_alone_and_no_other_definition_stops_it(own, monkeypatch):
    """Airflow reads the file anew in the process of each task."""
    (own.parent / "wrong.yaml").write_text("name: wrong\nlogs: [")
    monkeypatch.setenv("_AIRFLOW_PARSING_CONTEXT_DAG_ID", "vql_daily_shop")
    monkeypatch.setenv("_AIRFLOW_PARSING_CONTEXT_TASK_ID", "start")
    assert set(own_dags()) & {"vql_daily_shop", "vql_daily_wrong"} == {"vql_daily_shop"}
    monkeypatch.setenv("_AIRFLOW_PARSING_CONTEXT_DAG_ID", "vql_daily_kuairand")
    found = runpy.run_path(str(settings.ROOT / "dags" / "vql_daily.py"))
    assert [name for name in found if name.startswith("vql_daily_")] == ["vql_daily_kuairand"]


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
    assert set(bag.dags) == {"vql_compare", "vql_release", *(f"vql_daily_{name}" for name in built_in_names())}
    (own.parent / f"{file}.yaml").unlink()
    corrected = DagBag(dag_folder=str(settings.ROOT / "dags"))
    assert corrected.import_errors == {}
    assert set(corrected.dags) == set(bag.dags) | {"vql_daily_shop"}


# ---- which day -------------------------------------------------------------------------------------------------------


def times(first_day, last_day, hour, monkeypatch, now):
    import pendulum

    from dags._timetable import PartitionDays

    monkeypatch.setattr("dags._timetable.pendulum.now", lambda zone: pendulum.parse(now))
    return PartitionDays(first_day, last_day, hour)


def interval(text: str):
    import pendulum
    from airflow.timetables.base import DataInterval

    return DataInterval(pendulum.parse(text), pendulum.parse(text).add(days=1))


@pytest.mark.parametrize(
    ("last_day", "hour", "now", "last_run", "expected"),
    [
        (None, 6, "2024-03-05T05:59", None, ("2024-03-03", "2024-03-04T06:00")),  # yesterday is not due yet
        (None, 6, "2024-03-05T06:00", None, ("2024-03-04", "2024-03-05T06:00")),
        (None, 0, "2024-03-05T00:00", None, ("2024-03-04", "2024-03-05T00:00")),
        (None, 6, "2024-03-05T06:00", "2024-03-04", ("2024-03-05", "2024-03-06T06:00")),
        (
            None,
            6,
            "2024-03-05T06:00",
            "2024-02-01",
            ("2024-03-04", "2024-03-05T06:00"),
        ),  # what was slept through is not caught up
        (None, 6, "2023-01-01T00:00", None, ("2024-01-01", "2024-01-02T06:00")),  # not before the first day
        ("2024-03-04", 6, "2024-03-05T06:00", None, ("2024-03-04", "2024-03-05T06:00")),
        ("2024-03-04", 6, "2024-03-06T06:00", None, None),  # a finished data set starts no run by itself
        ("2024-03-04", 6, "2024-03-05T06:00", "2024-03-04", None),
        (None, None, "2024-03-05T06:00", None, None),
    ],
)
def test_the_schedule_builds_the_day_that_has_ended_at_its_hour(monkeypatch, last_day, hour, now, last_run, expected):
    from airflow.timetables.base import TimeRestriction

    table = times("2024-01-01", last_day, hour, monkeypatch, now)
    found = table.next_dagrun_info(
        last_automated_data_interval=interval(last_run) if last_run else None,
        restriction=TimeRestriction(None, None, False),
    )
    assert (found and (str(found.data_interval.start.date()), found.run_after.format("YYYY-MM-DDTHH:mm"))) == expected
    if found:
        assert found.data_interval.end - found.data_interval.start == dtm.timedelta(days=1)


@pytest.mark.parametrize("hour", [None, 6])
def test_a_backfill_has_a_run_for_every_day_of_its_range_with_the_day_in_its_id(dag, hour, monkeypatch):
    # Also outside the data set: the run says so; a range without runs would be refused without a reason.
    from airflow.models.dagrun import DagRun
    from airflow.utils.types import DagRunType

    serialized = _round_trip(dag)
    serialized.timetable = times("2022-04-08", "2022-05-08", hour, monkeypatch, "2026-01-01")
    infos = list(serialized.iter_dagrun_infos_between(day("2022-04-06"), day("2022-04-09") + dtm.timedelta(hours=23)))
    assert [str(info.logical_date.date()) for info in infos] == ["2022-04-06", "2022-04-07", "2022-04-08", "2022-04-09"]
    for info in infos:
        identity = DagRun.generate_run_id(
            run_type=DagRunType.BACKFILL_JOB, logical_date=info.logical_date, run_after=info.run_after
        )
        assert identity.startswith(f"backfill__{info.logical_date.date()}T")
        assert (
            serialized.timetable.generate_run_id(
                run_type=DagRunType.SCHEDULED, run_after=info.run_after, data_interval=info.data_interval
            )
            == f"scheduled__{info.logical_date.date()}"
        )


def test_the_timetable_survives_serialisation(dag):
    assert (
        _round_trip(dag).timetable.serialize()
        == dag.timetable.serialize()
        == {
            "first_day": "2022-04-08",
            "last_day": "2022-05-08",
            "hour": None,
        }
    )


def _round_trip(dag):
    from airflow.serialization.serialized_objects import DagSerialization

    return DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(dag))))


def test_partition_comes_from_dt_then_the_day_of_the_logical_date():
    from dags._common import partition_of

    assert partition_of(context_of(dt="2022-04-20", start=day("2022-04-21"))) == "2022-04-20"
    assert partition_of(context_of(start=day("2022-04-21"), run_type="backfill")) == "2022-04-21"


def test_a_manual_run_stands_for_the_day_of_its_logical_date(dag):
    import pendulum

    for moment in (
        "2022-04-21T00:00:00+00:00",
        "2022-04-21T23:59:59+00:00",
        "2022-04-22T01:00:00+02:00",
        "1999-01-01T00:00:00+00:00",
    ):
        found = dag.timetable.infer_manual_data_interval(run_after=pendulum.parse(moment))
        assert found.start == pendulum.parse(moment).in_timezone("UTC").start_of("day")


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

    with pytest.raises(StageError, match=message):
        partition_of(context)


@contextlib.contextmanager
def ended_as_a_stage(says: str, code: int = EXIT_CORRECT):
    """The body is a task that ends with an exit code, after an `error:` and its remedy at error level.

    Yields all lines of its log.
    """
    lines: list[str] = []
    with capture_logs() as records, pytest.raises(SystemExit) as ended:
        yield lines
    lines += [record["event"] for record in records]
    assert ended.value.code == code
    error, remedy, *_ = [record["event"] for record in records if record["log_level"] == "error"]
    assert re.search(f"^error: .*{says}", error), error
    assert remedy.startswith("  remedy: ")


# ---- the first task --------------------------------------------------------------------------------------------------


def started(dag, monkeypatch, conf=None, id="1", **changes):
    """Run a DAG's first task; return what it hands on."""
    conf = conf or {}
    monkeypatch.setattr("dags._start.append_note", lambda context, line: None)  # no Airflow runs here
    params = {**dag.params.dump(), **conf}
    return dag.get_task(START).execute(context_of(ti=ti_of(id=id), conf=conf, **{**params, **changes}))


def test_the_first_task_hands_on_day_attempt_and_parameters(dag, monkeypatch):
    found = started(dag, monkeypatch, {"dt": "2022-04-21", "config": "tiny"})
    assert found["dt"] == "2022-04-21"
    assert found["params"] == {**dag.params.dump(), "dt": "2022-04-21", "config": "tiny"}
    assert found["attempt"].startswith("kuairand-2022-04-21-")
    assert (
        found["attempt"] != started(dag, monkeypatch, {"dt": "2022-04-21", "config": "tiny"}, id="2")["attempt"]
    )  # another row, or a clear


@pytest.mark.parametrize(
    ("conf", "says"),
    [
        ({"confg": "tiny"}, "confg: no parameter of this DAG.*did you mean config"),
        ({"config": "tinny"}, "config: 'tinny' is no training configuration; there are default, kuairand_1k, .*tiny"),
        ({"raw": "data/logs"}, rf"raw: 'data/logs' is relative.*{settings.ROOT}/data/logs"),
        ({"raw": "/a b;c"}, "raw: "),
        ({"raw": "s3://key:s3cret@bucket"}, "raw: .*credentials"),
        ({"workers": 0}, "workers: "),
        ({"workers": "two"}, "workers: two is not a whole number"),
        ({"on_warning": "ask"}, "on_warning: "),
        ({"lookback_days": 3}, "lookback_days: 3 is less than target_days, 14"),
        ({"evaluation_days": 14}, "evaluation_days: 14 leaves no day"),
        ({"dt": "2022-05-09"}, r"dt: 2022-05-09 is outside the data set kuairand: 2022-04-08 \.\. 2022-05-08"),
        ({"dt": "2022-04-07"}, "dt: 2022-04-07 is outside"),
        ({"workers": 0, "config": "x"}, "workers: .*config: "),  # all that is wrong at once
        ({"workers": "4:2"}, "workers: 4:2 is not a whole number"),
    ],
)
def test_the_first_task_refuses_by_the_fields_name(dag, monkeypatch, conf, says):
    notes: list[str] = []
    monkeypatch.setattr("dags._notes.append_note", lambda context, line: notes.append(line))
    with ended_as_a_stage(says) as lines:
        started(dag, monkeypatch, {"dt": "2022-04-21", **conf})
    assert not any("s3cret" in line for line in lines)
    task = dag.get_task(START)
    for callback in task.on_failure_callback:
        callback({"task": task})
    assert re.search(rf"^start failed: this run cannot be done: .*{says.split('.*')[0]}", notes[0])
    assert "s3cret" not in notes[0]


def test_a_day_that_has_not_ended_is_built_only_by_name(own, monkeypatch):
    dag = own_dags()["vql_daily_shop"]
    now = dtm.datetime.now(dtm.UTC)
    with ended_as_a_stage("has not ended; give dt"):
        started(dag, monkeypatch, start=now)
    assert started(dag, monkeypatch, {"dt": str(now.date())})["dt"] == str(now.date())
    tomorrow = str(now.date() + dtm.timedelta(days=1))
    with ended_as_a_stage(rf"dt: {tomorrow} is outside the data set shop: 2023-01-02 \.\. today"):
        started(dag, monkeypatch, {"dt": tomorrow})


def test_each_parameter_says_where_it_comes_from(monkeypatch):
    from dags._start import source

    definition, defaults = dataset("kuairand"), {"raw": "/raw", "config": "default", "dt": None}
    form = {"raw": "/raw", "config": "tiny", "dt": "2022-04-21"}  # the form sends every field
    said = {name: source(name, value, form, defaults, definition) for name, value in form.items()}
    assert said == {"raw": "LONGVIEW_HOME", "config": "this run", "dt": "this run"}
    assert source("config", "default", {}, defaults, definition) == "definition of the data set"
    monkeypatch.setenv("LONGVIEW_RAW", "s3://logs")
    assert source("raw", "/raw", {}, defaults, definition) == "LONGVIEW_RAW"


def test_a_task_whose_run_has_no_attempt_fails_with_the_way_out(dag):
    from dags._common import handed_on

    with pytest.raises(StageError, match=r"remedy: clear the whole run"):
        handed_on({"ti": ti_of()})


def test_a_task_asks_once_what_its_run_is_about(dag):
    asked: list[str] = []
    ti = ti_of("a", params=dag.params.dump())
    answer, ti.xcom_pull = ti.xcom_pull, lambda task_ids: asked.append(task_ids) or answer(task_ids)
    task = dag.get_task("train.audit_training_input").prepare_for_execution()
    task.command = lambda: [sys.executable, "-c", ""]
    task._start_logger = task._log_report = lambda: None
    assert executed(task, context_of(ti=ti))["attempt"] == "a"
    assert asked.count(START) == 1


def test_run_defaults_of_the_definition_are_those_of_the_form(own):
    own.write_text(
        OWN + "run: {raw: '/data/shop', config: tiny, workers: 1:3, on_warning: approve, hour: 6, wait_hours: 2}\n"
    )
    dag = own_dags()["vql_daily_shop"]
    assert {
        "raw": "/data/shop",
        "config": "tiny",
        "workers": "1:3",
        "on_warning": "approve",
    }.items() <= dag.params.dump().items()
    assert dag.timetable.hour == 6
    assert dag.dagrun_timeout >= dtm.timedelta(hours=2 + 12)


def test_nothing_of_a_run_that_still_goes_on_is_old_enough_to_be_removed(own):
    own.write_text(OWN + "run: {hour: 6, wait_hours: 23}\n")
    assert own_dags()["vql_daily_shop"].dagrun_timeout < dtm.timedelta(days=SHORTEST_RETENTION_DAYS)


def test_an_airflow_of_make_run_alone_has_no_schedule(own, monkeypatch):
    own.write_text(OWN + "run: {hour: 6}\n")
    monkeypatch.setenv("LONGVIEW_SCHEDULE", "0")
    assert own_dags()["vql_daily_shop"].timetable.hour is None


# ---- waiting for the day's files -------------------------------------------------------------------------------------


def wait_of(own, monkeypatch, raw: Path, run_type="scheduled", hours_ago=0.0):
    task = own_dags()["vql_daily_shop"].get_task("ingest.wait_for_files")
    context = context_of(run_type=run_type, ti=ti_of("shop-a", "2024-03-04", {"raw": str(raw)}))
    context["dag_run"].run_after = dtm.datetime.now(dtm.UTC) - dtm.timedelta(hours=hours_ago)
    return lambda: task.poke(context)


def test_a_scheduled_run_waits_for_every_file_that_the_day_touches(own, monkeypatch, tmp_path):
    own.write_text(
        OWN + "run: {hour: 6, wait_hours: 2}\nlogs: {files: ['log-*.csv'], days_in_name: {pattern:"
        " 'log-(?P<year>\\d{4})-(?P<month>\\d\\d)-(?P<day>\\d\\d)'}}\n"
    )
    raw = tmp_path / "raw"
    look = wait_of(own, monkeypatch, raw)
    assert look() is False  # no folder
    raw.mkdir()
    assert look() is False  # no file
    (raw / "log-2024-03-04.csv").touch()
    assert look() is False  # local days of Asia/Shanghai: the UTC day ends in the next one
    late = wait_of(own, monkeypatch, raw, hours_ago=2.01)
    with ended_as_a_stage(
        r"did not come by .* UTC: no file that matches log-\*\.csv has 2024-03-05 in its name \(days of"
        r" Asia/Shanghai\); the last is log-2024-03-04\.csv"
    ):
        late()
    (raw / "log-2024-03-05.csv").touch()
    assert look() is True
    assert late() is True


def test_files_without_days_in_their_names_have_to_have_changed(own, monkeypatch, tmp_path):
    own.write_text(OWN + "run: {hour: 6}\nlogs: {files: ['log*.csv'], days_in_name: null}\n")
    file = tmp_path / "log.csv"
    file.touch()
    look = wait_of(own, monkeypatch, tmp_path)
    for moment, there in (("2024-03-03T23:59", False), ("2024-03-04T00:01", True)):
        os.utime(file, (day(moment).timestamp(),) * 2)
        assert look() is there


@pytest.mark.parametrize("run_type", ["manual", "backfill"])
def test_a_run_that_a_person_started_waits_for_nothing(own, monkeypatch, tmp_path, run_type):
    assert wait_of(own, monkeypatch, tmp_path / "nowhere", run_type)() is True


# ---- the question before training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("judged", [{}, {"raw": None, "events": None}, {"events": None, "sequences": "warning"}])
def test_what_was_not_judged_is_not_free_of_warnings(dag, monkeypatch, judged):
    task = dag.get_task("train.approve_warnings")
    monkeypatch.setattr(
        type(task), "_summary", lambda self, run: {"attempt": "a", "stages": judged, "failed": {"warning": []}}
    )
    with ended_as_a_stage(r"no outcome of the gates .*training_input"):
        task.execute(context_of(ti=ti_of("a", params={"on_warning": "approve"})))


def test_a_question_that_nobody_answered_is_not_asked_again_by_itself(dag):
    task = dag.get_task("train.approve_warnings")
    with ended_as_a_stage("nobody answered within 2 days"):
        task.execute_complete(context_of(), {"error": "late", "error_type": "timeout"})


def test_findings_that_cannot_be_read_now_are_asked_for_again(dag, monkeypatch):
    from dags import _gates

    failed = subprocess.CompletedProcess([], EXIT_TRY_AGAIN, "", "error: the store does not answer\n  remedy: wait\n")
    monkeypatch.setattr(_gates.subprocess, "run", lambda *args, **kwargs: failed)
    task = dag.get_task("train.approve_warnings")
    with ended_as_a_stage("the store does not answer", EXIT_TRY_AGAIN):
        task.execute(context_of(ti=ti_of("a", params={"on_warning": "approve"})))


# ---- states that a person has set ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task_id", "before"),
    [
        ("sequences.build_sequences", "ingest.audit_events"),
        ("train.approve_warnings", "train.audit_training_input"),
        ("train.train_models", "train.approve_warnings"),
        ("register.promote_model", "register.register_model"),
    ],
)
@pytest.mark.parametrize("result", [None, {"attempt": "another"}, {"chosen_options": ["Reject"]}])
def test_nothing_goes_on_behind_a_task_without_a_result_of_the_attempt(dag, monkeypatch, task_id, before, result):
    """Marked as success without its work, or cleared alone after a new attempt began, or a question that was
    rejected."""
    task, ti = dag.get_task(task_id).prepare_for_execution(), ti_of("a", params=dag.params.dump())
    pulled = ti.xcom_pull
    ti.xcom_pull = lambda task_ids, key="return_value": (
        result if (task_ids, key) == (before, "return_value") else pulled(task_ids, key)
    )
    with ended_as_a_stage(f"attempt a has no result of the task `{before}`"):
        executed(task, context_of(ti=ti))


def test_a_task_marked_as_failed_stops_the_run_at_the_next_one(dag):
    task, ti = dag.get_task("register.promote_model").prepare_for_execution(), ti_of("a", params=dag.params.dump())
    ti.get_task_states = lambda dag_id, run_ids, task_ids: {
        run_ids[0]: {name: "failed" if name == "train.train_models" else "success" for name in task_ids}
    }
    with ended_as_a_stage("the task `train.train_models` of this run is marked as failed"):
        executed(task, context_of(ti=ti))


def test_what_only_waits_may_be_marked_as_success(dag):
    from dags._common import require_done

    ti = ti_of("a")
    ti.xcom_pull = lambda task_ids: None
    require_done(dag.get_task("ingest.build_events"), context_of(ti=ti), "a")


@pytest.mark.parametrize(("option", "ends"), [("Reject", ["KILLED"]), ("Approve", [])])
def test_a_rejected_run_ends_in_mlflow_too_and_says_so(dag, monkeypatch, option, ends):
    from airflow.providers.standard.operators.hitl import HITLOperator
    from airflow.sdk.exceptions import DownstreamTasksSkipped

    ended: list[str] = []
    notes: list[str] = []
    monkeypatch.setattr("dags._gates.start_ending", lambda partition, status: ended.append(status))
    monkeypatch.setattr("dags._gates.append_note", lambda context, line: notes.append(line))
    monkeypatch.setattr(HITLOperator, "execute_complete", lambda self, context, event: {"chosen_options": [option]})
    task = dag.get_task("train.approve_warnings").prepare_for_execution()
    ti = ti_of("a")
    ti.map_index, ti.xcom_push = -1, lambda **_: None  # the real `skip` leaves by an exception
    context = context_of(ti=ti) | {"task": task}
    if option == "Approve":
        assert task.execute_complete(context, {})["attempt"] == "a"
    else:
        with pytest.raises(DownstreamTasksSkipped):  # Airflow skips what follows
            task.execute_complete(context, {})
    assert ended == ends
    assert notes == ["dt=2022-04-21: rejected by a person before training: nothing was trained"][: len(ends)]


# ---- the note of a run -----------------------------------------------------------------------------------------------


def test_of_a_note_that_gets_too_long_the_oldest_lines_go():
    from dags._notes import LONGEST_NOTE, with_line

    assert with_line([], "dt=2022-04-21") == "dt=2022-04-21"
    note = ""
    for number in range(200):
        note = with_line(note.splitlines(), f"line {number}")
    assert len(note) <= LONGEST_NOTE
    assert note.splitlines()[:2] == ["line 199", "line 198"]  # a page shows the first
    assert len(with_line(["old"], "x" * 5_000)) == LONGEST_NOTE


def test_a_long_line_of_a_note_ends_behind_a_whole_number_and_says_that_it_goes_on():
    from dags._common import NOTED_LENGTH, outcome_line

    assert outcome_line("", "promoted: the reason") == "promoted: the reason"
    for cut in range(10):  # wherever the end of the line falls
        reason = "x" * cut + " AUC minus champion's has lower bound -0.2049, which is not above -0.0209" * 5
        line = outcome_line("2022-04-21", reason)
        assert len(line) <= NOTED_LENGTH and line.endswith(" ...")
        assert {*line.split()} <= {"dt=2022-04-21:", "...", *reason.split()}


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
        ("raw", "/data; rm -rf /"),
        ("raw", "/data/$(id)"),
        ("raw", "/data`id`"),
        ("raw", "/a|b"),
        ("raw", "/a&b"),
        ("raw", "relative/x"),
        ("raw", "--help"),
        ("raw", "/a\nb"),
        ("raw", "/a'b"),
        ("raw", '/a"b'),
        ("raw", "/a>b"),
        ("raw", ""),
        ("raw", "/a\n"),
        ("raw", "/a\\b"),
        ("raw", "/a*"),
        ("config", "a\n"),
        ("raw", "s3://key:secret@bucket"),
        ("raw", "s3://key@bucket/x"),
        ("raw", "s3://key:se/cret@bucket"),
        ("raw", "s3://bucket/x?region=$(id)"),
        ("raw", "s3://bucket/x?a=b;c"),
        ("raw", "/a?b"),
        ("raw", "s3://bucket/x?a=b\n"),
        ("raw", "s3://bucket/x&y"),
        ("raw", "abfss://box:secret@account.dfs.core.windows.net/x"),
        ("dt", "2022-04-21\n"),
        ("config", "../x"),
        ("config", "a;b"),
        ("config", ""),
        ("dt", "yesterday"),
        ("dt", "2022-4-1"),
        ("dt", "2022-04-21; ls"),
        ("warm_start", "other"),
        ("target_days", 1),
        ("target_days", "14"),
        ("workers", 0),
        ("workers", "0:3"),
        ("workers", 2.5),
        ("workers", None),
        ("max_history", 0),
        ("lookback_days", 1.5),
        ("lookback_days", 36_501),
        ("evaluation_days", 0),
        ("evaluation_days", "1"),
        ("on_warning", "wait"),
        ("on_warning", None),
    ],
)
def test_the_form_refuses(dag, name, value):
    param = dag.params.get_param(name)
    with pytest.raises(ParamValidationError):
        param.resolve(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("raw", "/data/KuaiRand-1K/data"),
        ("raw", "s3://bucket/a/b=c"),
        ("raw", "/my data/é"),
        ("dt", "2022-04-21"),
        ("dt", None),
        ("raw", S3_RAW),
        ("raw", "s3://bucket?region=eu-central-1"),
        ("raw", "s3://bucket/me@example.org/x"),
        ("raw", "abfss://box@account.dfs.core.windows.net/x"),
        ("raw", "hdfs://namenode:9000/x"),
    ],
)
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
    monkeypatch.setattr(StageOperator, "command", lambda self: [sys.executable, str(script)])
    operator = StageOperator(task_id="stage", module="stage", dataset=dataset)
    return operator, lambda: executed(operator, context_of(ti=ti_of("a")))


@pytest.mark.parametrize(("dataset", "name"), [("kuairand", "kuairand"), ("/home/me/shop.yaml", "shop")])
def test_success_returns_the_partition(tmp_path, monkeypatch, dataset, name):
    _, execute = run_code(tmp_path, monkeypatch, "print('fine')", dataset)
    assert execute() == {"dataset": name, "dt": "2022-04-21", "attempt": "a"}


def test_what_a_stage_says_of_an_error_stands_at_that_level_in_the_log(tmp_path, monkeypatch):
    code = (
        "import sys\nprint('noise')\nprint('error: no raw rows', file=sys.stderr)\nprint('  remedy: give RAW',"
        " file=sys.stderr)\nprint('late', file=sys.stderr)\nsys.exit(2)"
    )
    _, execute = run_code(tmp_path, monkeypatch, code)
    with capture_logs() as records, pytest.raises(SystemExit) as ended:
        execute()
    assert ended.value.code == EXIT_CORRECT
    said = {record["event"]: record["log_level"] for record in records}
    assert {
        "noise": "info",
        "error: no raw rows": "error",
        "  remedy: give RAW": "error",
        "late": "info",
    }.items() <= said.items()
    assert said["stage found something to correct and is not tried again (exit code 2)"] == "error"


@pytest.mark.parametrize(
    ("says", "code", "noted"),
    [
        ("error: no raw rows\\n  remedy: give RAW", 2, "dt=2022-04-21: stage failed: no raw rows"),
        ("", 9, "dt=2022-04-21: stage failed: stage crashed (exit code 9)"),
        ("error:" + 125 * " xyz", 75, "dt=2022-04-21: stage failed:" + 67 * " xyz" + " ..."),
    ],
)
def test_a_task_that_has_failed_says_why_in_the_note_of_its_run(tmp_path, monkeypatch, says, code, noted):
    notes: list[str] = []
    monkeypatch.setattr("dags._notes.append_note", lambda context, line: notes.append(line))
    monkeypatch.setattr("dags._common.ending", lambda partition, status: [sys.executable, "-S", "-c", ""])
    operator, execute = run_code(tmp_path, monkeypatch, f"import sys\nprint('{says}')\nsys.exit({code})")
    with pytest.raises(SystemExit):
        execute()
    for callback in operator.on_failure_callback:
        callback({"task": operator})
    assert notes == [noted]


def test_what_may_pass_by_itself_is_retried_for_ten_minutes_a_crash_once_and_the_rest_never():
    from airflow.sdk import RetryAction

    [(policy, retries)] = {(task.retry_policy, task.retries) for task in dag_of("kuairand").tasks}
    waits = settings.retry_waits()
    assert retries == len(waits)
    assert sum(waits) >= 600
    assert waits == sorted(waits)

    def after(code: int | None, tried: int, cleared_after: int = 0):
        decision = policy.evaluate(
            SystemExit(code) if code is not None else RuntimeError("odd"),
            cleared_after + tried,
            cleared_after + retries,
        )
        return decision.action, decision.retry_delay and decision.retry_delay.total_seconds()

    for cleared_after in (0, 3):  # clearing a task begins the count anew
        assert [after(EXIT_TRY_AGAIN, tried, cleared_after) for tried in range(1, retries + 1)] == [
            (RetryAction.RETRY, wait) for wait in waits
        ]
        for code in (EXIT_CORRECT, EXIT_GATE):
            assert after(code, 1, cleared_after)[0] is RetryAction.FAIL
        for code in (1, -9, None):
            assert after(code, 1, cleared_after) == (RetryAction.RETRY, 20)
            assert after(code, 2, cleared_after)[0] is RetryAction.FAIL


@pytest.mark.parametrize("code", [0, EXIT_CORRECT, EXIT_GATE, EXIT_TRY_AGAIN, 1])
def test_a_report_that_does_not_get_into_mlflow_changes_nothing_of_a_gates_end(tmp_path, monkeypatch, code):
    from dags._common import StageOperator
    from dags._gates import GateOperator, ReportLink

    script = tmp_path / "gate.py"
    script.write_text(f"import sys; sys.exit({code})")
    monkeypatch.setattr(StageOperator, "command", lambda self: [sys.executable, str(script)])
    gate = GateOperator(task_id="gate", module="gate", dataset="kuairand", reports=str(tmp_path / "no reports"))
    if code == 0:
        assert executed(gate, context_of(ti=ti_of("a")))["attempt"] == "a"
    else:
        with pytest.raises(SystemExit) as ended:
            executed(gate, context_of(ti=ti_of("a")))
        assert ended.value.code == code
    assert ReportLink().get_link(gate, ti_key=None) == ""


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise ValueError('odd')", 1), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9)],
)
def test_a_crash_has_a_code_of_its_own(tmp_path, monkeypatch, code, expected):
    _, execute = run_code(tmp_path, monkeypatch, code)
    with pytest.raises(SystemExit) as ended:
        execute()
    assert ended.value.code == expected


def test_the_stage_does_not_see_airflows_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "s3cret")
    _, execute = run_code(
        tmp_path, monkeypatch, "import os, sys; sys.exit(any(n.startswith('AIRFLOW__') for n in os.environ))"
    )
    execute()


def test_killing_the_task_ends_the_stage_and_its_children(tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'import time;"
        f" time.sleep(900)'])\nopen({str(pids)!r} + '.tmp', 'w').write(f'{{os.getpid()}} {{child.pid}}');"
        f" os.rename({str(pids)!r} + '.tmp', {str(pids)!r})\ntime.sleep(900)\n"
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
    from infra.local.services import alive

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
    registration = {
        "model_name": "vql_kuairand",
        "version": "3",
        "run_id": "abc",
        "experiment_id": "7",
        "aliases": aliases,
        "outcome": outcome,
        "gate": {"passed": outcome != "refused", "reason": "the reason"},
        "digests": {"model.digest": "d"},
    }
    (tmp_path / "a" / "registration.json").write_text(json.dumps(registration))
    monkeypatch.setattr(StageOperator, "command", lambda self: [sys.executable, str(tmp_path / "stage.py")])
    task = PromoteOperator(
        task_id="promote",
        module="evaluation.release.promote",
        dataset="kuairand",
        runs=str(tmp_path),
        champion=Asset(name="c", uri="longview://c/champion"),
    )
    context = context_of(ti=ti_of("a")) | {"outlet_events": OutletEventAccessors()}
    return task, lambda: executed(task, context), context


@pytest.mark.parametrize(
    ("outcome", "aliases", "event"),
    [
        ("promoted", ["challenger", "champion"], True),
        ("promoted", ["previous_champion"], False),
        ("unchanged", ["challenger"], False),
        ("refused", ["challenger"], False),
    ],
)
def test_the_outcome_of_a_promotion_stands_on_the_run_and_only_a_promotion_is_an_event(
    tmp_path, monkeypatch, outcome, aliases, event
):
    from dags import _release
    from dags._links import EvaluationReportLink, MlflowRunLink, ModelVersionLink

    notes: list[str] = []
    monkeypatch.setattr(_release, "append_note", lambda context, line: notes.append(line))
    task, execute, context = promote_task(tmp_path, monkeypatch, outcome, aliases)
    found = execute()
    assert {"outcome": outcome, "reason": "the reason", "version": "3", "dt": "2022-04-21"}.items() <= found.items()
    said = {
        "promoted": "promoted",
        "unchanged": "NOT promoted, it is the champion's equal",
        "refused": "NOT promoted, stays challenger",
    }[outcome]
    assert notes == [f"dt=2022-04-21: vql_kuairand version 3 {said}: the reason"]
    events = context["outlet_events"][task.alias].asset_alias_events
    assert [one.dest_asset_key.uri for one in events] == ["longview://c/champion"] * event
    for one in events:
        assert {"dt": "2022-04-21", "attempt": "a", "version": "3", "model.digest": "d"}.items() <= one.extra.items()
    assert (
        MlflowRunLink().get_link(task, ti_key=None).endswith("/#/experiments/7/runs/abc?workflowType=machine_learning")
    )
    version = f"/#/models/vql_kuairand/versions/3{settings.TRAININGS}"
    assert ModelVersionLink().get_link(task, ti_key=None).endswith(version)
    page = "/#/experiments/7/runs/abc/artifacts/evaluation/report.html?workflowType=machine_learning"
    assert EvaluationReportLink().get_link(task, ti_key=None).endswith(page)


def test_a_promotion_that_failed_says_nothing_and_still_leads_to_its_run(tmp_path, monkeypatch):
    task, execute, context = promote_task(tmp_path, monkeypatch, "promoted", ["champion"], "import sys; sys.exit(75)")
    with pytest.raises(SystemExit):
        execute()
    assert not context["outlet_events"][task.alias].asset_alias_events
    assert task.run_url.endswith("/runs/abc?workflowType=machine_learning")


def test_a_stage_knows_the_address_of_its_run(tmp_path, monkeypatch):
    _, execute = run_code(
        tmp_path,
        monkeypatch,
        f"import os; open({str(tmp_path / 'url')!r}, 'w').write(os.environ['LONGVIEW_AIRFLOW_RUN_URL'])",
    )
    execute()
    assert (tmp_path / "url").read_text() == f"{settings.airflow_url()}/dags/d/runs/manual__1"


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_mlflow_run_of_a_task_that_failed_or_was_killed_ends(tmp_path, monkeypatch, status):
    """Airflow asks for the first when the task has failed for good, for the second when it is marked as failed or times
    out.
    """
    operator, execute = run_code(tmp_path, monkeypatch, "import sys; sys.exit(1)")
    said = tmp_path / "said"
    monkeypatch.setattr(
        "dags._common.ending",
        lambda partition, status: [sys.executable, "-c", f"open({str(said)!r}, 'w').write({status!r})"],
    )
    if status == "KILLED":
        operator.render_template_fields(context_of(ti=ti_of("a")))
        operator.on_kill()
    else:
        with pytest.raises(SystemExit):
            execute()
        operator.on_kill()  # of a task whose stage has ended: says nothing
    callback, _ = operator.on_failure_callback
    callback({"task": operator})
    wait_for("end of the run", lambda: said.exists() and said.read_text())
    assert said.read_text() == status

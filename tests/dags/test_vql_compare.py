"""The DAG of comparisons: its form, its command lines, one task a training, and what it says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import ParamValidationError
from structlog.testing import capture_logs

from infra import settings
from tests.dags.test_vql_daily import GOLDEN, graph_of

pytestmark = pytest.mark.airflow

FIELDS = {"data_set": "kuairand", "dt": "2022-04-21"}
TRAININGS = [{"model": "vql", "length": 1000, "seed": seed, "name": f"vql L=1000 seed {seed}"} for seed in (7, 8)]
RESULT = {"trainings": TRAININGS, "stand": 1, "best": "vql L=1000 seed 7, AUC 0.7", "experiment_id": "4", "run_id": "r"}


def dag_now():
    from dags.vql_compare import dag

    return dag


def form(**changes) -> dict:
    return {"models": None, "lengths": None, "seeds": "7", "config": "default", **FIELDS, **changes}


def test_graph_is_the_golden_one():
    golden = GOLDEN.with_name("vql_compare.json")
    graph = graph_of(dag_now())
    if os.environ.get("UPDATE_GOLDEN") == "1":
        golden.write_text(json.dumps(graph, indent=1) + "\n")
    assert graph == json.loads(golden.read_text()), "UPDATE_GOLDEN=1 rewrites the file; look at its diff"
    assert dag_now().schedule is None  # nothing is trained by itself


def test_a_training_never_runs_beside_another_and_lets_a_daily_one_go_first():
    from dags.vql_daily import dag as daily

    mapped, train = dag_now().get_task("train"), daily.get_task("train.train_models")
    assert mapped.pool == train.pool and settings.POOLS[mapped.pool][0] == 1
    below = {task.task_id: len(task.get_flat_relative_ids(upstream=False)) for task in (mapped, train)}
    assert below["train"] < below["train.train_models"]  # of equal weights, what more waits behind goes first
    assert mapped.priority_weight == train.priority_weight and mapped.weight_rule == train.weight_rule


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"models": "vql,din", "lengths": "200, 1000", "seeds": "1,2,3"}, None),
        ({"data_set": "nothing"}, "data_set: "),
        ({"dt": None}, "dt: "),
        ({"dt": "21.4.2022"}, "dt: "),
        ({"models": "vql;din"}, "models: "),
        ({"models": "vql,"}, "models: "),
        ({"lengths": "many"}, "lengths: "),
        ({"seeds": ""}, "seeds: "),
        ({"config": "tinny"}, "config: "),
        ({"length": "200"}, "length: no parameter of this DAG; did you mean lengths?"),
        ({"nonsense": 1}, "nonsense: no parameter of this DAG; there are data_set, dt, "),
    ],
)
def test_a_field_that_is_wrong_is_named_before_anything_is_trained(tmp_path, monkeypatch, changes, says):
    if says is None:
        assert taken("plan", tmp_path, monkeypatch, **changes)[0] == TRAININGS
        return
    with capture_logs() as logs, pytest.raises(SystemExit) as end:
        taken("plan", tmp_path, monkeypatch, **changes)
    assert end.value.code == 2
    error, remedy = [line["event"] for line in logs if line["log_level"] == "error"]
    assert error.startswith(f"error: this comparison cannot be made: {says}")
    assert remedy == "  remedy: trigger it again, with these corrected"


def test_the_form_asks_for_what_nobody_can_leave_out():
    from dags._compare import params

    for name in FIELDS:
        with pytest.raises(ParamValidationError):
            params()[name].resolve()
    assert all(param.schema["title"] and param.description for param in params().values())
    assert {name: param.value for name, param in params().items() if name not in FIELDS}.items() <= form().items()


def test_the_command_takes_what_the_form_gives():
    from dags._compare import arguments
    from evaluation.compare import arguments_of

    words = arguments(form(), "plan")
    assert words[:4] == ["--dataset", "kuairand", "--warehouse", settings.warehouse()]
    args = arguments_of(words)
    assert (args.dt, args.config, args.seeds, args.lengths, args.only) == ("2022-04-21", "default", [7], [], "plan")
    assert len(args.models) > 10 and args.out == settings.comparison("kuairand", "2022-04-21")
    args = arguments_of(arguments(form(models="vql, din", lengths="200,1000", seeds="1,2", config="tiny"), "show"))
    assert (args.models, args.lengths, args.seeds, args.config) == (["vql", "din"], [200, 1000], [1, 2], "tiny")


def taken(task: str, tmp_path, monkeypatch, states=("success",), result=RESULT, code="", **changes):
    """Execute a task, whose command is `code` and leaves a result; return its XCom, the command and the notes."""
    from dags import _compare

    (tmp_path / "stage.py").write_text(
        f"import sys\n{code}\nopen(sys.argv[sys.argv.index('--result') + 1], 'w').write({json.dumps(result)!r})"
    )
    notes: list[str] = []
    commands: list[list[str]] = []
    monkeypatch.setattr(_compare, "append_note", lambda context, line: notes.append(line))
    real = subprocess.Popen

    def started(command, **more):
        commands.append(command[3:])
        return real([sys.executable, str(tmp_path / "stage.py"), *command[3:]], **more)

    monkeypatch.setattr("dags._common.subprocess.Popen", started)
    known = {"r": {f"train_{number}": state for number, state in enumerate(states)}}
    context = {
        "params": form(**changes),
        "dag_run": SimpleNamespace(dag_id="vql_compare", run_id="r"),
        "ti": SimpleNamespace(get_task_states=lambda **asked: known if asked["task_ids"] == ["train"] else {}),
    }
    operator = dag_now().get_task(task)
    if task == "train":
        operator = operator.unmap({"training": TRAININGS[1]})
    found = operator.execute(context)
    assert operator.run_url == settings.mlflow_run_url("4", "r")
    [words] = commands
    return found, words, notes


def test_plan_hands_on_a_task_a_training_and_says_what_stands(tmp_path, monkeypatch):
    found, words, notes = taken("plan", tmp_path, monkeypatch, models="vql", seeds="7,8")
    assert found == TRAININGS and words[words.index("--only") + 1] == "plan"
    assert notes == ["dt=2022-04-21: kuairand: 2 trainings, 1 of them stand"]
    many = RESULT | {"trainings": TRAININGS * 600}
    with capture_logs() as logs, pytest.raises(SystemExit) as end:
        taken("plan", tmp_path, monkeypatch, result=many)
    assert end.value.code == 2
    assert "1,200 trainings are more than the 1,024 that Airflow maps" in str(logs)


def test_a_mapped_task_trains_its_own_training_alone_and_is_called_by_it(tmp_path, monkeypatch):
    found, words, _ = taken("train", tmp_path, monkeypatch, models="vql,din", lengths="200,1000", seeds="7,8")
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert {"--models": "vql", "--lengths": "1000", "--seeds": "8", "--only": "train"}.items() <= options.items()
    assert found == {"training": "vql L=1000 seed 8", "stands": True, "best": "vql L=1000 seed 7, AUC 0.7"}
    mapped = dag_now().get_task("train")
    operator = mapped.unmap({"training": TRAININGS[1]})
    assert operator.render_template(mapped.map_index_template, {"task": operator}) == "vql L=1000 seed 8"


def test_what_may_pass_is_tried_again_and_what_is_wrong_is_not(tmp_path, monkeypatch):
    for code in (2, 75):
        with pytest.raises(SystemExit) as end:
            taken("train", tmp_path, monkeypatch, code=f"sys.exit({code})")
        assert end.value.code == code


def test_the_table_has_what_stands_and_its_task_fails_with_a_training(tmp_path, monkeypatch):
    found, words, notes = taken("table", tmp_path, monkeypatch, states=("success", "success"))
    assert words[words.index("--only") + 1] == "show" and found == {"stand": 1, "best": RESULT["best"]}
    assert notes == ["dt=2022-04-21: 1 of 2 trainings stand; the best is vql L=1000 seed 7, AUC 0.7"]
    for bad in ("failed", "upstream_failed", "skipped"):  # skipped: the run was marked as failed
        with capture_logs() as logs, pytest.raises(SystemExit) as end:
            taken("table", tmp_path, monkeypatch, states=("success", bad, "removed"))
        assert end.value.code == 2 and "1 of 2 tasks `train` of this run have failed or were skipped" in str(logs)


def test_what_plan_begins_in_mlflow_table_ends_whatever_becomes_of_the_run():
    """Airflow runs a teardown whose setup has succeeded, and clears both with every task between them."""
    plan, table = (dag_now().get_task(name) for name in ("plan", "table"))
    assert plan.is_setup and table.is_teardown and table.on_failure_fail_dagrun
    assert table.upstream_task_ids == {"plan", "train"}


def test_a_note_names_the_training_that_failed(monkeypatch):
    from dags import _notes
    from dags._common import note_failure

    notes: list[str] = []
    monkeypatch.setattr(_notes, "append_note", lambda context, line: notes.append(line))
    task = SimpleNamespace(task_id="train", said="error: no memory")
    note_failure({"task": task, "ti": SimpleNamespace(rendered_map_index="vql L=1000 seed 8")})
    note_failure({"task": task, "ti": SimpleNamespace(rendered_map_index=None)})
    assert notes == ["train vql L=1000 seed 8 failed: no memory", "train failed: no memory"]

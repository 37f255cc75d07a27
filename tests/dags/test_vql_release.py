"""The DAG of decisions by hand: its form, its command line, and what it says of the outcome."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import ParamValidationError
from structlog.testing import capture_logs

from etl.datasets.definition import built_in_names
from infra import settings
from tests.dags.test_vql_daily import GOLDEN, graph_of, own

__all__ = ["own"]
pytestmark = pytest.mark.airflow

FIELDS = {"data_set": "kuairand", "action": "rollback", "reason": "users complain", "by": "Ada"}
PLACE = ["--warehouse", settings.warehouse(), "--runs", settings.runs()]
WHO = ["--by", "Ada", "--reason", "users complain", "--decision", "manual__1"]


def dag_now():
    from dags.vql_release import dag

    return dag


def form(**changes) -> dict:
    return {"version": None, "despite_mechanical_gate": False, "dry_run": False, **FIELDS, **changes}


def test_graph_is_the_golden_one():
    golden = GOLDEN.with_name("vql_release.json")
    graph = graph_of(dag_now())
    # A data set more changes no graph.
    assert graph["decide"].pop("outlets") == [f"vql_champion_{name}" for name in built_in_names()]
    if os.environ.get("UPDATE_GOLDEN") == "1":
        golden.write_text(json.dumps(graph, indent=1) + "\n")
    assert graph == json.loads(golden.read_text()), "UPDATE_GOLDEN=1 rewrites the file; look at its diff"
    assert dag_now().schedule is None  # nothing decides by itself


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"action": "promote", "version": 3}, None),
        ({"data_set": "nothing"}, "data_set: "),
        ({"action": "undo"}, "action: "),
        ({"action": "promote"}, "version: which version to promote?"),
        ({"action": "refuse"}, "version: which version to refuse?"),
        ({"version": 2}, "version: a rollback goes to the champion before"),
        ({"action": "promote", "version": "2; id"}, "version: "),
        ({"reason": ""}, "reason: "),
        ({"by": ""}, "by: "),
        ({"by": None}, "by: "),
        ({"dry_runs": True}, "dry_runs: no parameter of this DAG; did you mean dry_run?"),
    ],
)
def test_a_field_that_is_wrong_is_named(changes, says):
    from dags._by_hand import params, problems

    found = problems(ParamsDict(params()), form(**changes))
    assert found == [] if says is None else (len(found) == 1 and found[0].startswith(says)), found


def test_the_form_asks_for_what_nobody_can_leave_out():
    from dags._by_hand import params

    for name in FIELDS:
        with pytest.raises(ParamValidationError):
            params()[name].resolve()
    assert all(param.schema["title"] and param.description for param in params().values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["rollback", "--dataset", "kuairand", *PLACE, *WHO]),
        (
            {"action": "promote", "version": 3, "despite_mechanical_gate": True},
            ["promote", "--dataset", "kuairand", *PLACE, *WHO, "--version", "3", "--despite-mechanical-gate"],
        ),
        ({"dry_run": True}, ["rollback", "--dataset", "kuairand", *PLACE, *WHO, "--dry-run"]),
    ],
)
def test_the_command_takes_what_the_form_gives(changes, words):
    from dags._by_hand import arguments
    from evaluation.release.by_hand import _parser

    assert arguments(form(**changes), "manual__1") == words
    args = _parser().parse_args(words)
    assert (args.action, args.by, args.decision) == (words[0], "Ada", "manual__1")


def test_an_own_data_set_is_named_and_given_by_its_path(own):
    from dags._by_hand import arguments
    from dags._form import data_sets

    assert list(data_sets()) == [*built_in_names(), "shop"]
    assert arguments(form(data_set="shop"), "d")[:3] == ["rollback", "--dataset", str(own)]
    (own.parent / "wrong.yaml").write_text("name: wrong\nlogs: [")  # stands in nobody's way
    assert "wrong" in data_sets()


def decided(tmp_path, monkeypatch, outcome: str, aliases: list[str], code: str = "", **changes):
    """Execute the task, whose command is `code` and leaves a result; return its XCom, its notes and its events."""
    from airflow.sdk.execution_time.context import OutletEventAccessors

    from dags import _by_hand

    result = {
        "outcome": outcome,
        "model": "vql_kuairand",
        "version": "2",
        "by": "Ada",
        "reason": "users complain",
        "aliases": aliases,
        "dt": "2022-04-21",
        "attempt": "a",
        "digests": {"model.digest": "d"},
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage.py").write_text(
        f"import sys\n{code}\nopen(sys.argv[sys.argv.index('--result') + 1], 'w').write({json.dumps(result)!r})"
    )
    notes: list[str] = []
    monkeypatch.setattr(_by_hand, "append_note", lambda context, line: notes.append(line))
    real = subprocess.Popen
    monkeypatch.setattr(
        "dags._common.subprocess.Popen",
        lambda command, **more: real([sys.executable, str(tmp_path / "stage.py"), *command[3:]], **more),
    )
    context = {
        "params": form(**changes),
        "dag_run": SimpleNamespace(dag_id="vql_release", run_id="manual__1"),
        "outlet_events": OutletEventAccessors(),
    }
    task = dag_now().get_task("decide")
    found = task.execute(context)
    events = [
        event
        for alias in task.outlets
        for event in context["outlet_events"][alias].asset_alias_events
        if alias.name == "vql_champion_kuairand" or pytest.fail(f"an event of {alias.name}")
    ]
    return found, notes, events


@pytest.mark.parametrize(
    ("outcome", "aliases", "dry_run", "event"),
    [
        ("rolled back to", ["champion"], False, True),
        ("promoted", ["anchor", "champion"], False, True),
        ("rolled back to", ["champion"], True, False),
        ("promoted", [], False, False),
        ("unchanged", ["champion"], False, False),
        ("refused", ["challenger"], False, False),
    ],
)
def test_a_champion_that_moved_is_an_event_of_its_data_set_and_the_note_says_who_and_why(
    tmp_path, monkeypatch, outcome, aliases, dry_run, event
):
    found, [note], events = decided(tmp_path, monkeypatch, outcome, aliases, dry_run=dry_run)
    assert {"outcome": outcome, "version": "2", "by": "Ada", "reason": "users complain"}.items() <= found.items()
    assert note.endswith("by Ada: users complain")
    assert note.startswith("dry run, nothing moved: ") == dry_run
    assert [one.dest_asset_key.uri for one in events] == ["longview://kuairand/champion"] * event
    for one in events:
        assert {"version": "2", "by": "Ada", "model.digest": "d", "attempt": "a"}.items() <= one.extra.items()


def test_a_decision_that_cannot_be_taken_ends_as_a_stage_does(tmp_path, monkeypatch):
    with capture_logs() as logs, pytest.raises(SystemExit) as end:
        decided(tmp_path, monkeypatch, "promoted", [], action="promote")
    assert end.value.code == 2
    errors = [line["event"] for line in logs if line["log_level"] == "error"]
    assert errors == [
        "error: this decision cannot be taken: version: which version to promote?",
        "  remedy: trigger it again, with these corrected",
    ]
    with pytest.raises(SystemExit) as end:
        decided(tmp_path, monkeypatch, "promoted", [], code="sys.exit(75)")
    assert end.value.code == 75

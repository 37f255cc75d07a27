"""What Airflow's pages do, pressed in a real browser.

Trigger, backfill, clear, approve, reject end as docs/operations.md says.
"""

from __future__ import annotations

import functools
import itertools
import os
import urllib.parse
from pathlib import Path

import pytest

from etl.stage.errors import EXIT_CORRECT, EXIT_GATE
from tests.dags.test_scheduler import APPROVAL, DAG_ID, DAG_PATH, Project, of
from tests.dags.ui import browser
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.airflow]
SCREENSHOTS = os.environ.get(
    "LONGVIEW_SCREENSHOTS"
)  # a folder: keep what the pages looked like, as docs/images shows them
DAYS = ["2022-04-18", "2022-04-19", "2022-04-20"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = Project(tmp_path_factory.mktemp("browser"))
    (made.root / "gates").touch()  # the gates keep what they found
    made.up()
    yield made
    made.python("-m", "infra.local.stack", "down")


@pytest.fixture(scope="module")
def ui(project):
    with browser(project.api.url) as airflow:
        yield airflow


def keep(ui, name: str) -> None:
    if SCREENSHOTS:
        ui.screenshot(Path(SCREENSHOTS) / f"{name}.png")


def path_of(run_id: str) -> str:
    return f"{DAG_PATH}/dagRuns/{urllib.parse.quote(run_id)}"


def attempt_of(calls: list[list[str]]) -> str:
    [attempt] = {of(call, "--attempt") for call in calls}
    return attempt


def backfilled(project, press) -> list[list[str]]:
    """Press a backfill and return the command lines of its runs, in the order in which they began."""
    before = {one["id"] for one in project.api.call("GET", f"/api/v2/backfills?dag_id={DAG_ID}")["backfills"]}
    press()
    [begun] = wait_for(
        "a backfill",
        lambda: [
            one["id"]
            for one in project.api.call("GET", f"/api/v2/backfills?dag_id={DAG_ID}")["backfills"]
            if one["id"] not in before
        ],
    )
    wait_for(
        "end of the backfill", lambda: project.api.call("GET", f"/api/v2/backfills/{begun}")["completed_at"], every=1
    )
    return project.calls()


def days_in_order(calls: list[list[str]]) -> list[str]:
    return [day for day, _ in itertools.groupby(of(call, "--dt") for call in calls)]


def test_the_form_as_prefilled_is_never_green_without_work(project, ui):
    run = path_of(ui.trigger(DAG_ID))
    state = project.ended(run)
    calls = project.calls()
    assert (state == "success") == any(call[0] == "evaluation.user_caches" for call in calls)
    assert project.states(run)["start"] in ("success", "failed")


def test_the_form_with_a_day_builds_that_day(project, ui):
    with ui.trigger_form(DAG_ID):
        keep(ui, "airflow_form")
    run_id = ui.trigger(DAG_ID, dt="2022-04-21", config="tiny")
    assert project.ended(path_of(run_id)) == "success"
    calls = project.calls()
    assert {of(call, "--dt") for call in calls} == {"2022-04-21"}
    assert [of(call, "--config") for call in calls if call[0] == "training.train"] == ["tiny"]
    note = project.api.call("GET", path_of(run_id))["note"]
    assert "2022-04-21" in note and attempt_of(calls) in note
    ui.open(f"/dags/{DAG_ID}/runs/{urllib.parse.quote(run_id)}")
    keep(ui, "airflow_run")
    ui.leave()


def test_backfills_of_three_days_forward_backward_again_and_with_another_configuration(project, ui):
    forward = backfilled(project, lambda: ui.backfill(DAG_ID, DAYS[0], DAYS[-1]))
    assert days_in_order(forward) == DAYS
    runs = [run["dag_run_id"] for run in project.api.call("GET", f"{DAG_PATH}/dagRuns?run_type=backfill")["dag_runs"]]
    assert sorted(day for run in runs for day in DAYS if day in run) == DAYS  # the day is in the run's id
    ui.open(f"/dags/{DAG_ID}/runs")
    keep(ui, "airflow_runs")
    ui.leave()
    again = backfilled(
        project,
        lambda: ui.backfill(
            DAG_ID, DAYS[0], DAYS[-1], reprocess="All Runs", backwards=True, override=True, config="tiny"
        ),
    )
    assert days_in_order(again) == DAYS[::-1]
    assert {of(call, "--config") for call in again if call[0] == "training.train"} == {"tiny"}
    assert {of(call, "--attempt") for call in again}.isdisjoint({of(call, "--attempt") for call in forward})
    # Without the tick the dialog sends no parameters, as its page and docs say: the data set's own hold.
    plain = backfilled(project, lambda: ui.backfill(DAG_ID, DAYS[0], DAYS[0], reprocess="All Runs", config="small"))
    assert {of(call, "--config") for call in plain if call[0] == "training.train"} <= {"default", "tiny"}


def tries(project, run: str) -> dict[str, int]:
    return {
        task["task_id"]: task["try_number"]
        for task in project.api.call("GET", f"{run}/taskInstances")["task_instances"]
    }


def cleared(project, run: str, press, *tasks: str) -> list[list[str]]:
    """Press a clear, wait until the tasks were done once more and the run has ended; return what was called."""
    before = tries(project, run)
    project.calls()
    press()
    wait_for(
        f"another try of {tasks}", lambda: all(tries(project, run)[task] > before[task] for task in tasks), every=1
    )
    project.ended(run)
    assert {task for task, number in tries(project, run).items() if number > before[task]} == {*tasks}
    return project.calls()


def test_each_task_of_a_finished_run_can_be_cleared_alone_and_goes_on_in_its_attempt(project, ui):
    run_id = ui.trigger(DAG_ID, dt="2022-04-21")
    run = path_of(run_id)
    assert project.ended(run) == "success"
    attempt = attempt_of(project.calls())
    for task in project.states(run):
        if task == "start":
            continue
        calls = cleared(project, run, functools.partial(ui.clear_task, DAG_ID, run_id, task, downstream=False), task)
        assert {of(call, "--attempt") for call in calls} <= {attempt}
        assert project.states(run)[task] == "success"
    # The whole run, and its first task alone, begin anew.
    everything = tuple(project.states(run))
    again = attempt_of(cleared(project, run, lambda: ui.clear_run(DAG_ID, run_id), *everything))
    ui.clear_task(DAG_ID, run_id, "start")
    wait_for("its work", (project.root / "calls.jsonl").exists)
    project.stop(run)
    last = attempt_of(project.calls())
    assert len({attempt, again, last}) == 3


@pytest.mark.parametrize(
    "module, code, task, whole_run",
    [
        ("etl.quality.judge.audit", EXIT_GATE, "ingest.audit_events", False),  # let through, it judges once more
        ("evaluation.release.promote", EXIT_CORRECT, "register.promote_model", True),
    ],
)
def test_a_failed_run_goes_on_in_its_attempt_when_its_failed_tasks_are_cleared(
    project, ui, module, code, task, whole_run
):
    project.fault(module, code, once=False)
    run_id = ui.trigger(DAG_ID, dt="2022-04-21")
    run = path_of(run_id)
    assert project.ended(run) == "failed"
    (project.root / "fault.json").unlink()
    ui.open(f"/dags/{DAG_ID}/runs/{urllib.parse.quote(run_id)}")
    keep(ui, "airflow_failed_run")
    attempt = attempt_of(project.calls())
    left = [
        name for name, state in project.states(run).items() if state != "success" and name != APPROVAL
    ]  # which calls no stage
    if whole_run:
        ui.clear_run(DAG_ID, run_id, only_failed=True)
    else:
        ui.clear_task(DAG_ID, run_id, task)
    wait_for("the run's success", lambda: project.api.call("GET", run)["state"] == "success", every=1)
    calls = project.calls()
    assert attempt_of(calls) == attempt
    assert len(calls) == len(left)


def test_a_question_is_asked_again_when_it_is_cleared_and_holds_what_it_was_answered(project, ui):
    (project.root / "warn").touch()
    run_id = ui.trigger(DAG_ID, dt="2022-04-20", on_warning="approve")
    run = path_of(run_id)
    project.question(run)
    ui.open(f"/dags/{DAG_ID}/runs/{urllib.parse.quote(run_id)}/tasks/{APPROVAL}/required_actions")
    keep(ui, "airflow_approval")
    ui.leave()
    judged = attempt_of(project.calls())
    ui.clear_task(DAG_ID, run_id, APPROVAL)  # while it waits
    wait_for("the same question", lambda: tries(project, run)[APPROVAL] > 1, every=1)
    project.question(run)
    assert project.calls() == []
    assert "hours_covered is" in ui.answer(DAG_ID, run_id, APPROVAL, "Approve")
    assert project.ended(run) == "success"
    assert attempt_of(project.calls()) == judged
    ui.clear_task(DAG_ID, run_id, APPROVAL)  # after its answer
    wait_for("the same question", lambda: tries(project, run)[APPROVAL] > 2, every=1)
    project.question(run)
    ui.answer(DAG_ID, run_id, APPROVAL, "Reject")
    assert project.ended(run) == "success"
    assert project.states(run)["train.train_models"] == "skipped"
    assert project.calls() == []

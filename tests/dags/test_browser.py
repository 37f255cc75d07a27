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
from tests.dags.test_scheduler import APPROVAL, DAG_ID, DAG_PATH, LAST_GATE, TASKS, Project, of
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


def cleared_alone(project, ui, run_id: str, tasks: list[str], do_work: list[str]) -> list[list[str]]:
    """Press a clear of each task without its downstream tasks, the last task first; return what was called.

    Args:
        do_work: those of them that begin again: nothing that they need has failed.
    """

    def press() -> None:
        for task in reversed(tasks):
            ui.clear_task(DAG_ID, run_id, task, downstream=False)

    return cleared(project, path_of(run_id), press, *do_work)


def test_each_task_of_a_finished_run_can_be_cleared_alone_and_goes_on_in_its_attempt(project, ui):
    run_id = ui.trigger(DAG_ID, dt="2022-04-21")
    run = path_of(run_id)
    assert project.ended(run) == "success"
    attempt = attempt_of(project.calls())
    everything = list(project.states(run))
    later = [task for task in everything if task != "start"]
    calls = cleared_alone(project, ui, run_id, later, later)
    assert attempt_of(calls) == attempt and len(calls) == TASKS
    assert {*project.states(run).values()} == {"success"}
    # The whole run, and its first task alone, begin anew.
    again = attempt_of(cleared(project, run, lambda: ui.clear_run(DAG_ID, run_id), *everything))
    ui.clear_task(DAG_ID, run_id, "start")
    wait_for("its work", (project.root / "calls.jsonl").exists)
    project.stop(run)
    last = attempt_of(project.calls())
    assert len({attempt, again, last}) == 3


# The tasks that run a stage, in their order, and what that is called with.
STAGE_OF = {
    "ingest.build_events": ("etl.jobs.events",),
    "ingest.audit_events": ("etl.quality.judge.audit", "events"),
    "sequences.build_sequences": ("etl.jobs.sequences",),
    "sequences.audit_sequences": ("etl.quality.judge.audit", "sequences"),
    LAST_GATE: ("etl.quality.judge.audit", "training_input"),
    "train.train_models": ("training.train",),
    "evaluate.evaluate_models": ("evaluation.evaluate",),
    "register.register_model": ("evaluation.release.register",),
    "register.promote_model": ("evaluation.release.promote",),
    "caches.build_user_caches": ("evaluation.user_caches",),
    "prune": ("evaluation.prune",),
}


def test_each_task_that_failed_is_cleared_and_its_run_goes_on_in_its_attempt(project, ui):
    """One run, which fails at each of its tasks in turn; what has failed is cleared alone, with those behind it."""

    def fails_at(task: str) -> None:
        module, *stage = STAGE_OF[task]
        project.fault(module, EXIT_GATE if stage else EXIT_CORRECT, False, *stage)

    tasks = list(STAGE_OF)
    fails_at(tasks[0])
    run_id = ui.trigger(DAG_ID, dt="2022-04-21", on_warning="approve")
    run = path_of(run_id)
    assert project.ended(run) == "failed"
    attempt = attempt_of(project.calls())

    def goes_on(press, *done: str, to: str | None) -> None:
        """Press a clear; what is done again, and then what fails next, are called in the same attempt."""
        (project.root / "fault.json").unlink(missing_ok=True)
        if to in STAGE_OF:
            fails_at(to)
        again = [*done, *([to] if to else [])]
        calls = cleared(project, run, press, *again)
        of_stages = [STAGE_OF[task] for task in again if task in STAGE_OF]
        assert [(call[0], *([of(call, "--stage")] if "--stage" in call else [])) for call in calls] == of_stages
        assert {of(call, "--attempt") for call in calls} <= {attempt}
        states = project.states(run)
        assert [task for task in states if states[task] == "failed"] == ([to] if to else [])

    def with_downstream(task: str):
        return functools.partial(ui.clear_task, DAG_ID, run_id, task)

    for failed, following in itertools.pairwise(tasks):
        done = [failed]
        if failed == LAST_GATE:  # whose outcome the question before training needs
            (project.root / "gates").unlink()
            goes_on(with_downstream(LAST_GATE), LAST_GATE, to=APPROVAL)
            goes_on(with_downstream(APPROVAL), to=APPROVAL)
            (project.root / "gates").touch()
            done += [APPROVAL]
        if failed == "train.train_models":
            ui.open(f"/dags/{DAG_ID}/runs/{urllib.parse.quote(run_id)}")
            keep(ui, "airflow_failed_run")
            earlier = ["ingest.wait_for_files", *tasks[: tasks.index(failed)], APPROVAL]
            later = tasks[tasks.index(failed) + 1 :]
            calls = cleared_alone(project, ui, run_id, earlier + later, earlier)
            assert attempt_of(calls) == attempt and len(calls) == len(earlier) - 2
            states = project.states(run)
            assert states[failed] == "failed" and {states[task] for task in later} == {"upstream_failed"}
        if failed == "register.promote_model":
            goes_on(lambda: ui.clear_run(DAG_ID, run_id, only_failed=True), failed, to=following)
        else:
            goes_on(with_downstream(failed), *done, to=following)
    goes_on(with_downstream(tasks[-1]), tasks[-1], to=None)
    assert project.api.call("GET", run)["state"] == "success"


def test_a_first_task_that_failed_refuses_the_same_again_when_it_is_cleared(project, ui):
    project.calls()
    run_id = ui.trigger(DAG_ID, dt="2023-01-01")
    run = path_of(run_id)
    assert project.ended(run) == "failed"
    assert cleared(project, run, lambda: ui.clear_task(DAG_ID, run_id, "start"), "start") == []
    assert project.states(run)["start"] == "failed"
    assert "dt: 2023-01-01 is outside the data set" in project.error(run, "start", 2)


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

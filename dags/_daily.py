"""The daily chain of one data set.

Raw logs of one day -> audited tables -> trained, judged, promoted model -> user caches.
"""

from __future__ import annotations

import datetime as dtm
import functools

from airflow.sdk import DAG, Asset, Param, TaskGroup, chain

from dags._common import StageOperator, end_failed_run, note_failure
from dags._exits import retried
from dags._gates import ANSWERED_WITHIN, GateOperator, WarningApproval
from dags._release import ModelOperator, PromoteOperator, champion_asset
from dags._start import StartOperator
from dags._timetable import PartitionDays
from dags._wait import WaitForFiles
from etl.datasets.definition import DatasetDefinition
from infra import settings
from infra.options import OPTIONS, Option, arguments

DOC = """
One run builds one **partition**: a UTC day `dt`, the evaluation day. Its id or its note names the day.

* **Trigger**: fill in `dt`. Without it the run takes the day of its logical date, which the form fills with now. A
  day outside the data set fails in the first task, `start`, with the reason.
* **Backfill** from A to B: every day of A to B, both included. Leave `dt` empty. The parameters shown in its dialog
  reach the runs only with *Override parameters on existing runs* ticked; otherwise every run takes the defaults of
  the data set's definition.
* **Schedule**: %s.

`start` logs the parameters first, each with where it comes from, and names the run's *attempt*, under which every
stage writes; audits judge what was written, and only then it is published. **Clear** the whole run, or `start`, for
a new attempt; clear any later task with its downstream tasks to go on in the same attempt. A stage that ends with
`error:` and `remedy:` in its log is not retried when there is something to correct or a gate said no; a server that
does not answer is asked again for minutes.

Each later task is one command line, written first in its log; the same line runs outside Airflow (docs/stages.md).
"""
NO_SCHEDULE = "none, as the definition of the data set has no `run: {hour: ...}`"
HOURS_6 = dtm.timedelta(hours=6)
# Airflow 3.3.2: the dialog shows the fields, and sends none of them without that tick.
SENT = ' In a backfill: only with "Override parameters on existing runs" ticked.'


def daily_dag(definition: DatasetDefinition, argument: str) -> DAG:
    """Return the DAG of a data set.

    Args:
        argument: what its stages are given as --dataset: the name of a built-in definition, or the path of another.
    """
    name, run = definition.name, definition.run
    last_day = definition.last_day.isoformat() if definition.last_day else None
    timetable = PartitionDays(definition.first_day.isoformat(), last_day, run.hour if settings.schedules() else None)
    links = {"longview": definition.download.page} if definition.download else {}
    with DAG(
        dag_id=settings.dag_id(name),
        dag_display_name=f"VQL daily: {definition.title}",
        description=f"One day of {definition.title}: events, sequences, training, evaluation, registry, user caches",
        doc_md=DOC
        % (NO_SCHEDULE if run.hour is None else f"{timetable.summary}, each time the day that ended at midnight"),
        schedule=timetable,  # knows the days of the data set: tasks would inherit a start_date or end_date
        catchup=False,
        on_failure_callback=functools.partial(end_failed_run, dataset=argument),
        max_active_runs=1,  # a day's model is judged against the champion of the days before
        dagrun_timeout=dtm.timedelta(hours=12 + run.wait_hours) + ANSWERED_WITHIN,
        tags=["longview", "vql", name],
        owner_links=links,
        default_args={
            "owner": "longview",
            **retried(),
            "execution_timeout": dtm.timedelta(hours=1),
            "on_failure_callback": note_failure,
            "pool": "default_pool",
        },
        params={option.name: _param(option, definition) for option in OPTIONS.values()},
    ) as dag:
        tasks = _Tasks(name, argument)
        chain(
            StartOperator(task_id=settings.START, dataset=argument, execution_timeout=dtm.timedelta(minutes=5)),
            tasks.ingest(),
            tasks.sequences(),
            tasks.train(),
            tasks.evaluate(),
            tasks.register(),
            tasks.caches(),
            tasks.stage(task_id="prune", module="evaluation.prune", arguments=[*tasks.runs, *tasks.to_reports]),
        )
    return dag


class _Tasks:
    """Makes the tasks of a data set's DAG, a method a group of the graph; called within the DAG."""

    def __init__(self, name: str, argument: str) -> None:
        self.name, self.dataset = name, argument
        self.reports = str(settings.reports())
        self.runs, self.to_reports = ["--runs", settings.runs()], ["--reports", self.reports]
        # Without a cluster a stage scores by itself: a Ray of its own starts longer than most days take to score.
        self.spread = arguments("workers") if settings.ray_address() else []
        self.stage = functools.partial(StageOperator, dataset=argument)
        self.of_model = functools.partial(ModelOperator, dataset=argument, runs=settings.runs())
        self.judged = functools.partial(GateOperator, dataset=argument, reports=self.reports)
        self.gate = functools.partial(self.judged, module="etl.quality.judge.audit")

    def ingest(self) -> TaskGroup:
        with TaskGroup("ingest", tooltip="Raw logs to audited events, day by day") as group:
            wait_for_files = WaitForFiles(task_id="wait_for_files", dataset=self.dataset)
            # Judges the raw files first: a day that they stop has its report here.
            build_events = self.judged(
                task_id="build_events",
                module="etl.jobs.events",
                only_stopped=True,
                arguments=arguments("raw", "lookback_days"),
                pool="spark",
                execution_timeout=HOURS_6,
            )
            audit_events = self.gate(task_id="audit_events", arguments=["--stage", "events"])
            wait_for_files >> build_events >> audit_events
        return group

    def sequences(self) -> TaskGroup:
        asset = Asset(name=f"vql_sequences_{self.name}", uri=f"longview://{self.name}/sequences")
        with TaskGroup("sequences", tooltip="One row a user: the history once, all targets with it") as group:
            build_sequences = self.stage(
                task_id="build_sequences",
                module="etl.jobs.sequences",
                arguments=[
                    *arguments("raw", "target_days", "lookback_days", "evaluation_days", "max_history"),
                    *self.to_reports,
                ],
                pool="spark",
                execution_timeout=HOURS_6,
            )
            audit_sequences = self.gate(task_id="audit_sequences", arguments=["--stage", "sequences"], outlets=[asset])
            build_sequences >> audit_sequences
        return group

    def train(self) -> TaskGroup:
        with TaskGroup(
            "train", tooltip="Gate on the training input, a question when a gate warned, then Ray Train"
        ) as group:
            audit_input = self.gate(task_id="audit_training_input", arguments=["--stage", "training_input"])
            approve_warnings = WarningApproval(
                task_id="approve_warnings", dataset=self.dataset, reports=self.reports, gate=audit_input.task_id
            )
            train_models = self.of_model(
                task_id="train_models",
                module="training.train",
                pool="training",
                execution_timeout=HOURS_6,
                arguments=arguments("workers", "config", "warm_start"),
            )
            audit_input >> approve_warnings >> train_models
        return group

    def evaluate(self) -> TaskGroup:
        with TaskGroup("evaluate", tooltip="Models, baselines and the champion on the evaluation day") as group:
            self.judged(
                task_id="evaluate_models",
                module="evaluation.evaluate",
                arguments=[*self.runs, *arguments("raw"), *self.spread],
                pool="training",
            )
        return group

    def register(self) -> TaskGroup:
        with TaskGroup("register", tooltip="Register, check in a fresh process, promote when better") as group:
            register_model = self.of_model(task_id="register_model", module="evaluation.release.register")
            # Backfills do not count against the DAG's max_active_runs; this counts every run that there is.
            promote_model = PromoteOperator(
                task_id="promote_model",
                module="evaluation.release.promote",
                dataset=self.dataset,
                runs=settings.runs(),
                arguments=self.spread,
                champion=champion_asset(self.name),
                max_active_tis_per_dag=1,
            )
            register_model >> promote_model
        return group

    def caches(self) -> TaskGroup:
        with TaskGroup("caches", tooltip="One attention cache a user, for scoring") as group:
            self.stage(
                task_id="build_user_caches",
                module="evaluation.user_caches",
                arguments=[*self.runs, *self.spread],
                pool="training",
            )
        return group


def _param(option: Option, definition: DatasetDefinition) -> Param:
    # A backfill gives every run the day of its own.
    note = " Leave it empty in a backfill: every run has its own day." if option.name == "dt" else SENT
    return Param(option.default(definition), title=option.title, description=option.description + note, **option.schema)

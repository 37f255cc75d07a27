"""The daily chain of one data set: raw logs of one day -> audited tables -> trained, judged, promoted model -> user caches."""

from __future__ import annotations

import datetime as dtm
import functools

from airflow.sdk import DAG, Asset, Param, TaskGroup, chain

from dags._common import StageOperator
from dags._exits import WAIT_AFTER_CRASH, StageRetries
from dags._gates import ANSWERED_WITHIN, GateOperator, WarningApproval
from dags._release import ModelOperator, PromoteOperator
from dags._start import StartOperator
from dags._timetable import PartitionDays
from dags._wait import WaitForFiles
from etl.datasets import DatasetDefinition
from etl.uris import FOLDER_PATTERN
from infra import settings

DOC = """
One run builds one **partition**: a UTC day `dt`, the evaluation day. Its id or its note names the day.

* **Trigger**: fill in `dt`. Without it the run takes the day of its logical date, which the form fills with now. A day outside
  the data set fails in the first task, `start`, with the reason.
* **Backfill** from A to B: every day of A to B, both included. Leave `dt` empty. The parameters shown in its dialog reach the runs only with
  *Override parameters on existing runs* ticked; otherwise every run takes the defaults of the data set's definition.
* **Schedule**: %s.

`start` logs the parameters first, each with where it comes from, and names the run's *attempt*, under which every stage writes;
audits judge what was written, and only then it is published. **Clear** the whole run, or `start`, for a new attempt; clear any later task
with its downstream tasks to go on in the same attempt. A stage that ends with `error:` and `remedy:` in its log is not retried when
there is something to mend or a gate said no; a server that does not answer is asked again for minutes.

Each later task is one command line, written first in its log; the same line runs outside Airflow (docs/stages.md).
"""
NO_SCHEDULE = "none, as the definition of the data set has no `run: {hour: ...}`"
MOST_DAYS = 36_500
# Airflow 3.3.2: the dialog shows the fields, and sends none of them without that tick.
SENT = ' In a backfill: only with "Override parameters on existing runs" ticked.'


def daily_dag(definition: DatasetDefinition, argument: str) -> DAG:
    """Return the DAG of a data set.

    Args:
        argument: what its stages are given as --dataset: the name of a built-in definition, or the path of another.
    """
    name, window_days, run = definition.name, definition.window, definition.run
    last_day = definition.last_day.isoformat() if definition.last_day else None
    timetable = PartitionDays(definition.first_day.isoformat(), last_day, run.hour if settings.schedules() else None)
    sequences_asset = Asset(name=f"vql_sequences_{name}", uri=f"longview://{name}/sequences")
    champion_asset = Asset(name=f"vql_champion_{name}", uri=f"longview://{name}/champion")
    links = {"longview": definition.download.page} if definition.download else {}
    with DAG(
        dag_id=settings.dag_id(name),
        dag_display_name=f"VQL daily: {definition.title}",
        description=f"One day of {definition.title}: events, sequences, training, evaluation, registry, user caches",
        doc_md=DOC % (NO_SCHEDULE if run.hour is None else f"{timetable.summary}, each time the day that ended at midnight"),
        schedule=timetable,  # knows the days of the data set: tasks would inherit a start_date or end_date
        catchup=False,
        max_active_runs=1,  # a day's model is judged against the champion of the days before
        dagrun_timeout=dtm.timedelta(hours=12 + run.wait_hours) + ANSWERED_WITHIN,
        tags=["longview", "vql", name],
        owner_links=links,
        default_args={
            "owner": "longview",
            "retries": len(settings.retry_waits()),
            "retry_policy": StageRetries(),
            "retry_delay": WAIT_AFTER_CRASH,
            "execution_timeout": dtm.timedelta(hours=1),
            "pool": "default_pool",
        },
        params={
            "dt": Param(None, type=["null", "string"], format="date", pattern=r"^\d{4}-\d{2}-\d{2}$(?!\n)", title="Partition day (UTC)",
                        description="The day to build; without it the run takes the day of its logical date. Leave it empty in a backfill: every run has its own day."),
            "raw": Param(run.raw or settings.raw(name), type="string", pattern=FOLDER_PATTERN, maxLength=500, title="Folder of the raw logs",
                         description="Absolute path, or a URI that Arrow reads." + SENT),
            "config": Param(run.config, type="string", pattern=r"^[a-z0-9_]+$(?!\n)", maxLength=60, title="Training configuration",
                            description="Name of a file of training/configs, without its suffix." + SENT),
            "target_days": Param(window_days.target_days, type="integer", minimum=2, maximum=MOST_DAYS, title="Target days",
                                 description="Days, dt included, whose events are targets; the last are for evaluation." + SENT),
            "lookback_days": Param(window_days.lookback_days, type="integer", minimum=2, maximum=MOST_DAYS, title="Lookback days",
                                   description="Days, dt included, whose events may stand in a history; at least target_days." + SENT),
            "evaluation_days": Param(window_days.evaluation_days, type="integer", minimum=1, maximum=MOST_DAYS, title="Evaluation days",
                                     description="Last days, dt included, that are for evaluation; fewer than target_days." + SENT),
            "max_history": Param(definition.history.max_events, type="integer", minimum=1, maximum=1_000_000, title="Longest history",
                                 description="At most so many of the latest events before it does a target see. A row stores these, "
                                 "and the events between its user's first and last target." + SENT),
            "warm_start": Param("none", type="string", enum=["none", "champion"], title="Warm start",
                                description="champion: begin with the weights of the model in service, if it is of an earlier day." + SENT),
            "on_warning": Param(run.on_warning, type="string", enum=[settings.CONTINUE, settings.APPROVE], title="When a gate warns",
                                description="approve: the run waits before training until a person approves or rejects it." + SENT),
            "workers": Param(run.workers, type="integer", minimum=1, maximum=64, title="Training workers",
                             description="Ray Train workers." + SENT),
        },
    ) as dag:  # fmt: skip
        stage = functools.partial(StageOperator, dataset=argument)
        of_model = functools.partial(ModelOperator, dataset=argument, runs=settings.runs())
        raw_files = ["--raw", "{{ given.raw }}"]
        runs = ["--runs", settings.runs()]
        reports = str(settings.reports())
        gate = functools.partial(GateOperator, dataset=argument, module="etl.quality.audit", reports=reports)
        lookback = ["--lookback-days", "{{ given.lookback_days }}"]
        window = ["--target-days", "{{ given.target_days }}", *lookback,
                  "--evaluation-days", "{{ given.evaluation_days }}", "--max-history", "{{ given.max_history }}"]
        hours_6 = dtm.timedelta(hours=6)

        start = StartOperator(task_id=settings.START, dataset=argument, execution_timeout=dtm.timedelta(minutes=5))

        with TaskGroup("ingest", tooltip="Raw logs to audited events, day by day") as ingest:
            wait_for_files = WaitForFiles(task_id="wait_for_files", dataset=argument)
            # Judges the raw files first: a day that they stop has its report here.
            build_events = GateOperator(task_id="build_events", module="etl.jobs.events", dataset=argument, reports=reports, only_stopped=True,
                                        arguments=[*raw_files, *lookback], pool="spark", execution_timeout=hours_6)
            audit_events = gate(task_id="audit_events", arguments=["--stage", "events"])
            wait_for_files >> build_events >> audit_events

        with TaskGroup("sequences", tooltip="One row a user: the history once, all targets beside it") as sequences:
            build_sequences = stage(task_id="build_sequences", module="etl.jobs.sequences", arguments=[*raw_files, *window, "--reports", reports],
                                            pool="spark", execution_timeout=hours_6)
            audit_sequences = gate(task_id="audit_sequences", arguments=["--stage", "sequences"], outlets=[sequences_asset])
            build_sequences >> audit_sequences

        with TaskGroup("train", tooltip="Gate on the training input, a question when a gate warned, then Ray Train") as train:
            audit_input = gate(task_id="audit_training_input", arguments=["--stage", "training_input"])
            approve_warnings = WarningApproval(task_id="approve_warnings", dataset=argument, reports=reports, gate=audit_input.task_id)
            train_models = of_model(
                task_id="train_models", module="training.main", pool="training", execution_timeout=hours_6,
                arguments=["--workers", "{{ given.workers }}", "--config", "{{ given.config }}",
                           "--warm-start", "{{ given.warm_start }}"],
            )  # fmt: skip
            audit_input >> approve_warnings >> train_models

        with TaskGroup("evaluate", tooltip="Models, baselines and the champion on the evaluation day") as evaluate:
            GateOperator(task_id="evaluate_models", module="evaluation.main", dataset=argument, reports=reports, arguments=[*runs, *raw_files],
                         pool="training")

        with TaskGroup("register", tooltip="Register, check in a fresh process, promote when better") as register:
            register_model = of_model(task_id="register_model", module="evaluation.register")
            # Backfills do not count against the DAG's max_active_runs; this counts every run that there is.
            promote_model = PromoteOperator(task_id="promote_model", module="evaluation.promote", dataset=argument, runs=settings.runs(),
                                            champion=champion_asset, max_active_tis_per_dag=1)
            register_model >> promote_model

        with TaskGroup("caches", tooltip="One attention cache a user, for scoring") as caches:
            stage(task_id="build_user_caches", module="training.caches", arguments=runs, pool="training")

        chain(start, ingest, sequences, train, evaluate, register, caches)

    return dag

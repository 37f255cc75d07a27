"""The daily chain of one data set: raw logs of one day -> audited tables -> trained, judged, promoted model -> user caches."""

from __future__ import annotations

import datetime as dtm
import functools

from airflow.sdk import DAG, Asset, CronDataIntervalTimetable, Param, TaskGroup, chain

from dags._common import StageOperator
from dags._exits import WAIT_AFTER_CRASH, StageRetries
from dags._gates import ANSWERED_WITHIN, GateOperator, WarningApproval
from dags._release import ModelOperator, PromoteOperator
from etl.datasets import DatasetDefinition
from infra import settings

DOC = """
One run builds one **partition**: a UTC day `dt`, the evaluation day. A scheduled run at midnight builds the day that has
just ended (`dt` is the first day of its data interval); a backfill from A to B builds every day of A to B, both included;
a manual run builds the parameter `dt`.

Stages write under the name of the run's *attempt*, pass an audit, and only then publish. A retry continues its attempt; a
cleared or reprocessed run is a new attempt and does all its work again. A stage that ends with `error:` and `remedy:` in its
log is not retried when there is something to mend or a gate said no; a server that does not answer is asked again for minutes.

Each task is one command line, written first in its log; the same line runs outside Airflow (docs/stages.md).
"""

# An absolute path or a URI, without control characters and without anything that a shell would read as its own. Only a URI has a query,
# and none has user info (`etl.uris` says why; a container of Azure is none). The last lookahead is for Python, whose `$` also matches
# before a final newline.
PLAIN = r"""[^\x00-\x1f\x7f;&|<>$`"'\\(){}\[\]*?!#]"""
HOST = r"[A-Za-z0-9._~-]*(:[0-9]+)?"
PATH = rf"^(/{PLAIN}*|(abfss?://[a-z0-9-]+@|[a-z][a-z0-9+.-]*://){HOST}(/{PLAIN}*)?(\?[A-Za-z0-9._~%:/=&+,-]*)?)$(?!\n)"
MOST_DAYS = 36_500


def daily_dag(definition: DatasetDefinition, argument: str) -> DAG:
    """Return the DAG of a data set.

    Args:
        argument: what its stages are given as --dataset: the name of a built-in definition, or the path of another.
    """
    name, window_days = definition.name, definition.window
    sequences_asset = Asset(name=f"vql_sequences_{name}", uri=f"longview://{name}/sequences")
    champion_asset = Asset(name=f"vql_champion_{name}", uri=f"longview://{name}/champion")
    links = {"longview": definition.download.page} if definition.download else {}
    with DAG(
        dag_id=settings.dag_id(name),
        dag_display_name=f"VQL daily: {definition.title}",
        description=f"One day of {definition.title}: events, sequences, training, evaluation, registry, user caches",
        doc_md=DOC,
        schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
        start_date=_midnight(definition.first_day),
        # Beyond the last day of a finished data set un-pausing would start a run of a day without data.
        end_date=_midnight(definition.last_day) if definition.last_day else None,
        catchup=False,
        max_active_runs=1,  # a day's model is judged against the champion of the days before
        dagrun_timeout=dtm.timedelta(hours=12) + ANSWERED_WITHIN,
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
                        description="Manual runs only: the day to build. Leave empty in a backfill."),
            "raw": Param(settings.raw(name), type="string", pattern=PATH, maxLength=500, title="Folder of the raw logs",
                         description="Absolute path, or a URI that Arrow reads."),
            "config": Param("default", type="string", pattern=r"^[a-z0-9_]+$(?!\n)", maxLength=60, title="Training configuration",
                            description="Name of a file of training/configs, without its suffix."),
            "target_days": Param(window_days.target_days, type="integer", minimum=2, maximum=MOST_DAYS, title="Target days",
                                 description="Days, dt included, whose events are targets; the last are for evaluation."),
            "lookback_days": Param(window_days.lookback_days, type="integer", minimum=2, maximum=MOST_DAYS, title="Lookback days",
                                   description="Days, dt included, whose events may stand in a history; at least target_days."),
            "evaluation_days": Param(window_days.evaluation_days, type="integer", minimum=1, maximum=MOST_DAYS, title="Evaluation days",
                                     description="Last days, dt included, that are for evaluation; fewer than target_days."),
            "max_history": Param(definition.history.max_events, type="integer", minimum=1, maximum=1_000_000, title="Longest history",
                                 description="At most so many of the latest events before it does a target see. A row stores these, "
                                 "and the events between its user's first and last target."),
            "warm_start": Param("none", type="string", enum=["none", "champion"], title="Warm start",
                                description="champion: begin with the weights of the model in service, if it is of an earlier day."),
            "on_warning": Param(settings.CONTINUE, type="string", enum=[settings.CONTINUE, settings.APPROVE], title="When a gate warns",
                                description="approve: the run waits before training until a person approves or rejects it."),
            "workers": Param(settings.WORKERS, type="integer", minimum=1, maximum=64, title="Training workers",
                             description="Ray Train workers."),
        },
    ) as dag:  # fmt: skip
        stage = functools.partial(StageOperator, dataset=argument)
        of_model = functools.partial(ModelOperator, dataset=argument, runs=settings.runs())
        raw_files = ["--raw", "{{ params.raw }}"]
        runs = ["--runs", settings.runs()]
        reports = str(settings.reports())
        gate = functools.partial(GateOperator, dataset=argument, module="etl.quality.audit", reports=reports)
        lookback = ["--lookback-days", "{{ params.lookback_days }}"]
        window = ["--target-days", "{{ params.target_days }}", *lookback,
                  "--evaluation-days", "{{ params.evaluation_days }}", "--max-history", "{{ params.max_history }}"]
        hours_6 = dtm.timedelta(hours=6)

        with TaskGroup("ingest", tooltip="Raw logs to audited events, day by day") as ingest:
            # Judges the raw files first: a day that they stop has its report here.
            build_events = GateOperator(task_id="build_events", module="etl.jobs.events", dataset=argument, reports=reports, only_stopped=True,
                                        arguments=[*raw_files, *lookback], pool="spark", execution_timeout=hours_6)
            audit_events = gate(task_id="audit_events", arguments=["--stage", "events"])
            build_events >> audit_events

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
                arguments=["--workers", "{{ params.workers }}", "--config", "{{ params.config }}",
                           "--warm-start", "{{ params.warm_start }}"],
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

        chain(ingest, sequences, train, evaluate, register, caches)

    return dag


def _midnight(day: dtm.date) -> dtm.datetime:
    return dtm.datetime.combine(day, dtm.time(), dtm.UTC)

"""The daily chain: raw logs of one day -> audited tables -> trained, judged, registered and promoted model -> user caches."""

from __future__ import annotations

import datetime as dtm
import os

from airflow.sdk import DAG, Asset, CronDataIntervalTimetable, Param, TaskGroup, chain

from dags._common import StageOperator
from infra import settings

DOC = """
One run builds one **partition**: a UTC day `dt`, the evaluation day. A scheduled run at midnight builds the day that has
just ended (`dt` is the first day of its data interval); a backfill from A to B builds every day of A to B, both included;
a manual run builds the parameter `dt`.

Stages write under the name of the run's *attempt*, pass an audit, and only then publish. A retry continues its attempt; a
cleared or reprocessed run is a new attempt and does all its work again. A stage that exits with code 2 printed what is
wrong and what to do (`error:` and `remedy:` in its log) and is not retried.

Each task is one command line, written first in its log; the same line runs outside Airflow (docs/stages.md).
"""

LAST_DAY = os.environ.get("LONGVIEW_LAST_DAY", "2022-05-08")  # KuaiRand ends here; empty for a feed that goes on
# An absolute path or a URI, without control characters and without anything that a shell would read as its own. The last
# lookahead is for Python, whose `$` also matches before a final newline.
PATH = r"""^([a-z][a-z0-9+]*://|/)[^\x00-\x1f\x7f;&|<>$`"'\\(){}\[\]*?!#]*$(?!\n)"""

SEQUENCES = Asset(name="vql_sequences", uri="longview://kuairand/sequences")
CHAMPION = Asset(name="vql_champion", uri="longview://kuairand/champion")

with DAG(
    dag_id=settings.DAG_ID,
    dag_display_name="VQL daily: KuaiRand",
    description="One day of KuaiRand: events, sequences, training, evaluation, registry, user caches",
    doc_md=DOC,
    schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
    start_date=dtm.datetime(2022, 4, 8, tzinfo=dtm.UTC),
    end_date=dtm.datetime.fromisoformat(LAST_DAY).replace(tzinfo=dtm.UTC) if LAST_DAY else None,
    catchup=False,
    max_active_runs=1,  # a day's model is judged against the champion of the days before
    dagrun_timeout=dtm.timedelta(hours=12),
    tags=["longview", "vql", "kuairand"],
    owner_links={"longview": "https://kuairand.com/"},
    default_args={
        "owner": "longview",
        "retries": 1,
        "retry_delay": dtm.timedelta(seconds=20),
        "execution_timeout": dtm.timedelta(hours=1),
        "pool": "default_pool",
    },
    params={
        "dt": Param(None, type=["null", "string"], format="date", pattern=r"^\d{4}-\d{2}-\d{2}$(?!\n)", title="Partition day (UTC)",
                    description="Manual runs only: the day to build. Leave empty in a backfill."),
        "dataset": Param("kuairand", type="string", enum=["kuairand", "kuairand_simulated"], title="Data set",
                         description="kuairand_simulated keeps the simulator's tables and models apart from real ones."),
        "raw": Param(settings.raw("kuairand"), type="string", pattern=PATH, maxLength=500, title="Folder of the raw logs",
                     description="Absolute path, or a URI that Spark reads."),
        "config": Param("default", type="string", pattern=r"^[a-z0-9_]+$(?!\n)", maxLength=60, title="Training configuration",
                        description="Name of a file of training/configs, without its suffix."),
        "target_days": Param(settings.TARGET_DAYS, type="integer", minimum=2, maximum=365, title="Target days",
                             description="Days, dt included, whose impressions are targets; the last is the evaluation day."),
        "lookback_days": Param(settings.LOOKBACK_DAYS, type="integer", minimum=2, maximum=3650, title="Lookback days",
                               description="Days, dt included, whose events may stand in a history; at least target_days."),
        "max_history": Param(settings.MAX_HISTORY, type="integer", minimum=1, maximum=1_000_000, title="Longest history",
                             description="Most recent events kept of each user."),
        "workers": Param(settings.WORKERS, type="integer", minimum=1, maximum=64, title="Training workers",
                         description="Ray Train workers."),
    },
):  # fmt: skip
    RAW = ["--raw", "{{ params.raw }}"]
    RUNS = ["--runs", settings.runs()]
    REPORTS = ["--reports", str(settings.reports())]
    LOOKBACK = ["--lookback-days", "{{ params.lookback_days }}"]
    WINDOW = ["--target-days", "{{ params.target_days }}", *LOOKBACK, "--max-history", "{{ params.max_history }}"]
    HOURS_6 = dtm.timedelta(hours=6)

    with TaskGroup("ingest", tooltip="Raw logs to audited events, day by day") as ingest:
        build_events = StageOperator(task_id="build_events", module="etl.jobs.events", arguments=[*RAW, *LOOKBACK], pool="spark",
                                     execution_timeout=HOURS_6)
        audit_events = StageOperator(task_id="audit_events", module="etl.quality.audit", arguments=["--stage", "events", *REPORTS])
        build_events >> audit_events

    with TaskGroup("sequences", tooltip="One row a user: the history once, all targets beside it") as sequences:
        build_sequences = StageOperator(task_id="build_sequences", module="etl.jobs.sequences", arguments=[*RAW, *WINDOW],
                                        pool="spark", execution_timeout=HOURS_6)
        audit_sequences = StageOperator(task_id="audit_sequences", module="etl.quality.audit", arguments=["--stage", "sequences", *REPORTS],
                                        outlets=[SEQUENCES])
        build_sequences >> audit_sequences

    with TaskGroup("train", tooltip="Gate on the training input, then Ray Train") as train:
        audit_input = StageOperator(task_id="audit_training_input", module="etl.quality.audit",
                                    arguments=["--stage", "training_input", *REPORTS])
        train_models = StageOperator(
            task_id="train_models", module="training.main", pool="training", execution_timeout=HOURS_6,
            arguments=[*RUNS, "--workers", "{{ params.workers }}", "--config", "{{ params.config }}"],
        )  # fmt: skip
        audit_input >> train_models

    with TaskGroup("evaluate", tooltip="Models, baselines and the champion on the evaluation day") as evaluate:
        StageOperator(task_id="evaluate_models", module="evaluation.main", arguments=[*RUNS, *RAW], pool="training")

    with TaskGroup("register", tooltip="Register, check in a fresh process, promote when better") as register:
        register_model = StageOperator(task_id="register_model", module="evaluation.register", arguments=RUNS)
        promote_model = StageOperator(task_id="promote_model", module="evaluation.promote", arguments=RUNS, outlets=[CHAMPION])
        register_model >> promote_model

    with TaskGroup("caches", tooltip="One attention cache a user, for scoring") as caches:
        StageOperator(task_id="build_user_caches", module="training.caches", arguments=RUNS, pool="training")

    chain(ingest, sequences, train, evaluate, register, caches)

"""The Airflow DAG that trains several models on one published partition and compares them."""

import datetime as dtm

from airflow.sdk import DAG

from dags._common import note_failure
from dags._compare import PLAN, TABLE, TRAIN, PlanOperator, TableOperator, TrainingOperator, params
from dags._exits import retried

DOC = """
One run compares **models side by side** on a published partition: the same rows, loop and budget for all, each model at
each length and with each seed. **Trigger** it and fill in the form; nothing runs by itself.

`plan` checks the form and names the trainings, `train` has a task for each of them, `table` makes the table and the
plots, with intervals over seeds and users, of those that stand; it does so, too, when the run is marked as failed, and
ends the run in MLflow. Trainings share the pool `training` with those of the daily runs, which go first. Each training
is a line of a file, and what stands there is not trained again: **clear** any task, or trigger another run with more
models, lengths or seeds. `make compare` is the same without Airflow (docs/evaluation.md). Nothing is registered.
"""

with DAG(
    dag_id="vql_compare",
    dag_display_name="VQL compare: models side by side",
    description="Several models on one published partition, by lengths and seeds: table, plots, runs in MLflow",
    doc_md=DOC,
    schedule=None,
    catchup=False,
    tags=["longview", "vql", "compare"],
    default_args={
        "owner": "longview",
        **retried(),
        "execution_timeout": dtm.timedelta(hours=1),
        "on_failure_callback": note_failure,
        "pool": "default_pool",
    },
    params=params(),
) as dag:
    plan = PlanOperator(task_id=PLAN)
    trainings = TrainingOperator.partial(
        task_id=TRAIN,
        map_index_template="{{ task.training.name }}",
        pool="training",
        execution_timeout=dtm.timedelta(hours=6),
    ).expand(training=plan.output)
    # What `plan` has begun in MLflow, `table` ends: Airflow runs a teardown of a run that is marked as failed, too, and
    # clears both with every task between them.
    table = TableOperator(task_id=TABLE).as_teardown(setups=plan, on_failure_fail_dagrun=True)
    trainings >> table

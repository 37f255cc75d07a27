"""One Airflow DAG for each data set that comes with the project: `vql_daily_<data set>`."""

from airflow.sdk import get_parsing_context

from dags._daily import daily_dag
from etl.datasets.definition import built_in_names, dataset
from infra import settings

wanted = get_parsing_context().dag_id  # that of a task, whose process has no use for the others; else None
for name in built_in_names():
    if wanted in (None, settings.dag_id(name)):
        dag = daily_dag(dataset(name), name)
        globals()[dag.dag_id] = dag

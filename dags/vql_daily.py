"""One Airflow DAG for each data set that comes with the project: `vql_daily_<data set>`."""

from dags._daily import daily_dag
from etl.datasets.definition import built_in_names, dataset

for name in built_in_names():
    dag = daily_dag(dataset(name), name)
    globals()[dag.dag_id] = dag

"""One Airflow DAG for each data set of your own: `make run DATASET=name.yaml` puts its definition into the folder read
here.

A file of its own, so that a wrong definition shows as an import error and takes no other DAG with it.
"""

from airflow.sdk import get_parsing_context

from dags._daily import daily_dag
from etl.datasets.definition import built_in_names, dataset
from etl.stage.errors import StageError
from infra import settings

wanted = get_parsing_context().dag_id  # that of a task, which another's wrong definition does not concern; else None
for path in sorted(settings.definitions().glob("*.yaml")):
    if wanted not in (None, settings.dag_id(path.stem)):
        continue
    if path.stem in built_in_names():
        raise StageError(
            f"{path} has the name of a data set that comes with the project",
            "give it another name (name: and file name)",
        )
    dag = daily_dag(dataset(str(path)), str(path))
    globals()[dag.dag_id] = dag

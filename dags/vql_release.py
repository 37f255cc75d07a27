"""The Airflow DAG in which a person promotes, refuses or rolls back a version of any data set's model."""

import datetime as dtm

from airflow.sdk import DAG

from dags._by_hand import DecisionOperator, params
from dags._common import note_failure
from dags._exits import retried

DOC = """
One run is one **decision** on a version of a data set's model, by name and with a reason. **Trigger** it and fill in
the form; nothing runs by itself.

* **rollback**: the champion before serves again, with the anchor of then. It is the one that the records name.
* **promote**: a version serves, whatever the quality gate said of it. One whose artifact failed in a fresh process is
  refused, unless the form says *despite the mechanical gate*. The champion, or its equal, moves nothing.
* **refuse**: a version is not promoted by the gates any more, and no rollback goes to it.

The aliases in MLflow move, the user caches of the newest day are built anew, and the asset `vql_champion_<data set>`
has an event. A promotion of a daily run that is at work is waited for. **Clear** completes the same decision and never
takes it twice; for another one, trigger another run. The command line is written first in the log (docs/operations.md).
"""

with DAG(
    dag_id="vql_release",
    dag_display_name="VQL release: promote, refuse, roll back",
    description="A person's decision on a version of a model, by name and with a reason",
    doc_md=DOC,
    schedule=None,
    catchup=False,
    dagrun_timeout=dtm.timedelta(hours=3),
    tags=["longview", "vql", "release"],
    params=params(),
) as dag:
    DecisionOperator(
        task_id="decide",
        owner="longview",
        **retried(),
        execution_timeout=dtm.timedelta(hours=2),
        on_failure_callback=note_failure,
        pool="default_pool",
    )

"""What Airflow has to know of this project before it reads a DAG: the timetable that the DAGs are serialised with."""

from typing import Any

from airflow.plugins_manager import AirflowPlugin

from dags._timetable import PartitionDays


class LongviewPlugin(AirflowPlugin):
    name = "longview"
    timetables: list[Any] = [PartitionDays]  # noqa: RUF012 - declared so by Airflow

"""Buttons of tasks that lead into MLflow.

Airflow asks for each address when the task ends, well or not, keeps it as an XCom and knows the button from the DAG
itself: no plugin has to be installed.
"""

from __future__ import annotations

from typing import Any, ClassVar

from airflow.sdk import BaseOperatorLink


class _AddressLink(BaseOperatorLink):
    """A button that leads to the address in an attribute of the operator; '' where it has none yet."""

    key: ClassVar[str]  # of the XCom
    attribute: ClassVar[str]

    @property
    def xcom_key(self) -> str:
        return self.key

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        return getattr(operator, self.attribute, "")


class ReportLink(_AddressLink):
    """The report of the partition."""

    name = "Partition report"
    key, attribute = "partition_report", "report_url"


class MlflowRunLink(_AddressLink):
    """The run of the task's attempt."""

    name = "MLflow run"
    key, attribute = "mlflow_run", "run_url"


class ModelVersionLink(_AddressLink):
    """The version that the task's attempt has registered."""

    name = "Model version"
    key, attribute = "model_version", "version_url"


class EvaluationReportLink(_AddressLink):
    """The page of the evaluation that the task's attempt was judged by."""

    name = "Evaluation report"
    key, attribute = "evaluation_report", "evaluation_url"

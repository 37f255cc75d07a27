"""Buttons of tasks that lead into MLflow. Airflow asks for each address when the task ends, well or not, and keeps it as an XCom."""

from __future__ import annotations

from typing import Any

from airflow.sdk import BaseOperatorLink


class MlflowRunLink(BaseOperatorLink):
    """The run of the task's attempt, in MLflow; '' where it has none yet."""

    name = "MLflow run"

    @property
    def xcom_key(self) -> str:
        return "mlflow_run"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        return getattr(operator, "run_url", "")


class ModelVersionLink(BaseOperatorLink):
    """The version that the task's attempt has registered; '' where it has none yet."""

    name = "Model version"

    @property
    def xcom_key(self) -> str:
        return "model_version"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        return getattr(operator, "version_url", "")

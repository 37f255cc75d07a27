"""One attempt at one partition has one name everywhere (Spark, staging, validation, Ray, MLflow).

The name stays the same over retries, so that a retry continues its work, and is new whenever a run is cleared or
reprocessed, so that no external system mistakes the new attempt for the finished old one.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

RUN_URL_VARIABLE = "LONGVIEW_AIRFLOW_RUN_URL"  # a stage that Airflow runs finds the address of its run there
ATTEMPT_PATTERN = re.compile(r"^(?P<dataset>[a-z0-9_]+)-(?P<dt>\d{4}-\d{2}-\d{2})-(?P<run>[0-9a-f]{8})-c(?P<clear>\d+)$")


def attempt_name(dataset: str, dt: str, dag_run_id: str, clear_number: int) -> str:
    """Return `<dataset>-<dt>-<hash of the dag run id>-c<clear number>`.

    >>> attempt_name("kuairand", "2022-04-21", "manual__1", 0)
    'kuairand-2022-04-21-19b04f56-c0'
    """
    run_hash = hashlib.sha256(dag_run_id.encode()).hexdigest()[:8]
    return f"{dataset}-{dt}-{run_hash}-c{clear_number}"


def report_page(reports: Path, dataset: str, dt: str, attempt: str) -> Path:
    """Return where the report of an attempt at a partition is (`etl.quality.report` writes it)."""
    return reports / "partitions" / dataset / f"dt={dt}" / f"{attempt}.html"

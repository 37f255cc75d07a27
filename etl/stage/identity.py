"""One attempt at one partition has one name everywhere (Spark, staging, validation, Ray, MLflow).

The first task of a run names the attempt and hands the name on. A retry and a clear of a later task go on in it; a
clear of the whole run or of its first task begins another one, so that no external system mistakes it for the finished
old one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

RUN_URL_VARIABLE = "LONGVIEW_AIRFLOW_RUN_URL"  # a stage that Airflow runs finds the address of its run there


def attempt_name(dataset: str, dt: str, of: str) -> str:
    """Return `<dataset>-<dt>-<12 hex digits>`.

    Args:
        of: what no other attempt has: the id of the task instance that names it, new at each clear and in each row of a
            run.

    >>> attempt_name("kuairand", "2022-04-21", "0199c2f4-7d1e-7c55-b1f0-1f2f3f4f5f6f")
    'kuairand-2022-04-21-8f4ed4e35edb'
    """
    return f"{dataset}-{dt}-{hashlib.sha256(of.encode()).hexdigest()[:12]}"


def report_page(reports: Path, dataset: str, dt: str, attempt: str) -> Path:
    """Return where the report of an attempt at a partition is (`etl.quality.report.write` writes it)."""
    return reports / "partitions" / dataset / f"dt={dt}" / f"{attempt}.html"

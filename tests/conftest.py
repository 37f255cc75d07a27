"""Shared by every test: nothing writes to the project's own `var/`, and Airflow never meets another installation."""

from __future__ import annotations

import os
import tempfile

# Before anything imports Airflow: it reads its settings at import.
_HOME = tempfile.mkdtemp(prefix="longview-tests-")
os.environ["LONGVIEW_HOME"] = _HOME
for _name in ("WAREHOUSE", "RAW", "RUNS", "REPORTS", "DEFINITIONS", "AIRFLOW_DB"):
    os.environ.pop(f"LONGVIEW_{_name}", None)
for _name in ("MLFLOW_TRACKING_URI", "RAW", "DT", "DATASET", "CONFIG"):
    os.environ.pop(_name, None)

from infra import settings  # noqa: E402

os.environ.update(settings.environment())


def pytest_sessionfinish() -> None:
    import shutil

    shutil.rmtree(_HOME, ignore_errors=True)

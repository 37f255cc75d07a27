"""Shared by every test: nothing writes to the project's own `var/`, and Airflow never meets another installation."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

# Before anything imports Airflow: it reads its settings at import.
_HOME = tempfile.mkdtemp(prefix="longview-tests-")
os.environ["LONGVIEW_HOME"] = _HOME
for _name in ("WAREHOUSE", "RAW", "RUNS", "REPORTS", "DEFINITIONS", "AIRFLOW_DB"):
    os.environ.pop(f"LONGVIEW_{_name}", None)
for _name in ("MLFLOW_TRACKING_URI", "RAW", "DT", "DATASET", "CONFIG"):
    os.environ.pop(_name, None)

from infra import settings  # noqa: E402

os.environ.update(settings.environment())

# Several test processes share the cores: threads that spin for each other would stop them all.
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Without a file of its main module PySpark takes such a process for its doctests, and ends it.
    sys.modules["__main__"].__file__ = str(Path(__file__).with_name("__init__.py"))

# The one profile of every property test. The same examples each time, so that a run fails by a change and never by
# chance; how fast a machine is, or how busy, is no property of the code. HYPOTHESIS=explore draws new examples and
# keeps those that fail.
hypothesis.settings.register_profile(
    "same", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("explore", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS") or "same")


@pytest.fixture(autouse=True)
def no_page_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate in a test's own process starts none that writes its page: hundreds of them, seconds each, outlive their
    tests.

    Tests of pages write them by `etl.quality.report.write`, or run the gate as a process of its own.
    """
    for name in ("etl.quality.judge.audit", "evaluation.evaluate"):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "written_after", lambda *around, **more: contextlib.nullcontext())


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name packed bytes without their contents: gzip puts the time into them, and every process must find the same
    tests."""
    return "gzip" if isinstance(val, bytes) and val[:2] == b"\x1f\x8b" else None


def pytest_sessionfinish() -> None:
    import shutil

    shutil.rmtree(_HOME, ignore_errors=True)

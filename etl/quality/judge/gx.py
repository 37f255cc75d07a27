"""Imports Great Expectations, which takes seconds: once, without its telemetry, beside what else there is to do.

It is imported as it is. It tries for databases and clouds that the gates do not need, a second of processor time; keeping
those from it by hiding modules would keep them from every other thread, too, and one that starts Spark meanwhile fails.
PySpark's packages import one another in circles, which two threads cannot do at once: whoever uses Spark and a gate in one
process imports pyspark.sql before the gate's thread begins (`etl.quality.judge.in_job` waits for Spark's gateway).
"""

from __future__ import annotations

import importlib
import os
import threading
from types import ModuleType


def great_expectations() -> ModuleType:
    """Return the module; other threads may ask for it, and import what they like, meanwhile."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read at import
    return importlib.import_module("great_expectations")


def import_early() -> None:
    """Begin the import beside whatever else there is to do."""
    threading.Thread(target=great_expectations, daemon=True).start()

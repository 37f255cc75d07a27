"""Imports Great Expectations without the databases and clouds that it tries for: they are half of its import.

Its compatibility modules import SQLAlchemy, PySpark, boto3 and others when they are installed, and do without when not. The
gates validate small frames in pandas and need none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from types import ModuleType

# Tried and done without; what the process has imported already stays as it is.
NOT_NEEDED = ("pyspark", "pyspark.ml", "sqlalchemy", "boto3", "botocore", "google", "azure", "snowflake", "trino", "pyathena", "databricks")
# Imported by its modules, used by expectations that the suites do not have.
RARELY_NEEDED = ("scipy.stats",)

_importing = threading.Lock()


def great_expectations() -> ModuleType:
    """Return the module; other threads may ask for it meanwhile."""
    with _importing:
        if "great_expectations" in sys.modules:
            return sys.modules["great_expectations"]
        os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read at import
        hidden = [name for name in NOT_NEEDED if name not in sys.modules]
        for name in RARELY_NEEDED:
            if name not in sys.modules:
                _load_when_used(name)
        try:
            for name in hidden:
                sys.modules[name] = None  # type: ignore[assignment]
            return importlib.import_module("great_expectations")
        finally:
            for name in hidden:
                if sys.modules.get(name, hidden) is None:
                    del sys.modules[name]


def import_early() -> None:
    """Begin the import beside whatever else there is to do. Nothing may import what is hidden until it is done."""
    threading.Thread(target=great_expectations, daemon=True).start()


def _load_when_used(name: str) -> None:
    parent, _, child = name.rpartition(".")
    package = importlib.import_module(parent)
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    setattr(package, child, module)

"""Great Expectations is imported in a thread while Spark starts: neither import may keep modules from the other.

.venv/bin/python -m pytest tests/etl/quality/test_gx.py -q
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import importlib, sys, threading, time
import pyspark.sql  # as a job has, before its gate begins in it
from etl.quality.judge.gx import great_expectations

failed = []
def work():
    try:
        great_expectations()
    except BaseException as error:
        failed.append(error)

thread = threading.Thread(target=work)
thread.start()
while not any(name.startswith("great_expectations.") for name in list(sys.modules)):
    time.sleep(0.001)
time.sleep({wait})
# What a job and S3 need, imported anew by this thread while the other one is at it.
for name in ("pyspark.sql.pandas.types", "boto3", "sqlalchemy", "botocore"):
    importlib.import_module(name)
    assert sys.modules[name] is not None, name
thread.join()
assert not failed, failed
assert all(
    module is not None for name, module in sys.modules.items()
    if name.split(".")[0] in ("pyspark", "boto3", "sqlalchemy"))
"""


def run(folder: Path, code: str) -> None:
    """Run a program in a process of its own.

    A file, since PySpark takes `python -c` for its own doctests and ends it.
    """
    program = folder / "program.py"
    program.write_text(code)
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wait", [0.0, 0.02, 0.1, 0.3, 0.6])
def test_other_threads_import_what_they_like_meanwhile(tmp_path: Path, wait: float) -> None:
    run(tmp_path, CODE.replace("{wait}", str(wait)))


def test_an_expectation_is_built_while_another_thread_imports(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
import time
from etl.quality.judge import gx
from etl.quality.measure import own_rules as own
from etl.datasets.quality_rules import Expectation

gx.import_early()
time.sleep(0.2)
made = Expectation(name="e", table="events", expectation="ExpectColumnValuesToBeInSet",
    arguments={"column": "context", "value_set": [1]}, reason="r")
assert gx.built(made).column == "context"
""",
    )

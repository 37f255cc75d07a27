"""The kinds of failure and their exit codes, as a shell or Airflow sees them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from etl.stage.errors import EXIT_CORRECT, EXIT_GATE, EXIT_TRY_AGAIN
from etl.warehouse.pointers import opened
from etl.warehouse.store import TableStore
from tests.processes import free_port

ARROW = (
    "When reading: AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7, Could not connect to server"
)


def ends(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, check=False
    )


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ("StageError('odd', 'correct it')", EXIT_CORRECT),
        ("GateError('odd', 'correct it')", EXIT_GATE),
        ("TryAgainError('odd', 'correct it')", EXIT_TRY_AGAIN),
        (f"OSError({ARROW!r})", EXIT_TRY_AGAIN),
        (f"RuntimeError('Py4JJavaError: trace\\n  at java\\n{ARROW}\\n at java')", EXIT_TRY_AGAIN),
        ("OSError('odd')", 1),
        ("OSError('AWS Error ACCESS_DENIED during GetObject')", 1),
        ("ConnectionRefusedError(111)", 1),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(raised: str, code: int) -> None:
    done = ends(
        "from etl.stage.commands import run_stage\nfrom etl.stage.errors import *\ndef main(): raise"
        f" {raised}\nrun_stage(main)"
    )
    assert done.returncode == code
    if code != 1:
        assert done.stderr.startswith("error: ")
        assert "\n  remedy: " in done.stderr
        assert "Traceback" not in done.stderr


def test_a_store_that_does_not_answer_is_no_fault_of_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    warehouse = f"s3://bucket/w?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{free_port()}"
    code = (
        "import sys; from etl.stage.commands import run_stage; from etl.quality.judge.audit import main;"
        " run_stage(main)"
    )
    secrets = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "--dataset",
            "kuairand",
            "--warehouse",
            warehouse,
            "--dt",
            "2022-04-21",
            "--attempt",
            "a",
            "--stage",
            "events",
        ],
        capture_output=True,
        text=True,
        env=os.environ | secrets,
        check=False,
    )
    assert done.returncode == EXIT_TRY_AGAIN, done.stderr
    assert "error: a store does not answer: " in done.stderr
    # boto3, which replaces pointers, says it in words of its own
    for name, value in (secrets | {"AWS_MAX_ATTEMPTS": "1"}).items():
        monkeypatch.setenv(name, value)
    store = TableStore(warehouse, "kuairand")
    with (
        pytest.raises(Exception, match="cannot be read or replaced") as caught,
        opened(store.fs, warehouse, f"{store.root}/p"),
    ):
        pass
    assert getattr(caught.value, "exit_code", None) == EXIT_TRY_AGAIN

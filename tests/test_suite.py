"""What holds for every test: a busy or slow machine fails none of them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).parent
CLOCKS = {
    "monotonic",
    "perf_counter",
    "process_time",
    "thread_time",
    "time",
    "monotonic_ns",
    "perf_counter_ns",
    "process_time_ns",
    "thread_time_ns",
    "time_ns",
}
SLOW_PROPERTY = """
import time
from hypothesis import given, settings, strategies as st

@st.composite
def slowly(draw):
    time.sleep(0.5)
    return draw(st.integers())

@settings(max_examples=4)
@given(slowly())
def test_slow_to_draw_and_to_check(value):
    time.sleep(0.3)
"""


def test_property_tests_draw_the_same_examples_without_a_deadline() -> None:
    profile = hypothesis.settings()
    assert profile.deadline is None
    assert profile.derandomize
    assert hypothesis.HealthCheck.too_slow in profile.suppress_health_check


def test_a_property_that_is_slow_passes(tmp_path: Path) -> None:
    path = tmp_path / "test_slow_property.py"
    path.write_text(SLOW_PROPERTY)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--rootdir",
            str(TESTS.parent),
            "-c",
            str(TESTS.parent / "pyproject.toml"),
            "-p",
            "tests.conftest",
            str(path),
        ],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_test_has_limits_of_its_own_or_reads_a_clock(path: Path) -> None:
    """Work is counted, or compared with other work; tests/waiting.py waits for what happens."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            found += [
                f"line {node.lineno}: {word.arg}="
                for word in node.keywords
                if word.arg in ("deadline", "suppress_health_check")
            ]
            if (
                isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "time"
                and node.func.attr in CLOCKS
            ):
                found.append(f"line {node.lineno}: time.{node.func.attr}()")
    assert found == []


@pytest.mark.parametrize("page", sorted((TESTS.parent / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    file = ""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", page.read_text()):
        file = path or file
        if path or name:
            assert (f"def {name}(" if name else "") in (TESTS.parent / file).read_text(), f"{file}::{name}"

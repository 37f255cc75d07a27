"""Form, command lines, variables of make and the docs name the same options."""

from __future__ import annotations

import importlib
import re
import sys

import pytest

from infra import options, settings
from infra.options import OPTIONS


def test_the_makefile_hands_on_every_variable():
    exported = re.search(r"^export (.*)$", (settings.ROOT / "Makefile").read_text(), re.MULTILINE)
    assert exported is not None
    assert {option.variable for option in OPTIONS.values()} <= set(exported[1].split())


def test_the_docs_have_the_table():
    assert options.table() in (settings.ROOT / "docs/operations.md").read_text(), "print(infra.options.table()) has it"


def test_every_option_of_the_form_reaches_a_stage_that_takes_it(capsys, monkeypatch):
    from dags._common import StageOperator
    from dags.vql_daily import vql_daily_kuairand as dag

    handed = set()
    for task in dag.tasks:
        if not isinstance(task, StageOperator):
            continue
        monkeypatch.setattr(sys, "argv", [task.module, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(task.module).main()
        known = capsys.readouterr().out
        for argument, value in zip(task.arguments, task.arguments[1:], strict=False):
            if name := re.fullmatch(r"\{\{ given\.(\w+) \}\}", str(value)):
                handed.add(name[1])
                assert argument == OPTIONS[name[1]].argument
                assert re.search(rf"{argument}\b", known), f"{task.module} has no {argument}"
    # The first task names the day, and the approval reads its own option.
    assert handed == set(OPTIONS) - {"dt", "on_warning"}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("max_history", "2", 2),
        ("max_history", "²", "MAX_HISTORY=² is not a whole number"),
        ("workers", "2", "2"),
        ("workers", "1:4", "1:4"),
        ("workers", "4:4", "4:4"),
        ("workers", "4:2", "WORKERS=4:2 is not a whole number from 1 to 64, or two of them, MIN:MAX: the first is"),
        ("workers", "0:3", "WORKERS=0:3 is not a whole number from 1 to 64, or two of them, MIN:MAX"),
        ("workers", "1:65", "WORKERS=1:65 is not"),
        ("workers", "1:2:3", "WORKERS=1:2:3 is not"),
        ("workers", "1:", "WORKERS=1: is not"),
        ("workers", "2\n", "is not a whole number"),
        ("workers", "0", "WORKERS=0 is not a whole number from 1 to 64"),
        ("workers", "two", "WORKERS=two is not a whole number from 1 to 64"),
        ("workers", "²", "WORKERS=² is not a whole number"),
        ("target_days", "1", "TARGET_DAYS=1 is not a whole number from 2 to 36,500"),
        ("warm_start", "champion", "champion"),
        ("warm_start", "Champion", "WARM_START=Champion is not none or champion"),
        ("config", "../x", "CONFIG=../x is not a name"),
    ],
)
def test_a_variable_is_checked_as_the_form_checks_its_field(name, text, wanted):
    try:
        assert OPTIONS[name].parsed(text) == wanted
    except ValueError as error:
        assert wanted in str(error)

"""Validating by hand: the gate's own result, as an exit code and as JSON, and nothing changed.

.venv/bin/python -m pytest tests/etl/quality/test_check.py -q
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from etl.quality.judge import check
from etl.quality.judge.outcomes import read_outcomes
from etl.stage.errors import StageError
from etl.warehouse.store import TableStore
from tests.etl.quality.test_audit import (
    DATASET,
    DT,
    all_zero_labels,
    events_table,
    failures,
    run,
    set_column,
    stage_events,
    stage_table,
)


def bot() -> object:
    table = events_table()
    user = table["user_id"].to_numpy()
    return set_column(table, "user_id", np.where(user < 11, 0, user))


def files(store: TableStore) -> set[str]:
    return {str(path) for path in Path(store.warehouse).rglob("*") if path.is_file()}


def arguments(store: TableStore, *more: str) -> list[str]:
    return ["--dataset", DATASET, "--warehouse", store.warehouse, "--dt", DT, "--stage", "events", "--json", *more]


@pytest.mark.parametrize(
    ("table", "code", "severity"), [(events_table, 0, None), (bot, 4, "warning"), (all_zero_labels, 3, "critical")]
)
def test_a_check_says_what_the_gate_will_say_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table, code: int, severity: str | None
) -> None:
    store = TableStore(str(tmp_path / "warehouse"), DATASET)
    stage_events(store, "tried", table=table())
    before = files(store)
    assert check.main(arguments(store, "--attempt", "tried")) == code
    found = json.loads(capsys.readouterr().out)
    assert files(store) == before
    assert found["max_severity"] == severity
    if severity == "critical":
        with pytest.raises(StageError):
            run(store, "events", "tried", tmp_path / "reports")
    else:
        run(store, "events", "tried", tmp_path / "reports")
    for each in ("critical", "warning", "info"):
        assert {o["column"] for o in found["outcomes"] if not o["success"] and o["severity"] == each} == failures(
            store, "tried", "events", each
        )
    [outcome] = read_outcomes(store, DT, "tried")
    assert [o["observed"] for o in found["outcomes"]] == [o.observed for o in outcome.outcomes]
    [statistics] = found["statistics"]
    assert (statistics["dt"], statistics["metrics"]["rows"]) == (DT, 960)


def test_without_an_attempt_the_published_day_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = TableStore(str(tmp_path / "warehouse"), DATASET)
    with pytest.raises(StageError, match="not published"):
        check.main(arguments(store))
    stage_events(store, "first")
    run(store, "events", "first", tmp_path / "reports")
    capsys.readouterr()
    assert check.main(arguments(store)) == 0
    assert json.loads(capsys.readouterr().out)["attempt"] is None


def test_a_day_that_is_published_anew_while_it_is_checked_is_checked_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are no longer where its manifest says: publication has moved them."""
    path = tmp_path / "own.yaml"
    own = {"table": "events", "severity": "critical", "reason": "a test", "remedy": "none"}
    path.write_text(
        yaml.safe_dump(
            {
                "extends": DATASET,
                "name": "own",
                "quality": {
                    "conditions": [{**own, "name": "known", "sql": "user_id >= 0"}],
                    "expectations": [
                        {
                            **own,
                            "name": "present",
                            "expectation": "ExpectColumnValuesToNotBeNull",
                            "arguments": {"column": "item_id"},
                        }
                    ],
                },
            }
        )
    )
    store = TableStore(str(tmp_path / "warehouse"), "own")
    stage_events(store, "first")
    for table in ("quarantine", "events"):
        store.publish("first", table, DT)
    held = {table: store.require(table, DT) for table in ("quarantine", "events")}
    stage_events(store, "second", table=all_zero_labels())
    store.publish("second", "events", DT)
    stage_table(store, "second", "quarantine", DT, [])
    store.publish("second", "quarantine", DT)
    monkeypatch.setattr(TableStore, "manifest", lambda self, table, dt: held.get(table) if dt == DT else None)
    assert (
        check.main(["--dataset", str(path), "--warehouse", store.warehouse, "--dt", DT, "--stage", "events", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["max_severity"] is None
    assert {"known", "present"} <= {one["column"] for one in found["outcomes"]}


def test_standard_output_is_json_alone(tmp_path: Path) -> None:
    store = TableStore(str(tmp_path / "warehouse"), DATASET)
    stage_events(store, "tried", table=all_zero_labels())
    done = subprocess.run(
        [sys.executable, "-m", "etl.quality.judge.check", *arguments(store, "--attempt", "tried")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert json.loads(done.stdout)["stage"] == "events"

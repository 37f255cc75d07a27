"""The folder of an attempt below the folder of runs.

It belongs to one partition, one definition and one training configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etl.datasets.definition import DatasetDefinition
from etl.datasets.rows_digest import rows_digest
from etl.stage.errors import StageError
from etl.stage.local_files import replace_text

OWNER_FILE = "attempt.json"


def run_folder(
    runs: str, definition: DatasetDefinition, dt: str, attempt: str, config_digest: str | None = None
) -> Path:
    """Return `<runs>/<attempt>`; the first stage to come makes it and writes down whose it is.

    Args:
        config_digest: of the training configuration; None: a stage that knows none, and makes no folder.

    Raises:
        StageError: it belongs to something else; both values are named.
    """
    folder = Path(runs).absolute() / attempt
    if config_digest is not None:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.exists():
        return folder
    mine = {"dataset": definition.name, "dt": dt, "definition": rows_digest(definition)} | (
        {"config": config_digest} if config_digest else {}
    )
    path = folder / OWNER_FILE
    owner = json.loads(path.read_text()) if path.exists() else {}
    wrong = [f"{key} {owner[key]}, not {value}" for key, value in mine.items() if owner.get(key, value) != value]
    if wrong:
        raise StageError(
            f"attempt {attempt} belongs to {' and '.join(wrong)} (by {path})",
            "give every day, definition and configuration an --attempt of its own; in Airflow, clear the whole run for"
            " a new one",
        )
    if owner != owner | mine:
        replace_text(path, json.dumps(owner | mine, indent=1))
    return folder


def result_of(folder: Path, name: str, remedy: str) -> dict[str, Any]:
    """Return what an earlier stage of the attempt wrote into its folder.

    Args:
        name: of the file, such as `training.json`.
        remedy: which stage to run.

    Raises:
        StageError: it has not.
    """
    path = folder / name
    if not path.exists():
        raise StageError(f"{path} is missing", remedy)
    return json.loads(path.read_text())

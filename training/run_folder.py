"""The folder of an attempt below the folder of runs.

It belongs to one partition, one definition and one training configuration.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from etl.datasets.definition import DatasetDefinition
from etl.datasets.rows_digest import rows_digest
from etl.stage.errors import StageError
from etl.stage.folder import Folder

OWNER_FILE = "attempt.json"


def run_folder(
    runs: str, definition: DatasetDefinition, dt: str, attempt: str, config_digest: str | None = None
) -> Folder:
    """Return `<runs>/<attempt>`; the first stage to come makes it and writes down whose it is.

    Args:
        runs: a path or a URI.
        config_digest: of the training configuration; None: a stage that knows none, and makes no folder.

    Raises:
        StageError: it belongs to something else; both values are named.
    """
    folder = Folder(runs, "--runs").below(attempt)
    if config_digest is None and not folder.exists():
        return folder
    mine = {"dataset": definition.name, "dt": dt, "definition": rows_digest(definition)} | (
        {"config": config_digest} if config_digest else {}
    )
    owner = json.loads(folder.read_text(OWNER_FILE) or "{}")
    wrong = [f"{key} {owner[key]}, not {value}" for key, value in mine.items() if owner.get(key, value) != value]
    if wrong:
        raise StageError(
            f"attempt {attempt} belongs to {' and '.join(wrong)} (by {folder.address_of(OWNER_FILE)})",
            "give every day, definition and configuration an --attempt of its own; in Airflow, clear the whole run for"
            " a new one",
        )
    if owner != owner | mine:
        folder.write_text(OWNER_FILE, json.dumps(owner | mine, indent=1))
    return folder


def within_reach(package: str, run_dir: Folder, name: str) -> str:
    """Return the address of a package that every worker reaches: what MLflow gave lies on this machine's disk alone,
    and the folder of runs is all that workers on other machines share with it.

    Args:
        name: of the copy in the attempt's folder.
    """
    if not Path(package).is_dir():  # a URI, or a path that only the workers may have
        return package
    with run_dir.written_folder(name) as copy:
        shutil.copytree(package, copy, dirs_exist_ok=True)
    return run_dir.address_of(name)


def result_of(folder: Folder, name: str, remedy: str) -> dict[str, Any]:
    """Return what an earlier stage of the attempt wrote into its folder.

    Args:
        name: of the file, such as `training.json`.
        remedy: which stage to run.

    Raises:
        StageError: it has not.
    """
    text = folder.read_text(name)
    if text is None:
        raise StageError(f"{folder.address_of(name)} is missing", remedy)
    return json.loads(text)

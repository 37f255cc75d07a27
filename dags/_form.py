"""What the forms of the DAGs share: which data sets there are, and what is wrong with a field."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from airflow.sdk.exceptions import ParamValidationError

from etl.datasets.definition import built_in_names
from infra import settings


def data_sets() -> dict[str, str]:
    """Return the name of each data set that has a DAG -> what a stage is given as --dataset."""
    built_in = {name: name for name in built_in_names()}
    own = {path.stem: str(path) for path in sorted(settings.definitions().glob("*.yaml"))}
    return built_in | {name: path for name, path in own.items() if name not in built_in}


def unknown_fields(known: Iterable[str], given: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the names of the fields, each problem behind the name."""
    known, found = list(known), []
    for name in given:
        if name not in known and not name.startswith("airflow/"):
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            found.append(f"{name}: no parameter of this DAG; {meant}")
    return found


def refused_fields(own: Any, given: Mapping[str, Any]) -> dict[str, str]:
    """Return field -> what its schema says against its value.

    Args:
        own: the parameters of the DAG.
    """
    found = {}
    for name in own:
        try:
            own.get_param(name).resolve(given.get(name))
        except ParamValidationError as error:
            found[name] = f"{name}: {str(error).splitlines()[0]}"
    return found

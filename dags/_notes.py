"""The note of a run, which Airflow shows with it: its partition and attempt, and what became of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dags._common import run_path

LONGEST_NOTE = 1_000  # characters; Airflow refuses more
ANSWER_WITHIN_SECONDS = 10

log = logging.getLogger(__name__)


def append_note(context: Mapping[str, Any], line: str) -> None:
    """Add a line to the top of the note of the task's run: Airflow's pages show the first, and the others on demand.

    Of a note that gets too long the oldest lines go.

    A task has no way to the note but the REST API, with the login of `make up`. Where it does not answer, or refuses,
    the line is in the task's log only; it costs the task nothing.
    """
    from infra.airflow_api import AirflowApi, InfraError  # loads more than a DAG file needs

    log.info("note of the run: %s", line)
    path = run_path(context["dag_run"])
    try:
        api = AirflowApi()
        lines = (api.call("GET", path, timeout=ANSWER_WITHIN_SECONDS)["note"] or "").splitlines()
        if line not in lines:
            api.change(
                "PATCH", f"{path}?update_mask=note", {"note": with_line(lines, line)}, timeout=ANSWER_WITHIN_SECONDS
            )
    except (OSError, ValueError, KeyError, InfraError) as error:
        log.warning("the note stands in this log only: %s", error)


def with_line(lines: list[str], line: str) -> str:
    """Return the note with one more line, as far as it may be long."""
    shown = [line[:LONGEST_NOTE], *lines]
    while len("\n".join(shown)) > LONGEST_NOTE:
        del shown[-1]
    return "\n".join(shown)

"""Logs the report of a partition (`etl.quality.report.write`) to the MLflow run of its attempt, whether its gate held
or not.

    python -m training.log_report --dataset D --warehouse W --dt YYYY-MM-DD --attempt A [--reports DIR]
    [--when-input-ends]

Prints one line of JSON: `experiment_id`, `run_id` and `artifact`, each null when there was no page or MLflow did not
answer. A stopped partition ends its run as FAILED: no training will.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from etl.datasets.arguments import partition_parser, store_of
from etl.datasets.definition import DatasetDefinition
from etl.stage.commands import log, run_stage
from etl.stage.identity import report_page
from training.tracking import asking_mlflow, run_of_attempt, set_tracking

ARTIFACT_FOLDER = "validation"


def log_page(definition: DatasetDefinition, dt: str, attempt: str, page: Path) -> dict[str, str | None]:
    """Log the page as artifact `validation/<attempt>.html`; return what its address in MLflow is made of.

    Never raises for MLflow's sake.
    """
    nowhere: dict[str, str | None] = {"experiment_id": None, "run_id": None, "artifact": None}
    if not page.exists():
        log(f"warning: there is no report {page} to log to MLflow")
        return nowhere
    stopped = json.loads(page.with_suffix(".json").read_text())["verdict"] == "stopped"
    try:
        with asking_mlflow():
            run = run_of_attempt(definition, dt, attempt, {})
            from mlflow import MlflowClient

            MlflowClient().log_artifact(run.info.run_id, str(page), ARTIFACT_FOLDER)
            if stopped:
                MlflowClient().set_terminated(run.info.run_id, status="FAILED")
    except Exception as error:
        log(f"warning: MLflow did not take the report {page}: {error}")
        return nowhere
    return {
        "experiment_id": run.info.experiment_id,
        "run_id": run.info.run_id,
        "artifact": f"{ARTIFACT_FOLDER}/{page.name}",
    }


def _open_store(experiment: str) -> None:
    """Load MLflow and open its store: seconds, and nothing that waits for the gate."""
    with contextlib.suppress(Exception):  # reported when the page is logged
        set_tracking()
        from mlflow import MlflowClient

        MlflowClient().get_experiment_by_name(experiment)


def main(argv: list[str] | None = None) -> None:
    """Log the page of one attempt at one partition."""
    parser: argparse.ArgumentParser = partition_parser(__doc__)
    parser.add_argument("--reports", default="var/reports", help="local folder of the pages (default: %(default)s)")
    parser.add_argument(
        "--when-input-ends",
        action="store_true",
        help="load MLflow, then wait for standard input to end: a gate is at work meanwhile",
    )
    args = parser.parse_args(argv)
    page = report_page(Path(args.reports).resolve(), store_of(args).dataset, args.dt, args.attempt)
    if args.when_input_ends:
        _open_store(args.dataset)
        sys.stdin.read()
    print(json.dumps(log_page(args.definition, args.dt, args.attempt, page)))


if __name__ == "__main__":
    run_stage(main)
    sys.stdout.flush()
    os._exit(0)  # all is written; MLflow would take another second to leave

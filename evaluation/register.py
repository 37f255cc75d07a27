"""Register the attempt's primary model: one version with signature, input example and the tags that lead back to its data."""

from __future__ import annotations

import json
from importlib.metadata import version as installed_version
from pathlib import Path

from etl.cli import definition_of, log, partition_parser, run_stage, store_of
from etl.errors import StageError
from etl.quality.kept import read_outcomes
from etl.store import TableStore, code_version
from evaluation.main import read_training, write_json
from training.registry import CHALLENGER, Registry, unreachable
from training.tracking import ATTEMPT_TAG, attempt_run

ROOT = Path(__file__).resolve().parents[1]
SERVING_PACKAGES = ("mlflow", "numpy", "pandas", "pyarrow", "safetensors", "torch")
LONG_LISTS = ("history_item_id", "history_time_ms", "history_feedback", "history_watch_bucket", "target_item_id", "target_time_ms", "target_context")


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument("--runs", required=True, help="folder of runs; this one reads and writes <runs>/<attempt>/")
    args = parser.parse_args()
    definition = definition_of(args)
    store = store_of(args)
    run_dir = Path(args.runs).absolute() / args.attempt
    training, evaluation = read_training(run_dir), read_evaluation(run_dir)
    _require_sound_scores(store, args.dt, args.attempt)
    primary = next(row for row in evaluation["models"] if row["name"] == training["primary"])
    registry = Registry(args.dataset)
    version = registry.version_of_attempt(args.attempt)
    try:
        with attempt_run(args.definition, args.dt, args.attempt, {}, required=True) as run:
            if version is None:
                tags = {
                    ATTEMPT_TAG: args.attempt,
                    "pipeline.partition": args.dt,
                    "pipeline.dataset": args.dataset,
                    "data.snapshot_digest": run.data.tags.get("data.snapshot_digest") or store.require("sequences", args.dt).data_digest,
                    "mlflow.source.git.commit": run.data.tags.get("mlflow.source.git.commit") or code_version(),
                    "config_digest": training["config_digest"],
                    "simulated": str(definition.simulated).lower(),
                    "validation_status": "pending",
                    **_passes(store, args.dt, args.attempt),
                    **{metric: f"{primary[metric]:.6f}" for metric in ("auc", "gauc", "logloss") if primary[metric] is not None},
                }
                version = _create_version(registry, Path(training["models"][training["primary"]]["package"]), training["primary"], tags)
                registry.client.set_registered_model_alias(registry.name, CHALLENGER, version)
            elif (holder := registry.aliases().get(CHALLENGER)) is None or int(holder) < int(version):
                registry.client.set_registered_model_alias(registry.name, CHALLENGER, version)  # a try that died in between
            run_id = run.info.run_id
    except Exception as error:
        if isinstance(error, StageError) or not _is_tracking_failure(error):
            raise
        raise unreachable(registry.uri, error) from error
    registration = {"model_name": registry.name, "version": version, "aliases": registry.aliases_of(version), "run_id": run_id}
    write_json(run_dir / "registration.json", registration)
    log(f"{registry.name} version {version}: {', '.join(registration['aliases']) or 'no alias'}")


def read_evaluation(run_dir: Path) -> dict:
    """Return `evaluation.json` of an attempt.

    Raises:
        StageError: evaluation has not finished.
    """
    path = run_dir / "evaluation.json"
    if not path.exists():
        raise StageError(f"{path} is missing", "run evaluation.main with the same --attempt and --runs first")
    return json.loads(path.read_text())


def request_frame(requests: list[dict]):
    """Return the served model's input: one row a request, list columns."""
    import pandas as pd

    return pd.DataFrame({name: [list(request[name]) for request in requests] for name in (*LONG_LISTS, "user_fields")})


def _create_version(registry: Registry, package: Path, name: str, tags: dict[str, str]) -> str:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    from training.scoring import load_scorer

    signature = ModelSignature(
        inputs=Schema([*(ColSpec(Array(DataType.long), column) for column in LONG_LISTS), ColSpec(Array(DataType.string), "user_fields")]),
        outputs=Schema([ColSpec(Array(DataType.double), "scores")]),
    )
    logged = mlflow.pyfunc.log_model(
        name=name,
        python_model=str(ROOT / "evaluation" / "served_model.py"),
        artifacts={"package": str(package)},
        code_paths=[str(ROOT / "training"), str(ROOT / "etl")],
        signature=signature,
        input_example=request_frame([load_scorer(package).example_request()]),
        pip_requirements=[f"{requirement}=={installed_version(requirement)}" for requirement in SERVING_PACKAGES],
        model_type="ranker",
        tags=tags,
    )
    return str(mlflow.register_model(logged.model_uri, registry.name, tags=tags).version)


def _is_tracking_failure(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, (MlflowException, OSError))


def _passes(store: TableStore, dt: str, attempt: str) -> dict[str, str]:
    """Return the tags that say which gates a person has let this attempt through, and why; none where every gate held."""
    passed = [outcome.passed for outcome in read_outcomes(store, dt, attempt) if outcome.passed is not None]
    if not passed:
        return {}
    return {
        "quality.passed_by": "; ".join(dict.fromkeys(decision.by for decision in passed)),
        "quality.passed_reason": "; ".join(f"{decision.stage}: {decision.reason}" for decision in passed),
        "quality.passed_expectations": "; ".join(f"{decision.stage}: {', '.join(one.column for one in decision.failing)}" for decision in passed),
    }


def _require_sound_scores(store: TableStore, dt: str, attempt: str) -> None:
    """Refuse an attempt whose scores the gate has stopped: the evaluation ended with an error, but left its files.

    Raises:
        StageError: it has.
    """
    for outcome in read_outcomes(store, dt, attempt):
        if outcome.stage == "model_output" and outcome.stopped:
            failed = outcome.failed("critical")
            raise StageError(f"gate model_output stopped attempt {attempt}: {'; '.join(o.message for o in failed)}", failed[0].remedy)


if __name__ == "__main__":
    run_stage(main)

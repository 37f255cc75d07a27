"""Register the attempt's primary model.

One version with signature, input example and the tags that lead back to its data.
"""

from __future__ import annotations

from importlib.metadata import version as installed_version
from pathlib import Path

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.quality.judge.outcomes import read_outcomes
from etl.stage.commands import log, run_stage
from etl.stage.errors import GateError
from etl.warehouse.store import TableStore, code_version
from evaluation.evaluate import package_of, read_evaluation, read_training, task_of, write_json
from evaluation.release.model_card import write_card
from training.model_runs import has_files, logged_model, model_runs, show_in
from training.registry import CHALLENGER, DIGEST_TAG, WARM_START_TAG, Registry, model_digest
from training.run_folder import run_folder
from training.tracking import ATTEMPT_TAG, PARTITION_TAG, URL_TAG, asking_mlflow, attempt_run

ROOT = Path(__file__).resolve().parents[2]
OF_THE_RUN = ("data.items_digest", "config", "git.dirty", "pipeline.command", URL_TAG)  # tags that a version takes over
SERVING_PACKAGES = ("mlflow", "numpy", "pandas", "pyarrow", "safetensors", "torch")
LONG_LISTS = (
    "history_item_id",
    "history_time_ms",
    "history_feedback",
    "history_watch_bucket",
    "target_item_id",
    "target_time_ms",
    "target_context",
)


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument(
        "--runs", required=True, help="folder of runs, a path or URI; this one reads and writes RUNS/<attempt>/"
    )
    args = parser.parse_args()
    store = store_of(args)
    run_dir = run_folder(args.runs, definition_of(args), args.dt, args.attempt)
    training, evaluation = read_training(run_dir), read_evaluation(run_dir)
    with attempt_run(args.definition, args.dt, args.attempt, {}) as run:
        _require_sound_scores(store, args.dt, args.attempt)
        registry = Registry(args.dataset)
        version = registry.version_of_attempt(args.attempt, args.dt)
        if version is None:
            primary = next(row for row in evaluation["models"] if row["name"] == training["primary"])
            tags = {
                ATTEMPT_TAG: args.attempt,
                PARTITION_TAG: args.dt,
                "pipeline.dataset": args.dataset,
                "data.snapshot_digest": run.data.tags.get("data.snapshot_digest")
                or store.require("sequences", args.dt).data_digest,
                "mlflow.source.git.commit": run.data.tags.get("mlflow.source.git.commit") or code_version(),
                "config_digest": training["config_digest"],
                WARM_START_TAG: training.get("warm_start", "unknown"),
                "simulated": str(args.definition.simulated).lower(),
                **task_of(args.definition),
                "validation_status": "pending",
                **{name: run.data.tags[name] for name in OF_THE_RUN if name in run.data.tags},
                **_passes(store, args.dt, args.attempt),
                **{
                    metric: f"{primary[metric]:.6f}"
                    for metric in ("auc", "gauc", "logloss")
                    if primary[metric] is not None
                },
            }
            with package_of(training["models"][training["primary"]]) as package, asking_mlflow():
                tags[DIGEST_TAG] = model_digest(package)
                _create_version(registry, run, package, training["primary"], tags)
            version = registry.version_of_attempt(args.attempt, args.dt)
            assert version is not None
        with asking_mlflow():
            if (holder := registry.aliases().get(CHALLENGER)) is None or int(holder) < int(version):
                registry.client.set_registered_model_alias(registry.name, CHALLENGER, version)
        write_card(registry, args.definition, version, training, evaluation)
        registration = {
            "model_name": registry.name,
            "version": version,
            "aliases": registry.aliases_of(version),
            "run_id": run.info.run_id,
            "experiment_id": run.info.experiment_id,
        }
    write_json(run_dir, "registration.json", registration)
    log(f"{registry.name} version {version}: {', '.join(registration['aliases']) or 'no alias'}")


def request_frame(requests: list[dict]):
    """Return the served model's input: one row a request, list columns."""
    import pandas as pd

    return pd.DataFrame({name: [list(request[name]) for request in requests] for name in (*LONG_LISTS, "user_fields")})


def requirements() -> list[str]:
    """Return what an environment for serving needs, pinned as every package index knows it: torch's version without the
    `+cpu` or `+cu126` of the build that is installed here."""
    return [f"{name}=={installed_version(name).partition('+')[0]}" for name in SERVING_PACKAGES]


def _create_version(registry: Registry, run, package: Path, name: str, tags: dict[str, str]) -> None:
    """Register the package as the model that its metrics belong to, whose files an earlier try may have logged."""
    import mlflow

    model = logged_model(run, name, model_runs(run, [name])[name], tags[DIGEST_TAG])
    if not has_files(model):
        _log_files(package, model.model_id)
    show_in(run.info.run_id, model)
    mlflow.register_model(model.model_uri, registry.name, tags=tags)


def _log_files(package: Path, model_id: str) -> None:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    from training.scoring import load_scorer

    signature = ModelSignature(
        inputs=Schema(
            [
                *(ColSpec(Array(DataType.long), column) for column in LONG_LISTS),
                ColSpec(Array(DataType.string), "user_fields"),
            ]
        ),
        outputs=Schema([ColSpec(Array(DataType.double), "scores")]),
    )
    mlflow.pyfunc.log_model(
        model_id=model_id,
        python_model=str(Path(__file__).with_name("served_model.py")),
        artifacts={"package": str(package)},
        code_paths=[str(ROOT / "training"), str(ROOT / "etl")],
        signature=signature,
        input_example=request_frame([load_scorer(package).example_request()]),
        pip_requirements=requirements(),
    )


def _passes(store: TableStore, dt: str, attempt: str) -> dict[str, str]:
    """Return the tags that say which gates a person has let this attempt through, and why.

    None where every gate held.
    """
    passed = [outcome.passed for outcome in read_outcomes(store, dt, attempt) if outcome.passed is not None]
    if not passed:
        return {}
    return {
        "quality.passed_by": "; ".join(dict.fromkeys(decision.by for decision in passed)),
        "quality.passed_reason": "; ".join(f"{decision.stage}: {decision.reason}" for decision in passed),
        "quality.passed_expectations": "; ".join(
            f"{decision.stage}: {', '.join(one.column for one in decision.failing)}" for decision in passed
        ),
    }


def _require_sound_scores(store: TableStore, dt: str, attempt: str) -> None:
    """Refuse an attempt whose scores the gate has stopped: the evaluation ended with an error, but left its files.

    Raises:
        GateError: it has.
    """
    for outcome in read_outcomes(store, dt, attempt):
        if outcome.stage == "model_output" and outcome.stopped:
            failed = outcome.failed("critical")
            raise GateError(
                f"gate model_output stopped attempt {attempt}: {'; '.join(o.message for o in failed)}", failed[0].remedy
            )


if __name__ == "__main__":
    run_stage(main)

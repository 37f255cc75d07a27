"""Train VQL and its baselines on one partition.

With --workers N the models are trained by Ray Train, N data-parallel workers in one Ray start (GPUs when there are
any), with --workers MIN:MAX as many as there is room for; --workers 0 trains in this very process, for a debugger, from
the same modules. `training.torchrun` does it without Ray in several processes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError, TryAgainError
from etl.stage.folder import Folder
from etl.stage.worker_counts import worker_range
from etl.warehouse.store import TableStore, code_version
from training.config import TrainConfig, load_config
from training.job import Job, champion_before, train_all
from training.loop import Worker
from training.model_runs import model_runs, parameters_of
from training.ray_workers import train_with_ray
from training.registry import CHAMPION, ArtifactGone, Registry
from training.resume import flat
from training.run_folder import run_folder, within_reach
from training.tracking import NAME_TAG, asking_mlflow, attempt_run, entry, log_origin, run_name

if TYPE_CHECKING:
    from mlflow.entities import Run

TABLES = "sequences", "items"  # that a training reads
WARM_START = "warm_start"
BEGUN_FILE = "warm_start.json"  # says which version an attempt began with; its package lies beside it


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument(
        "--workers",
        default="2",
        help="Ray Train workers; MIN:MAX: as many as there is room for; 0: train in this process, without Ray",
    )
    args = parser.parse_args()
    if args.workers == "0":
        train(args, lambda job: train_all(job, Worker()), prints=True)
        return
    try:
        workers = worker_range(args.workers)
    except ValueError as error:
        raise StageError(f"--workers {error}", "correct it, or give 0 to train in this process") from None
    train(args, lambda job: train_with_ray(job, *workers), prints=False)


def training_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of what every way to train has in common."""
    parser = partition_parser(description)
    parser.add_argument("--runs", required=True, help="folder of runs, a path or URI; this one writes RUNS/<attempt>/")
    parser.add_argument("--config", default="default", help="name of a file in training/configs/")
    parser.add_argument("--models", default=None, help="comma list: train only these models of the configuration")
    parser.add_argument(
        "--warm-start",
        default="none",
        help=(
            "none; champion: begin with the weights of the model in service when it is of an earlier partition; or the "
            "folder of a model package, a path or a URI. New items get rows of their own behind the known ones"
        ),
    )
    parser.add_argument("--seed", type=int, default=None, help="override the configuration's seed")
    return parser


def train(args: argparse.Namespace, trained: Callable[[Job], dict[str, dict]], prints: bool) -> None:
    """Train in the attempt's MLflow run, and write what came of it.

    Args:
        trained: trains a job and returns what `train_all` does.
        prints: as of `Job`.
    """
    definition_of(args)
    store = store_of(args)
    config = _narrowed(load_config(args.config), args.models, args.seed)
    run_dir = run_folder(args.runs, args.definition, args.dt, args.attempt, config.digest)
    tags = _tags(args, config)
    with attempt_run(args.definition, args.dt, args.attempt, tags, required=False) as run:
        runs_of_models = _runs_of_models(run, config, store, args.dt)
        warm_start, begun_with = begun_from(args.warm_start, args.dataset, args.dt, run_dir)
        job = Job(
            store.warehouse,
            args.dataset,
            args.dt,
            args.attempt,
            run_dir.address,
            config,
            run.info.run_id,
            runs_of_models,
            warm_start,
            prints,
        )
        summaries = trained(job)
    summary = {
        "config": asdict(config),
        "config_digest": config.digest,
        "models": summaries,
        "primary": next(iter(config.models)),
        "seed": config.seed,
        "warm_start": begun_with,
        "mlflow_run_id": job.mlflow_run_id,
        "mlflow_experiment_id": run.info.experiment_id,
    }
    run_dir.write_text("training.json", json.dumps(summary, indent=1))
    log(f"trained {', '.join(summaries)}; packages in {run_dir.address_of('models')}")


def _runs_of_models(run: Run, config: TrainConfig, store: TableStore, dt: str) -> dict[str, str] | None:
    """Return model -> its run below the attempt's, which has what it is made from; None: MLflow does not answer."""
    if run.info.run_id is None:
        return None
    inputs = [store.require(table, dt) for table in TABLES]
    log_origin(run.info.run_id, flat(config.deciding), store, inputs)
    try:
        with asking_mlflow():
            found = model_runs(run, config.models)
    except TryAgainError as error:
        log(f"warning: metrics wait in the folder of the run: {error.what}")
        return None
    for name, run_id in found.items():
        log_origin(run_id, parameters_of(config.deciding, name), store, inputs)
    return found


def begun_from(wanted: str, dataset: str, dt: str, run_dir: Folder) -> tuple[str | None, str]:
    """Return the address of the package to begin with, None for none, and what it is: `none`, the version of the
    registered model, or the address that was given.

    A try that follows begins with what the first one began with, whatever is champion by then.

    Args:
        wanted: `none`, `champion` or an address.

    Raises:
        StageError: the champion's files are gone.
    """
    if wanted != CHAMPION:
        if wanted == "none":
            return None, wanted
        return within_reach(Folder(wanted, "--warm-start").address, run_dir, WARM_START), wanted
    said = run_dir.read_text(BEGUN_FILE)
    version = champion_before(dataset, dt) if said is None else json.loads(said)["version"]
    if said is not None:
        log(f"starting as the first try did: {'cold' if version is None else f'from version {version}'}")
        return (None, "none") if version is None else (run_dir.address_of(WARM_START), version)
    address = None
    if version is not None:
        try:
            address = within_reach(str(Registry(dataset).package(version)), run_dir, WARM_START)
        except ArtifactGone as error:
            raise StageError(
                f"no warm start from the champion: {error}", "train with --warm-start none, or promote another version"
            ) from error
    run_dir.write_text(BEGUN_FILE, json.dumps({"version": version}))  # last: the package is whole
    return address, version or "none"


def _tags(args: argparse.Namespace, config: TrainConfig) -> dict[str, str]:
    """Return what the run was made from; refuse a partition that holds nothing to train on."""
    store = TableStore(args.warehouse, args.dataset)
    sequences = store.require("sequences", args.dt)
    if not sequences.counts.get("train_targets"):
        raise StageError(
            f"partition dt={args.dt} of {args.dataset} has no training target on a day before {args.dt}",
            "choose a later --dt, or build sequences with more --target-days",
        )
    return {
        "data.snapshot_digest": sequences.data_digest,
        "data.items_digest": store.require("items", args.dt).data_digest,
        "mlflow.source.git.commit": code_version(),
        "mlflow.source.name": entry(),
        "mlflow.source.type": "LOCAL",
        "pipeline.command": shlex.join(["python", "-m", entry(), *sys.argv[1:]]),
        "config": args.config,
        "config_digest": config.digest,
        NAME_TAG: run_name(args.dataset, args.dt, args.attempt, args.config),
    }


def _narrowed(config: TrainConfig, models: str | None, seed: int | None) -> TrainConfig:
    if models is not None:
        wanted = models.split(",")
        unknown = [name for name in wanted if name not in config.models]
        if unknown:
            raise StageError(f"unknown model {unknown[0]!r} in --models", f"use some of: {', '.join(config.models)}")
        config = replace(config, models={name: config.models[name] for name in wanted})
    return config if seed is None else replace(config, seed=seed)


if __name__ == "__main__":
    run_stage(main)

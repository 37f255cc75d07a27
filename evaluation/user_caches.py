"""Build the promoted model's cache of every user of a partition and publish them as `user_caches`, stamped with its
version.
"""

from __future__ import annotations

import argparse

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.stage.commands import log, run_stage
from etl.stage.folder import Folder
from etl.warehouse.schemas import USER_CACHES, schema_fingerprint
from etl.warehouse.store import Manifest, TableStore, code_version
from evaluation.cache_building import CacheBuilding
from evaluation.evaluate import read_training
from evaluation.spread import IN_THIS_PROCESS, Spread, add_arguments, each_bucket
from training.registry import CHAMPION, Registry
from training.run_folder import result_of, run_folder
from training.tracking import attempt_run


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument("--runs", required=True, help="folder of runs, a path or URI; this one reads RUNS/<attempt>/")
    add_arguments(parser)
    args = parser.parse_args()
    store = store_of(args)
    run_dir = run_folder(args.runs, definition_of(args), args.dt, args.attempt)
    remedy = "run evaluation.release.register and evaluation.release.promote for this attempt first"
    registration = result_of(run_dir, "registration.json", remedy)
    with attempt_run(args.definition, args.dt, args.attempt, {}, last=True):
        _publish_caches(args, store, run_dir, registration)


def _publish_caches(args: argparse.Namespace, store: TableStore, run_dir: Folder, registration: dict) -> None:
    """Build and publish the caches of what this attempt has promoted; nothing where it did not, or where another has
    become champion since."""
    if CHAMPION not in Registry(args.dataset).aliases_of(registration["version"]):
        log(
            f"version {registration['version']} of {registration['model_name']} is not the champion, whose caches stay"
            " as they are"
        )
        return
    training = read_training(run_dir)
    package = training["models"][training["primary"]]["package"]
    version = f"{registration['model_name']}/{registration['version']}"
    manifest = build_user_caches(store, args.dt, args.attempt, package, version, Spread.of(args))
    log(
        f"published {manifest.rows} user caches, {sum(f.bytes for f in manifest.files):,} bytes, for version"
        f" {registration['version']}"
    )


def build_user_caches(
    store: TableStore, dt: str, attempt: str, package: str, model_version: str, spread: Spread = IN_THIS_PROCESS
) -> Manifest:
    """Build caches over what a target at the end of each stored history sees, with the end of the day as reference
    time; publish them.

    Args:
        package: address of the model's package, which every worker reaches.
    """
    sequences, items = store.require("sequences", dt), store.require("items", dt)
    staging = store.begin_try(attempt, ["user_caches"], [dt], dt)
    files = each_bucket(CacheBuilding(store.warehouse, items, sequences, package, staging), sequences, spread, attempt)
    inputs = {store.input_name(m): m.data_digest for m in (sequences, items)}
    store.write_staged_manifest(
        staging,
        Manifest(
            store.dataset,
            "user_caches",
            dt,
            attempt,
            schema_fingerprint(USER_CACHES),
            code_version(),
            tuple(files),
            counts={"users": sum(f.rows for f in files)},
            inputs=inputs,
            settings={"model_version": model_version},
        ),
    )
    return store.publish(attempt, "user_caches", dt)


if __name__ == "__main__":
    run_stage(main)

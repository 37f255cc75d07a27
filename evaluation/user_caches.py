"""Build the promoted model's cache of every user of a partition and publish them as `user_caches`, stamped with its
version.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError
from etl.stage.folder import Folder
from etl.warehouse.partitions import MS_PER_DAY, day_number
from etl.warehouse.schemas import USER_CACHES, history_first, schema_fingerprint
from etl.warehouse.store import Manifest, TableStore, code_version
from evaluation.evaluate import package_of, read_training
from training.data import Joined, Sequences, make_batch
from training.package import load_package
from training.registry import CHAMPION, Registry
from training.run_folder import result_of, run_folder
from training.tracking import attempt_run

USERS_PER_CHUNK = 64


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument("--runs", required=True, help="folder of runs, a path or URI; this one reads RUNS/<attempt>/")
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
    with package_of(training["models"][training["primary"]]) as package:
        version = f"{registration['model_name']}/{registration['version']}"
        manifest = build_user_caches(store, args.dt, args.attempt, package, version)
    log(
        f"published {manifest.rows} user caches, {sum(f.bytes for f in manifest.files):,} bytes, for version"
        f" {registration['version']}"
    )


@torch.no_grad()
def build_user_caches(store: TableStore, dt: str, attempt: str, package: Path, model_version: str) -> Manifest:
    """Build caches over what a target at the end of each stored history sees, with the end of the day as reference
    time; publish them.
    """
    sequences_manifest, items_manifest = store.require("sequences", dt), store.require("items", dt)
    model, vocabulary, cutoff = load_package(package)
    if model.coded is None:
        raise StageError(f"the model in {package} has no codebook, so its users have no caches", "promote a VQL model")
    items = store.read(items_manifest)
    reference_time_ms = (day_number(dt) + 1) * MS_PER_DAY
    staging = store.begin_try(attempt, ["user_caches"], [dt], dt)
    files = []
    for bucket in sorted({file.bucket for file in sequences_manifest.files}):
        sequences = Sequences.from_arrow(store.read(sequences_manifest, bucket=bucket))
        joined = Joined.of(_at_the_end(sequences, cutoff.max_events), items, vocabulary)
        ids, counts, means = [], [], []
        for start in range(0, sequences.users, USERS_PER_CHUNK):
            users = np.arange(start, min(start + USERS_PER_CHUNK, sequences.users))
            batch = make_batch(joined, users, [np.array([user]) for user in users])
            for user, cache in zip(users, model.user_caches(batch.to("cpu"), reference_time_ms), strict=True):
                ids.append(int(sequences.user_id[user]))
                counts.append(cache.log_count_HMC.flatten().numpy())
                means.append(cache.mean_HMCd.flatten().numpy().astype(np.float16))
        rows = pa.table(
            {
                "user_id": pa.array(ids, pa.int64()),
                "reference_time_ms": pa.array([reference_time_ms] * len(ids), pa.int64()),
                "log_counts": pa.array(counts, pa.list_(pa.float32())),
                "value_means": pa.array(means, pa.list_(pa.float16())),
            },
            schema=USER_CACHES,
        )
        files.append(store.write_file(staging, "user_caches", dt, bucket, rows))
    inputs = {store.input_name(m): m.data_digest for m in (sequences_manifest, items_manifest)}
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


def _at_the_end(sequences: Sequences, max_events: int | None) -> Sequences:
    """One pseudo target a user at the end of the history, so that a batch carries the latest `max_events` of it (None.

    All).
    """
    from dataclasses import replace

    lengths = np.diff(sequences.history_start)
    users = sequences.users
    zeros = np.zeros(users, np.int64)
    return replace(
        sequences,
        target_start=np.arange(users + 1),
        target_item=zeros,
        target_time_ms=zeros,
        target_label=zeros,
        target_context=zeros,
        target_split=zeros,
        target_first=zeros if max_events is None else history_first(lengths, max_events),
        target_end=lengths,
    )


if __name__ == "__main__":
    run_stage(main)

"""Remove what is no longer current once it is as old as `retention` in the definition says; the last task of the daily
chain.

    python -m evaluation.prune --dataset D --warehouse W --runs RUNS [--reports DIR] [--dry-run]

What is published stays as it is, and so does what a registered model version was trained on, and the user caches and
the folders of runs of versions that an alias points at. Where MLflow does not answer, nothing that a model may need is
removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from pyarrow.fs import FileInfo

from etl.datasets.arguments import dataset_parser, definition_of
from etl.datasets.definition import DatasetDefinition
from etl.quality.report.prune import prune_docs, prune_reports
from etl.stage.commands import log, run_stage
from etl.stage.errors import TryAgainError
from etl.stage.folder import Folder
from etl.warehouse.partitions import MS_PER_DAY
from etl.warehouse.retention import Cutoffs, Lineage, Removed, prune_partitions, prune_staging
from etl.warehouse.store import TableStore
from training.registry import Registry
from training.run_folder import OWNER_FILE

GONE = ".gone"  # ending of a folder that is being removed


def main() -> None:
    parser = dataset_parser(__doc__)
    parser.add_argument("--runs", required=True, help="folder of runs, a path or URI")
    parser.add_argument("--reports", default="var/reports", help="local folder of reports (default: %(default)s)")
    parser.add_argument("--attempt", help="an attempt that is at work: nothing of it is removed")
    parser.add_argument("--dt", help="its partition, which every stage is given")
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    args: argparse.Namespace = parser.parse_args()
    definition = definition_of(args)
    removed = prune(
        TableStore(args.warehouse, definition.name),
        definition,
        Folder(args.runs, "--runs"),
        Path(args.reports).resolve(),
        time.time_ns() // 1_000_000,
        args.attempt,
        args.dry_run,
    )
    said = "would be removed" if args.dry_run else "removed"
    for one in removed:
        log(f"{said}: {one.kind:<11} {one.bytes:>15,} bytes in {one.files:>6,} file(s)  {one.name}")
    for line in sums(removed) or ["nothing"]:
        log(f"{said}: {line}")


def prune(
    store: TableStore,
    definition: DatasetDefinition,
    runs: Folder,
    reports: Path,
    now_ms: int,
    attempt: str | None = None,
    dry_run: bool = False,
) -> list[Removed]:
    """Remove all that is old enough; return what was, or would be, removed.

    Args:
        now_ms: Unix milliseconds, from which the days of the definition count back.
        attempt: one that is at work.
    """

    def before(days: int | None) -> int | None:
        return None if days is None else now_ms - days * MS_PER_DAY

    keep, mine = definition.retention, frozenset([attempt] if attempt else [])
    removed: list[Removed] = []
    if (staged := before(keep.staging_days)) is not None:
        removed += prune_staging(store, staged, mine, dry_run)
    if (docs := before(keep.data_docs_days)) is not None and reports.is_dir():
        removed += prune_docs(reports, store.dataset, docs, dry_run)
    if (pages := before(keep.reports_days)) is not None and reports.is_dir():
        removed += prune_reports(reports, store.dataset, pages, dry_run)
    lineage = lineage_of(store)
    if lineage is None:
        return removed
    cutoffs = Cutoffs(before(keep.superseded_days), before(keep.history_days))
    removed += prune_partitions(store, cutoffs, lineage, dry_run, log)
    if (ended := before(keep.runs_days)) is not None:
        removed += prune_runs(runs, store.dataset, ended, lineage.attempts | mine, dry_run)
    return removed


def lineage_of(store: TableStore) -> Lineage | None:
    """Return what models need; None, with a warning, where nobody knows.

    Raises:
        StageError: MLflow refuses.
    """
    try:
        registry = Registry(store.dataset)
        lineage = registry.lineage()
    except TryAgainError as error:
        log(f"warning: superseded files, histories and runs stay, since models may need them: {error.what}")
        return None
    if lineage.versions == 0 and store.days("user_caches"):
        log(
            f"warning: superseded files, histories and runs stay: MLflow at {registry.uri} has no version of "
            f"{registry.name}, yet user caches of one are published; is MLFLOW_TRACKING_URI that of its trainings?"
        )
        return None
    return lineage


def prune_runs(runs: Folder, dataset: str, before_ms: int, needed: Collection[str], dry_run: bool) -> list[Removed]:
    """Remove the folders of a data set's attempts in which nothing has changed since `before_ms`, but for `needed`
    ones.
    """
    removed = []
    for attempt in [name for name in runs.names() if not name.startswith(".")]:
        owner = runs.read_text(f"{attempt}/{OWNER_FILE}") if attempt not in needed else None
        if owner is None or json.loads(owner).get("dataset") != dataset:
            continue
        files = runs.files(attempt)
        if max(info.mtime_ns for info in files) // 1_000_000 >= before_ms:
            continue
        removed.append(Removed("runs", attempt, len(files), sum(info.size for info in files)))
        if not dry_run:
            _remove(runs, attempt, files)
    if not dry_run and runs.is_local:
        for folder in Path(runs.root).glob(f".*{GONE}"):
            shutil.rmtree(folder, ignore_errors=True)
    return removed


def _remove(runs: Folder, attempt: str, files: Sequence[FileInfo]) -> None:
    """Remove an attempt's folder: on a disk out of sight in one step, so that no stage meets half a folder.

    Of an object store the file that says whose it is goes last: a removal that is cut short goes on another day.
    """
    if runs.is_local:
        os.rename(f"{runs.root}/{attempt}", f"{runs.root}/.{attempt}{GONE}")
        return
    for info in sorted(files, key=lambda info: info.base_name == OWNER_FILE):
        runs.fs.delete_file(info.path)
    runs.fs.delete_dir(f"{runs.root}/{attempt}")  # the marks of folders


def sums(removed: Sequence[Removed]) -> list[str]:
    """Return one line a kind: how many, and how large."""
    files: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for one in removed:
        files[one.kind] += one.files
        size[one.kind] += one.bytes
    return [f"{kind}: {files[kind]:,} file(s), {size[kind]:,} bytes" for kind in files]


if __name__ == "__main__":
    run_stage(main)

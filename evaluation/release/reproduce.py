"""Train a registered version again, from what its tags say of it alone, and print its metrics beside the new ones.

    python -m evaluation.release.reproduce --dataset D --warehouse W --version N

The warehouse must still hold the very tables. The code is that of the version's commit, in a git worktree of its own
that is removed; nothing is registered, no run of MLflow's store is touched. Ends with code 3 when the metrics differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from etl.datasets.arguments import dataset_parser
from etl.stage.commands import log, run_stage
from etl.stage.errors import GateError, StageError
from etl.stage.folder import Folder
from etl.warehouse.store import TableStore
from evaluation.day_scores import DayScores, score_day
from evaluation.figures import cell
from evaluation.metrics import figures, numbered
from training.registry import DIGEST_TAG, SNAPSHOT_TAG, WARM_START_TAG, ArtifactGone, Registry, model_digest
from training.tracking import PARTITION_TAG, ROOT

ATTEMPT = "again"
COMMAND_TAG, COMMIT_TAG = "pipeline.command", "mlflow.source.git.commit"
DIGESTS = {"sequences": SNAPSHOT_TAG, "items": "data.items_digest"}  # table -> tag
RESTORE = "restore the files of that version, or train it by hand with another copy of them and --warm-start"
DIFFERENCE = 1e-6  # of a metric, to be the same: a version's tags have six places


def main(argv: list[str] | None = None) -> None:
    parser = dataset_parser(__doc__)
    parser.add_argument("--version", required=True, help="of the registered model of the data set")
    args = parser.parse_args(argv)
    store = TableStore(args.warehouse, args.dataset)
    registry = Registry(args.dataset)
    tags = registry.version(args.version).tags
    dt = tags[PARTITION_TAG]
    options = training_options(tags, args.version, registry.package)
    require_same_tables({table: store.require(table, dt).data_digest for table in DIGESTS}, tags, dt)
    with tempfile.TemporaryDirectory(prefix="longview-again-") as folder, _code_of(tags[COMMIT_TAG]) as code:
        _train(args, Path(folder), code, [*options, "--dt", dt])
        training = json.loads((Path(folder) / "runs" / ATTEMPT / "training.json").read_text())
        if training["config_digest"] != tags["config_digest"]:
            raise StageError(
                f"the configuration is {training['config_digest']}, not the version's {tags['config_digest']}",
                "its commit holds another one than it was trained with: it was trained with uncommitted changes",
            )
        address, run_dir = training["models"][training["primary"]]["package"], Folder(folder, "--runs")
        with Folder(address, "training.json").read_locally() as package:
            same_model = model_digest(package) == tags.get(DIGEST_TAG)
        score_day(store, dt, run_dir, {ATTEMPT: address})
        user, label, score = (DayScores(run_dir).column(name) for name in ("user_id", "label", ATTEMPT))
        again = figures(numbered(user)[1], label, score)
    print(side_by_side(tags, again, same_model), flush=True)
    if different := [name for name, value in again.items() if not _is_same(tags.get(name), value)]:
        raise GateError(
            f"{', '.join(different)} of version {args.version} came out otherwise",
            "another card, processor or number of workers rounds otherwise: train where it was trained; or it was"
            " trained with uncommitted changes (the tag git.dirty)",
        )


def training_options(tags: Mapping[str, str], version: str, package_of: Callable[[str], Path]) -> list[str]:
    """Return the options of the training that decide the weights, from the version's tags.

    Args:
        package_of: returns the package of another version, which this one may have begun with.

    Raises:
        StageError: the tags do not say it, or what it began with is gone.
    """
    if COMMAND_TAG not in tags:
        raise StageError(
            f"version {version} does not say how it was trained: it has no tag {COMMAND_TAG}",
            "it is of an earlier release: train its partition again, as a new attempt",
        )
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("--config", "--models", "--seed", "--workers", "--warm-start"):
        parser.add_argument(name)
    known, _ = parser.parse_known_args(shlex.split(tags[COMMAND_TAG]))
    begun = None if known.warm_start in (None, "none") else tags.get(WARM_START_TAG, "unknown")
    if begun == "unknown":
        raise StageError(
            f"version {version} began with the weights of another model and does not say of which"
            f" (--warm-start {known.warm_start}, no tag {WARM_START_TAG})",
            "it is of an earlier release: train it by hand with --warm-start and the package of that model",
        )
    if begun is not None and begun.isdigit():
        try:
            begun = str(package_of(begun))
        except ArtifactGone as gone:
            raise StageError(f"version {version} began with the weights of version {begun}: {gone}", RESTORE) from gone
    elif begun is not None and os.path.exists(begun):
        begun = os.path.abspath(begun)  # the training works in another folder
    given = {"--config": known.config, "--models": known.models, "--seed": known.seed, "--workers": known.workers}
    given["--warm-start"] = None if begun == "none" else begun
    return [word for name, value in given.items() if value is not None for word in (name, value)]


def require_same_tables(digests: Mapping[str, str], tags: Mapping[str, str], dt: str) -> None:
    """Raises: StageError: a table is not the one that the version was trained on; both digests are named."""
    for table, digest in digests.items():
        if (wanted := tags.get(DIGESTS[table], digest)) != digest:
            raise StageError(
                f"{table} of dt={dt} are {digest}, the version was trained on {wanted}",
                "use a warehouse that holds those: the day was published anew since",
            )


def side_by_side(tags: Mapping[str, str], again: Mapping[str, float], same_model: bool) -> str:
    """Return the version's metrics beside those of now."""
    lines = [f"{'':<10}{'version':>12}{'again':>12}"]
    for name, value in again.items():
        before = float(tags[name]) if name in tags else None
        lines.append(f"{name:<10}{cell(before, '.6f'):>12}{cell(value, '.6f'):>12}")
    return "\n".join([*lines, f"the weights are {'the same, bit for bit' if same_model else 'other ones'}"])


def _is_same(before: str | None, value: float) -> bool:
    if before is None:  # unknown then: a class is missing
        return value != value
    return abs(float(before) - value) <= DIFFERENCE


@contextlib.contextmanager
def _code_of(commit: str) -> Iterator[Path]:
    """Yield a folder with the code of a commit.

    Raises:
        StageError: this repository does not have it.
    """
    with tempfile.TemporaryDirectory(prefix="longview-code-") as folder:
        code = Path(folder) / "code"
        made = _git("worktree", "add", "--detach", str(code), commit)
        if made.returncode:
            raise StageError(
                f"the code of commit {commit} cannot be had: {made.stderr.strip().splitlines()[-1]}",
                "fetch it, in a clone with git: git fetch --all",
            )
        try:
            yield code
        finally:
            _git("worktree", "remove", "--force", str(code))


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)


def _train(args: argparse.Namespace, folder: Path, code: Path, options: list[str]) -> None:
    given = args.dataset_given
    where = ["--dataset", os.path.abspath(given) if os.path.exists(given) else given, "--warehouse", args.warehouse]
    words = [sys.executable, "-m", "training.train", *where, *options]
    words += ["--attempt", ATTEMPT, "--runs", str(folder / "runs")]
    log(f"training again in {code}: {shlex.join(words[1:])}")
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "PYTHONPATH": str(code)}
    done = subprocess.run(words, cwd=code, env=env, check=False)
    if done.returncode:
        raise StageError(f"the training ended with code {done.returncode}", "see what it said above")


if __name__ == "__main__":
    run_stage(main)

"""Score the partition's own day with every trained model and with the champion in service.

Write one table with intervals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.datasets.definition import SIMULATED_MARKER, DatasetDefinition
from etl.quality.judge.audit import Audit
from etl.quality.judge.page_process import written_after
from etl.quality.measure.partition import Partition
from etl.quality.measure.scores import Scores
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError, TryAgainError
from etl.stage.folder import Folder
from etl.warehouse.store import Manifest, TableStore
from evaluation.day_scores import DayScores, score_day
from evaluation.groups import groupings, metrics_of_groups
from evaluation.log_evaluation import log_evaluation, table
from evaluation.metrics import Bootstrap, calibration, distinct, figures, normalised_entropy, numbered, thirds
from evaluation.spread import Spread, add_arguments
from training.registry import ANCHOR, CHAMPION, PREVIOUS_CHAMPION, ArtifactGone, Registry, model_digest
from training.run_folder import result_of, run_folder, within_reach
from training.tracking import ATTEMPT_TAG, PARTITION_TAG, attempt_run, dataset_of

RESAMPLES = 200
ROW_COUNTS = ("rows_read", "events", "duplicates", "quarantined")


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument(
        "--runs", required=True, help="folder of runs, a path or URI; this one reads and writes RUNS/<attempt>/"
    )
    parser.add_argument(
        "--raw", required=True, help="folder of the raw logs; a simulator's marker in it gives the best possible AUC"
    )
    parser.add_argument("--reports", default="var/reports", help="local folder for Data Docs (default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args()
    store = store_of(args)
    run_dir = run_folder(args.runs, definition_of(args), args.dt, args.attempt)
    training = read_training(run_dir)
    sequences = store.require("sequences", args.dt)
    tags = {
        "data.snapshot_digest": sequences.data_digest,
        "config_digest": training["config_digest"],
    }  # MLflow may have been away when training began
    with attempt_run(args.definition, args.dt, args.attempt, tags) as run:
        evaluate(args, store, run_dir, training, sequences, run.info.run_id)


def evaluate(
    args: argparse.Namespace,
    store: TableStore,
    run_dir: Folder,
    training: dict,
    sequences: Manifest,
    run_id: str,
) -> None:
    """Score, compare, log and judge; `evaluation.json` and `scores.parquet` are written."""
    simulated, primary = args.definition.simulated, training["primary"]
    packages = {name: summary["package"] for name, summary in training["models"].items()}
    digests = {}
    for name, summary in training["models"].items():
        with package_of(summary) as package:
            digests[name] = model_digest(package)
    served = score_with_served(Registry(args.dataset), args, run_dir, packages)
    scored, judged = judge(run_dir, args.dt, served, training)
    evaluation = {
        "dt": args.dt,
        "dataset": args.dataset,
        "attempt": args.attempt,
        "simulated": simulated,
        "best_auc": _best_auc(Path(args.raw), args.dt) if simulated else None,
        "auc_seed_sd": training["config"].get("auc_seed_sd"),
        "primary": primary,
        "digests": digests,
        **judged,
        "rows": _ingested(store, sequences),
    }
    write_json(run_dir, "evaluation.json", evaluation)
    print(table(evaluation), flush=True)
    log_evaluation(run_id, run_dir, evaluation, dataset_of(store, sequences))
    # Last: what stops the registration is reported with everything that explains it already logged.
    with written_after(args.dataset_given, store, args.dt, args.attempt, Path(args.reports)):
        [row] = [row for row in evaluation["models"] if row["name"] == primary]
        handed = Scores(scored.label, scored.scores[primary], row["auc"])
        partition = Partition(store, definition_of(args), args.dt, args.attempt, scores=handed)
        Audit(partition, Path(args.reports)).publish("model_output")


def read_training(run_dir: Folder) -> dict:
    """Return `training.json` of an attempt.

    Raises:
        StageError: training has not finished.
    """
    return result_of(run_dir, "training.json", "run training.train with the same --attempt and --runs first")


def judge_again(
    registry: Registry, store: TableStore, args: argparse.Namespace, run_dir: Folder, training: dict, run_id: str
) -> dict:
    """Compare the attempt with the champion of now, which is not the one that its evaluation met.

    Return the new evaluation, written and logged.
    """
    served = score_with_served(registry, args, run_dir, {}, keep=list(training["models"]))
    _, judged = judge(run_dir, args.dt, served, training)
    evaluation = read_evaluation(run_dir) | judged
    write_json(run_dir, "evaluation.json", evaluation)
    print(table(evaluation), flush=True)
    log_evaluation(run_id, run_dir, evaluation, dataset_of(store, store.require("sequences", args.dt)))
    return read_evaluation(run_dir)


def judge(run_dir: Folder, dt: str, served: dict[str, dict], training: dict) -> tuple[Scored, dict]:
    """Return the scores of an attempt, and what `compare` and `groups` make of them for evaluation.json.

    Raises:
        StageError: there is no evaluation target.
    """
    file = DayScores(run_dir)
    scored = Scored.read(file)
    if not len(scored.label):
        raise StageError(
            f"no evaluation target in sequences of dt={dt}",
            "check the raw logs of that day, or choose another --dt",
        )
    rare_below = training["config"]["vocabulary"]["min_occurrences"]
    return scored, {**compare(scored, training["primary"], served), "groups": groups(file, scored, rare_below)}


def read_evaluation(run_dir: Folder) -> dict:
    """Return `evaluation.json` of an attempt.

    Raises:
        StageError: evaluation has not finished.
    """
    return result_of(run_dir, "evaluation.json", "run evaluation.evaluate with the same --attempt and --runs first")


@contextmanager
def package_of(summary: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the local folder of a trained model's package, for as long as the body needs it.

    Args:
        summary: of the model, in `training.json`.
    """
    with Folder(summary["package"], "training.json").read_locally() as package:
        yield package


def task_of(definition: DatasetDefinition) -> dict[str, str]:
    """Return what a model is trained to tell, and from what its histories say, as tags: under another label or other
    signals the same rows mean something else."""
    return {"data.label": definition.targets.label or "", "data.signals": ",".join(definition.feedback_fields)}


def score_with_served(
    registry: Registry,
    args: argparse.Namespace,
    run_dir: Folder,
    packages: Mapping[str, str],
    keep: Sequence[str] = (),
) -> dict[str, dict]:
    """Score the day with an attempt's models, with the champion in service and with the anchor, into `scores.parquet`.

    On a retry after this attempt's own promotion, the champion meant is the one before it.

    Args:
        packages: model -> address of its package.
        keep: models that are scored already.

    Returns:
        alias -> {"version", "partition", "attempt", "warning"} of those that there are. Those with a warning have no
        scores; nor has an anchor that is the champion.
    """
    served: dict[str, dict] = {}
    others: dict[str, str] = {}
    versions, spread = _versions_met(registry, args.attempt), Spread.of(args)
    for alias, version in versions.items():
        if alias == ANCHOR and version == versions.get(CHAMPION):
            served[ANCHOR] = served[CHAMPION]
            continue
        served[alias], package = _served(registry, alias, version, args)
        if package is not None:
            others[alias] = within_reach(package, run_dir, f"served/{version}") if spread.most else package
    packages = {**packages, **others}
    failed = score_day(store_of(args), args.dt, run_dir, packages, excused=others, keep=keep, spread=spread)
    for alias, why in failed.items():
        served[alias]["warning"] = _unusable(alias, served[alias]["version"], f"it cannot be loaded or scored: {why}")
    return served


def _unusable(alias: str, version: str, reason: str) -> str:
    """Return what is written of a version that cannot be compared with; the log says what to do about it."""
    log(
        f"warning: {alias} version {version}: {reason}. remedy: restore it, or point the alias {alias} at"
        " another version; until then nothing is promoted"
    )
    return reason[:500]


def _versions_met(registry: Registry, attempt: str) -> dict[str, str]:
    """Return alias -> version of what an attempt is compared with, the champion first."""
    aliases = registry.aliases()
    versions = {alias: aliases[alias] for alias in (CHAMPION, ANCHOR) if alias in aliases}
    for alias, version in list(versions.items()):
        if registry.version(version).tags.get(ATTEMPT_TAG) != attempt:
            continue
        if alias == CHAMPION and PREVIOUS_CHAMPION in aliases:
            versions[alias] = aliases[PREVIOUS_CHAMPION]
        else:
            del versions[alias]
    return versions


def _served(registry: Registry, alias: str, version: str, args: argparse.Namespace) -> tuple[dict, str | None]:
    """Return what is known of a version that others are compared with, and its package where it can be compared."""
    tags = registry.version(version).tags
    known = {
        "version": version,
        "partition": tags.get(PARTITION_TAG),
        "attempt": tags.get(ATTEMPT_TAG),
        "warning": None,
    }
    if (known["partition"] or "") > args.dt:
        return known | {"warning": f"it is of partition {known['partition']}, so it was trained on {args.dt}"}, None
    task = task_of(args.definition)
    if other := [f"{tag} {tags[tag]}, now {now}" for tag, now in task.items() if tags.get(tag, now) != now]:
        return known | {"warning": f"it was trained for another task: {'; '.join(other)}"}, None
    try:
        return known, str(registry.package(version))
    except TryAgainError:
        raise  # says nothing of the version
    except (ArtifactGone, StageError) as error:
        return known | {"warning": _unusable(alias, version, getattr(error, "what", str(error)))}, None


@dataclass(frozen=True)
class Scored:
    """What an evaluation holds of all targets at once, 14 bytes each and 4 a model.

    Attributes:
        user: int32 [T], of 0..U-1, the place of its user among them; label: int8 [T]; history_length: int32 [T].
        is_random: bool [T], which of them random traffic exposed.
        scores: model -> float32 [T], champion and anchor among them.
    """

    user: np.ndarray
    label: np.ndarray
    history_length: np.ndarray
    is_random: np.ndarray
    scores: dict[str, np.ndarray]

    @staticmethod
    def read(file: DayScores) -> Scored:
        user = numbered(file.column("user_id"))[1]  # the first, as ids take most
        label, length, is_random = (file.column(name) for name in ("label", "history_length", "is_random"))
        return Scored(user, label, length, is_random, {name: file.column(name) for name in file.models})


def compare(scored: Scored, primary: str, served: dict[str, dict]) -> dict:
    """Return the `models`, `champion`, `anchor`, `paired`, `slices` and `exposures` entries of evaluation.json."""
    label, user, scores = scored.label, scored.user, scored.scores
    bootstrap = Bootstrap(user, label, scores, RESAMPLES)
    rows = {}
    for name, score in scores.items():
        rows[name] = {
            "name": name,
            **with_intervals(bootstrap, name),
            "normalised_entropy": normalised_entropy(label, score),
            "targets": len(label),
            "users": bootstrap.users,
            "users_with_both_classes": bootstrap.users_with_both_classes,
            "calibration": calibration(label, score),
        }
    paired = {
        f"{primary}_minus_{name}": {
            metric: asdict(bootstrap.difference(primary, name, metric)) for metric in Bootstrap.METRICS
        }
        for name in scores
        if name != primary
    }
    others = {
        alias: served[alias] | rows.get(alias, {"name": alias}) if alias in served else None
        for alias in (CHAMPION, ANCHOR)
    }
    return {
        "models": [row for name, row in rows.items() if name not in others],
        **others,
        "paired": paired,
        "slices": length_slices(scored, primary),
        "exposures": exposure_slices(scored, primary),
    }


def groups(file: DayScores, scored: Scored, rare_below: int) -> list[dict]:
    """Return the `groups` entry of evaluation.json: metrics by activity, item, hour and context."""
    grouped = groupings(file, scored.user, rare_below)
    parts = (metrics_of_groups(scored.user, scored.label, scored.scores, grouping) for grouping in grouped)
    return list(itertools.chain.from_iterable(parts))


def write_json(run_dir: Folder, name: str, value: dict) -> None:
    """Write strict JSON (nan becomes null) so that a reader sees the old file or the whole new one."""
    run_dir.write_text(name, json.dumps(_without_nan(value), indent=1, allow_nan=False))


def with_intervals(bootstrap: Bootstrap, name: str) -> dict[str, float]:
    """Return a model's metrics, each with the ends of its interval."""
    found: dict[str, float] = {}
    for metric in Bootstrap.METRICS:
        interval = bootstrap.interval(name, metric)
        found |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
    return found


def length_slices(scored: Scored, primary: str) -> list[dict]:
    """Metrics in the thirds of history length, and AUC minus that of champion and anchor; thirds that ties make empty
    are left out.
    """
    length, scores = scored.history_length, scored.scores
    slices = []
    for rows in thirds(length):
        label, user = scored.label[rows], scored.user[rows]
        here = {name: score[rows] for name, score in scores.items()}
        compared = [alias for alias in (CHAMPION, ANCHOR) if alias in here]
        bootstrap = Bootstrap(user, label, {name: here[name] for name in (primary, *compared) if compared}, RESAMPLES)
        slices.append(
            {
                "slice": "history_length",
                "low": int(length[rows].min()),
                "high": int(length[rows].max()),
                "targets": int(rows.sum()),
                "users": distinct(user),
                "models": {name: figures(user, label, score) for name, score in here.items()},
                "paired": {
                    f"{primary}_minus_{alias}": asdict(bootstrap.difference(primary, alias, "auc"))
                    for alias in compared
                },
            }
        )
    return slices


def exposure_slices(scored: Scored, primary: str) -> list[dict]:
    """Metrics on the targets that random traffic exposed, and on the others; none where random traffic exposed none.

    What a recommender showed says how a model ranks its choices; what chance showed says how it ranks any items.
    """
    parts, is_random, scores = [], scored.is_random, scored.scores
    for exposure, rows in (("random", is_random), ("standard", ~is_random)):
        if not is_random.any() or not rows.any():
            continue
        here = {name: of[rows] for name, of in scores.items()}
        bootstrap = Bootstrap(scored.user[rows], scored.label[rows], here, RESAMPLES)
        parts.append(
            {
                "exposure": exposure,
                "targets": int(rows.sum()),
                "users": bootstrap.users,
                "models": {name: with_intervals(bootstrap, name) for name in scores},
                "paired": {
                    f"{primary}_minus_{name}": asdict(bootstrap.difference(primary, name, "auc"))
                    for name in scores
                    if name != primary
                },
            }
        )
    return parts


def _ingested(store: TableStore, sequences: Manifest) -> dict[str, int]:
    """Sum the ingest counts over the event days that the sequences were made from."""
    totals = dict.fromkeys(ROW_COUNTS, 0)
    for name in sequences.inputs:
        if name.startswith("events/dt="):
            manifest = store.manifest("events", name.removeprefix("events/dt="))
            counts = manifest.counts if manifest is not None else {}
            for key in ROW_COUNTS:
                totals[key] += counts.get(key, 0)
    return totals


def _best_auc(raw: Path, dt: str) -> float | None:
    marker = raw / SIMULATED_MARKER
    return json.loads(marker.read_text()).get("best_auc_by_dt", {}).get(dt) if marker.exists() else None


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    run_stage(main)

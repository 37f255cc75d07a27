"""Score the partition's own day with every trained model and with the champion in service.

Write one table with intervals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
from evaluation.groups import groupings, metrics_of_groups, of_judged
from evaluation.log_evaluation import log_evaluation, table
from evaluation.metrics import Bootstrap, calibration, figures, normalised_entropy, thirds
from training.registry import ANCHOR, CHAMPION, PREVIOUS_CHAMPION, ArtifactGone, Registry, model_digest
from training.run_folder import result_of, run_folder
from training.scoring import ScoredTargets, load_scorer
from training.tracking import ATTEMPT_TAG, attempt_run, dataset_of

RESAMPLES = 200
SCORES_FILE = "scores.parquet"
TARGET_COLUMNS = ("user_id", "item_id", "time_ms", "label", "history_length")
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
    sequences_manifest: Manifest,
    run_id: str,
) -> None:
    """Score, compare, log and judge; `evaluation.json` and `scores.parquet` are written."""
    simulated = args.definition.simulated
    items, sequences = store.read(store.require("items", args.dt)), store.read(sequences_manifest)

    scored: dict[str, ScoredTargets] = {}
    digests: dict[str, str] = {}
    for name, summary in training["models"].items():
        with package_of(summary) as package:
            scored[name], digests[name] = load_scorer(package).score(items, sequences), model_digest(package)
        log(f"scored {len(scored[name].score):,} targets of {args.dt} with {name}")
    targets = scored[training["primary"]]
    if not len(targets.score):
        raise StageError(
            f"no evaluation target in sequences of dt={args.dt}",
            "check the raw logs of that day, or choose another --dt",
        )
    scores = {name: result.score for name, result in scored.items()}
    served, served_scores = score_served(Registry(args.dataset), args, items, sequences)
    scores |= served_scores
    write_scores(run_dir, targets, scores)
    evaluation = {
        "dt": args.dt,
        "dataset": args.dataset,
        "attempt": args.attempt,
        "simulated": simulated,
        "best_auc": _best_auc(Path(args.raw), args.dt) if simulated else None,
        "auc_seed_sd": training["config"].get("auc_seed_sd"),
        "primary": training["primary"],
        "digests": digests,
        **compare(targets, scores, training["primary"], served, by_chance(sequences)),
        "groups": groups(items, sequences, (targets, scores), training),
        "rows": _ingested(store, sequences_manifest),
    }
    write_json(run_dir, "evaluation.json", evaluation)
    print(table(evaluation), flush=True)
    log_evaluation(run_id, run_dir, evaluation, (targets, scores), dataset_of(store, sequences_manifest))
    # Last: what stops the registration is reported with everything that explains it already logged.
    with written_after(args.dataset_given, store, args.dt, args.attempt, Path(args.reports)):
        [primary] = [row for row in evaluation["models"] if row["name"] == training["primary"]]
        handed = Scores(targets.label, scores[training["primary"]], primary["auc"])
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
    scored, names = read_scores(run_dir), list(training["models"])
    columns = {name: scored[name].to_numpy() for name in (*TARGET_COLUMNS, *names)}
    targets = ScoredTargets(**{name: columns[name] for name in TARGET_COLUMNS}, score=columns[training["primary"]])
    scores = {name: columns[name] for name in names}
    manifest = store.require("sequences", args.dt)
    items, sequences = store.read(store.require("items", args.dt)), store.read(manifest)
    served, served_scores = score_served(registry, args, items, sequences)
    scores |= served_scores
    judged = compare(targets, scores, training["primary"], served, by_chance(sequences))
    judged["groups"] = groups(items, sequences, (targets, scores), training)
    evaluation = read_evaluation(run_dir) | judged
    write_scores(run_dir, targets, scores)
    write_json(run_dir, "evaluation.json", evaluation)
    print(table(evaluation), flush=True)
    log_evaluation(run_id, run_dir, evaluation, (targets, scores), dataset_of(store, manifest))
    return read_evaluation(run_dir)


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


def read_scores(run_dir: Folder, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(f"{run_dir.root}/{SCORES_FILE}", filesystem=run_dir.fs, columns=columns)


def write_scores(run_dir: Folder, targets: ScoredTargets, scores: dict[str, np.ndarray]) -> None:
    """Write `scores.parquet`: one row a target, one column a model."""
    with run_dir.written(SCORES_FILE) as path:
        pq.write_table(pa.table({**{name: getattr(targets, name) for name in TARGET_COLUMNS}, **scores}), path)


def task_of(definition: DatasetDefinition) -> dict[str, str]:
    """Return what a model is trained to tell, and from what its histories say, as tags: under another label or other
    signals the same rows mean something else."""
    return {"data.label": definition.targets.label or "", "data.signals": ",".join(definition.feedback_fields)}


def score_served(
    registry: Registry, args: argparse.Namespace, items: pa.Table, sequences: pa.Table
) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Score the day with the champion in service and with the anchor.

    On a retry after this attempt's own promotion, the champion meant is the one before it.

    Returns:
        alias -> {"version", "partition", "attempt", "warning"} of those that there are, alias -> scores of those that
        could be scored; an anchor that is the champion is not scored twice.
    """
    aliases = registry.aliases()
    versions = {alias: aliases[alias] for alias in (CHAMPION, ANCHOR) if alias in aliases}
    tags = {version: registry.version(version).tags for version in set(versions.values())}
    for alias, version in list(versions.items()):
        if tags[version].get(ATTEMPT_TAG) == args.attempt:
            del versions[alias]
            if alias == CHAMPION and PREVIOUS_CHAMPION in aliases:
                versions[alias] = aliases[PREVIOUS_CHAMPION]
    found: dict[str, dict] = {}
    scores: dict[str, np.ndarray] = {}
    for alias in (alias for alias in (CHAMPION, ANCHOR) if alias in versions):
        if alias == ANCHOR and versions[ANCHOR] == versions.get(CHAMPION):
            found[ANCHOR] = found[CHAMPION]
            continue
        found[alias], scored = _scored(registry, alias, versions[alias], args, (items, sequences))
        if scored is not None:
            scores[alias] = scored
    return found, scores


def _scored(
    registry: Registry, alias: str, version: str, args: argparse.Namespace, day: tuple[pa.Table, pa.Table]
) -> tuple[dict, np.ndarray | None]:
    """Return what is known of a version that others are compared with, and its scores of the day if it has some."""
    tags = registry.version(version).tags
    known = {
        "version": version,
        "partition": tags.get("pipeline.partition"),
        "attempt": tags.get(ATTEMPT_TAG),
        "warning": None,
    }
    if (known["partition"] or "") > args.dt:
        return known | {"warning": f"it is of partition {known['partition']}, so it was trained on {args.dt}"}, None
    task = task_of(args.definition)
    if other := [f"{tag} {tags[tag]}, now {now}" for tag, now in task.items() if tags.get(tag, now) != now]:
        return known | {"warning": f"it was trained for another task: {'; '.join(other)}"}, None
    try:
        return known, load_scorer(registry.package(version)).score(*day).score
    except TryAgainError:
        raise  # says nothing of the version
    except Exception as error:
        reason = (
            str(error)
            if isinstance(error, ArtifactGone)
            else f"it cannot be loaded or scored: {type(error).__name__}: {getattr(error, 'what', error)}"
        )
        log(
            f"warning: {alias} version {version}: {reason}. remedy: restore it, or point the alias {alias} at"
            " another version; until then nothing is promoted"
        )
        return known | {"warning": reason[:500]}, None


def by_chance(sequences: pa.Table) -> np.ndarray:
    """Say which evaluation targets random traffic exposed, bool [T], in the order that they are scored in.

    A partition that was published before the column was there does not say: none then.
    """
    if "target_is_random" not in sequences.column_names:
        return np.zeros(len(of_judged(sequences, "target_split")), bool)
    return of_judged(sequences, "target_is_random")


def compare(
    targets: ScoredTargets,
    scores: dict[str, np.ndarray],
    primary: str,
    served: dict[str, dict],
    is_random: np.ndarray,
) -> dict:
    """Return the `models`, `champion`, `anchor`, `paired`, `slices` and `exposures` entries of evaluation.json.

    Args:
        is_random: bool [T], as `by_chance` says.
    """
    label, user = targets.label, targets.user_id
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
        "slices": length_slices(targets, scores, primary),
        "exposures": exposure_slices(targets, is_random, scores, primary),
    }


def groups(
    items: pa.Table, sequences: pa.Table, scored: tuple[ScoredTargets, dict[str, np.ndarray]], training: dict
) -> list[dict]:
    """Return the `groups` entry of evaluation.json: metrics by activity, item, hour and context."""
    rare_below = training["config"]["vocabulary"]["min_occurrences"]
    grouped = groupings(items, sequences, scored[0], rare_below)
    return list(itertools.chain.from_iterable(metrics_of_groups(*scored, grouping) for grouping in grouped))


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


def length_slices(targets: ScoredTargets, scores: dict[str, np.ndarray], primary: str) -> list[dict]:
    """Metrics in the thirds of history length, and AUC minus that of champion and anchor; thirds that ties make empty
    are left out.
    """
    length = targets.history_length
    slices = []
    for rows in thirds(length):
        label, user = targets.label[rows], targets.user_id[rows]
        here = {name: score[rows] for name, score in scores.items()}
        compared = [alias for alias in (CHAMPION, ANCHOR) if alias in here]
        bootstrap = Bootstrap(user, label, {name: here[name] for name in (primary, *compared) if compared}, RESAMPLES)
        slices.append(
            {
                "slice": "history_length",
                "low": int(length[rows].min()),
                "high": int(length[rows].max()),
                "targets": int(rows.sum()),
                "users": len(np.unique(user)),
                "models": {name: figures(user, label, score) for name, score in here.items()},
                "paired": {
                    f"{primary}_minus_{alias}": asdict(bootstrap.difference(primary, alias, "auc"))
                    for alias in compared
                },
            }
        )
    return slices


def exposure_slices(
    targets: ScoredTargets, is_random: np.ndarray, scores: dict[str, np.ndarray], primary: str
) -> list[dict]:
    """Metrics on the targets that random traffic exposed, and on the others; none where random traffic exposed none.

    What a recommender showed says how a model ranks its choices; what chance showed says how it ranks any items.
    """
    parts = []
    for exposure, rows in (("random", is_random), ("standard", ~is_random)):
        if not is_random.any() or not rows.any():
            continue
        here = {name: of[rows] for name, of in scores.items()}
        bootstrap = Bootstrap(targets.user_id[rows], targets.label[rows], here, RESAMPLES)
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

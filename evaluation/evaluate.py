"""Score the partition's own day with every trained model and with the champion in service.

Write one table with intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.datasets.definition import SIMULATED_MARKER
from etl.quality.judge.audit import Audit
from etl.quality.judge.page_process import written_after
from etl.quality.measure.partition import Partition
from etl.quality.measure.scores import Scores
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError, TryAgainError
from etl.stage.folder import Folder
from etl.warehouse.store import Manifest, TableStore
from evaluation.metrics import Bootstrap, auc, calibration, gauc, logloss, normalised_entropy, thirds
from training.registry import ANCHOR, CHAMPION, PREVIOUS_CHAMPION, ArtifactGone, Registry
from training.run_folder import result_of, run_folder
from training.scoring import ScoredTargets, load_scorer
from training.tracking import ATTEMPT_TAG, METRICS_FILES, MetricsBuffer, asking_mlflow, attempt_run

RESAMPLES = 200
SCORES_FILE = "scores.parquet"
TARGET_COLUMNS = ("user_id", "item_id", "time_ms", "label", "history_length")
# Of each model, in MLflow: `normalised_entropy`, `ece` and `expected_ratio` say whether its probabilities can be used.
LOGGED = (*Bootstrap.METRICS, "auc_low", "auc_high", "normalised_entropy", "ece", "expected_ratio")
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
    for name, summary in training["models"].items():
        with package_of(summary) as package:
            scored[name] = load_scorer(package).score(items, sequences)
        log(f"scored {len(scored[name].score):,} targets of {args.dt} with {name}")
    targets = scored[training["primary"]]
    if not len(targets.score):
        raise StageError(
            f"no evaluation target in sequences of dt={args.dt}",
            "check the raw logs of that day, or choose another --dt",
        )
    scores = {name: result.score for name, result in scored.items()}
    served, served_scores = score_served(Registry(args.dataset), args.dt, args.attempt, items, sequences)
    scores |= served_scores
    write_scores(run_dir, targets, scores)
    evaluation = {
        "dt": args.dt,
        "dataset": args.dataset,
        "attempt": args.attempt,
        "simulated": simulated,
        "best_auc": _best_auc(Path(args.raw), args.dt) if simulated else None,
        "auc_seed_sd": training["config"].get("auc_seed_sd"),
        **compare(targets, scores, training["primary"], served),
        "rows": _ingested(store, sequences_manifest),
    }
    write_json(run_dir, "evaluation.json", evaluation)
    print(table(evaluation), flush=True)
    log_to_mlflow(run_id, run_dir, evaluation, targets, scores)
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
    registry: Registry, store: TableStore, dt: str, attempt: str, run_dir: Folder, training: dict, run_id: str
) -> dict:
    """Compare the attempt with the champion of now, which is not the one that its evaluation met.

    Return the new evaluation, written and logged.
    """
    scored, names = read_scores(run_dir), list(training["models"])
    columns = {name: scored[name].to_numpy() for name in (*TARGET_COLUMNS, *names)}
    targets = ScoredTargets(**{name: columns[name] for name in TARGET_COLUMNS}, score=columns[training["primary"]])
    scores = {name: columns[name] for name in names}
    items, sequences = store.read(store.require("items", dt)), store.read(store.require("sequences", dt))
    served, served_scores = score_served(registry, dt, attempt, items, sequences)
    scores |= served_scores
    evaluation = read_evaluation(run_dir) | compare(targets, scores, training["primary"], served)
    write_scores(run_dir, targets, scores)
    write_json(run_dir, "evaluation.json", evaluation)
    print(table(evaluation), flush=True)
    log_to_mlflow(run_id, run_dir, evaluation, targets, scores)
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


def score_served(
    registry: Registry, dt: str, attempt: str, items: pa.Table, sequences: pa.Table
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
        if tags[version].get(ATTEMPT_TAG) == attempt:
            del versions[alias]
            if alias == CHAMPION and PREVIOUS_CHAMPION in aliases:
                versions[alias] = aliases[PREVIOUS_CHAMPION]
    found: dict[str, dict] = {}
    scores: dict[str, np.ndarray] = {}
    for alias in (alias for alias in (CHAMPION, ANCHOR) if alias in versions):
        if alias == ANCHOR and versions[ANCHOR] == versions.get(CHAMPION):
            found[ANCHOR] = found[CHAMPION]
            continue
        found[alias], scored = _scored(registry, alias, versions[alias], dt, (items, sequences))
        if scored is not None:
            scores[alias] = scored
    return found, scores


def _scored(
    registry: Registry, alias: str, version: str, dt: str, day: tuple[pa.Table, pa.Table]
) -> tuple[dict, np.ndarray | None]:
    """Return what is known of a version that others are compared with, and its scores of the day if it has some."""
    tags = registry.version(version).tags
    known = {
        "version": version,
        "partition": tags.get("pipeline.partition"),
        "attempt": tags.get(ATTEMPT_TAG),
        "warning": None,
    }
    if (known["partition"] or "") > dt:
        return known | {"warning": f"it is of partition {known['partition']}, so it was trained on {dt}"}, None
    try:
        return known, load_scorer(registry.package(version)).score(*day).score
    except TryAgainError:
        raise  # says nothing of the version
    except Exception as error:
        reason = (
            str(error)
            if isinstance(error, ArtifactGone)
            else f"it cannot be loaded or scored: {type(error).__name__}: {error}"
        )
        log(
            f"warning: {alias} version {version}: {reason}. remedy: restore it, or point the alias {alias} at"
            " another version; until then nothing is promoted"
        )
        return known | {"warning": reason[:500]}, None


def compare(targets: ScoredTargets, scores: dict[str, np.ndarray], primary: str, served: dict[str, dict]) -> dict:
    """Return the `models`, `champion`, `anchor`, `paired` and `slices` entries of evaluation.json."""
    label, user = targets.label, targets.user_id
    bootstrap = Bootstrap(user, label, scores, RESAMPLES)
    rows = {}
    for name, score in scores.items():
        row: dict = {"name": name}
        for metric in Bootstrap.METRICS:
            interval = bootstrap.interval(name, metric)
            row |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        rows[name] = row | {
            "normalised_entropy": normalised_entropy(label, score),
            "targets": len(label),
            "users": len(np.unique(user)),
            "users_with_both_classes": gauc(user, label, score)[1],
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
    }


def table(evaluation: dict) -> str:
    """Return the plain text table of an evaluation."""
    title = f"{evaluation['dataset']} dt={evaluation['dt']}" + ("  (SIMULATED data)" if evaluation["simulated"] else "")
    lines = [
        title,
        (
            f"{'model':<18}{'AUC':>8}{'95 % interval':>18}{'GAUC':>8}{'log loss':>10}{'pred/obs':>10}{'targets':>10}"
            f"{'users':>8}"
        ),
    ]
    for row in _rows(evaluation):
        interval = f"{_cell(row['auc_low'])}..{_cell(row['auc_high'])}"
        lines.append(
            f"{row['name']:<18}{_cell(row['auc']):>8}{interval:>18}{_cell(row['gauc']):>8}{_cell(row['logloss']):>10}"
            f"{_cell(row['calibration']['expected_ratio'], 3):>10}{row['targets']:>10,}{row['users']:>8,}"
        )
    if evaluation["best_auc"] is not None:
        lines.append(f"{'best possible':<18}{_cell(evaluation['best_auc']):>8}  (the simulator's own probabilities)")
    for name, metrics in evaluation["paired"].items():
        value, low, high = (_cell(metrics["auc"][key]) for key in ("value", "low", "high"))
        lines.append(f"AUC {name.replace('_minus_', ' minus ')}: {value}, 95 % interval {low}..{high}")
    for alias in (CHAMPION, ANCHOR):
        if (other := evaluation.get(alias)) and other["warning"]:
            lines.append(f"warning: {alias} version {other['version']} is not compared: {other['warning']}")
    return "\n".join(lines)


def _rows(evaluation: dict) -> list[dict]:
    """Return the rows of all that was scored: models, champion, and an anchor that is not the champion."""
    others = [evaluation.get(alias) for alias in (CHAMPION, ANCHOR)]
    return [*evaluation["models"], *(row for row in others if row and "auc" in row)]


def write_json(run_dir: Folder, name: str, value: dict) -> None:
    """Write strict JSON (nan becomes null) so that a reader sees the old file or the whole new one."""
    run_dir.write_text(name, json.dumps(_without_nan(value), indent=1, allow_nan=False))


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
                "models": {
                    name: {
                        "auc": auc(label, score),
                        "gauc": gauc(user, label, score)[0],
                        "logloss": logloss(label, score),
                    }
                    for name, score in here.items()
                },
                "paired": {
                    f"{primary}_minus_{alias}": asdict(bootstrap.difference(primary, alias, "auc"))
                    for alias in compared
                },
            }
        )
    return slices


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


def log_to_mlflow(
    run_id: str, run_dir: Folder, evaluation: dict, targets: ScoredTargets, scores: dict[str, np.ndarray]
) -> None:
    """Log an evaluation to its run, and what training could not send.

    Raises:
        TryAgainError: MLflow does not answer.
    """
    with run_dir.written("evaluation.png") as plot:
        _plot(evaluation, targets, scores, plot)
    metrics = {
        f"{row['name']}/{metric}": value
        for row in _rows(evaluation)
        for metric, value in (row | row["calibration"]).items()
        if metric in LOGGED
    }
    metrics |= {f"{name}/auc": value["auc"]["value"] for name, value in evaluation["paired"].items()}
    metrics |= {"best_auc": evaluation["best_auc"]}
    now = int(time.time() * 1000)
    with asking_mlflow():
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        client = MlflowClient()
        for file in METRICS_FILES:
            MetricsBuffer(run_id, run_dir, file).send()
        client.log_batch(
            run_id,
            metrics=[
                Metric(key, value, now, 0)
                for key, value in metrics.items()
                if value is not None and math.isfinite(value)
            ],
        )
        for name in ("evaluation.json", "evaluation.png"):
            with run_dir.read_locally(name) as path:
                client.log_artifact(run_id, str(path), "evaluation")
        client.log_text(run_id, table(evaluation), "evaluation/table.txt")


def _plot(evaluation: dict, targets: ScoredTargets, scores: dict[str, np.ndarray], path: Path) -> None:
    """Draw AUC with intervals, and calibration, of every scored model."""
    from matplotlib.figure import Figure

    rows = _rows(evaluation)
    figure = Figure(figsize=(10, 4), layout="constrained")
    bars, curve = figure.subplots(1, 2)
    values = np.array([row["auc"] for row in rows])
    spread = np.abs(np.array([[row["auc_low"], row["auc_high"]] for row in rows]).T - values)
    bars.errorbar(values, np.arange(len(rows)), xerr=spread, fmt="o", capsize=4)
    bars.set_yticks(np.arange(len(rows)), [row["name"] for row in rows])
    bars.invert_yaxis()
    if evaluation["best_auc"] is not None:
        bars.axvline(evaluation["best_auc"], linestyle="--", color="gray", label="best possible")
        bars.legend()
    bars.set_xlabel("AUC, 95 % interval (users resampled)")
    for name, score in scores.items():
        bins = calibration(targets.label, score)["bins"]
        curve.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], marker="o", label=name)
    end = curve.get_xlim()[1]
    curve.plot([0, end], [0, end], linestyle="--", color="gray")
    curve.set_xlabel("predicted probability")
    curve.set_ylabel("observed share of positives")
    curve.legend()
    figure.suptitle(
        f"{evaluation['dataset']} dt={evaluation['dt']}" + (" (SIMULATED data)" if evaluation["simulated"] else "")
    )
    figure.savefig(path, dpi=110)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


if __name__ == "__main__":
    run_stage(main)

"""An evaluation as people read it: a table, a plot, and what MLflow shows of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from etl.stage.folder import Folder
from evaluation.figures import cell, metrics_of, rows_of
from evaluation.metrics import Bootstrap
from evaluation.report import log_report
from training.model_runs import logged_model, model_runs
from training.registry import ANCHOR, CHAMPION
from training.tracking import METRICS_FILES, NOTE_TAG, MetricsBuffer, asking_mlflow

# Of each model, in MLflow: `normalised_entropy`, `ece` and `expected_ratio` say whether its probabilities can be used.
LOGGED = (*Bootstrap.METRICS, "auc_low", "auc_high", "normalised_entropy", "ece", "expected_ratio")


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
    for row in rows_of(evaluation):
        interval = f"{cell(row['auc_low'])}..{cell(row['auc_high'])}"
        lines.append(
            f"{row['name']:<18}{cell(row['auc']):>8}{interval:>18}{cell(row['gauc']):>8}{cell(row['logloss']):>10}"
            f"{cell(row['calibration']['expected_ratio'], '.3f'):>10}{row['targets']:>10,}{row['users']:>8,}"
        )
    if evaluation["best_auc"] is not None:
        lines.append(f"{'best possible':<18}{cell(evaluation['best_auc']):>8}  (the simulator's own probabilities)")
    for name, metrics in evaluation["paired"].items():
        value, low, high = (cell(metrics["auc"][key]) for key in ("value", "low", "high"))
        lines.append(f"AUC {name.replace('_minus_', ' minus ')}: {value}, 95 % interval {low}..{high}")
    for part in evaluation["exposures"]:
        own = part["models"][evaluation["primary"]]
        interval = f"95 % interval {cell(own['auc_low'])}..{cell(own['auc_high'])}"
        exposed = f"{part['targets']:,} targets of {part['users']:,} users by {part['exposure']} exposure"
        lines.append(f"AUC of {evaluation['primary']} on {exposed}: {cell(own['auc'])}, {interval}")
    for alias in (CHAMPION, ANCHOR):
        if (other := evaluation.get(alias)) and other["warning"]:
            lines.append(f"warning: {alias} version {other['version']} is not compared: {other['warning']}")
    return "\n".join(lines)


def log_evaluation(
    run_id: str,
    run_dir: Folder,
    evaluation: dict,
    dataset: tuple[str, str],
) -> None:
    """Log an evaluation to its run and to those of its models, and what training could not send.

    Each model's figures stand in its own run and in its logged model, under the same names, at the step of the day
    (20220421). The attempt's run has those of the model that is registered, of champion and anchor, and the
    differences.

    Args:
        dataset: name and digest of what was scored (`training.tracking.dataset_of`).

    Raises:
        TryAgainError: MLflow does not answer.
    """
    with run_dir.written("evaluation.png") as plot:
        _plot(evaluation, plot)
    names, step = [row["name"] for row in evaluation["models"]], int(evaluation["dt"].replace("-", ""))
    with asking_mlflow():
        from mlflow import MlflowClient

        client = MlflowClient()
        run = client.get_run(run_id)
        runs = model_runs(run, names)
        for file in METRICS_FILES:
            MetricsBuffer(run_id, run_dir, file, models=runs).send()
        client.log_batch(run_id, metrics=metrics_of(figures_of_attempt(evaluation), step))
        for row in evaluation["models"]:
            name = row["name"]
            model = logged_model(run, name, runs[name], evaluation["digests"][name])
            linked = {"model_id": model.model_id, "dataset_name": dataset[0], "dataset_digest": dataset[1]}
            client.log_batch(runs[name], metrics=metrics_of(figures_of(row), step, run_id=runs[name], **linked))
        for name in ("evaluation.json", "evaluation.png"):
            with run_dir.read_locally(name) as path:
                client.log_artifact(run_id, str(path), "evaluation")
        client.log_text(run_id, table(evaluation), "evaluation/table.txt")
        about = run.data.tags.get(NOTE_TAG, "").partition("\n\n")[0]
        log_report(run_id, runs[evaluation["primary"]], evaluation, run.data.tags)
        client.set_tag(run_id, NOTE_TAG, f"{about}\n\n{markdown_table(evaluation)}")


def figures_of(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what MLflow shows of one scored model."""
    return {metric: value for metric, value in (row | row["calibration"]).items() if metric in LOGGED}


def figures_of_attempt(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what MLflow shows of the attempt: the model that is registered, and what it was compared with."""
    figures = {"best_auc": evaluation["best_auc"]}
    for row in rows_of(evaluation):
        if row["name"] == evaluation["primary"]:
            figures |= figures_of(row)
        elif row["name"] in (CHAMPION, ANCHOR):
            figures |= {f"{row['name']}/{metric}": value for metric, value in figures_of(row).items()}
    for part in evaluation["exposures"]:
        own = part["models"][evaluation["primary"]]
        figures |= {f"{part['exposure']}_exposure/{metric}": own[metric] for metric in Bootstrap.METRICS}
    return figures | {f"{name}/auc": value["auc"]["value"] for name, value in evaluation["paired"].items()}


def markdown_table(evaluation: Mapping[str, Any]) -> str:
    """Return the models with their intervals, for a description."""
    lines = ["| model | AUC | 95 % | GAUC | log loss | pred/obs |", "|---|---|---|---|---|---|"]
    for row in rows_of(evaluation):
        values = (row["auc"], row["gauc"], row["logloss"])
        auc, gauc, logloss = (cell(value) for value in values)
        interval = f"{cell(row['auc_low'])} to {cell(row['auc_high'])}"
        ratio = cell(row["calibration"]["expected_ratio"], ".3f")
        lines.append(f"| {row['name']} | {auc} | {interval} | {gauc} | {logloss} | {ratio} |")
    return "\n".join(lines)


def _plot(evaluation: dict, path: Path) -> None:
    """Draw AUC with intervals, and calibration, of every scored model."""
    from matplotlib.figure import Figure

    rows = rows_of(evaluation)
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
    for row in rows:
        bins = row["calibration"]["bins"]
        curve.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], marker="o", label=row["name"])
    end = curve.get_xlim()[1]
    curve.plot([0, end], [0, end], linestyle="--", color="gray")
    curve.set_xlabel("predicted probability")
    curve.set_ylabel("observed share of positives")
    curve.legend()
    figure.suptitle(
        f"{evaluation['dataset']} dt={evaluation['dt']}" + (" (SIMULATED data)" if evaluation["simulated"] else "")
    )
    figure.savefig(path, dpi=110)

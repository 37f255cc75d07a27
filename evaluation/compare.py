"""Train several models on one published partition, at several lengths of history and seeds, and compare them.

Same rows, same loop, same budget for all. Each training is a line of results.jsonl, and what stands there is not
trained again: stop it at any time, or add models, lengths and seeds. It ends in a table and plots, and in MLflow in a
run of the comparison with a run a training below it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from etl.datasets.arguments import dataset_parser, definition_of
from etl.stage.commands import run_stage
from etl.stage.errors import StageError
from etl.stage.local_files import replace_text
from etl.warehouse.store import TableStore
from evaluation.figures import cell
from evaluation.log_comparison import COSTS, ComparisonRun, comparison_run, training_name
from evaluation.metrics import LEAST_USERS, Bootstrap
from evaluation.trials import EXPOSURES, Plan, Wanted, add_arguments, planned, trained, wanted_of
from infra import settings

TABLE_FILE, PLOTS_FILE = "table.md", "plots.png"
PLAN, TRAIN, SHOW = "plan", "train", "show"
DRAWS = 2_000  # of seeds and users together
COST_NAMES = dict(zip(COSTS, ("parameters", "training, s", "scoring, ms a target"), strict=True))
NAMES = {"auc": "AUC", "gauc": "GAUC", "logloss": "log loss"}


def main() -> None:
    args = arguments_of()
    wanted = wanted_of(args)
    plan = planned(wanted)
    origin = TableStore(args.warehouse, args.dataset), args.config
    with comparison_run(
        args.definition, plan.identity, origin, args.only in (PLAN, SHOW), args.only in (None, SHOW)
    ) as run:
        if args.only == SHOW and not plan.lines:
            raise StageError(
                f"none of these {len(plan.trainings)} trainings stands in {wanted.out}", "train them: leave out --only"
            )
        if args.only != PLAN:
            run.add(plan.lines)
        if args.only in (None, TRAIN):
            trained(wanted, plan, lambda line: run.add([line]))
        if args.only in (None, SHOW):
            title = f"{args.dataset} dt={args.dt}" + ("  (SIMULATED data)" if definition_of(args).simulated else "")
            _show(title, plan, wanted, run)
        if args.result:
            Path(args.result).write_text(json.dumps(_result(args.only, plan, run)))


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line, by default of this process."""
    parser = dataset_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--out", help="folder of the results (default: compare/<data set>-<dt> in LONGVIEW_HOME)")
    parser.add_argument(
        "--only",
        choices=(PLAN, TRAIN, SHOW),
        help="plan: check what is asked for, train nothing; train: neither table nor plots; show: those of what stands",
    )
    parser.add_argument("--result", metavar="FILE", help="gets, as JSON, what is asked for and what of it stands")
    args = parser.parse_args(words)
    args.out = args.out or settings.comparison(args.dataset, args.dt)
    return args


def _result(only: str | None, plan: Plan, run: ComparisonRun) -> dict[str, Any]:
    """Return what the DAG `vql_compare` asks for."""
    best = max((line for line in plan.lines if "failed" not in line), key=lambda line: line["auc"], default=None)
    return {
        "trainings": [asdict(trial) | {"name": training_name(asdict(trial))} for trial in plan.in_order],
        "stand": len(plan.lines),
        "best": best and f"{training_name(best)}, AUC {best['auc']:.4f}",
        "experiment_id": run.run.info.experiment_id,
        "run_id": run.training_id(plan.lines) if only == TRAIN else run.run.info.run_id,
    }


def _show(title: str, plan: Plan, wanted: Wanted, run: ComparisonRun) -> None:
    """Write, print and log the table and the plots of what stands."""
    entries = summaries(plan.lines)
    report = "\n\n".join(filter(None, [title, table(entries), slices_table(entries), exposures_table(plan.lines)]))
    files = wanted.out / TABLE_FILE, wanted.out / PLOTS_FILE
    replace_text(files[0], report + "\n")
    plots(entries, title, files[1])
    print(report, flush=True)
    print(", ".join(map(str, files)), flush=True)
    run.show(entries, report, files)
    print(json.dumps({"dataset": wanted.partition.dataset, "dt": wanted.partition.dt, "models": entries}), flush=True)


def summaries(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry a model and length, best AUC first.

    Means over the seeds; `auc_sd` over the seeds alone; intervals over seeds and users, of the metrics and of the AUC's
    difference to the first model at the same length, seed by seed and resample by resample (None: too few users).
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in found:
        groups.setdefault((line["model"], line["length"]), []).append(line)
    first = found[0]["model"] if found else ""
    entries = []
    for (model, length), lines in groups.items():
        good = [line for line in lines if "failed" not in line]
        entry: dict[str, Any] = {"model": model, "length": length, "seeds": len(good), "failed": len(lines) - len(good)}
        for name in (*Bootstrap.METRICS, *COSTS):
            values = [line[name] for line in good if line[name] is not None]
            entry[name] = float(np.mean(values)) if values else None
        entry["auc_sd"] = float(np.std([line["auc"] for line in good], ddof=1)) if len(good) > 1 else None
        for metric in Bootstrap.METRICS:
            entry[f"{metric}_low"], entry[f"{metric}_high"] = interval(good, metric)
        others = {line["seed"]: line for line in groups.get((first, length), []) if "failed" not in line}
        both = [line for line in good if line["seed"] in others] if model != first else []
        entry["minus"] = first
        entry["difference"] = float(np.mean([x["auc"] - others[x["seed"]]["auc"] for x in both])) if both else None
        entry["difference_low"], entry["difference_high"] = interval(
            both, "auc", [others[line["seed"]] for line in both]
        )
        entry["slices"] = [_mean_slice([line["slices"][n] for line in good]) for n in range(_fewest_slices(good))]
        entries.append(entry)
    return sorted(entries, key=lambda entry: -(entry["auc"] or 0))


def interval(
    lines: Sequence[dict[str, Any]], metric: str, minus: Sequence[dict[str, Any]] | None = None
) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a metric of one model's lines, one a seed, or of its difference to another's, of the
    same seeds in the same order: each draw takes as many seeds, with replacement, and one resample of the users for all
    of them. (None, None): fewer users than say anything of others, or lines that hold the resamples of the AUC alone.
    """
    name = f"resampled_{metric}"
    if not lines or min(line["users"] for line in lines) < LEAST_USERS or any(name not in line for line in lines):
        return None, None
    value_SR = np.array([line[name] for line in lines])
    if minus is not None:
        value_SR = value_SR - np.array([line[name] for line in minus])
    rng = np.random.default_rng(0)
    seeds, resamples = value_SR.shape
    drawn = value_SR[rng.integers(seeds, size=(DRAWS, seeds)), rng.integers(resamples, size=DRAWS)[:, None]].mean(1)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _fewest_slices(lines: Sequence[dict[str, Any]]) -> int:
    return min((len(line["slices"]) for line in lines), default=0)


def _mean_slice(slices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a third's bounds, the same for every seed, with its mean metrics."""
    means = {metric: float(np.mean([part[metric] for part in slices])) for metric in Bootstrap.METRICS}
    return {name: slices[0][name] for name in ("low", "high", "targets")} | means


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown."""
    first = entries[0]["minus"] if entries else ""
    lines = [
        f"| model | events | seeds | AUC | 95 % | sd of seeds | minus {first} | 95 % | GAUC | 95 % | log loss"
        f" | 95 % | {' | '.join(COST_NAMES.values())} |",
        "|" + "---|" * 15,
    ]
    for entry in entries:
        failed = f", {entry['failed']} diverged" if entry["failed"] else ""
        cells = [
            entry["model"],
            f"{entry['length']:,}",
            f"{entry['seeds']}{failed}",
            cell(entry["auc"], ".4f"),
            _between(entry["auc_low"], entry["auc_high"], ".4f"),
            cell(entry["auc_sd"], ".4f"),
            cell(entry["difference"], "+.4f"),
            _between(entry["difference_low"], entry["difference_high"], "+.4f"),
            cell(entry["gauc"], ".4f"),
            _between(entry["gauc_low"], entry["gauc_high"], ".4f"),
            cell(entry["logloss"], ".4f"),
            _between(entry["logloss_low"], entry["logloss_high"], ".4f"),
            cell(entry["parameters"], ",.0f"),
            cell(entry["train_seconds"], ",.1f"),
            cell(entry["score_ms_per_target"], ".3f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slices_table(entries: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown: the AUC of each third of history length, a table a length."""
    tables = []
    for length in sorted({entry["length"] for entry in entries}, reverse=True):
        mine = [entry for entry in entries if entry["length"] == length and entry["slices"]]
        if not mine:
            continue
        bounds = [f"{part['low']:,} to {part['high']:,}" for part in mine[0]["slices"]]
        lines = [f"| AUC by history, at most {length:,} | {' | '.join(bounds)} |", "|" + "---|" * (len(bounds) + 1)]
        for entry in mine:
            cells = [cell(part["auc"], ".4f") for part in entry["slices"]]
            lines.append(f"| {entry['model']} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def exposures_table(found: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown: each model's figures on what the recommender showed beside those on what chance did,
    a table a length; nothing where chance showed none.
    """
    tables = []
    for length in sorted({line["length"] for line in found if "exposures" in line}, reverse=True):
        mine = [line for line in found if line["length"] == length and "exposures" in line]
        parts = {kind: summaries([line | line["exposures"][kind] for line in mine]) for kind in EXPOSURES}
        random = {entry["model"]: entry for entry in parts["random"]}
        counts = [f"{kind} ({mine[0]['exposures'][kind]['targets']:,} targets)" for kind in EXPOSURES]
        first = f"minus {mine[0]['model']}"
        heads = [cell for count in counts for cell in (f"AUC, {count}", "95 %", first, "95 %", "GAUC", "95 %")]
        lines = [f"| model, at most {length:,} events | seeds | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2)]
        for entry in parts["standard"]:
            cells = [entry["model"], str(entry["seeds"]), *_exposed(entry), *_exposed(random[entry["model"]])]
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _exposed(entry: dict[str, Any]) -> list[str]:
    cells = []
    for name, form in (("auc", ".4f"), ("difference", "+.4f"), ("gauc", ".4f")):
        cells += [cell(entry[name], form), _between(entry[f"{name}_low"], entry[f"{name}_high"], form)]
    return cells


def _between(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def plots(entries: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the metrics against the events that a target sees, with their intervals over seeds and users where there are
    some; the AUC against what a model costs, and against the length of the history: a colour a model.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 8))  # room for the labels is fixed: a layout that measures them costs a second drawing
    figure.subplots_adjust(left=0.045, right=0.99, bottom=0.07, top=0.93, wspace=0.24, hspace=0.22)
    (*of_lengths, of_thirds), (*of_costs, legend) = figure.subplots(2, 4)
    good = [entry for entry in entries if entry["auc"] is not None]
    longest = max((entry["length"] for entry in good), default=0)
    models = sorted({entry["model"] for entry in good}, key=[entry["model"] for entry in good].index)
    for number, model in enumerate(models):
        mine = sorted((entry for entry in good if entry["model"] == model), key=lambda entry: entry["length"])
        style = {"color": f"C{number}", "marker": "os^Dv"[number // 10 % 5], "label": model, "capsize": 3}
        for axes, metric in zip(of_lengths, Bootstrap.METRICS, strict=True):
            axes.errorbar([entry["length"] for entry in mine], *_reaching(mine, metric), **style)
        for axes, cost in zip(of_costs, COSTS, strict=True):
            axes.errorbar([entry[cost] for entry in mine], *_reaching(mine, "auc"), **style, linestyle="none")
        thirds = [entry["slices"] for entry in mine if entry["length"] == longest]
        for third in thirds:
            of_thirds.errorbar(
                [f"{part['low']:,}-{part['high']:,}" for part in third], [part["auc"] for part in third], **style
            )
    for axes, metric in zip(of_lengths, Bootstrap.METRICS, strict=True):
        axes.set(xscale=_scale(good, "length"), xlabel="events that a target sees at most", ylabel=NAMES[metric])
    for axes, (cost, name) in zip(of_costs, COST_NAMES.items(), strict=True):
        axes.set(xscale=_scale(good, cost), xlabel=name, ylabel="AUC")
    of_thirds.margins(x=0.2)
    of_thirds.set(xlabel=f"events before the target, at most {longest:,}", ylabel="AUC")
    legend.axis("off")
    if good:
        legend.legend(*of_lengths[0].get_legend_handles_labels(), loc="center", fontsize="small", ncols=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=80)


def _scale(entries: Sequence[dict[str, Any]], name: str) -> str:
    """Return the scale of an axis: of less than a decade the labels of a logarithmic one would lie on each other."""
    values = [entry[name] for entry in entries]
    return "log" if values and max(values) >= 10 * min(values) > 0 else "linear"


def _reaching(entries: Sequence[dict[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a metric, [E], and how far their intervals reach down and up, [2, E]; 0 where unknown."""
    value = np.array([entry[metric] for entry in entries])
    ends = [[entry[f"{metric}_{end}"] or entry[metric] for entry in entries] for end in ("low", "high")]
    return value, np.abs(np.array(ends) - value)


if __name__ == "__main__":
    run_stage(main)

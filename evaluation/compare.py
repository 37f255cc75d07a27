"""Train several models on one published partition, at several lengths of history and seeds, and compare them.

Same rows, same loop, same budget for all. Each training is a line of results.jsonl, and what stands there is not
trained again: stop it at any time, or add models, lengths and seeds. It ends in a table and a plot.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from etl.datasets.arguments import dataset_parser, definition_of
from etl.stage.commands import run_stage
from etl.stage.local_files import replace_text
from evaluation.figures import cell
from evaluation.metrics import LEAST_USERS, Bootstrap
from evaluation.trials import add_arguments, trained, wanted_of

TABLE_FILE, PLOT_FILE = "table.md", "auc_by_length.png"
DRAWS = 2_000  # of seeds and users together


def main() -> None:
    parser = dataset_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    wanted = wanted_of(args)
    entries = summaries(trained(wanted))
    title = f"{args.dataset} dt={args.dt}" + ("  (SIMULATED data)" if definition_of(args).simulated else "")
    report = "\n\n".join([title, table(entries), slices_table(entries)])
    replace_text(wanted.out / TABLE_FILE, report + "\n")
    plot(entries, title, wanted.out / PLOT_FILE)
    print(report, flush=True)
    print(f"{wanted.out / TABLE_FILE}, {wanted.out / PLOT_FILE}", flush=True)
    print(json.dumps({"dataset": args.dataset, "dt": args.dt, "models": entries}), flush=True)


def summaries(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry a model and length, best AUC first.

    Means over the seeds; `auc_sd` over the seeds alone; intervals over seeds and users, of the AUC and of its
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
        for name in (*Bootstrap.METRICS, "train_seconds", "score_ms_per_target", "parameters"):
            values = [line[name] for line in good if line[name] is not None]
            entry[name] = float(np.mean(values)) if values else None
        entry["auc_sd"] = float(np.std([line["auc"] for line in good], ddof=1)) if len(good) > 1 else None
        entry["auc_low"], entry["auc_high"] = interval(good)
        others = {line["seed"]: line for line in groups.get((first, length), []) if "failed" not in line}
        both = [line for line in good if line["seed"] in others] if model != first else []
        entry["minus"] = first
        entry["difference"] = float(np.mean([x["auc"] - others[x["seed"]]["auc"] for x in both])) if both else None
        entry["difference_low"], entry["difference_high"] = interval(both, [others[line["seed"]] for line in both])
        entry["slices"] = [_mean_slice([line["slices"][n] for line in good]) for n in range(_fewest_slices(good))]
        entries.append(entry)
    return sorted(entries, key=lambda entry: -(entry["auc"] or 0))


def interval(
    lines: Sequence[dict[str, Any]], minus: Sequence[dict[str, Any]] | None = None
) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the AUC of one model's lines, one a seed, or of its difference to another's, of the
    same seeds in the same order: each draw takes as many seeds, with replacement, and one resample of the users for all
    of them. (None, None): fewer users than say anything of others.
    """
    if not lines or min(line["users"] for line in lines) < LEAST_USERS:
        return None, None
    auc_SR = np.array([line["resampled_auc"] for line in lines])
    if minus is not None:
        auc_SR = auc_SR - np.array([line["resampled_auc"] for line in minus])
    rng = np.random.default_rng(0)
    seeds, resamples = auc_SR.shape
    drawn = auc_SR[rng.integers(seeds, size=(DRAWS, seeds)), rng.integers(resamples, size=DRAWS)[:, None]].mean(1)
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
        f"| model | events | seeds | AUC | 95 % | sd of seeds | minus {first} | 95 % | GAUC | log loss | parameters"
        " | training, s | scoring, ms a target |",
        "|" + "---|" * 13,
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
            cell(entry["logloss"], ".4f"),
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


def _between(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def plot(entries: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw AUC against the events that a target sees, a line a model, with its interval over seeds and users where
    there is one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    good = [entry for entry in entries if entry["auc"] is not None]
    for model in dict.fromkeys(entry["model"] for entry in good):
        mine = sorted((entry for entry in good if entry["model"] == model), key=lambda entry: entry["length"])
        auc = np.array([entry["auc"] for entry in mine])
        ends = [[entry[f"auc_{end}"] or entry["auc"] for entry in mine] for end in ("low", "high")]
        reach = np.abs(np.array(ends) - auc)
        axes.errorbar([entry["length"] for entry in mine], auc, reach, marker="o", capsize=3, label=model)
    axes.set_xscale("log")
    axes.set_xlabel("events that a target sees at most")
    axes.set_ylabel("AUC")
    axes.set_title(title)
    if good:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_stage(main)

"""Tables and plots of benchmarks/comparison.py, from its results alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from evaluation.compare import exposures_table, slices_table, summaries, table
from evaluation.trials import RESULTS_FILE, read

FIRST = "vql"  # what the others are compared with
COLUMNS = 3  # of panels


def write_page(results: Path, sets: Sequence[str], to: Path) -> Path:
    """Write tables.md, summary.json, difference.png and length.png; return the first one's path.

    Args:
        results: folder of the results; sets: those that are shown, in this order, one without results is left out.
    """
    lines = read(results / RESULTS_FILE)
    trained = {name: mine for name in sets if (mine := lines_of(lines, name))}
    found = {name: summaries(mine) for name, mine in trained.items()}
    swept = {name: several for name, entries in found.items() if (several := at_several(entries))}
    parts = []
    for name, entries in found.items():
        longest = at_longest(entries)
        exposed = [line for line in trained[name] if line["length"] == longest[0]["length"]]
        parts += [f"## {name}", table(longest), slices_table(longest), exposures_table(exposed)]
        parts += [f"### {name} by length", table(swept[name])] if name in swept else []
    to.mkdir(parents=True, exist_ok=True)
    (to / "tables.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    (to / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    _plot_differences({name: at_longest(entries) for name, entries in found.items()}, to / "difference.png")
    _plot_lengths(swept, to / "length.png")
    return to / "tables.md"


def lines_of(lines: Sequence[dict[str, Any]], data_set: str) -> list[dict[str, Any]]:
    """Return the lines of a data set, those of the model that the others are compared with first."""
    mine = [line for line in lines if line["dataset"] == data_set]
    return sorted(mine, key=lambda line: line["model"] != FIRST)


def at_longest(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those at the length that most models were trained at, of several the longest."""
    lengths = [entry["length"] for entry in entries]
    best = max(set(lengths), key=lambda length: (lengths.count(length), length))
    return [entry for entry in entries if entry["length"] == best]


def at_several(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of the models that were trained at several lengths, the shortest length first."""
    lengths = Counter(entry["model"] for entry in entries)
    return sorted((entry for entry in entries if lengths[entry["model"]] > 1), key=lambda entry: entry["length"])


def _panels(number: int, height: float) -> tuple[Figure, list[Any]]:
    rows = max(1, -(-number // COLUMNS))
    figure = Figure(figsize=(12, height * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten().tolist()
    for unused in axes[number:]:
        unused.set_axis_off()
    return figure, axes


def _plot_differences(found: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw every model's AUC minus that of the first, with its interval over seeds and users."""
    figure, panels = _panels(len(found), 4.2)
    for axes, (name, entries) in zip(panels, found.items(), strict=False):
        known = [entry for entry in entries if entry["difference"] is not None][::-1]
        middle = np.array([entry["difference"] for entry in known])
        ends = [[entry[f"difference_{end}"] for entry in known] for end in ("low", "high")]
        reach = np.abs(np.array(ends, dtype=float) - middle)
        axes.errorbar(middle, range(len(known)), xerr=reach, fmt="o", ms=4, capsize=2)
        axes.axvline(0, color="grey", lw=0.8)
        axes.set_yticks(range(len(known)), [entry["model"] for entry in known], fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(f"AUC minus {FIRST}", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=5)
    figure.savefig(path, dpi=80)


def _plot_lengths(found: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw AUC against the events that a target sees, of models that were trained at several lengths."""
    figure, panels = _panels(len(found), 3.4)
    for axes, (name, entries) in zip(panels, found.items(), strict=False):
        for model in sorted({entry["model"] for entry in entries}):
            mine = sorted((e for e in entries if e["model"] == model and e["auc"]), key=lambda e: e["length"])
            sd = [entry["auc_sd"] or 0.0 for entry in mine]
            lengths, auc = [entry["length"] for entry in mine], [entry["auc"] for entry in mine]
            axes.errorbar(lengths, auc, sd, marker="o", ms=3, capsize=2, lw=1, label=model)
        axes.set_xscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("events that a target sees at most", fontsize=8)
        axes.tick_params(labelsize=8)
    if panels and panels[0].lines:
        panels[0].set_ylabel("AUC, sd of seeds", fontsize=8)
        panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)

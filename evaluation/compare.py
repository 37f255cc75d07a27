"""Train several models on one published partition, at several lengths of history and seeds, and compare them.

Same rows, same loop, same budget for all. Each training is a line of results.jsonl, and what stands there is not
trained again: stop it at any time, or add models, lengths and seeds. It ends in a table and a plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from etl.datasets.arguments import dataset_parser
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError
from etl.stage.local_files import replace_text
from etl.warehouse.partitions import parse_dt
from etl.warehouse.store import TableStore
from evaluation.evaluate import length_slices
from evaluation.metrics import Bootstrap
from training.config import ModelConfig, TrainConfig, load_config
from training.data import Sequences
from training.job import take_share_of_cores
from training.loop import TrainingData, Worker, train_model
from training.model.interests import INTERESTS
from training.package import Cutoff
from training.scoring import ScoredTargets, Scorer

RESAMPLES = 200
# What a kind cannot do without, where the configuration's model has none: the size that its source uses, or 100.
NEEDED = {"recent_attention": {"recent_window": 200}, "dien": {"recent_window": 100}} | {
    name: {"search_k": 100} for name in ("sim_hard", "sim_soft", "eta", "twin")
}
RESULTS_FILE, TABLE_FILE, PLOT_FILE = "results.jsonl", "table.md", "auc_by_length.png"


@dataclass(frozen=True)
class Trial:
    """One training: a kind of interest, the events that a target sees at most, and a seed."""

    model: str
    length: int
    seed: int


@dataclass(frozen=True)
class Rows:
    """A published partition.

    Attributes:
        digests: of its tables; results of other rows are others.
        cutoff: its rule.
        most_events: that a target sees of it: the largest length that can be compared.
    """

    items: pa.Table
    sequences: pa.Table
    cutoff: Cutoff
    most_events: int
    digests: dict[str, str]

    @staticmethod
    def read(store: TableStore, dt: str) -> Rows:
        of_sequences, of_items = store.require("sequences", dt), store.require("items", dt)
        cutoff, most_events = Cutoff.of_settings(of_sequences.settings), int(of_sequences.settings["max_events"])
        digests = {"sequences": of_sequences.data_digest, "items": of_items.data_digest}
        return Rows(store.read(of_items), store.read(of_sequences), cutoff, most_events, digests)


def main() -> None:
    args = _arguments()
    parse_dt(args.dt)
    config, rows = load_config(args.config), Rows.read(TableStore(args.warehouse, args.dataset), args.dt)
    trials = trials_of(args.models, args.lengths, args.seeds, rows.most_events)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    identity = {"dt": args.dt, "config": config.digest, **rows.digests}
    done = {trial_of(line): line for line in read(out / RESULTS_FILE) if identity.items() <= line.items()}
    missing = [trial for trial in trials if trial not in done]
    log(f"{len(trials)} trainings, {len(trials) - len(missing)} of them are in {out / RESULTS_FILE}")
    take_share_of_cores(1)
    with (out / RESULTS_FILE).open("a") as file:
        if file.tell() and not (out / RESULTS_FILE).read_text().endswith("\n"):
            file.write("\n")  # a killed process left half a line
        for number, trial in enumerate(missing, 1):
            done[trial] = identity | measured(trial, rows, config, args.device)
            file.write(json.dumps(done[trial]) + "\n")
            file.flush()
            said = done[trial].get("failed") or f"AUC {done[trial]['auc']:.4f}"
            log(f"[{number}/{len(missing)}] {trial.model}, {trial.length} events, seed {trial.seed}: {said}")
    found = [done[trial] for trial in trials]
    title = f"{args.dataset} dt={args.dt}" + ("  (SIMULATED data)" if args.definition.simulated else "")
    report = title + "\n\n" + table(summaries(found))
    replace_text(out / TABLE_FILE, report + "\n")
    plot(summaries(found), title, out / PLOT_FILE)
    print(report, flush=True)
    print(f"{out / TABLE_FILE}, {out / PLOT_FILE}", flush=True)
    print(json.dumps({"dataset": args.dataset, "dt": args.dt, "models": summaries(found)}), flush=True)


def _arguments() -> argparse.Namespace:
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    numbers = lambda text: [int(word) for word in words(text)]  # noqa: E731
    parser = dataset_parser(__doc__)
    parser.add_argument("--dt", required=True, help="partition: a UTC day, YYYY-MM-DD")
    parser.add_argument("--config", default="default", help="its first model and its training (default: %(default)s)")
    parser.add_argument(
        "--models", type=words, default=list(INTERESTS), help=f"with commas, of {','.join(INTERESTS)} (default: all)"
    )
    parser.add_argument(
        "--lengths", type=numbers, default=[], help="events that a target sees at most, with commas (default: all)"
    )
    parser.add_argument("--seeds", type=numbers, default=[7], help="with commas (default: 7)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", required=True, help="folder of the results, which a later call goes on with")
    return parser.parse_args()


def trials_of(models: Sequence[str], lengths: Sequence[int], seeds: Sequence[int], most_events: int) -> list[Trial]:
    """Return every training.

    Raises:
        StageError: a model is unknown, or a length is not one that the partition stores.
    """
    if unknown := [name for name in models if name not in INTERESTS]:
        raise StageError(f"unknown model {unknown[0]!r}", f"use some of: {', '.join(INTERESTS)}")
    if wrong := [length for length in lengths if not 1 <= length <= most_events]:
        raise StageError(
            f"length {wrong[0]:,} is not between 1 and the {most_events:,} events that a target of this partition sees",
            "give shorter ones, or build the partition with a larger MAX_HISTORY",
        )
    if not (models and seeds):
        raise StageError("nothing to train", "give at least one model and one seed")
    return [Trial(*each) for each in itertools.product(models, lengths or [most_events], seeds)]


def model_config(name: str, base: ModelConfig) -> ModelConfig:
    """Return a configuration's model with another kind of interest and what that kind needs."""
    needed: dict[str, Any] = {key: size for key, size in NEEDED.get(name, {}).items() if not getattr(base, key)}
    return replace(base, interest=name, **needed)


def read(results: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results; one that a killed process left half is none."""
    lines = results.read_text().splitlines() if results.exists() else []
    whole = []
    for number, line in enumerate(lines, 1):
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            log(f"warning: line {number} of {results} is not whole; that training is done again")
    return whole


def trial_of(line: dict[str, Any]) -> Trial:
    return Trial(line["model"], line["length"], line["seed"])


def measured(trial: Trial, rows: Rows, config: TrainConfig, device: str) -> dict[str, Any]:
    """Train one model; return its figures on the evaluation targets. A training that diverges is a result, too."""
    base = next(iter(config.models.values()))
    config = replace(config, models={trial.model: model_config(trial.model, base)}, seed=trial.seed)
    cutoff = replace(rows.cutoff, max_events=trial.length)
    data = TrainingData.of(Sequences.from_arrow(rows.sequences, trial.length), rows.items, config)
    about = {"model": trial.model, "length": trial.length, "seed": trial.seed}
    began = time.perf_counter()
    try:
        model, result = train_model(trial.model, data, config, Worker(device=device), lambda _: None)
    except FloatingPointError as error:
        return about | {"failed": str(error)}
    seconds = time.perf_counter() - began
    model = model.cpu()
    began = time.perf_counter()
    scored = Scorer(Path(), model, data.vocabulary, cutoff).score(rows.items, rows.sequences)
    return {
        **about,
        "parameters": sum(weights.numel() for weights in model.parameters()),
        "train_seconds": round(seconds, 1),
        "score_ms_per_target": round(1e3 * (time.perf_counter() - began) / max(1, len(scored.score)), 4),
        "epochs": result.epoch + 1,
        "device": device,
        **quality(scored),
    }


def quality(scored: ScoredTargets) -> dict[str, Any]:
    """Return metrics with the intervals of resampled users (None: too few), and those of the thirds of history
    length.
    """
    bootstrap = Bootstrap(scored.user_id, scored.label, {"it": scored.score}, RESAMPLES)
    figures: dict[str, Any] = {"targets": len(scored.label)}
    for metric in Bootstrap.METRICS:
        interval = bootstrap.interval("it", metric)
        bounds = {f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        figures |= {metric: interval.value, **{name: None if np.isnan(end) else end for name, end in bounds.items()}}
    slices = length_slices(scored, {"it": scored.score}, "it")
    return figures | {"slices": [{"low": s["low"], "high": s["high"], **s["models"]["it"]} for s in slices]}


def summaries(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry a model and length, best AUC first: means over the seeds, and their standard deviation."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in found:
        groups.setdefault((line["model"], line["length"]), []).append(line)
    entries = []
    for (model, length), lines in groups.items():
        good = [line for line in lines if "failed" not in line]
        entry: dict[str, Any] = {"model": model, "length": length, "seeds": len(good), "failed": len(lines) - len(good)}
        names = (*Bootstrap.METRICS, "auc_low", "auc_high", "train_seconds", "score_ms_per_target", "parameters")
        known = {name: [line[name] for line in good if line[name] is not None] for name in names}
        entry |= {name: float(np.mean(values)) if values else None for name, values in known.items()}
        entry["auc_sd"] = float(np.std([line["auc"] for line in good], ddof=1)) if len(good) > 1 else None
        entries.append(entry)
    return sorted(entries, key=lambda entry: -(entry["auc"] or 0))


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown."""
    lines = [
        "| model | events | seeds | AUC | sd of seeds | 95 % of users | GAUC | log loss | parameters | training, s"
        " | scoring, ms a target |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    cell = lambda value, form: "-" if value is None or not np.isfinite(value) else format(value, form)  # noqa: E731
    for entry in entries:
        failed = f", {entry['failed']} diverged" if entry["failed"] else ""
        cells = [
            entry["model"],
            f"{entry['length']:,}",
            f"{entry['seeds']}{failed}",
            cell(entry["auc"], ".4f"),
            cell(entry["auc_sd"], ".4f"),
            f"{cell(entry['auc_low'], '.4f')} to {cell(entry['auc_high'], '.4f')}",
            cell(entry["gauc"], ".4f"),
            cell(entry["logloss"], ".4f"),
            cell(entry["parameters"], ",.0f"),
            cell(entry["train_seconds"], ",.1f"),
            cell(entry["score_ms_per_target"], ".3f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(entries: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw AUC against the events that a target sees, a line a model; the bars are a standard deviation of seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    good = [entry for entry in entries if entry["auc"] is not None]
    for model in dict.fromkeys(entry["model"] for entry in good):
        mine = sorted((entry for entry in good if entry["model"] == model), key=lambda entry: entry["length"])
        spread = [entry["auc_sd"] or 0.0 for entry in mine]
        axes.errorbar([e["length"] for e in mine], [e["auc"] for e in mine], spread, marker="o", capsize=3, label=model)
    axes.set_xscale("log")
    axes.set_xlabel("events that a target sees at most")
    axes.set_ylabel("AUC")
    axes.set_title(title)
    if good:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_stage(main)

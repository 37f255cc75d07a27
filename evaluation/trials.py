"""Train models on one published partition, several at a time: a line of results.jsonl each, table and plot apart.

    python -m evaluation.trials --warehouse W --dataset NAME --dt YYYY-MM-DD --out FOLDER --jobs 14

It needs torch, Triton on a GPU, numpy, pyarrow and safetensors alone: a machine with a GPU and nothing else trains what
`evaluation.compare` then shows from the same folder. What stands in results.jsonl is not trained again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError
from etl.warehouse.partitions import parse_dt
from etl.warehouse.schemas import EVALUATION
from etl.warehouse.store import TableStore
from evaluation.metrics import Bootstrap, figures, numbered, thirds
from training.config import ModelConfig, TrainConfig, load_config
from training.data import Sequences, target_is_random
from training.loop import TrainingData, Worker, train_model
from training.model.interests import INTERESTS
from training.package import Cutoff
from training.scoring import ScoredTargets, score_joined

RESAMPLES = 200
RESULTS_FILE = "results.jsonl"
EXPOSURES = ("standard", "random")  # what showed a target
TABLES = ("sequences", "items")  # that a training reads
FORMAT = 2  # of a line; those of another one are trained again
# What a kind cannot do without, where the configuration's model has none: the size that its source uses, or 100.
NEEDED = {"recent_attention": {"recent_window": 200}, "dien": {"recent_window": 100}} | {
    name: {"search_k": 100} for name in ("sim_hard", "sim_soft", "eta", "twin")
}


@dataclass(frozen=True)
class Trial:
    """One training: a kind of interest, the events that a target sees at most, and a seed."""

    model: str
    length: int
    seed: int


@dataclass(frozen=True)
class Partition:
    """A published partition, and the configuration that is trained on it."""

    warehouse: str
    dataset: str
    dt: str
    config: str


@dataclass(frozen=True)
class Rows:
    """The tables of a published partition, which every process that trains reads once."""

    items: pa.Table
    sequences: pa.Table

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def of(partition: Partition) -> Rows:
        store = TableStore(partition.warehouse, partition.dataset)
        return Rows(*(store.read(store.require(table, partition.dt)) for table in ("items", "sequences")))

    @property
    def judged_is_random(self) -> np.ndarray:
        """Return which evaluation targets random traffic exposed, bool [T]."""
        split = self.sequences["target_split"].combine_chunks().flatten().to_numpy()
        return target_is_random(self.sequences)[split == EVALUATION]


@dataclass(frozen=True)
class Wanted:
    """What is to be trained, where, and where the results stand.

    Attributes:
        lengths: none: all that the partition gives.
        jobs: trainings at a time.
    """

    partition: Partition
    models: Sequence[str]
    lengths: Sequence[int]
    seeds: Sequence[int]
    out: Path
    jobs: int
    device: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="its folder below the warehouse")
    parser.add_argument("--warehouse", required=True, help="root of the tables: a path, or a URI that Arrow reads")
    add_arguments(parser)
    parser.add_argument("--out", required=True, help="folder of the results, which a later call goes on with")
    args = parser.parse_args()
    found = trained(wanted_of(args))
    log(f"{len(found)} trainings stand in {args.out}/{RESULTS_FILE}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which trainings are wanted, besides --dataset, --warehouse and --out."""
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    numbers = lambda text: [int(word) for word in words(text)]  # noqa: E731
    parser.add_argument("--dt", required=True, help="partition: a UTC day, YYYY-MM-DD")
    parser.add_argument("--config", default="default", help="its first model and its training (default: %(default)s)")
    parser.add_argument(
        "--models", type=words, default=list(INTERESTS), help=f"with commas, of {','.join(INTERESTS)} (default: all)"
    )
    parser.add_argument(
        "--lengths", type=numbers, default=[], help="events that a target sees at most, with commas (default: all)"
    )
    parser.add_argument("--seeds", type=numbers, default=[7], help="with commas (default: 7)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, a process each (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def wanted_of(args: argparse.Namespace) -> Wanted:
    """Return what the arguments ask for. Raises: StageError: no such day, or fewer than one training at a time."""
    parse_dt(args.dt)
    if args.jobs < 1:
        raise StageError(f"--jobs is {args.jobs}", "give the number of trainings at a time, at least 1")
    partition = Partition(args.warehouse, args.dataset, args.dt, args.config)
    return Wanted(partition, args.models, args.lengths, args.seeds, Path(args.out), args.jobs, args.device)


@dataclass(frozen=True)
class Plan:
    """What is wanted, and what of it stands.

    Attributes:
        identity: of the partition's rows and the configuration: a line of other ones is none of this plan.
        trainings: all that are wanted.
        done: the lines of `identity` in the file of results, those of other trainings, too.
    """

    identity: Mapping[str, Any]
    trainings: Sequence[Trial]
    done: dict[Trial, dict[str, Any]]

    @property
    def in_order(self) -> list[Trial]:
        """All, seed by seed, so that a comparison that is stopped has seen every model; the data of a seed and length
        is joined once.
        """
        return sorted(self.trainings, key=lambda trial: (trial.seed, -trial.length))

    @property
    def missing(self) -> list[Trial]:
        return [trial for trial in self.in_order if trial not in self.done]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The line of every training that is wanted and stands, by model and length."""
        return [self.done[trial] for trial in self.trainings if trial in self.done]


def planned(wanted: Wanted) -> Plan:
    """Return what is wanted and what of it stands.

    Raises:
        StageError: the partition is not published, or a model or a length is unknown.
    """
    partition = wanted.partition
    store, config = TableStore(partition.warehouse, partition.dataset), load_config(partition.config)
    manifests = {table: store.require(table, partition.dt) for table in TABLES}
    most_events = Cutoff.of_settings(manifests["sequences"].settings).max_events
    assert most_events is not None  # published sequences have a bound
    trials = trials_of(wanted.models, wanted.lengths, wanted.seeds, most_events)
    identity = {"format": FORMAT, "dataset": partition.dataset, "dt": partition.dt, "config": config.digest}
    identity |= {table: manifest.data_digest for table, manifest in manifests.items()}
    found = read(wanted.out / RESULTS_FILE)
    return Plan(identity, trials, {trial_of(line): line for line in found if identity.items() <= line.items()})


def trained(
    wanted: Wanted, plan: Plan | None = None, ended: Callable[[dict[str, Any]], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Train what the results do not hold yet; return the line of every training that is wanted, by model and length.

    A kind that these rows cannot have, such as one of categories where items have none, is said and left out.

    Args:
        plan: of `wanted` (default: made here).
        ended: takes the line of each training once it stands in the file.

    Raises:
        StageError: what `planned` raises, or the memory of the device was too small for some trainings.
    """
    plan = plan or planned(wanted)
    file, missing, too_large = wanted.out / RESULTS_FILE, plan.missing, []
    wanted.out.mkdir(parents=True, exist_ok=True)
    log(f"{len(plan.trainings)} trainings, {len(plan.trainings) - len(missing)} of them are in {file}")
    # A line is one write at the file's end: commands of several data sets may share the file.
    with file.open("ab", buffering=0) as out:
        if out.tell() and not file.read_bytes().endswith(b"\n"):
            out.write(b"\n")  # a killed process left half a line
        for number, line in enumerate(_each(missing, wanted), 1):
            trial, not_trained = trial_of(line), line.get("impossible") or line.get("out_of_memory")
            said = not_trained or line.get("failed") or f"AUC {line['auc']:.4f}"
            log(f"[{number}/{len(missing)}] {trial.model}, {trial.length} events, seed {trial.seed}: {said}")
            if "out_of_memory" in line:
                too_large.append(trial)
            if not not_trained:
                plan.done[trial] = {**plan.identity, **line}
                out.write(f"{json.dumps(plan.done[trial])}\n".encode())
                ended(plan.done[trial])
    if too_large:
        raise StageError(
            f"{len(too_large)} of {len(plan.trainings)} trainings found no memory on the device, such as"
            f" {too_large[0]}",
            "run the same command again with a smaller --jobs, which trains these alone",
        )
    return plan.lines


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
        if not line:
            continue
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            log(f"warning: line {number} of {results} is not whole; that training is done again")
    return whole


def trial_of(line: dict[str, Any]) -> Trial:
    return Trial(line["model"], line["length"], line["seed"])


def _each(trials: Sequence[Trial], wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Yield the line of each training as it ends."""
    one = functools.partial(_measured, partition=wanted.partition, device=wanted.device, jobs=wanted.jobs)
    if wanted.jobs == 1:
        yield from map(one, trials)
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // wanted.jobs))  # read where a process begins
    with mp.get_context("spawn").Pool(min(wanted.jobs, max(1, len(trials)))) as pool:
        yield from pool.imap_unordered(one, trials)


def _measured(trial: Trial, partition: Partition, device: str, jobs: int) -> dict[str, Any]:
    """Train one model; return its line. What diverges, finds no memory or does not suit the rows is a line, too."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    config = load_config(partition.config)
    base = next(iter(config.models.values()))
    config = replace(config, models={trial.model: model_config(trial.model, base)}, seed=trial.seed)
    about = {"model": trial.model, "length": trial.length, "seed": trial.seed}
    try:
        found = measured(config, _data(partition, trial.length, trial.seed), Rows.of(partition), device)
        return about | {"device": _name_of(device), "jobs": jobs} | found
    except FloatingPointError as error:
        return about | {"failed": str(error)}
    except StageError as error:
        return about | {"impossible": f"left out, {error}"}
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
    torch.cuda.empty_cache()  # when the error, which holds the training's tensors, is gone
    return about | {"out_of_memory": reason}


@functools.lru_cache(maxsize=1)
def _data(partition: Partition, length: int, seed: int) -> TrainingData:
    """Return the data of a length and seed, which all models share."""
    rows, config = Rows.of(partition), replace(load_config(partition.config), seed=seed)
    return TrainingData.of(Sequences.from_arrow(rows.sequences, length), rows.items, config)


def _name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def measured(config: TrainConfig, data: TrainingData, rows: Rows, device: str) -> dict[str, Any]:
    """Train the one model of a configuration; return its figures on the evaluation targets.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    [name] = config.models
    item_id = rows.items["item_id"].to_numpy()
    began = time.perf_counter()
    model, result = train_model(name, data, config, Worker(device=device), lambda _: None)
    seconds = time.perf_counter() - began
    scored = score_joined(model, data.joined, item_id)
    began = time.perf_counter()
    score_joined(model, data.joined, item_id)  # once more: the first pass compiles
    return {
        "parameters": sum(weights.numel() for weights in model.parameters()),
        "train_seconds": round(seconds, 2),
        "score_ms_per_target": round(1e3 * (time.perf_counter() - began) / max(1, len(scored.score)), 5),
        "epochs": result.epoch + 1,
        **quality(scored, rows.judged_is_random),
    }


def quality(scored: ScoredTargets, is_random: np.ndarray) -> dict[str, Any]:
    """Return the `_resampled` figures of all targets, metrics of the thirds of history length, and `exposures`: the
    figures of what random traffic exposed, and of the other targets, where there are both.

    Args:
        is_random: bool [T].
    """
    user = numbered(scored.user_id)[1]
    found = _resampled(user, scored.label, scored.score)
    slices = []
    for rows in thirds(scored.history_length):
        length = scored.history_length[rows]
        bounds = {"low": int(length.min()), "high": int(length.max()), "targets": len(length)}
        slices.append({**bounds, **figures(user[rows], scored.label[rows], scored.score[rows])})
    found["slices"] = slices
    if 0 < is_random.sum() < len(is_random):
        found["exposures"] = {
            exposure: _resampled(user[rows], scored.label[rows], scored.score[rows])
            for exposure, rows in zip(EXPOSURES, (~is_random, is_random), strict=True)
        }
    return found


def _resampled(user: np.ndarray, label: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    """Return metrics with the intervals of resampled users (None: too few), and what each resample of the users gives:
    resample n is of the same users for every model of a partition.
    """
    bootstrap = Bootstrap(user, label, {"it": score}, RESAMPLES)
    found: dict[str, Any] = {"targets": len(label), "users": bootstrap.users}
    for metric in Bootstrap.METRICS:
        found[f"resampled_{metric}"] = [round(value, 5) for value in bootstrap.values["it"][metric][1:].tolist()]
        interval = bootstrap.interval("it", metric)
        bounds = {f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        found |= {metric: interval.value, **{name: None if np.isnan(end) else end for name, end in bounds.items()}}
    return found


if __name__ == "__main__":
    run_stage(main)

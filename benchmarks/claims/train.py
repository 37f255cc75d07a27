"""Train the grid of (data set, variant, seed) in parallel processes.

One line of JSON a run, and what is there is not done again.
"""

from __future__ import annotations

import functools
import json
import multiprocessing as mp
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.claims.length import attention_error_by_length, heavy_tails, logit_scales
from benchmarks.claims.variants import MAX_EVENTS, SIMULATED, VARIANTS
from evaluation.metrics import auc, gauc, logloss
from training.config import TrainConfig
from training.data import Sequences
from training.loop import TrainingData, Worker, train_model
from training.model.cache import stored, to_sparse
from training.model.probe import probe_by_length, probe_warnings
from training.model.ranker import Ranker
from training.user_batches import UserBatches

LENGTHS_OF = ("vql", "vql_16_codes", "vql_256_codes")  # variants whose attention error is measured against the length
EPOCHS = {"simulated": 1, "drifting": 1, "kuairand": 2, "movielens": 2, "buildroot": 1}


@dataclass(frozen=True)
class Run:
    """One training; `number` is the seed and, of a simulated set, the partition."""

    data_set: str
    folder: Path
    variant: str
    number: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.data_set, self.variant, self.number


def grid(sets: Sequence[str], out: Path, seeds: int, variants: Sequence[str]) -> list[Run]:
    """Return every run, those of a partition together.

    Its data is read once a process. A simulated set has a partition a seed.
    """
    folder = lambda name, number: out / (f"{name}_{number}" if name in SIMULATED else name)  # noqa: E731
    return [
        Run(s, folder(s, number), name, number)
        for s in sets
        for number in range(seeds)
        for name in variants
        if VARIANTS[name].runs_on(s)
    ]


def missing(runs: list[Run], results: Path) -> list[Run]:
    """Return the runs that the results do not hold yet."""
    done = {(r["data_set"], r["variant"], r["number"]) for r in read(results)}
    return [run for run in runs if run.key not in done]


def train(runs: list[Run], results: Path, jobs: int, device: str) -> None:
    """Train and append to the results."""
    print(f"{len(runs)} trainings, {jobs} at a time on {device}", flush=True)
    began = time.perf_counter()
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as out:
        for count, figures in enumerate(_each(runs, jobs, device), 1):
            out.write(json.dumps(figures) + "\n")
            out.flush()
            spent = time.perf_counter() - began
            name = f"{figures['data_set']} {figures['number']} {figures['variant']}"
            said = f"AUC {figures['auc']:.4f}" if "auc" in figures else figures["failed"]
            print(
                f"[{count}/{len(runs)}, {spent / count * (len(runs) - count):.0f} s to go] {name}: {said}", flush=True
            )


def read(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _each(runs: list[Run], jobs: int, device: str) -> Iterator[dict]:
    if jobs == 1:
        yield from (measured(run, device) for run in runs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with mp.get_context("spawn").Pool(min(jobs, max(1, len(runs)))) as pool:
        yield from pool.imap_unordered(functools.partial(measured, device=device), runs)


@functools.lru_cache(maxsize=2)
def _data(folder: Path, seed: int) -> TrainingData:
    return TrainingData.of(
        bounded_sequences(folder / "sequences.parquet"), pq.read_table(folder / "items.parquet"), TrainConfig(seed=seed)
    )


def bounded_sequences(path: Path) -> Sequences:
    """Read sequences as the training of the pipeline does: a row stores more than `max_events`, of which a target sees
    the latest.

    Raises:
        ValueError: the file does not say how many.
    """
    rows = pq.read_table(path)
    bound = (rows.schema.metadata or {}).get(MAX_EVENTS)
    if bound is None:
        raise ValueError(
            f"{path} does not say how many events a target sees at most: remove its folder and run the step prepare"
            " again"
        )
    return Sequences.from_arrow(rows, int(bound))


def measured(run: Run, device: str) -> dict:
    """Train one model; return its figures on the evaluation targets. A training that diverges is a result, too."""
    variant = VARIANTS[run.variant]
    data = _data(run.folder, run.number)
    data = data if variant.alter is None else variant.alter(data)
    config = TrainConfig(
        models={run.variant: variant.model},
        epochs=EPOCHS[run.data_set],
        seed=run.number,
        warmup_steps=variant.warmup_steps,
    )
    about = {"data_set": run.data_set, "variant": run.variant, "number": run.number, "torch": torch.__version__}
    began = time.perf_counter()
    try:
        model, result = train_model(run.variant, data, config, Worker(device=device), lambda _: None)
    except FloatingPointError as error:
        return about | {"failed": str(error)}
    figures = about | {
        "seconds": time.perf_counter() - began,
        "best_epoch": result.best_epoch + 1,
        "epochs": result.epoch + 1,
    }
    figures |= _quality(model, data, device)
    if model.coded is not None:
        figures |= _codebook(model, data, device)
        if run.data_set == "simulated" and run.variant in LENGTHS_OF:
            keys = _popular_keys(model, data, device)
            figures["by_length"] = attention_error_by_length(*keys, run.number)
            if run.variant == "vql":
                figures |= {"by_scale": logit_scales(*keys, run.number), "heavy_tails": heavy_tails(*keys, run.number)}
    return figures


@torch.no_grad()
def _quality(model: Ranker, data: TrainingData, device: str) -> dict:
    batches = UserBatches(data.joined, 0, 1, users_per_step=32, seed=0)
    logit = torch.cat(
        [model(batch.to(device))[0].float().cpu() for batch in batches.all_of(data.split.evaluation)]
    ).numpy()
    sequences = data.joined.sequences
    label = sequences.target_label[data.split.evaluation]
    user = np.searchsorted(sequences.target_start, data.split.evaluation, side="right") - 1
    return {
        "auc": auc(label, logit),
        "gauc": gauc(user, label, logit)[0],
        "logloss": logloss(label, 1 / (1 + np.exp(-logit.astype(np.float64)))),
        "targets": len(label),
    }


@torch.no_grad()
def _codebook(model: Ranker, data: TrainingData, device: str) -> dict:
    """Key error over the events, use of the codes, size of the caches, and what the probe of training says."""
    assert model.coded is not None
    batches = UserBatches(data.joined, 0, 1, users_per_step=64, seed=0)
    batch = next(batches.all_of(data.split.evaluation)).to(device)
    key_NHd = model.coded.keys(model.items(batch.items))
    hard_NHd = model.coded.quantizer.quantized(model.coded.quantizer.search(key_NHd), key_NHd)
    weight_N = torch.bincount(batch.event_item, minlength=len(key_NHd)).double()
    error = ((key_NHd - hard_NHd).double().square().sum((1, 2)) * weight_N).sum() / weight_N.sum()
    centred = (key_NHd - (key_NHd * weight_N[:, None, None]).sum(0) / weight_N.sum()).double()
    variance = (centred.square().sum((1, 2)) * weight_N).sum() / weight_N.sum()
    probes = probe_by_length(model.probe(batch))
    shares_G = model.coded.quantizer.perplexity_share()
    caches = model.user_caches(batch, int(batch.event_time_ms.max()))
    sparse = [to_sparse(stored(cache, torch.float16)) for cache in caches]
    cache_bytes = sum(s.entry_K.nbytes + s.log_count_K.nbytes + s.mean_Kd.nbytes for s in sparse)
    users = sum(p.users for p in probes)
    mean = lambda name: sum(getattr(p, name) * p.users for p in probes) / users  # noqa: E731
    return {
        "key_error": float(error / variance),
        "perplexity": float(shares_G.mean()),
        "dead": float(model.coded.quantizer.dead_share().mean()),
        "cache_bytes": cache_bytes / len(caches),
        "key_value_bytes": len(batch.event_item) / len(caches) * 2 * model.config.width * 2,
        "attention_error": mean("error"),
        "bound": mean("bound"),
        "warnings": probe_warnings(probes, shares_G.cpu()),
    }


@torch.no_grad()
def _popular_keys(
    model: Ranker, data: TrainingData, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return exact keys, quantized keys and queries [N, H, d] of the partition's items, and how often each
    occurs [N]."""
    assert model.coded is not None
    sequences = data.joined.sequences
    items = data.joined.items.take(np.arange(len(data.joined.items.rows["item_id"])))
    tensors = type(items)(
        {name: torch.from_numpy(np.ascontiguousarray(rows)).to(device) for name, rows in items.rows.items()}
    )
    static_NS = model.items(tensors)
    key_NHd = model.coded.keys(static_NS)
    hard_NHd = model.coded.quantizer.quantized(model.coded.quantizer.search(key_NHd), key_NHd)
    count_N = torch.bincount(torch.from_numpy(sequences.history_item.astype(np.int64)), minlength=len(key_NHd))
    return key_NHd.cpu(), hard_NHd.cpu(), model.coded.queries(static_NS).cpu(), count_N.double()

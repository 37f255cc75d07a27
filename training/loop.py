"""Train one model: the loop knows torch.distributed when it is there, and neither Ray, MLflow nor Airflow."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from etl.schemas import TRAIN
from training.checkpoint import inherit
from training.config import TrainConfig
from training.data import Joined, Sequences, Split, UserBatches, split_targets
from training.model.probe import probe_by_length, probe_warnings, shared_information
from training.model.ranker import FieldSizes, Ranker
from training.vocabulary import Vocabulary


@dataclass(frozen=True)
class TrainingData:
    """What every model of a run is trained on."""

    joined: Joined
    vocabulary: Vocabulary
    split: Split

    @staticmethod
    def of(sequences: Sequences, items: pa.Table, config: TrainConfig, known: Vocabulary | None = None) -> TrainingData:
        """Return the data of a partition with its vocabulary, or with a warm start's, which the partition appends to."""
        fields = [np.array(values, dtype=object) for values in zip(*sequences.user_fields, strict=True)]
        contexts = sequences.target_context[sequences.target_split == TRAIN]
        make = Vocabulary.build if known is None else known.appended
        vocabulary = make(items, fields, contexts, config.vocabulary)
        split = split_targets(sequences, config.validation_share, config.seed)
        return TrainingData(Joined.of(sequences, items, vocabulary), vocabulary, split)

    def hashed_event_share(self) -> float:
        """Return the share of the history events whose items share hashed rows."""
        rare = self.vocabulary.item_ids.is_hashed(self.joined.items.rows["item_id"])
        history = self.joined.sequences.history_item
        return float(rare[history].mean()) if len(history) else 0.0


@dataclass(frozen=True)
class Worker:
    """This process among the data-parallel workers."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"


@dataclass
class EpochResult:
    """State after an epoch; enough to continue from (`resume`).

    Attributes:
        metrics: of the epoch, the same on every worker.
        model_state, best_state: now, and at the best validation log loss so far.
        finished: no further epoch follows.
        warnings: what the probe of the codebooks finds wrong, in words.
    """

    epoch: int
    metrics: dict[str, float]
    model_state: dict
    optimizer_state: dict
    best_state: dict
    best_logloss: float
    best_epoch: int
    finished: bool
    warnings: list[str] = field(default_factory=list)


def train_model(
    name: str,
    data: TrainingData,
    config: TrainConfig,
    worker: Worker,
    on_epoch: Callable[[EpochResult], None],
    resume: dict | None = None,
    warm_start: tuple[Ranker, Vocabulary] | None = None,
) -> tuple[Ranker, EpochResult]:
    """Train `config.models[name]` with early stop; every worker ends with the same best weights.

    Args:
        on_epoch: called on every worker after each epoch (report, checkpoint).
        resume: an `EpochResult` as a dict, from a checkpoint.
        warm_start: an older model and its vocabulary: this one begins with its weights, and its codebooks need no warm-up.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's first product is made
    torch.use_deterministic_algorithms(config.deterministic)
    model = Ranker(FieldSizes.of(data.vocabulary), config.models[name]).to(worker.device)
    if warm_start is not None:
        inherit(model, data.vocabulary, *warm_start)
    if config.compiled:
        model.compile()
    parallel = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False) if worker.world > 1 else model
    optimizer = torch.optim.AdamW(_parameter_groups(model, config), lr=config.learning_rate)
    batches = UserBatches(
        data.joined,
        worker.rank,
        worker.world,
        max(1, config.users_per_step // worker.world),
        config.seed,
    )
    steps = max(batches.steps_per_pass(data.split.train), config.min_epoch_steps)
    warmup = min(config.warmup_steps, steps * max(1, config.epochs // 2))
    generator = torch.Generator().manual_seed(config.seed)
    best_state, best_logloss, best_epoch, first_epoch = copy.deepcopy(model.state_dict()), float("inf"), -1, 0
    if resume is not None:
        model.load_state_dict(resume["model_state"])
        optimizer.load_state_dict(resume["optimizer_state"])
        best_state, best_logloss, best_epoch = resume["best_state"], resume["best_logloss"], resume["best_epoch"]
        first_epoch = resume["epoch"] + 1
    step = 0
    result = None
    for epoch in range(first_epoch, config.epochs):
        started, waited, losses, samples = time.perf_counter(), 0.0, [], 0
        model.train()
        mark = time.perf_counter()
        for batch in batches.epoch(data.split.train, epoch, config.targets_per_user, config.min_epoch_steps):
            batch = batch.to(worker.device)
            waited += time.perf_counter() - mark
            with torch.autocast(batch.target_label.device.type, torch.bfloat16, enabled=config.bf16):
                logits, auxiliary = parallel(batch)
            loss = F.binary_cross_entropy_with_logits(logits.float(), batch.target_label)
            optimizer.zero_grad(set_to_none=True)
            (loss + auxiliary).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
            step += 1
            losses.append(loss.detach())
            samples += len(batch.target_label)
            _tend_codebooks(model, batch, step, warmup, config, worker, generator)
            mark = time.perf_counter()
        train_loss = float(torch.stack(losses).mean()) if losses else float("nan")
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss of {name} is not finite in epoch {epoch}")
        seconds = time.perf_counter() - started
        validation = _validation_logloss(model, batches, data.split.validation, worker)
        # A model of the warm-up has exact keys: it is not what will be served, so it is never the best.
        ready = model.quantizer is None or bool(model.quantizer.started)
        if ready and validation < best_logloss - 1e-5:
            best_state, best_logloss, best_epoch = copy.deepcopy(model.state_dict()), validation, epoch
        finished = epoch + 1 == config.epochs or (best_epoch >= 0 and epoch - best_epoch >= config.patience)
        metrics = {
            "train_loss": train_loss,
            "validation_logloss": validation,
            "samples_per_s": samples * worker.world / seconds,
            "data_wait_share": waited / seconds,
            "epoch_seconds": seconds,
        }
        warnings: list[str] = []
        if model.quantizer is not None:
            codebook, warnings = _codebook_metrics(model, batches, data.split.validation, worker)
            metrics |= codebook
        result = EpochResult(
            epoch, metrics, model.state_dict(), optimizer.state_dict(), best_state, best_logloss, best_epoch, finished, warnings
        )
        on_epoch(result)
        if finished:
            break
    if result is None:
        assert resume is not None, "a run without epochs can only be a resumed one"
        result = EpochResult(**resume)
    if best_epoch < 0:
        raise FloatingPointError(
            f"{name} has no epoch after the {warmup} warm-up steps of its codebooks: train longer or warm up less"
        )
    model.load_state_dict(best_state)
    return model.eval(), result


def _parameter_groups(model: Ranker, config: TrainConfig) -> list[dict]:
    """Decay on embedding tables only: ids overfit, codebooks and norms must not shrink."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    known = {id(p) for p in tables}
    return [
        {"params": tables, "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.0},
    ]


@torch.no_grad()
def _tend_codebooks(
    model: Ranker, batch, step: int, warmup: int, config: TrainConfig, worker: Worker, generator: torch.Generator
) -> None:
    """Move averaged codebooks, start them after warm-up, revive dead codes; all workers hold bit-identical codebooks."""
    quantizer = model.quantizer
    if quantizer is None:
        return
    if quantizer.ema_decay is not None and bool(quantizer.started):
        if worker.world > 1:
            dist.all_reduce(quantizer.step_GCk)
        quantizer.ema_step()
    starting = not bool(quantizer.started) and step >= warmup
    reviving = bool(quantizer.started) and step % config.revive_every_steps == 0
    if starting or reviving:
        if worker.world > 1:
            dist.all_reduce(quantizer.usage_GC)
            quantizer.usage_GC /= worker.world
        if worker.rank == 0:
            keys_NHd = model.keys(model.items(batch.items))
            quantizer.start_from_keys(keys_NHd, generator) if starting else quantizer.revive(keys_NHd, generator)
        if worker.world > 1:
            shared = [quantizer.codebook_GCw.data, quantizer.usage_GC, quantizer.started]
            for tensor in [*shared, quantizer.average_GCk] if quantizer.ema_decay is not None else shared:
                dist.broadcast(tensor, src=0)


@torch.no_grad()
def _codebook_metrics(model: Ranker, batches: UserBatches, targets: np.ndarray, worker: Worker) -> tuple[dict[str, float], list[str]]:
    """Return how the codebook is used and, on a few users, how far attention over it is from exact attention; and warnings.

    Of this worker's users: figures to look at, which nothing is decided by.
    """
    assert model.quantizer is not None
    shares_G = model.quantizer.perplexity_share()
    metrics = {"perplexity_share": float(shares_G.mean()), "dead_share": float(model.quantizer.dead_share().mean())}
    batch = next(batches.all_of(targets), None)
    if batch is None or not bool(model.quantizer.started):
        return metrics, []
    batch = batch.to(worker.device)
    probes = probe_by_length(model.eval().probe(batch))
    if model.quantizer.groups > 1 and len(batch.event_item):
        codes_NG = model.quantizer.search(model.keys(model.items(batch.items)))
        metrics["groups_shared_information"] = shared_information(codes_NG, torch.bincount(batch.event_item, minlength=len(codes_NG)))
    for probe in probes:
        span = f"probe_{probe.shortest}_to_{probe.longest - 1}_events"
        metrics |= {f"{span}/attention_error": probe.error, f"{span}/bound": probe.bound, f"{span}/key_error": probe.key_error}
    warnings = probe_warnings(probes, shares_G.cpu())
    return metrics | {"probe_warnings": float(len(warnings))}, warnings


@torch.no_grad()
def _validation_logloss(model: Ranker, batches: UserBatches, targets: np.ndarray, worker: Worker) -> float:
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=worker.device)
    for batch in batches.all_of(targets):
        batch = batch.to(worker.device)
        losses = F.binary_cross_entropy_with_logits(model(batch)[0].float(), batch.target_label, reduction="sum")
        total += torch.stack(
            [losses.double(), torch.tensor(float(len(batch.target_label)), dtype=torch.float64, device=worker.device)]
        )
    if worker.world > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1].clamp(min=1))

"""Bare training steps of FuxiCTR's long-history models, on the rows that our loop trains on.

    pip install --target var/peers --no-deps fuxictr==2.3.10 polars polars-runtime-32 h5py keras_preprocessing
    make bench-train ARGS='--package var/peers'

pandas, scikit-learn, PyYAML and tqdm have to be there, too. A step is FuxiCTR's own `train_step` of its whole model:
its embedding table, attention, head, loss, clipping and Adam, with the defaults of its classes and embeddings of 64
(our width of a history). A batch is made as its loader makes one (a row a target, with its own copy of the history,
padding first, the newest event last, the target behind it), of items by id alone, on the device and before time is
taken: no loader, no copy to the device.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etl.warehouse.schemas import TRAIN
from training.data import Sequences

MODELS = ("DIN", "SIM", "ETA", "SDIM", "TWIN")
EMBEDDING = 64
WARM_STEPS, STEPS, ROWS = 3, 4, 3


def peer_figures(package: Path, sequences: Sequences, device: str, batches: Iterable[int]) -> list[dict[str, Any]]:
    """Return each model's samples a second with the best of these batch sizes, in an order from small to large.

    Products are TF32 on a GPU; FuxiCTR's loss refuses bf16. A size that finds no memory ends a model's sizes.

    Args:
        package: the folder that FuxiCTR was installed into.
    """
    sys.path.insert(0, str(package.absolute()))
    torch.use_deterministic_algorithms(False)  # a training on a CPU has asked for them
    torch.set_float32_matmul_precision("high")
    found = []
    for name in MODELS:
        rates: dict[int, float] = {}
        for size in batches:
            try:
                rates[size] = size / _seconds(_step(name, sequences, device, size), device)
            except torch.cuda.OutOfMemoryError:
                break
            finally:
                torch.cuda.empty_cache()
        best = max(rates, key=lambda size: rates[size])
        found.append({"model": name, "batch": best, "samples_per_s": rates[best], "by_batch": rates})
        tried = ", ".join(f"{size}: {rate:,.0f}" for size, rate in rates.items())
        print(f"peer {name:<6} {rates[best]:>12,.0f} samples/s (by batch: {tried})", flush=True)
    return found


def _step(name: str, sequences: Sequences, device: str, size: int) -> Callable[[], Any]:
    """Return what takes a step of a new model."""
    item_BM, mask_BL, label_B = peer_batch(sequences, size)
    features = importlib.import_module("fuxictr.features").FeatureMap("rows", "")
    items = 1 + int(max(sequences.history_item.max(), sequences.target_item.max()))
    features.features["item"] = {"type": "categorical", "source": "item", "vocab_size": 1 + items, "padding_idx": 0}
    features.labels, features.default_emb_dim = ["label"], EMBEDDING
    torch.manual_seed(0)
    common = {"verbose": 0, "model_root": "", "metrics": [], "optimizer": "adam", "loss": "binary_crossentropy"}
    model = getattr(importlib.import_module("model_zoo.LongCTR"), name)(
        features, embedding_dim=EMBEDDING, gpu=0 if device == "cuda" else -1, **common
    )
    model._max_gradient_norm, model._batch_index = 10.0, 0  # as its `fit` sets them
    model.train()
    ids = torch.from_numpy(item_BM.ravel()).to(device)
    mask, label = torch.from_numpy(mask_BL).to(device), torch.from_numpy(label_B).to(device)
    return lambda: model.train_step(({"label": label}, {"item": ids}, mask))


def peer_batch(sequences: Sequences, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw training targets; return a row for each.

    Returns:
        item_BM: int64 [B, L + 1], 1 + the item of each event that the target sees, the newest last, then its own; 0 for
            padding, which comes first; L of the longest. mask_BL: float32, 1 for events. label_B: float32.
    """
    train = np.flatnonzero(sequences.target_split == TRAIN)
    target_B = np.random.default_rng(0).choice(train, size, replace=len(train) < size)
    user_B = np.searchsorted(sequences.target_start, target_B, side="right") - 1
    seen_B = sequences.target_end[target_B].astype(np.int64)
    back_L = np.arange(int(seen_B.max()), 0, -1)
    mask_BL = back_L <= seen_B[:, None]
    place_BL = np.where(mask_BL, (sequences.history_start[user_B] + seen_B)[:, None] - back_L, 0)
    item_BL = np.where(mask_BL, sequences.history_item[place_BL] + 1, 0)
    item_BM = np.concatenate([item_BL, sequences.target_item[target_B, None] + 1], 1).astype(np.int64)
    return item_BM, mask_BL.astype(np.float32), sequences.target_label[target_B].astype(np.float32)


def _seconds(step: Callable[[], Any], device: str) -> float:
    """Return the time of a step, one after another, in the fastest of some rows of steps, after some to warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def row() -> float:
        wait()
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        return (time.perf_counter() - began) / STEPS

    for _ in range(WARM_STEPS):
        step()
    return min(row() for _ in range(ROWS))

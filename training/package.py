"""A model package: all that scoring needs, in one folder, without pickle.

config.json  model.safetensors  vocabulary.json  known_items.parquet  cutoff.json  example_request.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from etl.stage.errors import StageError
from etl.warehouse.partitions import MS_PER_DAY
from training.config import ModelConfig
from training.model.ranker import FieldSizes, Ranker
from training.vocabulary import IdField, Vocabulary


@dataclass(frozen=True)
class Cutoff:
    """What a target could see in training, so that a request is scored alike; see `etl.datasets.definition.History`.

    Attributes:
        max_events: None in packages from before it was kept: no bound.
    """

    kind: str = "event"
    availability_lag_ms: int = 0
    max_events: int | None = None

    @staticmethod
    def of_settings(settings: Mapping[str, Any]) -> Cutoff:
        """Return the rule by which a published partition of sequences was built: the settings of its manifest."""
        return Cutoff(str(settings["cutoff"]), int(settings["availability_lag_ms"]), int(settings["max_events"]))

    def of(self, target_time_ms: np.ndarray) -> np.ndarray:
        """Return the times before which an event has to lie, int64 [T]."""
        start = target_time_ms // MS_PER_DAY * MS_PER_DAY if self.kind == "day_start" else target_time_ms
        return start - self.availability_lag_ms


@torch.no_grad()
def inherit(model: Ranker, vocabulary: Vocabulary, older: Ranker, known: Vocabulary) -> None:
    """Give a model the weights of an older one (a warm start); every score is at first what the older model gives.

    What the older vocabulary shared (rare ids) or did not know (row 0) begins its own row as a copy of that one.

    Args:
        vocabulary: of the model; `known.appended(...)`.

    Raises:
        StageError: a weight has another shape, so the two are of different configurations.
    """
    came_from: dict[int, np.ndarray] = {}
    for table, name in zip(model.items.tables, vocabulary.items, strict=True):
        field, before = vocabulary.items[name], known.items[name]
        rows = np.zeros(field.rows, dtype=np.int64)
        rows[: before.rows] = np.arange(before.rows)
        if isinstance(field, IdField) and isinstance(before, IdField):
            rows[field.row] = before.row_of(field.ids)
        came_from[id(table.weight)] = rows
    names = {id(weight): name for name, weight in model.named_parameters()}
    rows_of = {names[key]: rows for key, rows in came_from.items()}
    old = older.state_dict()
    for name, weight in model.state_dict().items():
        before_ = old.get(name)
        if before_ is not None and before_.shape == weight.shape and name not in rows_of:
            weight.copy_(before_)
        elif (
            before_ is not None
            and weight.dim() == 2
            and before_.shape[1:] == weight.shape[1:]
            and len(before_) <= len(weight)
        ):
            origin = rows_of.get(name)
            if origin is None:  # user fields and contexts: what is new was row 0
                origin = np.where(np.arange(len(weight)) < len(before_), np.arange(len(weight)), 0)
            weight.copy_(before_[torch.from_numpy(origin)])
        else:
            raise StageError(
                f"a warm start does not fit: {name} is {tuple(weight.shape)}, in the older model"
                f" {tuple(before_.shape) if before_ is not None else 'missing'}",
                "train with the configuration of that model, or start cold",
            )


def save_package(folder: Path, model: Ranker, vocabulary: Vocabulary, cutoff: Cutoff, example_request: dict) -> None:
    """Write a package; an older one in the same folder is replaced file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=1))
    (folder / "cutoff.json").write_text(json.dumps(asdict(cutoff)))
    (folder / "example_request.json").write_text(json.dumps(example_request))
    vocabulary.save(folder)


def load_package(folder: Path) -> tuple[Ranker, Vocabulary, Cutoff]:
    """Read a package; the model comes back in evaluation mode.

    Raises:
        StageError: the folder holds none.
    """
    if not (folder / "model.safetensors").exists():
        raise StageError(
            f"{folder} holds no model package (model.safetensors is missing)",
            "train the model first, or give the package's folder",
        )
    raw = json.loads((folder / "config.json").read_text())
    settings: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    config = ModelConfig(**settings)
    vocabulary = Vocabulary.load(folder)
    model = Ranker(FieldSizes.of(vocabulary), config)
    model.load_state_dict(_named_as_now(load_file(folder / "model.safetensors")))
    return model.eval(), vocabulary, Cutoff(**json.loads((folder / "cutoff.json").read_text()))


def _named_as_now(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the weights as today.

    In older packages those of the interest have no prefix, and hashing is a part of its own.
    """
    before = re.compile(r"(?:hashed\.)?((?:to_key|to_query|log_scale_H|kernel|quantizer|planes_DXB|powers_B)\b)")
    return {
        before.sub(r"interest.\1", name) if before.match(name) else name: weight for name, weight in weights.items()
    }

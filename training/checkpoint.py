"""A model package: all that scoring needs, in one folder, without pickle.

config.json  model.safetensors  vocabulary.json  known_items.parquet  cutoff.json  example_request.json
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from etl.errors import StageError
from etl.partitions import MS_PER_DAY
from training.config import ModelConfig
from training.model.ranker import FieldSizes, Ranker
from training.vocabulary import Vocabulary


@dataclass(frozen=True)
class Cutoff:
    """What a target could see in training, so that a request is scored alike; see `etl.datasets.History`."""

    kind: str = "event"
    availability_lag_ms: int = 0

    def of(self, target_time_ms: np.ndarray) -> np.ndarray:
        """Return the times before which an event has to lie, int64 [T]."""
        start = target_time_ms // MS_PER_DAY * MS_PER_DAY if self.kind == "day_start" else target_time_ms
        return start - self.availability_lag_ms


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
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), vocabulary, Cutoff(**json.loads((folder / "cutoff.json").read_text()))

"""Every setting of a training run, typed; a configuration file is a function that returns one of these in full."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass, field

from etl.errors import StageError

INTERESTS = ("vql", "softmax_attention", "mean_pooling")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one ranker.

    Attributes:
        interest: how a history becomes an interest vector: `vql`, or a baseline (`softmax_attention`, `mean_pooling`).
        id_width: width of the item-id and author embeddings.
        field_width: width of the embeddings of small categorical fields.
        heads, head_width: attention heads and their width; D = heads * head_width.
        groups: groups of heads that share one assignment (divides `heads`).
        codes: codewords per group.
        kernel_components: exponentials in the temporal kernel, 0 = none.
        half_life_days: initial half-lives of the components, fast to slow.
        codebook_weight, commitment: lambda and beta of the quantization loss.
        mlp: hidden widths of the prediction head.
        dropout: in the head, and on the id embeddings (ids overfit first).
    """

    interest: str = "vql"
    id_width: int = 16
    field_width: int = 16
    heads: int = 4
    head_width: int = 16
    groups: int = 4
    codes: int = 64
    kernel_components: int = 2
    half_life_days: tuple[float, ...] = (2.0, 180.0)
    codebook_weight: float = 0.1
    commitment: float = 0.25
    mlp: tuple[int, ...] = (128, 64)
    dropout: float = 0.1

    @property
    def width(self) -> int:
        return self.heads * self.head_width


@dataclass(frozen=True)
class VocabularyConfig:
    """How ids become embedding rows.

    Attributes:
        min_occurrences: items (and authors) seen less often on training days share hashed rows.
        hashed_rows: number of shared rows of each id field.
    """

    min_occurrences: int = 5
    hashed_rows: int = 256


@dataclass(frozen=True)
class TrainConfig:
    """One training run of several models on the same rows.

    Attributes:
        models: name -> model; the first is the one that is registered.
        users_per_step: users in the batch of one step, all workers together: more workers do not change the batch.
        targets_per_user: targets of a user drawn each time he is visited.
        epochs: passes over the users, at most.
        patience: epochs without a better validation log loss before the early stop.
        validation_share: share of training targets held out for the early stop.
        warmup_steps: steps of unquantized attention before the codebooks start from k-means.
        revive_every_steps: how often codes without use are moved to keys of the batch.
        learning_rate, weight_decay, gradient_clip: AdamW; decay on embeddings only.
        seed: of weights, order and draws.
    """

    models: dict[str, ModelConfig] = field(default_factory=dict)
    vocabulary: VocabularyConfig = VocabularyConfig()
    users_per_step: int = 16
    targets_per_user: int = 64
    epochs: int = 6
    patience: int = 2
    validation_share: float = 0.05
    warmup_steps: int = 100
    revive_every_steps: int = 50
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    gradient_clip: float = 1.0
    seed: int = 7

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def load_config(name: str) -> TrainConfig:
    """Return the configuration of `training/configs/<name>.py`.

    Raises:
        StageError: there is none.
    """
    try:
        module = importlib.import_module(f"training.configs.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"training.configs.{name}":
            raise
        raise StageError(
            f"unknown training configuration {name!r}", "use the name of a file in training/configs/"
        ) from None
    return module.config()

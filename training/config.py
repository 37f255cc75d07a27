"""Every setting of a training run, typed; a configuration file is a function that returns one of these in full."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from etl.stage.errors import StageError


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one ranker.

    Attributes:
        interest: how a history becomes an interest vector: a name of `training.model.interests.INTERESTS`.
        id_width: width of the item-id and author embeddings.
        field_width: width of the embeddings of small categorical fields.
        heads, head_width: attention heads and their width; D = heads * head_width.
        groups: groups of heads that share one assignment (divides `heads`).
        codes: codewords per group; a tuple gives each group its own number (coarse and fine codebooks).
        kernel_components: exponentials in the temporal kernel, 0 = none.
        half_life_days: initial half-lives of the components, fast to slow.
        refine_k: events of the highest quantized logit that get their exact one, 0 = plain VQL.
        recent_window: newest events with exact keys, in the same softmax.
        search_k: events that the search of a two-stage kind hands to its attention, a head; other kinds have none.
        ema_decay: codewords as moving averages of their keys instead of by the codebook loss; None = by the loss.
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
    codes: int | tuple[int, ...] = 64
    kernel_components: int = 2
    half_life_days: tuple[float, ...] = (2.0, 180.0)
    refine_k: int = 0
    recent_window: int = 0
    search_k: int = 0
    ema_decay: float | None = None
    codebook_weight: float = 0.1
    commitment: float = 0.25
    mlp: tuple[int, ...] = (128, 64)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        from training.model.interests import interest_class  # the kinds are built from this class

        interest_class(self.interest).check(self)
        if self.heads % self.groups:
            raise StageError(f"{self.groups} groups do not divide {self.heads} heads", "choose groups that do")
        if isinstance(self.codes, tuple) and len(self.codes) != self.groups:
            raise StageError(
                f"{len(self.codes)} codebook sizes for {self.groups} groups",
                "give one number for all groups or one for each",
            )

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
        users_per_step: users visited in one step, all workers together: more workers do not change the batch.
        targets_per_visit: targets of a user in one visit at most; who has more is visited several times in an epoch.
        epochs: at most so many; an epoch has every training target once, or several times where there would be fewer
            steps than `min_epoch_steps`.
        max_epoch_steps: an epoch ends after so many steps, whatever targets it has not had: for a first look.
        patience: epochs without a better validation log loss before the early stop.
        validation_share: share of training targets held out for the early stop where they are all of one day; else
            it is the last training day.
        warmup_steps: steps of unquantized attention before the codebooks start from k-means; at most half of the steps
            of all epochs.
        revive_every_steps: how often codes without use are moved to keys of the batch.
        learning_rate, weight_decay, gradient_clip: AdamW; decay on embeddings only.
        table_learning_rate: tables of ids (items, authors) are moved by row-wise Adagrad, at this rate in place of
            `learning_rate` and by the same schedule, and only in rows that a step read; None: by AdamW, in all rows.
        sharded_from_rows: tables of ids of at least so many rows are dealt out over the workers, each of which has some
            rows with the optimizer's state of these; None: every worker has whole tables. Decides no weight.
        learning_rate_warmup_steps: the rate rises linearly over so many steps, at most half of the steps of all epochs,
            then falls by a cosine until the last one.
        learning_rate_end: share of the rate that is left there; 1 = it does not fall.
        seed: of weights, order and parts.
        bf16: matrix products in bfloat16 (autocast); loss, softmax, code search and codebooks stay in fp32.
        compiled: torch.compile the attention over all users and the head.
        deterministic: only algorithms that give the same bits every time, on a GPU too (a CPU always has them); slower.
        checkpoint_every_steps, checkpoint_every_seconds: a checkpoint is written after so many steps or seconds,
            whichever comes first.
        auc_seed_sd: standard deviation of the first model's evaluation AUC between trainings that differ by their seed
            alone, measured; the promotion gate's margin follows from it. None: not measured.
    """

    models: dict[str, ModelConfig] = field(default_factory=dict)
    vocabulary: VocabularyConfig = VocabularyConfig()
    users_per_step: int = 4
    targets_per_visit: int = 128
    epochs: int = 1
    min_epoch_steps: int = 300
    max_epoch_steps: int | None = None
    patience: int = 2
    validation_share: float = 0.05
    warmup_steps: int = 300
    revive_every_steps: int = 50
    learning_rate: float = 3e-3
    table_learning_rate: float | None = None
    sharded_from_rows: int | None = None
    learning_rate_warmup_steps: int = 50
    learning_rate_end: float = 0.0
    weight_decay: float = 1e-2
    gradient_clip: float = 1.0
    seed: int = 7
    bf16: bool = False
    compiled: bool = False
    deterministic: bool = False
    checkpoint_every_steps: int = 10_000
    checkpoint_every_seconds: float = 30.0
    auc_seed_sd: float | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.deciding, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide the weights, as nested dicts."""
        others = ("sharded_from_rows", "checkpoint_every_steps", "checkpoint_every_seconds", "auc_seed_sd")
        return {name: value for name, value in asdict(self).items() if name not in others}


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

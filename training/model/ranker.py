"""The click-through-rate model, top to bottom: embed items, make values, ask for the interest, predict.

What turns a history into an interest is a kind of its own (training/model/interests/); embeddings, values and head are
the same for all kinds, so that they can be compared. The equations and their reasons: docs/method.md#embedding and the
sections behind it.

Legend: N distinct items of the batch, E events (flat), T targets (flat), H heads, d head width, D = H * d,
S width of an item's static embedding.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etl.stage.errors import StageError
from etl.warehouse.schemas import WATCH_BUCKETS
from training.config import ModelConfig
from training.data import FEEDBACK_BITS, INTERACTIONS, Batch
from training.model.cache import UserCache
from training.model.fused_rows import Places, embedded, embedded_in_part, gathered, gathered_exactly
from training.model.history import Events, Items, Targets, begin_of_users
from training.model.interests import interest_class
from training.model.interests.interface import Coded
from training.model.kernel import age_days
from training.model.probe import AttentionErrors
from training.vocabulary import ItemFeatures, Vocabulary


@dataclass(frozen=True)
class FieldSizes:
    """Kind and rows of every embedding table; all that a model needs to know of a vocabulary.

    Attributes:
        items: (kind, rows) of each item field, `item_id` first.
    """

    items: tuple[tuple[str, int], ...]
    user_fields: tuple[int, ...]
    contexts: int

    @staticmethod
    def of(vocabulary: Vocabulary) -> FieldSizes:
        return FieldSizes(
            items=tuple((field.kind, field.rows) for field in vocabulary.items.values()),
            user_fields=tuple(field.rows for field in vocabulary.user_fields),
            contexts=1 + len(vocabulary.contexts),
        )


class ItemEncoder(nn.Module):
    """Static fields of an item -> one vector, [N, S]. Ids get `id_width` (and dropout: they overfit first)."""

    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__()
        field = config.field_width
        widths = {"id": config.id_width, "categories": field, "number": field // 2, "category": field // 4}
        self.kinds = [kind for kind, _ in sizes.items]
        self.tables = nn.ModuleList(
            _embedding(rows, widths[kind], padding_idx=0 if kind == "categories" else None)
            for kind, rows in sizes.items
        )
        self.width = sum(widths[kind] for kind in self.kinds)
        self.id_dropout = nn.Dropout(config.dropout)

    def forward(self, items: ItemFeatures) -> Tensor:
        parts = []
        fields = zip(self.kinds, self.tables, items.rows.items(), items.places, strict=True)
        for kind, table, (name, rows), places in fields:
            if name in items.vectors:
                part = items.vectors[name]
            elif isinstance(table, nn.Embedding) and table.sparse:
                part = embedded_in_part(table, rows)
            elif kind != "categories":
                part = gathered_exactly(table.get_parameter("weight"), places)
            else:
                part = embedded(table, places, rows.shape)
                part = part.sum(1) / (rows > 0).sum(1, keepdim=True).clamp(min=1)
            parts.append(self.id_dropout(part) if kind == "id" else part)
        return torch.cat(parts, -1)

    def of_ids(self) -> list[nn.Embedding]:
        """Return the tables whose rows are ids."""
        tables = zip(self.kinds, self.tables, strict=True)
        return [table for kind, table in tables if kind == "id" and isinstance(table, nn.Embedding)]


class InteractionEncoder(nn.Module):
    """What the user did with the item -> its part of a value; one row for each (feedback, watch bucket) pair."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.feedback = nn.Linear(FEEDBACK_BITS, config.field_width)
        self.watch = _embedding(WATCH_BUCKETS, config.field_width)
        self.to_value = nn.Linear(config.field_width, config.width)
        pairs = torch.arange(INTERACTIONS)
        bits = (pairs // WATCH_BUCKETS)[:, None] >> torch.arange(FEEDBACK_BITS)[None, :] & 1
        self.register_buffer("bits", bits.float(), persistent=False)
        self.register_buffer("bucket", pairs % WATCH_BUCKETS, persistent=False)

    def table(self) -> Tensor:
        """Return the values' parts of all pairs, [INTERACTIONS, D]."""
        watch = gathered_exactly(self.watch.weight, Places(self.get_buffer("bucket")))
        return self.to_value(F.relu(self.feedback(self.bits) + watch))


class Ranker(nn.Module):
    """One kind of interest between the embeddings and the head that all kinds share."""

    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.items = ItemEncoder(sizes, config)
        self.interactions = InteractionEncoder(config)
        self.to_value = nn.Linear(self.items.width, config.width)
        self.to_target = nn.Linear(self.items.width, config.width)
        self.interest = interest_class(config.interest)(config, self.items.width)
        self.user_fields = nn.ModuleList(_embedding(rows, config.field_width // 4) for rows in sizes.user_fields)
        self.context = _embedding(sizes.contexts, config.field_width // 2)
        widths = [
            3 * config.width + len(sizes.user_fields) * (config.field_width // 4) + config.field_width // 2 + 2,
            *config.mlp,
        ]
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(config.dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    @property
    def coded(self) -> Coded | None:
        """The interest, if its kind has codebooks."""
        return self.interest if isinstance(self.interest, Coded) else None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits float [T] and the interest's own loss, weighted (0 for kinds without one)."""
        items, events = self._read(batch)
        targets = _targets(batch)
        if self.training:
            targets = replace(targets, label_T=batch.target_label)
        interest_THd, auxiliary = self.interest(items, events, targets)
        return self.predict(interest_THd, items, targets, batch), auxiliary

    def compile(self) -> None:  # type: ignore[override]
        """Let torch.compile build the pass over all users and the head; what depends on a batch's lists stays eager."""
        self.interest.compile_pass()
        self.head.compile(dynamic=True)

    def predict(self, interest_THd: Tensor, items: Items, targets: Targets, batch: Batch) -> Tensor:
        """Head: interest, target, their product, user fields and request context -> logit [T]."""
        interest = interest_THd.flatten(1)
        target = gathered(self.to_target(items.static_NS), targets.by_item)
        context = gathered_exactly(self.context.weight, Places(batch.target_context))
        fields = [
            embedded(table, Places(rows), rows.shape)
            for table, rows in zip(self.user_fields, batch.user_rows.unbind(1), strict=True)
        ]
        parts = [interest, target, interest * target, *fields, context, _recency(batch)]
        return self.head(torch.cat(parts, -1)).squeeze(-1)

    @torch.no_grad()
    def user_caches(self, batch: Batch, reference_time_ms: int) -> list[UserCache]:
        """Return the cache of every user, each over the user's events of the batch but the exact recent window.

        That is what a target at their end sees, if the batch holds no other target of the user.

        Raises:
            StageError: the interest has no codebooks.
        """
        return self._needs_codes().user_caches(*self._read(batch), reference_time_ms)

    @torch.no_grad()
    def score_with_caches(self, batch: Batch, caches: list[UserCache]) -> Tensor:
        """Return logits [T] from caches: plain VQL reads no event, and no history's length costs anything.

        With an exact recent window or refined codes the batch's events are opened where these need them.

        Raises:
            StageError: the interest has no codebooks.
        """
        items = self._items(batch)
        coded, targets = self._needs_codes(), _targets(batch)
        interest_THd = coded.from_caches(items, targets, caches, lambda: self._events(items, batch))
        return self.predict(interest_THd, items, targets, batch)

    @torch.no_grad()
    def probe(self, batch: Batch) -> list[tuple[int, AttentionErrors]]:
        """Return (events, errors) of each user's last target: quantized attention against exact, and the bound.

        Raises:
            StageError: the interest has no codebooks.
        """
        return self._needs_codes().probe(*self._read(batch), _targets(batch))

    def _needs_codes(self) -> Coded:
        if self.coded is None:
            raise StageError(
                f"a model of interest {self.config.interest!r} has no codebooks", "use one that has, such as vql"
            )
        return self.coded

    def _read(self, batch: Batch) -> tuple[Items, Events]:
        items = self._items(batch)
        return items, self._events(items, batch)

    def _items(self, batch: Batch) -> Items:
        rows = batch.items.rows
        return Items(self.items(batch.items), rows, dict(zip(rows, self.items.kinds, strict=True)))

    def _events(self, items: Items, batch: Batch) -> Events:
        """Values are the item's part and what the user did with it: each made once a distinct item or interaction."""
        value_NHd, interaction_IHd = self._heads(self.to_value(items.static_NS)), self._heads(self.interactions.table())
        by_item = Places(batch.event_item)
        value_EHd = gathered(value_NHd, by_item, interaction_IHd, Places(batch.event_interaction))
        events = Events(batch.event_item, value_EHd, batch.event_time_ms, batch.event_start, by_item)
        if (padding := batch.padding) is None:
            return events
        return replace(events, weight_E=padding.event_weight, work=padding.work, codes=padding.codes)

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(*flat.shape[:-1], self.config.heads, self.config.head_width)


def _targets(batch: Batch) -> Targets:
    return Targets(
        item_T=batch.target_item,
        time_ms_T=batch.target_time_ms,
        first_T=batch.target_first,
        end_T=batch.target_end,
        start=batch.target_start,
        cut_offs=batch.cut_offs,
        shared_from=batch.shared_from,
    )


def _recency(batch: Batch) -> Tensor:
    """log(1 + visible events) and log(1 + days since the last visible event), [T, 2]."""
    if batch.padding is None:
        begin_T = begin_of_users(batch.event_start, batch.target_start, batch.target_end.device)
    else:
        begin_T = batch.padding.event_begin
    last = (begin_T + batch.target_end - 1).clamp(min=0)
    last_ms = batch.event_time_ms[last] if len(batch.event_time_ms) else batch.target_time_ms
    visible = batch.target_end - batch.target_first
    gap = torch.where(visible > 0, age_days(batch.target_time_ms, last_ms), torch.full_like(batch.target_label, 30.0))
    return torch.stack([torch.log1p(visible.float()) / 8, torch.log1p(gap)], -1)


def _embedding(rows: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    table = nn.Embedding(rows, width, padding_idx=padding_idx)
    nn.init.normal_(table.weight, std=0.1)
    if padding_idx is not None:
        with torch.no_grad():
            table.weight[padding_idx].zero_()
    return table

"""The click-through-rate model, top to bottom: embed items, make keys and values, attend over the history, predict.

Legend: N distinct items of the batch, E events (flat), T targets (flat), H heads, d head width, D = H * d,
S width of an item's static embedding, G groups, C codes.

Keys are made of static item fields only, so a key, and its code, is a property of the item: each distinct item is
projected and searched once per step, never once per event. Values add what the user did (feedback, watch time).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etl.schemas import WATCH_BUCKETS
from training.config import ModelConfig
from training.data import FEEDBACK_BITS, INTERACTIONS, Batch
from training.model.attention import UserCache, build_cache, cache_attention, event_attention, mean_pooling
from training.model.kernel import MixtureKernel, age_days
from training.model.quantizer import GroupedQuantizer
from training.vocabulary import ItemFeatures, Vocabulary

MAX_LOG_SCALE = math.log(4.0)  # the theorem's bound grows with the logit scale: capped


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
            _embedding(rows, widths[kind], padding_idx=0 if kind == "categories" else None) for kind, rows in sizes.items
        )
        self.width = sum(widths[kind] for kind in self.kinds)
        self.id_dropout = nn.Dropout(config.dropout)

    def forward(self, items: ItemFeatures) -> Tensor:
        parts = []
        for kind, table, rows in zip(self.kinds, self.tables, items.rows.values(), strict=True):
            part = table(rows)
            if kind == "categories":
                part = part.sum(1) / (rows > 0).sum(1, keepdim=True).clamp(min=1)
            parts.append(self.id_dropout(part) if kind == "id" else part)
        return torch.cat(parts, -1)


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
        return self.to_value(F.relu(self.feedback(self.bits) + self.watch(self.bucket)))


class Ranker(nn.Module):
    """VQL, or a baseline with the same embeddings and the same head."""

    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.items = ItemEncoder(sizes, config)
        self.interactions = InteractionEncoder(config)
        self.to_value = nn.Linear(self.items.width, config.width)
        self.to_target = nn.Linear(self.items.width, config.width)
        self.quantizer: GroupedQuantizer | None = None
        self.kernel: MixtureKernel | None = None
        if config.interest != "mean_pooling":
            self.to_key = nn.Linear(self.items.width, config.width, bias=False)
            self.to_query = nn.Linear(self.items.width, config.width, bias=False)
            self.log_scale_H = nn.Parameter(torch.zeros(config.heads))
            if config.kernel_components:
                self.kernel = MixtureKernel(config.heads, config.half_life_days[: config.kernel_components])
        if config.interest == "vql":
            self.quantizer = GroupedQuantizer(config.groups, config.codes, config.width // config.groups)
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

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits float [T] and the weighted quantization loss (0 for baselines and during warm-up)."""
        static_NS = self.items(batch.items)
        value_NHd = self._heads(self.to_value(static_NS))
        interaction_IHd = self._heads(self.interactions.table())
        value_EHd = value_NHd[batch.event_item] + interaction_IHd[batch.event_interaction]
        auxiliary = static_NS.new_zeros(())
        key_NHd: Tensor | None = None
        query_THd: Tensor | None = None
        if self.config.interest != "mean_pooling":
            key_NHd = self.keys(static_NS)
            query_THd = self.queries(static_NS)[batch.target_item]
            if self.quantizer is not None:
                key_NHd, auxiliary = self._quantize(key_NHd, batch)
        interest_THd = []
        for user in range(len(batch.event_start) - 1):
            events = slice(batch.event_start[user], batch.event_start[user + 1])
            targets = slice(batch.target_start[user], batch.target_start[user + 1])
            end_T, value_LHd = batch.target_end[targets], value_EHd[events]
            if key_NHd is None or query_THd is None:
                interest_THd.append(mean_pooling(value_LHd, end_T))
            else:
                interest_THd.append(
                    event_attention(
                        query_THd[targets],
                        key_NHd[batch.event_item[events]],
                        value_LHd,
                        batch.event_time_ms[events],
                        batch.target_time_ms[targets],
                        end_T,
                        self.kernel,
                    )
                )
        return self.predict(torch.cat(interest_THd), static_NS, batch), auxiliary

    def keys(self, static_NS: Tensor) -> Tensor:
        """Keys [N, H, d]: LayerNorm without gain per head, times d^-1/4, so that logits are bounded by sqrt(d)."""
        return self._normalised(self.to_key(static_NS))

    def queries(self, static_NS: Tensor) -> Tensor:
        """Queries [N, H, d], normalised as keys, times a learned and capped scale per head."""
        return self._normalised(self.to_query(static_NS)) * self.log_scale_H.clamp(max=MAX_LOG_SCALE).exp()[:, None]

    def codebook_HCd(self) -> Tensor:
        """Each head's slice of its group's codewords."""
        assert self.quantizer is not None
        config = self.config
        words = self.quantizer.codebook_GCw.view(
            config.groups, config.codes, config.heads // config.groups, config.head_width
        )
        return words.transpose(1, 2).reshape(config.heads, config.codes, config.head_width)

    def predict(self, interest_THd: Tensor, static_NS: Tensor, batch: Batch) -> Tensor:
        """Head: interest, target, their product, user fields and request context -> logit [T]."""
        interest = interest_THd.flatten(1)
        target = self.to_target(static_NS)[batch.target_item]
        fields = [table(batch.user_rows[:, column]) for column, table in enumerate(self.user_fields)]
        parts = [interest, target, interest * target, *fields, self.context(batch.target_context), self._recency(batch)]
        return self.head(torch.cat(parts, -1)).squeeze(-1)

    @torch.no_grad()
    def user_caches(self, batch: Batch, reference_time_ms: int) -> list[UserCache]:
        """Return the cache of every user of the batch (VQL only), each over all his events in the batch."""
        assert self.quantizer is not None
        static_NS = self.items(batch.items)
        codes_NG = self.quantizer.search(self.keys(static_NS))
        value_NHd, interaction_IHd = self._heads(self.to_value(static_NS)), self._heads(self.interactions.table())
        caches = []
        for first, last in zip(batch.event_start, batch.event_start[1:], strict=False):
            item = batch.event_item[first:last]
            value_LHd = value_NHd[item] + interaction_IHd[batch.event_interaction[first:last]]
            caches.append(
                build_cache(
                    codes_NG[item],
                    value_LHd,
                    batch.event_time_ms[first:last],
                    reference_time_ms,
                    self.config.codes,
                    self.kernel,
                )
            )
        return caches

    @torch.no_grad()
    def score_with_caches(self, batch: Batch, caches: list[UserCache]) -> Tensor:
        """Return logits [T] from caches instead of events: the cost does not depend on the history's length."""
        static_NS = self.items(batch.items)
        query_THd, codebook_HCd = self.queries(static_NS)[batch.target_item], self.codebook_HCd()
        interest_THd = []
        for user, cache in enumerate(caches):
            targets = slice(batch.target_start[user], batch.target_start[user + 1])
            interest_THd.append(
                cache_attention(query_THd[targets], codebook_HCd, cache, batch.target_time_ms[targets], self.kernel)
            )
        return self.predict(torch.cat(interest_THd), static_NS, batch)

    def _quantize(self, key_NHd: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self.quantizer is not None
        if not bool(self.quantizer.started):
            # Warm-up: exact keys; the codebooks stay in the graph so that data-parallel workers agree on what has a gradient.
            return key_NHd, 0.0 * self.quantizer.codebook_GCw.sum()
        if not self.training:
            return self.quantizer.quantized(self.quantizer.search(key_NHd), key_NHd), key_NHd.new_zeros(())
        weight_N = torch.bincount(batch.event_item, minlength=key_NHd.shape[0])
        hard_NHd, loss, _ = self.quantizer(key_NHd, weight_N, self.config.commitment)
        return hard_NHd, self.config.codebook_weight * loss

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(*flat.shape[:-1], self.config.heads, self.config.head_width)

    def _normalised(self, flat: Tensor) -> Tensor:
        width = self.config.head_width
        return F.layer_norm(self._heads(flat), (width,)) * width**-0.25

    def _recency(self, batch: Batch) -> Tensor:
        """log(1 + visible events) and log(1 + days since the last visible event), [T, 2]."""
        starts = torch.tensor(batch.event_start[:-1], device=batch.target_end.device)
        counts = torch.tensor(batch.target_start, device=batch.target_end.device).diff()
        last = (starts.repeat_interleave(counts) + batch.target_end - 1).clamp(min=0)
        last_ms = batch.event_time_ms[last] if len(batch.event_time_ms) else batch.target_time_ms
        gap = torch.where(
            batch.target_end > 0, age_days(batch.target_time_ms, last_ms), torch.full_like(batch.target_label, 30.0)
        )
        return torch.stack([torch.log1p(batch.target_end.float()) / 8, torch.log1p(gap)], -1)


def _embedding(rows: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    table = nn.Embedding(rows, width, padding_idx=padding_idx)
    nn.init.normal_(table.weight, std=0.1)
    if padding_idx is not None:
        with torch.no_grad():
            table.weight[padding_idx].zero_()
    return table

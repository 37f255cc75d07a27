"""The click-through-rate model, top to bottom: embed items, make keys and values, attend over the history, predict.

Legend: N distinct items of the batch, E events (flat), T targets (flat), H heads, d head width, D = H * d,
S width of an item's static embedding, G groups, C codes.

Keys are made of static item fields only, so a key, and its code, is a property of the item: each distinct item is
projected and searched once per step, never once per event. Values add what the user did (feedback, watch time).
The equations and their reasons: docs/method.md#embedding and the sections behind it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etl.warehouse.schemas import WATCH_BUCKETS
from training.config import ModelConfig
from training.data import FEEDBACK_BITS, INTERACTIONS, Batch
from training.model.attention import cache_part, combine, event_attention, event_part, mean_pooling, window_part
from training.model.blocks import Layout, block_attention
from training.model.cache import UserCache, build_cache
from training.model.factored import bounded_factored_attention, factored_attention, prefers_factored
from training.model.kernel import MixtureKernel, age_days
from training.model.probe import AttentionErrors, attention_errors
from training.model.quantizer import GroupedQuantizer
from training.model.refined import index_events, refined_cache_part, refined_event_part
from training.model.sdim import HashedAttention
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


class _Keys(NamedTuple):
    """Keys of the N items: exact, at their codewords (straight-through), and their codes (None: not quantized)."""

    exact_NHd: Tensor
    hard_NHd: Tensor
    codes_NG: Tensor | None


class _User(NamedTuple):
    """One user's part of a batch."""

    events: slice
    targets: slice
    cut_offs: int
    shared_from: int


def _for_each_layout(attend: Callable[[Layout], Tensor], batch: Batch, value_EHd: Tensor) -> Tensor:
    return torch.cat([attend(layout) for layout in Layout.of(batch.event_start, batch.target_start, value_EHd.device)])


def _users(batch: Batch) -> list[_User]:
    events = [slice(a, b) for a, b in itertools.pairwise(batch.event_start)]
    targets = [slice(a, b) for a, b in itertools.pairwise(batch.target_start)]
    return [_User(*parts) for parts in zip(events, targets, batch.cut_offs, batch.shared_from, strict=True)]


def _first_of(user: _User, batch: Batch) -> Tensor | None:
    """The first event that each target of a user sees; None where all see his events from the beginning."""
    return batch.target_first[user.targets] if user.shared_from else None


class Ranker(nn.Module):
    """VQL, or a baseline with the same embeddings and the same head."""

    def __init__(self, sizes: FieldSizes, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.block_attention = block_attention
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
            self.quantizer = GroupedQuantizer(config.groups, config.codes, config.width // config.groups, config.ema_decay)
        if config.interest == "sdim":
            self.hashed = HashedAttention(config.width)
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
        value_EHd = self._values(static_NS, batch)
        if self.config.interest == "mean_pooling":
            interest_THd, auxiliary = self._mean(value_EHd, batch), static_NS.new_zeros(())
        else:
            keys, auxiliary = self._keys_of(static_NS, batch)
            query_THd = self.queries(static_NS)[batch.target_item]
            if self._all_users_at_once(value_EHd):
                interest_THd = self._attend_all(batch, query_THd, keys, value_EHd)
            else:
                parts = [self._attend(u, batch, query_THd[u.targets], keys, value_EHd[u.events]) for u in _users(batch)]
                interest_THd = torch.cat(parts)
        return self.predict(interest_THd, static_NS, batch), auxiliary

    def compile(self) -> None:  # type: ignore[override]
        """Let torch.compile build the pass over all users and the head; what depends on the batch's lists stays eager."""
        self.block_attention = torch.compile(block_attention, dynamic=True)
        self.head.compile(dynamic=True)

    def _all_users_at_once(self, value_EHd: Tensor) -> bool:
        """A CPU works through one user after another in its caches; a GPU, or compiled code, would wait for the launches."""
        return value_EHd.device.type != "cpu" or self.block_attention is not block_attention

    def _attend_all(self, batch: Batch, query_THd: Tensor, keys: _Keys, value_EHd: Tensor) -> Tensor:
        """Return the interests of all users' targets, [T, H, d], in one pass; equal to `_attend` of each user."""
        config, item_E, end_T = self.config, batch.event_item, batch.target_end
        first_T = batch.target_first if any(batch.shared_from) else None
        if config.interest == "sdim":
            signature_NX = self.hashed.signatures(keys.exact_NHd)
            attend = functools.partial(self.hashed.pooled, target_TX=signature_NX[batch.target_item], event_EX=signature_NX[item_E], value_EHd=value_EHd, target_end_T=end_T, first_T=first_T)
            return _for_each_layout(attend, batch, value_EHd)
        exact_EHd = keys.exact_NHd.index_select(0, item_E)
        key_EHd = exact_EHd
        more: dict[str, Any] = {"first_T": first_T}
        recent_T = (end_T - config.recent_window).clamp(min=0)
        if config.interest == "recent_attention":
            more = {"first_T": recent_T if first_T is None else torch.maximum(recent_T, first_T)}
        elif keys.codes_NG is not None:
            key_EHd = keys.hard_NHd.index_select(0, item_E)
            if config.recent_window or config.refine_k:
                more |= {"exact_EHd": exact_EHd, "exact_from_T": recent_T, "refine": config.refine_k}
        return _for_each_layout(
            lambda layout: self.block_attention(
                layout, query_THd, key_EHd, value_EHd, batch.event_time_ms, batch.target_time_ms, end_T, self.kernel, **more
            ),
            batch,
            value_EHd,
        )

    def _mean(self, value_EHd: Tensor, batch: Batch) -> Tensor:
        """Return the means of the visible values, [T, H, d]; for a GPU they are attention with equal logits."""
        if not self._all_users_at_once(value_EHd):
            return torch.cat([mean_pooling(value_EHd[u.events], batch.target_end[u.targets], _first_of(u, batch)) for u in _users(batch)])
        nothing_THd = value_EHd.new_zeros(len(batch.target_end), *value_EHd.shape[1:])
        times = batch.event_time_ms, batch.target_time_ms
        first_T = batch.target_first if any(batch.shared_from) else None
        return _for_each_layout(
            lambda layout: self.block_attention(layout, nothing_THd, value_EHd, value_EHd, *times, batch.target_end, None, first_T=first_T), batch, value_EHd
        )

    def _attend(self, user: _User, batch: Batch, query_THd: Tensor, keys: _Keys, value_LHd: Tensor) -> Tensor:
        """Return the interest of one user's targets, [T, H, d]: attention over his events, whatever form is the cheapest."""
        config, item_L, end_T = self.config, batch.event_item[user.events], batch.target_end[user.targets]
        times = batch.event_time_ms[user.events], batch.target_time_ms[user.targets]
        first_T = _first_of(user, batch)
        if config.interest == "sdim":
            signature_NX = self.hashed.signatures(keys.exact_NHd)
            return self.hashed(signature_NX[batch.target_item[user.targets]], signature_NX[item_L], value_LHd, end_T, first_T)
        if config.interest == "recent_attention":
            key_LHd = keys.exact_NHd[item_L]
            return window_part(query_THd, key_LHd, value_LHd, *times, end_T, self.kernel, config.recent_window, first_T).out_THd
        if keys.codes_NG is None:
            return event_attention(query_THd, keys.exact_NHd[item_L], value_LHd, *times, end_T, self.kernel, first_T)
        tail_T = (end_T - config.recent_window).clamp(min=0)  # the newest events have exact keys
        if config.refine_k:
            tail = refined_event_part(
                query_THd, keys.exact_NHd[item_L], self.codebook_HCd(), keys.codes_NG[item_L], value_LHd, *times, tail_T, self.kernel, config.refine_k, first_T
            )  # fmt: skip
        elif prefers_factored(len(item_L) - user.shared_from, len(end_T), user.cut_offs, self.kernel is not None):
            events = (query_THd, keys.exact_NHd[item_L], self.codebook_HCd(), keys.codes_NG[item_L], value_LHd, *times, tail_T, self.kernel)
            tail = factored_attention(*events) if first_T is None else bounded_factored_attention(*events, first_T, user.shared_from)
        elif config.recent_window:
            tail = event_part(query_THd, keys.hard_NHd[item_L], value_LHd, *times, tail_T, self.kernel, first_T)
        else:
            return event_attention(query_THd, keys.hard_NHd[item_L], value_LHd, *times, end_T, self.kernel, first_T)
        if not config.recent_window:
            return tail.out_THd
        head = window_part(query_THd, keys.exact_NHd[item_L], value_LHd, *times, end_T, self.kernel, config.recent_window, first_T)
        return combine(head, tail).out_THd

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
            config.groups, -1, config.heads // config.groups, config.head_width
        )
        return words.transpose(1, 2).reshape(config.heads, -1, config.head_width)

    def predict(self, interest_THd: Tensor, static_NS: Tensor, batch: Batch) -> Tensor:
        """Head: interest, target, their product, user fields and request context -> logit [T]."""
        interest = interest_THd.flatten(1)
        target = self.to_target(static_NS)[batch.target_item]
        fields = [table(batch.user_rows[:, column]) for column, table in enumerate(self.user_fields)]
        parts = [interest, target, interest * target, *fields, self.context(batch.target_context), self._recency(batch)]
        return self.head(torch.cat(parts, -1)).squeeze(-1)

    @torch.no_grad()
    def user_caches(self, batch: Batch, reference_time_ms: int) -> list[UserCache]:
        """Return the cache of every user of the batch (VQL only), each over all his events of the batch but the exact recent window.

        That is what a target at their end sees, if the batch holds no other target of the user.
        """
        assert self.quantizer is not None
        static_NS = self.items(batch.items)
        codes_NG, value_EHd = self.quantizer.search(self.keys(static_NS)), self._values(static_NS, batch)
        caches = []
        for user in _users(batch):
            old = slice(user.events.start, max(user.events.start, user.events.stop - self.config.recent_window))
            codes_LG, times = codes_NG[batch.event_item[old]], batch.event_time_ms[old]
            caches.append(build_cache(codes_LG, value_EHd[old], times, reference_time_ms, self.quantizer.codes, self.kernel))
        return caches

    @torch.no_grad()
    def score_with_caches(self, batch: Batch, caches: list[UserCache]) -> Tensor:
        """Return logits [T] from caches: plain VQL reads no event, and the cost does not depend on the history's length.

        With an exact recent window or refined codes the batch's events are opened where these need them.
        """
        assert self.quantizer is not None
        static_NS, codebook_HCd, config = self.items(batch.items), self.codebook_HCd(), self.config
        query_EHd = self.queries(static_NS)
        opened = bool(config.refine_k or config.recent_window)
        key_NHd = self.keys(static_NS)
        codes_NG = self.quantizer.search(key_NHd)
        value_EHd = self._values(static_NS, batch) if opened else key_NHd
        interest_THd = []
        for user, cache in zip(_users(batch), caches, strict=True):
            query_THd = query_EHd[batch.target_item[user.targets]]
            target_ms = batch.target_time_ms[user.targets]
            split = max(user.events.start, user.events.stop - config.recent_window)
            old, new = slice(user.events.start, split), slice(split, user.events.stop)
            if config.refine_k:
                item_L = batch.event_item[old]
                index = index_events(codes_NG[item_L], self.quantizer.codes)
                part = refined_cache_part(
                    query_THd, codebook_HCd, cache, index, key_NHd[item_L], value_EHd[old], batch.event_time_ms[old], target_ms, self.kernel, config.refine_k
                )  # fmt: skip
            else:
                part = cache_part(query_THd, codebook_HCd, cache, target_ms, self.kernel)
            if config.recent_window:
                ends = torch.full_like(target_ms, new.stop - new.start)
                recent = window_part(
                    query_THd, key_NHd[batch.event_item[new]], value_EHd[new], batch.event_time_ms[new], target_ms, ends, self.kernel, config.recent_window
                )  # fmt: skip
                part = combine(recent, part)
            interest_THd.append(part.out_THd)
        return self.predict(torch.cat(interest_THd), static_NS, batch)

    @torch.no_grad()
    def probe(self, batch: Batch) -> list[tuple[int, AttentionErrors]]:
        """Return (events, errors) of each user's last target: quantized attention against exact, beside the bound (VQL only)."""
        assert self.quantizer is not None
        static_NS = self.items(batch.items)
        key_NHd, query_NHd = self.keys(static_NS), self.queries(static_NS)
        hard_NHd = self.quantizer.quantized(self.quantizer.search(key_NHd), key_NHd)
        found = []
        for user in _users(batch):
            last = user.targets.stop - 1
            first, end = (int(batch.target_first[last]), int(batch.target_end[last])) if user.targets.stop > user.targets.start else (0, 0)
            if end == first:
                continue
            events = slice(user.events.start + first, user.events.start + end)
            item_L = batch.event_item[events]
            bias = None if self.kernel is None else self.kernel.log_kernel(batch.target_time_ms[last : last + 1, None], batch.event_time_ms[events])
            query_THd = query_NHd[batch.target_item[last : last + 1]]
            found.append((end - first, attention_errors(query_THd, key_NHd[item_L], hard_NHd[item_L], bias)))
        return found

    def _values(self, static_NS: Tensor, batch: Batch) -> Tensor:
        """Values [E, H, d]: the item's part and what the user did with it."""
        value_NHd, interaction_IHd = self._heads(self.to_value(static_NS)), self._heads(self.interactions.table())
        return value_NHd.index_select(0, batch.event_item) + interaction_IHd.index_select(0, batch.event_interaction)

    def _keys_of(self, static_NS: Tensor, batch: Batch) -> tuple[_Keys, Tensor]:
        """Return the keys of the batch's items, exact and quantized, and the weighted quantization loss."""
        key_NHd = self.keys(static_NS)
        if self.quantizer is None:
            return _Keys(key_NHd, key_NHd, None), key_NHd.new_zeros(())
        if not bool(self.quantizer.started):
            # Warm-up: exact keys; the codebooks stay in the graph so that data-parallel workers agree on what has a gradient.
            return _Keys(key_NHd, key_NHd, None), 0.0 * self.quantizer.codebook_GCw.sum()
        if not self.training:
            codes_NG = self.quantizer.search(key_NHd)
            return _Keys(key_NHd, self.quantizer.quantized(codes_NG, key_NHd), codes_NG), key_NHd.new_zeros(())
        weight_N = torch.bincount(batch.event_item, minlength=key_NHd.shape[0])
        hard_NHd, loss, codes_NG = self.quantizer(key_NHd, weight_N, self.config.commitment)
        return _Keys(key_NHd, hard_NHd, codes_NG), self.config.codebook_weight * loss

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(*flat.shape[:-1], self.config.heads, self.config.head_width)

    def _normalised(self, flat: Tensor) -> Tensor:
        width = self.config.head_width
        flat = flat.to(self.log_scale_H.dtype)  # autocast must not round what the codes are searched by
        return F.layer_norm(self._heads(flat), (width,)) * width**-0.25

    def _recency(self, batch: Batch) -> Tensor:
        """log(1 + visible events) and log(1 + days since the last visible event), [T, 2]."""
        starts = torch.tensor(batch.event_start[:-1], device=batch.target_end.device)
        counts = torch.tensor(batch.target_start, device=batch.target_end.device).diff()
        last = (starts.repeat_interleave(counts) + batch.target_end - 1).clamp(min=0)
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

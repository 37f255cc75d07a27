"""VQL: target attention whose keys are codewords (docs/method.md#quantization and the sections behind it).

    o_t = sum_i softmax_i(q_t . e_{z_i} + log K(t_q - t_i)) v_i

trained event by event with straight-through keys; served from one count and one mean of values a code. With
`recent_window` and `refine_k` some events have their exact keys, in the same softmax.

Legend: N distinct items of the batch, E events (flat), T targets (flat), L events of one user, H heads, d head width,
G groups, C codes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from training.config import ModelConfig
from training.model.attention import Attended, cache_part, combine, window_part
from training.model.cache import UserCache, build_cache
from training.model.fused_codes import preferred
from training.model.history import Events, Items, Targets, each_user, one_user
from training.model.interests.interface import Coded
from training.model.passes import Keys, Softmax
from training.model.probe import AttentionErrors, attention_errors
from training.model.quantizer import GroupedQuantizer
from training.model.refined import CodedHistory, index_events, refined_cache_part


class Vql(Coded):
    """Exact attention until the codebooks are started, quantized attention from then on."""

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.quantizer = self.new_quantizer()

    def new_quantizer(self) -> GroupedQuantizer:
        config = self.config
        return GroupedQuantizer(config.groups, config.codes, config.width // config.groups, config.ema_decay)

    def softmax(self) -> Softmax:
        return Softmax(self.kernel, self.config.recent_window, self.config.refine_k)

    def by_codes(self, event_start: np.ndarray, target_start: np.ndarray, cut_offs: np.ndarray) -> np.ndarray:
        if not self.quantizer.is_started() or self.config.recent_window or self.config.refine_k:
            return np.zeros(len(cut_offs), bool)
        words = torch.Size((self.config.heads, self.quantizer.codes, self.config.head_width))
        return preferred(event_start, target_start, cut_offs, words, max(1, self.config.kernel_components))

    def coded_keys(self, key_NHd: Tensor, events: Events) -> tuple[Keys, Tensor]:
        """Return the keys of the batch's items with their codes, and the weighted quantization loss."""
        if not self.quantizer.is_started():
            # Warm-up: exact keys; the codebooks stay in the graph, so that every worker has the same gradients.
            return Keys.exact(key_NHd), 0.0 * self.quantizer.codebook_GCw.sum()
        if not self.training:
            codes_NG = self.quantizer.search(key_NHd)
            hard_NHd, loss = self.quantizer.quantized(codes_NG, key_NHd), key_NHd.new_zeros(())
        else:
            # Items are searched once, but the loss is the theorem's: a mean over events, so an item counts as often as
            # it occurs.
            # A device is not asked for the largest item, as bincount would.
            once_E = key_NHd.new_ones(len(events.item_E)) if events.weight_E is None else events.weight_E
            weight_N = key_NHd.new_zeros(len(key_NHd)).index_add_(0, events.item_E, once_E)
            hard_NHd, loss, codes_NG = self.quantizer(key_NHd, weight_N, self.config.commitment)
            loss = self.config.codebook_weight * loss
        return Keys(key_NHd, hard_NHd, codes_NG, self.codebook_HCd()), loss

    def codebook_HCd(self) -> Tensor:
        """Each head's slice of its group's codewords."""
        config = self.config
        words = self.quantizer.codebook_GCw.view(config.groups, -1, config.heads // config.groups, config.head_width)
        return words.transpose(1, 2).reshape(config.heads, -1, config.head_width)

    @torch.no_grad()
    def user_caches(self, items: Items, events: Events, reference_time_ms: int) -> list[UserCache]:
        codes_NG = self.quantizer.search(self.keys(items.static_NS))
        caches = []
        for first, last in pairwise(events.start):
            # The exact recent window is no part of a cache: its events would count twice.
            old = slice(first, max(first, last - self.config.recent_window))
            codes_LG, value_LHd, time_ms_L = codes_NG[events.item_E[old]], events.value_EHd[old], events.time_ms_E[old]
            caches.append(
                build_cache(codes_LG, value_LHd, time_ms_L, reference_time_ms, self.quantizer.codes, self.kernel)
            )
        return caches

    @torch.no_grad()
    def from_caches(
        self, items: Items, targets: Targets, caches: list[UserCache], opened: Callable[[], Events]
    ) -> Tensor:
        query_THd, codebook_HCd = self.queries(items.static_NS)[targets.item_T], self.codebook_HCd()
        rows = [slice(first, last) for first, last in pairwise(targets.start)]
        if not (self.config.refine_k or self.config.recent_window):
            parts = [
                cache_part(query_THd[mine], codebook_HCd, cache, targets.time_ms_T[mine], self.kernel).out_THd
                for mine, cache in zip(rows, caches, strict=True)
            ]
            return torch.cat(parts)
        keys = Keys(key_NHd := self.keys(items.static_NS), key_NHd, self.quantizer.search(key_NHd), codebook_HCd)
        users = zip(each_user(opened(), targets), caches, strict=True)
        return torch.cat([self._opened(query_THd[mine], keys, e, t, cache).out_THd for (e, t, mine), cache in users])

    def _opened(self, query_THd: Tensor, keys: Keys, events: Events, targets: Targets, cache: UserCache) -> Attended:
        """Return the attention of one user's targets, of which some events are read besides the cache."""
        assert keys.codes_NG is not None and keys.codebook_HCd is not None
        window, time_ms_T = self.config.recent_window, targets.time_ms_T
        split = max(0, len(events.item_E) - window)
        old, new = slice(None, split), slice(split, None)
        if self.config.refine_k:
            item_L = events.item_E[old]
            index = index_events(keys.codes_NG[item_L], self.quantizer.codes)
            exact_LHd, value_LHd = keys.exact_NHd[item_L], events.value_EHd[old]
            history = CodedHistory(cache, index, exact_LHd, value_LHd, events.time_ms_E[old])
            part = refined_cache_part(
                query_THd, keys.codebook_HCd, history, time_ms_T, self.kernel, self.config.refine_k
            )
        else:
            part = cache_part(query_THd, keys.codebook_HCd, cache, time_ms_T, self.kernel)
        if not window:
            return part
        item_L = events.item_E[new]
        newest = one_user(
            events.value_EHd[new], events.time_ms_E[new], time_ms_T, torch.full_like(time_ms_T, len(item_L))
        )
        return combine(window_part(query_THd, keys.exact_NHd[item_L], *newest, self.kernel, window), part)

    @torch.no_grad()
    def probe(self, items: Items, events: Events, targets: Targets) -> list[tuple[int, AttentionErrors]]:
        key_NHd, query_NHd = self.keys(items.static_NS), self.queries(items.static_NS)
        hard_NHd = self.quantizer.quantized(self.quantizer.search(key_NHd), key_NHd)
        found = []
        for mine, seen, _ in each_user(events, targets):
            first, end = (int(seen.first_T[-1]), int(seen.end_T[-1])) if len(seen.item_T) else (0, 0)
            if end == first:
                continue
            item_L, time_ms_L = mine.item_E[first:end], mine.time_ms_E[first:end]
            bias = None if self.kernel is None else self.kernel.log_kernel(seen.time_ms_T[-1:, None], time_ms_L)
            errors = attention_errors(query_NHd[seen.item_T[-1:]], key_NHd[item_L], hard_NHd[item_L], bias)
            found.append((end - first, errors))
        return found

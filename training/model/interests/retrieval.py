"""Two stages: a search picks a few events of a history for each target, exact target attention reads those alone.

    o_t = sum_i softmax_i(q_t . k_i + log K(t_q - t_i)) v_i,   i over the `search_k` visible events of the highest r_ti

A kind of this family says what r_ti is. Newer events come first among equals; one whose r is -inf is never read.

Legend: E events (flat), T targets (flat), H heads, d head width; N, P and B of a layout as in blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etl.stage.errors import StageError
from training.config import ModelConfig
from training.model.blocks import Layout, age_days_of_pairs, highest, softmax_over_blocks
from training.model.history import Events, Items, Targets
from training.model.interests.interface import Attention
from training.model.passes import by_layout


class Retrieval(Attention):
    """What the two-stage kinds share; the search takes no part in the gradient."""

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        if config.search_k < 1:
            raise StageError(f"{config.interest} without a search_k reads nothing", "set search_k, for example 100")

    def search(self, items: Items, events: Events, targets: Targets) -> Callable[[Layout, Tensor], Tensor]:
        """Return what gives r for the pairs of a layout, and their exact logits [H, N, P, B].

        That is [H, N, P, B], or [1, N, P, B] for one search for all heads.
        """
        raise NotImplementedError

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        query_THd = self.queries(items.static_NS).index_select(0, targets.item_T)
        key_EHd = self.keys(items.static_NS).index_select(0, events.item_E)
        search = self.search(items, events, targets)

        def attended(layout: Layout) -> Tensor:
            if not len(layout.event_NB):
                return query_THd.new_zeros(len(layout.slot_T), *query_THd.shape[1:])
            logit_HNPB = self.logits(layout, query_THd, key_EHd, events, targets)
            with torch.no_grad():
                score_HNPB = search(layout, logit_HNPB).masked_fill(~layout.visible(targets), float("-inf"))
                chosen_HNPB = highest(layout, score_HNPB, self.config.search_k)
            logit_HNPB = logit_HNPB.masked_fill(~chosen_HNPB, float("-inf"))
            return softmax_over_blocks(layout, logit_HNPB, layout.events(events.value_EHd), query_THd.dtype)

        return by_layout(attended, events, targets), query_THd.new_zeros(())

    def logits(self, layout: Layout, query_THd: Tensor, key_EHd: Tensor, events: Events, targets: Targets) -> Tensor:
        """Return the exact logits of a layout's pairs, [H, N, P, B]."""
        logit_HNPB = (layout.targets(query_THd) @ layout.events(key_EHd).transpose(2, 3)).to(query_THd.dtype)
        if self.kernel is None:
            return logit_HNPB
        age_NPB = age_days_of_pairs(layout, events.time_ms_E, targets.time_ms_T, query_THd.dtype)
        return logit_HNPB + self.kernel.log_kernel_of_age(age_NPB[None]).to(query_THd.dtype)

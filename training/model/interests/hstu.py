"""The attention of HSTU (arXiv 2402.17152), one layer, from the target to its history: no softmax, a gate behind.

    a_ti = SiLU(q_t . k_i + b[bucket(t_q - t_i)]) / n_t,   o_t = W_o (LN(sum_i a_ti v_i) * SiLU(W_u e_t))

over the n_t visible events, or the newest `recent_window` of them. The bucket of an age is the logarithm of its
seconds, as in the authors' code. Events do not attend to each other: that is quadratic in a history.

Legend: N distinct items, T targets (flat), E events (flat), H heads, d head width, D = H * d; N, P and B of a layout as
in blocks.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ModelConfig
from training.model.blocks import Layout, age_days_of_pairs
from training.model.history import Events, Items, Targets
from training.model.interests.interface import Interest
from training.model.passes import by_layout

SECONDS_PER_DAY = 86_400
BUCKETS, LOG_OF_BUCKET = 128, 0.301


class Hstu(Interest):
    """Pointwise weights, so that the interest knows how much there was, which a softmax forgets."""

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.to_key = nn.Linear(static_width, config.width, bias=False)
        self.to_query = nn.Linear(static_width, config.width, bias=False)
        self.to_gate = nn.Linear(static_width, config.width)
        self.bias_of_age = nn.Embedding(BUCKETS, config.heads)
        nn.init.normal_(self.bias_of_age.weight, std=0.02)
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        if window := self.config.recent_window:
            targets = newest_alone(targets, window)
        heads = (self.config.heads, self.config.head_width)
        key_EHd = F.silu(self.to_key(items.static_NS)).unflatten(-1, heads).index_select(0, events.item_E)
        query_THd = F.silu(self.to_query(items.static_NS)).unflatten(-1, heads).index_select(0, targets.item_T)

        def totals(layout: Layout) -> Tensor:
            age_NPB = age_days_of_pairs(layout, events.time_ms_E, targets.time_ms_T, query_THd.dtype)
            bias_NPBH = F.embedding(bucket_of_age(age_NPB), self.bias_of_age.weight)
            logit_HNPB = layout.targets(query_THd) @ layout.events(key_EHd).transpose(2, 3)
            weight_HNPB = F.silu(logit_HNPB + bias_NPBH.permute(3, 0, 1, 2)) * layout.visible(targets)
            return layout.summed((weight_HNPB @ layout.events(events.value_EHd)).to(query_THd.dtype))

        count_T = targets.end_T - targets.first_T
        mean_TD = (by_layout(totals, events, targets) / count_T.clamp(min=1)[:, None, None]).flatten(1)
        gate_TD = F.silu(self.to_gate(items.static_NS)).index_select(0, targets.item_T)
        out_TD = self.out(self.norm(mean_TD) * gate_TD)
        # Without an event there is no interest, though the layers behind the sum have biases.
        return (out_TD * (count_T > 0)[:, None]).unflatten(-1, heads), items.static_NS.new_zeros(())


def bucket_of_age(age_days: Tensor) -> Tensor:
    """Return the bucket of each age in days, int64."""
    seconds = (age_days * SECONDS_PER_DAY).clamp(min=1)
    return (seconds.log() / LOG_OF_BUCKET).long().clamp(max=BUCKETS - 1)


def newest_alone(targets: Targets, window: int) -> Targets:
    """Return the targets, each seeing its newest `window` events and none before them."""
    first_T = torch.maximum(targets.first_T, targets.end_T - window)
    largest = [int(first_T[a:b].max()) if b > a else 0 for a, b in pairwise(targets.start)]
    return replace(targets, first_T=first_T, shared_from=largest)

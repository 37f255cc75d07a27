"""The mean of the visible values, whatever the target is: what a history says without attention.

    o_t = 1 / n_t sum_i v_i,   i over the n_t visible events; no event, no interest

Legend: E events (flat), T targets (flat), L events of one user, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.model.attention import hidden
from training.model.blocks import Layout
from training.model.history import Events, Items, Targets, each_user
from training.model.interests.interface import Interest
from training.model.passes import by_layout


class MeanPooling(Interest):
    """Has no weights of its own."""

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        nothing = items.static_NS.new_zeros(())
        if self.at_once(events):
            return _means_at_once(events, targets), nothing
        return torch.cat([_means(mine, seen) for mine, seen, _ in each_user(events, targets)]), nothing


def _means(events: Events, targets: Targets) -> Tensor:
    """Return the means of one user's targets, [T, H, d]."""
    value_LHd, end_T, first_T = events.value_EHd, targets.end_T, targets.bound_T
    if first_T is not None:  # a difference of two long sums would round away a short one
        seen_TL = ~hidden(len(value_LHd), first_T, end_T)
        total_TD = seen_TL.to(value_LHd.dtype) @ value_LHd.flatten(1)
        return total_TD.view(-1, *value_LHd.shape[1:]) / (end_T - first_T).clamp(min=1)[:, None, None]
    # Row n is the sum of the first n values, so that a target's is one look-up, however many targets there are.
    total_LHd = torch.cat([value_LHd.new_zeros(1, *value_LHd.shape[1:]), value_LHd.cumsum(0)])
    return total_LHd[end_T] / end_T.clamp(min=1)[:, None, None]


def _means_at_once(events: Events, targets: Targets) -> Tensor:
    """Return the means of all users' targets, [T, H, d]."""
    value_EHd = events.value_EHd

    def totals(layout: Layout) -> Tensor:
        return layout.summed(
            (layout.visible(targets).to(value_EHd.dtype) @ layout.events(value_EHd)).to(value_EHd.dtype)
        )

    return by_layout(totals, events, targets) / (targets.end_T - targets.first_T).clamp(min=1)[:, None, None]

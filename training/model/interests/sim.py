"""SIM (arXiv 2006.05639): search the history by the target, then attend to what was found.

    hard:  r_ti = 0 if event and target share a category, else -inf
    soft:  r_ti = (W_a e_t) . (W_b e_i),   L_aux = BCE(label_t, MLP([sum_i r_ti v_i / n_t; W_a e_t]))

The soft search is trained by a prediction of its own, as in the paper, whose loss is added with weight 1; the choice of
the best has no gradient. The paper's sum over a history is a mean here, so that its size does not grow with the events.

Legend: T targets (flat), E events (flat), H heads, d head width; N, P and B of a layout as in blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ModelConfig
from training.model.blocks import Layout
from training.model.history import Events, Items, Targets
from training.model.interests.category_pooling import shared_category
from training.model.interests.retrieval import Retrieval
from training.model.passes import by_layout


class SimHard(Retrieval):
    """The newest events of the target's categories."""

    def search(self, items: Items, events: Events, targets: Targets) -> Callable[[Layout, Tensor], Tensor]:
        shared = shared_category(items, events, targets)
        nothing = items.static_NS.new_zeros(())
        return lambda layout, _: nothing.masked_fill(~shared(layout)[None], float("-inf"))


class SimSoft(Retrieval):
    """The events whose own, separately trained, embedding is closest to the target's."""

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.to_event = nn.Linear(static_width, config.width, bias=False)
        self.to_target = nn.Linear(static_width, config.width, bias=False)
        self.predict = nn.Sequential(nn.Linear(2 * config.width, config.width), nn.ReLU(), nn.Linear(config.width, 1))

    def search(self, items: Items, events: Events, targets: Targets) -> Callable[[Layout, Tensor], Tensor]:
        searched_T1D, searched_E1D = self.searched(items, events, targets)
        return lambda layout, _: layout.targets(searched_T1D) @ layout.events(searched_E1D).transpose(2, 3)

    def searched(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        target_ND, event_ND = self.to_target(items.static_NS), self.to_event(items.static_NS)
        return target_ND.index_select(0, targets.item_T)[:, None], event_ND.index_select(0, events.item_E)[:, None]

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        interest_THd, nothing = super().forward(items, events, targets)
        if not self.training or targets.label_T is None or not len(targets.label_T):
            return interest_THd, nothing
        searched_T1D, searched_E1D = self.searched(items, events, targets)
        # The auxiliary task trains the search alone: values belong to the model that is served.
        value_E1D = events.value_EHd.detach().flatten(1)[:, None]

        def pooled(layout: Layout) -> Tensor:
            score_1NPB = layout.targets(searched_T1D) @ layout.events(searched_E1D).transpose(2, 3)
            return layout.summed((score_1NPB * layout.visible(targets)) @ layout.events(value_E1D))

        count_T1 = (targets.end_T - targets.first_T).clamp(min=1)[:, None]
        mean_TD = by_layout(pooled, events, targets).squeeze(1) / count_T1
        logit_T = self.predict(torch.cat([mean_TD, searched_T1D.squeeze(1)], -1)).squeeze(-1)
        loss_T = F.binary_cross_entropy_with_logits(logit_T.float(), targets.label_T, reduction="none")
        return interest_THd, loss_T.mean()

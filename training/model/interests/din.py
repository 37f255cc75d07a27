"""DIN (arXiv 1706.06978): a small network says how much of each event a target activates.

    original:  o_t = sum_i w_ti v_i,   w_ti = MLP([e_t; e_i; e_t - e_i; e_t * e_i]), not normalised
    softmax:   o_t = sum_i softmax_i(w_ti) v_i

e is the item's static embedding; the kernel of the age has no part. The first layer is linear in each of its four
inputs, so it is made of one row an item and of a product of target and event: no tensor has all pairs and all widths.

Legend: N distinct items, E events (flat), T targets (flat), H heads, d head width, S static width, K hidden units; N, P
and B of a layout as in blocks.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ModelConfig
from training.model.blocks import Layout, softmax_over_blocks
from training.model.history import Events, Items, Targets
from training.model.interests.interface import Interest
from training.model.passes import by_layout

HIDDEN = 36  # the paper's


class Din(Interest):
    """The activation unit of the paper: one weight an event for all heads, any size, no softmax."""

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.first = nn.Linear(4 * static_width, HIDDEN)
        self.last = nn.Linear(HIDDEN, 1)

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        def attended(layout: Layout) -> Tensor:
            return self.mixed(layout, self.weights(layout, items, events, targets), events, targets)

        return by_layout(attended, events, targets), items.static_NS.new_zeros(())

    def weights(self, layout: Layout, items: Items, events: Events, targets: Targets) -> Tensor:
        """Return w of a layout's pairs, [N, P, B]."""
        of_target_KS, of_event_KS, of_difference_KS, of_product_KS = self.first.weight.chunk(4, 1)
        static_NS = items.static_NS
        target_TK = F.linear(static_NS, of_target_KS + of_difference_KS, self.first.bias).index_select(
            0, targets.item_T
        )
        event_EK = F.linear(static_NS, of_event_KS - of_difference_KS).index_select(0, events.item_E)
        # [K, N, P, S] @ [1, N, S, B]: a product a hidden unit.
        product_TKS = static_NS.index_select(0, targets.item_T)[:, None] * of_product_KS
        event_1NSB = layout.events(static_NS.index_select(0, events.item_E)[:, None]).transpose(2, 3)
        hidden_KNPB = layout.targets(product_TKS) @ event_1NSB
        hidden_KNPB = hidden_KNPB + layout.targets(target_TK[..., None])
        hidden_KNPB = hidden_KNPB + layout.events(event_EK[..., None]).transpose(2, 3)
        return torch.einsum("k,knpb->npb", self.last.weight[0].to(hidden_KNPB.dtype), F.relu(hidden_KNPB)) + (
            self.last.bias
        )

    def mixed(self, layout: Layout, weight_NPB: Tensor, events: Events, targets: Targets) -> Tensor:
        """Return the interests of a layout's targets, [T, H, d]."""
        weight_NPB = weight_NPB * layout.visible(targets)
        return layout.summed((weight_NPB @ layout.events(events.value_EHd)).to(events.value_EHd.dtype))


class DinSoftmax(Din):
    """The same unit, its weights normalised over the visible events."""

    def mixed(self, layout: Layout, weight_NPB: Tensor, events: Events, targets: Targets) -> Tensor:
        logit_HNPB = weight_NPB.masked_fill(~layout.visible(targets), float("-inf"))[None]
        value_1NBD = layout.events(events.value_EHd.flatten(1)[:, None])
        mixed_T1D = softmax_over_blocks(layout, logit_HNPB, value_1NBD, events.value_EHd.dtype)
        return mixed_T1D.view(-1, *events.value_EHd.shape[1:])

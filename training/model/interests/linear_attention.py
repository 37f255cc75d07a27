"""Linear attention (Transformers are RNNs, arXiv 2006.16236): a positive feature map in place of the exponential.

    o_t = sum_i w_ti v_i / sum_i w_ti,   w_ti = phi(q_t) . phi(k_i) K(t_q - t_i),   phi(x) = elu(x) + 1

Legend: E events (flat), T targets (flat), H heads, d head width; N, P and B of a layout as in blocks.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from training.model.blocks import Layout, age_days_of_pairs
from training.model.history import Events, Items, Targets
from training.model.interests.interface import Attention
from training.model.passes import by_layout


class LinearAttention(Attention):
    """Weights that grow with the product of query and key, but never sharply."""

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        query_THd = F.elu(self.queries(items.static_NS)[targets.item_T]) + 1
        key_EHd = (F.elu(self.keys(items.static_NS)) + 1).index_select(0, events.item_E)

        def attended(layout: Layout) -> Tensor:
            weight_HNPB = layout.targets(query_THd) @ layout.events(key_EHd).transpose(2, 3) * layout.visible(targets)
            if self.kernel is not None:
                age_NPB = age_days_of_pairs(layout, events.time_ms_E, targets.time_ms_T, query_THd.dtype)
                weight_HNPB = weight_HNPB * self.kernel.log_kernel_of_age(age_NPB[None]).exp()
            # Both sums run over all blocks of a history before they are divided; without an event both are 0.
            total_TH1 = layout.summed(weight_HNPB.sum(-1, keepdim=True))
            return layout.summed(weight_HNPB @ layout.events(events.value_EHd)) / total_TH1.clamp(min=1e-12)

        return by_layout(attended, events, targets), query_THd.new_zeros(())

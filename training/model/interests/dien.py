"""DIEN (arXiv 1809.03672): a recurrent network reads the history, a second one follows what concerns the target.

    h_i = GRU(v_i, h_{i-1}),   a_ti = softmax_i(h_i W e_t)
    o_t = last state of AUGRU:  u'_i = a_ti u_i,   s_i = (1 - u'_i) * s_{i-1} + u'_i * s~_i

over the newest `recent_window` visible events: it is sequential in them, so nobody runs it over a whole life. Without
the paper's auxiliary loss, as in the public code of LongCTR and as is the default of FuxiCTR.

Legend: N distinct items, E events (flat), T targets (flat), W events of the window, H heads, d head width, D = H * d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etl.stage.errors import StageError
from training.config import ModelConfig
from training.model.history import Events, Items, Targets, begin_of_users
from training.model.interests.interface import Interest


class Dien(Interest):
    """Each target's window is read on its own, oldest event first."""

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        if config.recent_window < 1:
            raise StageError(
                "dien without a recent_window would step through whole histories", "set recent_window, for example 100"
            )

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.read = nn.GRU(config.width, config.width, batch_first=True)
        self.to_query = nn.Linear(static_width, config.width, bias=False)
        self.gates = nn.Linear(2 * config.width, 2 * config.width)
        self.candidate = nn.Linear(2 * config.width, config.width)

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        window, value_ED = self.config.recent_window, events.value_EHd.flatten(1)
        heads, nothing = events.value_EHd.shape[1:], items.static_NS.new_zeros(())
        if not len(value_ED) or not len(targets.item_T):
            return value_ED.new_zeros(len(targets.item_T), *heads), nothing
        count_T = (targets.end_T - targets.first_T).clamp(max=window)
        step_W = torch.arange(window, device=value_ED.device)
        real_TW = step_W < count_T[:, None]
        begin_T = begin_of_users(events.start, targets.start, value_ED.device)
        # Padding stands behind the events, where no state of an event depends on it.
        event_TW = torch.where(real_TW, (begin_T + targets.end_T - count_T)[:, None] + step_W, 0)
        state_TWD = self.read(value_ED[event_TW])[0]
        query_TD = self.to_query(items.static_NS).index_select(0, targets.item_T)
        logit_TW = torch.einsum("twd,td->tw", state_TWD, query_TD).masked_fill(~real_TW, float("-inf"))
        # A target without events has no softmax; its weights of 0 leave the second network where it began.
        attention_TW = logit_TW.masked_fill((count_T == 0)[:, None], 0.0).softmax(-1) * real_TW
        return self.follow(state_TWD, attention_TW).view(-1, *heads), nothing

    def follow(self, state_TWD: Tensor, attention_TW: Tensor) -> Tensor:
        """Return the last state, [T, D], of a GRU whose update gate is scaled by the attention."""
        out_TD = torch.zeros_like(state_TWD[:, 0])
        for input_TD, attention_T in zip(state_TWD.unbind(1), attention_TW.unbind(1), strict=True):
            update_TD, reset_TD = self.gates(torch.cat([input_TD, out_TD], -1)).sigmoid().chunk(2, -1)
            candidate_TD = self.candidate(torch.cat([input_TD, reset_TD * out_TD], -1)).tanh()
            update_TD = attention_T[:, None] * update_TD
            out_TD = (1 - update_TD) * out_TD + update_TD * candidate_TD
        return out_TD

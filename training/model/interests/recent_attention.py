"""Exact target attention over the newest events alone: what a system that truncates its histories sees.

o_t = sum_i softmax_i(q_t . k_i + log K(t_q - t_i)) v_i,   i over the last `recent_window` visible events
"""

from __future__ import annotations

from etl.stage.errors import StageError
from training.config import ModelConfig
from training.model.interests.interface import Attention
from training.model.passes import Softmax


class RecentAttention(Attention):
    """`softmax_attention` of a truncated history."""

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        if config.recent_window < 1:
            raise StageError(
                "recent_attention without a recent_window sees nothing", "set recent_window, for example 200"
            )

    def softmax(self) -> Softmax:
        return Softmax(self.kernel, self.config.recent_window, window_alone=True)

"""Exact target attention: a softmax over all visible events (docs/method.md#embedding; DIN's query, arXiv 1706.06978).

o_t = sum_i softmax_i(q_t . k_i + log K(t_q - t_i)) v_i
"""

from __future__ import annotations

from training.model.interests.interface import Attention


class SoftmaxAttention(Attention):
    """What VQL approximates, for the cost of every event of a history."""

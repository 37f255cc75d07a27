"""TWIN (arXiv 2302.02352): one attention for both stages; the search ranks by the very logits of the attention.

    r_ti = q_t . k_i + log K(t_q - t_i)

The paper's scalar bias of cross features is the kernel of the age here, as for all kinds, and each head searches for
itself. In training all keys are there, so both stages read them; what the paper saves is at serving, by projections
that are cached.

Legend: H heads, d head width; N, P and B of a layout as in blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from training.model.blocks import Layout
from training.model.history import Events, Items, Targets
from training.model.interests.retrieval import Retrieval


class Twin(Retrieval):
    """Exact attention over the events of its own highest logits."""

    def search(self, items: Items, events: Events, targets: Targets) -> Callable[[Layout, Tensor], Tensor]:
        return lambda _, logit_HNPB: logit_HNPB

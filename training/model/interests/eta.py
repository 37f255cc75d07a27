"""ETA (arXiv 2108.04468): the events whose hash differs from the target's in the fewest bits are attended to.

    r_ti = -|{b: sign(k_i R_b) != sign(k_t R_b)}|,   R: random projections, fixed

The target is hashed by its key, so that what is similar to it has a similar hash.

Legend: N distinct items, E events (flat), T targets (flat), D width of all heads, B bits (in a layout N, P and B are
those of blocks.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from training.config import ModelConfig
from training.model.blocks import Layout
from training.model.history import Events, Items, Targets
from training.model.interests.retrieval import Retrieval

BITS = 48


class Eta(Retrieval):
    """One search for all heads, by locality-sensitive hashes."""

    planes_DB: Tensor

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.register_buffer("planes_DB", torch.randn(config.width, BITS))

    def search(self, items: Items, events: Events, targets: Targets) -> Callable[[Layout, Tensor], Tensor]:
        # With signs as +1 and -1 a product counts equal bits less different ones: a GPU does it as it does any product.
        sign_N1B = torch.where(self.keys(items.static_NS).flatten(1).float() @ self.planes_DB > 0, 1.0, -1.0)[:, None]
        target_T1B = sign_N1B.index_select(0, targets.item_T)
        event_E1B = sign_N1B.index_select(0, events.item_E)
        return lambda layout, _: layout.targets(target_T1B) @ layout.events(event_E1B).transpose(2, 3)

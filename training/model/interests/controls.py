"""Controls of VQL: what its codewords are worth that they follow their keys, and that they began among them.

    frozen codebook:  VQL whose codewords stay where k-means put them after the warm-up
    random codebook:  VQL whose codewords are drawn after the warm-up, normal with the keys' mean and spread, and stay

Keys are trained as VQL's are: straight through their codewords, with the commitment to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.model.interests.vql import Vql
from training.model.quantizer import GroupedQuantizer


class FrozenQuantizer(GroupedQuantizer):
    """Codebooks that stay as they were started: moving averages that keep all that they have, and no revival."""

    def __init__(self, groups: int, codes: int | tuple[int, ...], group_width: int) -> None:
        super().__init__(groups, codes, group_width, ema_decay=1.0)

    @torch.no_grad()
    def revive(self, keys_NHd: Tensor, generator: torch.Generator, threshold: float = 0.02) -> None:
        pass


class RandomQuantizer(FrozenQuantizer):
    """The same, from a normal distribution."""

    @torch.no_grad()
    def start_from_keys(self, keys_NHd: Tensor, generator: torch.Generator, iterations: int = 0) -> None:
        """Draw the codewords with the mean and the spread of the keys in each dimension."""
        super().start_from_keys(keys_NHd, generator, iterations)
        spread_Gw, mean_Gw = torch.std_mean(self._grouped(keys_NHd.float()), dim=0, correction=0)
        drawn_GCw = torch.randn(self.codebook_GCw.shape, generator=generator).to(mean_Gw.device)
        self.codebook_GCw.copy_(mean_Gw[:, None] + spread_Gw[:, None] * drawn_GCw)
        self._restart_averages(torch.ones_like(self.usage_GC, dtype=torch.bool))


class FrozenCodebook(Vql):
    """Where it ties with VQL, training the codewords adds nothing to k-means."""

    def new_quantizer(self) -> GroupedQuantizer:
        config = self.config
        return FrozenQuantizer(config.groups, config.codes, config.width // config.groups)


class RandomCodebook(Vql):
    """Where it ties with VQL, any codewords would do."""

    def new_quantizer(self) -> GroupedQuantizer:
        config = self.config
        return RandomQuantizer(config.groups, config.codes, config.width // config.groups)

"""Key-only quantization in groups of heads (vql: grouped codebooks, straight-through, codebook + commitment loss).

Legend: N keys (one a distinct item), H heads, d head width, G groups, w = D / G group width, C codes.

Group g quantizes the concatenation of its heads' keys with a codebook of its own; the heads of a group share the
assignment. Search and losses stay in fp32 whatever autocast says: with off-centre keys bf16 flips most assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupedQuantizer(nn.Module):
    """Codebooks of all groups.

    Attributes:
        codebook_GCw: the codewords, trained by the codebook loss alone (the task's gradient goes straight through).
        usage_GC: moving average of each code's share of the events.
        started: 0 until `start_from_keys` has run; before it, keys pass unquantized.
    """

    usage_GC: Tensor
    started: Tensor

    def __init__(self, groups: int, codes: int, group_width: int) -> None:
        super().__init__()
        self.groups, self.codes, self.group_width = groups, codes, group_width
        self.codebook_GCw = nn.Parameter(torch.randn(groups, codes, group_width) * group_width**-0.5)
        self.register_buffer("usage_GC", torch.full((groups, codes), 1.0 / codes))
        self.register_buffer("started", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def search(self, keys_NHd: Tensor) -> Tensor:
        """Return the nearest code of every key and group, int64 [N, G]; ties go to the lower code."""
        with torch.autocast(keys_NHd.device.type, enabled=False):
            keys_GNw = self._grouped(keys_NHd.float())
            centre_G1w = self.codebook_GCw.mean(1, keepdim=True)  # a common offset costs precision, not distance
            codes_GCw = self.codebook_GCw - centre_G1w
            scores_GNC = torch.baddbmm(
                codes_GCw.square().sum(-1).unsqueeze(1), keys_GNw - centre_G1w, codes_GCw.transpose(1, 2), alpha=-2.0
            )
            return scores_GNC.argmin(-1).T.contiguous()

    def lookup(self, codes_NG: Tensor) -> Tensor:
        """Return the codewords of assignments, fp32 [G, N, w]."""
        return torch.stack([self.codebook_GCw[g][codes_NG[:, g]] for g in range(self.groups)])

    def forward(self, keys_NHd: Tensor, weight_N: Tensor, commitment: float) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize the keys of distinct items.

        Args:
            keys_NHd: keys, float [N, H, d].
            weight_N: events of each item in the batch, so that the loss is the mean over valid events.
            commitment: beta.

        Returns:
            quantized keys [N, H, d] (straight-through), the loss (mean over events of the sum over groups and width),
            and the assignments int64 [N, G].
        """
        codes_NG = self.search(keys_NHd)
        with torch.autocast(keys_NHd.device.type, enabled=False):
            keys_GNw = self._grouped(keys_NHd.float())
            words_GNw = self.lookup(codes_NG)
            weight = weight_N.float() / weight_N.sum().clamp(min=1)
            codebook_loss = ((keys_GNw.detach() - words_GNw).square().sum((0, 2)) * weight).sum()
            commitment_loss = ((keys_GNw - words_GNw.detach()).square().sum((0, 2)) * weight).sum()
            hard_GNw = keys_GNw + (words_GNw - keys_GNw).detach()
        if self.training:
            self._track_usage(codes_NG, weight)
        return self._ungrouped(hard_GNw, keys_NHd), codebook_loss + commitment * commitment_loss, codes_NG

    def quantized(self, codes_NG: Tensor, like_NHd: Tensor) -> Tensor:
        """Return codewords laid out as keys, [N, H, d]."""
        return self._ungrouped(self.lookup(codes_NG), like_NHd)

    @torch.no_grad()
    def start_from_keys(self, keys_NHd: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        """Start the codebooks by k-means over real keys (after warm-up; random codebooks collapse)."""
        keys_GNw = self._grouped(keys_NHd.float())
        n = keys_GNw.shape[1]
        for g in range(self.groups):
            picked = torch.randperm(n, generator=generator)[: self.codes]
            if len(picked) < self.codes:
                picked = torch.cat([picked, torch.randint(n, (self.codes - len(picked),), generator=generator)])
            noise = torch.randn(self.codes, self.group_width, generator=generator).to(keys_NHd.device) * 1e-4
            self.codebook_GCw[g] = keys_GNw[g][picked.to(keys_NHd.device)] + noise
        for _ in range(iterations):
            codes_NG = self.search(keys_NHd)
            for g in range(self.groups):
                count_C = torch.zeros(self.codes, device=keys_NHd.device).index_add_(
                    0, codes_NG[:, g], torch.ones(n, device=keys_NHd.device)
                )
                total_Cw = torch.zeros_like(self.codebook_GCw[g]).index_add_(0, codes_NG[:, g], keys_GNw[g])
                self.codebook_GCw[g] = torch.where(
                    count_C[:, None] > 0, total_Cw / count_C.clamp(min=1)[:, None], self.codebook_GCw[g]
                )
        self.usage_GC.fill_(1.0 / self.codes)
        self.started.fill_(1)

    @torch.no_grad()
    def revive(self, keys_NHd: Tensor, generator: torch.Generator, threshold: float = 0.02) -> int:
        """Move codes used less than `threshold` of an even share to random keys, their usage reset; return how many."""
        keys_GNw = self._grouped(keys_NHd.float())
        revived = 0
        for g in range(self.groups):
            dead = torch.nonzero(self.usage_GC[g] < threshold / self.codes).flatten()
            if len(dead):
                picked = torch.randint(keys_GNw.shape[1], (len(dead),), generator=generator).to(dead.device)
                self.codebook_GCw[g, dead] = keys_GNw[g][picked]
                self.usage_GC[g, dead] = 1.0 / self.codes
                revived += len(dead)
        return revived

    def perplexity_share(self) -> Tensor:
        """Return exp(entropy of usage) / C per group, float [G]; near 0 = collapsed, healthy above .5."""
        share = self.usage_GC / self.usage_GC.sum(1, keepdim=True)
        return torch.exp(-(share * share.clamp(min=1e-12).log()).sum(1)) / self.codes

    @torch.no_grad()
    def _track_usage(self, codes_NG: Tensor, weight_N: Tensor) -> None:
        for g in range(self.groups):
            share_C = torch.zeros(self.codes, device=weight_N.device).index_add_(0, codes_NG[:, g], weight_N)
            self.usage_GC[g].lerp_(share_C, 0.05)

    def _grouped(self, keys_NHd: Tensor) -> Tensor:
        return keys_NHd.reshape(keys_NHd.shape[0], self.groups, self.group_width).transpose(0, 1)

    def _ungrouped(self, keys_GNw: Tensor, like_NHd: Tensor) -> Tensor:
        return keys_GNw.transpose(0, 1).reshape(like_NHd.shape)

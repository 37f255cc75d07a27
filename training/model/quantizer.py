"""Key-only quantization in groups of heads (docs/method.md#quantization and the three sections behind it).

Legend: N keys (one a distinct item), H heads, d head width, G groups, w = D / G group width, C codes.

The codewords follow their keys in one of two ways: by the gradient of the codebook loss, or, with a decay, as moving
averages of the keys assigned to them (then the loss is the commitment alone and the codewords are no optimizer's
business).

Group g quantizes the concatenation of its heads' keys with a codebook of its own; the heads of a group share the
assignment. Search and losses stay in fp32 whatever autocast says: with off-centre keys bf16 flips most assignments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.model import fused_codes
from training.model.fused import available, on_device
from training.model.fused_rows import Places, gathered_exactly


def straight_through(key: Tensor, word: Tensor) -> Tensor:
    """Return codewords whose gradient goes to the keys (docs/method.md#straight-through-gradient).

    They are the codewords to the bit, so that events of one code have one logit: `key + (word - key)` would round.
    """
    return word.detach() + (key - key.detach())


class GroupedQuantizer(nn.Module):
    """Codebooks of all groups.

    Attributes:
        codebook_GCw: the codewords; the task's gradient goes straight through them to the keys.
        usage_GC: moving average of each code's share of the events, of all workers.
        started: 0 until `start_from_keys` has run; before it, keys pass unquantized.
        average_GCk: with an `ema_decay` only: moving averages of every code's summed keys and, last, of its event
            count, fp32 [G, C, w + 1].
        spare_GC: rows of a group's codebook that are not codes, because another group has more.
        step_GCk: the same sums of the last training batch of this worker; without a decay, of keys less their
            codewords in place of keys. Sum them over workers, then call `move_averages`.
    """

    usage_GC: Tensor
    started: Tensor
    average_GCk: Tensor
    step_GCk: Tensor
    sizes_G1: Tensor
    spare_GC: Tensor

    def __init__(
        self, groups: int, codes: int | Sequence[int], group_width: int, ema_decay: float | None = None
    ) -> None:
        super().__init__()
        sizes = [codes] * groups if isinstance(codes, int) else list(codes)
        self.groups, self.codes, self.group_width, self.ema_decay = groups, max(sizes), group_width, ema_decay
        words_GCw = torch.randn(groups, self.codes, group_width) * group_width**-0.5
        self.register_buffer("sizes_G1", torch.tensor(sizes, dtype=torch.float32)[:, None], persistent=False)
        self.register_buffer("spare_GC", torch.arange(self.codes) >= self.sizes_G1, persistent=False)
        self.codebook_GCw = nn.Parameter(words_GCw, requires_grad=ema_decay is None)
        self.register_buffer("usage_GC", self._even_usage())
        self.register_buffer("started", torch.zeros((), dtype=torch.long))
        self._known_started: bool | None = None
        if ema_decay is not None:
            self.register_buffer("average_GCk", torch.cat([words_GCw, torch.ones_like(words_GCw[..., :1])], -1))
        self.register_buffer("step_GCk", torch.zeros(groups, self.codes, group_width + 1), persistent=False)

    @torch.no_grad()
    def search(self, keys_NHd: Tensor) -> Tensor:
        """Return the nearest code of every key and group, int64 [N, G]; ties go to the lower code."""
        with torch.autocast(keys_NHd.device.type, enabled=False):
            keys_NGw = self._grouped(keys_NHd.float())
            centre_Gw = self.codebook_GCw.mean(1)  # a common offset costs precision, not distance
            codes_GCw = self.codebook_GCw - centre_Gw[:, None]
            square_GC = codes_GCw.square().sum(-1).masked_fill(self.spare_GC, torch.inf)
            if available(keys_NGw) and fused_codes.searches(self.codes, self.group_width):
                return fused_codes.nearest(keys_NGw, centre_Gw, codes_GCw, square_GC)
            # The distance without |k|^2, which is the same for all codes of a key.
            apart_GNw = keys_NGw.transpose(0, 1) - centre_Gw[:, None]
            scores_GNC = torch.baddbmm(square_GC[:, None], apart_GNw, codes_GCw.transpose(1, 2), alpha=-2.0)
            return scores_GNC.argmin(-1).T.contiguous()

    def lookup(self, codes_NG: Tensor) -> Tensor:
        """Return the codewords of assignments, fp32 [N, G, w]."""
        words_Xw = gathered_exactly(self.codebook_GCw.flatten(0, 1), Places(self._rows(codes_NG)))
        return words_Xw.unflatten(0, codes_NG.shape)

    def is_started(self) -> bool:
        """Say whether codes have begun; a device is asked once, and not in every step."""
        if self._known_started is None:
            self._known_started = bool(self.started)
        return self._known_started

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._known_started = None
        super()._load_from_state_dict(*args, **kwargs)

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
            keys_NGw, weight_N = self._grouped(keys_NHd.float()), weight_N.float()
            words_NGw, events = self.lookup(codes_NG).detach(), weight_N.sum().clamp(min=1)
            apart_NGw = keys_NGw - words_NGw
            distance = (apart_NGw.square().sum((1, 2)) * weight_N).sum() / events
            loss = commitment * distance
            followed = keys_NGw if self.ema_decay is not None else apart_NGw
            sums_GCk = self._sums(codes_NG, followed.detach(), weight_N)
            if self.ema_decay is None:
                loss = loss + distance.detach() + self._pull(sums_GCk) / events
            if self.training:
                # Copied, not added: a recomputed forward pass must not count twice.
                self.step_GCk.copy_(sums_GCk)
        return straight_through(keys_NGw, words_NGw).view(keys_NHd.shape), loss, codes_NG

    def quantized(self, codes_NG: Tensor, like_NHd: Tensor) -> Tensor:
        """Return codewords laid out as keys, [N, H, d]."""
        return self.lookup(codes_NG).view(like_NHd.shape)

    @torch.no_grad()
    def start_from_keys(self, keys_NHd: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        """Start the codebooks by k-means over real keys (after warm-up; random codebooks collapse)."""
        keys_NGw = self._grouped(keys_NHd.float())
        n = len(keys_NGw)
        for g in range(self.groups):
            picked = torch.randperm(n, generator=generator)[: self.codes]
            if len(picked) < self.codes:
                picked = torch.cat([picked, torch.randint(n, (self.codes - len(picked),), generator=generator)])
            # With fewer distinct keys than codes some are drawn twice; of two equal codewords the second would never be
            # found.
            noise = torch.randn(self.codes, self.group_width, generator=generator).to(keys_NHd.device) * 1e-4
            self.codebook_GCw[g] = keys_NGw[picked.to(keys_NHd.device), g] + noise
        for _ in range(iterations):
            sums_GCk = self._sums(self.search(keys_NHd), keys_NGw, keys_NGw.new_ones(n))
            count_GC1 = sums_GCk[..., -1:]
            self.codebook_GCw.copy_(torch.where(count_GC1 > 0, sums_GCk[..., :-1] / count_GC1, self.codebook_GCw))
        self.usage_GC.copy_(self._even_usage())
        self._restart_averages(torch.ones_like(self.usage_GC, dtype=torch.bool))
        self.started.fill_(1)
        self._known_started = True

    @torch.no_grad()
    def move_averages(self) -> None:
        """Move usage, and averaged codewords, by one batch, after its backward pass.

        `step_GCk` holds the sums of all workers.
        """
        count_GC = self.step_GCk[..., -1]
        events_G1 = count_GC.sum(1, keepdim=True).clamp(min=1)
        # Slow enough that a rare code is not taken for dead: from an even share it takes 77 batches without an event.
        self.usage_GC.lerp_(count_GC / events_G1, 0.05)
        if self.ema_decay is None:
            return
        # In shares, an average code weighs 1 whatever the batch, and so does a restarted one.
        even_GCk = self.step_GCk * (self.sizes_G1 / events_G1)[..., None]
        self.average_GCk.lerp_(even_GCk, 1 - self.ema_decay)
        # Both sums of an unused code decay alike, so its codeword stays, until there is nothing left to divide.
        total_GCw, weight_GC1 = self.average_GCk[..., :-1], self.average_GCk[..., -1:]
        self.codebook_GCw.copy_(torch.where(weight_GC1 > 1e-6, total_GCw / weight_GC1, self.codebook_GCw))

    @torch.no_grad()
    def revive(self, keys_NHd: Tensor, generator: torch.Generator, threshold: float = 0.02) -> None:
        """Move codes used less than `threshold` of an even share to random keys, their usage reset.

        The host waits for no device to say which codes these are.
        """
        keys_GNw, dead_GC = self._grouped(keys_NHd.float()).transpose(0, 1), self._dead(threshold)
        drawn_GC = torch.randint(keys_GNw.shape[1], dead_GC.shape, generator=generator)
        picked_GC1 = on_device(drawn_GC.numpy(), keys_NHd.device)[..., None]
        drawn_GCw = keys_GNw.gather(1, picked_GC1.expand(-1, -1, self.group_width))
        self.codebook_GCw.copy_(torch.where(dead_GC[..., None], drawn_GCw, self.codebook_GCw))
        self.usage_GC.copy_(torch.where(dead_GC, self._even_usage(), self.usage_GC))
        self._restart_averages(dead_GC)

    def perplexity_share(self) -> Tensor:
        """Return exp(entropy of usage) / C per group, float [G]; near 0 = collapsed, healthy above .5."""
        share = self.usage_GC / self.usage_GC.sum(1, keepdim=True)
        return torch.exp(-(share * share.clamp(min=1e-12).log()).sum(1)) / self.sizes_G1[:, 0]

    def dead_share(self, threshold: float = 0.02) -> Tensor:
        """Return the share of codes used less than `threshold` of an even share per group, float [G]."""
        return self._dead(threshold).sum(1) / self.sizes_G1[:, 0]

    def _dead(self, threshold: float) -> Tensor:
        return (self.usage_GC < threshold / self.sizes_G1) & ~self.spare_GC

    def _even_usage(self) -> Tensor:
        return torch.where(self.spare_GC, 0.0, 1.0 / self.sizes_G1)

    def _rows(self, codes_NG: Tensor) -> Tensor:
        """Return the rows of assignments in all groups' codewords, one group behind another, int64 [N * G]."""
        return (codes_NG + self.codes * torch.arange(self.groups, device=codes_NG.device)).flatten()

    def _sums(self, codes_NG: Tensor, keys_NGw: Tensor, weight_N: Tensor) -> Tensor:
        """Sum weighted keys (or what else there is of each) and, last, weights per code, fp32 [G, C, w + 1]."""
        rows_NGk = torch.cat([keys_NGw, torch.ones_like(keys_NGw[..., :1])], -1) * weight_N[:, None, None]
        sums_Xk = rows_NGk.new_zeros(self.groups * self.codes, self.group_width + 1)
        return sums_Xk.index_add_(0, self._rows(codes_NG), rows_NGk.flatten(0, 1)).view(self.groups, self.codes, -1)

    def _pull(self, sums_GCk: Tensor) -> Tensor:
        """Return 0 with the gradient of the codebook loss, the sum over events of |codeword - key|^2 with keys fixed.

        Args:
            sums_GCk: each code's sums of key - codeword and, last, of events.
        """
        pull = -2 * (self.codebook_GCw * sums_GCk[..., :-1]).sum()
        return pull - pull.detach()

    def _restart_averages(self, which_GC: Tensor) -> None:
        """Set averages to the present codewords at the weight of an average code; else they would undo a revival."""
        if self.ema_decay is not None:
            restarted_GCk = torch.cat([self.codebook_GCw, torch.ones_like(self.codebook_GCw[..., :1])], -1)
            self.average_GCk.copy_(torch.where(which_GC[..., None], restarted_GCk, self.average_GCk))

    def _grouped(self, keys_NHd: Tensor) -> Tensor:
        return keys_NHd.reshape(len(keys_NHd), self.groups, self.group_width)

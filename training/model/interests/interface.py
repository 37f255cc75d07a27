"""What every kind of interest is: a module that turns histories into one interest vector a target.

    interest_THd, auxiliary loss = interest(items, events, targets)

The ranker around it is the same for all kinds: it embeds the items, makes the values, and predicts from the interest.
A kind gets all users at once; which pass runs, by device and size, is its own business and changes no result beyond
rounding.

Legend: N distinct items of the batch, E events (flat), T targets (flat), S width of an item's static embedding,
H heads, d head width, D = H * d.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.model.blocks import block_attention
from training.model.cache import UserCache
from training.model.fused_rows import gathered_exactly, normalised
from training.model.history import Events, Items, Targets
from training.model.kernel import MixtureKernel
from training.model.passes import Keys, Softmax, has_kernels, in_blocks, in_kernels, user_by_user
from training.model.probe import AttentionErrors
from training.model.quantizer import GroupedQuantizer

MAX_LOG_SCALE = math.log(4.0)  # the theorem's bound grows with the logit scale: capped


class Interest(nn.Module):
    """A kind of interest, built from a model's configuration and the width of an item's static embedding.

    Attributes:
        always_at_once: all users are read in one pass on a CPU too, as they are on a GPU.
    """

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__()
        self.config = config
        self.always_at_once = False

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise a StageError where the configuration lacks what this kind needs."""

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        """Return the interests, float [T, H, d], and a loss to be added to the task's, 0 where there is none.

        A target's interest depends on its own item and on the events [first, end) of its own user, and on nothing else
        of the batch; with no such event it is zeros.
        """
        raise NotImplementedError

    def compile_pass(self) -> None:
        """Let torch.compile build the pass over all users; what depends on a batch's lists stays as it is."""
        self.always_at_once = True

    def reads_tensors_alone(self) -> bool:
        """Say whether the pass over a padded batch reads no list of it, so that a training step may be recorded.

        A kind that says nothing trains unrecorded: slower on a GPU, and right.
        """
        return False

    def by_codes(self, event_start: np.ndarray, target_start: np.ndarray, cut_offs: np.ndarray) -> np.ndarray:
        """Say which users of a batch, all of whose targets see its events from the first on, meet codes on a GPU."""
        return np.zeros(len(cut_offs), bool)

    def at_once(self, events: Events) -> bool:
        """Say whether all users are read in one pass: a GPU would wait for the launches of a loop, a CPU has caches."""
        return self.always_at_once or events.value_EHd.device.type != "cpu"


class Attention(Interest):
    """What the kinds with queries and keys share: both are made of static item fields alone (docs/method.md#embedding).

    Attributes:
        kernel: of the ages, None if the configuration has no component.
        block_attention: the pass over blocks, plain or compiled.
    """

    def __init__(self, config: ModelConfig, static_width: int) -> None:
        super().__init__(config, static_width)
        self.to_key = nn.Linear(static_width, config.width, bias=False)
        self.to_query = nn.Linear(static_width, config.width, bias=False)
        self.log_scale_H = nn.Parameter(torch.zeros(config.heads))
        self.kernel: MixtureKernel | None = None
        if config.kernel_components:
            self.kernel = MixtureKernel(config.heads, config.half_life_days[: config.kernel_components])
        self.block_attention: Callable[..., Tensor] = block_attention

    def keys(self, static_NS: Tensor) -> Tensor:
        """Keys [N, H, d]: LayerNorm without gain per head, times d^-1/4, so that logits are bounded by sqrt(d)."""
        return self.normalised(self.to_key(static_NS))

    def queries(self, static_NS: Tensor) -> Tensor:
        """Queries [N, H, d], normalised as keys, times a learned and capped scale per head."""
        return self.normalised(self.to_query(static_NS)) * self.log_scale_H.clamp(max=MAX_LOG_SCALE).exp()[:, None]

    def normalised(self, flat_ND: Tensor) -> Tensor:
        width = self.config.head_width
        # Autocast must not round what the codes are searched by.
        flat_ND = flat_ND.to(self.log_scale_H.dtype)
        return normalised(self.heads(flat_ND)) * width**-0.25

    def heads(self, flat_ND: Tensor) -> Tensor:
        return flat_ND.view(*flat_ND.shape[:-1], self.config.heads, self.config.head_width)

    def softmax(self) -> Softmax:
        """What this kind's softmax is over, besides queries and keys."""
        return Softmax(self.kernel)

    def attend(self, query_THd: Tensor, keys: Keys, events: Events, targets: Targets) -> Tensor:
        """Return the interests, [T, H, d], by the pass that suits device and sizes; no other place chooses one."""
        if has_kernels(query_THd, self.softmax()):
            return in_kernels(query_THd, keys, events, targets, self.softmax())
        if self.at_once(events):
            return in_blocks(query_THd, keys, events, targets, self.softmax(), self.block_attention)
        return user_by_user(query_THd, keys, events, targets, self.softmax())

    def coded_keys(self, key_NHd: Tensor, events: Events) -> tuple[Keys, Tensor]:
        """Return the keys of the batch's items as the softmax takes them, and the loss that their codes add."""
        return Keys.exact(key_NHd), key_NHd.new_zeros(())

    def forward(self, items: Items, events: Events, targets: Targets) -> tuple[Tensor, Tensor]:
        keys, loss = self.coded_keys(self.keys(items.static_NS), events)
        query_THd = gathered_exactly(self.queries(items.static_NS), targets.by_item)
        return self.attend(query_THd, keys, events, targets), loss

    def reads_tensors_alone(self) -> bool:
        # Of the passes above alone: one of a kind's own may read lists, and a recorded step has none to give.
        mine = type(self)
        own = mine.forward is not Attention.forward or mine.attend is not Attention.attend
        return not own and has_kernels(self.heads(self.to_query.weight.T), self.softmax())

    def compile_pass(self) -> None:
        super().compile_pass()
        self.block_attention = torch.compile(block_attention, dynamic=True)


class Coded(Attention):
    """A kind whose keys have codes: training tends its codebooks, and its users have caches.

    Attributes:
        quantizer: the codebooks of all groups.
    """

    quantizer: GroupedQuantizer

    def user_caches(self, items: Items, events: Events, reference_time_ms: int) -> list[UserCache]:
        """Return the cache of every user, over all events but the exact recent window."""
        raise NotImplementedError

    def from_caches(
        self, items: Items, targets: Targets, caches: list[UserCache], opened: Callable[[], Events]
    ) -> Tensor:
        """Return the interests, [T, H, d], of targets at the end of their histories.

        Args:
            opened: gives the events; called only where the configuration reads some, so that scoring costs no L.
        """
        raise NotImplementedError

    def probe(self, items: Items, events: Events, targets: Targets) -> list[tuple[int, AttentionErrors]]:
        """Return (events, errors) of each user's last target: quantized attention against exact, and the bound."""
        raise NotImplementedError

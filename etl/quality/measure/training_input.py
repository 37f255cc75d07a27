"""What a training is about to read: the facts that the records of `etl.metrics.training_input` ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from etl.quality.measure.drift import NAN, kl


@dataclass(frozen=True)
class WindowDay:
    """A day of the window.

    Attributes:
        read: data digest of its events when the sequences were made of them; None: they were not.
        published: data digest of its events that are published now; None: none are.
    """

    read: str | None
    published: str | None

    @property
    def stale(self) -> bool:
        return self.read is not None and self.published is not None and self.read != self.published


@dataclass(frozen=True)
class InputFacts:
    """A published partition.

    Attributes:
        of: the metrics of its `sequences`.
        mixed: `items` and `sequences` come from different attempts.
        min_judged_targets: sides with fewer targets are not compared.
    """

    of: Mapping[str, float]
    mixed: bool
    min_judged_targets: int

    train_rate = property(lambda self: self.of["train_label_rate"])
    eval_rate = property(lambda self: self.of["eval_label_rate"])

    @property
    def judged(self) -> bool:
        return min(self.of["train_targets"], self.of["eval_targets"]) >= self.min_judged_targets

    @property
    def rate_ratio(self) -> float:
        low, high = sorted((self.train_rate, self.eval_rate))
        return low / high if self.judged and high > 0 else NAN

    @property
    def rate_kl(self) -> float:
        """Divergence of the evaluation day's labels from the training days', in nats."""
        return kl(*(np.array([1 - rate, rate]) for rate in (self.train_rate, self.eval_rate))) if self.judged else NAN

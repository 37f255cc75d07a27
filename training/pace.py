"""How far a training is and how fast: a line every few seconds, and the figures over steps for MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Pace:
    """Follows one model's training on the first worker.

    Attributes:
        name: of the model.
        planned: steps of all its epochs.
        targets_a_step: of all workers, in the mean.
        device: of this worker.
        say: takes a line; log: takes figures, name -> value, and the step.
        clock: seconds.
    """

    name: str
    planned: int
    targets_a_step: float
    device: str
    say: Callable[[str], None]
    log: Callable[[Mapping[str, float], int], None]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._step, self._time = -1, 0.0  # of the last line; the first step, which prepares much, is not counted

    def at(self, step: int) -> None:
        """Take note of a step that was taken."""
        now = self.clock()
        if self._step < 0:
            self._step, self._time = step, now
        if now - self._time < SECONDS_BETWEEN_LINES:
            return
        rate = (step - self._step) / (now - self._time)
        self._step, self._time = step, now
        figures = {"steps_per_s": rate, "targets_per_s": rate * self.targets_a_step}
        line = (
            f"{self.name} step {step:,} of {self.planned:,}  {rate:.3g} steps/s"
            f"  {figures['targets_per_s']:,.0f} targets/s  at most {(self.planned - step) / rate:,.0f} s left"
        )
        if torch.device(self.device).type == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            line += f"  peak {figures['peak_gib']:.1f} GiB"
        self.say(line)
        self.log({f"{self.name}/{key}": value for key, value in figures.items()}, step)

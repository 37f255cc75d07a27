"""How far a training is and how fast: a line every few seconds, and the figures over steps for MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from training.loop import Taken

SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Pace:
    """Follows one model's training on the first worker.

    Attributes:
        name: of the model.
        planned: steps of all its epochs.
        device: of this worker.
        say: takes a line; log: takes figures, name -> value, and the step.
        clock: seconds.
    """

    name: str
    planned: int
    device: str
    say: Callable[[str], None]
    log: Callable[[Mapping[str, float], int], None]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._last: tuple[int, float, Taken] | None = None  # step, time and sums of the last line

    def at(self, step: int, taken: Callable[[], Taken]) -> None:
        """Take note of a step that was taken; the device is waited for at a line alone.

        Args:
            taken: returns what all steps so far came to.
        """
        if self._last is None:  # the first step, which prepares much, is not counted
            sums = taken()
            self._last = step, self.clock(), sums
            return
        before, since, old = self._last
        if self.clock() - since < SECONDS_BETWEEN_LINES:
            return
        new = taken()
        now = self.clock()  # of the device, too: its steps have ended
        self._last = step, now, new
        figures = _figures(step - before, now - since, Taken(*(b - a for a, b in zip(old, new, strict=True))))
        if torch.device(self.device).type == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.say(f"{self.name} step {step:,} of {self.planned:,}  {_words(figures, self.planned - step)}")
        self.log({f"{self.name}/{key}": value for key, value in figures.items()}, step)


def _figures(steps: int, seconds: float, taken: Taken) -> dict[str, float]:
    """Return the figures of some steps, name -> value.

    Args:
        taken: what these steps came to.
    """
    figures = {
        "loss": taken.loss / max(1.0, taken.targets),
        "steps_per_s": steps / seconds,
        "targets_per_s": taken.targets / seconds,
        "events_per_s": taken.events / seconds,
    }
    if taken.codebook_loss:
        figures["codebook_loss"] = taken.codebook_loss / max(1.0, taken.events)
    if on_device := taken.working_ms + taken.waiting_ms:
        figures["device_idle_share"] = taken.waiting_ms / on_device
        if taken.least_ms:
            figures["share_of_floor"] = taken.least_ms / on_device
    return figures


def _words(figures: Mapping[str, float], steps_left: int) -> str:
    line = (
        f"loss {figures['loss']:.4f}  {figures['steps_per_s']:.3g} steps/s  {figures['targets_per_s']:,.0f} targets/s"
        f"  {figures['events_per_s']:,.0f} events/s  at most {steps_left / figures['steps_per_s']:,.0f} s left"
    )
    if "device_idle_share" in figures:
        line += f"  device idle {figures['device_idle_share']:.1%}"
    if "share_of_floor" in figures:
        line += f"  {figures['share_of_floor']:.1%} of the floor"
    return line + (f"  peak {figures['peak_gib']:.1f} GiB" if "peak_gib" in figures else "")

"""How long a CUDA device works in steps, and how long it waits between them for what the host sends next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A moment of a device's stream, as torch.cuda.Event."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Any) -> float: ...


def _event() -> Mark:
    return torch.cuda.Event(enable_timing=True)


class DeviceTime:
    """Milliseconds of the current device, by an event before and one behind each step: it is never waited for.

    Between the two a device works, or waits for a launch of the same step, which counts as work: nothing of it where a
    step is one recorded launch. From the end of a step to the begin of the next one it waits, or is sent the table of a
    recorded step, some 15 us.
    """

    def __init__(self, event: Callable[[], Mark] = _event) -> None:
        self._event = event
        self._begun: Mark | None = None
        self._ended: Mark | None = None  # of the step before
        self._passing: deque[tuple[Mark | None, Mark, Mark]] = deque()  # end of the step before, begin, end
        self._working_ms = self._waiting_ms = 0.0

    def begin(self) -> None:
        """Note that the first launch of a step follows, and that the host has nothing else to do before it."""
        self._begun = self._event()
        self._begun.record()

    def end(self) -> None:
        """Note that the last launch of the step was the one before."""
        ended = self._event()
        ended.record()
        assert self._begun is not None
        self._passing.append((self._ended, self._begun, ended))
        self._ended = ended
        self._read()

    def pause(self) -> None:
        """Count nothing until the next step begins: no step is what the host is at."""
        self._ended = None

    def spent_ms(self) -> tuple[float, float]:
        """Return what the steps that have passed took of the device, and how long it waited between them."""
        self._read()
        return self._working_ms, self._waiting_ms

    def _read(self) -> None:
        while self._passing and self._passing[0][2].query():
            before, begun, ended = self._passing.popleft()
            self._working_ms += begun.elapsed_time(ended)
            if before is not None:
                self._waiting_ms += before.elapsed_time(begun)

"""Waiting in tests: for something that happens, never for a time to pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 600  # ends a test that hangs; no test is about how long anything takes


def wait_for(what: str, found: Callable[[], T], seconds: float = PATIENCE_S, every: float = 0.1) -> T:
    """Return the first true value of `found`.

    Raises:
        AssertionError: there was none within `seconds`.
    """
    end = time.monotonic() + seconds
    while not (result := found()):
        if time.monotonic() > end:
            raise AssertionError(f"no {what} within {seconds} s")
        time.sleep(every)
    return result

"""How many workers a training takes: `2`, or `1:4` for as many of one to four as there is room for."""

from __future__ import annotations

import re

MOST_WORKERS = 64
_ONE = "([1-9]|[1-5][0-9]|6[0-4])"
WORKERS_PATTERN = rf"^{_ONE}(:{_ONE})?$(?!\n)"
WORKERS_ALLOWED = f"a whole number from 1 to {MOST_WORKERS}, or two of them, MIN:MAX"


def worker_range(given: int | str) -> tuple[int, int]:
    """Return the fewest and the most workers.

    Raises:
        ValueError: it is no such number or range; says what is allowed.
    """
    if not re.match(WORKERS_PATTERN, str(given)):
        raise ValueError(f"{given} is not {WORKERS_ALLOWED}")
    least, _, most = str(given).partition(":")
    if int(least) > int(most or least):
        raise ValueError(f"{given} is not {WORKERS_ALLOWED}: the first is greater than the second")
    return int(least), int(most or least)

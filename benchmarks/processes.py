"""Memory and processor time of a process and all below it, from /proc."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

SAMPLE_SECONDS = 0.2


def tree(root: int) -> tuple[int, float]:
    """Return the resident bytes of a process and all its descendants, and the processor seconds that they have used.

    Shared pages count for each process. Children that have ended count by what their parents have inherited from them.
    """
    parent: dict[int, int] = {}
    pages: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile
                fields = Path(entry.path, "stat").read_text().rpartition(") ")[2].split()
                pid = int(entry.name)
                parent[pid], pages[pid], ticks[pid] = int(fields[1]), int(fields[21]), sum(map(int, fields[11:15]))
    children: dict[int, list[int]] = {}
    for child, above in parent.items():
        children.setdefault(above, []).append(child)
    rss, used, waiting = 0, 0, [root]
    while waiting:
        pid = waiting.pop()
        rss, used = rss + pages.get(pid, 0), used + ticks.get(pid, 0)
        waiting += children.get(pid, [])
    return rss * os.sysconf("SC_PAGE_SIZE"), used / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def peak_rss(pid: int) -> Iterator[list[int]]:
    """Sample the memory of a process and all below it; the list holds the largest sum so far."""
    peak, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], tree(pid)[0])

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()

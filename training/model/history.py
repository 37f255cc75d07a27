"""A batch as attention reads it: the histories of all users and their targets, flat and typed.

Legend: U users, N distinct items of the batch, E events (flat over users), T targets (flat), S width of an item's
static embedding, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from training.model.fused import Work, on_device
from training.model.fused_codes import CodeWork
from training.model.fused_rows import Places


@dataclass(frozen=True)
class Items:
    """The distinct items of a batch, those of events and of targets.

    Attributes:
        static_NS: float, the embedded static fields of each item.
        rows: field name -> int64 [N], or [N, k] of a field with several values: the embedding rows; 0 is "missing".
        kinds: field name -> id, category, categories or number.
    """

    static_NS: Tensor
    rows: dict[str, Tensor]
    kinds: dict[str, str]


@dataclass(frozen=True)
class Events:
    """The histories of U users, one after another; those of a user are sorted by time.

    Attributes:
        item_E: int64, position of the event's item among the N items.
        value_EHd: float, what attention mixes: the item's part and what the user did with it.
        time_ms_E: int64, milliseconds since the epoch.
        start: U + 1 offsets; user u has the events start[u] to start[u + 1].
        by_item: the same items, once ordered for all that is summed by item.
        weight_E: float, 0 for an event that no statistic may count; None: all count.
        work, codes: what the pass over events and the one over codes work on, if that is on the device already.
    """

    item_E: Tensor
    value_EHd: Tensor
    time_ms_E: Tensor
    start: list[int]
    by_item: Places | None = None
    weight_E: Tensor | None = None
    work: Work | None = None
    codes: CodeWork | None = None

    def of(self, events: slice) -> Events:
        """Return some events of one user, as a batch of that user alone."""
        time_ms_L = self.time_ms_E[events]
        return Events(self.item_E[events], self.value_EHd[events], time_ms_L, [0, len(time_ms_L)])


@dataclass(frozen=True)
class Targets:
    """The items to be scored, those of a user together; each sees the events [first, end) of its user.

    Attributes:
        item_T: int64, position of the target's item among the N items.
        time_ms_T: int64, milliseconds since the epoch; no visible event is later, clock skew aside.
        first_T, end_T: int64, counted from the user's first event of the batch.
        start: U + 1 offsets; user u has the targets start[u] to start[u + 1].
        cut_offs: distinct `end_T` of each user, [U].
        shared_from: the largest `first_T` of each user, [U]: from there on all targets of the user see the events.
        label_T: float, for auxiliary losses alone, no interest may depend on it; None where nothing is trained.
    """

    item_T: Tensor
    time_ms_T: Tensor
    first_T: Tensor
    end_T: Tensor
    start: list[int]
    cut_offs: list[int]
    shared_from: list[int]
    label_T: Tensor | None = None

    @cached_property
    def by_item(self) -> Places:
        """The items, once ordered for all that is summed by item."""
        return Places(self.item_T)

    @property
    def bound_T(self) -> Tensor | None:
        """`first_T`, or None where every target sees its user's events from the first on, which saves a mask."""
        return self.first_T if any(self.shared_from) else None


def begin_of_users(event_start: list[int], target_start: list[int], device: torch.device) -> Tensor:
    """Return the place among the E events of the first one of each target's user, int64 [T].

    What a target sees are the places `begin + first_T` to `begin + end_T - 1`.

    Args:
        event_start, target_start: `Events.start` and `Targets.start`.
    """
    return on_device(np.repeat(np.asarray(event_start[:-1], np.int64), np.diff(target_start)), device)


def each_user(events: Events, targets: Targets) -> Iterator[tuple[Events, Targets, slice]]:
    """Yield one user after another, as a batch of that user alone, and the place of the user's targets."""
    for user, (event, target) in enumerate(zip(pairwise(events.start), pairwise(targets.start), strict=True)):
        mine, rows = slice(*event), slice(*target)
        yield (
            events.of(mine),
            Targets(
                targets.item_T[rows],
                targets.time_ms_T[rows],
                targets.first_T[rows],
                targets.end_T[rows],
                [0, target[1] - target[0]],
                [targets.cut_offs[user]],
                [targets.shared_from[user]],
            ),
            rows,
        )


def one_user(
    value_LHd: Tensor, event_time_ms_L: Tensor, target_time_ms_T: Tensor, end_T: Tensor, first_T: Tensor | None = None
) -> tuple[Events, Targets]:
    """Return the batch of one user, for what reads keys and queries that are already each event's and each target's."""
    item_L, item_T = torch.zeros_like(event_time_ms_L), torch.zeros_like(end_T)
    shared_from = 0 if first_T is None or not len(first_T) else int(first_T.max())
    first_T = torch.zeros_like(end_T) if first_T is None else first_T
    cut_offs = [len(end_T.unique())]
    return (
        Events(item_L, value_LHd, event_time_ms_L, [0, len(item_L)]),
        Targets(item_T, target_time_ms_T, first_T, end_T, [0, len(item_T)], cut_offs, [shared_from]),
    )

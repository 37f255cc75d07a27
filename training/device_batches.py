"""Batches gathered where the rows lie: a rank's joined rows live in a device's memory, the host sends a small table.

What a batch holds is known on the host (users, and positions of targets: `Chosen`); its rows are read on the device,
which is never waited for. Contents and order are those of `training.data.make_batch`.

Legend: U users, E events (flat), T targets (flat), N distinct items.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from training.data import Batch, Chosen, Joined, Padding
from training.model import fused
from training.model.fused import on_device
from training.vocabulary import ItemFeatures

T = TypeVar("T")
LARGEST_SHARE = 0.5  # of a GPU's free memory that rows may take: the rest is the model's and its steps'
EVENT_BYTES, TARGET_BYTES, FIELD_BYTES = 14, 25, 4


@dataclass(frozen=True)
class Sizes:
    """How many users, events and targets a batch has, padding included."""

    users: int
    events: int
    targets: int

    @staticmethod
    def of(chosen: Chosen) -> Sizes:
        return Sizes(len(chosen.users), int(chosen.event_start[-1]), len(chosen.target))

    @property
    def lengths(self) -> list[int]:
        """Lengths of the parts of `table_of`."""
        return [4, self.users + 1, self.users + 1, self.users, self.users, self.users, self.targets]


def table_of(chosen: Chosen, counts: np.ndarray) -> list[np.ndarray]:
    """Return all that the device gets of a batch, int64: counts, offsets, and what to read.

    Args:
        counts: int64 [4], as `training.data.Padding` has them.
    """
    where = [chosen.source, chosen.first, chosen.users, chosen.target]
    return [counts, chosen.event_start, chosen.target_start, *where]


class Read(NamedTuple):
    """The rows of a batch's E events and T targets, int64 but for labels and weights, float32.

    Attributes:
        item_R: [E + T]; interaction_E, event_time_ms_E: [E].
        target_time_ms_T, context_T, label_T, first_T, end_T: [T]; the bounds count from the user's first event.
        user_T: of each target.
        padding: if a part of the batch does not count: weights of events and targets, 1 or 0, and the place among the
            E events of the first one of each target's user.
    """

    item_R: Tensor
    interaction_E: Tensor
    event_time_ms_E: Tensor
    target_time_ms_T: Tensor
    context_T: Tensor
    label_T: Tensor
    first_T: Tensor
    end_T: Tensor
    user_T: Tensor
    padding: tuple[Tensor, Tensor, Tensor] | None = None


class DeviceRows:
    """Joined rows in a device's memory: 14 bytes an event, 25 a target, 4 a field of an item or a user.

    Attributes:
        nbytes: of the device's memory.
    """

    def __init__(self, joined: Joined, device: torch.device) -> None:
        self.joined, self.device = joined, device
        rows, (int16, int32, int64) = joined.sequences, (np.int16, np.int32, np.int64)

        def resident(array: np.ndarray, dtype: type) -> Tensor:
            some = array.astype(dtype) if len(array) else np.zeros((1, *array.shape[1:]), dtype)  # padding reads a row
            return torch.from_numpy(np.ascontiguousarray(some)).to(device)

        self.items = ItemFeatures({name: resident(column, int32) for name, column in joined.items.rows.items()})
        self.user_rows = resident(joined.user_rows, int32)
        self.history_item, self.history_time_ms = (
            resident(rows.history_item, int32),
            resident(rows.history_time_ms, int64),
        )
        self.history_interaction = resident(rows.history_interaction, int16)
        self.target_item, self.target_time_ms = resident(rows.target_item, int32), resident(rows.target_time_ms, int64)
        self.target_context, self.target_label = (
            resident(joined.context_row, int32),
            resident(rows.target_label, np.int8),
        )
        self.target_first, self.target_end = resident(rows.target_first, int32), resident(rows.target_end, int32)
        self._read_rows: Callable[[DeviceRows, list[Tensor], Sizes, bool], Read] = read_rows
        if fused.available(torch.empty(0, 1, device=device)):
            from training import batch_kernels

            self._read_rows = batch_kernels.read_rows
        held = [value for value in vars(self).values() if isinstance(value, Tensor)]
        self.nbytes = sum(tensor.nbytes for tensor in [*held, *self.items.rows.values()])

    @staticmethod
    def where_they_fit(joined: Joined, device: torch.device) -> DeviceRows | None:
        """Return the rows on a GPU; None on a CPU, and if they would take more than half of a GPU's free memory."""
        if device.type != "cuda":
            return None
        fields = sum(rows.size for rows in joined.items.rows.values()) + joined.user_rows.size
        events, targets = len(joined.sequences.history_item), len(joined.sequences.target_item)
        wanted = EVENT_BYTES * events + TARGET_BYTES * targets + FIELD_BYTES * fields
        return DeviceRows(joined, device) if wanted < LARGEST_SHARE * torch.cuda.mem_get_info(device)[0] else None

    def make_batch(self, users: np.ndarray, targets: list[np.ndarray]) -> Batch:
        """Return the batch of `training.data.make_batch`, on the device; nothing may read some of its N items."""
        return self.batch_of(Chosen.of(self.joined.sequences, users, targets))

    def batch_of(self, chosen: Chosen) -> Batch:
        """Return the batch of what was chosen, as `make_batch` does."""
        sizes = Sizes.of(chosen)
        counts = np.array([sizes.targets, sizes.events] * 2, np.int64)
        table = on_device(np.concatenate(table_of(chosen, counts)), self.device)
        return self.gathered(table, sizes, lists_of(chosen))

    def gathered(self, table: Tensor, sizes: Sizes, lists: dict[str, Any], padded: bool = False) -> Batch:
        """Gather the batch of a `table_of`, which the host does not read.

        Args:
            lists: the fields of `Batch` that are lists.
            padded: a part of the batch does not count.
        """
        parts = list(table.split(sizes.lengths))
        read = self._read_rows(self, parts, sizes, padded)
        items, place_R = self._distinct(read.item_R)
        return Batch(
            items=items,
            event_item=place_R[: sizes.events],
            event_interaction=read.interaction_E,
            event_time_ms=read.event_time_ms_E,
            target_item=place_R[sizes.events :],
            target_time_ms=read.target_time_ms_T,
            target_context=read.context_T,
            target_first=read.first_T,
            target_end=read.end_T,
            target_label=read.label_T,
            user_rows=self.user_rows[read.user_T].long(),
            padding=None if read.padding is None else Padding(parts[0].float(), *read.padding),
            **lists,
        )

    def _distinct(self, read_R: Tensor) -> tuple[ItemFeatures, Tensor]:
        """Return features of items in their order, those that are read among them, and the place of each that is read.

        All items of the partition, if they are no more than what is read; else as many as are read, of which those
        behind the distinct ones are read by nothing.
        """
        items = self.joined.items.count
        if items <= len(read_R):
            return self.items, read_R
        is_read = torch.zeros(items, dtype=torch.int8, device=self.device)
        is_read.index_fill_(0, read_R, 1)  # an assignment would copy its 1 from the host, which no recording may
        rank = is_read.cumsum(0, dtype=torch.int32)
        wanted_N = torch.arange(1, len(read_R) + 1, dtype=torch.int32, device=self.device)
        item_N = torch.searchsorted(rank, wanted_N).clamp(max=items - 1)
        return self.items.take(item_N), rank[read_R].long() - 1


def read_rows(rows: DeviceRows, parts: list[Tensor], sizes: Sizes, padded: bool) -> Read:
    """Read the rows of a batch; `training.batch_kernels` does the same on a GPU.

    Args:
        parts: of a `table_of`.
        padded: a part of the batch does not count.
    """
    count, event_start, target_start, source, first, user, target = parts
    place_E, place_T = (torch.arange(size, device=target.device) for size in (sizes.events, sizes.targets))
    user_E, user_T = (
        torch.searchsorted(start[1:], place, right=True)
        for start, place in ((event_start, place_E), (target_start, place_T))
    )
    source_E = place_E + (source - event_start[:-1])[user_E]
    first_T, end_T = (held[target].long() - first[user_T] for held in (rows.target_first, rows.target_end))
    padding = None
    if padded:
        source_E = source_E.clamp(max=len(rows.history_item) - 1)
        real_E, real_T = place_E < count[1], place_T < count[0]
        first_T, end_T = first_T * real_T, end_T * real_T
        padding = real_E.float(), real_T.float(), event_start[user_T]
    return Read(
        torch.cat([rows.history_item[source_E], rows.target_item[target]]).long(),
        rows.history_interaction[source_E].long(),
        rows.history_time_ms[source_E],
        rows.target_time_ms[target],
        rows.target_context[target].long(),
        rows.target_label[target].float(),
        first_T,
        end_T,
        user[user_T],
        padding,
    )


def lists_of(chosen: Chosen) -> dict[str, list[int]]:
    """Return the fields of `Batch` that are lists."""
    return {name: getattr(chosen, name).tolist() for name in ("event_start", "target_start", "cut_offs", "shared_from")}


def ahead(make: Callable[[int], T], numbers: Iterable[int], most: int) -> Iterator[T]:
    """Yield `make` of every number in turn, made by another thread, so many before they are asked for."""
    with ThreadPoolExecutor(1, "batches") as thread:
        waiting: deque[Future[T]] = deque()
        for number in numbers:
            waiting.append(thread.submit(make, number))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

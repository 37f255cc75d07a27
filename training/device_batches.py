"""Batches gathered on the device: a rank's joined rows live in its memory, and the host sends a small table of what to
read. Where they do not fit, the rows of a batch travel with its table.

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

P = TypeVar("P")
T = TypeVar("T")
LARGEST_SHARE = 0.5  # of a GPU's free memory that rows may take: the rest is the model's and its steps'
_INT64, _INT32 = np.dtype(np.int64), np.dtype(np.int32)
OF_EVENTS: dict[str, np.dtype] = {
    "history_time_ms": _INT64,
    "history_item": _INT32,
    "history_interaction": np.dtype(np.int16),
}
OF_TARGETS: dict[str, np.dtype] = {
    "target_time_ms": _INT64,
    "target_item": _INT32,
    "target_context": _INT32,
    "target_first": _INT32,
    "target_end": _INT32,
    "target_label": np.dtype(np.int8),
}
COLUMNS = OF_EVENTS | OF_TARGETS
EVENT_BYTES, TARGET_BYTES = (sum(kind.itemsize for kind in of.values()) for of in (OF_EVENTS, OF_TARGETS))
FIELD_BYTES, WORD = 4, 8  # of a field of an item or a user; of an int64, which tables are made of


@dataclass(frozen=True)
class Sizes:
    """How many users, events and targets a batch has, padding included."""

    users: int
    events: int
    targets: int

    @staticmethod
    def of(chosen: Chosen) -> Sizes:
        return Sizes(len(chosen.users), int(chosen.event_start[-1]), len(chosen.target))

    def rows_of(self, column: str) -> int:
        """Return how many rows a column of `COLUMNS` has."""
        return self.events if column in OF_EVENTS else self.targets


class Asked(NamedTuple):
    """What the host makes of a batch as it is: its size, its table, and the fields of `Batch` that are lists."""

    sizes: Sizes
    table: np.ndarray
    lists: dict[str, Any]


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
    """Joined rows whose batches are gathered on a device: 14 bytes an event, 25 a target, 4 a field of an item or a
    user.

    Attributes:
        resident: all rows lie in the device's memory; otherwise those of a batch, of its events and targets, travel
            with its table.
        columns: of the events and targets, where they are resident.
        nbytes: of the device's memory.
    """

    def __init__(self, joined: Joined, device: torch.device, resident: bool = True) -> None:
        self.joined, self.device, self.resident = joined, device, resident

        def there(array: np.ndarray, dtype: np.dtype) -> Tensor:
            some = array.astype(dtype) if len(array) else np.zeros((1, *array.shape[1:]), dtype)  # padding reads a row
            return torch.from_numpy(np.ascontiguousarray(some)).to(device)

        self.items = ItemFeatures({name: there(column, _INT32) for name, column in joined.items.rows.items()})
        self.user_rows = there(joined.user_rows, _INT32)
        kinds = COLUMNS if resident else {}
        self.columns = {name: there(column_of(joined, name), kind) for name, kind in kinds.items()}
        self._read_rows: Callable[[dict[str, Tensor], list[Tensor], Sizes, bool], Read] = read_rows
        if fused.available(torch.empty(0, 1, device=device)):
            from training import batch_kernels

            self._read_rows = batch_kernels.read_rows
        held = [self.user_rows, *self.columns.values(), *self.items.rows.values()]
        self.nbytes = sum(tensor.nbytes for tensor in held)

    @staticmethod
    def on_gpu(joined: Joined, device: torch.device) -> DeviceRows | None:
        """Return the rows on a GPU, resident unless they took more than half of its free memory; None on a CPU."""
        if device.type != "cuda":
            return None
        return DeviceRows(joined, device, fit(joined, torch.cuda.mem_get_info(device)[0]))

    def lengths(self, sizes: Sizes) -> list[int]:
        """Return the lengths of the parts of `table_of`."""
        users, targets = sizes.users, sizes.targets
        of_columns = [_words_of(sizes.rows_of(name), kind) for name, kind in COLUMNS.items()]
        return [4, users + 1, users + 1, users, users, users, targets, *([] if self.resident else of_columns)]

    def table_of(self, chosen: Chosen, counts: np.ndarray) -> list[np.ndarray]:
        """Return all that the device gets of a batch, int64: counts, offsets, what to read, and the rows themselves
        where they are not resident.

        Args:
            chosen: padded or not.
            counts: int64 [4], as `training.data.Padding` has them.
        """
        source, target = chosen.source, chosen.target
        columns: list[np.ndarray] = []
        if not self.resident:
            columns = _words(self.joined, chosen, *counts[:2].tolist())
            source, target = chosen.event_start[:-1], np.arange(len(target))
        return [counts, chosen.event_start, chosen.target_start, source, chosen.first, chosen.users, target, *columns]

    def parts(self, table: Tensor, sizes: Sizes) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the columns that a batch reads, and the parts of its table that say what."""
        parts = list(table.split(self.lengths(sizes)))
        said = len(parts) if self.resident else len(parts) - len(COLUMNS)
        return self.columns if self.resident else _columns(parts[said:], sizes), parts[:said]

    def make_batch(self, users: np.ndarray, targets: list[np.ndarray]) -> Batch:
        """Return the batch of `training.data.make_batch`, on the device; nothing may read some of its N items."""
        return self.batch_of(Chosen.of(self.joined.sequences, users, targets))

    def batch_of(self, chosen: Chosen) -> Batch:
        """Return the batch of what was chosen, as `make_batch` does."""
        asked = self.asked(chosen)
        return self.gathered(on_device(asked.table, self.device), asked.sizes, asked.lists)

    def asked(self, chosen: Chosen) -> Asked:
        """Return the host's part of `batch_of`."""
        sizes = Sizes.of(chosen)
        counts = np.array([sizes.targets, sizes.events] * 2, np.int64)
        return Asked(sizes, np.concatenate(self.table_of(chosen, counts)), lists_of(chosen))

    def gathered(self, table: Tensor, sizes: Sizes, lists: dict[str, Any], padded: bool = False) -> Batch:
        """Gather the batch of a `table_of`, which the host does not read.

        Args:
            lists: the fields of `Batch` that are lists.
            padded: a part of the batch does not count.
        """
        columns, parts = self.parts(table, sizes)
        read = self._read_rows(columns, parts, sizes, padded)
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


def fit(joined: Joined, free_bytes: int) -> bool:
    """Return whether rows are resident on a GPU with so much free memory."""
    fields = sum(rows.size for rows in joined.items.rows.values()) + joined.user_rows.size
    events, targets = len(joined.sequences.history_item), len(joined.sequences.target_item)
    return EVENT_BYTES * events + TARGET_BYTES * targets + FIELD_BYTES * fields < LARGEST_SHARE * free_bytes


def column_of(joined: Joined, name: str) -> np.ndarray:
    """Return a column of the events or targets of joined rows."""
    return joined.context_row if name == "target_context" else getattr(joined.sequences, name)


def _words_of(numbers: int, kind: np.dtype) -> int:
    return -(-numbers * kind.itemsize // WORD)


def _words(joined: Joined, chosen: Chosen, targets: int, events: int) -> list[np.ndarray]:
    """Return the columns of a batch's rows, padding included, as int64 words.

    Args:
        targets, events: of the batch; those behind them are padding, zeros.
    """
    ends_U = chosen.source + np.diff(np.minimum(chosen.event_start, events))
    parts = [slice(*ends) for ends in zip(chosen.source.tolist(), ends_U.tolist(), strict=True)]
    found, sizes = [], Sizes.of(chosen)
    for name, kind in COLUMNS.items():
        column, words = column_of(joined, name), np.zeros(_words_of(sizes.rows_of(name), kind), _INT64)
        rows = words.view(kind)
        if name not in OF_EVENTS:
            rows[:targets] = column[chosen.target[:targets]]
        elif parts:
            np.concatenate([column[part] for part in parts], out=rows[:events], casting="same_kind")
        found.append(words)
    return found


def _columns(words: list[Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Return the columns that `_words` packed; one row at least, which padding reads."""
    found = {}
    for part, (name, kind) in zip(words, COLUMNS.items(), strict=True):
        count = sizes.rows_of(name)
        column = part.view(torch.from_numpy(np.empty(0, kind)).dtype)
        found[name] = column[:count] if count else column.new_zeros(1)
    return found


def read_rows(columns: dict[str, Tensor], parts: list[Tensor], sizes: Sizes, padded: bool) -> Read:
    """Read the rows of a batch; `training.batch_kernels` does the same on a GPU.

    Args:
        columns: of the rows, `COLUMNS`.
        parts: of a `DeviceRows.table_of`, without rows.
        padded: a part of the batch does not count.
    """
    count, event_start, target_start, source, first, user, target = parts
    place_E, place_T = (torch.arange(size, device=target.device) for size in (sizes.events, sizes.targets))
    user_E, user_T = (
        torch.searchsorted(start[1:], place, right=True)
        for start, place in ((event_start, place_E), (target_start, place_T))
    )
    source_E = place_E + (source - event_start[:-1])[user_E]
    first_T, end_T = (held[target].long() - first[user_T] for held in (columns["target_first"], columns["target_end"]))
    padding = None
    if padded:
        source_E = source_E.clamp(max=len(columns["history_item"]) - 1)
        real_E, real_T = place_E < count[1], place_T < count[0]
        first_T, end_T = first_T * real_T, end_T * real_T
        padding = real_E.float(), real_T.float(), event_start[user_T]
    return Read(
        torch.cat([columns["history_item"][source_E], columns["target_item"][target]]).long(),
        columns["history_interaction"][source_E].long(),
        columns["history_time_ms"][source_E],
        columns["target_time_ms"][target],
        columns["target_context"][target].long(),
        columns["target_label"][target].float(),
        first_T,
        end_T,
        user[user_T],
        padding,
    )


def lists_of(chosen: Chosen) -> dict[str, list[int]]:
    """Return the fields of `Batch` that are lists."""
    return {name: getattr(chosen, name).tolist() for name in ("event_start", "target_start", "cut_offs", "shared_from")}


def ahead(make: Callable[[P], T], places: Iterable[P], most: int) -> Iterator[T]:
    """Yield `make` of every place in turn, made by another thread, so many before they are asked for."""
    thread = ThreadPoolExecutor(1, "batches")
    try:
        waiting: deque[Future[T]] = deque()
        for place in places:
            waiting.append(thread.submit(make, place))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)

"""What a partition's items are measured by: the facts that the records of `etl.metrics.sequences` ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from etl.quality.measure.events import value_shares


@dataclass(frozen=True)
class ItemsFacts:
    """The items of a partition.

    Attributes:
        table: its items with their fields.
        without_fields: items of which no field is known, as its manifest counts them.
        vocabularies: item fields whose values are categories.
        described: there are item files that should describe them.
        event_days: days of the window that have events.
    """

    table: pa.Table
    without_fields: int
    vocabularies: Sequence[str]
    described: bool
    event_days: int

    @property
    def rows(self) -> int:
        return self.table.num_rows

    @property
    def never_trained(self) -> int:
        return int((self.table["train_occurrences"].to_numpy() == 0).sum())

    @property
    def vocabulary_shares(self) -> dict[str, float]:
        shares = (value_shares(field, self.table[field]) for field in self.vocabularies)
        return {name: value for of_field in shares for name, value in of_field.items()}

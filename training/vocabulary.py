"""The model's own ids: which embedding row an item, an author, a category or a field value has.

A partition's `item_index` is the data's business; the vocabulary travels with the checkpoint. It is joined to a
partition once per item (a few small integer arrays), never once per event. Row 0 of every field is "missing or unseen".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from training.config import VocabularyConfig

Array = Any  # a numpy array from the reader; a torch tensor once `Batch.to` moved it
MAX_CATEGORIES = 3
DURATION_EDGES_MS = (1, 3_000, 7_000, 12_000, 18_000, 30_000, 60_000, 120_000, 300_000)
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class ItemFeatures:
    """Embedding rows of the N items of a partition (or of a request), joined once.

    Attributes:
        id_row, author_row, duration_bucket, type_row, upload_row: int64 [N].
        category_rows: int64 [N, MAX_CATEGORIES], 0 = none.
    """

    id_row: Array
    author_row: Array
    category_rows: Array
    duration_bucket: Array
    type_row: Array
    upload_row: Array

    def take(self, index: np.ndarray) -> ItemFeatures:
        return ItemFeatures(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class IdField:
    """Rows of an id field: 0 missing, 1..hashed_rows shared by rare and new ids, then one row per frequent id."""

    ids: np.ndarray  # int64 [V], sorted
    hashed_rows: int

    @property
    def rows(self) -> int:
        return 1 + self.hashed_rows + len(self.ids)

    def row_of(self, ids: np.ndarray, missing: np.ndarray | None = None) -> np.ndarray:
        """Return int64 rows for int64 ids."""
        hashed = 1 + ((ids.astype(np.uint64) * _HASH_MULTIPLIER >> np.uint64(33)) % np.uint64(self.hashed_rows)).astype(
            np.int64
        )
        if len(self.ids):
            position = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
            hashed = np.where(self.ids[position] == ids, 1 + self.hashed_rows + position, hashed)
        return hashed if missing is None else np.where(missing, 0, hashed)


@dataclass(frozen=True)
class Vocabulary:
    """All fields of one model, and the static fields of the items it knows (so that a request needs only raw ids)."""

    items: IdField
    authors: IdField
    categories: tuple[int, ...]
    item_types: tuple[str, ...]
    upload_types: tuple[str, ...]
    user_fields: tuple[tuple[str, ...], ...]
    known_items: pa.Table  # static columns of ITEMS, sorted by item_id

    @staticmethod
    def build(items: pa.Table, user_fields: list[np.ndarray], config: VocabularyConfig) -> Vocabulary:
        """Build from the partition's items and from the users' field values (one object array a field)."""
        ids = items["item_id"].to_numpy()
        counts = items["train_occurrences"].to_numpy()
        author_column = items["author_id"]
        has_author = ~author_column.is_null().to_numpy(zero_copy_only=False)
        authors, inverse = np.unique(author_column.fill_null(0).to_numpy()[has_author], return_inverse=True)
        author_counts = np.bincount(inverse, weights=counts[has_author], minlength=len(authors))
        flat = items["categories"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return Vocabulary(
            items=IdField(ids[counts >= config.min_occurrences], config.hashed_rows),
            authors=IdField(authors[author_counts >= config.min_occurrences], config.hashed_rows),
            categories=tuple(int(c) for c in np.unique(flat)),
            item_types=tuple(sorted({t for t in items["item_type"].to_pylist() if t})),
            upload_types=tuple(sorted({t for t in items["upload_type"].to_pylist() if t})),
            user_fields=tuple(tuple(sorted({str(v) for v in values if v})) for values in user_fields),
            known_items=items.select(["item_id", "author_id", "categories", "duration_ms", "item_type", "upload_type"]),
        )

    def item_features(self, items: pa.Table) -> ItemFeatures:
        """Join a table with the static columns of ITEMS to embedding rows."""
        n = items.num_rows
        author = items["author_id"]
        lists = items["categories"].combine_chunks()
        offsets = lists.offsets.to_numpy()
        flat = lists.values.to_numpy(zero_copy_only=False)
        lookup = np.array(self.categories, dtype=np.int64)
        rows = np.zeros((n, MAX_CATEGORIES), dtype=np.int64)
        for slot in range(MAX_CATEGORIES):
            position = offsets[:-1] + slot
            has = position < offsets[1:]
            value = flat[position[has]].astype(np.int64)
            if len(lookup) and len(value):
                found = np.minimum(np.searchsorted(lookup, value), len(lookup) - 1)
                rows[has, slot] = np.where(lookup[found] == value, 1 + found, 0)
        duration = items["duration_ms"].fill_null(0).to_numpy()
        return ItemFeatures(
            id_row=self.items.row_of(items["item_id"].to_numpy()),
            author_row=self.authors.row_of(
                author.fill_null(0).to_numpy(), author.is_null().to_numpy(zero_copy_only=False)
            ),
            category_rows=rows,
            duration_bucket=np.searchsorted(np.array(DURATION_EDGES_MS), duration, side="right").astype(np.int64),
            type_row=_rows_of(items["item_type"], self.item_types),
            upload_row=_rows_of(items["upload_type"], self.upload_types),
        )

    def item_table_of(self, item_ids: np.ndarray) -> pa.Table:
        """Return static columns for raw ids in their order; ids that the model never saw have nulls."""
        known = self.known_items["item_id"].to_numpy()
        position = np.minimum(np.searchsorted(known, item_ids), max(len(known) - 1, 0))
        found = known[position] == item_ids if len(known) else np.zeros(len(item_ids), dtype=bool)
        taken = self.known_items.take(pa.array(position, mask=~found))
        categories = [value if value is not None else [] for value in taken["categories"].to_pylist()]
        taken = taken.set_column(0, "item_id", pa.array(item_ids, pa.int64()))
        return taken.set_column(
            taken.schema.get_field_index("categories"), "categories", pa.array(categories, pa.list_(pa.int32()))
        )

    def user_rows(self, user_fields: list[list[str]]) -> np.ndarray:
        """Return int64 [U, F] rows of the users' field values."""
        lookups = [{value: 1 + row for row, value in enumerate(values)} for values in self.user_fields]
        rows = [[lookup.get(value, 0) for lookup, value in zip(lookups, user, strict=True)] for user in user_fields]
        return np.array(rows, dtype=np.int64).reshape(len(user_fields), len(lookups))

    def save(self, folder: Path) -> None:
        """Write `vocabulary.json` and `known_items.parquet`."""
        import pyarrow.parquet as pq

        small = {name: getattr(self, name) for name in ("categories", "item_types", "upload_types", "user_fields")}
        small |= {
            "items": self.items.ids.tolist(),
            "authors": self.authors.ids.tolist(),
            "hashed_rows": self.items.hashed_rows,
        }
        (folder / "vocabulary.json").write_text(json.dumps(small))
        pq.write_table(self.known_items, folder / "known_items.parquet", compression="zstd")

    @staticmethod
    def load(folder: Path) -> Vocabulary:
        import pyarrow.parquet as pq

        raw = json.loads((folder / "vocabulary.json").read_text())
        hashed = raw["hashed_rows"]
        return Vocabulary(
            items=IdField(np.array(raw["items"], dtype=np.int64), hashed),
            authors=IdField(np.array(raw["authors"], dtype=np.int64), hashed),
            categories=tuple(raw["categories"]),
            item_types=tuple(raw["item_types"]),
            upload_types=tuple(raw["upload_types"]),
            user_fields=tuple(tuple(values) for values in raw["user_fields"]),
            known_items=pq.read_table(folder / "known_items.parquet"),
        )


def _rows_of(column: pa.ChunkedArray, values: tuple[str, ...]) -> np.ndarray:
    import pyarrow.compute as pc

    found = pc.index_in(column, value_set=pa.array(values, pa.string()))
    return pc.add(found.fill_null(-1), 1).to_numpy().astype(np.int64)

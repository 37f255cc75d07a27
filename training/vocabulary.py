"""The model's own ids: which embedding row an item, an author, a category or a field value has.

A partition's `item_index` is the data's business; the vocabulary travels with the checkpoint. It is joined to a
partition once per item (a few small integer arrays), never once per event. Row 0 of every field is "missing or unseen";
a value that training days do not show is unseen. A field's kind is its Arrow type in `items`: int64 an id, string a
category, list<string> categories, float64 a number.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.stage.errors import StageError
from training.config import VocabularyConfig

Array = Any  # a numpy array from the reader; a torch tensor once `Batch.to` moved it
MAX_CATEGORIES = 6
NUMBER_BUCKETS = 16
NOT_FIELDS = ("item_index", "train_occurrences")
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def moved(value: Any, device: str) -> Any:
    """Return an array as a tensor on a device, which is not waited for; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    import torch

    from training.model.fused import on_device

    return on_device(np.ascontiguousarray(value), torch.device(device))


@dataclass(frozen=True)
class ItemFeatures:
    """Embedding rows of the N items of a partition (or of a request), joined once.

    Attributes:
        rows: field -> int64 [N]; of categories int64 [N, MAX_CATEGORIES], 0 = none. `item_id` comes first.
        vectors: field -> float32 [N, d], the rows themselves where this process does not have the whole table.
    """

    rows: dict[str, Array]
    vectors: dict[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(next(iter(self.rows.values())))

    @functools.cached_property
    def places(self) -> list[Any]:
        """`Places` of every field's rows, flattened: batches that share these items, tensors, share their order."""
        from training.model.fused_rows import Places

        return [Places(rows.flatten()) for rows in self.rows.values()]

    def take(self, index: Array) -> ItemFeatures:
        return ItemFeatures({name: rows[index] for name, rows in self.rows.items()})

    def to(self, device: str) -> ItemFeatures:
        """Return the same rows as tensors on `device`."""
        return ItemFeatures({name: moved(rows, device) for name, rows in self.rows.items()})


@dataclass(frozen=True)
class IdField:
    """Rows of an id field: 0 missing, 1..hashed_rows shared by rare and new ids, then one row per frequent id.

    Attributes:
        ids: int64 [V], sorted; row: int64 [V], the row of each: in order at first, appended ids take the rows behind.
    """

    ids: np.ndarray
    row: np.ndarray
    hashed_rows: int

    kind = "id"

    @staticmethod
    def of(ids: np.ndarray, hashed_rows: int) -> IdField:
        return IdField(ids, 1 + hashed_rows + np.arange(len(ids)), hashed_rows)

    @property
    def rows(self) -> int:
        return 1 + self.hashed_rows + len(self.ids)

    def appended(self, ids: np.ndarray) -> IdField:
        """Return the field with further ids, none of them twice; every known id keeps its row."""
        new = np.setdiff1d(ids, self.ids, assume_unique=True)
        joined, row = np.concatenate([self.ids, new]), np.concatenate([self.row, self.rows + np.arange(len(new))])
        order = np.argsort(joined)
        return IdField(joined[order], row[order], self.hashed_rows)

    def row_of(self, ids: np.ndarray, missing: np.ndarray | None = None) -> np.ndarray:
        """Return int64 rows for int64 ids."""
        mixed = (ids.astype(np.int64).view(np.uint64) * _HASH_MULTIPLIER) >> np.uint64(33)
        row = 1 + (mixed % np.uint64(self.hashed_rows)).astype(np.int64)
        if len(self.ids):
            position = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
            row = np.where(self.ids[position] == ids, self.row[position], row)
        return row if missing is None else np.where(missing, 0, row)

    def is_hashed(self, row: np.ndarray) -> np.ndarray:
        """Return which rows are shared by rare and new ids."""
        return (row >= 1) & (row <= self.hashed_rows)


@dataclass(frozen=True)
class ValueField:
    """Rows of a category or of categories: value i has row 1 + i; appended values stand behind."""

    kind: str
    values: tuple[str, ...]

    @property
    def rows(self) -> int:
        return 1 + len(self.values)

    def appended(self, values: list[str]) -> ValueField:
        known = set(self.values)
        return replace(self, values=(*self.values, *sorted(value for value in set(values) - known if value)))

    def row_of(self, column: pa.ChunkedArray | pa.Array) -> np.ndarray:
        found = pc.index_in(column, value_set=pa.array(self.values, pa.string()))
        return pc.add(found.fill_null(-1), 1).to_numpy(zero_copy_only=False).astype(np.int64)

    def rows_of_lists(self, lists: pa.ListArray) -> np.ndarray:
        """Return int64 [N, MAX_CATEGORIES]; what stands behind is left out."""
        offsets = lists.offsets.to_numpy().astype(np.int64)
        flat = self.row_of(lists.values)
        rows = np.zeros((len(lists), MAX_CATEGORIES), dtype=np.int64)
        for slot in range(MAX_CATEGORIES):
            position = offsets[:-1] + slot
            has = position < offsets[1:]
            rows[has, slot] = flat[position[has]]
        return rows


@dataclass(frozen=True)
class NumberField:
    """Rows of a number: 0 missing, else 1 + the number of quantiles at or below it."""

    edges: tuple[float, ...]

    kind = "number"

    @property
    def rows(self) -> int:
        return 2 + len(self.edges)

    def row_of(self, column: pa.ChunkedArray | pa.Array) -> np.ndarray:
        values = column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
        return np.where(np.isnan(values), 0, 1 + np.searchsorted(np.array(self.edges), values, side="right"))


Field = IdField | ValueField | NumberField


@dataclass(frozen=True)
class Vocabulary:
    """All fields of one model, and the static fields of the items it knows (so that a request needs only raw ids).

    Attributes:
        items: field -> its rows, `item_id` first.
        user_fields: values of each user field, in the data set's order.
        contexts: request contexts of training targets.
        known_items: static columns of `items`, sorted by item_id.
    """

    items: dict[str, Field]
    user_fields: tuple[ValueField, ...]
    contexts: tuple[int, ...]
    known_items: pa.Table

    @staticmethod
    def build(
        items: pa.Table, user_fields: list[np.ndarray], contexts: np.ndarray, config: VocabularyConfig
    ) -> Vocabulary:
        """Build from the partition's items, the users' field values (one object array a field) and the contexts."""
        fields: dict[str, Field] = {}
        for name in items.column_names:
            if name not in NOT_FIELDS:
                fields[name] = _new_field(items[name], items["train_occurrences"].to_numpy(), config)
        return Vocabulary(
            items=fields,
            user_fields=tuple(ValueField("category", ()).appended([str(v) for v in values]) for values in user_fields),
            contexts=tuple(int(c) for c in np.unique(contexts)),
            known_items=items.select(list(fields)),
        )

    def appended(
        self, items: pa.Table, user_fields: list[np.ndarray], contexts: np.ndarray, config: VocabularyConfig
    ) -> Vocabulary:
        """Return the vocabulary with what a later partition brings; every row keeps its meaning (a warm start).

        Fields that the model does not know are left out; numbers keep their buckets.
        """
        later = Vocabulary.build(items, user_fields, contexts, config)
        fields: dict[str, Field] = {}
        for name, field in self.items.items():
            other = later.items.get(name)
            if isinstance(field, IdField) and isinstance(other, IdField):
                fields[name] = field.appended(other.ids)
            elif isinstance(field, ValueField) and isinstance(other, ValueField):
                fields[name] = field.appended(list(other.values))
            else:
                fields[name] = field
        users = tuple(
            field.appended(list(other.values)) for field, other in zip(self.user_fields, later.user_fields, strict=True)
        )
        contexts_now = (*self.contexts, *[c for c in later.contexts if c not in self.contexts])
        old = self.known_items.filter(
            pc.invert(pc.is_in(self.known_items["item_id"], value_set=items["item_id"].combine_chunks()))
        )
        known = pa.concat_tables([old, items.select(old.column_names)]).sort_by("item_id")
        return Vocabulary(fields, users, contexts_now, known)

    @property
    def item_ids(self) -> IdField:
        field = self.items["item_id"]
        assert isinstance(field, IdField)
        return field

    def item_features(self, items: pa.Table) -> ItemFeatures:
        """Join a table with the static columns of `items` to embedding rows.

        Raises:
            StageError: a field is not there.
        """
        rows = {}
        for name, field in self.items.items():
            if name not in items.column_names:
                raise StageError(
                    f"these items have no field {name}, which the model was trained with",
                    "score rows of the definition that it was trained with, or train it anew",
                )
            column = items[name]
            if isinstance(field, IdField):
                rows[name] = field.row_of(column.fill_null(0).to_numpy(), column.is_null().to_numpy())
            elif field.kind == "categories":
                assert isinstance(field, ValueField)
                rows[name] = field.rows_of_lists(column.combine_chunks())
            else:
                rows[name] = field.row_of(column)
        return ItemFeatures(rows)

    def item_table_of(self, item_ids: np.ndarray) -> pa.Table:
        """Return static columns for raw ids in their order; ids that the model never saw have nulls."""
        known = self.known_items["item_id"].to_numpy()
        position = np.minimum(np.searchsorted(known, item_ids), max(len(known) - 1, 0))
        found = known[position] == item_ids if len(known) else np.zeros(len(item_ids), dtype=bool)
        taken = self.known_items.take(pa.array(position, mask=~found)).combine_chunks()
        columns = {name: taken[name] for name in taken.column_names} | {"item_id": pa.array(item_ids, pa.int64())}
        for name, field in self.items.items():
            if field.kind == "categories":
                columns[name] = pc.coalesce(taken[name], pa.scalar([], taken[name].type))
        return pa.table(columns)

    def user_rows(self, user_fields: list[list[str]]) -> np.ndarray:
        """Return int64 [U, F] rows of the users' field values.

        Raises:
            StageError: the users have more or fewer fields than the model knows.
        """
        if other := {len(user) for user in user_fields} - {len(self.user_fields)}:
            raise StageError(
                f"these users have {other.pop()} fields, and the model was trained with {len(self.user_fields)}",
                "score rows of the definition that it was trained with, or train it anew",
            )
        lookups = [{value: 1 + row for row, value in enumerate(field.values)} for field in self.user_fields]
        rows = [[lookup.get(value, 0) for lookup, value in zip(lookups, user, strict=True)] for user in user_fields]
        return np.array(rows, dtype=np.int64).reshape(len(user_fields), len(lookups))

    def context_rows(self, contexts: np.ndarray) -> np.ndarray:
        """Return int64 rows of request contexts; 0 = unseen."""
        order = np.argsort(self.contexts)
        known = np.array(self.contexts, dtype=np.int64)[order]
        if not len(known):
            return np.zeros(len(contexts), np.int64)
        position = np.minimum(np.searchsorted(known, contexts), len(known) - 1)
        return np.where(known[position] == contexts, 1 + order[position], 0)

    def save(self, folder: Path) -> None:
        """Write `vocabulary.json` and `known_items.parquet`."""
        import pyarrow.parquet as pq

        (folder / "vocabulary.json").write_text(self._text())
        pq.write_table(self.known_items, folder / "known_items.parquet", compression="zstd")

    @property
    def digest(self) -> str:
        """Digest of which row everything has."""
        return hashlib.sha256(self._text().encode()).hexdigest()[:16]

    def _text(self) -> str:
        fields = {name: _to_json(field) for name, field in self.items.items()}
        return json.dumps(
            {"items": fields, "user_fields": [field.values for field in self.user_fields], "contexts": self.contexts}
        )

    @staticmethod
    def load(folder: Path) -> Vocabulary:
        import pyarrow.parquet as pq

        raw = json.loads((folder / "vocabulary.json").read_text())
        return Vocabulary(
            items={name: _from_json(field) for name, field in raw["items"].items()},
            user_fields=tuple(ValueField("category", tuple(values)) for values in raw["user_fields"]),
            contexts=tuple(raw["contexts"]),
            known_items=pq.read_table(folder / "known_items.parquet"),
        )


def _new_field(column: pa.ChunkedArray, train_occurrences: np.ndarray, config: VocabularyConfig) -> Field:
    """Return a field of what training days show.

    What the evaluation day alone has is as unseen as it will be in service.
    """
    trained = column.filter(pa.array(train_occurrences > 0))
    if pa.types.is_integer(column.type):
        known = ~column.is_null().to_numpy()
        ids, inverse = np.unique(column.fill_null(0).to_numpy()[known], return_inverse=True)
        counts = np.bincount(inverse, weights=train_occurrences[known], minlength=len(ids))
        return IdField.of(ids[counts >= config.min_occurrences], config.hashed_rows)
    if pa.types.is_list(column.type):
        return ValueField("categories", ()).appended(pc.unique(pc.list_flatten(trained)).to_pylist())
    if pa.types.is_floating(column.type):
        values = trained.drop_null().to_numpy()
        values = values[np.isfinite(values)]  # one "nan" in a file would leave no quantile
        quantiles = np.quantile(values, np.arange(1, NUMBER_BUCKETS) / NUMBER_BUCKETS) if len(values) else np.zeros(0)
        return NumberField(tuple(float(edge) for edge in np.unique(quantiles)))
    return ValueField("category", ()).appended(pc.unique(trained.drop_null()).to_pylist())


def _to_json(field: Field) -> dict[str, Any]:
    if isinstance(field, IdField):
        return {"kind": "id", "ids": field.ids.tolist(), "row": field.row.tolist(), "hashed_rows": field.hashed_rows}
    if isinstance(field, NumberField):
        return {"kind": "number", "edges": field.edges}
    return {"kind": field.kind, "values": field.values}


def _from_json(raw: dict[str, Any]) -> Field:
    if raw["kind"] == "id":
        return IdField(np.array(raw["ids"], dtype=np.int64), np.array(raw["row"], dtype=np.int64), raw["hashed_rows"])
    if raw["kind"] == "number":
        return NumberField(tuple(raw["edges"]))
    return ValueField(raw["kind"], tuple(raw["values"]))

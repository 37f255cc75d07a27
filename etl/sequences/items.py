"""Pure functions that make the rows of `items`: counts over the window, static fields from the log and from files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.datasets.definition import DatasetDefinition, FieldRule
from etl.ingest.raw import hashed_ids
from etl.stage.errors import StageError
from etl.warehouse.schemas import ITEMS, item_field_type, table_schema

EVALUATION_BEHIND_MS = 1 << 50  # moves any time of an evaluation day before all times of the other days
TABLE_ENTRIES_PER_EVENT = 8  # a table of all ids in a span may have so many; ids that are hashes span too far


def counted(events: pa.Table, first_evaluation_ms: int, fields: Mapping[str, FieldRule]) -> dict[str, pa.Table]:
    """Return what some events say of their items; `merged` joins such parts in any order.

    Returns:
        "": item_id, occurrences, train_occurrences (before `first_evaluation_ms`); and under each field's name:
        item_id, value, latest time of that value, evaluation days before all others: what they say of an item that
        training met does not count.
    """
    time_ms = events["event_time_ms"]
    early = pc.less(time_ms, first_evaluation_ms)
    order_ms = pc.if_else(early, time_ms, pc.subtract(time_ms, EVALUATION_BEHIND_MS))
    table = pa.table(
        {
            "item_id": events["item_id"],
            "occurrences": pa.array(np.ones(events.num_rows, np.int64)),
            "train_occurrences": early.cast(pa.int64()),
        }
    )
    parts = {"": table}
    for name in fields:
        known = pc.is_valid(events[name])
        parts[name] = pa.table({"item_id": events["item_id"], "value": events[name], "time_ms": order_ms}).filter(known)
    return merged([parts])


def merged(parts: list[dict[str, pa.Table]]) -> dict[str, pa.Table]:
    """Join parts of `counted`, sorted by item_id."""
    joined = {name: pa.concat_tables([part[name] for part in parts]) for name in parts[0]}
    result = {}
    for name, table in joined.items():
        if name == "":
            result[name] = _summed(table)
        else:
            latest = table.group_by(["item_id", "value"]).aggregate([("time_ms", "max")])
            result[name] = (
                latest.select(["item_id", "value", "time_ms_max"]).rename_columns(table.column_names).sort_by("item_id")
            )
    return result


def _summed(table: pa.Table) -> pa.Table:
    """Return the sums of each item, in item_id order; ids that lie close together are counted in one array."""
    item = table["item_id"].to_numpy()
    if not len(item) or int(item.max()) - int(item.min()) >= TABLE_ENTRIES_PER_EVENT * len(item):
        summed = table.group_by("item_id").aggregate([("occurrences", "sum"), ("train_occurrences", "sum")])
        return (
            summed.select(["item_id", "occurrences_sum", "train_occurrences_sum"])
            .rename_columns(table.column_names)
            .sort_by("item_id")
        )
    first = int(item.min())
    sums = [
        np.bincount(item - first, weights=table[name].to_numpy()).astype(np.int64)
        for name in ("occurrences", "train_occurrences")
    ]
    there = np.flatnonzero(sums[0])
    return pa.table({"item_id": there + first, "occurrences": sums[0][there], "train_occurrences": sums[1][there]})


def item_rows(
    counts: Mapping[str, pa.Table],
    files: list[pa.Table | None],
    definition: DatasetDefinition,
    source: str = "the raw folder",
) -> pa.Table:
    """Return rows with the ITEMS schema and the data set's fields: every counted item in item_id order.

    Args:
        counts: what `merged` returned.
        files: the item files as text, in the definition's order; None where there is none. The first row of an item
            counts.
        source: what messages call their place.

    Raises:
        StageError: an id or a number of a file is none.
    """
    ids = counts[""]["item_id"].to_numpy()
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "item_index": pa.array(np.arange(len(ids)), pa.int32()),
        "item_id": pa.array(ids, pa.int64()),
        "train_occurrences": counts[""]["train_occurrences"],
    }
    for name, rule in definition.events.item_fields.items():
        columns[name] = _field(_latest(counts[name], ids), rule, f"the logs in {source}")
    for file_rule, table in zip(definition.items, files, strict=True):
        position, found = np.zeros(len(ids), np.int64), np.zeros(len(ids), dtype=bool)
        if table is not None and table.num_rows:
            known = feature_ids(
                table[file_rule.key],
                file_rule.key,
                definition.logs.columns[definition.events.item].type,
                f"the file {file_rule.files} in {source}",
            )
            distinct, first = np.unique(known, return_index=True)
            place = np.minimum(np.searchsorted(distinct, ids), len(distinct) - 1)
            found, position = distinct[place] == ids, first[place]
        for name, rule in file_rule.fields.items():
            text = (
                pa.nulls(len(ids), pa.string())
                if table is None
                else table[rule.column].combine_chunks().take(pa.array(position, mask=~found))
            )
            text = (
                text
                if pa.types.is_list(text.type)
                else pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
            )
            columns[name] = _field(text, rule, f"the file {file_rule.files} in {source}")
    schema = table_schema(
        "items",
        pa.schema(
            [*ITEMS, *[pa.field(name, item_field_type(rule.kind)) for name, rule in definition.item_fields.items()]]
        ),
    )
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def feature_ids(values: pa.ChunkedArray, column: str, kind: str, source: str) -> np.ndarray:
    """Return the int64 ids of a user or item file, as `events` has them.

    Raises:
        StageError: a row has none, or one that is not of its type.
    """
    text = values.combine_chunks()
    missing = pc.sum(pc.equal(text, "")).as_py() or 0
    if missing:
        raise StageError(
            f"the column {column} of {source} has {missing:,} row(s) without a value",
            "correct them, or deliver the file again",
        )
    return hashed_ids(text if kind == "text" else whole_numbers(text, column, source))


def whole_numbers(values: pa.Array, column: str, source: str) -> pa.Array:
    """Return text as int64: digits, or digits with the empty fraction that a column with gaps is published with.

    Raises:
        StageError: a value is neither.
    """
    wrong = values.filter(pc.invert(pc.match_substring_regex(values, r"\A-?[0-9]{1,18}(\.0*)?\z")))
    if len(wrong):
        raise StageError(
            f"the column {column} of {source} holds {wrong[0].as_py()[:40]!r}, which is no whole number",
            "correct that value, or deliver the file again",
        )
    return pc.replace_substring_regex(values, r"\.0*\z", "").cast(pa.int64())


def _latest(values: pa.Table, ids: np.ndarray) -> pa.Array:
    """Return each item's value with the latest time (of several: the largest), null where it has none."""
    ordered = values.take(
        pc.sort_indices(values, [("item_id", "ascending"), ("time_ms", "ascending"), ("value", "ascending")])
    )
    known = ordered["item_id"].to_numpy()
    last = np.searchsorted(known, ids, side="right") - 1
    found = (last >= 0) & (known[np.maximum(last, 0)] == ids) if len(known) else np.zeros(len(ids), dtype=bool)
    return ordered["value"].combine_chunks().take(pa.array(np.maximum(last, 0), mask=~found))


def _field(values: pa.Array | pa.ChunkedArray, rule: FieldRule, source: str) -> pa.Array:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    kind = item_field_type(rule.kind)
    if rule.kind == "categories":
        return _lists(values, rule)
    if not pa.types.is_string(values.type) or rule.kind == "category":
        return values.cast(kind)
    if rule.kind == "id":
        return whole_numbers(values, rule.column, source)
    try:
        return values.cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise StageError(
            f"the column {rule.column} of {source} holds what is no number: {error}",
            "correct that value, or make the field a category",
        ) from None


def _lists(values: pa.Array, rule: FieldRule) -> pa.Array:
    """Return lists of texts, which a text is split into; empty parts are left out, a missing text is an empty list."""
    if pa.types.is_list(values.type):
        lists = values.fill_null(pa.scalar([], values.type))
    else:
        lists = pc.split_pattern(pc.utf8_trim(values.fill_null(""), rule.strip), rule.split)
    flat = pc.utf8_trim(lists.flatten(), rule.strip)
    filled = pc.not_equal(flat, "")
    before = np.concatenate([[0], np.cumsum(filled.to_numpy(zero_copy_only=False))])
    offsets = lists.offsets.to_numpy()
    return pa.ListArray.from_arrays(pa.array(before[offsets - offsets[0]], pa.int32()), flat.filter(filled))

"""Table contracts: the explicit Arrow schema of every table of the warehouse. Nothing else defines a column."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

# One row is one exposure or interaction, of partition day `dt` by event time (UTC). Sorted by (user_id, event_time_ms,
# item_id). Behind these columns stand the item fields of the data set's log (see `event_field_type`).
EVENTS = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("event_time_ms", pa.int64(), nullable=False),  # Unix milliseconds, UTC
        pa.field("feedback", pa.int16(), nullable=False),  # bit i set = the i-th signal of the data set happened
        pa.field("watch_time_ms", pa.int64(), nullable=False),
        pa.field("duration_ms", pa.int64(), nullable=False),  # 0 = no duration (pictures)
        pa.field("context", pa.int16(), nullable=False),  # request context: where the item was shown, -1 = unknown
        pa.field("is_random", pa.bool_(), nullable=False),  # exposed by random traffic, not by the recommender
    ]
)

# One row is one raw row that was refused.
QUARANTINE = pa.schema(
    [
        pa.field("source_file", pa.string(), nullable=False),
        pa.field("row_number", pa.int64(), nullable=False),  # 1 = first line of the file, the header included
        pa.field("reason", pa.string(), nullable=False),  # machine-readable code, then ": " and the detail
        pa.field("raw_text", pa.string(), nullable=False),
    ]
)

# One row is one item that occurs in the events of the window, in item_id order. Behind these columns stand the item
# fields of the data set (see `item_field_type`).
ITEMS = pa.schema(
    [
        pa.field("item_index", pa.int32(), nullable=False),  # position of the row: dense, local to the partition
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("train_occurrences", pa.int64(), nullable=False),  # events before the evaluation days
    ]
)

# One row is one user with at least one target in the window; sorted by user_id.
SEQUENCES = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field(
            "user_fields", pa.list_(pa.string()), nullable=False
        ),  # in the order of DatasetDefinition.user_fields, '' = not known
        # The history ONCE, oldest first; ties in time are in (item_id) order.
        pa.field("history_item_index", pa.list_(pa.int32()), nullable=False),
        pa.field("history_time_ms", pa.list_(pa.int64()), nullable=False),
        pa.field("history_feedback", pa.list_(pa.int16()), nullable=False),
        pa.field("history_watch_bucket", pa.list_(pa.int8()), nullable=False),  # see WATCH_RATIO_EDGES
        # All targets of the window, oldest first. Target j may see history[history_first(end, max_events) : end], where
        # end is target_history_end[j] and max_events is among the settings of the partition's manifest.
        pa.field("target_item_index", pa.list_(pa.int32()), nullable=False),
        pa.field("target_time_ms", pa.list_(pa.int64()), nullable=False),
        pa.field(
            "target_label", pa.list_(pa.int8()), nullable=False
        ),  # 1 = the label signal happened; 0 for sampled items
        pa.field("target_context", pa.list_(pa.int16()), nullable=False),
        pa.field("target_is_random", pa.list_(pa.bool_()), nullable=False),  # see EVENTS; a sampled one as its positive
        pa.field("target_split", pa.list_(pa.int8()), nullable=False),  # TRAIN, VALIDATION or EVALUATION
        pa.field("target_history_end", pa.list_(pa.int32()), nullable=False),
    ]
)

# One row is one user's attention cache for one model version (fp16 means, fp32 log counts, flattened).
USER_CACHES = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("reference_time_ms", pa.int64(), nullable=False),
        pa.field("log_counts", pa.list_(pa.float32()), nullable=False),  # [heads * components * codes]; -inf = empty
        pa.field("value_means", pa.list_(pa.float16()), nullable=False),  # [heads * components * codes * head_width]
    ]
)

TABLES: dict[str, pa.Schema] = {
    "events": EVENTS,
    "event_blocks": EVENTS,  # several days in one: users, then days, each as in `events`
    "quarantine": QUARANTINE,
    "items": ITEMS,
    "sequences": SEQUENCES,
    "user_caches": USER_CACHES,
}

# Tables whose columns end with the fields of the data set's definition.
EXTENDED = ("events", "event_blocks", "items")

TRAIN, VALIDATION, EVALUATION = 0, 1, 2  # target_split

# history_watch_bucket: 0 = no duration; 1 = not watched; else 2 + number of edges <= watch_time / duration.
WATCH_RATIO_EDGES = (0.1, 0.25, 0.5, 0.75, 0.95, 1.25, 2.0)
WATCH_BUCKETS = 2 + len(WATCH_RATIO_EDGES) + 1


def history_first(end: np.ndarray, max_events: int) -> np.ndarray:
    """Return the first event that targets may see of those before `end`.

    The latest `max_events` count. Same type and shape.
    """
    return np.maximum(end - max_events, 0)


def event_field_type(kind: str) -> pa.DataType:
    """Return the type of an item field in `events`: lists are still the log's own text."""
    return {"id": pa.int64(), "number": pa.float64()}.get(kind, pa.string())


def item_field_type(kind: str) -> pa.DataType:
    """Return the type of an item field in `items`; a model takes the field's kind from it."""
    return {"id": pa.int64(), "number": pa.float64(), "categories": pa.list_(pa.string())}.get(kind, pa.string())


def table_schema(table: str, columns: pa.Schema) -> pa.Schema:
    """Return the contract of a table with the fields that the data set adds behind it, as they are in `columns`.

    Raises:
        KeyError: a column of the contract is missing.
    """
    base = TABLES[table]
    extra = [columns.field(name) for name in columns.names if name not in base.names] if table in EXTENDED else []
    for name in base.names:
        columns.field(name)
    return pa.schema([*base, *[pa.field(field.name, field.type) for field in extra]])


def schema_fingerprint(schema: pa.Schema) -> str:
    """Return a digest of names, types and nullability, in column order."""
    text = "\n".join(f"{field.name} {field.type} {field.nullable}" for field in schema)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Rows of a Parquet log under the rules of a text log: a value that cannot be its column's refuses its row, never the
file.

Writers store the same value in many physical types: ids as floats (a data frame with gaps), decimals or text, texts as
bytes or dictionaries. What such a type holds is looked at value by value; only a type that can hold no such value at
all (a list, a struct) is an error of the file, before a row is read.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.datasets.definition import Column, Logs
from etl.ingest.cells import ARROW_TYPES, INT64_MAX, is_missing, missing_numbers, typed_cells, why_wrong


def can_be(kind: pa.DataType, wanted: str) -> bool:
    """Whether a physical type can hold values of a declared one."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if wanted == "timestamp":
        return pa.types.is_timestamp(kind) or pa.types.is_date(kind)
    return (
        _is_text(kind)
        or (pa.types.is_primitive(kind) and not pa.types.is_temporal(kind))
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    )


def typed_rows(batch: pa.RecordBatch, logs: Logs) -> tuple[pa.Table, dict[int, str]]:
    """Return the declared columns of a batch, typed, and row -> reason of those that are refused: a code, ": " and the
    detail.

    Of several faults the one is named that a line of text would be refused for: bytes that are no text, else the first
    column's.
    """
    read = {name: typed_values(batch.column(name), logs.columns[name], logs.missing) for name in batch.schema.names}
    reasons: dict[int, str] = {}
    for name, (_, _, broken) in read.items():
        for row, what in broken.items():
            reasons.setdefault(row, f"{what} of {name}")
    for name, (values, wrong, _) in read.items():
        column = logs.columns[name]
        refused = np.zeros(batch.num_rows, bool) if wrong is None else wrong.copy()
        if values.null_count and not column.optional:
            refused |= _mask(values.is_null())
        for row in np.flatnonzero(refused).tolist():
            value = _readable(batch.column(name)[row])
            cell = "" if value is None else str(value)
            kind = "an integer" if column.type == "integer" else f"a {column.type}"
            reasons.setdefault(
                row,
                why_wrong(name, cell, column, logs.missing) or f"not_{kind.replace(' ', '_')}: {name}={cell[:40]!r}",
            )
    return pa.table({name: read[name][0] for name in logs.columns}), reasons


def row_text(rows: pa.RecordBatch | pa.Table, row: int) -> bytes:
    """Return a row as JSON that people can read, whatever its types and bytes."""
    return json.dumps(
        {name: _readable(rows.column(name)[row]) for name in rows.schema.names}, ensure_ascii=False, default=str
    ).encode("utf-8", "backslashreplace")


def typed_values(
    values: pa.Array, column: Column, missing: tuple[str, ...]
) -> tuple[pa.Array, np.ndarray | None, dict[int, str]]:
    """Read a column as its declared type.

    Returns:
        the values, null where there is none or none of that type; bool [rows], which are none of that type (None: no
        row); and row -> what is wrong with bytes that are no text.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind, target, wrong = values.type, ARROW_TYPES[column.type], None
    if _is_text(kind):
        text, broken = _utf8(values)
        if column.type == "text":
            return _nulls_at(text, _mask(is_missing(text, missing))), None, broken
        typed, right = typed_cells(text.fill_null(""), column, missing)
        return typed, ~right & ~_mask(is_missing(text.fill_null(""), missing)), broken
    if pa.types.is_decimal(kind) and column.type == "integer":
        return typed_values(values.cast(pa.string()), column, missing)
    if pa.types.is_floating(kind):
        values, wrong = _of_floats(values.cast(pa.float64()), column, missing)
    elif pa.types.is_uint64(kind) and column.type == "integer":
        wrong = _mask(pc.greater(values, pa.scalar(INT64_MAX, pa.uint64())).fill_null(False))
        values = _nulls_at(values, wrong)
    elif pa.types.is_boolean(kind) and column.type == "decimal":
        values = values.cast(pa.int8())
    typed = values.cast(target, safe=False)
    if column.type == "text":
        return _nulls_at(typed, _mask(is_missing(typed, missing))), wrong, {}
    if (words := missing_numbers(column, missing)) is not None:
        typed = _nulls_at(typed, _mask(pc.is_in(typed, value_set=words)))
    return typed, wrong, {}


def _of_floats(values: pa.Array, column: Column, missing: tuple[str, ...]) -> tuple[pa.Array, np.ndarray | None]:
    """Return floats without those that the column cannot have, and which these are.

    NaN is the word that a data frame writes.
    """
    if column.type == "text":
        return values, None
    finite = pc.is_finite(values)
    right = finite
    if column.type == "integer":
        right = pc.and_(finite, pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), 2.0**63)))
    if pc.all(right, min_count=0).as_py():
        return values, None
    wrong = ~_mask(right.fill_null(True))
    return _nulls_at(values, wrong), wrong & ~(_mask(pc.is_nan(values).fill_null(False)) if "nan" in missing else False)


def _utf8(values: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """Return text, null where it is none, and row -> what is wrong there.

    Files may hold any bytes under the name of text.
    """
    wide = pa.types.is_large_string(values.type) or pa.types.is_large_binary(values.type)
    bytes_, kind = (
        (values.cast(pa.large_binary()), pa.large_string()) if wide else (values.cast(pa.binary()), pa.string())
    )
    broken: dict[int, str] = {}
    try:
        text = bytes_.cast(kind)
    except pa.ArrowInvalid:
        for row, body in enumerate(bytes_.to_pylist()):
            try:
                (body or b"").decode("utf-8")
            except UnicodeDecodeError as error:
                broken[row] = f"not_utf8: byte {error.start}"
        text = _nulls_at(bytes_, np.isin(np.arange(len(values)), list(broken))).cast(kind)
    data = text.buffers()[2]
    if data is not None and data.size and not np.frombuffer(data, np.uint8).min():  # a NUL, or one behind a slice
        for row in np.flatnonzero(_mask(pc.match_substring(text, "\0").fill_null(False))).tolist():
            broken[row] = "nul_byte: NUL bytes in the value"
    return text.cast(pa.string()), broken


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _nulls_at(values: pa.Array, where: np.ndarray) -> pa.Array:
    return pc.if_else(pa.array(where), pa.scalar(None, values.type), values) if where.any() else values


def _mask(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False)


def _readable(value: pa.Scalar) -> Any:
    """Return a value as people read it; bytes that are no text are escaped."""
    if not value.is_valid:
        return None
    if pa.types.is_dictionary(value.type):
        value = value.value
    if not _is_text(value.type):
        return value.as_py()
    return value.as_buffer().to_pybytes().decode("utf-8", "backslashreplace").replace("\0", "\\x00")

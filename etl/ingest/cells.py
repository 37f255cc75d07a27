"""Texts of cells as typed values: one rule for every text format of a log, and for the reason of a refusal.

The fast path of `etl.ingest.raw` never comes here: it reads lines whose every cell can be cast as it stands.
"""

from __future__ import annotations

import csv
import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.datasets.definition import Column, Logs

ARROW_TYPES = {"integer": pa.int64(), "decimal": pa.float64(), "text": pa.string(), "timestamp": pa.timestamp("us")}
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# An integer column with gaps that a data frame wrote: "266079.0" is the id 266079.
_INTEGER = r"-?[0-9]+(?:\.0*)?"
_DECIMAL = r"-?[0-9]{1,18}(?:\.[0-9]{0,30})?(?:[eE][-+]?[0-9]{1,2})?"
_MAX_DIGITS = 38  # of a decimal128: beyond it there is no number to compare with


class NotARowError(Exception):
    """A line is no row; the text is the reason: a code, a colon, and the detail."""


def typed_cells(
    texts: pa.ChunkedArray | pa.Array, column: Column, missing: tuple[str, ...]
) -> tuple[pa.ChunkedArray | pa.Array, np.ndarray]:
    """Return typed values (null where they are missing or wrong), and bool [rows]: which are right."""
    gone = is_missing(texts, missing)
    if column.type == "text":
        values = pc.if_else(gone, pa.scalar(None, pa.string()), texts)
        right = pa.scalar(True)
    elif column.type == "integer":
        digits = pc.replace_substring_regex(texts, r"\.0*$", "")
        digits = pc.replace_substring_regex(digits, r"^(-?)0+([0-9])", r"\1\2")
        right = pc.and_(
            pc.match_substring_regex(texts, f"^(?:{_INTEGER})$"), pc.less_equal(pc.utf8_length(digits), _MAX_DIGITS)
        )
        numbers = pc.if_else(right, digits, "0").cast(pa.decimal128(_MAX_DIGITS, 0))
        fits = pc.and_(
            pc.greater_equal(numbers, pa.scalar(INT64_MIN).cast(numbers.type)),
            pc.less_equal(numbers, pa.scalar(INT64_MAX).cast(numbers.type)),
        )
        right = pc.and_(right, fits)
        values = pc.if_else(right, numbers, pa.scalar(0).cast(numbers.type)).cast(pa.int64())
    else:
        right = pc.match_substring_regex(texts, f"^(?:{_DECIMAL})$")
        values = pc.if_else(right, texts, "0").cast(pa.float64())
    if column.type != "text":
        values = pc.if_else(pc.and_(right, pc.invert(gone)), values, pa.scalar(None, values.type))
    ok = pc.if_else(gone, pa.scalar(column.optional), right)
    return values, _mask(ok)


def is_missing(texts: pa.ChunkedArray | pa.Array, missing: tuple[str, ...]) -> pa.ChunkedArray | pa.Array:
    """Return which texts mean that there is no value; an empty one always does."""
    return pc.is_in(texts, value_set=pa.array(["", *missing], pa.string()))


def missing_numbers(column: Column, missing: tuple[str, ...]) -> pa.Array | None:
    """Return the words for "no value" that are numbers of the column's type, such as -1; None when there are none."""
    pattern = {"integer": r"-?[0-9]{1,18}", "decimal": _DECIMAL}.get(column.type)
    words = [
        float(word) if column.type == "decimal" else int(word)
        for word in missing
        if pattern and re.fullmatch(pattern, word)
    ]
    return pa.array(words, ARROW_TYPES[column.type]) if words else None


def why_wrong(name: str, cell: str, column: Column, missing: tuple[str, ...]) -> str | None:
    """Return why a cell is no value of its column, None when it is one."""
    if cell == "" or cell in missing:
        return None if column.optional else f"missing_value: {name}" + (f"={cell!r}" if cell else "")
    if column.type == "integer":
        if not re.fullmatch(_INTEGER, cell):
            return f"not_an_integer: {name}={cell[:40]!r}"
        digits = cell.partition(".")[0]
        size = digits.lstrip("-0") or "0"
        if len(size) > _MAX_DIGITS or not INT64_MIN <= int(size) * (-1 if digits[0] == "-" else 1) <= INT64_MAX:
            return f"too_large: {name}={cell[:40]!r} does not fit in 64 bits; read such ids as text"
    if column.type == "decimal" and not re.fullmatch(_DECIMAL, cell):
        return f"not_a_decimal: {name}={cell[:40]!r}"
    return None


def split_line(text: str, logs: Logs) -> list[str]:
    """Return the cells of a line of CSV, or the declared ones of an object of JSON in the order of `logs.columns`.

    Raises:
        NotARowError: it is no object, or holds a list.
    """
    if logs.format == "jsonl":
        return _json_cells(text, logs)
    if not logs.quoting:
        return text.split(logs.delimiter)
    if len(logs.delimiter.encode()) == 1:
        return _quoted_cells(text, logs.delimiter)
    mark = next((mark for mark in MARKS if mark not in text), MARKS[0])
    return [cell.replace(mark, logs.delimiter) for cell in _quoted_cells(text.replace(logs.delimiter, mark), mark)]


MARKS = [chr(code) for code in (0x1F, 0x1E, 0x1D, 0x1C, *range(1, 9), *range(14, 28))]
"""Characters that stand for a delimiter of several bytes while lines are parsed: the first one that does not
occur in them."""


def _quoted_cells(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([text], delimiter=delimiter), [])
    except csv.Error:
        return text.split(delimiter)


def _json_cells(text: str, logs: Logs) -> list[str]:
    try:
        row = json.loads(text, parse_constant=str)  # NaN is no JSON, but Python writes it
    except (ValueError, RecursionError) as error:
        raise NotARowError(f"not_json: {str(error)[:80]}") from None
    if not isinstance(row, dict):
        raise NotARowError(f"not_an_object: the line holds a {type(row).__name__}, not one object")
    return [_json_cell(name, row.get(name), column) for name, column in logs.columns.items()]


_JSON_TEXT = r'"[^"\\\x00-\x1f]*"'  # without an escape: what stands there is the text
_JSON_INTEGER = r"-?[1-9][0-9]{0,17}|0"
_JSON_DECIMAL = rf"{_JSON_INTEGER}|-?(?:0|[1-9][0-9]{{0,14}})\.[0-9]{{1,25}}"
_JSON_PLAIN = {"text": _JSON_TEXT, "integer": _JSON_INTEGER, "decimal": _JSON_DECIMAL}
_JSON_OTHER = rf"{_JSON_TEXT}|{_JSON_DECIMAL}|true|false|null"  # of a key that is not declared


def plain_object_pattern(line: bytes, logs: Logs) -> str | None:
    """Return the regular expression (RE2) of lines with the keys of this one, in its order, of which a JSON reader
    makes what `_json_cells` would.

    None: there is none, since the line is no object, lacks a declared key that is needed, or because of what the
        definition says.
    """
    try:
        keys = json.loads(line, object_pairs_hook=lambda pairs: [key for key, _ in pairs])
    except (ValueError, RecursionError):
        return None
    known = (
        [key for key in keys if isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_. -]+", key)]
        if isinstance(keys, list) and line.lstrip().startswith(b"{")
        else []
    )
    if (
        not known
        or len(known) < len(keys)
        or len(set(keys)) < len(keys)
        or any(name not in keys and not column.optional for name, column in logs.columns.items())
    ):
        return None
    # A word for "no value" is a text: of a decimal it would be compared as it is written.
    if any(
        column.type == "decimal" and missing_numbers(column, logs.missing) is not None
        for column in logs.columns.values()
    ):
        return None

    def value(key: str) -> str:
        column = logs.columns.get(key)
        return _JSON_OTHER if column is None else _JSON_PLAIN[column.type] + ("|null" if column.optional else "")

    return r"\A\{" + ", ?".join(f'"{re.escape(key)}": ?(?:{value(key)})' for key in keys) + r"\}\z"


def _json_cell(name: str, value: Any, column: Column) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise NotARowError(f"not_utf8: {name} holds half of a surrogate pair")
        return value
    if isinstance(value, bool):
        return str(value).lower() if column.type == "text" else str(int(value))
    if isinstance(value, (list, dict)):
        raise NotARowError(
            f"list_in_a_cell: {name}={json.dumps(value)[:60]}: a row is one event, so write one line for each of its"
            " values"
        )
    return repr(value)


def _mask(values: pa.ChunkedArray | pa.Array | pa.Scalar) -> np.ndarray:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return values.fill_null(False).to_numpy(zero_copy_only=False)

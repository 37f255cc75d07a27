"""Reads user and item files.

Static fields by id, as text, from CSV or Parquet. A file that cannot be read rightly is refused whole.
"""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from etl.datasets.definition import FeatureFile
from etl.ingest.compression import DamagedError
from etl.ingest.parquet_rows import can_be
from etl.ingest.raw import BOM, RawFile, RawLocation
from etl.stage.errors import StageError


def read_features(location: RawLocation, rule: FeatureFile) -> pa.Table | None:
    """Read the files of a rule, every column as text ('' = missing), lists of Parquet as lists of text; None when there
    is none.

    Raises:
        StageError: a file is not what the rule says, or lacks a column that it names; file, and line or column, are
            named.
    """
    files = location.matching((rule.files,))
    if not files:
        return None
    table = pa.concat_tables([_file_table(location, file, rule) for file in files])
    words = pa.array(rule.missing, pa.string())
    return pa.table(
        {
            name: values if name == rule.key else _without(values, words)
            for name, values in zip(table.column_names, table.columns, strict=True)
        }
    )


def _file_table(location: RawLocation, file: RawFile, rule: FeatureFile) -> pa.Table:
    where = f"{file.name} in {location.uri}"
    is_parquet = rule.format == "parquet" or file.name.endswith(".parquet")
    try:
        return (
            _parquet_table(location, file, rule, where)
            if is_parquet
            else _csv_table(b"".join(location._text(file)).removeprefix(BOM), rule, where)
        )
    except (pa.ArrowInvalid, OSError, DamagedError, csv.Error) as error:
        raise StageError(
            f"{where} is not a {'Parquet' if is_parquet else 'CSV'} file as published: {error}",
            "deliver the file again, or remove it",
        ) from None


def _wanted(rule: FeatureFile, header: list[str], where: str) -> list[str]:
    """Return the columns that are read.

    Raises:
        StageError: the file lacks one, or has a name twice.
    """
    wanted = list(dict.fromkeys([rule.key, *(field.column for field in rule.fields.values())]))
    if len(set(header)) < len(header):
        raise StageError(
            f"{where} is wrong: a column name occurs twice in its header: {', '.join(header)[:500]}",
            "deliver the file again",
        )
    if missing := [name for name in wanted if name not in header]:
        raise StageError(
            f"{where} lacks the column {', '.join(missing)}; it has {', '.join(header)[:500]}",
            "deliver the file with the published columns, or correct the definition",
        )
    return wanted


# ---- CSV
# ---------------------------------------------------------------------------------------------------------------


def _csv_table(body: bytes, rule: FeatureFile, where: str) -> pa.Table:
    if body.startswith(b"PAR1"):
        raise StageError(f"{where} is a Parquet file", "set format: parquet for it in the definition")
    if rule.quoting:
        _check_quotes(body, rule.delimiter, where)
    if rule.columns:
        header = list(rule.columns)
    else:
        first = body.split(b"\n", 1)[0].decode("utf-8", "replace").rstrip("\r")
        header = (
            next(csv.reader([first], delimiter=rule.delimiter), []) if rule.quoting else first.split(rule.delimiter)
        )
    wanted = _wanted(rule, header, where)
    try:
        return pacsv.read_csv(
            io.BytesIO(body),
            pacsv.ReadOptions(column_names=list(rule.columns) if rule.columns else None),
            pacsv.ParseOptions(
                delimiter=rule.delimiter, quote_char='"' if rule.quoting else False, newlines_in_values=rule.quoting
            ),
            pacsv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid:
        if (line := _line_of_no_text(body)) is not None:
            raise StageError(
                f"{where}, line {line} is no UTF-8", "deliver the file in UTF-8, such as with iconv -f latin1 -t UTF-8"
            ) from None
        raise


def _line_of_no_text(body: bytes) -> int | None:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return body.count(b"\n", 0, error.start) + 1
    return None


def _check_quotes(body: bytes, delimiter: str, where: str) -> None:
    """Refuse a quote that opens a value and does not end it: it would silently swallow the lines behind it."""
    if _quotes_in_pairs(body, delimiter):
        return
    d = re.escape(delimiter.encode())
    for match in re.finditer(rb"(?:^|(?<=[" + d + rb'\n]))"[^"]*(?:""[^"]*)*(?:"(?=' + d + rb"|\r?\n|\r?\Z)|())", body):
        if match[1] is not None:
            line = body.count(b"\n", 0, match.start()) + 1
            raise StageError(
                f"{where}, line {line}: a quote opens a value and does not end it:"
                f" {body[match.start() : match.start() + 40].decode('utf-8', 'replace')!r}",
                "correct the quote, or set quoting: false for this file in the definition, where quotes are part of the"
                " values",
            )


def _quotes_in_pairs(body: bytes, delimiter: str) -> bool:
    """Whether the quotes, two by two, open and end a value: so it is in nearly every file, and seen at once."""
    letters = np.frombuffer(body, np.uint8)
    quotes = np.flatnonzero(letters == ord('"'))
    if len(quotes) % 2:
        return False
    before, behind = letters[np.maximum(quotes[::2] - 1, 0)], letters[np.minimum(quotes[1::2] + 1, len(letters) - 1)]
    opens = (before == ord(delimiter)) | (before == ord("\n")) | (quotes[::2] == 0)
    ends = (
        (behind == ord(delimiter)) | (behind == ord("\n")) | (behind == ord("\r")) | (quotes[1::2] == len(letters) - 1)
    )
    return bool(opens.all() and ends.all())


# ---- Parquet
# -----------------------------------------------------------------------------------------------------------


def _parquet_table(location: RawLocation, file: RawFile, rule: FeatureFile, where: str) -> pa.Table:
    with location.fs.open_input_file(file.path) as stream, pq.ParquetFile(stream) as parquet:
        schema = parquet.schema_arrow
        wanted = _wanted(rule, schema.names, where)
        lists = {field.column for field in rule.fields.values() if field.kind == "categories"} - {rule.key}
        for name in wanted:
            kind = schema.field(name).type
            of_list = name in lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind))
            if not (can_be(kind.value_type if of_list else kind, "text") or pa.types.is_temporal(kind)):
                raise StageError(
                    f"{where}: column {name} is {kind}, which is no text, number or"
                    f" day{', nor a list of them' if name in lists else ''}",
                    "correct the definition (kind: categories reads lists), or deliver the file with a column of that"
                    " type",
                )
        table = parquet.read(wanted).combine_chunks()
    columns = {}
    for name in wanted:
        values = table[name].combine_chunks()
        if name in lists:
            columns[name] = _lists(values, rule, name, where)
        else:
            columns[name] = _text(values, f"{where}: column {name}")
    return pa.table(columns)


def _lists(values: pa.Array, rule: FeatureFile, name: str, where: str) -> pa.Array:
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return _text(values, f"{where}: column {name}")
    lists = values.fill_null(pa.scalar([], values.type))
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    return pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()),
        _text(lists.flatten(), f"{where}: column {name}"),
    )


def _text(values: pa.Array, where: str) -> pa.Array:
    """Return values as a text file would hold them: '' for none and NaN, whole numbers without a fraction."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
        whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), 2.0**63)).fill_null(False)
        text = pc.if_else(
            whole, pc.if_else(whole, values, 0.0).cast(pa.int64()).cast(pa.string()), values.cast(pa.string())
        )
        return text.fill_null("")
    try:
        if pa.types.is_binary(values.type) or pa.types.is_string(
            values.type
        ):  # nothing has checked the bytes of either
            values = values.cast(pa.binary())
        elif pa.types.is_large_binary(values.type) or pa.types.is_large_string(values.type):
            values = values.cast(pa.large_binary()).cast(pa.large_string())
        return values.cast(pa.string()).fill_null("")
    except pa.ArrowInvalid as error:
        raise StageError(f"{where} holds what is no text: {error}", "deliver the file with texts in UTF-8") from None


def _without(values: pa.ChunkedArray, words: pa.Array) -> pa.ChunkedArray:
    """Return values with '' for words that mean "not known".

    In a list such words and empty texts are left out later.
    """
    if not pa.types.is_list(values.type):
        return pc.if_else(pc.is_in(values, value_set=words), "", values)
    lists = values.combine_chunks()
    flat = lists.flatten()
    return pa.chunked_array(
        [pa.ListArray.from_arrays(lists.offsets, pc.if_else(pc.is_in(flat, value_set=words), "", flat))]
    )

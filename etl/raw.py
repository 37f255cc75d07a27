"""Reads raw logs as they are published: every line becomes a typed row or a refused one, with its row number and reason.

One regular expression, made from the columns of the data set's definition, separates (vectorised) the lines that can be
cast as they stand from the few that are looked at one by one for the reason of their refusal.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime as dtm
import fnmatch
import functools
import io
import json
import math
import os
import re
import zlib
import zoneinfo
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from etl.datasets import SIMULATED_MARKER, Column, DatasetDefinition, FeatureFile, Logs, NamedDays, Time
from etl.errors import StageError
from etl.partitions import MS_PER_DAY, day_number

SPLIT_BYTES = 64 << 20
INFLATE_BYTES = 4 << 10
ARROW_TYPES = {"integer": pa.int64(), "decimal": pa.float64(), "text": pa.string()}
_CELL = {"integer": r"-?[0-9]{1,18}", "decimal": r"-?[0-9]{1,18}(?:\.[0-9]{0,30})?(?:[eE][-+]?[0-9]{1,2})?"}
_UNIT_PER_SECOND = {"seconds": 1, "milliseconds": 1_000, "microseconds": 1_000_000}
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class RawFile:
    """One raw file.

    Attributes:
        modified_ns: time of its last change; a file delivered again has another one.
        first_dt, last_dt: local days that its name promises, None when it promises none.
        first_utc_dt, last_utc_dt: UTC days whose rows may be in it.
    """

    path: str
    name: str
    size: int
    modified_ns: int
    first_dt: str | None = None
    last_dt: str | None = None
    first_utc_dt: str | None = None
    last_utc_dt: str | None = None

    def may_hold(self, utc_dt: str) -> bool:
        """Whether rows of a UTC day may be in it."""
        return self.first_utc_dt is None or self.last_utc_dt is None or self.first_utc_dt <= utc_dt <= self.last_utc_dt


@dataclass(frozen=True)
class Split:
    """A part of a raw file.

    Attributes:
        start, end: bytes of a text file, row groups of a Parquet file.
        first_row: row number of the first whole line (line 1 is the header where there is one), or of the first row.
        header: the file's columns in order.
    """

    file: RawFile
    start: int
    end: int
    first_row: int
    header: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """One raw row that cannot be an event; `time_ms` is its time where that much is right."""

    row_number: int
    reason: str  # a code, then ": " and the detail
    raw_text: bytes
    time_ms: int | None = None


@dataclass(frozen=True)
class Chunk:
    """Rows of a split.

    Attributes:
        rows: the declared columns, typed.
        time_ms: int64 [rows], Unix milliseconds.
        row_hash: int64 [rows], of all declared columns: equal rows have equal ones.
    """

    rows: pa.Table
    time_ms: np.ndarray
    row_hash: np.ndarray
    refused: list[Refused]


class RawLocation:
    """A folder (or URI) of raw files."""

    def __init__(self, uri: str) -> None:
        # Absolute: the executors of a cluster work in folders of their own.
        self.uri = uri if "://" in uri else os.path.abspath(uri)
        try:
            self.fs, self.root = pafs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise StageError(f"the raw folder {uri} cannot be opened: {error}", "give a path, or a URI such as s3://bucket/folder?region=eu-central-1") from None

    # ---- which files ---------------------------------------------------------------------------------------------

    def matching(self, globs: Sequence[str], days: NamedDays | None = None) -> list[RawFile]:
        """Return the files that match, in name order.

        Raises:
            StageError: the folder does not exist.
        """
        infos = self.fs.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        if not infos and self.fs.get_file_info(self.root).type != pafs.FileType.Directory:
            raise StageError(f"the raw folder {self.uri} does not exist", "give the folder that holds the published files with --raw (RAW= for make run)")
        found = {}
        for info in infos:
            if info.type == pafs.FileType.File and any(fnmatch.fnmatch(info.base_name, glob) for glob in globs):
                promised = named_days(info.base_name, days) if days else (None, None, None, None)
                found[info.base_name] = RawFile(info.path, info.base_name, info.size, info.mtime_ns or 0, *promised)
        return [found[name] for name in sorted(found)]

    def logs(self, definition: DatasetDefinition) -> list[RawFile]:
        """Return the log files.

        Raises:
            StageError: there is none, or real and simulated rows would be mixed.
        """
        days = definition.logs.days_in_name
        if days is not None and days.zone is None:
            days = days.model_copy(update={"zone": definition.events.time.zone})
        files = self.matching(definition.logs.files, days)
        simulated = self.fs.get_file_info(f"{self.root}/{SIMULATED_MARKER}").type == pafs.FileType.File
        if simulated != definition.simulated:
            kind, wanted = ("simulated", f"{definition.name}_simulated") if simulated else ("not simulated", definition.name.removesuffix("_simulated"))
            raise StageError(f"the logs in {self.uri} are {kind}, but the data set is {definition.name}", f"use --dataset {wanted}")
        if not files:
            raise StageError(f"no log file in {self.uri}: nothing matches {', '.join(definition.logs.files)}", "put the published log files there, or correct --raw")
        return files

    def column_names(self, file: RawFile, logs: Logs) -> tuple[str, ...]:
        """Return the columns that a log file names, or those of its first line where it names none.

        Raises:
            StageError: the file is empty.
            OSError, pa.ArrowInvalid: it cannot be read.
        """
        if logs.format == "parquet":
            return tuple(pq.read_schema(file.path, filesystem=self.fs).names)
        with self._open(file) as stream:
            first = b"" if file.size == 0 else _first_line(stream)
        if not first.strip():
            raise StageError(f"{file.name} in {self.uri} is empty", "deliver the file again, or remove it")
        # Names may be quoted where values are not.
        return tuple(next(csv.reader([first.decode("utf-8", "replace").lstrip("\ufeff").rstrip("\r\n").replace("\0", "")], delimiter=logs.delimiter), []))

    def header(self, file: RawFile, logs: Logs) -> tuple[str, ...]:
        """Return the columns of a log file, in its order.

        Raises:
            StageError: the file cannot be read, is empty, or lacks a declared column.
        """
        try:
            found = self.column_names(file, logs)
        except (OSError, pa.ArrowInvalid) as error:  # an archive that is none, or that breaks off within the header
            raise StageError(f"{file.name} in {self.uri} cannot be read: {error}", "deliver the file again, or remove it") from None
        if logs.format == "csv" and not logs.header:
            if len(found) != len(logs.columns):
                raise StageError(f"{file.name} in {self.uri} has {len(found)} columns, its definition {len(logs.columns)}: {', '.join(logs.columns)}",
                                 "correct logs.columns or logs.delimiter of the definition, or set header: true")
            return tuple(logs.columns)
        missing = [name for name in logs.columns if name not in found]
        if missing and len(found) == 1 and len(logs.columns) > 1:
            raise StageError(f"{file.name} in {self.uri} has one column, {found[0][:200]!r}, when it is split at {logs.delimiter!r}", "correct logs.delimiter of the definition")
        if missing:
            raise StageError(f"{file.name} in {self.uri} lacks the column {', '.join(missing)}; it has {', '.join(found)[:500]}",
                             f"deliver the file with the columns {', '.join(logs.columns)}")
        if len(set(found)) < len(found):
            raise StageError(f"{file.name} in {self.uri} has a column twice: {', '.join(found)[:500]}", "deliver the file again")
        return found

    # ---- splits --------------------------------------------------------------------------------------------------

    def splits(self, files: list[RawFile], logs: Logs, count_lines: Callable) -> list[Split]:
        """Cut files into parts; `count_lines([(file, start, end)]) -> [newlines]` runs where the compute is."""
        splits: list[Split] = []
        headers = {file.name: self.header(file, logs) for file in files}
        whole = [f for f in files if logs.format == "parquet" or f.name.endswith(".gz") or f.size <= SPLIT_BYTES]
        ranges = [(file, start, min(start + SPLIT_BYTES, file.size)) for file in files if file not in whole for start in range(0, file.size, SPLIT_BYTES)]
        newlines = dict(zip([(f.name, s) for f, s, _ in ranges], count_lines(ranges), strict=True)) if ranges else {}
        for file in files:
            if logs.format == "parquet":
                splits += self._parquet_splits(file, headers[file.name])
            elif file in whole:
                splits.append(Split(file, 0, file.size, 1 + logs.header, headers[file.name]))
            else:
                before = 0
                for start in range(0, file.size, SPLIT_BYTES):
                    # The first whole line after `start` follows the newline that ends the line crossing it.
                    splits.append(Split(file, start, min(start + SPLIT_BYTES, file.size), before + 2, headers[file.name]))
                    before += newlines[file.name, start]
        return splits

    def count_newlines(self, file: RawFile, start: int, end: int) -> int:
        """Return the number of newlines among the bytes [start, end)."""
        with self.fs.open_input_file(file.path) as stream:
            return stream.read_at(end - start, start).count(b"\n")

    def _parquet_splits(self, file: RawFile, header: tuple[str, ...]) -> Iterator[Split]:
        with pq.ParquetFile(file.path, filesystem=self.fs) as parquet:
            groups = [parquet.metadata.row_group(g) for g in range(parquet.num_row_groups)]
        first, row, size = 0, 1, 0
        for g, group in enumerate(groups):
            size += group.total_byte_size
            if size >= SPLIT_BYTES or g == len(groups) - 1:
                yield Split(file, first, g + 1, row, header)
                row += sum(groups[k].num_rows for k in range(first, g + 1))
                first, size = g + 1, 0

    # ---- rows ----------------------------------------------------------------------------------------------------

    def read(self, split: Split, definition: DatasetDefinition) -> Iterator[Chunk]:
        """Yield the rows of a split, typed and checked against the definition."""
        logs = definition.logs
        if logs.format == "parquet":
            for table, row in self._parquet_tables(split, logs):
                yield _checked(table, np.arange(row, row + table.num_rows), _parquet_refusals(table, row, logs), None, definition)
            return
        for body, first_row, broken in self._lines(split, logs):
            chunk = checked_lines(body, first_row, split.header, definition)
            if broken is not None:
                chunk.refused.append(Refused(first_row + len(chunk.time_ms) + len(chunk.refused), broken, b""))
            yield chunk

    def _parquet_tables(self, split: Split, logs: Logs) -> Iterator[tuple[pa.Table, int]]:
        row = split.first_row
        with pq.ParquetFile(split.file.path, filesystem=self.fs) as parquet:
            for batch in parquet.iter_batches(batch_size=1 << 18, row_groups=list(range(split.start, split.end)), columns=list(logs.columns)):
                yield pa.table([_typed(batch[name], column, split.file, name) for name, column in logs.columns.items()], names=list(logs.columns)), row
                row += batch.num_rows

    def _lines(self, split: Split, logs: Logs) -> Iterator[tuple[bytes, int, str | None]]:
        """Yield (whole lines, row number of the first, what broke off here or None) of a split, without the header."""
        if split.file.name.endswith(".gz"):
            yield from self._gzip_lines(split, logs)
            return
        with self.fs.open_input_file(split.file.path) as stream:
            body = stream.read_at(split.end - split.start, split.start)
            if split.end < split.file.size and not body.endswith(b"\n"):
                body += _to_newline(stream, split.end)
            cut_line = split.start > 0 and stream.read_at(1, split.start - 1) != b"\n"
        first_row = split.first_row
        if split.start == 0:
            body = body.removeprefix(b"\xef\xbb\xbf")
        elif not cut_line:
            first_row -= 1  # the split before ended right on a newline: all of this one's lines are its own
        if cut_line or (split.start == 0 and logs.header):
            _, _, body = body.partition(b"\n")
        yield body, first_row, None

    def _gzip_lines(self, split: Split, logs: Logs) -> Iterator[tuple[bytes, int, str | None]]:
        inflate = zlib.decompressobj(wbits=31)
        rest, row, header_gone, broken = b"", split.first_row, not logs.header, None
        with self.fs.open_input_stream(split.file.path, compression=None) as stream:
            while block := stream.read(4 << 20):
                text = []
                try:
                    # In pieces: what an erroneous call has inflated is lost, so little must hang on one call.
                    for start in range(0, len(block), INFLATE_BYTES):
                        text.append(inflate.decompress(block[start : start + INFLATE_BYTES]))
                        while inflate.eof and inflate.unused_data:
                            left = inflate.unused_data
                            inflate = zlib.decompressobj(wbits=31)
                            text.append(inflate.decompress(left))
                except zlib.error as error:
                    broken = f"broken_gzip: {error}"
                rest += b"".join(text)
                body, newline, rest = rest.rpartition(b"\n")
                if newline:
                    body += b"\n"
                    if not header_gone:
                        _, _, body = body.partition(b"\n")
                        header_gone = True
                    yield body, row, None
                    row += body.count(b"\n")
                if broken is not None:
                    break
        if broken is None and not inflate.eof:
            broken = "truncated_gzip: the archive breaks off"
        if rest or broken is not None:
            yield rest if header_gone and broken is None else b"", row, broken

    def _open(self, file: RawFile):
        return self.fs.open_input_stream(file.path, compression="gzip" if file.name.endswith(".gz") else None)


def parse_lines(body: bytes, first_row: int, header: tuple[str, ...], logs: Logs) -> tuple[pa.Table, np.ndarray, pa.Array, list[Refused]]:
    """Split whole lines into typed rows and refused ones.

    Returns:
        the declared columns of the good lines, their row numbers, these lines, and the refused ones.
    """
    if b"\r" in body:
        body = body.replace(b"\r\n", b"\n")
    if body.endswith(b"\n"):
        body = body[:-1]
    elif not body:
        return pa.table({name: pa.array([], ARROW_TYPES[c.type]) for name, c in logs.columns.items()}), np.zeros(0, np.int64), pa.array([], pa.large_binary()), []
    lines = pc.split_pattern(pa.array([body], pa.large_binary()), b"\n")[0].values
    good = pc.match_substring_regex(lines, line_pattern(header, logs))
    good = good.to_numpy(zero_copy_only=False)
    if not _is_utf8(body):
        good &= np.fromiter((_is_utf8(line) for line in lines.to_pylist()), dtype=bool, count=len(lines))
    row_number = np.arange(first_row, first_row + len(lines))
    refused: list[Refused] = []
    if not good.all():
        refused = [Refused(int(row), reason_for(line, header, logs), line)
                   for row, line in zip(row_number[~good], lines.filter(pa.array(~good)).to_pylist(), strict=True)]
        row_number, lines = row_number[good], lines.filter(pa.array(good))
        body = b"\n".join(lines.to_pylist())
    types = {name: ARROW_TYPES[column.type] for name, column in logs.columns.items()}
    if not len(lines):
        return pa.table({name: pa.array([], kind) for name, kind in types.items()}), row_number, lines, refused
    rows = pacsv.read_csv(
        pa.BufferReader(body), pacsv.ReadOptions(column_names=list(header), use_threads=False, block_size=len(body) + 1),
        pacsv.ParseOptions(delimiter=logs.delimiter, quote_char='"' if logs.quoting else False, ignore_empty_lines=False),
        pacsv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[""], strings_can_be_null=False))  # fmt: skip
    return rows, row_number, lines, refused


@functools.lru_cache(maxsize=64)
def _line_pattern(header: tuple[str, ...], shapes: tuple[tuple[str, str, bool], ...], delimiter: str, quoting: bool) -> str:
    declared = {name: (kind, optional) for name, kind, optional in shapes}
    d = re.escape(delimiter)
    cells = []
    for name in header:
        kind, optional = declared.get(name, ("text", True))
        many = "*" if optional else "+"
        plain = _CELL.get(kind) or (rf'[^{d}\x00\r"]{many}' if quoting else rf"[^{d}\x00\r]{many}")
        quoted = rf'"{_CELL[kind]}"' if kind in _CELL else rf'"(?:[^"\x00\r]|""){many}"'
        cell = f'(?:{plain}|{quoted}{"|" + chr(34) * 2 if optional else ""})' if quoting else plain
        cells.append(f"(?:{cell})?" if optional and kind in _CELL else cell)
    return r"\A" + d.join(cells) + r"\z"


def line_pattern(header: tuple[str, ...], logs: Logs) -> str:
    """Return the regular expression (RE2) of a line that can be cast as it stands."""
    return _line_pattern(header, tuple((n, c.type, c.optional) for n, c in logs.columns.items()), logs.delimiter, logs.quoting)


def reason_for(line: bytes, header: tuple[str, ...], logs: Logs) -> str:
    """Return why a line is not a row: a code, a colon, and the detail."""
    if not line.strip():
        return "empty_line: nothing between two line ends"
    if b"\x00" in line:
        return "nul_byte: the line holds NUL bytes"
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not_utf8: byte {error.start} of the line"
    cells = _cells(text, logs)
    if len(cells) != len(header):
        return f"wrong_column_count: {len(cells)} instead of {len(header)}"
    for name, cell in zip(header, cells, strict=True):
        column = logs.columns.get(name)
        if column is None or (cell == "" and column.optional):
            continue
        if cell == "":
            return f"missing_value: {name}"
        if column.type in _CELL and not re.fullmatch(_CELL[column.type], cell):
            return f"not_{'an' if column.type == 'integer' else 'a'}_{column.type}: {name}={cell[:40]!r}"
    if "\r" in text:
        return "carriage_return: one that ends no line"
    return "broken_quotes: a quote within a value, or one that does not end"


def named_days(name: str, days: NamedDays) -> tuple[str | None, str | None, str | None, str | None]:
    """Return the first and last local day that a file's name promises, and the first and last UTC day that it may hold."""
    match = re.search(days.pattern, name)
    if match is None:
        return None, None, None, None
    zone = zoneinfo.ZoneInfo(days.zone or "UTC")
    try:
        groups = {key: int(value) for key, value in match.groupdict().items() if value is not None}
        year = groups.get("year", days.year or 0)
        first = dtm.date(year, groups["month"], groups["day"])
        last = dtm.date(groups.get("last_year", year), groups.get("last_month", first.month), groups.get("last_day", first.day))
        if last < first and "last_year" not in groups:  # names without a year that span New Year
            last = last.replace(year=last.year + 1)
        begin = dtm.datetime.combine(first, dtm.time(), zone) - dtm.timedelta(minutes=days.late_minutes)
        end = dtm.datetime.combine(last + dtm.timedelta(days=1), dtm.time(), zone) - dtm.timedelta(microseconds=1)
        return first.isoformat(), last.isoformat(), begin.astimezone(dtm.UTC).date().isoformat(), end.astimezone(dtm.UTC).date().isoformat()
    except (ValueError, OverflowError, KeyError):  # no numbers, or no days: the name promises nothing
        return None, None, None, None


def times_ms(values: pa.ChunkedArray | pa.Array, time: Time) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 Unix milliseconds, and which of them are times at all (others are 0)."""
    if time.unit is not None:
        per_second = _UNIT_PER_SECOND[time.unit]
        number = values.to_numpy()
        low, high = (day_number(day) * 86_400 * per_second for day in ("1900-01-01", "2200-01-01"))
        there = (number >= low) & (number < high)  # false for nan; beyond it a product would not fit
        number = np.where(there, number, 0)
        if number.dtype.kind == "f":
            return np.rint(number * (1_000 / per_second)).astype(np.int64), there
        return (number * 1_000 if per_second == 1 else number // (per_second // 1_000)), there
    import pandas as pd

    encoded = pc.dictionary_encode(values.cast(pa.string()))
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    texts = pd.Series(encoded.dictionary.to_pylist(), dtype=object).astype(str)
    if time.digits:
        texts = texts.str.zfill(time.digits)
    form = time.format if time.year is None else f"%Y{time.format}"
    stamps = pd.to_datetime(texts if time.year is None else f"{time.year}" + texts, format=form, errors="coerce")
    stamps = stamps.dt.tz_localize(time.zone, ambiguous=np.zeros(len(stamps), dtype=bool), nonexistent="shift_forward").dt.tz_convert("UTC")
    # strptime takes blanks for digits ("08 9" for the 9th of August).
    there = ~stamps.isna().to_numpy() & (texts.str.count(r"\s") == len(re.findall(r"\s", str(time.format)))).to_numpy()
    known = np.where(there, stamps.dt.tz_localize(None).to_numpy().astype("datetime64[ms]").astype(np.int64), 0)
    code = encoded.indices.to_numpy()
    return known[code], there[code]


def hashed_ids(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return int64 ids: whole numbers as they are, texts as 63-bit hashes that are the same everywhere and always."""
    if pa.types.is_integer(values.type):
        return values.to_numpy()
    return (_text_hash(values) >> np.uint64(1)).astype(np.int64)


def row_hashes(rows: pa.Table) -> np.ndarray:
    """Return int64 hashes of whole rows."""
    mixed = np.zeros(rows.num_rows, dtype=np.uint64)
    for column in rows.columns:
        if pa.types.is_string(column.type):
            bits = _text_hash(column)
        else:
            known = column.fill_null(0).to_numpy()
            bits = known.view(np.uint64) ^ (column.is_null().to_numpy().astype(np.uint64) * np.uint64(0x5BD1E995)) if column.null_count else known.view(np.uint64)
        mixed = (mixed ^ bits) * _HASH_MULTIPLIER
        mixed ^= mixed >> np.uint64(29)
    return mixed.view(np.int64)


def _text_hash(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    import pandas as pd

    encoded = pc.dictionary_encode(values.fill_null(""))
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    distinct = np.array(encoded.dictionary.to_pylist(), dtype=object)
    return pd.util.hash_array(distinct, categorize=False)[encoded.indices.to_numpy()] if len(distinct) else np.zeros(0, np.uint64)


def checked_lines(body: bytes, first_row: int, header: tuple[str, ...], definition: DatasetDefinition) -> Chunk:
    """Return whole lines of a text log, typed and checked against the definition; row numbers count from `first_row`."""
    rows, row_number, lines, refused = parse_lines(body, first_row, header, definition.logs)
    return _checked(rows, row_number, _with_times(refused, header, definition), lines, definition)


def _checked(rows: pa.Table, row_number: np.ndarray, refused: list[Refused], lines: pa.Array | None, definition: DatasetDefinition) -> Chunk:
    """Refuse rows whose values cannot be right: bounds, allowed values, time."""
    if lines is None and refused:  # Parquet: refused rows are still among them
        keep = ~np.isin(row_number, [r.row_number for r in refused])
        rows, row_number = rows.filter(pa.array(keep)), row_number[keep]
    time = definition.events.time
    time_ms, there = times_ms(rows[time.column], time)
    earliest, latest = _bounds_ms(time)
    in_range = there & (time_ms >= earliest) & (time_ms < latest)
    bad = ~in_range
    reasons: dict[int, str] = {}
    for row in np.flatnonzero(bad):
        cell = rows[time.column][int(row)].as_py()
        code = "time_out_of_range" if there[row] or time.unit else "not_a_time"
        reasons[int(row)] = f"{code}: {time.column}={cell!r:.60}"
    for name, column in definition.logs.columns.items():
        for code, wrong in _value_checks(rows[name], column):
            wrong &= ~bad
            for row in np.flatnonzero(wrong):
                reasons[int(row)] = f"{code}: {name}={rows[name][int(row)].as_py()!r:.60}"
            bad |= wrong
    if reasons:
        for place, reason in sorted(reasons.items()):
            text = lines[place].as_py() if lines is not None else json.dumps(rows.slice(place, 1).to_pylist()[0]).encode()
            refused.append(Refused(int(row_number[place]), reason, text, int(time_ms[place]) if in_range[place] else None))
        rows, time_ms = rows.filter(pa.array(~bad)), time_ms[~bad]
    return Chunk(rows, time_ms, row_hashes(rows), refused)


def _with_times(refused: list[Refused], header: tuple[str, ...], definition: DatasetDefinition) -> list[Refused]:
    """Return refused lines with their times where the time's own cell is right, so that they are filed under their days."""
    if not refused:
        return refused
    logs, time = definition.logs, definition.events.time
    position, kind = header.index(time.column), logs.columns[time.column].type
    cells = [_cells(r.raw_text.decode("utf-8", "replace").replace("\x00", ""), logs) for r in refused]
    text = [c[position] if len(c) > position and re.fullmatch(_CELL.get(kind, ".+"), c[position]) else None for c in cells]
    values = pa.array(text, pa.string())
    time_ms, there = times_ms((values if kind == "text" else values.cast(ARROW_TYPES[kind])).fill_null("" if kind == "text" else 0), time)
    earliest, latest = _bounds_ms(time)
    there &= values.is_valid().to_numpy(zero_copy_only=False) & (time_ms >= earliest) & (time_ms < latest)
    return [dataclasses.replace(r, time_ms=int(ms)) if ok else r for r, ms, ok in zip(refused, time_ms, there, strict=True)]


def _bounds_ms(time: Time) -> tuple[int, int]:
    return day_number(time.earliest.isoformat()) * MS_PER_DAY, day_number(time.latest.isoformat()) * MS_PER_DAY


def _value_checks(values: pa.ChunkedArray, column: Column) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (reason code, mask of the offending rows); an empty value of an optional column offends nothing."""

    def mask(found) -> np.ndarray:
        return found.fill_null(False).combine_chunks().to_numpy(zero_copy_only=False).copy()

    if column.min is not None:
        yield "out_of_range", mask(pc.less(values, bound(values.type, column.min, math.ceil)))
    if column.max is not None:
        yield "out_of_range", mask(pc.greater(values, bound(values.type, column.max, math.floor)))
    if column.one_of is not None:
        allowed = pa.array([str(v) if column.type == "text" else v for v in column.one_of], values.type)
        yield "not_allowed", mask(pc.and_(pc.invert(pc.is_in(values, value_set=allowed)), pc.is_valid(values)))


def bound(kind: pa.DataType, value: float, whole: Callable[[float], int]) -> pa.Scalar:
    """Return a bound as the column's own type: whole numbers beyond 2**53 have no decimal to be compared with."""
    return pa.scalar(whole(value), kind) if pa.types.is_integer(kind) else pa.scalar(float(value))


def _typed(values: pa.Array, column: Column, file: RawFile, name: str) -> pa.Array:
    try:
        return values.cast(ARROW_TYPES[column.type])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise StageError(f"{file.name}: column {name} is {values.type} and cannot be read as {column.type}: {error}",
                         "correct logs.columns of the definition, or deliver the file again") from None


def _parquet_refusals(table: pa.Table, first_row: int, logs: Logs) -> list[Refused]:
    refused: dict[int, Refused] = {}
    for name, column in logs.columns.items():
        if not column.optional and table[name].null_count:
            for row in np.flatnonzero(table[name].is_null().to_numpy()):
                refused.setdefault(int(row), Refused(first_row + int(row), f"missing_value: {name}", json.dumps(table.slice(int(row), 1).to_pylist()[0]).encode()))
    return list(refused.values())


def read_features(location: RawLocation, file_rule: FeatureFile) -> pa.Table | None:
    """Read a user or item file, every column as text ('' = missing); None when there is none.

    Raises:
        StageError: the file cannot be read as CSV, or lacks a column that the definition names.
    """
    files = location.matching((file_rule.files,))
    if not files:
        return None
    wanted = list(dict.fromkeys([file_rule.key, *(rule.column for rule in file_rule.fields.values())]))
    tables = []
    for file in files:
        try:
            with location._open(file) as stream:
                body = stream.read()
            if file_rule.columns:
                header = list(file_rule.columns)
            else:
                header = next(csv.reader([body.split(b"\n", 1)[0].decode().lstrip("\ufeff").rstrip("\r")], delimiter=file_rule.delimiter), [])
            if len(set(header)) < len(header):
                raise pa.ArrowInvalid("a column name occurs twice in its header")
            missing = [name for name in wanted if name not in header]
            if missing:
                raise StageError(f"{file.name} in {location.uri} lacks the column {', '.join(missing)}; it has {', '.join(header)[:500]}",
                                 "deliver the file with the published columns, or correct the definition")
            tables.append(pacsv.read_csv(
                io.BytesIO(body), pacsv.ReadOptions(column_names=list(file_rule.columns) if file_rule.columns else None),
                pacsv.ParseOptions(delimiter=file_rule.delimiter, newlines_in_values=True),
                pacsv.ConvertOptions(include_columns=wanted, column_types={name: pa.string() for name in header}, strings_can_be_null=False)))  # fmt: skip
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError, csv.Error) as error:
            raise StageError(f"{file.name} in {location.uri} is not a CSV file as published: {error}", "deliver the file again, or remove it") from None
    table = pa.concat_tables(tables)
    return pa.table({name: pc.if_else(pc.is_in(table[name], value_set=pa.array(file_rule.missing, pa.string())), "", table[name]) if name != file_rule.key
                     else table[name] for name in wanted})


def day_of(refused: Refused, file: RawFile, fallback_dt: str) -> int:
    """Return the day number under which a refused row is filed: of its time, of its file's name, or the fallback."""
    if refused.time_ms is not None:
        return refused.time_ms // MS_PER_DAY
    return day_number(file.first_dt or fallback_dt)


def promised(files: list[RawFile]) -> str:
    """Return what the names of files promise, for messages."""
    return "; ".join(f"{f.name}: {f.first_dt or 'any day'}" + (f" .. {f.last_dt}" if f.last_dt != f.first_dt else "") for f in files)


def _cells(text: str, logs: Logs) -> list[str]:
    if not logs.quoting:
        return text.split(logs.delimiter)
    try:
        return next(csv.reader([text], delimiter=logs.delimiter), [])
    except csv.Error:
        return text.split(logs.delimiter)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _first_line(stream) -> bytes:
    text = b""
    while b"\n" not in text:
        block = stream.read(65_536)
        if not block:
            break
        text += block
    return text.split(b"\n", 1)[0]


def _to_newline(stream, position: int) -> bytes:
    text = b""
    while True:
        block = stream.read_at(65_536, position)
        if not block:
            return text
        end = block.find(b"\n")
        if end >= 0:
            return text + block[: end + 1]
        text += block
        position += len(block)

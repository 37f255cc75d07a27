"""Reads raw logs as they are published: every line becomes a typed row or a refused one, with its row number and
reason.

One regular expression, made from the columns of the data set's definition, separates (vectorised) the lines that can be
cast as they stand from the few that are looked at one by one for the reason of their refusal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dtm
import fnmatch
import functools
import hashlib
import json
import math
import os
import re
import zoneinfo
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.json as pajson
import pyarrow.parquet as pq

from etl.datasets.definition import SIMULATED_MARKER, Column, DatasetDefinition, Logs, NamedDays, Time
from etl.ingest.cells import (
    ARROW_TYPES,
    MARKS,
    NotARowError,
    is_missing,
    missing_numbers,
    plain_object_pattern,
    split_line,
    typed_cells,
    why_wrong,
)
from etl.ingest.compression import (
    BLOCK_BYTES,
    HEAD_BYTES,
    DamagedError,
    compression_of,
    foreign_kind,
    promised_compression,
    unpacked,
)
from etl.ingest.parquet_rows import can_be, row_text, typed_rows
from etl.stage.errors import StageError, kind_of
from etl.stage.uris import without_secrets
from etl.warehouse.partitions import MS_PER_DAY, day_number
from etl.warehouse.store import sha256_of

SINGLE, REPEATED, MISSING = 0, 1, 2  # how often a local time occurred on its day
SPLIT_BYTES = 64 << 20
HEAD_TEXT_BYTES = 64 << 10
BOM = b"\xef\xbb\xbf"
# What can be cast as it stands: of 19 digits those that surely fit in 64 bits.
_CELL = {
    "integer": r"-?(?:[0-9]{1,18}|[1-8][0-9]{18})",
    "decimal": r"-?[0-9]{1,18}(?:\.[0-9]{0,30})?(?:[eE][-+]?[0-9]{1,2})?",
}
_UNIT_PER_SECOND = {"seconds": 1, "milliseconds": 1_000, "microseconds": 1_000_000, "nanoseconds": 1_000_000_000}
_MARKER = re.compile(r"_(SUCCESS|temporary|metadata|common_metadata|delta_log|spark_metadata|committed_.*|started_.*)")
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
        clock: int8 [rows], whether the local time was SINGLE, REPEATED or MISSING on the day.
    """

    rows: pa.Table
    time_ms: np.ndarray
    row_hash: np.ndarray
    refused: list[Refused]
    clock: np.ndarray


class RawLocation:
    """A folder (or URI) of raw files."""

    def __init__(self, uri: str) -> None:
        # Absolute: the executors of a cluster work in folders of their own.
        self.uri = without_secrets(uri, "--raw") if "://" in uri else os.path.abspath(uri)
        try:
            self.fs, self.root = pafs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise kind_of(error)(
                f"the raw folder {uri} cannot be opened: {error}",
                "give a path, or a URI such as s3://bucket/folder?region=eu-central-1",
            ) from None

    # ---- which files ---------------------------------------------------------------------------------------------

    def matching(self, globs: Sequence[str], days: NamedDays | None = None) -> list[RawFile]:
        """Return the files that match, in name order; their names are relative to the folder. Hidden ones are left out.

        Raises:
            StageError: the folder does not exist.
        """
        found = {}
        for info, name in self._listed(globs):
            if any(_matches(name, glob) for glob in globs) and not _hidden(name, globs):
                promised = named_days(name, days) if days else (None, None, None, None)
                found[name] = RawFile(info.path, name, info.size, info.mtime_ns or 0, *promised)
        return [found[name] for name in sorted(found)]

    def hidden(self, globs: Sequence[str]) -> list[str]:
        """Return the names of files that match and are left out.

        Those that macOS, Spark and editors put next to the ones that they are about.
        """
        return sorted(
            {
                name
                for _, name in self._listed(globs)
                if any(_matches(name, glob) for glob in globs) and _hidden(name, globs)
            }
        )

    def _listed(self, globs: Sequence[str]) -> Iterator[tuple[pafs.FileInfo, str]]:
        """Yield the files among which those that match are, with their names relative to the folder."""
        root = self.root.rstrip("/")
        # A folder that a glob names before its first wildcard is listed with all below it; without a slash nothing is
        # below.
        folders = {re.split(r"[*?[]", glob, maxsplit=1)[0].rpartition("/")[0]: True for glob in globs if "/" in glob}
        if any("/" not in glob for glob in globs):
            folders.setdefault("", False)
        infos: list[pafs.FileInfo] = []
        for folder, recursive in folders.items():
            infos += self.fs.get_file_info(
                pafs.FileSelector(
                    f"{root}/{folder}" if folder else self.root, allow_not_found=True, recursive=recursive
                )
            )
        if not infos and self.fs.get_file_info(self.root).type != pafs.FileType.Directory:
            raise StageError(
                f"the raw folder {self.uri} does not exist",
                "give the folder that holds the published files with --raw (RAW= for make run)",
            )
        for info in infos:
            if info.type == pafs.FileType.File:
                yield info, info.path[len(root) :].lstrip("/")

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
            kind, wanted = (
                ("simulated", f"{definition.name}_simulated")
                if simulated
                else ("not simulated", definition.name.removesuffix("_simulated"))
            )
            raise StageError(
                f"the logs in {self.uri} are {kind}, but the data set is {definition.name}", f"use --dataset {wanted}"
            )
        if not files:
            globs = definition.logs.files
            deep = self._one_folder_deeper(globs)
            below = f"; a folder in it holds {deep}" if deep else ""
            remedy = (
                f"name the folders in logs.files, such as '{_with_wildcards(deep)}'"
                if deep
                else "put the published log files there, or correct --raw"
            )
            raise StageError(f"no log file in {self.uri}: nothing matches {', '.join(globs)}{below}", remedy)
        return files

    def _one_folder_deeper(self, globs: Sequence[str]) -> str | None:
        """Return the name of a file in one of the first folders here that would match if it lay here."""
        folders = [
            info for info in self.fs.get_file_info(pafs.FileSelector(self.root)) if info.type == pafs.FileType.Directory
        ][:20]
        for folder in folders:
            for info in self.fs.get_file_info(pafs.FileSelector(folder.path)):
                if info.type == pafs.FileType.File and any(_matches(info.base_name, glob) for glob in globs):
                    return f"{folder.base_name}/{info.base_name}"
        return None

    def notes(self, files: Sequence[RawFile], definition: DatasetDefinition) -> list[str]:
        """Return what is no fault, but what whoever delivers the files should know.

        Hidden files, ids that look like lists.
        """
        logs, notes = definition.logs, []
        if hidden := self.hidden(logs.files):
            notes.append(f"{len(hidden)} hidden file(s) in {self.uri} are not read, such as {hidden[0]}")
        if files and logs.format != "parquet" and files[0].size:
            header, head = self.header(files[0], logs), self.head(files[0], logs)
            body = head.partition(b"\n")[2] if logs.names_columns else head
            rows, *_ = parse_lines(
                body[: body.rfind(b"\n") + 1], 1, header, logs.model_copy(update={"encoding": "utf-8"})
            )
            for part, name in (("user", definition.events.user), ("item", definition.events.item)):
                texts = rows[name].to_pylist() if logs.columns[name].type == "text" else []
                lists = [text for text in texts if _is_list(text)]
                if 2 * len(lists) > len(texts):
                    notes.append(
                        f"events.{part}: {len(lists):,} of the first {len(texts):,} values of {name} look like lists,"
                        f" such as {lists[0][:60]!r}: each is taken for one id; write one line for each of its values"
                        " if they are several"
                    )
        return notes

    def head(self, file: RawFile, logs: Logs, size: int = HEAD_TEXT_BYTES, encoded: bool = False) -> bytes:
        """Return the beginning of a text file, unpacked, and with \\n for line ends: its first line at least, and
        `size` bytes.

        Args:
            encoded: leave it in its own encoding, instead of UTF-8.

        Raises:
            StageError: it is not text.
            OSError, DamagedError: it cannot be read.
        """
        text = b""
        try:
            for piece in self._text(file, min(size, BLOCK_BYTES)):
                if not text and (foreign := foreign_kind(piece)) is not None:
                    raise StageError(f"{file.name} in {self.uri} is {foreign[0]}", foreign[1])
                text += piece
                if b"\n" in text and len(text) >= size:
                    break
        except DamagedError:
            # What breaks off behind its first line has a header: the break is reported with its row, by whoever reads.
            if b"\n" not in text:
                raise
        text = text.removeprefix(BOM)
        return text if encoded else _recoded(text, logs.encoding)[0]

    def column_names(self, file: RawFile, logs: Logs) -> tuple[str, ...]:
        """Return the columns that a log file names, or those of its first line where it names none.

        Raises:
            StageError: the file is empty, or not what the definition says.
            OSError, pa.ArrowInvalid, DamagedError: it cannot be read.
        """
        if logs.format == "parquet":
            return tuple(self._schema(file).names)
        head = self.head(file, logs) if file.size else b""
        if not head.strip():
            raise StageError(f"{file.name} in {self.uri} is empty", "deliver the file again, or remove it")
        if logs.format == "jsonl":
            return self._keys(file, head, logs)
        first = head.split(b"\n", 1)[0].decode("utf-8", "replace").rstrip("\r").replace("\0", "")
        # Names may be quoted where values are not.
        return tuple(split_line(first, logs.model_copy(update={"quoting": True})))

    def _keys(self, file: RawFile, head: bytes, logs: Logs) -> tuple[str, ...]:
        """Return the keys of the objects in the first lines of a file of JSON lines."""
        if head.lstrip().startswith(b"["):
            raise StageError(
                f"{file.name} in {self.uri} holds an array of JSON, not one object a line",
                "write it as JSON lines: jq -c '.[]'",
            )
        keys: dict[str, None] = {}
        for line in head.split(b"\n")[:100]:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                keys |= dict.fromkeys(row if isinstance(row, dict) else ())
        if not keys:
            raise StageError(
                f"{file.name} in {self.uri} holds no object of JSON in its first lines: {head[:80]!r}",
                "correct logs.format of the definition",
            )
        return tuple(keys)

    def header(self, file: RawFile, logs: Logs) -> tuple[str, ...]:
        """Return the columns of a log file, in its order; of JSON lines the declared ones.

        Raises:
            StageError: the file cannot be read, is empty, or lacks a declared column.
        """
        where = f"{file.name} in {self.uri}"
        schema = None
        try:
            if logs.format == "parquet":
                schema = self._schema(file)
            found = self.column_names(file, logs) if schema is None else tuple(schema.names)
        # Of an archive: it is none, or breaks off within the header.
        except (OSError, pa.ArrowInvalid, DamagedError) as error:
            raise kind_of(error)(f"{where} cannot be read: {error}", "deliver the file again, or remove it") from None
        if logs.format == "csv" and not logs.header:
            _check_unnamed(where, found, logs)
            return tuple(logs.columns)
        _refuse_missing(file, where, found, logs)
        if len(set(found)) < len(found):
            raise StageError(f"{where} has a column twice: {', '.join(found)[:500]}", "deliver the file again")
        if schema is not None:
            self._check_types(file, schema, logs)
        return found if logs.format != "jsonl" else tuple(logs.columns)

    def _schema(self, file: RawFile) -> pa.Schema:
        return pq.read_schema(file.path, filesystem=self.fs)

    def _check_types(self, file: RawFile, schema: pa.Schema, logs: Logs) -> None:
        """Refuse a Parquet file whose columns are of a kind that no cast makes right."""
        for name, column in logs.columns.items():
            kind = schema.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            where = f"{file.name} in {self.uri}: column {name} is {kind}"
            if pa.types.is_nested(kind):
                raise StageError(
                    f"{where}: several values in one cell",
                    "write one row for each of its values (explode): a row is one event",
                )
            native = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
            if native and column.type != "timestamp":
                raise StageError(
                    f"{where}, not {column.type}",
                    f"set logs.columns.{name}: timestamp, and leave out unit and format of events.time",
                )
            if column.type == "timestamp" and not native:
                raise StageError(
                    f"{where}, no timestamp",
                    f"set logs.columns.{name} to its type, and give events.time.unit or format",
                )
            if not can_be(kind, column.type):
                raise StageError(
                    f"{where}, which can hold no {column.type}",
                    "correct logs.columns of the definition, or deliver the file with a column of that type",
                )

    # ---- the same file twice --------------------------------------------------------------------------------------

    def content_digest(self, file: RawFile) -> str:
        """Return the SHA-256 of what a text file holds, unpacked, and of another file's bytes.

        Raises:
            OSError, DamagedError: it cannot be read.
        """
        with self.fs.open_input_stream(file.path, compression=None, buffer_size=BLOCK_BYTES) as stream:
            packed = compression_of(stream.read(HEAD_BYTES)) is not None
        if not packed:
            return sha256_of(self.fs, file.path)
        digest = hashlib.sha256()
        for block in self._text(file):
            digest.update(block)
        return digest.hexdigest()

    def refuse_copies(self, files: Sequence[RawFile], logs: Logs) -> None:
        """Refuse files that hold the same rows, such as a file and its archive: each of its rows would be there twice.

        Only files that begin alike are read whole. Files without a row have nothing that could be there twice.

        Raises:
            StageError: two files are copies.
        """
        begin: dict[bytes | int, list[RawFile]] = {}
        for file in files:
            if logs.format == "parquet":
                begin.setdefault(file.size, []).append(file)
                continue
            head = self.head(file, logs)
            if head.rstrip().count(b"\n") >= (logs.format == "csv" and logs.header):
                begin.setdefault(hashlib.sha256(head[:HEAD_TEXT_BYTES]).digest(), []).append(file)
        for alike in begin.values():
            seen: dict[str, RawFile] = {}
            for file in alike if len(alike) > 1 else []:
                try:
                    first = seen.setdefault(self.content_digest(file), file)
                except DamagedError:  # reported with the row at which it breaks, when it is read
                    continue
                if first is not file:
                    raise StageError(
                        f"{first.name} and {file.name} in {self.uri} hold the same rows: each would be there twice",
                        "remove one of them, or name only one in logs.files",
                    )

    # ---- splits --------------------------------------------------------------------------------------------------

    def splits(self, files: list[RawFile], logs: Logs, count_lines: Callable) -> list[Split]:
        """Cut files into parts; `count_lines([(file, start, end)]) -> [newlines]` runs where the compute is."""
        splits: list[Split] = []
        headers = {file.name: self.header(file, logs) for file in files}
        self.refuse_copies(files, logs)
        whole = {f.name for f in files if logs.format == "parquet" or f.size <= SPLIT_BYTES or self.is_stream(f)}
        ranges = [
            (file, start, min(start + SPLIT_BYTES, file.size))
            for file in files
            if file.name not in whole
            for start in range(0, file.size, SPLIT_BYTES)
        ]
        newlines = dict(zip([(f.name, s) for f, s, _ in ranges], count_lines(ranges), strict=True)) if ranges else {}
        for file in files:
            if logs.format == "parquet":
                splits += self._parquet_splits(file, headers[file.name])
            elif file.name in whole:
                splits.append(Split(file, 0, file.size, 1 + logs.names_columns, headers[file.name]))
            else:
                before = 0
                for start in range(0, file.size, SPLIT_BYTES):
                    # The first whole line after `start` follows the newline that ends the line crossing it.
                    splits.append(
                        Split(file, start, min(start + SPLIT_BYTES, file.size), before + 2, headers[file.name])
                    )
                    before += newlines[file.name, start]
        return splits

    def is_stream(self, file: RawFile) -> bool:
        """Whether a text file can only be read from its start: it is packed, or its lines end in CR alone."""
        with self.fs.open_input_stream(file.path, compression=None) as stream:
            head = stream.read(HEAD_TEXT_BYTES)
        return promised_compression(file.name) is not None or compression_of(head) is not None or _ends_in_cr(head)

    def count_newlines(self, file: RawFile, start: int, end: int) -> int:
        """Return the number of newlines among the bytes [start, end)."""
        with self.fs.open_input_file(file.path) as stream:
            return stream.read_at(end - start, start).count(b"\n")

    def _parquet_splits(self, file: RawFile, header: tuple[str, ...]) -> Iterator[Split]:
        with pq.ParquetFile(file.path, filesystem=self.fs) as parquet:
            groups = [parquet.metadata.row_group(g) for g in range(parquet.num_row_groups)]
        first, row, size = 0, 1, 0
        # Small groups are read together: a task costs more than such a group.
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
            row, names = split.first_row, [name for name in split.header if name in logs.columns]
            with pq.ParquetFile(split.file.path, filesystem=self.fs) as parquet:
                for batch in parquet.iter_batches(
                    batch_size=1 << 18, row_groups=list(range(split.start, split.end)), columns=names
                ):
                    yield checked_batch(batch, row, definition)
                    row += batch.num_rows
            return
        for body, first_row, broken in self._lines(split, logs):
            chunk = checked_lines(body, first_row, split.header, definition)
            if broken is not None:
                lines = body.count(b"\n") + (bool(body) and not body.endswith(b"\n"))
                chunk.refused.append(Refused(first_row + lines, broken, b""))
            yield chunk

    def _lines(self, split: Split, logs: Logs) -> Iterator[tuple[bytes, int, str | None]]:
        """Yield (whole lines, row number of the first, what broke off here or None) of a split, without the header."""
        if self.is_stream(split.file):
            yield from self._stream_lines(split, logs)
            return
        with self.fs.open_input_file(split.file.path) as stream:
            body = stream.read_at(split.end - split.start, split.start)
            # A line belongs to the split that it begins in: this one reads on to the end of its last line, and drops
            # the line that the split before has read to its end.
            if split.end < split.file.size and not body.endswith(b"\n"):
                body += _to_newline(stream, split.end)
            cut_line = split.start > 0 and stream.read_at(1, split.start - 1) != b"\n"
        first_row = split.first_row
        if split.start == 0:
            body = body.removeprefix(BOM)
        elif not cut_line:
            first_row -= 1  # the split before ended right on a newline: all of this one's lines are its own
        if cut_line or (split.start == 0 and logs.names_columns):
            _, _, body = body.partition(b"\n")
        # A piece at a time, as of a packed file: what is made of a whole split at once does not stay in the processor's
        # cache.
        start, end = 0, -1
        while end < len(body):
            end = body.find(b"\n", start + BLOCK_BYTES) + 1 or len(body)
            yield body[start:end], first_row, None
            first_row += body.count(b"\n", start, end)
            start = end

    def _stream_lines(self, split: Split, logs: Logs) -> Iterator[tuple[bytes, int, str | None]]:
        rest, row, header_gone, broken = b"", split.first_row, not logs.names_columns, None
        pieces, first = self._text(split.file), True
        while broken is None:
            try:
                piece = next(pieces, None)
            except DamagedError as damage:
                broken = f"{damage.code}: {damage}"
                break
            if piece is None:
                break
            body, newline, rest = (rest + (piece.removeprefix(BOM) if first else piece)).rpartition(b"\n")
            first = False
            if newline:
                body += b"\n"
                if not header_gone:
                    _, _, body = body.partition(b"\n")
                    header_gone = True
                yield body, row, None
                row += body.count(b"\n")
        if rest or broken is not None:
            yield rest if header_gone and broken is None else b"", row, broken

    def _text(self, file: RawFile, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        """Yield what a text file holds from its start: unpacked, and with \\n where its lines end in CR alone.

        Raises:
            DamagedError: it breaks off here.
        """
        with self.fs.open_input_stream(file.path, compression=None) as stream:
            kind = compression_of(stream.read(HEAD_BYTES))
        promised = promised_compression(file.name)
        if kind is None and promised is not None:
            raise DamagedError(f"broken_{promised}", f"its name promises {promised}, its first bytes are not of it")
        seekable = kind == "zip"
        with (
            self.fs.open_input_file(file.path)
            if seekable
            else self.fs.open_input_stream(file.path, compression=None, buffer_size=block_bytes)
        ) as stream:
            cr = None
            for piece in unpacked(stream, kind, block_bytes):
                if cr is None:
                    cr = _ends_in_cr(piece)
                yield piece.replace(b"\r", b"\n") if cr else piece


def parse_lines(
    body: bytes, first_row: int, header: tuple[str, ...], logs: Logs
) -> tuple[pa.Table, np.ndarray, pa.Array, list[Refused]]:
    """Split whole lines into typed rows and refused ones; blank lines are neither.

    Nearly every line can be cast as it stands, and one regular expression recognises it. Of the others those are read
    cell by cell (as columns, too) that hold a word for a missing value, an integer written as a decimal, or 19 digits;
    for what is left the reason of its refusal is looked for.

    Returns:
        the declared columns of the good lines, their row numbers, these lines, and the refused ones.
    """
    if b"\r" in body:
        body = body.replace(b"\r\n", b"\n")
    body, undecodable = _recoded(body, logs.encoding)
    if body.endswith(b"\n"):
        body = body[:-1]
    elif not body:
        return _no_rows(logs), np.zeros(0, np.int64), pa.array([], pa.large_binary()), []
    if logs.format == "jsonl":
        return _parse_json_lines(body, first_row, logs, undecodable)
    parsed = logs
    if len(logs.delimiter.encode()) > 1:  # the parser takes one byte
        mark = next((mark for mark in MARKS if mark.encode() not in body), MARKS[0])
        body, parsed = body.replace(logs.delimiter.encode(), mark.encode()), logs.model_copy(update={"delimiter": mark})
    lines = pc.split_pattern(pa.array([body], pa.large_binary()), b"\n")[0].values
    good = _matching(lines, line_pattern(header, parsed))
    # The pattern takes any bytes; only a body that is not UTF-8 as a whole is worth a look at each line.
    if not _is_utf8(body):
        good &= np.fromiter((_is_utf8(line) for line in lines.to_pylist()), dtype=bool, count=len(lines))
    good[list(undecodable)] = False
    rows = _cast(body if good.all() else _joined(lines, good), header, parsed)
    rows, right = _without_words(rows, logs)
    if not right.all():
        good[np.flatnonzero(good)[~right]] = False
        rows = rows.filter(pa.array(right))
    number = np.flatnonzero(good)
    blank = np.zeros(len(lines), bool)
    if not good.all():
        left = np.flatnonzero(~good)
        blank[left] = _blank(lines.take(pa.array(left)), parsed)
        left = left[~blank[left] & ~np.isin(left, list(undecodable))]
        more, found = _read_cells(lines.take(pa.array(left)), header, parsed)
        if len(found):
            # Back in the order of the file: a row's number is that of its line.
            order = np.argsort(np.concatenate([number, left[found]]), kind="stable")
            good[left[found]], number = True, np.concatenate([number, left[found]])[order]
            rows = pa.concat_tables([rows, more]).take(pa.array(order))
    refused = []
    for place in np.flatnonzero(~good & ~blank).tolist():
        line = lines[place].as_py()
        # With its own delimiter: whoever delivers the file has to find the line in it.
        line = line if parsed is logs else line.replace(parsed.delimiter.encode(), logs.delimiter.encode())
        refused.append(Refused(first_row + place, undecodable.get(place) or reason_for(line, header, logs), line))
    if parsed is not logs and logs.quoting:
        for place, (name, column) in enumerate(logs.columns.items()):
            if column.type == "text":
                rows = rows.set_column(place, name, pc.replace_substring(rows[name], parsed.delimiter, logs.delimiter))
    return rows, first_row + number, lines if good.all() else lines.filter(pa.array(good)), refused


def _parse_json_lines(
    body: bytes, first_row: int, logs: Logs, undecodable: dict[int, str]
) -> tuple[pa.Table, np.ndarray, pa.Array, list[Refused]]:
    """Do what `parse_lines` does: nearly every line has the keys of the first one, in its order, with plain values."""
    lines = pc.split_pattern(pa.array([body], pa.large_binary()), b"\n")[0].values
    good, rows = np.zeros(len(lines), bool), _no_rows(logs)
    pattern = plain_object_pattern(body.lstrip().split(b"\n", 1)[0], logs)
    if pattern is not None and not undecodable and _is_utf8(body):
        good = _matching(lines, pattern)
        rows, right = _without_words(_read_json(body if good.all() else _joined(lines, good), logs), logs)
        good[np.flatnonzero(good)[~right]] = False
        rows = rows.filter(pa.array(right))
    cells: list[list[str]] = []
    number, refused = [], []
    for place in np.flatnonzero(~good).tolist():
        line = lines[place].as_py()
        if not line.strip():
            continue
        try:
            if place in undecodable:
                raise NotARowError(undecodable[place])
            cells.append(_line_cells(line, tuple(logs.columns), logs))
            number.append(place)
        except NotARowError as error:
            refused.append(Refused(first_row + place, str(error), line))
    if cells:
        columns = [
            typed_cells(pa.array(texts, pa.string()), column, logs.missing)[0]
            for texts, column in zip(zip(*cells, strict=True), logs.columns.values(), strict=True)
        ]
        order = np.argsort(np.concatenate([np.flatnonzero(good), number]), kind="stable")
        rows = pa.concat_tables([rows, pa.table(columns, names=list(logs.columns))]).take(pa.array(order))
        good[number] = True
    return rows, first_row + np.flatnonzero(good), lines.filter(pa.array(good)), refused


def _read_json(body: bytes, logs: Logs) -> pa.Table:
    """Return the declared columns of objects that are known to be plain."""
    if not body:
        return _no_rows(logs)
    schema = pa.schema([(name, ARROW_TYPES[column.type]) for name, column in logs.columns.items()])
    rows = pajson.read_json(
        pa.BufferReader(body),
        pajson.ReadOptions(use_threads=False, block_size=len(body) + 1),
        pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    return rows.select(schema.names)


def _no_rows(logs: Logs) -> pa.Table:
    return pa.table({name: pa.array([], ARROW_TYPES[column.type]) for name, column in logs.columns.items()})


def _matching(lines: pa.Array, pattern: str) -> np.ndarray:
    return pc.match_substring_regex(lines, pattern).to_numpy(zero_copy_only=False).copy()


def _joined(lines: pa.Array, which: np.ndarray) -> bytes:
    return b"\n".join(lines.filter(pa.array(which)).to_pylist())


def _cast(body: bytes, header: tuple[str, ...], logs: Logs, as_text: bool = False) -> pa.Table:
    """Return the declared columns of lines that are known to be right."""
    types = {name: pa.string() if as_text else ARROW_TYPES[column.type] for name, column in logs.columns.items()}
    if not body:
        return pa.table({name: pa.array([], kind) for name, kind in types.items()})
    return pacsv.read_csv(
        pa.BufferReader(body),
        pacsv.ReadOptions(column_names=list(header), use_threads=False, block_size=len(body) + 1),
        pacsv.ParseOptions(
            delimiter=logs.delimiter, quote_char='"' if logs.quoting else False, ignore_empty_lines=False
        ),
        pacsv.ConvertOptions(
            column_types=types, include_columns=list(types), null_values=[""], strings_can_be_null=False
        ),
    )


def _without_words(rows: pa.Table, logs: Logs) -> tuple[pa.Table, np.ndarray]:
    """Return the rows with null for texts that mean "no value", and bool [rows]: which lack no value that they need."""
    right = np.ones(rows.num_rows, bool)
    for place, (name, column) in enumerate(logs.columns.items()):
        words = missing_numbers(column, logs.missing)
        if column.type != "text" and words is None:
            continue
        gone = is_missing(rows[name], logs.missing) if words is None else pc.is_in(rows[name], value_set=words)
        if pc.any(gone).as_py():
            rows = rows.set_column(place, name, pc.if_else(gone, pa.scalar(None, rows[name].type), rows[name]))
            if not column.optional:
                right &= ~gone.combine_chunks().to_numpy(zero_copy_only=False)
    return rows, right


def _read_cells(lines: pa.Array, header: tuple[str, ...], logs: Logs) -> tuple[pa.Table, np.ndarray]:
    """Read lines whose cells are not all as they have to be cast; return the rows, and the places of their lines."""
    whole = _matching(lines, _line_pattern(header, (), logs.delimiter, logs.quoting))
    whole &= np.fromiter((_is_utf8(line) for line in lines.to_pylist()), dtype=bool, count=len(lines))
    texts = _cast(_joined(lines, whole), header, logs, as_text=True)
    right, columns = np.ones(texts.num_rows, bool), []
    for name, column in logs.columns.items():
        values, ok = typed_cells(texts[name], column, logs.missing)
        columns.append(values)
        right &= ok
    return pa.table(columns, names=list(logs.columns)).filter(pa.array(right)), np.flatnonzero(whole)[right]


def _blank(lines: pa.Array, logs: Logs) -> np.ndarray:
    """Return which lines hold nothing; one of blanks alone does, where blanks do not stand between its cells."""
    blanks = "".join({" ", "\t", "\r"} - {logs.delimiter})
    return _matching(lines, rf"\A[{blanks}]*\z")


def _recoded(body: bytes, encoding: str) -> tuple[bytes, dict[int, str]]:
    """Return lines in UTF-8, and place -> reason of those that are not of the encoding; they stay as they are."""
    if encoding == "utf-8":
        return body, {}
    try:
        return body.decode(encoding).encode(), {}
    except UnicodeDecodeError:
        lines, wrong = body.split(b"\n"), {}
        for place, line in enumerate(lines):
            try:
                lines[place] = line.decode(encoding).encode()
            except UnicodeDecodeError as error:
                wrong[place] = f"not_of_the_encoding: byte {error.start} of the line is no {encoding}"
        return b"\n".join(lines), wrong


@functools.lru_cache(maxsize=64)
def _line_pattern(
    header: tuple[str, ...], shapes: tuple[tuple[str, str, bool], ...], delimiter: str, quoting: bool
) -> str:
    declared = {name: (kind, optional) for name, kind, optional in shapes}
    d = re.escape(delimiter)
    cells = []
    for name in header:
        kind, optional = declared.get(name, ("text", True))
        many = "*" if optional else "+"
        plain = _CELL.get(kind) or (rf'[^{d}\x00\r"]{many}' if quoting else rf"[^{d}\x00\r]{many}")
        quoted = rf'"{_CELL[kind]}"' if kind in _CELL else rf'"(?:[^"\x00\r]|""){many}"'
        cell = f"(?:{plain}|{quoted}{'|' + chr(34) * 2 if optional else ''})" if quoting else plain
        cells.append(f"(?:{cell})?" if optional and kind in _CELL else cell)
    return r"\A" + d.join(cells) + r"\z"


def line_pattern(header: tuple[str, ...], logs: Logs) -> str:
    """Return the regular expression (RE2) of a line that can be cast as it stands."""
    return _line_pattern(
        header, tuple((n, c.type, c.optional) for n, c in logs.columns.items()), logs.delimiter, logs.quoting
    )


def reason_for(line: bytes, header: tuple[str, ...], logs: Logs) -> str:
    """Return why a line is not a row: a code, a colon, and the detail."""
    try:
        _line_cells(line, header, logs)
    except NotARowError as error:
        return str(error)
    if b"\r" in line:
        return "carriage_return: one that ends no line"
    return "broken_quotes: a quote within a value, or one that does not end"


def _line_cells(line: bytes, header: tuple[str, ...], logs: Logs) -> list[str]:
    """Return the cells of a line, each a value of its column.

    Raises:
        NotARowError: they are not.
    """
    if b"\x00" in line:
        raise NotARowError("nul_byte: the line holds NUL bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotARowError(f"not_utf8: byte {error.start} of the line; logs.encoding names another encoding") from None
    cells = split_line(text, logs)
    if len(cells) != len(header):
        raise NotARowError(f"wrong_column_count: {len(cells)} instead of {len(header)}")
    for name, cell in zip(header, cells, strict=True):
        column = logs.columns.get(name)
        if column is not None and (reason := why_wrong(name, cell, column, logs.missing)) is not None:
            raise NotARowError(reason)
    return cells


def named_days(name: str, days: NamedDays) -> tuple[str | None, str | None, str | None, str | None]:
    """Return the first and last local day that a file's name promises, and the first and last UTC day that it
    may hold."""
    match = re.search(days.pattern, name)
    if match is None:
        return None, None, None, None
    zone = zoneinfo.ZoneInfo(days.zone or "UTC")
    try:
        groups = {key: int(value) for key, value in match.groupdict().items() if value is not None}
        year = groups.get("year", days.year or 0)
        first = dtm.date(year, groups["month"], groups["day"])
        last = dtm.date(
            groups.get("last_year", year), groups.get("last_month", first.month), groups.get("last_day", first.day)
        )
        if last < first and "last_year" not in groups:  # names without a year that span New Year
            last = last.replace(year=last.year + 1)
        begin = dtm.datetime.combine(first, dtm.time(), zone) - dtm.timedelta(minutes=days.late_minutes)
        end = dtm.datetime.combine(last + dtm.timedelta(days=1), dtm.time(), zone) - dtm.timedelta(microseconds=1)
        return (
            first.isoformat(),
            last.isoformat(),
            begin.astimezone(dtm.UTC).date().isoformat(),
            end.astimezone(dtm.UTC).date().isoformat(),
        )
    except (ValueError, OverflowError, KeyError):  # no numbers, or no days: the name promises nothing
        return None, None, None, None


def time_values(columns: Sequence[pa.ChunkedArray | pa.Array]) -> pa.ChunkedArray | pa.Array:
    """Return what times are read from: one column as it is, the texts of several joined by blanks."""
    return (
        columns[0]
        if len(columns) == 1
        else pc.binary_join_element_wise(*[column.cast(pa.string()) for column in columns], " ")
    )


def times_ms(values: pa.ChunkedArray | pa.Array, time: Time) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 Unix milliseconds, and which of them are times at all (others are 0)."""
    return clocked_times_ms(values, time)[:2]


def clocked_times_ms(values: pa.ChunkedArray | pa.Array, time: Time) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return int64 Unix milliseconds, which of them are times at all (others are 0), and int8: SINGLE, REPEATED or
    MISSING.

    Where clocks are set back, the repeated hour is read as its second pass (standard time). Where they are set forward,
    a time of the hour that does not exist is read by the clock as it was before.
    """
    import pandas as pd

    if pa.types.is_timestamp(values.type):
        stamps, clock = _utc_stamps(pd.Series(values.to_numpy()), time.zone)
        return *_epoch_ms(stamps), clock
    if time.unit is not None:
        per_second = _UNIT_PER_SECOND[time.unit]
        number = values.to_numpy()
        origin = day_number(time.origin.isoformat()) * MS_PER_DAY
        low, high = (
            (day_number(day) * MS_PER_DAY - origin) * per_second // 1_000 for day in ("1900-01-01", "2200-01-01")
        )
        there = (number >= low) & (number < high)  # false for nan; beyond it a product would not fit
        number = np.where(there, number, 0)
        if number.dtype.kind == "f":
            return (
                np.rint(number * (1_000 / per_second)).astype(np.int64) + origin,
                there,
                np.full(len(number), SINGLE, np.int8),
            )
        return (
            (number * 1_000 if per_second == 1 else number // (per_second // 1_000)) + origin,
            there,
            np.full(len(number), SINGLE, np.int8),
        )
    # A text is parsed once however many rows have it: events of one page or one second share theirs.
    encoded = pc.dictionary_encode(values.cast(pa.string()))
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    texts = pd.Series(encoded.dictionary.to_pylist(), dtype=object).astype(str)
    if time.digits:
        texts = texts.str.zfill(time.digits)
    form, dated = (time.format, texts) if time.year is None else (f"%Y {time.format}", f"{time.year} " + texts)
    if "%z" in str(form):
        stamps = pd.to_datetime(dated, format=form, errors="coerce", utc=True)  # each text has its own offset
        clock = np.full(len(stamps), SINGLE, np.int8)
    else:
        stamps, clock = _utc_stamps(pd.to_datetime(dated, format=form, errors="coerce"), time.zone)
    known, there = _epoch_ms(stamps)
    # strptime takes blanks for digits ("08 9" for the 9th of August).
    there &= (texts.str.count(r"\s") == len(re.findall(r"\s", str(time.format)))).to_numpy()
    code = encoded.indices.to_numpy()
    return known[code], there[code], clock[code]


def _utc_stamps(local, zone: str):
    """Return local stamps as UTC ones, and whether each was SINGLE, REPEATED or MISSING on its day."""
    second = np.zeros(len(local), dtype=bool)
    stamps = local.dt.tz_localize(zone, ambiguous=second, nonexistent="shift_backward").dt.tz_convert("UTC")
    there, clock = ~local.isna().to_numpy(), np.full(len(local), SINGLE, np.int8)
    if (unclear := local.dt.tz_localize(zone, ambiguous="NaT", nonexistent="NaT").isna().to_numpy() & there).any():
        missing = local.dt.tz_localize(zone, ambiguous=second, nonexistent="NaT").isna().to_numpy() & there
        before = stamps.dt.tz_convert(zone).dt.tz_localize(None) - stamps.dt.tz_localize(
            None
        )  # the offset of the last moment before the gap
        stamps = stamps.where(~missing, (local - before).dt.tz_localize("UTC"))
        clock[unclear], clock[missing] = REPEATED, MISSING
    return stamps, clock


def _epoch_ms(stamps) -> tuple[np.ndarray, np.ndarray]:
    there = ~stamps.isna().to_numpy()
    return (
        np.where(
            there,
            stamps.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("datetime64[ms]").astype(np.int64),
            0,
        ),
        there,
    )


def hashed_ids(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return int64 ids: whole numbers as they are, texts as 63-bit hashes that are the same everywhere and always."""
    if pa.types.is_integer(values.type):
        return values.to_numpy()
    # Without the lowest bit an id is never negative as int64.
    return (_text_hash(values) >> np.uint64(1)).astype(np.int64)


def row_hashes(rows: pa.Table) -> np.ndarray:
    """Return int64 hashes of whole rows."""
    mixed = np.zeros(rows.num_rows, dtype=np.uint64)
    for column in rows.columns:
        if pa.types.is_string(column.type):
            bits = _text_hash(column)
        else:
            numbers = column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
            known = numbers.fill_null(0).to_numpy()
            # A null must not have the hash of the 0 that fills it.
            bits = (
                known.view(np.uint64) ^ (column.is_null().to_numpy().astype(np.uint64) * np.uint64(0x5BD1E995))
                if column.null_count
                else known.view(np.uint64)
            )
        mixed = (mixed ^ bits) * _HASH_MULTIPLIER
        mixed ^= mixed >> np.uint64(29)
    return mixed.view(np.int64)


def _text_hash(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    import pandas as pd

    # Each distinct text is hashed once: the hash takes Python objects, which are slow to make.
    encoded = pc.dictionary_encode(values.fill_null(""))
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    distinct = np.array(encoded.dictionary.to_pylist(), dtype=object)
    return (
        pd.util.hash_array(distinct, categorize=False)[encoded.indices.to_numpy()]
        if len(distinct)
        else np.zeros(0, np.uint64)
    )


def checked_lines(body: bytes, first_row: int, header: tuple[str, ...], definition: DatasetDefinition) -> Chunk:
    """Return whole lines of a text log, typed and checked against the definition.

    Row numbers count from `first_row`.
    """
    rows, row_number, lines, refused = parse_lines(body, first_row, header, definition.logs)
    return _checked(rows, row_number, _with_times(refused, header, definition), lines, definition)


def checked_batch(batch: pa.RecordBatch, first_row: int, definition: DatasetDefinition) -> Chunk:
    """Return rows of a Parquet log, typed and checked against the definition; row numbers count from `first_row`."""
    rows, reasons = typed_rows(batch, definition.logs)
    if not reasons:
        return _checked(rows, np.arange(first_row, first_row + batch.num_rows), [], None, definition)
    places = np.array(sorted(reasons))
    # A refused row is filed under its day, so its time is looked for even here.
    time_ms, there = _known_times(rows.take(places), definition)
    refused = [
        Refused(first_row + place, reasons[place], row_text(batch, place), ms if ok else None)
        for place, ms, ok in zip(places.tolist(), time_ms.tolist(), there.tolist(), strict=True)
    ]
    typed = np.setdiff1d(np.arange(batch.num_rows), places)
    return _checked(rows.take(typed), first_row + typed, refused, None, definition)


def _known_times(rows: pa.Table, definition: DatasetDefinition) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 Unix milliseconds of refused rows, and which of these are times within the definition's bounds."""
    time = definition.events.time
    there, columns = np.ones(rows.num_rows, bool), []
    for name in time.columns:
        there &= rows[name].is_valid().to_numpy()
        columns.append(
            rows[name].fill_null(
                "" if pa.types.is_string(rows[name].type) else pa.scalar(0, pa.int64()).cast(rows[name].type)
            )
        )
    time_ms, known = times_ms(time_values(columns), time)
    earliest, latest = _bounds_ms(time)
    return time_ms, there & known & (time_ms >= earliest) & (time_ms < latest)


def _checked(
    rows: pa.Table,
    row_number: np.ndarray,
    refused: list[Refused],
    lines: pa.Array | None,
    definition: DatasetDefinition,
) -> Chunk:
    """Refuse rows whose values cannot be right: bounds, allowed values, time."""
    time = definition.events.time
    time_ms, there, clock = clocked_times_ms(time_values([rows[name] for name in time.columns]), time)
    earliest, latest = _bounds_ms(time)
    in_range = there & (time_ms >= earliest) & (time_ms < latest)
    bad = ~in_range
    reasons: dict[int, str] = {}
    for row in np.flatnonzero(bad):
        cells = [
            str(rows[name][int(row)].as_py()) if len(time.columns) > 1 else rows[name][int(row)].as_py()
            for name in time.columns
        ]
        code = "time_out_of_range" if there[row] or not time.format else "not_a_time"
        reasons[int(row)] = f"{code}: {'+'.join(time.columns)}={' '.join(cells) if len(cells) > 1 else cells[0]!r:.60}"
    for name, column in definition.logs.columns.items():
        for code, wrong in _value_checks(rows[name], column):
            wrong &= ~bad  # a row has one reason, the first that was found
            for row in np.flatnonzero(wrong):
                reasons[int(row)] = f"{code}: {name}={rows[name][int(row)].as_py()!r:.60}"
            bad |= wrong
    if reasons:
        for place, reason in sorted(reasons.items()):
            text = lines[place].as_py() if lines is not None else row_text(rows, place)
            refused.append(
                Refused(int(row_number[place]), reason, text, int(time_ms[place]) if in_range[place] else None)
            )
        rows, time_ms, clock = rows.filter(pa.array(~bad)), time_ms[~bad], clock[~bad]
    return Chunk(rows, time_ms, row_hashes(rows), refused, clock)


def _with_times(refused: list[Refused], header: tuple[str, ...], definition: DatasetDefinition) -> list[Refused]:
    """Return refused lines with their times where the time's own cell is right, so that they are filed under their
    days.
    """
    if not refused:
        return refused
    logs, time = definition.logs, definition.events.time
    header = tuple(logs.columns) if logs.format == "jsonl" else header
    lines = [_cells_or_none(r.raw_text, logs) for r in refused]
    there, columns = np.ones(len(refused), bool), []
    for name in time.columns:
        position, column = header.index(name), logs.columns[name]
        texts = pa.array([cells[position] if len(cells) > position else "" for cells in lines], pa.string())
        values, right = typed_cells(texts, column, logs.missing)
        there &= right
        columns.append(values.fill_null("" if column.type == "text" else 0))
    time_ms, known = times_ms(time_values(columns), time)
    earliest, latest = _bounds_ms(time)
    there &= known & (time_ms >= earliest) & (time_ms < latest)
    return [
        dataclasses.replace(r, time_ms=int(ms)) if ok else r for r, ms, ok in zip(refused, time_ms, there, strict=True)
    ]


def _cells_or_none(line: bytes, logs: Logs) -> list[str]:
    try:
        return split_line(line.decode("utf-8", "replace").replace("\x00", ""), logs)
    except NotARowError:
        return []


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


def day_of(refused: Refused, file: RawFile, fallback_dt: str) -> int:
    """Return the day number under which a refused row is filed: of its time, of its file's name, or the fallback."""
    if refused.time_ms is not None:
        return refused.time_ms // MS_PER_DAY
    return day_number(file.first_dt or fallback_dt)


def promised(files: list[RawFile]) -> str:
    """Return what the names of files promise, for messages."""
    return "; ".join(
        f"{f.name}: {f.first_dt or 'any day'}" + (f" .. {f.last_dt}" if f.last_dt != f.first_dt else "") for f in files
    )


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _ends_in_cr(text: bytes) -> bool:
    """Whether lines end in CR alone, by the beginning of a text."""
    return b"\r" in text.rstrip(b"\r") and b"\n" not in text


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]+([.:/-][0-9]+)*", text.strip()) is not None


def _check_unnamed(where: str, found: Sequence[str], logs: Logs) -> None:
    """Refuse a CSV file without a header whose first line cannot be a row of the definition's columns.

    Raises:
        StageError: it has more or fewer cells, or names the columns after all.
    """
    if len(found) != len(logs.columns):
        raise StageError(
            f"{where} has {len(found)} columns, its definition {len(logs.columns)}: {', '.join(logs.columns)}",
            "correct logs.columns or logs.delimiter of the definition, or set header: true",
        )
    if tuple(found) == tuple(logs.columns):
        raise StageError(
            f"the first line of {where} holds the names of its columns: {', '.join(found)[:500]}",
            "set header: true in logs of the definition",
        )


def _refuse_missing(file: RawFile, where: str, found: Sequence[str], logs: Logs) -> None:
    """Refuse a file that lacks a declared column, by the likeliest reason: that decides the remedy.

    Args:
        found: the columns that it has.

    Raises:
        StageError: it lacks one.
    """
    missing = [
        name
        for name, column in logs.columns.items()
        if name not in found and not (logs.format == "jsonl" and column.optional)
    ]
    if not missing:
        return
    if logs.format == "csv" and found[0].lstrip().startswith("{"):
        raise StageError(f"{where} holds objects of JSON: {found[0][:80]!r}", "set logs.format: jsonl")
    if logs.format == "csv" and len(missing) == len(logs.columns) and any(map(_is_number, found)):
        raise StageError(
            f"the first line of {where} holds values, not the names of columns: {', '.join(found)[:200]}",
            "set header: false in logs of the definition, and give logs.columns in the order of the file",
        )
    if len(found) == 1 and len(logs.columns) > 1:
        raise StageError(
            f"{where} has one column, {found[0][:200]!r}, when it is split at {logs.delimiter!r}",
            "correct logs.delimiter of the definition",
        )
    if of_path := [name for name in missing if f"/{name}=" in f"/{file.name}"]:
        raise StageError(
            f"{where} lacks the column {', '.join(of_path)}: it is part of its folder's name alone",
            "leave it out of logs.columns; logs.days_in_name may read a day from the folder's name",
        )
    raise StageError(
        f"{where} lacks the column {', '.join(missing)}; it has {', '.join(found)[:500]}",
        f"deliver the file with the columns {', '.join(logs.columns)}",
    )


def _is_list(text: str) -> bool:
    """Whether a text looks like several ids: between blanks, commas or bars each part has a digit."""
    parts = re.split(r"[\s,;|]+", text.strip("[](){} "))
    return len(parts) > 1 and all(re.search("[0-9]", part) for part in parts)


def _matches(name: str, glob: str) -> bool:
    """Whether a file's name with its folders matches; `*` stops at a slash, `**` stands for any number of folders."""
    return _parts_match(name.split("/"), glob.split("/"))


def _parts_match(parts: list[str], globs: list[str]) -> bool:
    if not globs or not parts:
        return not globs and not parts
    if globs[0] == "**":
        return any(_parts_match(parts[place:], globs[1:]) for place in range(len(parts)))
    return fnmatch.fnmatchcase(parts[0], globs[0]) and _parts_match(parts[1:], globs[1:])


def _hidden(name: str, globs: Sequence[str]) -> bool:
    """Whether a file only describes others (`._log.csv` of macOS, `.part-0.csv.crc`, `_SUCCESS`), unless a glob names
    such files.
    """
    named = {part[:1] for glob in globs for part in glob.split("/")}
    return any(
        (part.startswith(".") and "." not in named) or (_MARKER.fullmatch(part) and "_" not in named)
        for part in name.split("/")
    )


def _with_wildcards(name: str) -> str:
    """Return a glob that matches a file and its neighbours: digits stand for days and parts."""
    return re.sub(r"[0-9][0-9-]*", "*", name)


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

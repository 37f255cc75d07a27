"""Reads raw logs as they are published: every line becomes a typed row or a quarantined one, with its row number.

A line of a log is integers and commas. One regular expression over the whole line (vectorised) separates the lines that
can be cast as they stand from the few that are looked at one by one for the reason of their refusal.
"""

from __future__ import annotations

import fnmatch
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs

from etl.datasets import SIMULATED_MARKER, DatasetDefinition
from etl.errors import StageError
from etl.partitions import MS_PER_DAY, add_days, day_number

SPLIT_BYTES = 64 << 20
INFLATE_BYTES = 4 << 10
EARLIEST_MS, LATEST_MS = 946_684_800_000, 4_102_444_800_000  # 2000 .. 2100: catches seconds and microseconds
_NAMED_DAYS = re.compile(r"_(\d{1,2})_(\d{2})_to_(\d{1,2})_(\d{2})")
_INTEGER = re.compile(rb"-?[0-9]{1,18}\Z")


@dataclass(frozen=True)
class RawFile:
    """One raw file, with the local days that its name promises (None when it promises none)."""

    path: str
    name: str
    size: int
    first_local_dt: str | None
    last_local_dt: str | None

    def may_hold(self, utc_dt: str) -> bool:
        """Whether rows of a UTC day may be in it: local days run 8 hours ahead, and servers log up to an hour late."""
        if self.first_local_dt is None or self.last_local_dt is None:
            return True
        return add_days(self.first_local_dt, -1) <= utc_dt <= self.last_local_dt


@dataclass(frozen=True)
class Split:
    """A range of bytes of a raw file; `first_row` is the row number of its first whole line (the header is row 1)."""

    file: RawFile
    start: int
    end: int
    first_row: int


class RawLocation:
    """A folder (or URI) of raw files."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        import os

        self.fs, self.root = pafs.FileSystem.from_uri(uri if "://" in uri else os.path.abspath(uri))

    def matching(self, globs: tuple[str, ...], definition: DatasetDefinition) -> list[RawFile]:
        """Return the files that match, in name order.

        Raises:
            StageError: the folder does not exist.
        """
        infos = self.fs.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        if self.fs.get_file_info(self.root).type != pafs.FileType.Directory:
            raise StageError(f"the raw folder {self.uri} does not exist", "give the folder that holds the published files with --raw (RAW= for make run)")
        found = {}
        for info in infos:
            if info.type == pafs.FileType.File and any(fnmatch.fnmatch(info.base_name, glob) for glob in globs):
                first, last = _named_days(info.base_name, definition.year)
                found[info.base_name] = RawFile(info.path, info.base_name, info.size, first, last)
        return [found[name] for name in sorted(found)]

    def logs(self, definition: DatasetDefinition) -> list[RawFile]:
        """Return the log files.

        Raises:
            StageError: there is none, or real and simulated rows would be mixed.
        """
        files = self.matching(definition.log_globs, definition)
        simulated = self.fs.get_file_info(f"{self.root}/{SIMULATED_MARKER}").type == pafs.FileType.File
        if simulated != definition.simulated:
            kind, wanted = ("simulated", f"{definition.name}_simulated") if simulated else ("not simulated", definition.name.removesuffix("_simulated"))
            raise StageError(f"the logs in {self.uri} are {kind}, but the data set is {definition.name}", f"use --dataset {wanted}")
        if not files:
            raise StageError(f"no log file in {self.uri}: nothing matches {', '.join(definition.log_globs)}", "put the published log files there, or correct --raw")
        return files

    def check_header(self, file: RawFile, columns: tuple[str, ...]) -> None:
        """Raise a StageError that names what is wrong with a file's header."""
        try:
            with self._open(file) as stream:
                first = b"" if file.size == 0 else _first_line(stream)
        except OSError as error:  # an archive that is none, or that breaks off within the header
            raise StageError(f"{file.name} in {self.uri} cannot be read: {error}", "deliver the file again, or remove it") from None
        header = first.decode("utf-8", "replace").lstrip("\ufeff").rstrip("\r\n").split(",")
        if tuple(header) == columns:
            return
        missing = [name for name in columns if name not in header]
        extra = [name for name in header if name not in columns]
        if not first:
            raise StageError(f"{file.name} in {self.uri} is empty", "deliver the file again, or remove it")
        if missing:
            raise StageError(f"{file.name} in {self.uri} lacks the column {', '.join(missing)}" + (f" (and has the unknown column {', '.join(extra)})" if extra else ""),
                             f"deliver the file with the {len(columns)} published columns: {','.join(columns)}")
        raise StageError(f"{file.name} in {self.uri} has other columns or another order than published" + (f": unknown {', '.join(extra)}" if extra else ""),
                         f"deliver the file with exactly the columns {','.join(columns)}")

    def splits(self, files: list[RawFile], count_lines) -> list[Split]:
        """Cut plain files into ranges; `count_lines([(file, start, end)]) -> [newlines]` runs where the compute is."""
        splits: list[Split] = []
        ranges = [(file, start, min(start + SPLIT_BYTES, file.size)) for file in files if not file.name.endswith(".gz") and file.size > SPLIT_BYTES
                  for start in range(0, file.size, SPLIT_BYTES)]
        newlines = dict(zip([(f.name, s) for f, s, _ in ranges], count_lines(ranges), strict=True)) if ranges else {}
        for file in files:
            if file.name.endswith(".gz") or file.size <= SPLIT_BYTES:
                splits.append(Split(file, 0, file.size, 2))
                continue
            before = 0
            for start in range(0, file.size, SPLIT_BYTES):
                # The first whole line after `start` follows the newline that ends the line crossing it.
                splits.append(Split(file, start, min(start + SPLIT_BYTES, file.size), before + 2))
                before += newlines[file.name, start]
        return splits

    def count_newlines(self, file: RawFile, start: int, end: int) -> int:
        """Return the number of newlines among the bytes [start, end)."""
        with self.fs.open_input_file(file.path) as stream:
            return stream.read_at(end - start, start).count(b"\n")

    def chunks(self, split: Split) -> Iterator[tuple[bytes, int, str | None]]:
        """Yield (whole lines, row number of the first, what broke off here or None) of a split, without the header."""
        if split.file.name.endswith(".gz"):
            yield from self._gzip_chunks(split)
            return
        with self.fs.open_input_file(split.file.path) as stream:
            body = stream.read_at(split.end - split.start, split.start)
            if split.end < split.file.size and not body.endswith(b"\n"):
                body += _to_newline(stream, split.end)
        # Line 1 of the file is the header; the first line of a later split belongs to the split before it,
        # unless that one ended right on a newline.
        if split.start == 0 or not self._ends_line(split):
            _, _, body = body.partition(b"\n")
            first_row = split.first_row
        else:
            first_row = split.first_row - 1
        yield body, first_row, None

    def _ends_line(self, split: Split) -> bool:
        with self.fs.open_input_file(split.file.path) as stream:
            return stream.read_at(1, split.start - 1) == b"\n"

    def _gzip_chunks(self, split: Split) -> Iterator[tuple[bytes, int, str | None]]:
        inflate = zlib.decompressobj(wbits=31)
        rest, row, header_gone, broken = b"", 2, False, None
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
            broken = "truncated_gzip: the file ends in the middle of its compressed data"
        if rest or broken:
            # A line that the break cuts may still look whole (its last number shortened): it is the refused one.
            yield rest if header_gone and broken is None else b"", row, broken

    def _open(self, file: RawFile):
        return self.fs.open_input_stream(file.path, compression="gzip" if file.name.endswith(".gz") else None)


def parse_lines(body: bytes, first_row: int, columns: tuple[str, ...]) -> tuple[pa.Table, list[tuple[int, bytes]]]:
    """Split whole lines into typed rows and refused ones.

    Returns:
        a table of int64 columns plus `row_number`, and (row number, raw line) of every line that is not
        `len(columns)` integers.
    """
    types = {name: pa.int64() for name in columns}
    if not body:
        return pa.table({**{name: pa.array([], kind) for name, kind in types.items()}, "row_number": pa.array([], pa.int64())}), []
    if b"\r" in body:
        body = body.replace(b"\r\n", b"\n")
    if body.endswith(b"\n"):
        body = body[:-1]
    lines = pc.split_pattern(pa.array([body], pa.large_binary()), b"\n")[0].values
    pattern = rf"\A-?[0-9]{{1,18}}(,-?[0-9]{{1,18}}){{{len(columns) - 1}}}\z"
    good = pc.match_substring_regex(lines, pattern)
    rows = np.arange(first_row, first_row + len(lines))
    refused: list[tuple[int, bytes]] = []
    kept = lines
    if not pc.all(good).as_py():
        mask = good.to_numpy(zero_copy_only=False)
        refused = [(int(row), line.as_py()) for row, line in zip(rows[~mask], lines.filter(pc.invert(good)), strict=True)]
        rows, kept = rows[mask], lines.filter(good)
    if len(kept) == 0:
        table = pa.table({name: pa.array([], kind) for name, kind in types.items()})
    else:
        text = pa.py_buffer(b"\n".join(kept.to_pylist()) if refused else body)
        table = pacsv.read_csv(pa.BufferReader(text), pacsv.ReadOptions(column_names=list(columns), use_threads=False, block_size=max(len(text), 1)),
                               pacsv.ParseOptions(quote_char=False), pacsv.ConvertOptions(column_types=types, strings_can_be_null=False))
    return table.append_column("row_number", pa.array(rows, pa.int64())), refused


def reason_for(line: bytes, columns: tuple[str, ...]) -> str:
    """Return why a line is not a row: a code, a colon, and the detail."""
    if not line.strip():
        return "empty_line: nothing between two line ends"
    if b"\x00" in line:
        return "nul_byte: the line holds NUL bytes"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not_utf8: byte {error.start} of the line"
    cells = line.split(b",")
    if len(cells) != len(columns):
        return f"wrong_column_count: {len(cells)} instead of {len(columns)}"
    for name, cell in zip(columns, cells, strict=True):
        if not _INTEGER.match(cell):
            return f"not_an_integer: {name}={cell.decode()[:40]!r}"
    return "not_a_row: the line is not made of integers and commas"


def refusals(table: pa.Table, definition: DatasetDefinition) -> tuple[np.ndarray, list[str]]:
    """Return a mask of rows whose values cannot be right, and a reason for each of them."""
    checks = [
        ("time_out_of_range", "time_ms", lambda v: (v < EARLIEST_MS) | (v >= LATEST_MS)),
        ("negative_id", "user_id", lambda v: v < 0),
        ("negative_id", "video_id", lambda v: v < 0),
        ("negative_duration", "play_time_ms", lambda v: v < 0),
        ("negative_duration", "duration_ms", lambda v: v < 0),
        ("tab_out_of_range", "tab", lambda v: (v < -1) | (v > 32_767)),
        *[("not_a_flag", name, lambda v: (v != 0) & (v != 1)) for name in (*definition.feedback_fields, "is_rand")],
    ]
    bad = np.zeros(table.num_rows, dtype=bool)
    reasons: dict[int, str] = {}
    for code, name, is_wrong in checks:
        values = table[name].to_numpy()
        wrong = is_wrong(values) & ~bad
        for row in np.flatnonzero(wrong):
            reasons[int(row)] = f"{code}: {name}={values[row]}"
        bad |= wrong
    return bad, [reasons[row] for row in sorted(reasons)]


def day_of_refused(line: bytes, columns: tuple[str, ...], file: RawFile, fallback_dt: str) -> int:
    """Return the day number under which a refused line is filed: of its time, its date, its file's name, or the fallback."""
    cells = dict(zip(columns, line.split(b","), strict=False))
    time_cell = cells.get("time_ms", b"")
    if _INTEGER.match(time_cell) and EARLIEST_MS <= int(time_cell) < LATEST_MS:
        return int(time_cell) // MS_PER_DAY
    date_cell = cells.get("date", b"")
    if re.match(rb"(19|20)[0-9]{6}\Z", date_cell):
        text = date_cell.decode()
        try:
            return day_number(f"{text[:4]}-{text[4:6]}-{text[6:]}")
        except ValueError:
            pass
    return day_number(file.first_local_dt or fallback_dt)


def read_feature_csv(location: RawLocation, glob: str, definition: DatasetDefinition) -> pa.Table | None:
    """Read the user or item file, every column as text ('' = missing), first row of an id wins; None when there is none.

    Raises:
        StageError: the file cannot be read as CSV.
    """
    files = location.matching((glob,), definition)
    if not files:
        return None
    tables = []
    for file in files:
        try:
            with location._open(file) as stream:
                body = stream.read()
            header = body.split(b"\n", 1)[0].decode().lstrip("\ufeff").rstrip("\r").split(",")
            if len(set(header)) < len(header):
                raise pa.ArrowInvalid("a column name occurs twice in its header")
            tables.append(pacsv.read_csv(io.BytesIO(body), parse_options=pacsv.ParseOptions(newlines_in_values=True),
                                         convert_options=pacsv.ConvertOptions(column_types={name.strip('"'): pa.string() for name in header}, strings_can_be_null=False)))
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            raise StageError(f"{file.name} in {location.uri} is not a CSV file as published: {error}", "deliver the file again, or remove it") from None
    return pa.concat_tables(tables, promote_options="default")


def _named_days(name: str, year: int) -> tuple[str | None, str | None]:
    match = _NAMED_DAYS.search(name)
    if match is None:
        return None, None
    first_month, first_day, last_month, last_day = (int(g) for g in match.groups())
    first, last = f"{year}-{first_month:02d}-{first_day:02d}", f"{year}-{last_month:02d}-{last_day:02d}"
    try:
        day_number(first), day_number(last)
    except ValueError:  # numbers, but no days: the name promises nothing
        return None, None
    return first, last


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

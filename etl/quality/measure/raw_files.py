"""What the raw files of a day look like before anything is built from them: their headers, ends, sizes and a sample
of their lines.

A file costs three small reads, whatever its size; only files of equal size are read whole, to compare their contents.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.datasets.definition import DatasetDefinition, Logs
from etl.ingest.compression import DamagedError, without_suffix
from etl.ingest.raw import Chunk, RawFile, RawLocation, Refused, Split, checked_lines, parse_lines
from etl.metrics.thresholds import DriftSettings, RawSettings
from etl.quality.measure.drift import NAN
from etl.quality.measure.measured import Row
from etl.stage.errors import StageError
from etl.warehouse.partitions import MS_PER_DAY, add_days, day_number

PARQUET_MAGIC = b"PAR1"


@dataclass
class FileFacts:
    """What one log file of the day looks like; what so few lines cannot show is not a number.

    Attributes:
        refused_because: why its header cannot be read as the definition says; '' where it can.
        missing_columns: declared columns that it lacks, each with the undeclared one of its own that is most like it.
        cut_line: the line within which it ends.
        chunks: its checked lines; None where it was not read so far.
    """

    file: RawFile
    limits: RawSettings
    copy_of: RawFile | None = None
    refused_because: str = ""
    missing_columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    parquet_cut: bool = False
    cut_line: bytes | None = None
    chunks: Sequence[Chunk] | None = None

    size = property(lambda self: self.file.size)

    @cached_property
    def _refused(self) -> list[Refused]:
        return [refusal for chunk in self.chunks or () for refusal in chunk.refused]

    @cached_property
    def _time_ms(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(chunk.time_ms for chunk in self.chunks or ())])

    @property
    def lines(self) -> int:
        return len(self._refused) + len(self._time_ms)

    @property
    def _judged(self) -> bool:
        return self.chunks is not None and self.lines > 0 and self.lines >= self.limits.min_sampled_lines

    @property
    def empty(self) -> bool:
        return self.size == 0 or (self.chunks is not None and self.lines == 0)

    @property
    def why_empty(self) -> str:
        return f"{self.file.name} has {'a header and no line' if self.size else '0 bytes'}"

    @property
    def unreadable(self) -> bool:
        return bool(self.refused_because) and not self.missing_columns and not self.parquet_cut

    @property
    def cut(self) -> bool:
        return self.cut_line is not None or (self.parquet_cut and not self.missing_columns)

    @property
    def why_cut(self) -> str:
        if self.cut_line is None:
            return self.refused_because
        return f"{self.file.name} ends within a line: {self.cut_line[-80:].decode('utf-8', 'backslashreplace')!r}"

    @property
    def why_copy(self) -> str:
        name = self.copy_of.name if self.copy_of else ""
        return f"{self.file.name} holds the same bytes as {name}: the delivery of another day came again"

    @property
    def refused_share(self) -> float:
        return len(self._refused) / self.lines if self._judged else NAN

    @property
    def why_refused(self) -> str:
        if not self._refused:
            return ""
        (code, count), *_ = Counter(refusal.reason.split(":")[0] for refusal in self._refused).most_common(1)
        example = next(refusal for refusal in self._refused if refusal.reason.startswith(code))
        return (
            f"{len(self._refused):,} of {self.lines:,} sampled lines of {self.file.name} would be refused, most often"
            f" {code} ({count:,}), such as {example.reason}"
        )

    @cached_property
    def _outside(self) -> np.ndarray | None:
        """Which rows are of no day that the name promises; None where it promises none or too few lines are known."""
        first, last = self.file.first_utc_dt, self.file.last_utc_dt
        if not self._judged or first is None or last is None or not len(self._time_ms):
            return None
        day = self._time_ms // MS_PER_DAY
        return (day < day_number(first)) | (day > day_number(last))

    @property
    def outside_share(self) -> float:
        return NAN if self._outside is None else float(self._outside.mean())

    @property
    def why_outside(self) -> str:
        if self._outside is None or not self._outside.any():
            return ""
        example = np.datetime64(int(self._time_ms[self._outside][0]), "ms")
        return (
            f"{int(self._outside.sum()):,} of {len(self._outside):,} sampled rows of {self.file.name} are not of"
            f" {self.file.first_utc_dt} .. {self.file.last_utc_dt} (UTC), such as {example}"
        )


def file_facts(
    raw: RawLocation, file: RawFile, others: Sequence[RawFile], definition: DatasetDefinition, limits: RawSettings
) -> FileFacts:
    """Look at one log file.

    Args:
        others: the other log files of the folder.
    """
    facts = FileFacts(file, limits)
    if file.size == 0:
        return facts
    facts.copy_of = _copy_of(raw, file, others)
    try:
        header = raw.header(file, definition.logs)
    except StageError as error:
        facts.missing_columns = missing = _missing_columns(raw, file, definition.logs)
        near = "".join(f"; {column} may be its {names[0]}" for column, names in missing.items() if names)
        facts.refused_because = error.what + near
        facts.parquet_cut = definition.logs.format == "parquet" and _parquet_cut(raw, file)
        return facts
    facts.chunks, facts.cut_line = _sample(raw, file, header, definition, limits.sample_bytes)
    return facts


@dataclass(frozen=True)
class DayOfFiles:
    """All files that may hold a day.

    Attributes:
        uri: where the raw logs are.
        files: all log files there.
        measured: the rows of metrics of those that may hold the day.
    """

    dt: str
    uri: str
    files: Sequence[RawFile]
    measured: Sequence[Row]
    settings: DriftSettings

    @property
    def mine(self) -> list[RawFile]:
        return [file for file in self.files if file.may_hold(self.dt)]

    @property
    def size(self) -> int:
        return self._size(self.dt)

    def _size(self, dt: str) -> int:
        return sum(file.size for file in self.files if file.may_hold(dt))

    @property
    def size_to_trailing_median(self) -> float:
        days = (add_days(self.dt, -back) for back in range(1, self.settings.trailing_days + 1))
        before = [size for day in days if (size := self._size(day)) > 0]
        named = all(file.first_utc_dt is not None for file in self.files)
        return self.size / float(np.median(before)) if named and len(before) >= self.settings.min_trailing_days else NAN

    def worst(self, metric: str) -> float:
        """Return the largest value of a metric of the files; nan where none knows it."""
        values = (float(row[metric]) for row in self.measured)
        return max((value for value in values if not np.isnan(value)), default=NAN)


def _sample(
    raw: RawLocation, file: RawFile, header: tuple[str, ...], definition: DatasetDefinition, block: int
) -> tuple[list[Chunk], bytes | None]:
    """Return the checked lines of the head, the middle and the tail of a file, and the line within which it ends, if
    it does."""
    logs = definition.logs
    if logs.format == "parquet":
        with pq.ParquetFile(file.path, filesystem=raw.fs) as parquet:
            groups = parquet.num_row_groups
        return [
            next(raw.read(Split(file, group, group + 1, 1, header), definition))
            for group in sorted({0, groups // 2, groups - 1})
            if group < groups
        ], None
    if raw.is_stream(
        file
    ):  # its middle cannot be reached without what is before it; the events job reads it to its end
        body = raw.head(file, logs, block, encoded=True)
        return [
            _chunk(
                body.partition(b"\n")[2] if logs.names_columns else body, header, definition, whole=len(body) < block
            )
        ], None
    starts = (
        sorted({0, max(0, file.size // 2 - block // 2), max(0, file.size - block)}) if file.size > 3 * block else [0]
    )
    chunks, last = [], b""
    with raw.fs.open_input_file(file.path) as stream:
        for start in starts:
            body = stream.read_at(block if len(starts) > 1 else file.size, start)
            last = body
            if start > 0 or logs.names_columns:
                body = body.partition(b"\n")[2]
            chunks.append(_chunk(body, header, definition, whole=start == starts[-1]))
    tail = last.rpartition(b"\n")[2].rstrip(b"\r")
    return chunks, tail if tail and parse_lines(tail, 1, header, logs)[-1] else None


def _chunk(body: bytes, header: tuple[str, ...], definition: DatasetDefinition, whole: bool) -> Chunk:
    """Return the checked lines of a block; its last line counts only when the block ends the file."""
    return checked_lines(body if whole else body[: body.rfind(b"\n") + 1], 1, header, definition)


def _copy_of(raw: RawLocation, file: RawFile, others: Sequence[RawFile]) -> RawFile | None:
    """Return another file that holds the same, packed or not: of equal size, or of the same name but for its ending."""
    same = [
        other
        for other in others
        if other.name != file.name
        and (other.size == file.size or without_suffix(other.name) == without_suffix(file.name))
    ]
    if not same:
        return None
    try:
        digest = raw.content_digest(file)
        return next((other for other in same if raw.content_digest(other) == digest), None)
    except DamagedError:  # a cut archive, which another metric finds
        return None


def _missing_columns(raw: RawLocation, file: RawFile, logs: Logs) -> dict[str, list[str]]:
    """Return each declared column that the file lacks, and the undeclared one of its own that is most like it."""
    try:
        present = raw.column_names(file, logs)
    except (StageError, OSError, pa.ArrowInvalid, DamagedError):
        return {}
    if (logs.format == "csv" and not logs.header) or len(present) < 2:
        return {}
    spare = [name for name in present if name not in logs.columns]
    return {name: difflib.get_close_matches(name, spare, n=1) for name in logs.columns if name not in present}


def _parquet_cut(raw: RawLocation, file: RawFile) -> bool:
    """Whether a file begins as Parquet and does not end so."""
    with raw.fs.open_input_file(file.path) as stream:
        return file.size < 12 or (
            stream.read_at(4, 0) == PARQUET_MAGIC and stream.read_at(4, file.size - 4) != PARQUET_MAGIC
        )

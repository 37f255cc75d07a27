"""What the raw files of a day look like before anything is built from them: their headers, ends, sizes and a sample of their lines.

A file costs three small reads, whatever its size; only files of equal size are read whole, to compare their contents.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.datasets.definition import DatasetDefinition, Logs
from etl.datasets.thresholds import DriftThresholds, RawThresholds
from etl.ingest.compression import DamagedError, without_suffix
from etl.ingest.raw import Chunk, RawFile, RawLocation, Split, checked_lines, parse_lines
from etl.quality.measure.drift import NAN
from etl.stage.errors import StageError
from etl.warehouse.partitions import MS_PER_DAY, add_days, day_number

PARQUET_MAGIC = b"PAR1"


@dataclass
class FileFindings:
    """What is wrong with one file.

    Attributes:
        metrics: the file's row of the suite.
        details: metric -> what to say about it.
    """

    metrics: dict[str, float | str]
    details: dict[str, str] = field(default_factory=dict)


def file_findings(raw: RawLocation, file: RawFile, others: Sequence[RawFile], definition: DatasetDefinition, limits: RawThresholds) -> FileFindings:
    """Look at one log file.

    Args:
        others: the other log files of the folder.
    """
    found = FileFindings({"file": file.name, "bytes": file.size, "empty_count": int(file.size == 0), "unreadable_count": 0, "missing_column_count": 0,
                          "cut_count": 0, "copy_count": 0, "sampled_lines": 0, "refused_share": NAN, "outside_named_days_share": NAN})  # fmt: skip
    metrics, details = found.metrics, found.details
    if file.size == 0:
        details["empty_count"] = f"{file.name} has 0 bytes"
        return found
    if (copy := _copy_of(raw, file, others)) is not None:
        metrics["copy_count"] = 1
        details["copy_count"] = f"{file.name} holds the same bytes as {copy.name}: the delivery of another day came again"
    try:
        header = raw.header(file, definition.logs)
    except StageError as error:
        missing, cut = _missing_columns(raw, file, definition.logs), definition.logs.format == "parquet" and _parquet_cut(raw, file)
        name = "missing_column_count" if missing else "cut_count" if cut else "unreadable_count"
        metrics[name] = max(1, len(missing))
        details[name] = error.what + "".join(f"; {column} may be its {near[0]}" for column, near in missing.items() if near)
        return found
    chunks, cut_line = _sample(raw, file, header, definition, limits.sample_bytes)
    if cut_line is not None:
        metrics["cut_count"] = 1
        details["cut_count"] = f"{file.name} ends within a line: {cut_line[-80:].decode('utf-8', 'backslashreplace')!r}"
    _judge_sample(found, file, chunks, limits)
    return found


def day_row(dt: str, files: Sequence[RawFile], drift: DriftThresholds) -> dict[str, float | str]:
    """Return the metrics of all files that may hold a day: how many, how large, and how large compared with other days."""
    mine = [file for file in files if file.may_hold(dt)]
    size = sum(file.size for file in mine)
    named = all(file.first_utc_dt is not None for file in files)
    before = [sum(file.size for file in files if file.may_hold(day)) for day in (add_days(dt, -back) for back in range(1, drift.trailing_days + 1))]
    before = [total for total in before if total > 0]
    ratio = size / float(np.median(before)) if named and len(before) >= drift.min_trailing_days else NAN
    return {"dt": dt, "files": len(mine), "bytes": size, "bytes_to_trailing_median": ratio}


def _judge_sample(found: FileFindings, file: RawFile, chunks: Sequence[Chunk], limits: RawThresholds) -> None:
    refused = [refusal for chunk in chunks for refusal in chunk.refused]
    time_ms = np.concatenate([chunk.time_ms for chunk in chunks]) if chunks else np.zeros(0, np.int64)
    lines = len(refused) + len(time_ms)
    found.metrics["sampled_lines"] = lines
    if lines == 0:
        found.metrics["empty_count"] = 1
        found.details["empty_count"] = f"{file.name} has a header and no line"
    if lines < limits.min_sampled_lines:
        return
    found.metrics["refused_share"] = len(refused) / lines
    if refused:
        (code, count), *_ = Counter(refusal.reason.split(":")[0] for refusal in refused).most_common(1)
        example = next(refusal for refusal in refused if refusal.reason.startswith(code))
        found.details["refused_share"] = (
            f"{len(refused):,} of {lines:,} sampled lines of {file.name} would be refused, most often {code} ({count:,}), such as {example.reason}")
    if file.first_utc_dt is None or file.last_utc_dt is None or not len(time_ms):
        return
    day = time_ms // MS_PER_DAY
    outside = (day < day_number(file.first_utc_dt)) | (day > day_number(file.last_utc_dt))
    found.metrics["outside_named_days_share"] = float(outside.mean())
    if outside.any():
        example_ms = int(time_ms[outside][0])
        found.details["outside_named_days_share"] = (
            f"{int(outside.sum()):,} of {len(outside):,} sampled rows of {file.name} are not of {file.first_utc_dt} .. {file.last_utc_dt} (UTC), "
            f"such as {np.datetime64(example_ms, 'ms')}")


def _sample(raw: RawLocation, file: RawFile, header: tuple[str, ...], definition: DatasetDefinition, block: int) -> tuple[list[Chunk], bytes | None]:
    """Return the checked lines of the head, the middle and the tail of a file, and the line within which it ends, if it does."""
    logs = definition.logs
    if logs.format == "parquet":
        with pq.ParquetFile(file.path, filesystem=raw.fs) as parquet:
            groups = parquet.num_row_groups
        return [next(raw.read(Split(file, group, group + 1, 1, header), definition)) for group in sorted({0, groups // 2, groups - 1}) if group < groups], None
    if raw.is_stream(file):  # its middle cannot be reached without what is before it; the events job reads it to its end
        body = raw.head(file, logs, block, encoded=True)
        return [_chunk(body.partition(b"\n")[2] if logs.names_columns else body, header, definition, whole=len(body) < block)], None
    starts = sorted({0, max(0, file.size // 2 - block // 2), max(0, file.size - block)}) if file.size > 3 * block else [0]
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
    same = [other for other in others if other.name != file.name and (other.size == file.size or without_suffix(other.name) == without_suffix(file.name))]
    if not same:
        return None
    try:
        digest = raw.content_digest(file)
        return next((other for other in same if raw.content_digest(other) == digest), None)
    except DamagedError:  # a cut archive, which is told elsewhere
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
        return file.size < 12 or (stream.read_at(4, 0) == PARQUET_MAGIC and stream.read_at(4, file.size - 4) != PARQUET_MAGIC)

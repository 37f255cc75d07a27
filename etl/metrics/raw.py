"""The metrics of raw files: one row a file (`measure.raw_files.FileFacts`), and one of all files of a day
(`DayOfFiles`).

Files are judged by their header, their ends and a sample of their lines.
"""

from __future__ import annotations

from etl.metrics import panels
from etl.metrics.record import (
    CRITICAL,
    WARNING,
    Bound,
    Limit,
    Metric,
    Suite,
    at_least_one,
    graded,
    most,
    zero,
)

_AGAIN = "have the file delivered again, whole and as agreed, then run again with a new attempt"
_COLUMNS = "have the file delivered with the columns of logs.columns, or, if the change is meant, change the definition"
_OTHER = (
    "have the day's own file delivered; if the file is right, correct the time zone in logs.days_in_name or events.time"
    " of the definition"
)
_ARRIVED = "check that all files of the day have arrived whole, then run again with a new attempt"

FILE = (
    Metric("bytes", lambda file: file.size),
    Metric(
        "empty_count", lambda file: file.empty, "No file is empty.", _AGAIN, zero(), details=lambda file: file.why_empty
    ),
    Metric(
        "unreadable_count",
        lambda file: file.unreadable,
        "Every file can be read.",
        _AGAIN,
        zero(contract=True),
        details=lambda file: file.refused_because if file.unreadable else "",
    ),
    Metric(
        "missing_column_count",
        lambda file: len(file.missing_columns),
        "Every file has the declared columns.",
        _COLUMNS,
        zero(contract=True),
        details=lambda file: file.refused_because if file.missing_columns else "",
    ),
    Metric(
        "cut_count",
        lambda file: file.cut,
        "Every file ends with a whole line.",
        _AGAIN,
        zero(),
        details=lambda file: file.why_cut,
    ),
    Metric(
        "copy_count",
        lambda file: file.copy_of is not None,
        "No two files hold the same bytes.",
        _OTHER,
        zero(),
        details=lambda file: file.why_copy,
    ),
    Metric("sampled_lines", lambda file: file.lines),
    Metric(
        "refused_share",
        lambda file: file.refused_share,
        "Nearly all sampled lines are rows.",
        "correct the file, or events.time and logs.columns of the definition if the logs have changed",
        most(Bound("raw.max_refused_share_warning", 0.01), Bound("raw.max_refused_share_critical", 0.1)),
        details=lambda file: file.why_refused,
    ),
    # A file of another day, or of another time zone.
    Metric(
        "outside_named_days_share",
        lambda file: file.outside_share,
        "Rows are of the days that the file's name promises.",
        _OTHER,
        most(Bound("raw.max_outside_share_warning", 0.005), Bound("raw.max_outside_share_critical", 0.05)),
        details=lambda file: file.why_outside,
    ),
)

DAY = (
    Metric(
        "files",
        lambda day: len(day.mine),
        "A raw file may hold the day.",
        "deliver the day's file, or choose another --dt",
        at_least_one(),
        details=lambda day: f"no log file in {day.uri} covers dt={day.dt}",
    ),
    Metric("bytes", lambda day: day.size, panel=panels.RAW_BYTES),
    # A coarse first look: rows are judged at the events gate.
    Metric(
        "bytes_to_trailing_median",
        lambda day: day.size_to_trailing_median,
        "The day's files are about as large as those of the days before.",
        _ARRIVED,
        graded(
            Limit(WARNING, Bound("raw.min_bytes_ratio_warning", 0.4), Bound("raw.max_bytes_ratio_warning", 3.0)),
            Limit(CRITICAL, Bound("raw.min_bytes_ratio_critical", 0.1)),
        ),
    ),
    Metric("refused_share", lambda day: day.worst("refused_share")),
    Metric("outside_named_days_share", lambda day: day.worst("outside_named_days_share")),
    Metric("sampled_lines", lambda day: day.worst("sampled_lines")),
)

SUITES = (Suite("raw_day", "raw", "day", DAY), Suite("raw_files", "raw", "file", FILE))

"""The drawings of the report, in their order; metrics name the one that shows them."""

from __future__ import annotations

from etl.metrics.record import Panel

RAW_BYTES = Panel("Raw files: bytes")
ROWS = Panel("Events: rows")
LABEL_RATE = Panel("Events: label rate")
ACTION_RATES = Panel("Events: action rates", logarithmic=True)
DRIFT = Panel("Events: drift against trailing days")
REFUSED = Panel("Events: quarantined and duplicate share of raw rows")
REPEATED = Panel("Events: repeated keys and largest user, share of rows")
KNOWN = Panel("Events: rows of known users and items, share")
USERS = Panel("Events: users")
WATCH_TIME = Panel("Events: watch time, ms", logarithmic=True)
HISTORY_LENGTH = Panel("Sequences: history length, events", logarithmic=True)
TARGET_LABEL_RATE = Panel("Sequences: label rates of targets")
TARGETS = Panel("Sequences: targets", logarithmic=True)
TRUNCATED = Panel("Sequences: truncated users, share")
SKEW = Panel("Training input: skew of the window to its evaluation day")
CALIBRATION = Panel("Model output: calibration")
SCORES = Panel("Model output: scores")

PANELS = (
    RAW_BYTES,
    ROWS,
    LABEL_RATE,
    ACTION_RATES,
    DRIFT,
    REFUSED,
    REPEATED,
    KNOWN,
    USERS,
    WATCH_TIME,
    HISTORY_LENGTH,
    TARGET_LABEL_RATE,
    TARGETS,
    TRUNCATED,
    SKEW,
    CALIBRATION,
    SCORES,
)

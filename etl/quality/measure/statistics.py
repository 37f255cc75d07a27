"""The statistics of a partition, for the days that follow.

    <warehouse>/<dataset>/quality/stats/stage=S/dt=D.parquet   of days that passed: what trailing days are
    <warehouse>/<dataset>/quality/stats_rejected/stage=S/dt=D/<attempt>.parquet   of attempts that a gate stopped

Nothing else knows these paths. A later attempt that passes replaces the statistics of its day.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from etl.warehouse.partitions import add_days, days_between
from etl.warehouse.store import TableStore

# One row is one metric of one day; a vector is several metrics with a suffix (hour_share_00 .. hour_share_23).
STATS = pa.schema(
    [
        pa.field("dt", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),  # null: not measurable, a rate of an empty day
        pa.field("attempt", pa.string(), nullable=False),
    ]
)


def write_stats(
    store: TableStore, stage: str, dt: str, attempt: str, metrics: Mapping[str, float | None], rejected: bool = False
) -> str:
    """Write the statistics of a day; return the path below the data set's folder.

    Args:
        metrics: name -> value; None and nan are not measurable.
        rejected: the gate stopped this attempt: trailing days never show it.
    """
    names = sorted(metrics)
    values = [None if (value := metrics[name]) is None or math.isnan(value) else float(value) for name in names]
    table = pa.table([[dt] * len(names), [stage] * len(names), names, values, [attempt] * len(names)], schema=STATS)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    path = _stats_path(stage, dt, attempt if rejected else None)
    store.write_bytes(path, sink.getvalue())
    return path


def read_stats(store: TableStore, stage: str, last_dt: str, days: int) -> pa.Table:
    """Return the statistics of the `days` days that end on `last_dt`, oldest first; days without any are left out.

    For the trailing days of a partition, ask up to the day before it.
    """
    tables = []
    for dt in days_between(add_days(last_dt, 1 - days), last_dt):
        path = f"{store.root}/{_stats_path(stage, dt)}"
        if store.fs.get_file_info(path).type == pafs.FileType.File:
            tables.append(pq.read_table(path, filesystem=store.fs, partitioning=None, schema=STATS))
    return pa.concat_tables(tables) if tables else STATS.empty_table()


def read_rejected(store: TableStore, stage: str, dt: str) -> pa.Table:
    """Return the statistics of every attempt at a day that a gate stopped, one block of rows an attempt."""
    folder = f"{store.root}/quality/stats_rejected/stage={stage}/dt={dt}"
    infos = store.fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    paths = sorted(info.path for info in infos if info.base_name.endswith(".parquet"))
    tables = [pq.read_table(path, filesystem=store.fs, partitioning=None, schema=STATS) for path in paths]
    return pa.concat_tables(tables) if tables else STATS.empty_table()


def _stats_path(stage: str, dt: str, rejected_attempt: str | None = None) -> str:
    if rejected_attempt is None:
        return f"quality/stats/stage={stage}/dt={dt}.parquet"
    return f"quality/stats_rejected/stage={stage}/dt={dt}/{rejected_attempt}.parquet"

"""Runs a data set's own conditions and expectations (`etl.datasets.quality_rules`) on the tables that a gate judges.

A condition is counted on every row, by DuckDB over the table's files: it reads only the columns that are named,
streams, and keeps to `own_checks.MEMORY`. An expectation of Great Expectations sees a table of pandas: all of its rows
up to MOST_ROWS, and of a larger table every n-th, which its message says; so what must hold for each row of a large
table is a condition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from etl.datasets.definition import DatasetDefinition
from etl.datasets.own_checks import contract, first_paragraph, frame_columns, isolated_database
from etl.datasets.quality_rules import STATISTICS, Condition, Expectation
from etl.quality.measure.measured import Check, Row
from etl.stage.errors import StageError
from etl.warehouse.store import Manifest, TableStore

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

MOST_ROWS = 500_000
ROWS_AT_ONCE = 4_096  # of a table with lists
EXAMPLES = 3
KEYS = ("user_id", "item_id", "event_time_ms")  # of an example, besides the columns that a condition names
AT_FAULT = "correct quality.{kind} of the definition; docs/datasets.md explains it"


@dataclass(frozen=True)
class Counted:
    """How a condition fared on one day of a table.

    Attributes:
        rows, failed: all rows, and those for which it was false or null.
        example: values of some that failed, '' for none.
    """

    dt: str
    rows: int
    failed: int
    example: str

    @property
    def share(self) -> float:
        return self.failed / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class Sample:
    """What an expectation sees of one day of a table.

    Attributes:
        rows: of the table.
        frame: its rows, or every `step`-th of them.
    """

    table: str
    dt: str
    rows: int
    step: int
    frame: pd.DataFrame

    @property
    def said(self) -> str:
        return "" if self.step == 1 else f" (seen on {len(self.frame):,} of {self.rows:,} rows, every {self.step}th)"


@dataclass(frozen=True)
class OwnCheck:
    """Rows of a table to judge by the data set's own expectations."""

    sample: Sample
    expectations: Sequence[Expectation]

    @property
    def suite(self) -> str:
        return f"own_{self.sample.table.replace('.', '_')}"


def condition_check(table: str, conditions: Sequence[Condition], counted: Mapping[str, Sequence[Counted]]) -> Check:
    """Return the check of the shares of rows, day by day, that fail each condition."""
    rows: dict[str, Row] = {}
    details: dict[str, dict[str, str]] = {}
    for condition in conditions:
        for one in counted[condition.name]:
            rows.setdefault(one.dt, {"dt": one.dt})[condition.name] = one.share
            sql = " ".join(condition.sql.split())
            example = f", such as {one.example}" if one.example else ""
            details.setdefault(condition.name, {})[one.dt] = (
                f"{one.dt}: {one.failed:,} of {one.rows:,} rows of {table} fail `{sql}`{example}"
            )
    suite = f"conditions_{table.replace('.', '_')}"
    return Check(suite, list(rows.values()), details=details, conditions=conditions)


def counted(
    store: TableStore, definition: DatasetDefinition, manifest: Manifest, conditions: Sequence[Condition]
) -> dict[str, Counted]:
    """Count the rows of one day of a table that fail each condition.

    Raises:
        StageError: a condition cannot be evaluated on these rows.
    """
    import pyarrow.dataset as pads  # with pandas, which a gate without conditions does not load

    rows = (
        pads.dataset(
            [store.wherever(file, lambda path: _there(store, path)) for file in manifest.files],
            schema=contract(definition, manifest.table),
            format="parquet",
            filesystem=store.fs,
        )
        if manifest.files
        else contract(definition, manifest.table).empty_table()
    )
    return _counted(rows, manifest.dt, conditions)


def counted_statistics(
    days: Iterable[tuple[str, Mapping[str, Any]]], conditions: Sequence[Condition]
) -> dict[str, list[Counted]]:
    """Count, day by day, whether the metrics of a gate meet each condition; what is not measurable is null."""
    found: dict[str, list[Counted]] = {condition.name: [] for condition in conditions}
    for dt, metrics in days:
        for name, one in _counted(pa.Table.from_pylist([_plain(metrics)]), dt, conditions).items():
            found[name].append(one)
    return found


def sampled(store: TableStore, definition: DatasetDefinition, manifest: Manifest) -> Sample:
    """Return what expectations see of one day of a table: lists are given by their lengths."""
    schema = contract(definition, manifest.table)
    step = max(1, math.ceil(manifest.rows / MOST_ROWS))
    parts, before = [], 0
    for file in manifest.files:
        with store.open_parquet(file) as parquet:
            for batch in parquet.iter_batches(
                batch_size=ROWS_AT_ONCE if _has_lists(schema) else 1 << 16, columns=schema.names
            ):
                first = -before % step
                before += batch.num_rows
                parts.append(
                    _flat(
                        pa.Table.from_batches(
                            [
                                batch.slice(first).take(
                                    pa.array(range(0, max(0, batch.num_rows - first), step), pa.int64())
                                )
                            ]
                        )
                    )
                )
    table = pa.concat_tables(parts) if parts else _flat(schema.empty_table())
    return Sample(manifest.table, manifest.dt, manifest.rows, step, table.to_pandas())


def sampled_statistics(stage: str, days: Sequence[tuple[str, Mapping[str, Any]]]) -> Sample:
    """Return the metrics of a gate as a table, one row a day."""
    import pandas as pd

    return Sample(
        STATISTICS + stage,
        ", ".join(dt for dt, _ in days),
        len(days),
        1,
        pd.DataFrame([_plain(metrics) for _, metrics in days]),
    )


def _there(store: TableStore, path: str) -> str:
    with store.fs.open_input_file(path):
        return path


def _flat(table: pa.Table) -> pa.Table:
    import pyarrow.compute as pc

    columns = [
        pc.list_value_length(column) if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else column
        for column in table.columns
    ]
    return pa.table(columns, names=frame_columns(table.schema))


def _has_lists(schema: pa.Schema) -> bool:
    return frame_columns(schema) != schema.names


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str) else None if value != value else float(value)
        for name, value in metrics.items()
    }


def _counted(rows: Any, dt: str, conditions: Sequence[Condition]) -> dict[str, Counted]:
    with isolated_database() as connection:
        connection.register("t", rows)
        found = {}
        try:
            for condition in conditions:
                one = _count(connection, dt, condition)
                found[condition.name] = one
        except Exception as error:
            raise StageError(
                f"quality.conditions ({condition.name}) cannot be evaluated on {condition.table} of dt={dt}:"
                f" {first_paragraph(error)}",
                AT_FAULT.format(kind="conditions"),
            ) from error
        return found


def _count(connection: duckdb.DuckDBPyConnection, dt: str, condition: Condition) -> Counted:
    fails = f"(\n{condition.sql}\n) IS NOT TRUE"
    row = connection.execute(f"SELECT count(*), count(*) FILTER (WHERE {fails}) FROM t").fetchone()
    assert row is not None
    total, failed = row
    example = ""
    if failed:
        columns = [
            name
            for name, kind, *_ in connection.execute("DESCRIBE t").fetchall()
            if "[]" not in kind and (name in KEYS or re.search(rf"\b{re.escape(name)}\b", condition.sql))
        ]
        shown = (
            connection.execute(
                f"SELECT {', '.join(map(_quoted, columns))} FROM t WHERE {fails} LIMIT {EXAMPLES}"
            ).fetchall()
            if columns
            else []
        )
        example = "; ".join(
            ", ".join(f"{name} {value}" for name, value in zip(columns, values, strict=True)) for values in shown
        )
    return Counted(dt, total, failed, example)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'

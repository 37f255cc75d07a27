"""Checks a definition's own conditions and expectations against the columns of the tables, as far as no data are
needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from etl.datasets.definition import DatasetDefinition
from etl.datasets.quality_rules import STATISTICS, Condition
from etl.warehouse.schemas import TABLES, event_field_type, item_field_type

if TYPE_CHECKING:
    import duckdb

MEMORY = "1GB"


def contract(definition: DatasetDefinition, table: str) -> pa.Schema:
    """Return the schema of a table with the fields of this data set."""
    rules = {"events": definition.events.item_fields, "items": definition.item_fields}.get(table, {})
    kind = event_field_type if table == "events" else item_field_type
    return pa.schema([*TABLES[table], *[pa.field(name, kind(rule.kind)) for name, rule in rules.items()]])


def check_columns(definition: DatasetDefinition) -> None:
    """Check the conditions and the columns of the expectations against the tables, as far as no data are needed.

    Raises:
        ValueError: a condition is not a boolean expression over its table, or a column does not exist.
    """
    quality = definition.quality
    for index, condition in enumerate(quality.conditions):
        known = None if condition.table.startswith(STATISTICS) else contract(definition, condition.table)
        try:
            with isolated_database() as connection:
                _check_sql(connection, condition, known)
        except Exception as error:
            raise ValueError(f"quality.conditions.{index} ({condition.name}): sql: {first_paragraph(error)}") from None
    for index, own in enumerate(quality.expectations):
        if own.table.startswith(STATISTICS):
            continue
        names = frame_columns(contract(definition, own.table))
        for argument, value in own.arguments.items():
            if argument.startswith("column") and argument not in ("column_index",):
                for name in value if isinstance(value, list) else [value]:
                    if isinstance(name, str) and name not in names:
                        raise ValueError(
                            f"quality.expectations.{index} ({own.name}): arguments.{argument}: {own.table} has no"
                            f" column {name!r}; it has {', '.join(names)}"
                        )


def frame_columns(schema: pa.Schema) -> list[str]:
    """Return the columns of a table as expectations see it."""
    return [
        f"{field.name}_length" if pa.types.is_list(field.type) or pa.types.is_large_list(field.type) else field.name
        for field in schema
    ]


def isolated_database() -> duckdb.DuckDBPyConnection:
    """Return a connection that reads the tables it is given and nothing else, in at most MEMORY."""
    import duckdb

    return duckdb.connect(
        config={
            "enable_external_access": "false",
            "memory_limit": MEMORY,
            "python_enable_replacements": "false",
            "threads": "2",
        }
    )


def _check_sql(connection: duckdb.DuckDBPyConnection, condition: Condition, schema: pa.Schema | None) -> None:
    if len(connection.extract_statements(f"SELECT (\n{condition.sql}\n)")) != 1:
        raise ValueError("give one expression, not several statements")
    if schema is None:
        return  # the metrics of a gate are known when it has measured
    connection.register("t", schema.empty_table())
    [(kind,)] = connection.execute(
        f"SELECT DISTINCT column_type FROM (DESCRIBE SELECT (\n{condition.sql}\n) AS ok FROM t)"
    ).fetchall()
    if kind != "BOOLEAN":
        raise ValueError(f"must be true or false, and is of type {kind}")
    connection.execute(
        f"SELECT 1 FROM t WHERE (\n{condition.sql}\n)"
    )  # a condition on one row: no aggregates, no windows


def first_paragraph(error: Exception) -> str:
    """Return the first paragraph of what DuckDB says, on one line."""
    return " ".join(str(error).split("\n\n")[0].split())[:500]

"""The digest of what a definition says of the rows of `events`: a day that was built by another one is stale."""

from __future__ import annotations

import hashlib
import json

from etl.datasets.definition import DatasetDefinition
from etl.warehouse.schemas import event_field_type

DIGEST_KIND = "rows1:"  # of `rows_digest`; digests of another kind cannot be compared with it


def rows_digest(definition: DatasetDefinition) -> str:
    """Return the digest of what shapes the rows of `events`, whatever the order in which it is written down.

    A key that says what is said without it is no part of it, so that a new key of a later version makes no day stale.
    Which files match, and which days their names promise, is judged by the files themselves.
    """
    logs = definition.logs.model_dump(
        mode="json", exclude_defaults=True, exclude={"files", "days_in_name", "expected_refusals"}
    )
    events = definition.events.model_dump(mode="json", exclude_defaults=True)
    for column in logs["columns"].values():
        if "one_of" in column:
            column["one_of"] = _as_set(column["one_of"])
    if "missing" in logs:
        logs["missing"] = _as_set(logs["missing"])
    if definition.logs.format == "csv" and not definition.logs.header:
        logs["columns"] = list(logs["columns"].items())  # their order is that of the cells
    for condition in events["signals"].values():
        if isinstance(condition.get("equals"), list):
            condition["equals"] = _as_set(condition["equals"])
    events["signals"] = list(events["signals"].items())  # bit i of `feedback` is the i-th
    events["item_fields"] = [
        (name, rule.column, str(event_field_type(rule.kind))) for name, rule in definition.events.item_fields.items()
    ]
    return DIGEST_KIND + hashlib.sha256(json.dumps([logs, events], sort_keys=True).encode()).hexdigest()[:16]


def _as_set(values: list) -> list:
    return sorted({json.dumps(value) for value in values})

"""What fields of a definition say together.

Everything that would read, and then fail in a task or silently match nothing.
"""

from __future__ import annotations

import datetime as dtm
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etl.datasets.definition import Column, Condition, DatasetDefinition, FeatureFile, FieldRule, Time

INT64_MAX = 2**63 - 1
ITEM_COLUMNS = ("item_index", "item_id", "train_occurrences")  # of the table items: no field may be called so
EVENT_COLUMNS = (
    "user_id",
    "item_id",
    "event_time_ms",
    "feedback",
    "watch_time_ms",
    "duration_ms",
    "context",
    "is_random",
    "kind",
    "day",
    "bucket",
    "row_hash",
    "source_file",
    "row_number",
    "reason",
    "raw_text",
)
FOLDER_COLUMNS = ("dt", "bucket")  # names of partition folders, which other engines read as columns
# Directives that strptime and pandas' parser both read; of each one what it says.
DIRECTIVES = {
    "Y": "year",
    "y": "year",
    "m": "month",
    "b": "month",
    "B": "month",
    "d": "day",
    "j": "day of the year",
    "a": "weekday",
    "A": "weekday",
    "H": "hour",
    "I": "hour of twelve",
    "p": "half of the day",
    "M": "minute",
    "S": "second",
    "f": "fraction",
    "z": "offset",
}


def inconsistencies(definition: DatasetDefinition) -> list[str]:
    """Return what is wrong, each with the name of its field; nothing when the definition holds together."""
    return [
        *_references(definition),
        *_columns(definition),
        *_signals(definition),
        *_days(definition),
        *_targets(definition),
        *_fields(definition),
    ]


def time_problems(time: Time) -> Iterator[str]:
    """Yield what is wrong with the time of an event, looked at alone."""
    if not time.earliest < time.latest:
        yield f"latest {time.latest} must be after earliest {time.earliest}"
    if time.format is None:
        return
    form = time.format
    found = re.findall(r"%(.?)", form, re.DOTALL)
    names = [name for name in found if name != "%"]
    if unknown := [f"%{name}" for name in names if name not in DIRECTIVES]:
        yield (
            f"format {form!r}: {', '.join(unknown)} is no directive that can be read; allowed:"
            f" {', '.join('%' + name for name in DIRECTIVES)}"
        )
        return
    said = [DIRECTIVES[name] for name in names]
    if twice := sorted({part for part in said if said.count(part) > 1}):
        yield f"format {form!r} gives the {twice[0]} twice"
    if "year" in said and time.year is not None:
        yield f"format {form!r} gives the year, so year: {time.year} must go"
    if "year" not in said and time.year is None:
        yield f"format {form!r} lacks the year: add %Y, or set year"
    if "day of the year" in said and ("day" in said or "month" in said):
        yield f"format {form!r} gives the day both as %j and as %m, %d"
    for part, directive in (("month", "%m"), ("day", "%d")):
        if part not in said and "day of the year" not in said:
            yield f"format {form!r} lacks the {part} ({directive}): a time without its day is no time"
    if ("hour of twelve" in said) != ("half of the day" in said):
        yield f"format {form!r}: %I and %p belong together; use %H for hours of 24"
    if "hour" in said and "hour of twelve" in said:
        yield f"format {form!r} gives the hour both as %H and as %I"
    hour = "hour" in said or "hour of twelve" in said
    for part, needed, there in (
        ("minute", "hour", hour),
        ("second", "minute", "minute" in said),
        ("fraction", "second", "second" in said),
    ):
        if part in said and not there:
            yield f"format {form!r} gives the {part} without the {needed}"
    if any(character in form for character in "\n\r\0"):
        yield f"format {form!r} holds a line break or a NUL"
    if time.digits is not None:
        longest = dtm.datetime(2024, 11, 23, 13, 45, 56).strftime(re.sub(r"%[bBaApz]", "", form))
        if re.search(r"%[bBaApz]", form) or not longest.isdigit():
            yield f"digits belongs to a format of digits alone, not to {form!r}"
        elif len(longest) != time.digits:
            yield f"digits {time.digits}: a text of format {form!r} has {len(longest)} characters"
    if time.year is not None and not time.earliest.year <= time.year <= time.latest.year:
        yield f"year {time.year} is not within earliest {time.earliest} .. latest {time.latest}"


def glob_problem(glob: str) -> str | None:
    """Return why a glob can match nothing within the raw folder, or leaves it."""
    if not glob.strip():
        return "an empty glob matches nothing"
    if glob.startswith(("/", "~")) or re.match(r"[A-Za-z]:|[a-z0-9]+://", glob):
        return f"{glob!r} is absolute; globs are within the raw folder, which the run names"
    if ".." in glob.split("/") or "\\" in glob:
        return f"{glob!r} leaves the raw folder"
    return None


def delimiter_problem(delimiter: str) -> str | None:
    """Return why a delimiter cannot be distinguished from the values around it."""
    if set(delimiter) & set('\n\r\0"') or all(c in "-." or c.isalnum() for c in delimiter):
        return f"delimiter {delimiter!r} cannot be distinguished from values"
    if not delimiter.isascii():
        return f"delimiter {delimiter!r} is no ASCII character"
    return None


def value_problem(value: int | float | str, column: Column, where: str) -> str | None:
    """Return why a value can never stand in a column of that type."""
    if column.type == "text":
        if not isinstance(value, str):
            return (
                f"{where}: {value!r} is no text, as the column is; write the value in quotes, as it stands in the files"
            )
        if value == "":
            return f"{where}: an empty value is a missing one, and is never equal to anything"
        if any(character in value for character in "\n\r\0"):
            return f"{where}: {value!r} holds a line break or a NUL, which no value does"
        return None
    if isinstance(value, str):
        return f"{where}: {value!r} is text, no {column.type}, as the column is; write a decimal number without quotes"
    if column.type == "integer" and (value != math.floor(value) or abs(value) > INT64_MAX):
        return f"{where}: {value!r} is no whole number within 64 bits, as the column's values are"
    return None


def _references(definition: DatasetDefinition) -> Iterator[str]:
    columns, events = definition.logs.columns, definition.events
    number, any_type = ("integer", "decimal"), ("integer", "decimal", "text")
    wanted: dict[str, tuple[str, tuple[str, ...]]] = {
        "events.user": (events.user, ("integer", "text")),
        "events.item": (events.item, ("integer", "text")),
    }
    times = {
        "events.time.column" if len(events.time.columns) == 1 else f"events.time.column.{i}": name
        for i, name in enumerate(events.time.columns)
    }
    wanted |= {where: (column, events.time.column_types) for where, column in times.items()}
    wanted |= {
        f"events.{part}.column": (span.column, number)
        for part in ("watch_time", "duration")
        if (span := getattr(events, part))
    }
    wanted |= {
        f"events.{part}": (column, ("integer",))
        for part in ("context", "is_random")
        if (column := getattr(events, part))
    }
    wanted |= {f"events.signals.{name}.column": (c.column, any_type) for name, c in events.signals.items()}
    by_kind = {"id": ("integer",), "number": number}
    wanted |= {
        f"events.item_fields.{name}.column": (f.column, by_kind.get(f.kind, any_type))
        for name, f in events.item_fields.items()
    }
    for where, (column, types) in wanted.items():
        if column not in columns:
            yield f"{where}: {column!r} is not among logs.columns: {', '.join(columns)}"
        elif columns[column].type not in types:
            yield f"{where}: column {column!r} is of type {columns[column].type}; allowed: {', '.join(types)}"
    for where in (events.user, events.item, *events.time.columns):
        if where in columns and columns[where].optional:
            yield f"logs.columns.{where}: user, item and time cannot be optional"
    parts = {"events.user": events.user, "events.item": events.item, **times}
    for (first, a), (second, b) in (
        pair for i, one in enumerate(parts.items()) for pair in ((one, other) for other in list(parts.items())[i + 1 :])
    ):
        if a == b:
            yield f"{second}: column {b!r} is already {first}"


def _columns(definition: DatasetDefinition) -> Iterator[str]:
    logs = definition.logs
    for name, column in logs.columns.items():
        where = f"logs.columns.{name}"
        for part in ("min", "max"):
            limit = getattr(column, part)
            if limit is None:
                continue
            if column.type == "text":
                yield f"{where}.{part}: a text column has no bounds; use one_of"
            elif abs(limit) > INT64_MAX and column.type == "integer":
                yield f"{where}.{part}: {limit!r} is beyond 64 bits"
        if column.min is not None and column.max is not None and column.min > column.max:
            yield f"{where}: min {column.min} is above max {column.max}: no value is allowed"
        for value in column.one_of or ():
            if problem := value_problem(value, column, f"{where}.one_of"):
                yield problem
            elif not _within(value, column):
                yield f"{where}.one_of: {value!r} is not within min and max"
            elif _is_cut(value, definition):
                yield f"{where}.one_of: {value!r} holds the delimiter of files without quotes"


def _signals(definition: DatasetDefinition) -> Iterator[str]:
    columns, signals = definition.logs.columns, definition.events.signals
    lower: dict[str, str] = {}
    for name, condition in signals.items():
        where = f"events.signals.{name}"
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            yield f"{where}: a signal's name has letters, digits and _ alone, a letter first"
        if lower.setdefault(name.lower(), name) != name:
            yield f"{where}: differs from {lower[name.lower()]!r} only in case"
        if (column := columns.get(condition.column)) is not None:
            yield from _condition_problems(condition, column, where, definition)


def _condition_problems(
    condition: Condition, column: Column, where: str, definition: DatasetDefinition
) -> Iterator[str]:
    limits = {
        part: value
        for part in ("above", "at_least", "below", "at_most")
        if (value := getattr(condition, part)) is not None
    }
    if column.type == "text" and limits:
        yield f"{where}.{next(iter(limits))}: column {condition.column!r} is text and has no order; use equals"
        return
    for part, limit in limits.items():
        if column.type == "integer" and abs(limit) > INT64_MAX:
            yield f"{where}.{part}: {limit!r} is beyond 64 bits"
            return
    equals = (
        condition.equals
        if isinstance(condition.equals, tuple)
        else ()
        if condition.equals is None
        else (condition.equals,)
    )
    wrong = [problem for value in equals if (problem := value_problem(value, column, f"{where}.equals"))]
    yield from wrong
    if wrong:
        return
    if column.one_of is not None and not set(map(str, equals)) <= set(map(str, column.one_of)):
        yield (
            f"{where}: {condition.equals!r} is not among logs.columns.{condition.column}.one_of:"
            f" {', '.join(map(str, column.one_of))}"
        )
        return
    for value in equals:
        if not _within(value, column):
            yield (
                f"{where}.equals: {value!r} is not within min and max of logs.columns.{condition.column}: it never"
                " holds"
            )
        elif _is_cut(value, definition):
            yield f"{where}.equals: {value!r} holds the delimiter of files without quotes: it never holds"
    if limits and not _can_hold(limits, column, equals or column.one_of):
        yield (
            f"{where}: {', '.join(f'{part} {limit}' for part, limit in limits.items())} never hold together with what"
            f" logs.columns.{condition.column} allows"
        )


def _can_hold(limits: dict[str, float], column: Column, among: Sequence[int | float | str] | None) -> bool:
    """Whether a number can meet all limits, those of its column included."""

    def meets(value: float) -> bool:
        return (
            value > limits.get("above", -math.inf)
            and value >= limits.get("at_least", -math.inf)
            and value < limits.get("below", math.inf)
            and value <= limits.get("at_most", math.inf)
            and _within(value, column)
        )

    if among is not None:
        return any(meets(value) for value in among if not isinstance(value, str))
    low = max(
        [
            limits.get("above", -math.inf),
            limits.get("at_least", -math.inf),
            -math.inf if column.min is None else column.min,
        ]
    )
    high = min(
        [limits.get("below", math.inf), limits.get("at_most", math.inf), math.inf if column.max is None else column.max]
    )
    if math.isinf(low) or math.isinf(high):
        return True
    if column.type == "integer":
        first = math.ceil(low)
        return any(meets(value) for value in (first, first + 1))
    return low <= high and meets(low + (high - low) / 2)


def _within(value: int | float | str, column: Column) -> bool:
    return isinstance(value, str) or (
        (column.min is None or value >= column.min) and (column.max is None or value <= column.max)
    )


def _is_cut(value: int | float | str, definition: DatasetDefinition) -> bool:
    logs = definition.logs
    return logs.format == "csv" and not logs.quoting and isinstance(value, str) and logs.delimiter in value


def _days(definition: DatasetDefinition) -> Iterator[str]:
    time, window = definition.events.time, definition.window
    if definition.last_day is not None and definition.last_day < definition.first_day:
        yield f"last_day: last_day {definition.last_day} is before first_day {definition.first_day}"
    if not window.evaluation_days < window.target_days <= window.lookback_days:
        yield "window: needs evaluation_days < target_days <= lookback_days"
    if not time.earliest <= definition.first_day < time.latest:
        yield (
            f"first_day: {definition.first_day} is not within events.time: earliest {time.earliest}, before latest"
            f" {time.latest}; its rows would all be refused"
        )
    elif (
        definition.last_day is not None
        and definition.last_day >= time.latest
        and definition.last_day >= definition.first_day
    ):
        yield (
            f"last_day: {definition.last_day} is not before events.time.latest {time.latest}; its rows would all be"
            " refused"
        )
    if time.format is not None and _is_cut(time.format, definition):
        yield f"events.time.format: {time.format!r} holds the delimiter of files without quotes"


def _targets(definition: DatasetDefinition) -> Iterator[str]:
    signals, targets = definition.events.signals, definition.targets
    named = {
        "targets.label": (targets.label,) if targets.label else (),
        "targets.of": targets.of or (),
        "history.of": definition.history.of or (),
    }
    for where, names in named.items():
        for signal in names:
            if signal not in signals:
                yield f"{where}: {signal!r} is not among events.signals: {', '.join(signals)}"
        if twice := _twice(names):
            yield f"{where}: {twice!r} is named twice"
    if targets.label is not None and targets.of == (targets.label,):
        yield f"targets.of: every target has the label {targets.label!r}; name other signals too, or use negatives"
    if targets.positions is not None:
        places: dict[int, str] = {}
        for part in ("train", "validation", "evaluation"):
            for place in getattr(targets.positions, part):
                if place in places:
                    yield f"targets.positions.{part}: {place} is already a place of {places[place]}"
                places.setdefault(place, part)


def _fields(definition: DatasetDefinition) -> Iterator[str]:
    item_fields = definition.events.item_fields
    yield from _names(
        "events.item_fields",
        item_fields,
        (taken := dict.fromkeys((*ITEM_COLUMNS, *EVENT_COLUMNS, *FOLDER_COLUMNS), "a column of the warehouse")),
    )
    taken = dict.fromkeys((*ITEM_COLUMNS, *FOLDER_COLUMNS), "a column of the warehouse") | {
        name: "events.item_fields" for name in item_fields
    }
    for kind, files, names in (("items", definition.items, taken), ("users", definition.users, {})):
        for i, file in enumerate(files):
            yield from _names(f"{kind}.{i}.fields", file.fields, names)
            yield from _feature_columns(file, f"{kind}.{i}")
            if file.files in definition.logs.files:
                yield f"{kind}.{i}.files: {file.files!r} is among logs.files, too"
            if kind == "users":
                yield from (
                    f"users.{i}.fields.{name}.kind: fields of a user are of kind category"
                    for name, rule in file.fields.items()
                    if rule.kind != "category"
                )


def _names(where: str, fields: dict[str, FieldRule], taken: dict[str, str]) -> Iterator[str]:
    for name, rule in fields.items():
        if not re.fullmatch("[a-z][a-z0-9_]*", name):
            yield f"{where}.{name}: a field's name has a-z, 0-9 and _ alone, a letter first"
        elif name in taken:
            yield f"{where}.{name}: the name is taken: {taken[name]}"
        taken.setdefault(name, where)
        if rule.kind != "categories" and {"split", "strip"} & rule.model_fields_set:
            yield f"{where}.{name}: split and strip belong to kind categories, not to {rule.kind}"


def _feature_columns(file: FeatureFile, where: str) -> Iterator[str]:
    if file.columns is None:
        return
    if twice := _twice(file.columns):
        yield f"{where}.columns: {twice!r} is named twice"
    for field, column in [
        ("key", file.key),
        *[(f"fields.{name}.column", rule.column) for name, rule in file.fields.items()],
    ]:
        if column not in file.columns:
            yield f"{where}.{field}: {column!r} is not among {where}.columns: {', '.join(file.columns)}"


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)

"""How a data set is described: one YAML file says what its raw files look like and which rows are history and targets.

The files of `etl/definitions/` come with the project; anyone's own logs become a data set by a file of the same kind,
given by its path. `docs/datasets.md` explains every field; the models below are what a file is checked against.
"""

from __future__ import annotations

import datetime as dtm
import re
import zoneinfo
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field as Setting

from etl.errors import StageError

SIMULATED_MARKER = "SIMULATED.json"  # written by the simulator beside the logs it makes
BUILT_IN = Path(__file__).parent / "definitions"
MAX_SIGNALS = 8  # bits of `feedback` that the model embeds
MILLISECONDS = {"milliseconds": 1, "seconds": 1_000, "minutes": 60_000}


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    raise ValueError(f"unknown field {name!r}; allowed: {', '.join(cls.model_fields)}")
        return data


class Column(_Model):
    """One raw column. A value that is not of its type, not within its bounds or missing refuses the row.

    Attributes:
        type: integer (int64), decimal (float64) or text (UTF-8).
        min, max: bounds, both included.
        one_of: the values that are allowed.
        optional: an empty value is allowed.
    """

    type: Literal["integer", "decimal", "text"]
    min: float | None = None
    max: float | None = None
    one_of: tuple[int | float | str, ...] | None = None
    optional: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"type": data} if isinstance(data, str) else data


class NamedDays(_Model):
    """The days that a file's name promises, so that a daily run opens only the files that may hold its days.

    Attributes:
        pattern: regular expression with the groups `month` and `day`, and where the names have them `year`, `last_year`,
            `last_month`, `last_day`.
        year: for names without a year; names whose last day is before the first end in the next year.
        zone: time zone of these days; the one of `events.time` where nothing is said.
        late_minutes: a row may stand in a file so long after its time.
    """

    pattern: str
    year: int | None = None
    zone: str | None = None
    late_minutes: int = Setting(default=0, ge=0, le=1_440)

    @pydantic.model_validator(mode="after")
    def _groups(self) -> NamedDays:
        try:
            groups = set(re.compile(self.pattern).groupindex)
        except re.error as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from None
        allowed = {"year", "month", "day", "last_year", "last_month", "last_day"}
        if not {"month", "day"} <= groups or not groups <= allowed or ("year" not in groups and self.year is None):
            raise ValueError(f"pattern must have the groups month and day, may have {', '.join(sorted(allowed))}, and needs the group year or the field year")
        _zone(self.zone or "UTC")
        return self


class Logs(_Model):
    """The raw files with one row an event.

    Attributes:
        files: globs within the raw folder; `.gz` files of csv are unpacked as they are read.
        header: the first line names the columns; without it `columns` are in the files' order.
        delimiter, quoting: of csv; quoted values may hold the delimiter, not a line break.
        columns: what the files must have; columns that are not named here are ignored.
        repeats: `drop` rows that repeat another in all these columns, or `keep` them (where time is too coarse to tell).
        expected_refusals: reasons that do not count towards the share of bad rows which stops a stage.
    """

    files: tuple[str, ...] = Setting(min_length=1)
    format: Literal["csv", "parquet"] = "csv"
    header: bool = True
    delimiter: str = Setting(default=",", min_length=1, max_length=1)
    quoting: bool = True
    columns: dict[str, Column] = Setting(min_length=1)
    days_in_name: NamedDays | None = None
    repeats: Literal["drop", "keep"] = "drop"
    expected_refusals: tuple[Literal["missing_value", "time_out_of_range", "not_a_time", "out_of_range", "not_allowed"], ...] = ()

    @pydantic.model_validator(mode="after")
    def _plain_delimiter(self) -> Logs:
        if self.delimiter in "\n\r\"-.0123456789":
            raise ValueError(f"delimiter {self.delimiter!r} cannot be told from values")
        return self


class Time(_Model):
    """The time of an event.

    Attributes:
        unit: of a number since 1970-01-01 UTC.
        format: of a text, in strptime's directives; fractions of a second as %f.
        zone: time zone of such texts.
        year: put before texts that have none.
        digits: texts are filled with zeros on the left to so many characters ("829" is "0829").
        earliest, latest: days; a time outside them refuses the row.
    """

    column: str
    unit: Literal["seconds", "milliseconds", "microseconds"] | None = None
    format: str | None = None
    zone: str = "UTC"
    year: int | None = None
    digits: int | None = Setting(default=None, ge=1, le=20)
    earliest: dtm.date = dtm.date(2000, 1, 1)
    latest: dtm.date = dtm.date(2100, 1, 1)

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> Time:
        if (self.unit is None) == (self.format is None):
            raise ValueError("give either unit (seconds, milliseconds, microseconds) or format (for example %Y-%m-%d %H:%M:%S)")
        if self.format is not None and "%" not in self.format:
            raise ValueError(f"format {self.format!r} has no directive of strptime, such as %Y-%m-%d %H:%M:%S")
        if self.unit is not None and (self.year is not None or self.digits is not None):
            raise ValueError("year and digits belong to format")
        _zone(self.zone)
        return self


class Span(_Model):
    """A length of time in a raw column."""

    column: str
    unit: Literal["milliseconds", "seconds", "minutes"] = "milliseconds"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"column": data} if isinstance(data, str) else data


class Condition(_Model):
    """What a raw column must hold; an empty value never does."""

    column: str
    equals: int | float | str | tuple[int | float | str, ...] | None = None
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    @pydantic.model_validator(mode="after")
    def _some(self) -> Condition:
        if all(value is None for value in (self.equals, self.above, self.at_least, self.below, self.at_most)):
            raise ValueError("give at least one of equals, above, at_least, below, at_most")
        return self


class FieldRule(_Model):
    """A static field of an item or a user.

    Attributes:
        kind: `id` (a whole number with many values; rare ones share hashed rows), `category` (one of few values),
            `categories` (a list of them in one text) or `number` (bucketed by its quantiles).
        split, strip: of categories: what stands between the values, and characters around the list and its values.
    """

    column: str
    kind: Literal["id", "category", "categories", "number"] = "category"
    split: str = Setting(default=",", min_length=1)
    strip: str = " "

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"column": data} if isinstance(data, str) else data


class FeatureFile(_Model):
    """A CSV file with one row an item or a user; the first row of an id counts.

    Attributes:
        files: glob within the raw folder; may match nothing.
        key: column of the id.
        missing: values that mean "not known".
    """

    files: str
    key: str
    delimiter: str = Setting(default=",", min_length=1, max_length=1)
    columns: tuple[str, ...] | None = None  # of a file without header
    missing: tuple[str, ...] = ("",)
    fields: dict[str, FieldRule] = Setting(min_length=1)


class Events(_Model):
    """Which raw column plays which part.

    Attributes:
        user, item: ids; texts become 63-bit hashes.
        watch_time, duration: how long it was watched, and how long it is.
        context: where it was shown, a small whole number.
        is_random: 1 where random traffic chose the item.
        signals: what the user did; bit i of `feedback` is the i-th signal, so the order is part of the data.
        item_fields: static fields of the item that stand in the log; the latest known value counts.
    """

    user: str
    item: str
    time: Time
    watch_time: Span | None = None
    duration: Span | None = None
    context: str | None = None
    is_random: str | None = None
    signals: dict[str, Condition] = Setting(min_length=1, max_length=MAX_SIGNALS)
    item_fields: dict[str, FieldRule] = {}


class History(_Model):
    """Which events stand in a history, and what a target may see of it.

    Attributes:
        of: signals, at least one of which an event must have; none named: every event.
        cutoff: `event`: everything strictly earlier than the target; `day_start`: strictly earlier than its UTC day, as a
            system sees it whose caches are refreshed once a day.
        availability_lag_ms: an event is known only so long after its time.
        max_events: at most so many of the latest that a target may see.
    """

    of: tuple[str, ...] | None = None
    cutoff: Literal["event", "day_start"] = "event"
    availability_lag_ms: int = Setting(default=0, ge=0)
    max_events: int = Setting(default=4_000, ge=1)


class Negatives(_Model):
    """Items that stand as targets with label 0 beside each logged target, for logs that hold no exposures.

    Attributes:
        per_positive: how many.
        draw: weights of the ways to draw one: `popularity` (as often as it occurs in the window), `uniform` (any item of
            the window), `own_history` (an item of the user's own past, other than the target).
        seed: with the partition and the user it decides every draw.
    """

    per_positive: int = Setting(ge=1, le=100)
    draw: dict[Literal["popularity", "uniform", "own_history"], Annotated[float, Setting(gt=0)]] = {"popularity": 1.0}
    seed: int = 7


class Positions(_Model):
    """Targets by their place among a user's target events, counted from the end: -1 is his last."""

    train: tuple[Annotated[int, Setting(lt=0)], ...] = Setting(min_length=1)
    validation: tuple[Annotated[int, Setting(lt=0)], ...] = ()
    evaluation: tuple[Annotated[int, Setting(lt=0)], ...] = (-1,)


class Targets(_Model):
    """Which events are targets, and their label.

    Attributes:
        of: signals, at least one of which a target must have; none named: every event.
        label: the signal that is the label; none with sampled negatives, where a logged target is a positive.
        positions: targets by position (a leave-last protocol) instead of by day.
        min_events: users with fewer target events in the lookback have no targets.
        negatives: sampled ones.
    """

    of: tuple[str, ...] | None = None
    label: str | None = None
    positions: Positions | None = None
    min_events: int = Setting(default=1, ge=1)
    negatives: Negatives | None = None

    @pydantic.model_validator(mode="after")
    def _label_or_negatives(self) -> Targets:
        if (self.label is None) == (self.negatives is None):
            raise ValueError("give either label (a signal) or negatives (logged targets are positives, sampled items negatives)")
        return self


class WindowDefaults(_Model):
    """Days of a partition where the command line says nothing else; see `etl.partitions.Window`."""

    target_days: int = Setting(default=14, ge=2)
    lookback_days: int = Setting(default=30, ge=2)
    evaluation_days: int = Setting(default=1, ge=1)


class Archive(_Model):
    """One published file: where it is, how large, its checksum, and which of its members are raw files."""

    url: str
    bytes: int | None = None
    md5: str | None = Setting(default=None, pattern="^[0-9a-f]{32}$")
    members: tuple[str, ...] = ("*",)


class Download(_Model):
    """Where the makers publish the data set, under which licence."""

    licence: str
    page: str
    archives: tuple[Archive, ...] = ()


class DatasetDefinition(_Model):
    """One data set.

    Attributes:
        name: its name in the warehouse, in MLflow, in the attempt and in the DAG; the file is `<name>.yaml`.
        title: what people read.
        simulated: the rows come from the simulator; shown wherever the name is.
        first_day, last_day: UTC days of the data; the DAG's schedule spans them.
        items, users: files of static fields.
    """

    name: str = Setting(pattern="^[a-z][a-z0-9_]{0,39}$")
    title: str
    simulated: bool = False
    first_day: dtm.date
    last_day: dtm.date | None = None
    download: Download | None = None
    logs: Logs
    events: Events
    items: tuple[FeatureFile, ...] = ()
    users: tuple[FeatureFile, ...] = ()
    history: History = History()
    targets: Targets
    window: WindowDefaults = WindowDefaults()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> DatasetDefinition:
        columns, events = self.logs.columns, self.events
        wanted: dict[str, tuple[str, tuple[str, ...]]] = {"events.user": (events.user, ("integer", "text")), "events.item": (events.item, ("integer", "text"))}
        wanted["events.time.column"] = (events.time.column, ("integer", "decimal") if events.time.unit else ("text", "integer"))
        wanted |= {f"events.{part}.column": (span.column, ("integer", "decimal")) for part in ("watch_time", "duration") if (span := getattr(events, part))}
        wanted |= {f"events.{part}": (column, ("integer",)) for part in ("context", "is_random") if (column := getattr(events, part))}
        wanted |= {f"events.signals.{name}.column": (c.column, ("integer", "decimal", "text")) for name, c in events.signals.items()}
        wanted |= {f"events.item_fields.{name}.column": (f.column, ("integer",) if f.kind == "id" else ("integer", "decimal", "text")) for name, f in events.item_fields.items()}
        for where, (column, types) in wanted.items():
            if column not in columns:
                raise ValueError(f"{where}: {column!r} is not among logs.columns: {', '.join(columns)}")
            if columns[column].type not in types:
                raise ValueError(f"{where}: column {column!r} is of type {columns[column].type}; allowed: {', '.join(types)}")
        for name, condition in events.signals.items():
            wanted_values = condition.equals if isinstance(condition.equals, tuple) else (condition.equals,)
            allowed = columns[condition.column].one_of
            if condition.equals is not None and allowed is not None and not set(map(str, wanted_values)) <= set(map(str, allowed)):
                raise ValueError(f"events.signals.{name}: {condition.equals!r} is not among logs.columns.{condition.column}.one_of: {', '.join(map(str, allowed))}")
        if self.last_day is not None and self.last_day < self.first_day:
            raise ValueError(f"last_day {self.last_day} is before first_day {self.first_day}")
        window = self.window
        if not window.evaluation_days < window.target_days <= window.lookback_days:
            raise ValueError("window: needs evaluation_days < target_days <= lookback_days")
        for where in (events.user, events.item, events.time.column):
            if columns[where].optional:
                raise ValueError(f"logs.columns.{where}: user, item and time cannot be optional")
        named = {"targets.label": (self.targets.label,) if self.targets.label else (), "targets.of": self.targets.of or (), "history.of": self.history.of or ()}
        for where, signals in named.items():
            for signal in signals:
                if signal not in events.signals:
                    raise ValueError(f"{where}: {signal!r} is not among events.signals: {', '.join(events.signals)}")
        taken = {"item_index", "item_id", "train_occurrences"}
        for where, fields in [("events.item_fields", events.item_fields), *[(f"items[{i}].fields", file.fields) for i, file in enumerate(self.items)]]:
            for name in fields:
                if name in taken or not re.fullmatch("[a-z][a-z0-9_]*", name):
                    raise ValueError(f"{where}: {name!r} is taken twice, reserved or not in lower case")
                taken.add(name)
        if any(rule.kind != "category" for file in self.users for rule in file.fields.values()):
            raise ValueError("users: fields of a user are of kind category")
        return self

    @property
    def feedback_fields(self) -> tuple[str, ...]:
        """Signals in the order of the bits of `feedback`."""
        return tuple(self.events.signals)

    @property
    def label_bit(self) -> int | None:
        """Bit of `feedback` that is the label; None where negatives are sampled."""
        return self.feedback_fields.index(self.targets.label) if self.targets.label else None

    def bits(self, signals: tuple[str, ...] | None) -> int | None:
        """Return the mask of some signals; None means every event."""
        return None if signals is None else sum(1 << self.feedback_fields.index(name) for name in signals)

    @property
    def item_fields(self) -> dict[str, FieldRule]:
        """Every static field of an item, those of the log first."""
        return self.events.item_fields | {name: rule for file in self.items for name, rule in file.fields.items()}

    @property
    def user_fields(self) -> tuple[str, ...]:
        return tuple(name for file in self.users for name in file.fields)


class _Loader(yaml.SafeLoader):
    """Plain data only; dates stay texts, so that a wrong one is told with the name of its field."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def built_in_names() -> list[str]:
    """Return the names of the definitions that come with the project."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def definition_name(name_or_path: str) -> str:
    """Return the name of a data set without reading its definition."""
    return Path(name_or_path).stem if _is_path(name_or_path) else name_or_path


def dataset(name_or_path: str) -> DatasetDefinition:
    """Return the definition of that name, or read the file at that path.

    Raises:
        StageError: there is none, or it is wrong; every wrong field is named.
    """
    if _is_path(name_or_path):
        return _load(Path(name_or_path).expanduser())
    if name_or_path not in built_in_names():
        raise StageError(f"unknown data set {name_or_path!r}", f"use one of: {', '.join(built_in_names())}, or give the path of a definition (name.yaml)")
    return _load(BUILT_IN / f"{name_or_path}.yaml")


def _is_path(name_or_path: str) -> bool:
    return "/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))


def _load(path: Path) -> DatasetDefinition:
    raw = _merged(path)
    try:
        definition = DatasetDefinition.model_validate(raw)
    except pydantic.ValidationError as error:
        problems = "; ".join(_problem(detail) for detail in error.errors())
        raise StageError(f"the data set definition {path} is wrong: {problems}", "correct these fields; docs/datasets.md explains each") from None
    if definition.name != path.stem:
        raise StageError(f"the data set definition {path} has the name {definition.name!r}", f"rename the file to {definition.name}.yaml, or set name: {path.stem}")
    return definition


def _merged(path: Path) -> dict[str, Any]:
    """Return the file's content, on top of the definition that it `extends` (mappings are merged, all else is replaced)."""
    try:
        text = path.read_text()
    except OSError as error:
        raise StageError(f"the data set definition {path} cannot be read: {error.strerror}", "give the path of an existing YAML file") from None
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise StageError(f"the data set definition {path} is not YAML: {' '.join(str(error).split())}", "correct the place that is named") from None
    if not isinstance(raw, dict):
        raise StageError(f"the data set definition {path} is not a mapping of fields", f"begin with: name: {path.stem}")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if base not in built_in_names() or base == path.stem:
        raise StageError(f"the data set definition {path} extends {base!r}, which does not exist", f"use one of: {', '.join(n for n in built_in_names() if n != path.stem)}")
    return _overlay(_merged(BUILT_IN / f"{base}.yaml"), raw)


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        merged[name] = _overlay(below[name], value) if isinstance(value, dict) and isinstance(below.get(name), dict) else value
    return merged


def _problem(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list, such as [a, b]")
    given = detail.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return (f"{where}: " if where else "") + message + shown


def _zone(name: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError):
        raise ValueError(f"zone {name!r} is not known; give for example UTC or Asia/Shanghai") from None

"""How a data set is described: one YAML file says what its raw files look like and which rows are history and targets.

The files of `etl/datasets/definitions/` come with the project; anyone's own logs become a data set by a file of the
same kind, given by its path. `docs/datasets.md` explains every field; the models below are what a file is checked
against.
"""

from __future__ import annotations

import codecs
import datetime as dtm
import math
import re
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field as Setting
from pydantic_core import PydanticCustomError

from etl.datasets.definition_checks import delimiter_problem, glob_problem, inconsistencies, time_problems
from etl.datasets.definition_model import DefinitionModel as _Model
from etl.datasets.definition_yaml import read_yaml
from etl.datasets.quality_rules import Quality
from etl.stage.errors import StageError
from etl.stage.uris import folder_problem
from etl.stage.worker_counts import worker_range

SIMULATED_MARKER = "SIMULATED.json"  # written by the simulator beside the logs it makes
BUILT_IN = Path(__file__).parent / "definitions"
SHORTEST_RETENTION_DAYS = 4  # longer than any run of the DAG may take
MAX_SIGNALS = 8  # bits of `feedback` that the model embeds
# What databases and data frames write for "no value".
MISSING_WORDS = ("", "NULL", "null", "\\N", "NaN", "nan", "NA", "N/A", "<NA>", "None")
MILLISECONDS = {"milliseconds": 1, "seconds": 1_000, "minutes": 60_000}  # of the units of a length of time


def _day(given: Any) -> Any:
    """Return a day written YYYY-MM-DD as a date; pydantic alone would take seconds since 1970 and times of day, too."""
    if isinstance(given, str) and re.fullmatch(r"(19|20|21)[0-9]{2}-[0-9]{2}-[0-9]{2}", given):
        try:
            return dtm.date.fromisoformat(given)
        except ValueError:
            pass
    if type(given) is dtm.date:
        return given
    raise ValueError("a day of the years 1900 to 2199 is wanted, written YYYY-MM-DD")


def _value(given: Any) -> Any:
    """Return what a raw column may hold; what it must be is decided by the column's type."""
    if isinstance(given, bool) or given is None:
        raise ValueError(
            f"a number or a text is wanted, not {'null' if given is None else str(given).lower()}; write a text in"
            " quotes, as it stands in the files"
        )
    if isinstance(given, float) and not math.isfinite(given):
        raise ValueError("a number is wanted that is finite")
    if not isinstance(given, int | float | str):
        raise ValueError("a number or a text is wanted, or a list of them, such as [a, b]")
    return given


def _values(given: Any) -> Any:
    """Return one value, or several as a tuple."""
    if given is None or not isinstance(given, list | tuple):
        return given if given is None else _value(given)
    if not given:
        raise ValueError("an empty list allows nothing")
    return tuple(_value(value) for value in given)


def _checked(problem: Callable[[str], str | None]) -> pydantic.AfterValidator:
    def check(given: str) -> str:
        if (said := problem(given)) is not None:
            raise ValueError(said)
        return given

    return pydantic.AfterValidator(check)


def _folder(given: str) -> str:
    if (said := folder_problem(given)) is not None:
        raise PydanticCustomError("not_shown", "{said}", {"said": said})  # what was given may hold a key
    return given


def _workers(given: int | str) -> int | str:
    worker_range(given)
    return given


Name = Annotated[str, Setting(min_length=1)]
Folder = Annotated[str, Setting(max_length=500), pydantic.AfterValidator(_folder)]
Day = Annotated[dtm.date, pydantic.BeforeValidator(_day)]
Glob = Annotated[str, _checked(glob_problem)]
Workers = Annotated[int | str, pydantic.AfterValidator(_workers)]
Delimiter = Annotated[str, Setting(min_length=1, max_length=1), _checked(delimiter_problem)]
LogDelimiter = Annotated[str, Setting(min_length=1, max_length=8), _checked(delimiter_problem)]
Signals = Annotated[tuple[Name, ...], Setting(min_length=1)]
Year = Annotated[int, Setting(ge=1_900, le=2_199)]
Bound = Annotated[
    int | float,
    pydantic.BeforeValidator(lambda given: _value(given) if not isinstance(given, str) else _not_a_number()),
]


def _not_a_number() -> Any:
    raise ValueError("a number is wanted, in plain decimal digits and without quotes")


class Column(_Model):
    """One raw column. A value that is not of its type, not within its bounds or missing refuses the row.

    Attributes:
        type: integer (int64), decimal (float64), text (UTF-8), or timestamp (a native one of Parquet, of any unit and
            zone).
        min, max: bounds, both included.
        one_of: the values that are allowed.
        optional: an empty value is allowed.
    """

    type: Literal["integer", "decimal", "text", "timestamp"]
    min: Bound | None = None
    max: Bound | None = None
    one_of: Annotated[tuple[int | float | str, ...] | None, pydantic.BeforeValidator(_values)] = None
    optional: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"type": data} if isinstance(data, str) else data


class NamedDays(_Model):
    """The days that a file's name promises, so that a daily run opens only the files that may hold its days.

    Attributes:
        pattern: regular expression, searched for in the name with its folders, such as `dt=2024-03-01/part-0.csv`, with
            the groups `month` and `day`, and where the names have them `year`, `last_year`, `last_month`, `last_day`.
        year: for names without a year; names whose last day is before the first end in the next year.
        zone: time zone of these days; the one of `events.time` where nothing is said.
        late_minutes: a row may stand in a file so long after its time.
    """

    pattern: str
    year: Year | None = None
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
            raise ValueError(
                f"pattern must have the groups month and day, may have {', '.join(sorted(allowed))}, and needs the"
                " group year or the field year"
            )
        _zone(self.zone or "UTC")
        return self


class Logs(_Model):
    """The raw files with one row an event.

    Attributes:
        files: globs within the raw folder, with folders where they have a `/` (`dt=*/part-*.csv`; `**` stands for any
            number of folders); text files may be packed as gzip, zstd, bz2, xz, lz4, or zip archives of one file.
        format: csv, jsonl (one object a line, its keys are the columns) or parquet.
        header: of csv, the first line names the columns; without it `columns` are in the files' order.
        delimiter, quoting: of csv; the delimiter may have several characters, quoted values may hold it, not a line
            break.
        encoding: of csv and jsonl: any of Python's codecs in which ASCII is itself.
        columns: what the files must have; columns that are not named here are ignored.
        missing: texts that mean "no value", as an empty cell always does; in every column, of every format.
        repeats: `drop` rows that repeat another in all these columns, or `keep` them (where time is too coarse to
            separate them).
        expected_refusals: reasons that do not count towards the share of bad rows which stops a stage.
    """

    files: tuple[Glob, ...] = Setting(min_length=1)
    format: Literal["csv", "jsonl", "parquet"] = "csv"
    header: bool = True
    delimiter: LogDelimiter = ","
    quoting: bool = True
    encoding: str = "utf-8"
    columns: dict[Name, Column] = Setting(min_length=1)
    missing: tuple[str, ...] = MISSING_WORDS
    days_in_name: NamedDays | None = None
    repeats: Literal["drop", "keep"] = "drop"
    expected_refusals: tuple[
        Literal["missing_value", "time_out_of_range", "not_a_time", "out_of_range", "not_allowed"], ...
    ] = ()

    @property
    def names_columns(self) -> bool:
        """Whether the first line of a file names its columns."""
        return self.header and self.format == "csv"

    @pydantic.field_validator("missing", mode="before")
    @classmethod
    def _words(cls, words: Any) -> Any:
        if isinstance(words, (list, tuple)) and (wrong := [word for word in words if not isinstance(word, str)]):
            raise ValueError(
                f"YAML reads a word as {wrong[0]!r}: write the words in quotes, such as ['NULL', 'NaN', '-1']"
            )
        return words

    @pydantic.field_validator("encoding")
    @classmethod
    def _superset_of_ascii(cls, name: str) -> str:
        try:
            codec = codecs.lookup(name)
            plain = bytes(range(1, 128))
            # A line end, a quote and a delimiter are looked for as bytes, so each must be itself, whatever stands
            # before it.
            if plain.decode(codec.name) != plain.decode("ascii") or codec.name.startswith(("iso2022", "hz", "utf-7")):
                raise ValueError(
                    f"encoding {name!r} is not read: convert the files, such as with iconv -f {name} -t UTF-8"
                )
        except (LookupError, UnicodeDecodeError):
            raise ValueError(
                f"encoding {name!r} is not known, or not one in which ASCII is itself; give for example gbk, big5,"
                " latin-1 or cp1252"
            ) from None
        return "utf-8" if codec.name == "utf-8-sig" else codec.name

    @pydantic.model_validator(mode="after")
    def _of_its_format(self) -> Logs:
        for name, column in self.columns.items():
            if column.type == "timestamp" and self.format != "parquet":
                raise ValueError(
                    f"columns.{name}: timestamp is a type of Parquet; of {self.format} give text with"
                    " events.time.format, or integer with events.time.unit"
                )
            if column.type == "timestamp" and (
                column.min is not None or column.max is not None or column.one_of is not None
            ):
                raise ValueError(
                    f"columns.{name}: a timestamp has no min, max or one_of; events.time has earliest and latest"
                )
        return self


class Time(_Model):
    """The time of an event.

    Attributes:
        column: one column, or several whose texts are joined by a blank, to be read by `format`.
        unit: of a number since `origin`, 00:00 UTC.
        format: of a text, in strptime's directives; fractions of a second as %f, an offset from UTC as %z.
        zone: time zone of such texts, and of native timestamps that have none.
        year: put before texts that have none.
        digits: texts are filled with zeros on the left to so many characters ("829" is "0829").
        earliest, latest: days; a time outside them refuses the row.
    """

    column: str | tuple[str, ...]
    unit: Literal["seconds", "milliseconds", "microseconds", "nanoseconds"] | None = None
    origin: Day = dtm.date(1970, 1, 1)
    format: str | None = None
    zone: str = "UTC"
    year: Year | None = None
    digits: int | None = Setting(default=None, ge=1, le=20)
    earliest: Day = dtm.date(1990, 1, 1)
    latest: Day = dtm.date(2100, 1, 1)

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> Time:
        if self.unit is not None and self.format is not None:
            raise ValueError(
                "give either unit (seconds, milliseconds, microseconds, nanoseconds) or format (for example %Y-%m-%d"
                " %H:%M:%S)"
            )
        if self.format is not None and "%" not in self.format:
            raise ValueError(
                f"format {self.format!r} has no directive of strptime, such as %Y-%m-%d %H:%M:%S; a number takes unit"
                " (such as seconds)"
            )
        if self.unit is not None and (self.year is not None or self.digits is not None):
            raise ValueError("year and digits belong to format")
        if problems := list(time_problems(self)):
            raise ValueError("; ".join(problems))
        if self.unit is None and self.origin != dtm.date(1970, 1, 1):
            raise ValueError("origin belongs to unit: it is the day at which the number is 0")
        if len(self.columns) == 0 or (len(self.columns) > 1 and (self.format is None or self.digits is not None)):
            raise ValueError(
                "several columns need format, which reads their texts joined by blanks, and take no digits"
            )
        if len(self.columns) > 1 and len(re.findall(r"\s", str(self.format))) < len(self.columns) - 1:
            raise ValueError(f"format {self.format!r} has no blank between the texts of {' and '.join(self.columns)}")
        if self.format is not None and "%z" in self.format and self.zone != "UTC":
            raise ValueError("a format with %z takes the zone from each text: leave out zone")
        _zone(self.zone)
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it is read from."""
        return (self.column,) if isinstance(self.column, str) else self.column

    @property
    def column_types(self) -> tuple[str, ...]:
        """The types that they may have."""
        return ("integer", "decimal") if self.unit else ("text", "integer") if self.format else ("timestamp",)


class Span(_Model):
    """A length of time in a raw column; `percent` (of `watch_time` alone) is a share of the duration."""

    column: str
    unit: Literal["milliseconds", "seconds", "minutes", "percent"] = "milliseconds"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"column": data} if isinstance(data, str) else data


class Condition(_Model):
    """What a raw column must hold; an empty value never does."""

    column: str
    equals: Annotated[int | float | str | tuple[int | float | str, ...] | None, pydantic.BeforeValidator(_values)] = (
        None
    )
    above: Bound | None = None
    at_least: Bound | None = None
    below: Bound | None = None
    at_most: Bound | None = None

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
    """A file with one row an item or a user; of an id that stands in several rows the first one counts.

    Attributes:
        files: glob within the raw folder; where it matches nothing the fields are empty. Text files may be packed as
            logs are.
        format: csv or parquet; files whose names end in .parquet are Parquet whatever it says.
        key: column of the id.
        delimiter, quoting: of csv; quoted values may hold the delimiter and line breaks. Without quoting a quote is
            part of a value.
        missing: values that mean "not known", as an empty one, a null and NaN always do.
    """

    files: Glob
    format: Literal["csv", "parquet"] = "csv"
    key: Name
    delimiter: Delimiter = ","
    quoting: bool = True
    columns: tuple[Name, ...] | None = Setting(default=None, min_length=1)  # of a file without header
    missing: tuple[str, ...] = ("",)
    fields: dict[str, FieldRule] = Setting(min_length=1)


class ItemFile(FeatureFile):
    """A file with one row an item.

    Attributes:
        optional: the feed may come without it. Else the gate of sequences stops a partition of which no item is
            described.
    """

    optional: bool = False


class Events(_Model):
    """Which raw column plays which part.

    Attributes:
        user, item: ids; texts become 63-bit hashes.
        watch_time, duration: how long it was watched, and how long it is.
        context: where it was shown, a small whole number.
        is_random: 1 where random traffic chose the item.
        signals: what the user did; bit i of `feedback` is the i-th signal, so the order is part of the data.
        item_fields: static fields of the item that stand in the log; the latest known value counts, one of the
            evaluation days only where there is no other.
    """

    user: str
    item: str
    time: Time
    watch_time: Span | None = None
    duration: Span | None = None
    context: str | None = None
    is_random: str | None = None
    signals: dict[str, Condition] = Setting(min_length=1, max_length=MAX_SIGNALS)
    item_fields: dict[str, FieldRule] = Setting(default={})

    @pydantic.model_validator(mode="after")
    def _percent_of_duration(self) -> Events:
        if self.duration is not None and self.duration.unit == "percent":
            raise ValueError("duration.unit: percent is a share of the duration, so only watch_time can have it")
        if self.watch_time is not None and self.watch_time.unit == "percent" and self.duration is None:
            raise ValueError("watch_time.unit: percent needs events.duration, of which it is a share")
        return self


class History(_Model):
    """Which events stand in a history, and what a target may see of it.

    Attributes:
        of: signals, at least one of which an event must have; none named: every event.
        cutoff: `event`: everything strictly earlier than the target; `day_start`: strictly earlier than its UTC day, as
            a system sees it whose caches are refreshed once a day.
        availability_lag_ms: an event is known only so long after its time.
        max_events: at most so many of the latest that a target may see.
    """

    of: Signals | None = None
    cutoff: Literal["event", "day_start"] = "event"
    availability_lag_ms: int = Setting(default=0, ge=0, le=36_525 * 86_400_000)
    max_events: int = Setting(default=4_000, ge=1, le=2**31 - 1)


class Negatives(_Model):
    """Items that stand behind each logged target with label 0, for logs that hold no exposures.

    Attributes:
        per_positive: how many.
        draw: weights of the ways to draw one: `popularity` (as often as it occurs before the evaluation days),
            `uniform` (any item that occurs there), `own_history` (an item of the user's own past, other than the
            target).
        seed: with the partition and the user it decides every draw.
    """

    per_positive: int = Setting(ge=1, le=100)
    draw: dict[Literal["popularity", "uniform", "own_history"], Annotated[float, Setting(gt=0)]] = Setting(
        default={"popularity": 1.0}, min_length=1
    )
    seed: int = Setting(default=7, ge=0, le=2**63 - 1)


class Positions(_Model):
    """Targets by their place among a user's target events, counted from the end: -1 is the last."""

    train: tuple[Annotated[int, Setting(lt=0)], ...] = Setting(min_length=1)
    validation: tuple[Annotated[int, Setting(lt=0)], ...] = ()
    evaluation: tuple[Annotated[int, Setting(lt=0)], ...] = Setting(default=(-1,), min_length=1)


class Targets(_Model):
    """Which events are targets, and their label.

    Attributes:
        of: signals, at least one of which a target must have; none named: every event.
        label: the signal that is the label; none with sampled negatives, where a logged target is a positive.
        positions: targets by position (a leave-last protocol) instead of by day.
        min_events: users with fewer target events in the lookback have no targets.
        negatives: sampled ones.
    """

    of: Signals | None = None
    label: str | None = None
    positions: Positions | None = None
    min_events: int = Setting(default=1, ge=1)
    negatives: Negatives | None = None

    @pydantic.model_validator(mode="after")
    def _label_or_negatives(self) -> Targets:
        if (self.label is None) == (self.negatives is None):
            raise ValueError(
                "give either label (a signal) or negatives (logged targets are positives, sampled items negatives)"
            )
        return self


class WindowDefaults(_Model):
    """Days of a partition where the command line says nothing else; see `etl.warehouse.partitions.Window`."""

    target_days: int = Setting(default=14, ge=2, le=36_525)
    lookback_days: int = Setting(default=30, ge=2, le=36_525)
    evaluation_days: int = Setting(default=1, ge=1, le=36_525)


class RunDefaults(_Model):
    """What a run of the data set's DAG takes where its form, or `make run`, says nothing else; nothing of it shapes a
    row.

    Attributes:
        raw: folder of the raw logs: an absolute path, or a URI that Arrow reads.
        config: training configuration, a file of training/configs without its suffix.
        workers: Ray Train workers: a number, or MIN:MAX for as many as there is room for.
        on_warning: what a gate's warning does before training: it is logged (`continue`), or waits for a person
            (`approve`).
        hour: UTC hour at which the DAG's schedule builds the day that ended at midnight; without it there is no
            schedule.
        wait_hours: so long after that hour a scheduled run waits for the day's raw files; the next day's run is due
            after 24.
    """

    raw: Folder | None = None
    config: str = Setting(default="default", pattern="^[a-z0-9_]+$", max_length=60)
    workers: Workers = 2
    on_warning: Literal["continue", "approve"] = "continue"
    hour: int | None = Setting(default=None, ge=0, le=23)
    wait_hours: int = Setting(default=6, ge=0, le=23)


def _days_or_never(given: Any) -> int | None:
    if given == "never":
        return None
    if type(given) is int and SHORTEST_RETENTION_DAYS <= given <= 36_525:
        return given
    raise ValueError(
        f"a whole number of days from {SHORTEST_RETENTION_DAYS} to 36525 is wanted, or never; a run may take so long"
    )


# None: never.
RemovedAfterDays = Annotated[int | None, pydantic.PlainValidator(_days_or_never)]


class Retention(_Model):
    """After how many days what is no longer current is removed, or `never`; see `evaluation.prune`.

    Attributes:
        superseded_days: files that were published before; the days count from the last publication of their partition.
        history_days: manifests that were published before, the same way.
        staging_days: what attempts have staged and not published, from its last change.
        data_docs_days: pages of Great Expectations.
        runs_days: folders of runs: checkpoints, packages, scores.
        reports_days: reports of partitions.
    """

    superseded_days: RemovedAfterDays = 30
    history_days: RemovedAfterDays = None
    staging_days: RemovedAfterDays = 14
    data_docs_days: RemovedAfterDays = 60
    runs_days: RemovedAfterDays = 30
    reports_days: RemovedAfterDays = 365


class Archive(_Model):
    """One published file: where it is, how large, its checksum, and which of its members are raw files."""

    url: str = Setting(pattern="^https?://")
    bytes: int | None = Setting(default=None, ge=1)
    md5: str | None = Setting(default=None, pattern="^[0-9a-f]{32}$")
    members: tuple[str, ...] = ("*",)


class Download(_Model):
    """Where the makers publish the data set, under which licence."""

    licence: Name
    page: Name
    archives: tuple[Archive, ...] = ()


class DatasetDefinition(_Model):
    """One data set.

    Attributes:
        name: its name in the warehouse, in MLflow, in the attempt and in the DAG; the file is `<name>.yaml`.
        title: what people read.
        simulated: the rows come from the simulator; shown wherever the name is.
        first_day, last_day: UTC days of the data; the DAG builds no others.
        items, users: files of static fields.
        run: what a run of its DAG takes where nothing else is said.
        retention: when what is no longer current is removed.
        quality: bounds and expectations of its own (`etl.datasets.quality_rules`).
    """

    name: str = Setting(pattern="^[a-z][a-z0-9_]{0,39}$")
    title: Name
    simulated: bool = False
    first_day: Day
    last_day: Day | None = None
    download: Download | None = None
    logs: Logs
    events: Events
    items: tuple[ItemFile, ...] = ()
    users: tuple[FeatureFile, ...] = ()
    history: History = History()
    targets: Targets
    window: WindowDefaults = WindowDefaults()
    run: RunDefaults = RunDefaults()
    retention: Retention = Retention()
    quality: Quality = Quality()

    @pydantic.model_validator(mode="after")
    def _time_and_words(self) -> DatasetDefinition:
        columns, time = self.logs.columns, self.events.time
        native = [name for name in time.columns if name in columns and columns[name].type == "timestamp"]
        if time.unit is None and time.format is None and not native:
            raise ValueError(
                "events.time: give either unit (seconds, milliseconds, microseconds, nanoseconds) or format (for"
                " example %Y-%m-%d %H:%M:%S); only a column of type timestamp needs neither"
            )
        if native and (time.unit is not None or time.format is not None):
            raise ValueError(
                f"events.time: {native[0]!r} is of type timestamp, which says its unit itself: leave out unit and"
                " format"
            )
        for where, column, values in [
            *((f"logs.columns.{name}.one_of", name, column.one_of or ()) for name, column in columns.items()),
            *(
                (f"events.signals.{name}.equals", c.column, c.equals if isinstance(c.equals, tuple) else (c.equals,))
                for name, c in self.events.signals.items()
            ),
        ]:
            if (
                column in columns
                and columns[column].type == "text"
                and (words := [value for value in values if value in self.logs.missing and value != ""])
            ):
                raise ValueError(
                    f"{where}: {words[0]!r} is among logs.missing, so it is no value: give logs.missing without it,"
                    " such as ['']"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> DatasetDefinition:
        if problems := inconsistencies(self):
            raise ValueError("; ".join(problems))
        if self.quality.conditions or self.quality.expectations:
            from etl.datasets.own_checks import check_columns  # loads what reads tables, which a DAG file seldom needs

            check_columns(self)
        return self

    def outside(self, dt: str, today: str) -> str | None:
        """Return why a UTC day (YYYY-MM-DD) is none of the data set's; None where it is one."""
        first, last = self.first_day.isoformat(), self.last_day.isoformat() if self.last_day else today
        if first <= dt <= last:
            return None
        return f"is outside the data set {self.name}: {first} .. {self.last_day or 'today'}"

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
        raise StageError(
            f"unknown data set {name_or_path!r}",
            f"use one of: {', '.join(built_in_names())}, or give the path of a definition (name.yaml)",
        )
    return _load(BUILT_IN / f"{name_or_path}.yaml")


def _is_path(name_or_path: str) -> bool:
    return "/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))


def _load(path: Path) -> DatasetDefinition:
    raw = _merged(path)
    try:
        definition = DatasetDefinition.model_validate(raw)
    except pydantic.ValidationError as error:
        # A list whose values are wrong is not called empty as well.
        details = [d for d in error.errors() if d["type"] != "too_short" or not d["input"]]
        problems = "; ".join(_problem(detail) for detail in details)
        raise StageError(
            f"the data set definition {path} is wrong: {problems}",
            "correct these fields; docs/datasets.md explains each",
        ) from None
    if definition.name != path.stem:
        raise StageError(
            f"the data set definition {path} has the name {definition.name!r}",
            f"rename the file to {definition.name}.yaml, or set name: {path.stem}",
        )
    return definition


def _merged(path: Path) -> dict[str, Any]:
    """Return the file's content, on top of the definition that it `extends` (mappings are merged, all else is
    replaced).
    """
    raw = read_yaml(path)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if base not in built_in_names() or base == path.stem:
        raise StageError(
            f"the data set definition {path} extends {base!r}, which does not exist",
            f"use one of: {', '.join(n for n in built_in_names() if n != path.stem)}",
        )
    return _overlay(_merged(BUILT_IN / f"{base}.yaml"), raw)


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        merged[name] = (
            _overlay(below[name], value) if isinstance(value, dict) and isinstance(below.get(name), dict) else value
        )
    return merged


def _problem(detail: Any) -> str:
    # An unknown field is named with the one that it stands in.
    where = ".".join(
        str(part)
        for part in (detail["loc"][:-1] if detail["type"] == "unknown_field" else detail["loc"])
        if not str(part).endswith("]")
    )
    message = (
        " ".join(detail["msg"].split())
        .removeprefix("Value error, ")
        .replace("a valid tuple", "a list, such as [a, b]")
        .replace("a valid array", "a list, such as [a, b]")
    )
    given = detail.get("input")
    if "valid string" in message and isinstance(given, int | float | None):
        message += "; write it in quotes"
    if "valid boolean" in message:
        message += ": true or false"
    shown = (
        " (given: null)"
        if given is None
        else (
            f" (given: {given!r})"
            if isinstance(given, str | int | float) and detail["type"] not in ("unknown_field", "not_shown")
            else ""
        )
    )
    return (f"{where}: " if where else "") + message + shown


def _zone(name: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"zone {name!r} is not known; give for example UTC or Asia/Shanghai") from None

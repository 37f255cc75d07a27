"""The numbers that gates compare with: the bounds of the records, and what it takes to judge at all.

Absolute bounds hold from the first day on. Relative ones compare with trailing days and are not judged before there are
enough of them. Real exposure logs vary from day to day: KuaiRand-27K's rows by a quarter around their median
(weekends, a holiday), its click rate by 6 %; a band that those touch would teach people to ignore it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from etl.metrics import registry
from etl.metrics.record import Bound

Value = int | float | tuple[float, float]


@dataclass(frozen=True)
class RawSettings:
    """What it takes to judge the raw files of one day.

    Attributes:
        sample_bytes: read at the head, the middle and the tail of a file.
        max_refused_share: of all lines of a file or a day: beyond it the events job stops (its --max-bad-share).
        min_sampled_lines: fewer are not judged by their shares.
    """

    sample_bytes: int = 256 << 10
    max_refused_share: float = 0.01
    min_sampled_lines: int = 50


@dataclass(frozen=True)
class DriftSettings:
    """What it takes to compare a day with the days before it.

    Attributes:
        trailing_days: days before the partition that are looked at.
        min_trailing_days: with fewer known days nothing is compared.
        min_rows: smaller days are neither compared nor compared with: chance alone moves their shares.
        memory_days: trailing days whose users and items count as known.
        min_hour_rows: an hour is missing (critical) or thin (warning) only where so many rows were due; 100 rows are
            some 25 pages, which chance does not lose.
        min_hour_ratio: a thin hour has less than this of what was due.
        min_shift_gain: correlation that a turned profile must gain before the day counts as shifted in time.
        min_positives: a label rate is compared where the trailing median makes so many positives.
        min_signal_rows: a signal that was due so often and never set has vanished.
        min_steady_days, max_steady_ratio: rows are compared with the smallest and the largest trailing day where so
            many trailing days lie within this ratio of each other.
    """

    trailing_days: int = 7
    min_trailing_days: int = 3
    min_rows: int = 2_000
    memory_days: int = 3
    min_hour_rows: int = 100
    min_hour_ratio: float = 0.2
    min_shift_gain: float = 0.5
    min_positives: int = 200
    min_signal_rows: int = 50
    min_steady_days: int = 5
    max_steady_ratio: float = 2.0


@dataclass(frozen=True)
class EventSettings:
    """What it takes to judge one day of `events`.

    Attributes:
        min_judged_rows, min_judged_users: a day with fewer is too small to be judged by its shares, and so is a day
            after days that have a median of fewer rows by what is missing from it. One user's whim is no fault of the
            logs.
        min_hour_rows: an hour with fewer rows is not considered the worst.
        min_users_for_bots: among fewer users an ordinary one may have a large share.
        min_hour_neighbour_rows: an hour without events between two hours with so many rows each is odd; the form of a
            missing hour for days without trailing ones.
    """

    min_judged_rows: int = 200
    min_judged_users: int = 10
    min_hour_rows: int = 30
    min_users_for_bots: int = 50
    min_hour_neighbour_rows: int = 100


@dataclass(frozen=True)
class SequenceSettings:
    """What it takes to judge one partition of `sequences`.

    Attributes:
        min_judged_targets: fewer evaluation targets are not judged by the share of empty histories.
    """

    min_judged_targets: int = 100


@dataclass(frozen=True)
class TrainingInputSettings:
    """What it takes to compare the training days with the evaluation day.

    Attributes:
        min_judged_targets: fewer targets on a side are not compared.
    """

    min_judged_targets: int = 1_000


@dataclass(frozen=True)
class ModelOutputSettings:
    """What it takes to judge the scores of a model.

    Attributes:
        min_judged_targets: fewer are not judged by their shares.
    """

    min_judged_targets: int = 200


@dataclass(frozen=True)
class Thresholds:
    """What holds for one data set.

    Attributes:
        bounds: key of a record's bound -> value.
    """

    raw: RawSettings = field(default_factory=RawSettings)
    drift: DriftSettings = field(default_factory=DriftSettings)
    events: EventSettings = field(default_factory=EventSettings)
    sequences: SequenceSettings = field(default_factory=SequenceSettings)
    training_input: TrainingInputSettings = field(default_factory=TrainingInputSettings)
    model_output: ModelOutputSettings = field(default_factory=ModelOutputSettings)
    bounds: Mapping[str, Value] = field(
        default_factory=lambda: {key: bound.default for key, bound in registry.bounds().items()}
    )

    def number(self, bound: float | Bound | None, side: int) -> float | None:
        """Return what a limit compares with.

        Args:
            side: 0 for the lowest value, 1 for the highest: which one of a pair.
        """
        value = self.bounds[bound.key] if isinstance(bound, Bound) else bound
        return value[side] if isinstance(value, tuple) else value

    def known(self) -> dict[str, Value]:
        """Return every name that a definition's `quality.bounds` may set, with the value here."""
        found: dict[str, Value] = dict(self.bounds)
        for section in SECTIONS:
            found |= {f"{section}.{name}": value for name, value in dataclasses.asdict(getattr(self, section)).items()}
        return found

    def with_value(self, key: str, value: Value) -> Thresholds:
        """Return these with another value of a known name."""
        if key in self.bounds:
            return dataclasses.replace(self, bounds={**self.bounds, key: value})
        section, _, name = key.partition(".")
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **{name: value})})


SECTIONS = tuple(part.name for part in dataclasses.fields(Thresholds) if part.name != "bounds")

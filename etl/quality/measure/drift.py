"""How far a day is from the days before it: pure functions of statistics, metric -> value.

A metric that cannot be judged is not a number: too few rows, or too few trailing days. That is how first days pass. The
field's measures: population stability index (PSI: below 0.1 stable, above 0.25 another population) and Kullback-Leibler
divergence (KL, in nats).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from etl.metrics.record import NAN
from etl.metrics.thresholds import DriftSettings

SHARE_FLOOR = 1e-4  # a category that one side lacks: it would otherwise be infinitely far
HOURS = tuple(f"hour_share_{hour:02d}" for hour in range(24))

Metrics = Mapping[str, float]


def psi(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the population stability index of two share vectors of one length."""
    e, f = (_floored(shares) for shares in (expected, found))
    return float(((f - e) * np.log(f / e)).sum())


def kl(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the divergence of what was found from what was expected, in nats."""
    e, f = (_floored(shares) for shares in (expected, found))
    return float((f * np.log(f / e)).sum())


def shifted_hours(expected: np.ndarray, found: np.ndarray, min_gain: float) -> int:
    """Return by how many hours (-11 .. 12) a day's profile is the expected one turned round; 0 when that explains
    little.

    Args:
        min_gain: how much better the turned profile must correlate than the unturned one.
    """
    if expected.std() == 0 or found.std() == 0:
        return 0
    correlation = [float(np.corrcoef(np.roll(expected, lag), found)[0, 1]) for lag in range(24)]
    best = int(np.argmax(correlation))
    if correlation[best] - correlation[0] < min_gain:
        return 0
    return best if best <= 12 else best - 24


def median_of(trailing: Sequence[Metrics], metric: str, limits: DriftSettings) -> float:
    """Return the median of a metric over the days that know it; nan when they are too few."""
    values = [value for day in trailing if not np.isnan(value := day.get(metric, NAN))]
    return float(np.median(values)) if len(values) >= limits.min_trailing_days else NAN


def mean_shares(trailing: Sequence[Metrics], metrics: Sequence[str]) -> np.ndarray | None:
    """Return the mean share vector of the days that know it, None when none does; a share that a day lacks is 0."""
    known = [
        [day.get(metric, 0.0) for metric in metrics]
        for day in trailing
        if any(day.get(metric, 0.0) > 0 for metric in metrics)
    ]
    return np.nan_to_num(np.array(known)).mean(axis=0) if known else None


@dataclass(frozen=True)
class Vocabulary:
    """How the values of fields differ from those of trailing days.

    Attributes:
        new_share: the largest share, over the fields, of values that no trailing day showed.
        new: what these are.
        psi: the largest population stability index of a field.
        differing: which field that is.
    """

    new_share: float = NAN
    new: str = ""
    psi: float = NAN
    differing: str = ""


def vocabulary_drift(today: Metrics, trailing: Sequence[Metrics], fields: Sequence[str]) -> Vocabulary:
    """Compare the values of fields with those of trailing days.

    Args:
        fields: names whose shares are statistics named `<field>_share_<value>`.
    """
    new_share, worst_psi, said, differing = 0.0, 0.0, "", ""
    for name_of_field in fields:
        prefix = f"{name_of_field}_share_"
        mine = {name: share for name, share in today.items() if name.startswith(prefix)}
        names = sorted({*mine, *(name for day in trailing for name in day if name.startswith(prefix))})
        expected = mean_shares(trailing, names)
        if not mine or expected is None:
            continue
        new = {
            name.removeprefix(prefix): mine[name]
            for name, share in zip(names, expected, strict=True)
            if share == 0 and name in mine
        }
        if sum(new.values()) > new_share:
            new_share = sum(new.values())
            values = ", ".join(f"{value} ({share:.2%})" for value, share in sorted(new.items())[:5])
            said = f"{name_of_field} has the new value(s) {values}"
        found = psi(expected, np.array([mine.get(name, 0.0) for name in names]))
        if found > worst_psi:
            worst_psi, differing = found, f"it is {name_of_field} whose values differ most"
    return Vocabulary(new_share, said, worst_psi, differing)


@dataclass(frozen=True)
class Compared:
    """A row of metrics and those of the days before it.

    Attributes:
        today: the row.
        before: statistics of the trailing days, oldest first.
        settings: what it takes to compare.
        judged: the row is large enough to be compared.
    """

    today: Metrics
    before: Sequence[Metrics]
    settings: DriftSettings
    judged: bool = True

    def median(self, metric: str) -> float:
        """Return the median of the days before, not a number where too few of them know it."""
        return median_of(self.before, metric, self.settings)

    def ratio(self, metric: str) -> float:
        """Return today's value over the median."""
        usual = self.median(metric)
        return float(self.today[metric]) / usual if self.judged and usual > 0 else NAN

    def rise(self, metric: str) -> float:
        """Return how far today's value is above the median."""
        return float(self.today[metric]) - self.median(metric) if self.judged else NAN

    def drop(self, metric: str) -> float:
        """Return how far today's value is below the median."""
        return self.median(metric) - float(self.today[metric]) if self.judged else NAN


@dataclass(frozen=True)
class ItemsCompared(Compared):
    """A partition's items and those of the partitions before it.

    Attributes:
        like: compared with those of them that have as many days of events: a catalogue grows while a feed begins.
        vocabulary: how the values of the item fields differ.
    """

    like: Compared | None = None
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    new_category_share = property(lambda self: self.vocabulary.new_share)
    new_categories = property(lambda self: self.vocabulary.new)
    field_psi = property(lambda self: self.vocabulary.psi)
    differing_field = property(lambda self: self.vocabulary.differing)


@dataclass(frozen=True)
class EventsCompared(Compared):
    """A day of events and the days before it; what cannot be judged is not a number.

    Attributes:
        signals: signals of the data set.
        fields: names whose values are statistics named `<field>_share_<value>`.
    """

    signals: Sequence[str] = ()
    fields: Sequence[str] = ()

    @staticmethod
    def of(
        today: Metrics,
        trailing: Sequence[Metrics],
        signals: Sequence[str],
        fields: Sequence[str],
        settings: DriftSettings,
    ) -> EventsCompared:
        """Return a day and those of the trailing days, oldest first, that are large enough to compare with."""
        before = [day for day in trailing if day.get("rows", 0) >= settings.min_rows]
        judged = today["rows"] >= settings.min_rows and len(before) >= settings.min_trailing_days
        return EventsCompared(today, before, settings, judged, signals, fields)

    @property
    def rows_to_extremes(self) -> float:
        """Rows over the smallest trailing day (below 1) or the largest (above 1); nan where days differ much anyway."""
        rows, sizes = self.today["rows"], [day["rows"] for day in self.before]
        few = len(sizes) < max(self.settings.min_steady_days, self.settings.min_trailing_days)
        if not rows or few or max(sizes) > self.settings.max_steady_ratio * min(sizes):
            return NAN
        return float(min(rows / min(sizes), 1.0) if rows < min(sizes) else max(rows / max(sizes), 1.0))

    # ---- hours

    @cached_property
    def hours(self) -> np.ndarray:
        return np.array([self.today[name] for name in HOURS])

    @cached_property
    def usual_hours(self) -> np.ndarray | None:
        return mean_shares(self.before, HOURS) if self.judged else None

    @property
    def compares_hours(self) -> bool:
        return self.usual_hours is not None

    @cached_property
    def missing_hours(self) -> list[int]:
        return self._hours_where(self.hours == 0)

    @cached_property
    def thin_hours(self) -> list[int]:
        assert self.usual_hours is not None
        return self._hours_where((self.hours > 0) & (self.hours < self.settings.min_hour_ratio * self.usual_hours))

    def _hours_where(self, few: np.ndarray) -> list[int]:
        assert self.usual_hours is not None
        return np.flatnonzero(few & (self.usual_hours * self.today["rows"] >= self.settings.min_hour_rows)).tolist()

    @staticmethod
    def said(hours: Sequence[int]) -> str:
        return ", ".join(f"{hour:02d}" for hour in hours)

    @property
    def hour_psi(self) -> float:
        return NAN if self.usual_hours is None else psi(self.usual_hours, self.hours)

    @property
    def hour_shift(self) -> float:
        if self.usual_hours is None:
            return NAN
        return shifted_hours(self.usual_hours, self.hours, self.settings.min_shift_gain)

    # ---- the label

    @property
    def label_rate(self) -> float:
        return self.today["label_rate"]

    @cached_property
    def usual_label_rate(self) -> float:
        return self.median("label_rate")

    @property
    def compares_label(self) -> bool:
        usual = self.usual_label_rate
        return self.judged and usual > 0 and self.today["rows"] * usual >= self.settings.min_positives

    @property
    def label_kl(self) -> float:
        return kl(*(np.array([rate, 1 - rate]) for rate in (self.usual_label_rate, self.label_rate)))

    # ---- the signals

    @cached_property
    def action_rates(self) -> np.ndarray:
        return np.array([self.today[f"action_rate_{signal}"] for signal in self.signals])

    @cached_property
    def usual_action_rates(self) -> np.ndarray:
        return np.array([self.median(f"action_rate_{signal}") for signal in self.signals])

    @property
    def compares_signals(self) -> bool:
        return self.judged and not np.isnan(self.usual_action_rates).any()

    @property
    def vanished_signals(self) -> list[str]:
        due = self.usual_action_rates * self.today["rows"] >= self.settings.min_signal_rows
        return [self.signals[place] for place in np.flatnonzero(due & (self.action_rates == 0)).tolist()]

    @property
    def action_mix_psi(self) -> float:
        return psi(_mix(self.usual_action_rates), _mix(self.action_rates))

    # ---- fields

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return vocabulary_drift(self.today, self.before, self.fields) if self.judged else Vocabulary()

    new_category_share = property(lambda self: self.vocabulary.new_share)
    new_categories = property(lambda self: self.vocabulary.new)
    field_psi = property(lambda self: self.vocabulary.psi)
    differing_field = property(lambda self: self.vocabulary.differing)


def _mix(rates: np.ndarray) -> np.ndarray:
    """Return the shares of the signals among all that were set."""
    return rates / rates.sum() if rates.sum() > 0 else np.full(len(rates), 1 / max(1, len(rates)))


def _floored(shares: np.ndarray) -> np.ndarray:
    floored = np.maximum(np.asarray(shares, dtype=np.float64), SHARE_FLOOR)
    return floored / floored.sum()

"""How far a day is from the days before it: pure functions of kept statistics, metric -> value.

A metric that cannot be judged is not a number: too few rows, or too few trailing days. That is how first days pass. The
field's measures: population stability index (PSI: below 0.1 stable, above 0.25 another population) and Kullback-Leibler
divergence (KL, in nats).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from etl.datasets.thresholds import DriftThresholds, EventThresholds

NAN = float("nan")
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
    """Return by how many hours (-11 .. 12) a day's profile is the expected one turned round; 0 when that explains little.

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


def median_of(trailing: Sequence[Metrics], metric: str, limits: DriftThresholds) -> float:
    """Return the median of a metric over the days that know it; nan when they are too few."""
    values = [value for day in trailing if not np.isnan(value := day.get(metric, NAN))]
    return float(np.median(values)) if len(values) >= limits.min_trailing_days else NAN


def mean_shares(trailing: Sequence[Metrics], metrics: Sequence[str]) -> np.ndarray | None:
    """Return the mean share vector of the days that know it, None when none does; a share that a day lacks is 0."""
    known = [[day.get(metric, 0.0) for metric in metrics] for day in trailing if any(day.get(metric, 0.0) > 0 for metric in metrics)]
    return np.nan_to_num(np.array(known)).mean(axis=0) if known else None


def vocabulary_drift(today: Metrics, trailing: Sequence[Metrics], fields: Sequence[str]) -> tuple[float, float, dict[str, str]]:
    """Return the largest share of values that no trailing day showed, the largest PSI, and which field and value they are of.

    Args:
        fields: names whose shares are kept as `<field>_share_<value>`.
    """
    new_share, worst_psi, details = 0.0, 0.0, {}
    for field in fields:
        prefix = f"{field}_share_"
        mine = {name: share for name, share in today.items() if name.startswith(prefix)}
        names = sorted({*mine, *(name for day in trailing for name in day if name.startswith(prefix))})
        expected = mean_shares(trailing, names)
        if not mine or expected is None:
            continue
        new = {name.removeprefix(prefix): mine[name] for name, share in zip(names, expected, strict=True) if share == 0 and name in mine}
        if sum(new.values()) > new_share:
            new_share = sum(new.values())
            details["new_category_share"] = f"{field} has the new value(s) {', '.join(f'{value} ({share:.2%})' for value, share in sorted(new.items())[:5])}"
        found = psi(expected, np.array([mine.get(name, 0.0) for name in names]))
        if found > worst_psi:
            worst_psi = found
            details["field_psi"] = f"it is {field} whose values differ most"
    return new_share, worst_psi, details


def event_drift(
    today: Metrics, trailing: Sequence[Metrics], signals: Sequence[str], fields: Sequence[str], limits: EventThresholds, drift: DriftThresholds
) -> tuple[dict[str, float], dict[str, str]]:
    """Compare a day of events with the days before it.

    Args:
        today, trailing: kept statistics, the trailing ones oldest first.
        signals: signals of the data set.
        fields: names whose values are kept as shares.

    Returns:
        the metrics that the suite judges, and what more to say about those that fail.
    """
    before = [day for day in trailing if day.get("rows", 0) >= drift.min_rows]
    rows = today["rows"]
    names = ("hour_psi", "hour_shift", "missing_hour_count", "thin_hour_count", "label_rate_to_trailing", "label_kl", "action_mix_psi",
             "vanished_signal_count", "new_category_share", "field_psi", "known_user_share_drop", "known_item_share_drop",
             "item_popularity_drop", "duration_mismatch_rise", "largest_user_share_rise", "watch_p50_to_trailing", "rows_to_trailing_extremes")  # fmt: skip
    found = dict.fromkeys(names, NAN)
    details: dict[str, str] = {}
    if rows < drift.min_rows or len(before) < drift.min_trailing_days:
        if rows > 0 and len(before) >= drift.min_trailing_days:
            found["rows_to_trailing_extremes"] = _to_extremes(rows, before, drift)
        return found, details

    hours, usual = np.array([today[name] for name in HOURS]), mean_shares(before, HOURS)
    if usual is not None:
        due = usual * rows
        missing, thin = (hours == 0) & (due >= drift.min_hour_rows), (hours > 0) & (hours < drift.min_hour_ratio * usual) & (due >= drift.min_hour_rows)
        found |= {"hour_psi": psi(usual, hours), "hour_shift": shifted_hours(usual, hours, drift.min_shift_gain),
                  "missing_hour_count": int(missing.sum()), "thin_hour_count": int(thin.sum())}  # fmt: skip
        for name, mask, what in (("missing_hour_count", missing, "no event in the UTC hour(s)"), ("thin_hour_count", thin, "few events in the UTC hour(s)")):
            if mask.any():
                details[name] = f"{what} {', '.join(f'{h:02d}' for h in np.flatnonzero(mask))}"
        if found["hour_shift"]:
            details["hour_shift"] = f"the day looks moved by about {found['hour_shift']:+.0f} h: check the time zone of the raw times"

    label = median_of(before, "label_rate", drift)
    if label > 0 and rows * label >= drift.min_positives:
        rate = today["label_rate"]
        found["label_rate_to_trailing"] = rate / label
        found["label_kl"] = kl(np.array([label, 1 - label]), np.array([rate, 1 - rate]))
        details["label_rate_to_trailing"] = f"the rate is {rate:.4f}, the median of the days before {label:.4f}"
    rates = [f"action_rate_{signal}" for signal in signals]
    usual_rates = np.array([median_of(before, name, drift) for name in rates])
    if not np.isnan(usual_rates).any():
        mine = np.array([today[name] for name in rates])
        found["action_mix_psi"] = psi(_mix(usual_rates), _mix(mine))
        gone = [signal for signal, usual_rate, rate in zip(signals, usual_rates, mine, strict=True) if rate == 0 and usual_rate * rows >= drift.min_signal_rows]
        found["vanished_signal_count"] = len(gone)
        if gone:
            details["vanished_signal_count"] = f"never set: {', '.join(gone)}"

    found["new_category_share"], found["field_psi"], told = vocabulary_drift(today, before, fields)
    details |= told
    for name, metric in (("known_user_share_drop", "known_user_share"), ("known_item_share_drop", "known_item_share"), ("item_popularity_drop", "item_popularity_correlation")):
        found[name] = median_of(before, metric, drift) - today[metric]
    for name, metric in (("duration_mismatch_rise", "duration_mismatch_share"), ("largest_user_share_rise", "largest_user_share")):
        found[name] = today[metric] - median_of(before, metric, drift)
    if (watch := median_of(before, "watch_time_ms_p50", drift)) > 0:
        found["watch_p50_to_trailing"] = today["watch_time_ms_p50"] / watch
    found["rows_to_trailing_extremes"] = _to_extremes(rows, before, drift)
    return found, details


def _to_extremes(rows: float, before: Sequence[Metrics], drift: DriftThresholds) -> float:
    """Return rows over the smallest trailing day (below 1) or the largest (above 1); nan where days differ much anyway."""
    sizes = [day["rows"] for day in before]
    if len(sizes) < drift.min_steady_days or max(sizes) > drift.max_steady_ratio * min(sizes):
        return NAN
    return float(min(rows / min(sizes), 1.0) if rows < min(sizes) else max(rows / max(sizes), 1.0))


def _mix(rates: np.ndarray) -> np.ndarray:
    """Return the shares of the signals among all that were set."""
    return rates / rates.sum() if rates.sum() > 0 else np.full(len(rates), 1 / max(1, len(rates)))


def _floored(shares: np.ndarray) -> np.ndarray:
    floored = np.maximum(np.asarray(shares, dtype=np.float64), SHARE_FLOOR)
    return floored / floored.sum()

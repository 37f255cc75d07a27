"""Plots of statistics over days as inline SVG that takes the colours of its page, light or dark.

Pure functions; matplotlib is imported when something is drawn, never with this module.
"""

from __future__ import annotations

import functools
import io
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etl.metrics.panels import PANELS
from etl.metrics.record import Metric, Panel
from etl.metrics.registry import SUITES
from etl.metrics.thresholds import Thresholds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# stage -> metric -> day -> value; None is not measurable.
Series = Mapping[str, Mapping[str, Mapping[str, float | None]]]
_Lines = tuple[tuple[str, tuple[tuple[str, float], ...]], ...]

BAND_DAYS = Thresholds().drift.trailing_days  # days before the partition whose lowest and highest value make the band
MOST_LINES = 8
LOGARITHMIC_FROM = 20  # times the smallest value

# What is drawn in these colours is given the page's: a drawing knows nothing of light and dark.
_INK, _BAND, _DAY = "#010101", "#020202", "#030303"
_LINES = tuple(f"#04040{number}" for number in range(1, MOST_LINES + 1))
_PAGE_COLOURS = {
    _INK: "currentColor",
    _BAND: "var(--band)",
    _DAY: "var(--day)",
    **{line: f"var(--line-{number})" for number, line in enumerate(_LINES, start=1)},
}


@dataclass(frozen=True)
class Plot:
    """One drawing.

    Attributes:
        title: what it shows.
        svg: an <svg> element.
        lines: names of its lines, the i-th in the page's colour --line-<i + 1>; () when the title says it.
    """

    title: str
    svg: str
    lines: tuple[str, ...] = ()


def draw(series: Series, dt: str) -> list[Plot]:
    """Return the plots of the statistics, the partition's day marked and the band of the days before it behind.

    Args:
        series: the statistics; days after `dt` are not drawn.
        dt: the partition's day.
    """
    import matplotlib

    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "longview",
            "text.parse_math": False,
            "font.size": 8,
            "axes.unicode_minus": False,
        }
    ):
        # A window may reach back to days before the data begin: their statistics are of no rows.
        begin = min((day for day, rows in series.get("events", {}).get("rows", {}).items() if rows), default="")
        plots = [_over_days(panel, lines, dt) for panel in PANELS if (lines := _lines(series, panel, begin, dt))]
        if (profile := _hour_profile(series, dt)) is not None:
            plots.insert(2, profile)  # after the volumes
        return plots


def _lines(series: Series, panel: Panel, begin: str, dt: str) -> _Lines:
    """Return (name, (day, value) ...) of a panel's metrics; the largest when there are more than a drawing holds."""
    found: dict[str, dict[str, float]] = {}
    for stage, metrics in series.items():
        for metric, values in sorted(metrics.items()):
            name = _line_name(stage, metric, panel)
            known = {day: value for day, value in sorted(values.items()) if value is not None and begin <= day <= dt}
            if known and name:
                found[name] = known
    shown = sorted(found, key=lambda name: -max(found[name].values()))[:MOST_LINES]
    return tuple((name, tuple(found[name].items())) for name in found if name in shown)


def _line_name(stage: str, metric: str, panel: Panel) -> str | None:
    """Return what a metric's line is called in a drawing, None where it has none."""
    if (record := _drawn(stage).get(metric)) is not None:
        return (record.line or metric) if record.panel is panel else None
    for stem, record in _drawn(stage).items():
        if record.name.endswith("*") and record.panel is panel and metric.startswith(stem):
            return metric.removeprefix(stem).removeprefix("is_")
    return None


@functools.cache
def _drawn(stage: str) -> dict[str, Metric]:
    """Return name, of a family its stem -> record of the metrics of a stage's statistics that are drawn."""
    suite = SUITES[{"raw": "raw_day", "events": "events_days"}.get(stage, stage)]
    return {metric.name.removesuffix("*"): metric for metric in suite.records if metric.panel is not None}


@functools.lru_cache(maxsize=len(PANELS))  # what a gate does not change is drawn while it is at work
def _over_days(panel: Panel, values_of_lines: _Lines, dt: str) -> Plot:
    lines = {name: dict(values) for name, values in values_of_lines}
    days = sorted({day for values in lines.values() for day in values} | {dt})
    at = {day: index for index, day in enumerate(days)}
    figure, axes = _figure()
    for values, colour in zip(lines.values(), _LINES, strict=False):
        axes.plot(
            [at[day] for day in values], list(values.values()), color=colour, linewidth=1.2, marker=".", markersize=3
        )
        if dt in values:
            axes.plot([at[dt]], [values[dt]], color=colour, marker="o", markersize=5, linestyle="none", clip_on=False)
    before = values_before(next(iter(lines.values())), dt)
    if len(lines) == 1 and len(before) > 1:
        axes.axhspan(min(before), max(before), color=_BAND, linewidth=0)
        axes.axhline(statistics.median(before), color=_INK, linewidth=0.5, linestyle="--", alpha=0.5)
    axes.axvline(at[dt], color=_DAY, linewidth=1)
    shown = [value for values in lines.values() for value in values.values()]
    if panel.logarithmic and 0 < LOGARITHMIC_FROM * min(shown) < max(shown):
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.yaxis.set_major_formatter(_tick)
    axes.set_xlim(-0.5, len(days) - 0.5)
    step = -(-len(days) // 5)
    ticks = sorted(range(len(days) - 1, -1, -step))
    axes.set_xticks(ticks, [days[tick][5:] for tick in ticks])
    return Plot(panel.title, _svg(figure, panel.title), tuple(lines) if len(lines) > 1 else ())


def _tick(value: float, _position: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * unit or (abs(value) >= unit > 1e3):
            return f"{value / unit:g}{letter}"
    return f"{value:.4g}"


def values_before(values: Mapping[str, float | None], dt: str) -> list[float]:
    """Return the known values on the BAND_DAYS days before `dt` that have one."""
    return [value for day in sorted(values) if day < dt and (value := values[day]) is not None][-BAND_DAYS:]


def _hour_profile(series: Series, dt: str) -> Plot | None:
    """Return the share of the day's events in each UTC hour over the band of the days before it."""
    metrics = series.get("events", {})
    hours = [metrics.get(f"hour_share_{hour:02d}", {}) for hour in range(24)]
    if all(values.get(dt) is None for values in hours):
        return None
    title = "Events: share of the day by UTC hour"
    figure, axes = _figure()
    before = [values_before(values, dt) for values in hours]
    if all(len(values) > 1 for values in before):
        axes.fill_between(
            range(24), [min(values) for values in before], [max(values) for values in before], color=_BAND, linewidth=0
        )
        axes.plot(
            range(24),
            [statistics.median(values) for values in before],
            color=_INK,
            linewidth=0.5,
            linestyle="--",
            alpha=0.5,
        )
    shares = [float("nan") if (value := values.get(dt)) is None else value for values in hours]
    axes.plot(range(24), shares, color=_DAY, linewidth=1.2, marker=".", markersize=3)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.5, 23.5)
    axes.set_xticks(range(0, 24, 4))
    return Plot(title, _svg(figure, title))


def _figure() -> tuple[Any, Axes]:
    from matplotlib.figure import Figure

    # Room for the labels is fixed: a layout that measures them costs as much as drawing.
    figure = Figure(figsize=(4.2, 1.7))
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.14, top=0.95)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)
        axes.spines[side].set_linewidth(0.5)
    axes.tick_params(colors=_INK, width=0.5, length=2)
    axes.locator_params(axis="y", nbins=4)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    from html import escape

    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names of parts, the same in every drawing of a page
    svg = re.sub(r"\n\s*", "\n", svg)
    for drawn, shown in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, shown)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)

"""The page of an evaluation: one file of HTML that needs nothing beside it, in the style of the pages of partitions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from etl.quality.report.pages import document, table
from evaluation.figures import cell, rows_of
from evaluation.metrics import Bootstrap
from evaluation.release.outcomes import EVALUATION_PAGE
from training.model_runs import MODEL_TAG
from training.tracking import ATTEMPT_TAG, PARTITION_TAG, URL_TAG

PROBE = re.compile(r"probe_(\d+)_to_(\d+)_events/(attention_error|bound|key_error)")
WIDTH, HEIGHT, LEFT, BOTTOM = 480, 260, 150, 30  # of a drawing, in its own units
LINES = 8  # colours of lines that a page has
MOST_DAYS, MOST_RUNS = 30, 300  # that are drawn, and that are asked for
Days = Mapping[str, Mapping[str, tuple[float, float | None, float | None]]]  # model -> day -> AUC, its bounds


def log_report(run_id: str, model_run: str, evaluation: Mapping[str, Any], tags: Mapping[str, str]) -> None:
    """Log the page to the attempt's run.

    Args:
        model_run: of the model that is registered, which has the figures of the training's probe.
        tags: of the run, or of the version once its promotion is decided.
    """
    from mlflow import MlflowClient

    client = MlflowClient()
    run = client.get_run(model_run)
    days = aucs_over_days(client, run.info.experiment_id, evaluation["dt"])
    client.log_text(run_id, report_page(evaluation, run.data.metrics, tags, days), EVALUATION_PAGE)


def aucs_over_days(client: Any, experiment_id: str, dt: str) -> Days:
    """Return the AUC of each model on its days up to `dt`, of the newest attempt of a day that has one."""
    wanted = f"tags.`{MODEL_TAG}` LIKE '%' AND metrics.auc >= 0"
    found = client.search_runs([experiment_id], wanted, order_by=["start_time DESC"], max_results=MOST_RUNS)
    days: dict[str, dict[str, tuple[float, float | None, float | None]]] = {}
    for run in found:
        day, metrics = run.data.tags.get(PARTITION_TAG, ""), run.data.metrics
        if day and day <= dt:
            auc = (metrics["auc"], metrics.get("auc_low"), metrics.get("auc_high"))
            days.setdefault(run.data.tags[MODEL_TAG], {}).setdefault(day, auc)
    return days


def report_page(
    evaluation: Mapping[str, Any], metrics: Mapping[str, float], tags: Mapping[str, str], days: Days | None = None
) -> str:
    """Return the page.

    Args:
        evaluation: `evaluation.json`.
        metrics: of the registered model's training; those of its probe are shown.
        tags: see `log_report`.
        days: what each model had on this day and those before.
    """
    rows = rows_of(evaluation)
    simulated = ' <span class="simulated">SIMULATED data</span>' if evaluation["simulated"] else ""
    title = f"{evaluation['dataset']} {evaluation['dt']}"
    return document(
        f"Evaluation: {title}",
        f"<h1>Evaluation <span>{escape(title)}</span></h1>{simulated}{_decision(tags)}"
        f"<h2>Models</h2>{_models(rows)}"
        f'<div class="plots">{_intervals(rows, evaluation["best_auc"])}{_reliability(rows)}</div>'
        f"<h2>Differences, paired by user</h2>{_differences(evaluation)}"
        f"<h2>By length of the history</h2>{_slices(evaluation)}{_exposures(evaluation)}"
        f"{_groups(evaluation)}"
        f"{_over_days(days or {}, [row['name'] for row in rows])}"
        f"{_probe(metrics)}<h2>Where it came from</h2>{_lineage(tags)}",
    )


def lineage(tags: Mapping[str, str]) -> dict[str, str]:
    """Return what leads from a run or a version back to its data and code, name -> value."""
    changed = " (and changes)" if tags.get("git.dirty") == "true" else ""
    known = {
        "partition": tags.get(PARTITION_TAG),
        "attempt": tags.get(ATTEMPT_TAG),
        "commit": tags["mlflow.source.git.commit"] + changed if "mlflow.source.git.commit" in tags else None,
        "configuration": " ".join(tags[name] for name in ("config", "config_digest") if name in tags),
        "sequences": tags.get("data.snapshot_digest"),
        "items": tags.get("data.items_digest"),
        "Airflow": tags.get(URL_TAG),
        "command": tags.get("pipeline.command"),
    }
    return {name: value for name, value in known.items() if value}


def _decision(tags: Mapping[str, str]) -> str:
    outcome = tags.get("promotion")
    if outcome is None:
        return '<p class="verdict"><b>not decided</b>no promotion has been asked for yet</p>'
    kind = "stopped" if outcome == "refused" else "passed"
    return f'<p class="verdict {kind}"><b>{escape(outcome)}</b>{escape(tags.get("gate_reason", ""))}</p>'


def _models(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = (
        "model",
        "AUC",
        "95 %",
        "GAUC",
        "95 %",
        "log loss",
        "95 %",
        "entropy",
        "ECE",
        "pred/obs",
        "targets",
        "users",
    )
    lines = []
    for number, row in enumerate(rows, 1):
        values = [value for name in Bootstrap.METRICS for value in (cell(row[name]), _range(row, f"{name}_"))]
        calibration = row["calibration"]
        values += [
            cell(row["normalised_entropy"]),
            cell(calibration["ece"]),
            cell(calibration["expected_ratio"], ".3f"),
        ]
        values += [f"{row['targets']:,}", f"{row['users']:,}"]
        name = f'<span style="color: var(--line-{number})">●</span> {escape(row["name"])}'
        lines.append(_row(name, values))
    return table(columns, lines)


def _differences(evaluation: Mapping[str, Any]) -> str:
    lines = [
        _row(
            escape(name.replace("_minus_", " minus ")),
            [f"{cell(of[metric]['value'])} ({_range(of[metric])})" for metric in Bootstrap.METRICS],
        )
        for name, of in evaluation["paired"].items()
    ]
    warnings = "".join(
        f"<p>{alias} version {escape(other['version'])} is not compared: {escape(other['warning'])}</p>"
        for alias in ("champion", "anchor")
        if (other := evaluation[alias]) and other["warning"]
    )
    return table(("models", "AUC", "GAUC", "log loss"), lines) + warnings


def _slices(evaluation: Mapping[str, Any]) -> str:
    lines = [
        _row(
            f"{part['low']:,} to {part['high']:,} events, {part['targets']:,} targets",
            [escape(name), *(cell(of[metric]) for metric in Bootstrap.METRICS)],
        )
        for part in evaluation["slices"]
        for name, of in part["models"].items()
    ]
    return table(("histories", "model", "AUC", "GAUC", "log loss"), lines)


def _exposures(evaluation: Mapping[str, Any]) -> str:
    lines = [
        _row(
            f"{part['exposure']}, {part['targets']:,} targets of {part['users']:,} users",
            [escape(name), *(value for m in Bootstrap.METRICS for value in (cell(of[m]), _range(of, f"{m}_")))],
        )
        for part in evaluation["exposures"]
        for name, of in part["models"].items()
    ]
    if not lines:
        return ""
    columns = ("exposed by", "model", "AUC", "95 %", "GAUC", "95 %", "log loss", "95 %")
    return f"<h2>By what exposed the target</h2>{table(columns, lines)}"


def _groups(evaluation: Mapping[str, Any]) -> str:
    """Return a table for each way to group the targets; an evaluation of before has none."""
    parts = []
    for by, found in itertools.groupby(evaluation.get("groups", ()), lambda part: part["by"]):
        lines = [
            _row(
                f"{part['group']}, {part['targets']:,} targets of {part['users']:,} users",
                [escape(name), *(cell(of[metric]) for metric in Bootstrap.METRICS)],
            )
            for part in found
            for name, of in part["models"].items()
        ]
        parts.append(f"<h2>By {by}</h2>{table(('targets', 'model', 'AUC', 'GAUC', 'log loss'), lines)}")
    return "".join(parts)


def _probe(metrics: Mapping[str, float]) -> str:
    found: dict[tuple[int, int], dict[str, float]] = {}
    for name, value in metrics.items():
        if match := PROBE.fullmatch(name):
            found.setdefault((int(match[1]), int(match[2])), {})[match[3]] = value
    if not found:
        return ""
    lines = [
        _row(f"{low:,} to {high:,}", [cell(of.get(name)) for name in ("attention_error", "bound", "key_error")])
        for (low, high), of in sorted(found.items())
    ]
    said = (
        "<p>How far the model's attention is from that over exact keys, and the bound that its keys' error gives.</p>"
    )
    return f"<h2>Attention error</h2>{said}{table(('events', 'error', 'bound', 'error of keys'), lines)}"


def _over_days(days: Days, first: Sequence[str]) -> str:
    """Return every model over the partitions, as a drawing and a table; nothing where there is one day alone.

    Args:
        first: the order of the other tables, whose colours models have here, too.
    """
    shown = sorted({day for of in days.values() for day in of})[-MOST_DAYS:]
    if len(shown) < 2:
        return ""
    known = [value for of in days.values() for day in shown for value in of.get(day, ()) if value is not None]
    least, span = min(known), (max(known) - min(known)) or 1.0

    def at(day: str, value: float) -> tuple[float, float]:
        right, up = shown.index(day) / (len(shown) - 1), (value - least) / span
        return 50 + (WIDTH - 80) * right, (HEIGHT - BOTTOM) * (1 - up) + 6

    parts: list[str] = []
    legend: list[str] = []
    lines: dict[str, list[str]] = {day: [] for day in reversed(shown)}
    names = [name for name in first if name in days] + sorted(days.keys() - set(first))
    for number, (name, of) in enumerate(((name, days[name]) for name in names), 1):
        colour = f"var(--line-{(number - 1) % LINES + 1})"
        legend.append(f'<span style="color: {colour}">●</span> {escape(name)}')
        there = [day for day in shown if day in of]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(day, of[day][0]) for day in there))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for day in there:
            _, low, high = of[day]
            if low is not None and high is not None:
                (x, y1), (_, y2) = at(day, low), at(day, high)
                parts.append(f'<line x1="{x:.1f}" y1="{y1:.1f}" x2="{x:.1f}" y2="{y2:.1f}" stroke="{colour}"/>')
        for day, line in lines.items():
            auc, low, high = of.get(day, (None, None, None))
            line.append("" if auc is None else f"{cell(auc)} ({cell(low)} to {cell(high)})")
    parts += [_label(at(day, least)[0], HEIGHT - 8, day[5:]) for day in shown[:: -(-len(shown) // 5)]]
    parts += [_label(22, at(shown[0], value)[1] + 4, f"{value:.3f}") for value in (least, least + span)]
    drawing = _figure("AUC of each day's models with 95 % intervals over users", parts)
    rows = [_row(day, values) for day, values in lines.items()]
    head = f'<h2>Over the partitions</h2><p>{" ".join(legend)}</p><div class="plots">{drawing}</div>'
    return head + table(("day", *names), rows)


def _lineage(tags: Mapping[str, str]) -> str:
    def shown(name: str, value: str) -> str:
        link = name == "Airflow" and value.startswith(("http://", "https://"))
        return f'<a href="{escape(value)}">{escape(value)}</a>' if link else f"<code>{escape(value)}</code>"

    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{shown(name, v)}</dd>' for name, v in lineage(tags).items())}</dl>"


def _row(first: str, values: Sequence[str]) -> str:
    cells = "".join(f'<td class="number">{value}</td>' for value in values)
    return f"<tr><td>{first}</td>{cells}</tr>"


def _range(of: Mapping[str, Any], prefix: str = "") -> str:
    return f"{cell(of[f'{prefix}low'])} to {cell(of[f'{prefix}high'])}"


def _intervals(rows: Sequence[Mapping[str, Any]], best: float | None) -> str:
    known = [value for row in rows for name in ("auc", "auc_low", "auc_high") if (value := row[name]) is not None]
    known += [] if best is None else [best]
    if not known:
        return ""
    least, most = min(known), max(known)
    span = (most - least) or 1.0

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * (value - least) / span

    step, parts = (HEIGHT - BOTTOM) / (len(rows) + 1), []
    for number, row in enumerate(rows, 1):
        y, colour = number * step, f"var(--line-{number})"
        parts.append(f'<text x="4" y="{y + 4:.0f}" font-size="12">{escape(row["name"])}</text>')
        if row["auc_low"] is not None and row["auc_high"] is not None:
            ends = f'x1="{x(row["auc_low"]):.1f}" x2="{x(row["auc_high"]):.1f}"'
            parts.append(f'<line {ends} y1="{y:.0f}" y2="{y:.0f}" stroke="{colour}" stroke-width="3"/>')
        if row["auc"] is not None:
            parts.append(f'<circle cx="{x(row["auc"]):.1f}" cy="{y:.0f}" r="5" fill="{colour}"/>')
    if best is not None:
        parts.append(_line(x(best), 8, x(best), HEIGHT - BOTTOM))
    parts += [_label(x(value), HEIGHT - 8, f"{value:.3f}") for value in (least, most)]
    title = "AUC with 95 % intervals over users" + ("" if best is None else "; dashed: best possible")
    return _figure(title, parts)


def _reliability(rows: Sequence[Mapping[str, Any]]) -> str:
    points = [[(one["predicted"], one["observed"]) for one in row["calibration"]["bins"]] for row in rows]
    values = [value for of in points for point in of for value in point]
    if not values:
        return ""
    least, most = min(values), max(values)
    span = (most - least) or 1.0

    def at(point: tuple[float, float]) -> tuple[float, float]:
        right, up = ((value - least) / span for value in point)
        return 50 + (WIDTH - 70) * right, (HEIGHT - BOTTOM) * (1 - up) + 6

    parts = [_line(*at((least, least)), *at((most, most)))]
    for number, of in enumerate(points, 1):
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, of))
        parts.append(f'<polyline points="{places}" fill="none" stroke="var(--line-{number})" stroke-width="2"/>')
    parts += [_label(at((value, least))[0], HEIGHT - 8, f"{value:.3f}") for value in (least, most)]
    return _figure("Observed share of positives (up) by predicted probability; dashed: calibrated", parts)


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" stroke-dasharray="4 4"/>'


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="middle">{text}</text>'


def _figure(title: str, parts: Sequence[str]) -> str:
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{drawing}</figure>"

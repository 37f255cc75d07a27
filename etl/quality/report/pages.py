"""One page of HTML about one attempt at one partition, and the index of such pages; pure functions.

A page is one file that needs nothing beside it: styles and drawings are inside, there is no script. Every value that
comes from data is escaped, and characters that a reader cannot see are written out: rows come from logs that nobody
vouches for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import quote

from etl.quality.judge.outcomes import SEVERITIES, STAGES, Failing, Outcome, StageOutcome
from etl.quality.report.plots import BAND_DAYS, Plot, Series, values_before

STOPPED, LET_THROUGH, WARNED, PASSED, UNKNOWN = "stopped", "let through", "warned", "passed", "not judged"
MOST_CHARACTERS = 300  # of one raw row or observed value; what gates and people say is whole
WHOLE = 100_000
_SAFE = "/="  # in addresses, besides letters and digits

_SAID = {
    STOPPED: "Stopped: a gate refused this attempt; what it refused is neither published nor used.",
    LET_THROUGH: "Let through: a gate would have stopped it, and a person decided otherwise, once.",
    WARNED: "Passed with warnings: odd, and published.",
    PASSED: "Passed: every gate that ran held.",
    UNKNOWN: "No gate has judged this attempt.",
}


@dataclass(frozen=True)
class Quarantine:
    """The refused rows of a partition.

    Attributes:
        rows: how many there are.
        by_reason: code of the reason -> rows.
        sample: some of them: source_file, row_number, reason, raw_text.
        attempt: the other attempt that they are of, '' for this one.
    """

    rows: int
    by_reason: Mapping[str, int]
    sample: Sequence[Mapping[str, Any]]
    attempt: str = ""


@dataclass(frozen=True)
class Partition:
    """What the page of an attempt shows.

    Attributes:
        outcomes: of the gates that ran, in their order.
        stopped_by: why a gate stopped before or apart from its expectations, '' when nothing did.
        stats: what is kept of the day and of the days before it.
        quarantine: None where no table of refused rows is at hand.
        data_docs: path as in an outcome -> address relative to the page; None: the page is no longer kept.
        pass_commands: what lets each gate that stopped through, once.
        other_attempts: gate -> attempt that its statistics of the day are of, where that is not this one.
        written_at_ms: Unix milliseconds.
    """

    dataset: str
    simulated: bool
    dt: str
    attempt: str
    outcomes: Sequence[StageOutcome]
    stopped_by: str
    stats: Series
    quarantine: Quarantine | None
    data_docs: Mapping[str, str | None]
    written_at_ms: int
    other_attempts: Mapping[str, str] = field(default_factory=dict)
    pass_commands: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        severities = {outcome.max_severity for outcome in self.outcomes}
        if self.stopped_by or any(outcome.stopped for outcome in self.outcomes):
            return STOPPED
        if "critical" in severities:
            return LET_THROUGH
        if "warning" in severities:
            return WARNED
        return PASSED if self.outcomes else UNKNOWN

    def failed(self, severity: str) -> list[tuple[str, Outcome]]:
        """Return (stage, outcome) of the expectations of a severity that failed."""
        return [(gate.stage, outcome) for gate in self.outcomes for outcome in gate.failed(severity)]


def summary(partition: Partition) -> dict[str, Any]:
    """Return what the index, and whoever asks on a command line, needs to know of a partition: JSON values."""
    return {
        "dataset": partition.dataset,
        "simulated": partition.simulated,
        "dt": partition.dt,
        "attempt": partition.attempt,
        "verdict": partition.verdict,
        "stopped_by": partition.stopped_by,
        "stages": {gate.stage: gate.max_severity for gate in partition.outcomes},
        "passed": [
            {
                "stage": gate.stage,
                "by": gate.passed.by,
                "reason": gate.passed.reason,
                "expectations": [one.column for one in gate.passed.failing],
            }
            for gate in partition.outcomes
            if gate.passed is not None
        ],
        "failed": {
            severity: [f"{stage}: {_sentence(outcome)}" for stage, outcome in partition.failed(severity)]
            for severity in SEVERITIES
        },
        "data_docs": {path: address for path, address in partition.data_docs.items() if address is not None},
        "written_at_ms": partition.written_at_ms,
    }


def partition_page(partition: Partition, plots: Sequence[Plot], index: str) -> str:
    """Return the page of one attempt at one partition.

    Args:
        plots: drawings of its statistics.
        index: address of the index, relative to the page.
    """
    p = partition
    head = (
        f'<p class="crumb"><a href="{_address(index)}">all partitions</a></p>'
        f"<h1>{_text(p.dataset)} <span>{_text(p.dt)}</span></h1>"
        f'<p class="verdict {_class(p.verdict)}"><b>{_text(p.verdict)}</b> {_text(_SAID[p.verdict])}</p>'
        + (
            '<p class="simulated">SIMULATED DATA: nothing here says anything about real users.</p>'
            if p.simulated
            else ""
        )
        + f"<dl><dt>attempt</dt><dd><code>{_text(p.attempt)}</code></dd><dt>gates</dt><dd>{_gates(p)}</dd>"
        f"<dt>written</dt><dd>{_time(p.written_at_ms)}</dd></dl>"
    )
    parts = [
        head,
        _decisions(p),
        _failures(p),
        _bounds(p),
        _drawings(p, plots),
        _quarantine(p.quarantine),
        _statistics(p),
        _docs(p),
    ]
    return document(f"{p.dataset} {p.dt}: {p.verdict}", "".join(parts))


def index_page(entries: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return the index: one row an attempt, the newest partition and in it the newest attempt first.

    Args:
        entries: (address of the page, its `summary`).
    """
    ordered = sorted(entries, key=lambda entry: (entry[1]["dt"], entry[1]["written_at_ms"]), reverse=True)
    rows = []
    for address, entry in ordered:
        counts = ", ".join(
            f"{len(entry['failed'][severity])} {severity}" for severity in SEVERITIES if entry["failed"].get(severity)
        )
        folder = address.rpartition("/")[0]
        docs = " ".join(
            f'<a href="{_address(_joined(folder, target))}">{_text(_docs_name(path))}</a>'
            for path, target in entry["data_docs"].items()
        )
        rows.append(
            f"<tr><td>{_text(entry['dt'])}</td>"
            f"<td>{_text(entry['dataset'])}{' <i>simulated</i>' if entry['simulated'] else ''}</td>"
            "<td><b"
            f' class="{_class(entry["verdict"])}">{_text(entry["verdict"])}</b></td>'
            f"<td>{_text(counts) or 'nothing failed'}</td>"
            "<td><a"
            f' href="{_address(address)}"><code>{_text(entry["attempt"])}</code></a></td>'
            f"<td>{_time(entry['written_at_ms'])}</td><td>{docs}</td></tr>"
        )
    listed = table(
        ("day", "data set", "verdict", "failed expectations", "report of the attempt", "written", "Data Docs"), rows
    )
    body = (
        "<h1>Partitions</h1><p>One row an attempt at a partition: the newest day first, and of a day the newest"
        " attempt.</p>" + (listed if rows else "<p>No gate has run yet.</p>")
    )
    return document("Partitions", body)


# ---- parts of the page -----------------------------------------------------------------------------------------------


def _gates(p: Partition) -> str:
    said = []
    for gate in p.outcomes:
        name = (
            LET_THROUGH if gate.passed else {"critical": STOPPED, "warning": WARNED}.get(str(gate.max_severity), PASSED)
        )
        said.append(f'<span class="gate {_class(name)}">{_text(gate.stage)}: {name}</span>')
    return " ".join(said) or "none ran"


def _failing(failing: Sequence[Failing]) -> str:
    return "<br>".join(f"<code>{_text(one.column)}</code> {_text(one.message, WHOLE)}" for one in failing)


def _decisions(p: Partition) -> str:
    rows = [
        f"<tr><td>{_text(gate.stage)}</td><td>{_text(gate.passed.by)}<br>{_time(gate.passed.at_ms)}</td>"
        f"<td>{_text(gate.passed.reason, WHOLE)}</td>"
        f"<td>{_failing(gate.passed.failing)}</td>"
        f"<td><code>{_text(gate.passed.attempt)}</code></td></tr>"
        for gate in p.outcomes
        if gate.passed is not None
    ]
    return (
        "<h2>Let through by a person</h2>" + table(("gate", "who, when", "why", "what had failed", "in attempt"), rows)
        if rows
        else ""
    )


def _bounds(p: Partition) -> str:
    stated = {name: bound for gate in p.outcomes for name, bound in gate.bounds.items()}
    rows = [
        f"<tr><td><code>{_text(name)}</code></td><td class=number>{_value(bound['value'])}</td><td"
        f" class=number>{_value(bound['default'])}</td><td>{_text(bound['reason'], WHOLE)}</td></tr>"
        for name, bound in sorted(stated.items())
    ]
    return "<h2>Bounds of this data set</h2>" + table(("bound", "value", "default", "why"), rows) if rows else ""


def _failures(p: Partition) -> str:
    parts = ["<h2>What failed</h2>"]
    critical = p.failed("critical")
    if p.stopped_by and not (
        critical and all(outcome.message in p.stopped_by for _, outcome in critical)
    ):  # those say it below
        parts.append(f'<pre class="stopped">{_text(p.stopped_by, WHOLE)}</pre>')
    rows = [
        _failure(stage, outcome, p.data_docs)
        for severity in ("critical", "warning")
        for stage, outcome in p.failed(severity)
    ]
    columns = ("severity", "gate", "what", "observed", "expected", "what to do", "")
    if rows:
        parts.append(table(columns, rows))
    elif not p.stopped_by:
        parts.append("<p>Nothing: no critical expectation and no warning.</p>")
    if p.pass_commands:
        commands = "\n".join(p.pass_commands)
        parts.append(
            "<p>Once looked at, a person can let exactly what failed through, once, with a reason that stands on the"
            " model version; then clear the whole run:</p>"
            f'<pre class="command">{_text(commands, WHOLE)}</pre>'
        )
    if recorded := [_failure(stage, outcome, p.data_docs) for stage, outcome in p.failed("info")]:
        parts.append(
            f"<details><summary>{len(recorded)} recorded as info</summary>{table(columns, recorded)}</details>"
        )
    return "".join(parts)


def _failure(stage: str, outcome: Outcome, data_docs: Mapping[str, str | None]) -> str:
    address = data_docs.get(outcome.data_docs or "")
    link = (
        f'<a href="{_address(address)}">Data Docs</a>'
        if address
        else "Data Docs no longer kept"
        if outcome.data_docs
        else ""
    )
    kind = _class({"critical": STOPPED, "warning": WARNED}.get(outcome.severity, PASSED))
    severity = f'<b class="{kind}">{_text(outcome.severity)}</b>'
    return (
        f"<tr><td>{severity}</td><td>{_text(stage)}</td><td><code>{_text(outcome.column)}</code><br>"
        f"{_text(outcome.message, WHOLE)}</td>"
        f"<td>{_value(outcome.observed)}</td><td>{_value(outcome.expected)}</td>"
        f"<td>{_text(outcome.remedy, WHOLE)}</td><td>{link}</td></tr>"
    )


def _drawings(p: Partition, plots: Sequence[Plot]) -> str:
    if not plots:
        return ""
    others = "".join(
        f"<p>This day's values of gate {_text(stage)} are{_of_another(attempt)}.</p>"
        for stage, attempt in p.other_attempts.items()
    )
    figures = "".join(
        f"<figure><figcaption>{_text(plot.title)}<br>{_legend(plot)}</figcaption>{plot.svg}</figure>" for plot in plots
    )
    return (
        "<h2>Statistics over days</h2><p>The vertical line is this day; the band reaches from the lowest to the"
        f" highest of the {BAND_DAYS} days before it, "
        f"the dashed line is their median. Only days that passed are kept for the days after them.</p>{others}<div"
        f' class="plots">{figures}</div>'
    )


def _legend(plot: Plot) -> str:
    return " ".join(
        f'<span><b style="color: var(--line-{number})">&#9632;</b> {_text(name)}</span>'
        for number, name in enumerate(plot.lines, start=1)
    )


def _quarantine(quarantine: Quarantine | None) -> str:
    if quarantine is None:
        return ""
    parts = [
        f"<h2>Quarantine</h2><p>{quarantine.rows:,} raw rows of the day were"
        f" refused{_of_another(quarantine.attempt)}.</p>"
    ]
    if quarantine.by_reason:
        counts = sorted(quarantine.by_reason.items(), key=lambda item: (-item[1], item[0]))
        parts.append(
            table(
                ("reason", "rows"),
                [f"<tr><td>{_text(reason)}</td><td class=number>{rows:,}</td></tr>" for reason, rows in counts],
            )
        )
    if quarantine.sample:
        rows = [
            f"<tr><td>{_text(row['source_file'])}</td><td"
            f" class=number>{_text(row['row_number'])}</td><td>{_text(row['reason'])}</td>"
            f"<td><code>{_text(row['raw_text'])}</code></td></tr>"
            for row in quarantine.sample
        ]
        parts.append(f"<h3>A sample of {len(rows)}</h3>" + table(("file", "row", "reason", "raw text"), rows))
    return "".join(parts)


def _statistics(p: Partition) -> str:
    rows = []
    for stage in STAGES:
        for metric, values in sorted(p.stats.get(stage, {}).items()):
            if p.dt not in values:
                continue
            before = values_before(values, p.dt)
            spread = f"{_number(min(before))} to {_number(max(before))}" if before else "no days before"
            rows.append(
                f"<tr><td>{_text(stage)}{_of_another(p.other_attempts.get(stage, ''))}</td>"
                f"<td><code>{_text(metric)}</code></td><td"
                f" class=number>{_number(values[p.dt])}</td><td class=number>{spread}</td></tr>"
            )
    if not rows:
        return ""
    listed = table(("gate", "metric", "this day", f"the {BAND_DAYS} days before"), rows)
    return f"<details><summary>All {len(rows)} statistics of the day</summary>{listed}</details>"


def _docs(p: Partition) -> str:
    if not p.data_docs:
        return ""
    links = "".join(
        (
            f'<li><a href="{_address(address)}">{_text(_docs_name(path))}</a> <code>{_text(path)}</code></li>'
            if address
            else f"<li>{_text(_docs_name(path))}: no longer kept</li>"
        )
        for path, address in p.data_docs.items()
    )
    return f"<h2>Data Docs</h2><p>Every expectation that was evaluated, by suite:</p><ul>{links}</ul>"


def _of_another(attempt: str) -> str:
    return f" <em>(of attempt <code>{_text(attempt)}</code>, not of this one)</em>" if attempt else ""


def _docs_name(path: str) -> str:
    """Return the suite of a Data Docs page: .../validations/<suite>/<run>/<time>/<batch>.html."""
    before, _, after = path.partition("/validations/")
    return after.split("/")[0] if after else before.rpartition("/")[2]


# ---- values ----------------------------------------------------------------------------------------------------------


def _sentence(outcome: Outcome) -> str:
    return _visible(outcome.message or f"{outcome.expectation} on {outcome.column} failed")


def _visible(text: str) -> str:
    """Write out what cannot be seen: controls, and marks that turn the direction of the text."""
    return "".join(
        c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" for c in text
    )


def _text(value: Any, limit: int = MOST_CHARACTERS) -> str:
    text = str(value)
    cut = f" ... ({len(text):,} characters)" if len(text) > limit else ""
    return escape(_visible(text[:limit]) + cut, quote=True)


def _value(value: Any) -> str:
    """Return a JSON value, small ones readable."""
    if isinstance(value, Mapping):
        return "<br>".join(f"{_text(name)}: {_value(item)}" for name, item in value.items() if item is not None) or "-"
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    if isinstance(value, (int, float)):
        return _number(value)
    return _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _number(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _time(unix_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_ms / 1000))


def _class(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _address(address: str) -> str:
    """Return a relative address, or a file's, for an attribute; nothing that a browser would run."""
    scheme, colon, rest = address.partition("://")
    return escape(
        f"{scheme}{colon}{quote(rest, safe=_SAFE)}" if colon and scheme == "file" else quote(address, safe=_SAFE),
        quote=True,
    )


def _joined(folder: str, address: str) -> str:
    return address if "://" in address or not folder else f"{folder}/{address}"


def table(columns: Sequence[str], rows: Sequence[str]) -> str:
    """Return a table of rows that are HTML already."""
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def document(title: str, body: str) -> str:
    """Return a page in the style of all, of a body that is HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1">'
        # No script, no picture, nothing from elsewhere, whatever a row says.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6877; --paper: #fff; --rule: #d9dee5; --shade: #f4f6f8;
  --band: #cfd8e3; --day: #c2410c;
  --bad: #b42318; --odd: #9a5b00; --good: #1a7f4b; --link: #175cd3;
  --line-1: #1f5fbf; --line-2: #c2410c; --line-3: #1a7f4b; --line-4: #7a3fb5; --line-5: #b0257b; --line-6: #0e7c86;
  --line-7: #8a6d00; --line-8: #5d6877; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --paper: #14181e; --rule: #303844;
  --shade: #1c222a; --band: #35404f; --day: #fb8b4c;
  --bad: #ff8a7d; --odd: #f5b94e; --good: #5fd398; --link: #84b6ff;
  --line-1: #7fb0ff; --line-2: #fb8b4c; --line-3: #5fd398; --line-4: #c49bf0; --line-5: #f08cc4; --line-6: #55cfd9;
  --line-7: #e0c355; --line-8: #9aa5b4; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 16px 20px 48px }
h1 { font-size: 24px; margin: 4px 0 8px } h1 span { font-weight: 400; color: var(--soft) }
h2 { font-size: 17px; margin: 28px 0 8px; border-bottom: 1px solid var(--rule); padding-bottom: 4px }
  h3 { font-size: 14px; margin: 16px 0 6px }
p { margin: 6px 0 } a { color: var(--link) } .crumb { font-size: 13px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 14px; margin: 10px 0 } dt { color: var(--soft) }
  dd { margin: 0 }
code, pre { font: 12.5px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere;
  unicode-bidi: isolate }
pre { white-space: pre-wrap; background: var(--shade); padding: 10px 12px; border-left: 4px solid var(--bad);
  margin: 8px 0 }
pre.command { border-color: var(--soft) }
.verdict { padding: 8px 12px; background: var(--shade); border-left: 5px solid var(--soft) }
.verdict b { text-transform: uppercase; letter-spacing: .04em; margin-right: 8px }
.verdict.stopped { border-color: var(--bad) } .verdict.warned { border-color: var(--odd) }
  .verdict.passed { border-color: var(--good) }
b.stopped, .verdict.stopped b, .gate.stopped { color: var(--bad) }
  b.warned, .verdict.warned b, .gate.warned { color: var(--odd) }
.verdict.let-through { border-color: var(--odd) }
  b.let-through, .verdict.let-through b, .gate.let-through { color: var(--odd) }
b.passed, .verdict.passed b, .gate.passed { color: var(--good) } .gate { margin-right: 14px; color: var(--soft) }
.simulated { color: var(--odd); font-weight: 600 }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: 13px }
th { text-align: left; color: var(--soft); font-weight: 600 } th, td { padding: 5px 10px 5px 0;
  border-bottom: 1px solid var(--rule); vertical-align: top }
td.number { font-variant-numeric: tabular-nums } td:first-child { white-space: nowrap } details { margin: 12px 0 }
  summary { cursor: pointer; color: var(--link) }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(390px, 1fr)); gap: 14px 10px; margin-top: 10px }
figure { margin: 0; background: var(--shade); padding: 6px 6px 2px; display: flex; flex-direction: column;
  justify-content: space-between } figcaption { font-size: 12.5px; color: var(--soft); margin: 0 4px 2px }
figcaption span { margin-right: 8px; font-size: 11.5px; white-space: nowrap }
svg { width: 100%; height: auto; display: block; color: var(--ink); fill: currentColor }
  svg text { font-family: system-ui, "DejaVu Sans", sans-serif !important }
"""

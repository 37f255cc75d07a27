"""Writes the page of an attempt at a partition, and the index of all of them; a gate has it written when it ends, well
or not.

    python -m etl.quality.report.write --dataset D --warehouse W --dt YYYY-MM-DD --attempt A [--reports DIR]
    [--stopped-by TEXT] [--json]

    <reports>/index.html                                       every partition and attempt, newest first
    <reports>/partitions/<dataset>/dt=D/<attempt>.html         what the gates found; statistics over days; refused rows
    <reports>/partitions/<dataset>/dt=D/<attempt>.json         the same in short: `etl.quality.report.pages.summary`

What is drawn comes from what the gates keep (`etl.quality.judge.outcomes`), so a page can be written again at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.datasets.definition import DatasetDefinition
from etl.stage.commands import log, run_stage
from etl.stage.identity import report_page
from etl.stage.local_files import one_at_a_time, replace_text

if TYPE_CHECKING:
    from etl.quality.report.pages import Quarantine
    from etl.warehouse.store import Manifest, TableStore

DAYS = 30  # days that a drawing shows
SAMPLE_ROWS, SAMPLE_ROWS_A_REASON = 20, 4
SAMPLED_FROM_ROWS = 200_000  # the sample is taken from the first of a partition's refused rows


def write(
    definition: DatasetDefinition, store: TableStore, dt: str, attempt: str, reports: Path, stopped_by: str
) -> dict[str, Any]:
    """Write the page and its summary, then the index; return the summary.

    Args:
        stopped_by: what stopped the gate apart from a failed expectation; '' for nothing.
    """
    from etl.quality.judge.data_docs import index_lock
    from etl.quality.judge.outcomes import read_outcomes
    from etl.quality.judge.pass_once import pass_command
    from etl.quality.report.pages import Partition, partition_page, summary
    from etl.quality.report.plots import draw

    page = report_page(reports, store.dataset, dt, attempt)
    outcomes = read_outcomes(store, dt, attempt)
    docs = dict.fromkeys(outcome.data_docs for gate in outcomes for outcome in gate.outcomes if outcome.data_docs)
    stats, others = _stats(store, dt, attempt)
    partition = Partition(
        dataset=store.dataset,
        simulated=definition.simulated,
        dt=dt,
        attempt=attempt,
        outcomes=outcomes,
        stopped_by=stopped_by,
        stats=stats,
        quarantine=_quarantine(store, dt, attempt),
        data_docs={path: _relative(path, page.parent) if Path(path).exists() else None for path in docs},
        other_attempts=others,
        pass_commands=[pass_command(store.warehouse, gate) for gate in outcomes if gate.passable],
        written_at_ms=time.time_ns() // 1_000_000,
    )
    found = summary(partition)
    html = partition_page(partition, draw(partition.stats, dt), os.path.relpath(reports / "index.html", page.parent))
    page.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(index_lock(reports)):
        replace_text(page, html)
        replace_text(page.with_suffix(".json"), json.dumps(found, indent=1, ensure_ascii=False))
        write_index(reports)
    return found


def write_index(reports: Path) -> None:
    """Write `<reports>/index.html` from the summaries that lie below it."""
    from etl.quality.report.pages import index_page

    entries = []
    for path in sorted(reports.glob("partitions/*/dt=*/*.json")):
        entries.append((str(path.with_suffix(".html").relative_to(reports)), json.loads(path.read_text())))
    replace_text(reports / "index.html", index_page(entries))


def _stats(
    store: TableStore, dt: str, attempt: str
) -> tuple[dict[str, dict[str, dict[str, float | None]]], dict[str, str]]:
    """Return stage -> metric -> day -> value, and stage -> the other attempt that the day's values are of.

    Days before are as kept; the day itself is as this attempt measured it, else as another one did.
    """
    from etl.quality.judge.outcomes import STAGES
    from etl.quality.measure.statistics import read_rejected, read_stats

    series: dict[str, dict[str, dict[str, float | None]]] = {}
    others: dict[str, str] = {}
    for stage in STAGES:
        rows = read_stats(store, stage, dt, DAYS).to_pylist()
        own = [
            row
            for row in (*rows, *read_rejected(store, stage, dt).to_pylist())
            if (row["dt"], row["attempt"]) == (dt, attempt)
        ]
        # A later partition measures the days of its window again, under its own name.
        if not own and (of_others := {row["attempt"] for row in rows if row["dt"] == dt}):
            others[stage] = ", ".join(sorted(of_others))
        for row in [row for row in rows if row["dt"] != dt] + (own or [row for row in rows if row["dt"] == dt]):
            series.setdefault(stage, {}).setdefault(row["metric"], {})[row["dt"]] = row["value"]
    return series, others


def _quarantine(store: TableStore, dt: str, attempt: str) -> Quarantine | None:
    """Return the refused rows of the day, as staged by this attempt, else as published."""
    from etl.quality.report.pages import Quarantine

    manifest = store.staged_manifest(attempt, "quarantine", dt) or store.manifest("quarantine", dt)
    other = manifest.attempt if manifest is not None and manifest.attempt != attempt else ""
    if manifest is None:
        return None
    reasons: Counter[str] = Counter()
    sample: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    scanned = 0
    for batch in _batches(store, manifest, ["reason"]):
        reasons.update(_code(text) for text in batch["reason"].to_pylist())
    for batch in _batches(store, manifest, ["source_file", "row_number", "reason", "raw_text"]):
        for row in batch.to_pylist():
            code = _code(row["reason"])
            if taken[code] < SAMPLE_ROWS_A_REASON and len(sample) < SAMPLE_ROWS:
                taken[code] += 1
                sample.append(row)
        scanned += batch.num_rows
        if scanned >= SAMPLED_FROM_ROWS or len(sample) == SAMPLE_ROWS:
            break
    return Quarantine(manifest.rows, dict(reasons), sample, other)


def _batches(store: TableStore, manifest: Manifest, columns: Sequence[str]) -> Iterator[Any]:
    for file in manifest.files:
        with store.open_parquet(file) as parquet:
            yield from parquet.iter_batches(columns=list(columns))


def _code(reason: str) -> str:
    """Return the machine-readable part of a reason: what stands before its first ': '."""
    return reason.partition(": ")[0]


def _relative(path: str, folder: Path) -> str:
    return os.path.relpath(path, folder.resolve())


def main(argv: list[str] | None = None) -> None:
    """Write the page of one attempt at one partition."""
    parser: argparse.ArgumentParser = partition_parser(__doc__)
    parser.add_argument("--reports", default="var/reports", help="local folder of the pages (default: %(default)s)")
    parser.add_argument(
        "--stopped-by",
        default="",
        metavar="TEXT",
        help=(
            "what stopped the gate, when no failed expectation says it; - takes it from standard input, once that ends"
        ),
    )
    parser.add_argument("--json", action="store_true", help="print the summary of the page")
    args = parser.parse_args(argv)
    store, definition = store_of(args), definition_of(args)
    reports = Path(args.reports).resolve()
    page = report_page(reports, store.dataset, args.dt, args.attempt)
    if args.stopped_by == "-":
        os.nice(10)  # the gate goes first
        try:
            _draw_early(store, args.dt, args.attempt)
            write(definition, store, args.dt, args.attempt, reports, sys.stdin.read())
        except Exception as error:
            log(f"warning: the report {page} was not written: {type(error).__name__}: {error}")
        else:
            log(f"report: {page}")
        return
    found = write(definition, store, args.dt, args.attempt, reports, args.stopped_by)
    print(json.dumps(found, ensure_ascii=False) if args.json else page)


def _draw_early(store: TableStore, dt: str, attempt: str) -> None:
    """Load what draws, and draw what the gate that is at work will not change: both take longer than all the rest."""
    import etl.quality.report.pages  # noqa: F401
    from etl.quality.report.plots import draw

    with contextlib.suppress(OSError):  # notes when the page is written
        draw(_stats(store, dt, attempt)[0], dt)


if __name__ == "__main__":
    run_stage(main)

"""Validate one stage of one partition by hand: the same measures, suites and severities as the gate; nothing is
changed.

    python -m etl.quality.judge.check --dataset D --warehouse W --dt YYYY-MM-DD --stage S [--attempt A] [--raw R]
    [--json]

With --attempt, what that attempt has staged (or published); without, what is published. No statistics, outcomes or
pages are written. Exit code: 0 passed, 4 a warning, 3 critical; 2 and 75 as every stage (docs/stages.md).
"""

from __future__ import annotations

import dataclasses
import json
import sys

from etl.quality.judge.audit import audit_of, audit_parser
from etl.quality.judge.gx import import_early
from etl.quality.judge.outcomes import SEVERITIES, StageOutcome
from etl.quality.measure.measured import Evidence
from etl.stage.commands import run_stage
from etl.stage.errors import EXIT_GATE

EXIT_WARNING = 4


def main(argv: list[str] | None = None) -> int:
    """Check one stage of one partition; return the exit code."""
    parser = audit_parser(__doc__, attempt_required=False)
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object on standard output: the outcome, and the metrics it was made of",
    )
    args = parser.parse_args(argv)
    audit = audit_of(args, None)
    import_early()
    evidence = audit.partition.measure(args.stage)
    outcome = audit.judge(args.stage, evidence)
    print(as_json(outcome, evidence) if args.json else as_text(outcome), flush=True)
    return {"critical": EXIT_GATE, "warning": EXIT_WARNING}.get(outcome.max_severity or "", 0)


def as_json(outcome: StageOutcome, evidence: Evidence) -> str:
    """Return the outcome, and under `statistics` the metrics by stage and day; what is not measurable is null."""
    statistics = [
        {
            "stage": stage,
            "dt": dt,
            "metrics": {
                name: value if value == value else None for name, value in metrics.items() if not isinstance(value, str)
            },
        }
        for stage, dt, metrics in evidence.statistics
    ]
    return json.dumps(
        {**dataclasses.asdict(outcome), "attempt": outcome.attempt or None, "statistics": statistics},
        indent=1,
        ensure_ascii=False,
        allow_nan=False,
        default=float,
    )


def as_text(outcome: StageOutcome) -> str:
    """Return what failed, the worst first, and the sum."""
    lines = []
    for severity in SEVERITIES:
        for failed in outcome.failed(severity):
            lines += [f"{severity}: {failed.message}"] + ([f"  remedy: {failed.remedy}"] if severity != "info" else [])
    counts = ", ".join(f"{len(outcome.failed(severity))} {severity}" for severity in SEVERITIES)
    of = f"attempt {outcome.attempt}" if outcome.attempt else "as published"
    return "\n".join(
        [
            *lines,
            (
                f"{outcome.dataset} dt={outcome.dt} stage {outcome.stage}, {of}: {len(outcome.outcomes)} expectations,"
                f" failed: {counts}"
            ),
        ]
    )


if __name__ == "__main__":
    run_stage(lambda: sys.exit(main()))

"""Let a partition that a gate has stopped through that gate, once: a person's decision, by name, with a reason.

    python -m etl.quality.judge.pass_once --dataset D --warehouse W --dt YYYY-MM-DD --stage S --reason TEXT [--attempt
    A] [--by NAME] [--expectation METRIC ...]

The decision holds for the expectations that had failed, on the days that had failed, and for the next attempt at the
partition that meets it (or the same one, when its gate is cleared): anything else that fails still stops. It is kept
with who, when and why (`etl.quality.judge.outcomes`), and stands in the outcome, on the report and on the model
version.
"""

from __future__ import annotations

import argparse
import getpass
import shlex
import time

from etl.datasets.definition import definition_name
from etl.quality.judge.outcomes import Decision, Failing, StageOutcome, outcome_attempts, read_outcomes, write_decision
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError
from etl.warehouse.partitions import parse_dt
from etl.warehouse.store import TableStore


def pass_command(warehouse: str, outcome: StageOutcome) -> str:
    """Return the command line that lets exactly this through; the reason is left to the person."""
    return shlex.join(
        [
            "python",
            "-m",
            "etl.quality.judge.pass_once",
            "--dataset",
            outcome.dataset,
            "--warehouse",
            warehouse,
            "--dt",
            outcome.dt,
            "--stage",
            outcome.stage,
            "--attempt",
            outcome.attempt,
            "--reason",
            "...",
        ]
    )


def decide(
    store: TableStore, dt: str, stage: str, attempt: str | None, by: str, reason: str, expectations: list[str]
) -> Decision:
    """Keep the decision and return it.

    Args:
        attempt: the attempt that was stopped; None: the latest one that was stopped at this gate.
        expectations: the failed metrics to let through; none named: all that failed.

    Raises:
        StageError: nothing was stopped there, a named expectation had not failed, breaks the tables' contract, or who
            or why is missing.
    """
    if len(reason.strip(" .")) < 3 or not by.strip():
        raise StageError(
            "a decision needs who takes it and why",
            "give --reason with a sentence that others will understand, and --by with a name",
        )
    attempts = [attempt] if attempt else [name for day, name in outcome_attempts(store) if day == dt]
    stopped = [
        outcome
        for name in attempts
        for outcome in read_outcomes(store, dt, name)
        if outcome.stage == stage and outcome.stopped
    ]
    if not stopped:
        raise StageError(
            f"gate {stage} has stopped {f'no attempt {attempt}' if attempt else 'nothing'} at dt={dt} of"
            f" {store.dataset} by an expectation",
            "look at the report of the partition for what was stopped; what cannot be read at all cannot be let"
            " through",
        )
    outcome = max(stopped, key=lambda one: one.finished_at_ms)
    failed = outcome.failed("critical")
    if unknown := sorted(set(expectations) - {one.column for one in failed}):
        raise StageError(
            f"{', '.join(unknown)} had not failed there",
            f"name some of: {', '.join(sorted({one.column for one in failed}))}",
        )
    let = [one for one in failed if not expectations or one.column in expectations]
    if broken := [one for one in let if not one.passable]:
        raise StageError(
            f"{', '.join(dict.fromkeys(one.column for one in broken))} cannot be let through: what breaks the contract"
            f" of the tables (columns, keys, counts, order) would mislead every reader of them. {broken[0].message}",
            "; ".join(dict.fromkeys(one.remedy for one in broken)),
        )
    chosen = tuple(Failing.of(one) for one in let)
    decision = Decision(dt, stage, outcome.attempt, by.strip(), time.time_ns() // 1_000_000, reason.strip(), chosen)
    write_decision(store, decision)
    return decision


def main(argv: list[str] | None = None) -> None:
    """Take one decision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="name of the data set, or the path of its definition")
    parser.add_argument("--warehouse", required=True, help="root of the tables: a path, or a URI that Arrow reads")
    parser.add_argument("--dt", required=True, help="partition: a UTC day, YYYY-MM-DD")
    parser.add_argument("--stage", required=True, help="the gate that has stopped it")
    parser.add_argument("--attempt", help="the attempt that was stopped (default: the latest)")
    parser.add_argument("--reason", required=True, help="why it may pass; shown on the report and on the model version")
    parser.add_argument("--by", help="who decides (default: the name of the login)")
    parser.add_argument(
        "--expectation",
        action="append",
        default=[],
        metavar="METRIC",
        help="let only this failure through; may be given again (default: all that failed)",
    )
    args = parser.parse_args(argv)
    parse_dt(args.dt)
    store = TableStore(args.warehouse, definition_name(args.dataset))
    decision = decide(
        store, args.dt, args.stage, args.attempt, args.by or getpass.getuser(), args.reason, args.expectation
    )
    for one in decision.failing:
        log(f"may fail once: {one.message}")
    log(
        f"decided by {decision.by}: {decision.reason}. Clear the whole run, or run the partition again: its gate"
        f" {decision.stage} then lets exactly this through"
    )


if __name__ == "__main__":
    run_stage(main)

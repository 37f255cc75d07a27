"""Build `items` and `sequences` of a partition from the published events of its window.

The command line of `etl.sequences.build_sequences`: with --reports, what it has staged is judged by `etl.quality` in
this process.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.ingest.raw import RawLocation
from etl.quality.measure.sequences import SEQUENCE_COLUMNS, SequenceRules, measured_bucket
from etl.sequences.build_sequences import Measuring, build_sequences
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError
from etl.warehouse.partitions import Window


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument("--raw", required=True, help="folder or URI of the raw user and item files")
    parser.add_argument("--target-days", type=int, help="days, dt included, whose events are targets")
    parser.add_argument("--lookback-days", type=int, help="days, dt included, whose events may stand in a history")
    parser.add_argument("--evaluation-days", type=int, help="last days, dt included, that are for evaluation")
    parser.add_argument(
        "--max-history",
        type=int,
        help="at most so many of the latest events before its cut-off does a target see; "
        "a row stores what any target of its user sees: these, and the events between the first target and the last",
    )
    parser.add_argument(
        "--history-cutoff",
        choices=("event", "day_start"),
        help="what a target may see: all before it, or all before its day",
    )
    parser.add_argument("--availability-lag-ms", type=int, help="an event is known only so long after its time")
    parser.add_argument(
        "--reports", help="folder of reports: judge what was staged, in this process, and write the pages there"
    )
    parser.epilog = "What is not given is as the data set's definition says."
    args = parser.parse_args()
    definition, store = definition_of(args), store_of(args)
    days = {
        name: value
        for name in ("target_days", "lookback_days", "evaluation_days")
        if (value := getattr(args, name)) is not None
    }
    window = Window(args.dt, **{**definition.window.model_dump(), **days})
    history = {
        "max_events": args.max_history,
        "cutoff": args.history_cutoff,
        "availability_lag_ms": args.availability_lag_ms,
    }
    if (args.max_history or 1) < 1 or (args.availability_lag_ms or 0) < 0:
        raise StageError("--max-history must be at least 1 and --availability-lag-ms at least 0", "correct them")
    definition = definition.model_copy(
        update={"history": definition.history.model_copy(update={n: v for n, v in history.items() if v is not None})}
    )
    raw = RawLocation(args.raw)
    with contextlib.ExitStack() as around:
        measuring: Measuring | None = None
        if args.reports:
            from etl.quality.judge.in_job import judging_sequences

            take = around.enter_context(judging_sequences(store, definition, args.dt, args.attempt, Path(args.reports)))
            rules = SequenceRules.of(window, definition.targets.positions is not None, definition.history)
            measuring = Measuring(SEQUENCE_COLUMNS, functools.partial(measured_bucket, rules=rules), take)
        counts = build_sequences(store, definition, raw, window, args.attempt, measuring)
    log("  ".join(f"{name} {value:,}" for name, value in counts.items()))


if __name__ == "__main__":
    run_stage(main)

"""Build `events` and `quarantine` of a day from raw logs, and of every earlier day of the lookback that is not there
yet.

The command line of `etl.ingest.build_events`: with --reports, the gates of `etl.quality` stand around the job.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.datasets.definition import DatasetDefinition
from etl.ingest.build_events import BUCKET_BYTES, Build, build_events
from etl.ingest.freshness import accepted_days
from etl.ingest.raw import RawLocation
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError
from etl.warehouse.buckets import MAX_BUCKETS


def _parser() -> argparse.ArgumentParser:
    parser = partition_parser(__doc__)
    parser.add_argument("--raw", required=True, help="folder or URI of the raw logs, as published")
    parser.add_argument(
        "--lookback-days",
        type=int,
        default=None,
        help="days, dt included, that must be there afterwards (default: the definition's)",
    )
    parser.add_argument(
        "--buckets",
        type=int,
        default=None,
        help=(
            "user buckets of the days that are built (default: those of the days that are there, or one for each"
            f" {BUCKET_BYTES >> 20} MiB of a whole lookback)"
        ),
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        help=(
            "stop when more than this share of the rows is refused (default: the data set's quality bound"
            " raw.max_refused_share)"
        ),
    )
    parser.add_argument(
        "--accept-loss",
        action="append",
        default=[],
        metavar="DAY",
        help=(
            "build this day (or FIRST..LAST) from the raw files that are left, "
            "and let it have fewer rows than what is published; may be given more than once"
        ),
    )
    parser.add_argument(
        "--reports",
        help=(
            "folder of reports: judge the raw files first and the staged days last, in this process, and write the"
            " pages there"
        ),
    )
    return parser


def _build_of(args: argparse.Namespace, definition: DatasetDefinition) -> Build:
    """Return what the command line asks for; what it leaves out is as the definition says.

    Raises:
        StageError: a number is out of its range.
    """
    lookback_days = args.lookback_days if args.lookback_days is not None else definition.window.lookback_days
    max_bad_share = args.max_bad_share
    if max_bad_share is None:
        max_bad_share = definition.quality.thresholds().raw.max_refused_share
    buckets_fit = args.buckets is None or 1 <= args.buckets <= MAX_BUCKETS
    if lookback_days < 1 or not buckets_fit or not 0 <= max_bad_share <= 1:
        raise StageError(
            f"--lookback-days must be at least 1, --buckets between 1 and {MAX_BUCKETS} and --max-bad-share between 0"
            " and 1",
            "correct them",
        )
    return Build(args.dt, args.attempt, lookback_days, args.buckets, max_bad_share, accepted_days(args.accept_loss))


def main() -> None:
    args = _parser().parse_args()
    definition, store, raw = definition_of(args), store_of(args), RawLocation(args.raw)
    build = _build_of(args, definition)
    with contextlib.ExitStack() as around:
        raw_gate: Callable[[bool], object] = lambda wait: None  # noqa: E731
        if args.reports:
            from etl.quality.judge.in_job import judging_events
            from etl.quality.judge.page_process import written_after

            around.enter_context(
                written_after(args.dataset_given, store, args.dt, args.attempt, Path(args.reports), only_stopped=True)
            )
            raw_gate = around.enter_context(
                judging_events(store, definition, raw, args.dt, args.attempt, Path(args.reports))
            )
        summary = build_events(store, definition, raw, build, raw_gate)
    log(
        "rows in the files read: {rows_read:,} = {events:,} events + {duplicates:,} duplicates + {quarantined:,}"
        " quarantined + {outside_days:,} outside the lookback + {built_ahead:,} built ahead + {already_published:,} of"
        " days already published".format(**summary)
    )


if __name__ == "__main__":
    run_stage(main)

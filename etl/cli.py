"""What every stage's command line shares: the partition's arguments, and how a failure is told."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

from etl.datasets import DatasetDefinition, built_in_names, dataset
from etl.errors import StageError, TryAgainError, kind_of
from etl.partitions import parse_dt
from etl.store import TableStore


class _Dataset(argparse.Action):
    """Read the definition that --dataset names: `args.definition`; `args.dataset` is its name, `args.dataset_given` what was given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.definition = dataset(str(values))
        namespace.dataset = namespace.definition.name
        namespace.dataset_given = str(values)


def dataset_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with --dataset and --warehouse."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, action=_Dataset, metavar="NAME", help=f"{', '.join(built_in_names())}, or the path of a definition (name.yaml)")
    parser.add_argument("--warehouse", required=True, help="root of the tables: a path, or a URI that Arrow reads")
    return parser


def partition_parser(description: str | None, attempt_required: bool = True) -> argparse.ArgumentParser:
    """Return a parser with --dataset, --warehouse, --dt and --attempt."""
    parser = dataset_parser(description)
    parser.add_argument("--dt", required=True, help="partition: a UTC day, YYYY-MM-DD")
    parser.add_argument("--attempt", required=attempt_required, help="name of this attempt: the same over retries, new on reprocess")
    return parser


def definition_of(args: argparse.Namespace) -> DatasetDefinition:
    """Return the definition that --dataset names."""
    definition: DatasetDefinition = args.definition
    return definition


def store_of(args: argparse.Namespace) -> TableStore:
    """Return the store that --warehouse and --dataset name, --dt checked."""
    parse_dt(args.dt)
    return TableStore(args.warehouse, args.dataset)


def log(message: str) -> None:
    """Print one line of progress with the time, flushed, so that Airflow's log follows live."""
    print(time.strftime("%H:%M:%S"), message, flush=True)


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage; a StageError becomes one clear message and the exit code of its kind (a trace only with LONGVIEW_TRACE=1)."""
    try:
        main()
    except Exception as error:
        told = error if isinstance(error, StageError) else _no_answer(error)
        if told is None or os.environ.get("LONGVIEW_TRACE") == "1":
            raise
        print(f"error: {told}", file=sys.stderr, flush=True)
        sys.exit(told.exit_code)


def _no_answer(error: Exception) -> StageError | None:
    """Return what to say of a store that does not answer; None for any other error, which is a crash."""
    if kind_of(error) is StageError:
        return None
    reason = next((line.strip() for line in str(error).splitlines() if kind_of(Exception(line)) is TryAgainError), str(error))
    return TryAgainError(f"a store does not answer: {reason[:500]}", "run the same command again once it does")

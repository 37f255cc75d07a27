"""The arguments that every stage's command line shares: data set, warehouse, partition and attempt."""

from __future__ import annotations

import argparse

from etl.datasets.definition import DatasetDefinition, built_in_names, dataset
from etl.warehouse.partitions import parse_dt
from etl.warehouse.store import TableStore


class _Dataset(argparse.Action):
    """Read the definition that --dataset names.

    `args.definition`; `args.dataset` is its name, `args.dataset_given` what was given.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.definition = dataset(str(values))
        namespace.dataset = namespace.definition.name
        namespace.dataset_given = str(values)


def dataset_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with --dataset and --warehouse."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset",
        required=True,
        action=_Dataset,
        metavar="NAME",
        help=f"{', '.join(built_in_names())}, or the path of a definition (name.yaml)",
    )
    parser.add_argument("--warehouse", required=True, help="root of the tables: a path, or a URI that Arrow reads")
    return parser


def partition_parser(description: str | None, attempt_required: bool = True) -> argparse.ArgumentParser:
    """Return a parser with --dataset, --warehouse, --dt and --attempt."""
    parser = dataset_parser(description)
    parser.add_argument("--dt", required=True, help="partition: a UTC day, YYYY-MM-DD")
    parser.add_argument(
        "--attempt", required=attempt_required, help="name of this attempt: the same over retries, new on reprocess"
    )
    return parser


def definition_of(args: argparse.Namespace) -> DatasetDefinition:
    """Return the definition that --dataset names."""
    definition: DatasetDefinition = args.definition
    return definition


def store_of(args: argparse.Namespace) -> TableStore:
    """Return the store that --warehouse and --dataset name, --dt checked."""
    parse_dt(args.dt)
    return TableStore(args.warehouse, args.dataset)

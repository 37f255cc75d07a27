"""Checks a data set's definition alone, in a second: nothing is started, read or written.

python -m etl.datasets.check shop.yaml
"""

from __future__ import annotations

import argparse

from etl.datasets.definition import DatasetDefinition, built_in_names, dataset
from etl.stage.commands import log, run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help=f"{', '.join(built_in_names())}, or the path of a definition (name.yaml)")
    for line in described(dataset(parser.parse_args().dataset)):
        log(line)


def described(definition: DatasetDefinition) -> list[str]:
    """Return what a definition says, in lines."""
    events, targets = definition.events, definition.targets
    if targets.negatives is None:
        label = f"its label is {targets.label}"
    else:
        label = f"sampled negatives behind each: {targets.negatives.per_positive}"
    time = " + ".join(events.time.columns)
    return [
        f"{definition.name} ({definition.title}): the definition is right",
        f"files: {', '.join(definition.logs.files)}",
        f"an event: user {events.user}, item {events.item}, time {time}; signals {', '.join(events.signals)}",
        f"a target: {', '.join(targets.of) if targets.of else 'every event'}; {label}",
    ]


if __name__ == "__main__":
    run_stage(main)

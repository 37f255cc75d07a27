"""List the partitions that are no longer what their inputs say: build these again (a backfill with reprocessing).

A day of `events` is stale when raw files that may hold it were added or delivered again since it was built, or when the
definition's keys that shape rows changed (only looked at with --raw). Where raw files that it was built from are gone,
it cannot be built again whole: it is listed, and left out of the backfill, until they are back. A partition of a later
table is stale when an input that its manifest names is no longer the published one, or is to be built again itself.
Nothing is changed. Exit code 0: all is fresh; 1: something is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace

from etl.datasets.arguments import dataset_parser, definition_of
from etl.datasets.definition import DatasetDefinition
from etl.ingest.build_events import Judge
from etl.ingest.freshness import Action, same_rows
from etl.ingest.raw import RawLocation
from etl.stage.commands import run_stage
from etl.stage.errors import StageError
from etl.warehouse.partitions import add_days
from etl.warehouse.store import TableStore

TABLES = ("items", "sequences", "user_caches")  # in the order in which they hang on each other


@dataclass(frozen=True)
class Stale:
    """One stale partition and what made it so.

    Attributes:
        whole: all that it was built from is there.
        runs: a run of its day can build it: the raw files of the day itself are there.
    """

    table: str
    dt: str
    because: tuple[str, ...]
    whole: bool = True
    runs: bool = True


def main() -> None:
    parser: argparse.ArgumentParser = dataset_parser(__doc__)
    parser.add_argument("--raw", help="folder or URI of the raw logs: look for days whose files came or changed since")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    args = parser.parse_args()
    definition = definition_of(args)
    store = TableStore(args.warehouse, definition.name)
    stale = affected(store, definition, RawLocation(args.raw) if args.raw else None)
    if args.json:
        print(
            json.dumps(
                {
                    "dataset": definition.name,
                    "stale": [asdict(s) for s in stale],
                    "backfill": backfill_days(stale, store),
                }
            )
        )
    else:
        print(table(stale, store))
    sys.exit(1 if stale else 0)


def affected(store: TableStore, definition: DatasetDefinition, raw: RawLocation | None) -> list[Stale]:
    """Return every stale partition: events first, then by table and day.

    Raises:
        StageError: nothing is published there.
    """
    found: list[Stale] = []
    no_run: set[str] = set()
    events = {dt: manifest for dt in store.days("events") if (manifest := store.manifest("events", dt)) is not None}
    if not events:
        raise StageError(
            f"no day of {store.dataset} is published under {store.warehouse}",
            "correct --warehouse or --dataset, or run the stages first",
        )
    if raw is not None:
        judge = Judge(definition, raw, raw.logs(definition))
        verdicts = [judge(dt, manifest) for dt, manifest in events.items()]
        no_run = {
            dt
            for dt, m in events.items()
            if judge(dt, m, wanted=True).action is not Action.BUILD or not any(f.may_hold(dt) for f in judge.files)
        }
        found = [
            Stale("events", v.dt, (v.reason,), v.action is Action.BUILD)
            for v in verdicts
            if v.action is not Action.FRESH
        ]
    digests = {f"events/dt={dt}": same_rows(manifest) for dt, manifest in events.items()}
    old = {f"events/dt={stale.dt}" for stale in found if stale.whole}
    for name in TABLES:
        for dt in store.days(name):
            manifest = store.manifest(name, dt)
            if manifest is None:
                continue
            key = store.input_name(manifest)
            digests[key] = {manifest.data_digest}
            because = [
                f"{i} is stale" if i in old else f"{i} was built again"
                for i, digest in sorted(manifest.inputs.items())
                if i in old or digest not in digests.get(i, {digest})
            ]
            if because:
                old.add(key)
                found.append(Stale(name, dt, tuple(because)))
    return [replace(stale, runs=stale.dt not in no_run) for stale in found]


def backfill_days(stale: list[Stale], store: TableStore) -> list[list[str]]:
    """Return ranges [first, last] of days to run again; consecutive days make one range.

    A run builds the stale days of its lookback anew, so only days that lie in none need a run of their own.
    """
    stale = [s for s in stale if s.whole and s.runs]
    days = {s.dt for s in stale if s.table != "events"}
    covered = set(days)
    for dt in days:
        manifest = store.manifest("sequences", dt)
        lookback = int(manifest.settings["lookback_days"]) if manifest is not None else 1
        covered |= {add_days(dt, -back) for back in range(lookback)}
    ranges: list[list[str]] = []
    for dt in sorted(days | {s.dt for s in stale if s.dt not in covered}):
        if ranges and add_days(ranges[-1][1], 1) == dt:
            ranges[-1][1] = dt
        else:
            ranges.append([dt, dt])
    return ranges


def table(stale: list[Stale], store: TableStore) -> str:
    """Return the list for people, with the backfills that renew it."""
    if not stale:
        return "every published partition is what its inputs say"
    lines = [f"{'table':<14}{'dt':<12}because"]
    for s in stale:
        more = f" and {len(s.because) - 1} more" if len(s.because) > 1 else ""
        lines.append(f"{s.table:<14}{s.dt:<12}{s.because[0]}{more}")
    if lost := [s.dt for s in stale if not s.whole]:
        lines.append(f"\ncannot be built again whole until their raw files are back: {', '.join(lost)}")
    if fixed := sorted({s.dt for s in stale if s.whole and not s.runs and s.table != "events"}):
        lines.append(
            f"\nno run can build these again, since raw files of the day itself are not there: {', '.join(fixed)}"
        )
    ranges = backfill_days(stale, store)
    if not ranges:
        return "\n".join(lines)
    lines.append(
        "\nbuild again, oldest first:"
        f" {', '.join(first if first == last else f'{first} .. {last}' for first, last in ranges)}"
    )
    lines.append(
        "in the Airflow UI of `make up`: backfill with reprocessing; by hand: the stages of docs/stages.md with a new"
        " --attempt; or"
    )
    lines += [
        f"  airflow backfill create --dag-id vql_daily_{store.dataset} --from-date {first} --to-date {last}"
        " --reprocess-behavior completed"
        for first, last in ranges
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_stage(main)

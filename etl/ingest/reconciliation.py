"""Reconcile the raw rows that a run of the events job has read with the events, duplicates and refused rows that it
made of them.

Pure but for the log: a run gives the figures of its tasks, and is stopped by what they say.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etl.datasets.definition import DatasetDefinition
from etl.ingest.compression import BREAKS
from etl.ingest.event_rows import CLOCK_CHANGES
from etl.stage.commands import log
from etl.stage.errors import StageError
from etl.warehouse.partitions import dt_of_day_number

SHOWN_REASONS = 5
SUMMARY = ("rows_read", "events", "duplicates", "quarantined", "outside_days", "built_ahead", "already_published")


@dataclass(frozen=True)
class Tally:
    """What a run has read, and what became of it.

    Attributes:
        by_day: day -> figures of its buckets and files.
        summary: rows by what became of them; `rows_read` is the sum of the others.
        days_seen: days of which a row was read.
        refused: `file: reason` -> refused rows of the days of the lookback that were built.
        refused_elsewhere: the same of all other days.
        clock_changes: events of the days built whose local time occurs twice, or not at all.
    """

    by_day: Mapping[str, list[dict[str, Any]]]
    summary: dict[str, int]
    days_seen: frozenset[str]
    refused: Counter[str]
    refused_elsewhere: Counter[str]
    clock_changes: Counter[str]

    @staticmethod
    def of(
        stats: Sequence[Mapping[str, Any]], dt: str, first_day: str, built: Collection[str], ahead: Collection[str]
    ) -> Tally:
        """Add up the figures of all tasks.

        Args:
            stats: what `write_rows` returns.
            dt, first_day: the partition, and the first day of its lookback.
            built, ahead: days of the lookback that were built, and days that were built ahead.
        """
        by_day: dict[str, list[dict[str, Any]]] = defaultdict(list)
        summary = dict.fromkeys(SUMMARY, 0)
        refused, elsewhere, clock = Counter[str](), Counter[str](), Counter[str]()
        seen, built_days, days_ahead = set(), set(built), set(ahead)
        for stat in stats:
            if "elsewhere" in stat:
                elsewhere[stat["where"]] += stat["elsewhere"]
                continue
            day = dt_of_day_number(stat["day"])
            by_day[day].append(dict(stat))
            if "counted" in stat:
                summary["rows_read"] += stat["counted"]
                seen.add(day)
                # Rows of days built for the lookback are counted by their buckets, as what they became.
                if day in days_ahead:
                    summary["built_ahead"] += stat["counted"]
                elif day not in built_days:
                    summary["already_published" if first_day <= day <= dt else "outside_days"] += stat["counted"]
            elif "file" in stat:  # clock changes
                if day in built_days:
                    clock.update({what: stat[what] for what in CLOCK_CHANGES if what in stat})
            elif day in days_ahead:
                elsewhere.update(stat.get("reasons", {}))
            else:
                for name in ("events", "duplicates", "quarantined"):
                    summary[name] += stat[name]
                refused.update(stat.get("reasons", {}))
        return Tally(by_day, summary, frozenset(seen), refused, elsewhere, clock)


def check_refusals(tally: Tally, definition: DatasetDefinition, where: str, max_bad_share: float) -> None:
    """Stop a run of which too much was refused.

    Args:
        where: the raw location, for messages.
        max_bad_share: largest share of rows that may be refused for reasons that the definition does not expect.

    Raises:
        StageError: more is refused, or an archive is damaged.
    """
    # Of the rows of the days built now; and of all rows read, for a line without a readable day may belong to any of
    # them.
    built = sum(tally.summary[name] for name in ("events", "duplicates", "quarantined"))
    for refused, rows, what in (
        (_unexpected(tally.refused, definition), built, "rows of the days to build"),
        (
            _unexpected(tally.refused + tally.refused_elsewhere, definition),
            tally.summary["rows_read"],
            "raw rows read",
        ),
    ):
        if refused.total() > max_bad_share * rows:
            (most, count), *_ = refused.most_common(1)
            raise StageError(
                f"{refused.total():,} of {rows:,} {what} ({refused.total() / rows:.2%}) were refused, more than"
                f" {max_bad_share:.2%}; most often {most} ({count:,} rows)",
                "correct the raw file and run again; where such rows are ordinary, set the bound raw.max_refused_share"
                " with a reason in the section quality of the definition, or name their reason in"
                " logs.expected_refusals",
            )
    if cut := [reason for reason in tally.refused if reason.rpartition(": ")[2] in BREAKS]:
        # One refused row stands for everything behind the break: no share of refused rows can show how much is missing.
        raise StageError(f"an archive in {where} is damaged: {', '.join(sorted(cut))}", "deliver the file again")


def require_rows(tally: Tally, where: str, dt: str, files: Sequence[str]) -> None:
    """Stop where a day that was built has no event.

    Args:
        where: the raw location, for messages.
        files: names of the files that were read.

    Raises:
        StageError: it says which days the files hold.
    """
    if not any(stat.get("events") for stat in tally.by_day.get(dt, [])):
        span = f"{min(tally.days_seen)} .. {max(tally.days_seen)}" if tally.days_seen else "no day at all"
        raise StageError(
            f"no row for dt={dt} in {where}: the files that may hold it ({', '.join(files)}) hold {span}",
            "choose a DT in that span, or deliver the day's file",
        )


def log_tally(tally: Tally) -> None:
    """Log what was read by another clock, and what was refused most often."""
    if clock := tally.clock_changes:
        log(
            f"clock changes: {clock['repeated_times']:,} event(s) have a local time that occurs twice on the day and is"
            f" read as its second pass, {clock['missing_times']:,} one that does not occur and is read by the clock"
            " before the change"
        )
    refused = tally.refused + tally.refused_elsewhere
    for where, count in refused.most_common(SHOWN_REASONS):
        log(f"refused: {where} ({count:,} rows)")
    if len(refused) > SHOWN_REASONS:
        log(f"refused: {len(refused) - SHOWN_REASONS} more kinds; the table quarantine has every row with its value")


def _unexpected(reasons: Counter[str], definition: DatasetDefinition) -> Counter[str]:
    expected = tuple(f": {code}" for code in definition.logs.expected_refusals)
    if not expected:
        return reasons
    return Counter({where: count for where, count in reasons.items() if not where.endswith(expected)})

"""Metrics of the evaluation targets in groups: by activity of the user, by how well the item is known, hour, context.

A model may be good on average and poor where it matters: on new items, on users that come seldom, at night.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from etl.warehouse.partitions import MS_PER_DAY
from evaluation.day_scores import DayScores
from evaluation.metrics import chunks, distinct, figures, thirds

HOURS_A_GROUP = 6
HOUR_MS = MS_PER_DAY // 24
MOST_CONTEXTS = 8  # that have a group each, the most frequent; the others are one


class Grouping(NamedTuple):
    """One way to group T targets.

    Attributes:
        by: what the groups differ in.
        group_T: int8 [T], the number of each target's group.
        names: of the groups.
    """

    by: str
    group_T: np.ndarray
    names: list[str]


def groupings(file: DayScores, user: np.ndarray, rare_below: int) -> Iterator[Grouping]:
    """Yield the ways to group the evaluation targets of a partition, one after another: each takes memory.

    Args:
        file: what was scored.
        user: int32 [T], the number of each target's user.
        rare_below: occurrences in training below which an item shares embedding rows.
    """
    yield _by_activity(user)
    known = lambda seen: (seen > 0).astype(np.int8) + (seen >= max(1, rare_below))  # noqa: E731
    names = [
        "new: not in training",
        f"rare: 1 to {rare_below - 1} times in training",
        f"{rare_below} times or more in training",
    ]
    yield Grouping("item", file.column("train_occurrences", known), names)
    hours = lambda time_ms: (time_ms % MS_PER_DAY // HOUR_MS // HOURS_A_GROUP).astype(np.int8)  # noqa: E731
    starts = range(0, 24, HOURS_A_GROUP)
    names = [f"{at:02d} to {at + HOURS_A_GROUP:02d} h UTC" for at in starts]
    yield Grouping("hour", file.column("time_ms", hours), names)
    yield _by_context(file.column("context"))


def metrics_of_groups(
    user: np.ndarray, label: np.ndarray, scores: dict[str, np.ndarray], grouping: Grouping
) -> list[dict[str, Any]]:
    """Return of each group that has targets {"by", "group", "targets", "users", "models": {name: metrics}}.

    Args:
        user, label, scores: of T targets, as `evaluation.evaluate.Scored` has them.
    """
    found = []
    for number, name in enumerate(grouping.names):
        rows = grouping.group_T == number
        if not rows.any():
            continue
        found.append(
            {
                "by": grouping.by,
                "group": name,
                "targets": int(rows.sum()),
                "users": distinct(user, rows),
                "models": {model: figures(user, label, score, rows) for model, score in scores.items()},
            }
        )
    return found


def _by_activity(user: np.ndarray) -> Grouping:
    """Group by thirds of the number of targets that a target's user has that day."""
    counts, count_T = np.zeros(int(user.max(initial=-1)) + 1, np.int32), np.empty(len(user), np.int32)
    for part in chunks(len(user)):
        counts += np.bincount(user[part], minlength=len(counts)).astype(np.int32)
    for part in chunks(len(user)):
        count_T[part] = counts[user[part]]
    group_T, names = np.zeros(len(user), np.int8), []
    for number, rows in enumerate(thirds(count_T)):
        group_T[rows] = number
        least, most = count_T[rows].min(), count_T[rows].max()
        names.append(f"{least:,} to {most:,} targets of the user")
    return Grouping("activity", group_T, names)


def _by_context(context: np.ndarray) -> Grouping:
    low, high = int(context.min(initial=0)), int(context.max(initial=0))
    counts, group_T = np.zeros(high - low + 1, np.int64), np.empty(len(context), np.int8)
    for part in chunks(len(context)):
        counts += np.bincount(context[part].astype(np.int64) - low, minlength=len(counts))
    there = np.flatnonzero(counts)
    frequent = there[np.argsort(-counts[there], kind="stable")[:MOST_CONTEXTS]]
    group_of_value = np.full(len(counts), len(frequent), np.int8)
    group_of_value[frequent] = np.arange(len(frequent))
    for part in chunks(len(context)):
        group_T[part] = group_of_value[context[part].astype(np.int64) - low]
    names = [f"context {value}" if value >= 0 else "no context" for value in (frequent + low).tolist()]
    return Grouping("context", group_T, [*names, "other contexts"])

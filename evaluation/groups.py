"""Metrics of the evaluation targets in groups: by activity of the user, by how well the item is known, hour, context.

A model may be good on average and poor where it matters: on new items, on users that come seldom, at night.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from etl.warehouse.partitions import MS_PER_DAY
from etl.warehouse.schemas import EVALUATION
from evaluation.metrics import figures, numbered, thirds
from training.scoring import ScoredTargets

HOURS_A_GROUP = 6
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


def groupings(items: pa.Table, sequences: pa.Table, targets: ScoredTargets, rare_below: int) -> Iterator[Grouping]:
    """Yield the ways to group the evaluation targets of a partition, one after another: each takes memory.

    Args:
        items, sequences: the tables of the partition; `targets`: what was scored of them, in their order.
        rare_below: occurrences in training below which an item shares embedding rows.
    """
    yield _by_activity(targets.user_id)
    seen_T = items["train_occurrences"].to_numpy()[of_judged(sequences, "target_item_index")]
    names = [
        "new: not in training",
        f"rare: 1 to {rare_below - 1} times in training",
        f"{rare_below} times or more in training",
    ]
    yield Grouping("item", ((seen_T > 0).astype(np.int8) + (seen_T >= max(1, rare_below))), names)
    hour_T = targets.time_ms % MS_PER_DAY // (MS_PER_DAY // 24) // HOURS_A_GROUP
    starts = range(0, 24, HOURS_A_GROUP)
    yield Grouping("hour", hour_T.astype(np.int8), [f"{at:02d} to {at + HOURS_A_GROUP:02d} h UTC" for at in starts])
    yield _by_context(of_judged(sequences, "target_context"))


def metrics_of_groups(
    targets: ScoredTargets, scores: dict[str, np.ndarray], grouping: Grouping
) -> list[dict[str, Any]]:
    """Return of each group that has targets {"by", "group", "targets", "users", "models": {name: metrics}}."""
    found = []
    for number, name in enumerate(grouping.names):
        rows = grouping.group_T == number
        if not rows.any():
            continue
        label, user = targets.label[rows], targets.user_id[rows]
        found.append(
            {
                "by": grouping.by,
                "group": name,
                "targets": len(label),
                "users": len(np.unique(user)),
                "models": {model: figures(user, label, score[rows]) for model, score in scores.items()},
            }
        )
    return found


def _by_activity(user: np.ndarray) -> Grouping:
    """Group by thirds of the number of targets that a target's user has that day."""
    _, place_T = numbered(user)
    count_T = np.bincount(place_T)[place_T]
    group_T, names = np.zeros(len(user), np.int8), []
    for number, rows in enumerate(thirds(count_T)):
        group_T[rows] = number
        least, most = count_T[rows].min(), count_T[rows].max()
        names.append(f"{least:,} to {most:,} targets of the user")
    return Grouping("activity", group_T, names)


def _by_context(context: np.ndarray) -> Grouping:
    values, place_T, counts = np.unique(context, return_inverse=True, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")[:MOST_CONTEXTS]
    group_of_value = np.full(len(values), len(frequent), np.int8)
    group_of_value[frequent] = np.arange(len(frequent))
    names = [f"context {value}" if value >= 0 else "no context" for value in values[frequent].tolist()]
    return Grouping("context", group_of_value[place_T], [*names, "other contexts"])


def of_judged(sequences: pa.Table, name: str) -> np.ndarray:
    """Return a column of the evaluation targets, [T], in the order that they are scored in."""

    def flat(name: str) -> np.ndarray:
        return sequences[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)

    return flat(name)[flat("target_split") == EVALUATION]

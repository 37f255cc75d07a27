"""What only the evaluation day shows changes no trained weight, and has rows that training gave a meaning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import torch

from etl.warehouse.schemas import EVALUATION, SEQUENCES, TRAIN
from tests.training.conftest import DAY_MS, KUAIRAND_ITEMS, random_partition
from training.config import TrainConfig
from training.configs import tiny
from training.data import Sequences, trained_rows
from training.loop import TrainingData, Worker, train_model
from training.model.ranker import Ranker

CONFIG = dataclasses.replace(tiny.config(), validation_share=0.2)


def planted() -> tuple[tuple[pa.Table, pa.Table], tuple[pa.Table, pa.Table]]:
    """Return a partition, and the same with items, values, contexts, a user and events that its evaluation day alone
    has.
    """
    items, rows = random_partition(users=24, longest=40)
    known = [row | {"train_occurrences": row["train_occurrences"] + 1} for row in items.to_pylist()]
    index = len(known)
    new = [
        {
            "item_index": index + i,
            "item_id": 9_000 + i,
            "train_occurrences": 0,
            "author_id": 77 + i,
            "categories": [f"planted {i}"],
            "duration_ms": 1e12 + i,
            "item_type": "PLANTED",
            "upload_type": f"P{i}",
        }
        for i in range(9)
    ]
    users = rows.to_pylist()

    def with_planted(user: dict, number: int) -> dict:
        more = {"item_index": index + number % 9, "time_ms": DAY_MS + number}
        changed = {
            **user,
            "target_item_index": [*user["target_item_index"], more["item_index"]],
            "target_time_ms": [*user["target_time_ms"], more["time_ms"]],
            "target_label": [*user["target_label"], number % 2],
            "target_context": [*user["target_context"], 99],
            "target_is_random": [*user["target_is_random"], True],
            "target_split": [*user["target_split"], EVALUATION],
            "target_history_end": [*user["target_history_end"], len(user["history_time_ms"])],
        }
        return changed

    first = {name: [] for name in SEQUENCES.names if name.startswith(("history_", "target_"))}
    fresh = with_planted({"user_id": -5, "user_fields": ["planted", "too"], **first}, 3)
    more = [fresh, *(with_planted(user, number) for number, user in enumerate(users))]
    tables = [pa.Table.from_pylist(part, schema=KUAIRAND_ITEMS) for part in (known, known + new)]
    return (tables[0], pa.Table.from_pylist(users, schema=SEQUENCES)), (
        tables[1],
        pa.Table.from_pylist(more, schema=SEQUENCES),
    )


def trained(items: pa.Table, rows: pa.Table, config: TrainConfig = CONFIG) -> tuple[TrainingData, Ranker]:
    data = TrainingData.of(Sequences.from_arrow(rows), items, config)
    return data, train_model("vql", data, config, Worker(), lambda result: None)[0]


def test_what_only_the_evaluation_day_shows_changes_no_trained_weight():
    plain, more = planted()
    (_, quiet), (data, loud) = trained(*plain), trained(*more)
    assert (data.joined.sequences.target_split == EVALUATION).sum() > 24
    for (name, one), other in zip(quiet.state_dict().items(), loud.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_unseen_values_read_rows_that_mean_an_average_of_what_was_trained():
    data, model = trained(*planted()[1])
    items, users, contexts = trained_rows(data.joined, data.split.train)
    new = [row >= 40 for row in range(49)]
    for table, (name, rows) in zip(model.items.tables, items.items(), strict=True):
        unseen = np.setdiff1d(data.joined.items.rows[name][new], rows)
        if table.padding_idx is None and len(unseen):
            assert torch.allclose(
                table.weight[unseen], table.weight[rows].mean(0).expand(len(unseen), -1), atol=1e-6
            ), name
    assert torch.allclose(model.context.weight[0], model.context.weight[contexts].mean(0), atol=1e-6)
    assert data.joined.user_rows[data.joined.sequences.user_id == -5].tolist() == [[0, 0]]
    for table, rows in zip(model.user_fields, users, strict=True):
        assert torch.allclose(table.weight[0], table.weight[rows].mean(0), atol=1e-6)
    assert (data.joined.sequences.target_split == TRAIN).any()

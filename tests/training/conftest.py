"""A tiny partition in memory: random users, items and times, no Spark."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from etl.datasets.definition import dataset
from etl.warehouse.partitions import MS_PER_DAY, day_number
from etl.warehouse.schemas import EVALUATION, ITEMS, SEQUENCES, TRAIN, item_field_type
from training.config import ModelConfig, VocabularyConfig
from training.data import Joined, Sequences
from training.model.ranker import FieldSizes, Ranker
from training.user_batches import UserBatches
from training.vocabulary import Vocabulary

DT = "2022-04-21"
DAY_MS = day_number(DT) * MS_PER_DAY
KUAIRAND_ITEMS = pa.schema(
    [*ITEMS, *[pa.field(name, item_field_type(rule.kind)) for name, rule in dataset("kuairand").item_fields.items()]]
)


def random_partition(users: int = 6, items: int = 40, longest: int = 60, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    rng = np.random.default_rng(seed)
    start = DAY_MS - 10 * MS_PER_DAY
    item_rows = [
        {
            "item_index": i,
            "item_id": 1000 + 7 * i,
            "train_occurrences": int(rng.integers(0, 12)),
            "author_id": None if i % 9 == 0 else int(rng.integers(0, 8)),
            "categories": [str(c) for c in rng.choice(12, rng.integers(0, 3), replace=False)],
            "duration_ms": None if i % 7 == 0 else float(rng.integers(0, 90_000)),
            "item_type": "NORMAL" if i % 5 else None,
            "upload_type": "A" if i % 2 else "B",
        }
        for i in range(items)
    ]
    rows = []
    for user in range(users):
        length = 0 if user == 0 else int(rng.integers(1, longest))
        times = np.sort(start + rng.integers(0, 11 * MS_PER_DAY // 60_000, length) * 60_000)
        target_times = np.sort(start + rng.integers(0, 11 * MS_PER_DAY // 60_000, 8) * 60_000)
        rows.append(
            {
                "user_id": user,
                "user_fields": ["x" if user % 2 else "y", ""],
                "history_item_index": rng.integers(0, items, length).tolist(),
                "history_time_ms": times.tolist(),
                "history_feedback": rng.integers(0, 256, length).tolist(),
                "history_watch_bucket": rng.integers(0, 10, length).tolist(),
                "target_item_index": rng.integers(0, items, 8).tolist(),
                "target_time_ms": target_times.tolist(),
                "target_label": rng.integers(0, 2, 8).tolist(),
                "target_context": rng.integers(-1, 15, 8).tolist(),
                "target_is_random": [n == user % 8 for n in range(8)],
                "target_split": np.where(target_times >= DAY_MS, EVALUATION, TRAIN).tolist(),
                "target_history_end": np.searchsorted(times, target_times, side="left").tolist(),
            }
        )
    return pa.Table.from_pylist(item_rows, schema=KUAIRAND_ITEMS), pa.Table.from_pylist(rows, schema=SEQUENCES)


@pytest.fixture
def partition() -> tuple[pa.Table, pa.Table]:
    return random_partition()


def vocabulary_of(items: pa.Table, sequences: Sequences) -> Vocabulary:
    """Build as `training.train` does: contexts are those of training targets."""
    fields = [np.array(values, dtype=object) for values in zip(*sequences.user_fields, strict=True)]
    return Vocabulary.build(
        items, fields, sequences.target_context[sequences.target_split == TRAIN], VocabularyConfig()
    )


@pytest.fixture
def loaded(partition):
    """(sequences, vocabulary, batches over all users)."""
    items, rows = partition
    sequences = Sequences.from_arrow(rows)
    vocabulary = vocabulary_of(items, sequences)
    return sequences, vocabulary, UserBatches(Joined.of(sequences, items, vocabulary), 0, 1, users_per_step=16, seed=0)


@pytest.fixture
def make_model(loaded):
    import torch

    def make(interest: str = "vql", **settings) -> Ranker:
        torch.manual_seed(1)
        model = Ranker(FieldSizes.of(loaded[1]), ModelConfig(interest=interest, codes=16, **settings)).eval()
        if model.coded is not None:
            model.coded.quantizer.started.fill_(1)
        return model

    return make

"""A tiny partition in memory: random users, items and times, no Spark."""

from __future__ import annotations

import pyarrow as pa
import pytest

from etl.datasets.definition import dataset
from etl.warehouse.schemas import ITEMS, item_field_type
from tests.training.partitions import DAY_MS, DT, random_partition, vocabulary_of
from training.config import ModelConfig
from training.data import Joined, Sequences
from training.model.ranker import FieldSizes, Ranker
from training.user_batches import UserBatches

__all__ = ["DAY_MS", "DT", "KUAIRAND_ITEMS", "random_partition", "vocabulary_of"]
KUAIRAND_ITEMS = pa.schema(
    [*ITEMS, *[pa.field(name, item_field_type(rule.kind)) for name, rule in dataset("kuairand").item_fields.items()]]
)


@pytest.fixture
def partition() -> tuple[pa.Table, pa.Table]:
    return random_partition()


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

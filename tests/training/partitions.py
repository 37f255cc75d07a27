"""A tiny partition: random users, items and times, in memory and published. Needs neither Spark nor pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from etl.warehouse.partitions import MS_PER_DAY, day_number
from etl.warehouse.schemas import EVALUATION, ITEMS, SEQUENCES, TRAIN, item_field_type, schema_fingerprint
from etl.warehouse.store import Manifest, TableStore
from training.config import ModelConfig, VocabularyConfig
from training.data import Sequences
from training.model.ranker import FieldSizes, Ranker
from training.package import Cutoff, save_package
from training.scoring import request_of
from training.vocabulary import Vocabulary

DT = "2022-04-21"
DAY_MS = day_number(DT) * MS_PER_DAY
FIELDS = {"author_id": "id", "categories": "categories", "duration_ms": "number"} | dict.fromkeys(
    ("item_type", "upload_type"), "category"
)
ITEMS_OF_KUAIRAND = pa.schema([*ITEMS, *(pa.field(name, item_field_type(kind)) for name, kind in FIELDS.items())])


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
    return pa.Table.from_pylist(item_rows, schema=ITEMS_OF_KUAIRAND), pa.Table.from_pylist(rows, schema=SEQUENCES)


def vocabulary_of(items: pa.Table, sequences: Sequences) -> Vocabulary:
    """Build as `training.train` does: contexts are those of training targets."""
    fields = [np.array(values, dtype=object) for values in zip(*sequences.user_fields, strict=True)]
    return Vocabulary.build(
        items, fields, sequences.target_context[sequences.target_split == TRAIN], VocabularyConfig()
    )


def published(
    folder: Path, partition: tuple[pa.Table, pa.Table], buckets: int, dataset: str = "kuairand"
) -> TableStore:
    """Publish items and sequences in a warehouse below a folder, the users dealt out to so many buckets."""
    store, (items, sequences) = TableStore(str(folder / "warehouse"), "kuairand"), partition
    settings = {"cutoff": "event", "availability_lag_ms": 0, "max_events": 50}
    publish(store, "items", [items], {})
    publish(
        store, "sequences", [sequences.take(np.arange(n, len(sequences), buckets)) for n in range(buckets)], settings
    )
    return store


def publish(store: TableStore, table: str, parts: list[pa.Table], settings: Mapping[str, Any]) -> None:
    """Publish a table of the day, a bucket a part."""
    work = store.begin_try("setup", [table], [DT])
    files = tuple(store.write_file(work, table, DT, bucket, rows) for bucket, rows in enumerate(parts))
    made_by = (schema_fingerprint(parts[0].schema), "test")
    manifest = Manifest(store.dataset, table, DT, "setup", *made_by, files, settings=settings)
    store.write_staged_manifest(work, manifest)
    store.publish("setup", table, DT)


def packaged(folder: Path, partition: tuple[pa.Table, pa.Table], config: ModelConfig, seed: int = 1) -> str:
    """Save an untrained model's package in a folder, whose path is returned."""
    items, sequences = partition[0], Sequences.from_arrow(partition[1])
    vocabulary = vocabulary_of(items, sequences)
    torch.manual_seed(seed)
    model = Ranker(FieldSizes.of(vocabulary), config).eval()
    if model.coded is not None:
        model.coded.quantizer.started.fill_(1)
    save_package(folder, model, vocabulary, Cutoff(max_events=50), request_of(items, sequences, 2))
    return str(folder)

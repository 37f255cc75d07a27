"""The caches of a bucket's users: what a worker makes of them, and writes.

Imports neither the registry nor the gates, so that it runs where a model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from etl.stage.errors import StageError
from etl.stage.folder import Folder
from etl.warehouse.partitions import MS_PER_DAY, day_number
from etl.warehouse.schemas import USER_CACHES, history_first
from etl.warehouse.store import DataFile, Manifest, TableStore, Try
from evaluation.spread import Bucket
from training.data import Joined, Sequences, make_batch
from training.model.ranker import Ranker
from training.package import load_package

USERS_PER_CHUNK = 64


@dataclass(frozen=True)
class CacheBuilding:
    """What workers are asked for: a staged file with the cache of every user of a bucket.

    Attributes:
        warehouse: root of the tables.
        package: address of the model's package, which every worker reaches.
        staging: the try that the files belong to.
    """

    warehouse: str
    items: Manifest
    sequences: Manifest
    package: str
    staging: Try

    def begin(self, device: str) -> Callable[[Bucket], DataFile]:
        """Load the model. Raises: StageError: it has no codebook, so there are no caches."""
        store = TableStore(self.warehouse, self.sequences.dataset)
        with Folder(self.package, "the package").read_locally() as package:
            model, vocabulary, cutoff = load_package(package)
        if model.coded is None:
            raise StageError(
                f"the model in {self.package} has no codebook, so its users have no caches", "promote a VQL model"
            )
        model = model.to(device)
        features = vocabulary.item_features(store.read(self.items))

        def built(bucket: Bucket) -> DataFile:
            sequences = Sequences.from_arrow(store.read_files(bucket))
            joined = Joined.of(at_the_end(sequences, cutoff.max_events), features, vocabulary)
            rows = caches_of(model, joined, (day_number(self.sequences.dt) + 1) * MS_PER_DAY)
            return store.write_file(self.staging, "user_caches", self.sequences.dt, bucket[0].bucket, rows)

        return built


@torch.no_grad()
def caches_of(model: Ranker, joined: Joined, reference_time_ms: int) -> pa.Table:
    """Return the rows of `user_caches` of all users of some rows, made on the model's device."""
    device, users = str(next(model.parameters()).device), joined.sequences.users
    counts, means = [], []
    for start in range(0, users, USERS_PER_CHUNK):
        some = np.arange(start, min(start + USERS_PER_CHUNK, users))
        batch = make_batch(joined, some, [np.array([user]) for user in some])
        for cache in model.user_caches(batch.to(device), reference_time_ms):
            counts.append(cache.log_count_HMC.flatten().cpu().numpy())
            means.append(cache.mean_HMCd.flatten().cpu().numpy().astype(np.float16))
    return pa.table(
        {
            "user_id": pa.array(joined.sequences.user_id, pa.int64()),
            "reference_time_ms": pa.array([reference_time_ms] * users, pa.int64()),
            "log_counts": pa.array(counts, pa.list_(pa.float32())),
            "value_means": pa.array(means, pa.list_(pa.float16())),
        },
        schema=USER_CACHES,
    )


def at_the_end(sequences: Sequences, max_events: int | None) -> Sequences:
    """Give each user one pseudo target at the end of the history, so that a batch has the latest `max_events` of it.

    Args:
        max_events: None: all.
    """
    lengths = np.diff(sequences.history_start)
    users = sequences.users
    zeros = np.zeros(users, np.int64)
    return replace(
        sequences,
        target_start=np.arange(users + 1),
        target_item=zeros,
        target_time_ms=zeros,
        target_label=zeros,
        target_context=zeros,
        target_split=zeros,
        target_first=zeros if max_events is None else history_first(lengths, max_events),
        target_end=lengths,
    )

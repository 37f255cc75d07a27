"""Scores from a model package: a partition's targets for evaluation, or one request with raw ids for serving."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from etl.stage.errors import StageError
from etl.warehouse.schemas import EVALUATION, WATCH_BUCKETS
from training.data import Joined, Sequences, make_batch
from training.device_batches import DeviceRows
from training.model.ranker import Ranker
from training.package import Cutoff, load_package
from training.user_batches import UserBatches
from training.vocabulary import ItemFeatures, Vocabulary

DEVICES = AUTO, CPU, CUDA = "auto", "cpu", "cuda"


@dataclass(frozen=True)
class ScoredTargets:
    """One row a target, in (user, target) order.

    Attributes:
        user_id, item_id, time_ms: int64 [T]; label: int8 [T]; score: float32 [T], probability of the label.
        history_length: int32 [T], events that the target could see.
    """

    user_id: np.ndarray
    item_id: np.ndarray
    time_ms: np.ndarray
    label: np.ndarray
    score: np.ndarray
    history_length: np.ndarray


class Scorer:
    """A loaded package, on a device."""

    def __init__(self, folder: Path, model: Ranker, vocabulary: Vocabulary, cutoff: Cutoff) -> None:
        self.folder, self.model, self.vocabulary, self.cutoff = folder, model, vocabulary, cutoff

    @property
    def device(self) -> str:
        return str(next(self.model.parameters()).device)

    def score(self, items: pa.Table, sequences: pa.Table, features: ItemFeatures | None = None) -> ScoredTargets:
        """Score every evaluation target of a partition, or of some rows of it (its `items`, of `sequences` these rows).

        A target sees what is stored before its cut-off, and of that as much as the package's own rule lets it see.

        Args:
            features: what the vocabulary makes of the items, where that is known.
        """
        flat = Sequences.from_arrow(sequences, self.cutoff.max_events)
        joined = Joined.of(flat, items if features is None else features, self.vocabulary)
        return score_joined(self.model, joined, items["item_id"].to_numpy())

    @torch.no_grad()
    def score_request(self, request: dict) -> np.ndarray:
        """Score the candidates of one user.

        Args:
            request: lists `history_item_id`, `history_time_ms` (ascending), `history_feedback`, `history_watch_bucket`,
                `user_fields`, `target_item_id`, `target_time_ms`, `target_context`. A target sees the events that the
                training's cut-off rule lets it see, whatever the caller sends.

        Returns:
            float32 [targets], probabilities.
        """
        history_ids = np.asarray(request["history_item_id"], dtype=np.int64)
        target_ids = np.asarray(request["target_item_id"], dtype=np.int64)
        ids, index = np.unique(np.concatenate([history_ids, target_ids]), return_inverse=True)
        times = np.asarray(request["history_time_ms"], dtype=np.int64)
        target_times = np.asarray(request["target_time_ms"], dtype=np.int64)
        ends = np.searchsorted(times, self.cutoff.of(target_times), side="left")
        one = lambda name, kind: pa.array([list(request[name])], pa.list_(kind))  # noqa: E731
        row = pa.table(
            {
                "user_id": pa.array([0], pa.int64()),
                "user_fields": pa.array([list(request["user_fields"])], pa.list_(pa.string())),
                "history_item_index": pa.array([index[: len(history_ids)].tolist()], pa.list_(pa.int32())),
                "history_time_ms": one("history_time_ms", pa.int64()),
                "history_feedback": one("history_feedback", pa.int16()),
                "history_watch_bucket": one("history_watch_bucket", pa.int8()),
                "target_item_index": pa.array([index[len(history_ids) :].tolist()], pa.list_(pa.int32())),
                "target_time_ms": one("target_time_ms", pa.int64()),
                "target_label": pa.array([[0] * len(target_ids)], pa.list_(pa.int8())),
                "target_context": one("target_context", pa.int16()),
                "target_split": pa.array([[EVALUATION] * len(target_ids)], pa.list_(pa.int8())),
                "target_history_end": pa.array([ends.tolist()], pa.list_(pa.int32())),
            }
        )
        flat = Sequences.from_arrow(row, self.cutoff.max_events)
        joined = Joined.of(flat, self.vocabulary.item_table_of(ids), self.vocabulary)
        batch = make_batch(joined, np.array([0]), [np.arange(len(target_ids))])
        return torch.sigmoid(self.model(batch.to(self.device))[0]).float().cpu().numpy()

    def example_request(self) -> dict:
        """Return the request that the package carries as its input example."""
        return json.loads((self.folder / "example_request.json").read_text())


@torch.no_grad()
def score_joined(model: Ranker, joined: Joined, item_id: np.ndarray) -> ScoredTargets:
    """Score every evaluation target of joined rows, on the device that the model is on.

    Args:
        item_id: int64 [N], of the partition's items.
    """
    flat, device = joined.sequences, str(next(model.parameters()).device)
    targets = np.flatnonzero(flat.target_split == EVALUATION)
    batches = UserBatches(joined, 0, 1, users_per_step=32, seed=0)
    if (rows := DeviceRows.on_gpu(joined, torch.device(device))) is not None:
        batches.make = rows.make_batch
    scores = [torch.sigmoid(model(batch.to(device))[0]).float().cpu().numpy() for batch in batches.all_of(targets)]
    owner = np.searchsorted(flat.target_start, targets, side="right") - 1
    return ScoredTargets(
        user_id=flat.user_id[owner],
        item_id=item_id[flat.target_item[targets]],
        time_ms=flat.target_time_ms[targets],
        label=flat.target_label[targets],
        score=np.concatenate(scores) if scores else np.zeros(0, np.float32),
        history_length=flat.target_end[targets] - flat.target_first[targets],
    )


def load_scorer(folder: str | Path, device: str = CPU) -> Scorer:
    """Load a package for scoring on a device of torch."""
    model, vocabulary, cutoff = load_package(Path(folder))
    return Scorer(Path(folder), model.to(device), vocabulary, cutoff)


def device_of(wanted: str) -> str:
    """Return the device of torch that this process scores on.

    Args:
        wanted: of `DEVICES`; auto: a GPU where this process sees one.

    Raises:
        StageError: a GPU is wanted, and there is none.
    """
    seen = torch.cuda.is_available()
    if wanted == CUDA and not seen:
        raise StageError(
            "--device cuda: this process sees no GPU", "give --device auto, or look at CUDA_VISIBLE_DEVICES"
        )
    return CUDA if seen and wanted != CPU else CPU


def request_of(items: pa.Table, sequences: Sequences, user: int, max_targets: int = 20) -> dict:
    """Return the scoring request of one user of a partition: the history and the evaluation targets."""
    targets = np.arange(*sequences.targets_of(user).indices(len(sequences.target_item)))
    targets = targets[sequences.target_split[targets] == EVALUATION][:max_targets]
    first = int(sequences.target_first[targets].min()) if len(targets) else 0
    events = slice(
        *(
            int(sequences.history_start[user]) + place
            for place in (first, int(sequences.target_end[targets].max(initial=0)))
        )
    )
    ids = items["item_id"].to_numpy()
    return {
        "history_item_id": ids[sequences.history_item[events]].tolist(),
        "history_time_ms": sequences.history_time_ms[events].tolist(),
        "history_feedback": (sequences.history_interaction[events] // WATCH_BUCKETS).tolist(),
        "history_watch_bucket": (sequences.history_interaction[events] % WATCH_BUCKETS).tolist(),
        "user_fields": list(sequences.user_fields[user]),
        "target_item_id": ids[sequences.target_item[targets]].tolist(),
        "target_time_ms": sequences.target_time_ms[targets].tolist(),
        "target_context": sequences.target_context[targets].tolist(),
    }

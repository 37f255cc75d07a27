"""Scores of a partition's own day by several models: made bucket by bucket, kept in one file of an attempt's folder.

    RUNS/<attempt>/scores.parquet              one row a target, in the order of `sequences`, one column a model
    RUNS/<attempt>/scores/<bucket>.parquet     of one bucket; written by whoever scored it, joined, and removed

Legend: T evaluation targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.stage.commands import log
from etl.stage.errors import StageError, TryAgainError
from etl.stage.folder import Folder
from etl.warehouse.manifests import Manifest
from etl.warehouse.schemas import EVALUATION
from etl.warehouse.store import TableStore
from evaluation.metrics import CHUNK
from evaluation.spread import IN_THIS_PROCESS, Bucket, Spread, each_bucket
from training.data import Sequences, target_is_random
from training.package import Cutoff
from training.scoring import Scorer, load_scorer
from training.vocabulary import ItemFeatures

SCORES_FILE, PARTS = "scores.parquet", "scores"
# Of each target, beside the scores: what its groups are made from, so that no history is read again.
TARGET_COLUMNS = {
    "user_id": pa.int64(),
    "item_id": pa.int64(),
    "time_ms": pa.int64(),
    "label": pa.int8(),
    "history_length": pa.int32(),
    "is_random": pa.bool_(),
    "context": pa.int16(),
    "train_occurrences": pa.int64(),
}


Made = TypeVar("Made")


@dataclass(frozen=True)
class Part:
    """What a worker has written of one bucket.

    Attributes:
        name: of the file in the attempt's folder.
        failed: model -> why it could not score; of those whose failure is no failure of the stage.
    """

    name: str
    rows: int
    failed: Mapping[str, str]


@dataclass(frozen=True)
class DayScoring:
    """What workers are asked for: the scores of every model on the evaluation targets of a bucket.

    Attributes:
        warehouse: root of the tables.
        packages: model -> address of its package, which every worker reaches.
        excused: models that may fail, such as a champion of another time.
        run_dir: address of the attempt's folder.
    """

    warehouse: str
    items: Manifest
    sequences: Manifest
    packages: Mapping[str, str]
    excused: frozenset[str]
    run_dir: str

    def begin(self, device: str) -> Callable[[Bucket], Part]:
        return _DayScorer(self, device).part_of


class _DayScorer:
    """Models on a device, and the partition's items as each vocabulary has them."""

    def __init__(self, asked: DayScoring, device: str) -> None:
        self.asked, self.run_dir = asked, Folder(asked.run_dir, "--runs")
        self.store = TableStore(asked.warehouse, asked.sequences.dataset)
        items = self.store.read(asked.items)
        self.failed: dict[str, str] = {}
        self.scorers: dict[str, tuple[Scorer, ItemFeatures]] = {}
        features: dict[str, ItemFeatures] = {}  # the models of one training share a vocabulary
        for name, address in asked.packages.items():

            def loaded(address: str = address) -> tuple[Scorer, ItemFeatures]:
                with Folder(address, "the package").read_locally() as package:
                    scorer = load_scorer(package, device)
                digest = scorer.vocabulary.digest
                if digest not in features:
                    features[digest] = scorer.vocabulary.item_features(items)
                return scorer, features[digest]

            if (found := self._excusing(name, loaded)) is not None:
                self.scorers[name] = found
        self.items = items.select(["item_id", "train_occurrences"])

    def part_of(self, bucket: Bucket) -> Part:
        """Score a bucket and write its file."""
        rows = self.store.read_files(bucket)
        columns: dict[str, np.ndarray] = targets_of(rows, self.items, self.asked.sequences)
        for name, (scorer, features) in self.scorers.items():

            def scored(scorer: Scorer = scorer, features: ItemFeatures = features) -> np.ndarray:
                return scorer.score(self.items, rows, features).score

            if name not in self.failed and (score := self._excusing(name, scored)) is not None:
                columns[name] = score
        table = pa.table({name: pa.array(column, TARGET_COLUMNS.get(name)) for name, column in columns.items()})
        name = f"{bucket[0].bucket:05d}.parquet"
        with self.run_dir.below(PARTS).written(name) as path:
            pq.write_table(table, path)
        return Part(f"{PARTS}/{name}", table.num_rows, dict(self.failed))

    def _excusing(self, name: str, make: Callable[[], Made]) -> Made | None:
        """Return what `make` does for a model; None, and why, where it fails and may."""
        try:
            return make()
        except TryAgainError:
            raise  # says nothing of the model
        except Exception as error:
            if name not in self.asked.excused:
                raise
            self.failed[name] = f"{type(error).__name__}: {getattr(error, 'what', error)}"
            return None


def targets_of(rows: pa.Table, items: pa.Table, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return `TARGET_COLUMNS` of the evaluation targets in some rows of `sequences`, in their order.

    Args:
        manifest: of `sequences`: its rule says how much of its history a target sees.
    """
    flat = Sequences.from_arrow(rows, Cutoff.of_settings(manifest.settings).max_events)
    judged = np.flatnonzero(flat.target_split == EVALUATION)
    owner, item = np.searchsorted(flat.target_start, judged, side="right") - 1, flat.target_item[judged]
    return {
        "user_id": flat.user_id[owner],
        "item_id": items["item_id"].to_numpy()[item],
        "time_ms": flat.target_time_ms[judged],
        "label": flat.target_label[judged],
        "history_length": flat.target_end[judged] - flat.target_first[judged],
        "is_random": target_is_random(rows)[judged],
        "context": flat.target_context[judged],
        "train_occurrences": items["train_occurrences"].to_numpy()[item],
    }


def score_day(
    store: TableStore,
    dt: str,
    run_dir: Folder,
    packages: Mapping[str, str],
    excused: Iterable[str] = (),
    keep: Sequence[str] = (),
    spread: Spread = IN_THIS_PROCESS,
) -> dict[str, str]:
    """Score a published partition's evaluation targets and write `scores.parquet`.

    Args:
        packages, excused: as of `DayScoring`.
        keep: models whose columns stay as the file has them.

    Returns:
        model -> why it could not score, of those excused; they have no column.

    Raises:
        StageError: a model cannot score; or what was kept is of other rows.
    """
    items, sequences = store.require("items", dt), store.require("sequences", dt)
    asked = DayScoring(store.warehouse, items, sequences, packages, frozenset(excused), run_dir.address)
    kept = DayScores(run_dir).table(keep) if keep else pa.table({})
    parts = each_bucket(asked, sequences, spread, run_dir.root.rsplit("/", 1)[-1])
    failed = {name: why for part in parts for name, why in part.failed.items()}
    columns = [name for name in packages if name not in failed]
    rows = sum(part.rows for part in parts)
    if keep and kept.num_rows != rows:
        raise StageError(
            f"{run_dir.address_of(SCORES_FILE)} has {kept.num_rows:,} targets, sequences of dt={dt} have {rows:,}: they"
            " were published anew since",
            "run evaluation.evaluate with the same --attempt and --runs again",
        )
    with run_dir.written(SCORES_FILE) as path:
        _join(run_dir, parts, columns, kept, path)
    for part in parts:
        run_dir.forget(part.name)
    log(f"scored {rows:,} targets of {dt} with {', '.join(packages)}")
    return failed


def _join(run_dir: Folder, parts: Sequence[Part], models: Sequence[str], kept: pa.Table, path: Path) -> None:
    """Write the rows of all parts into one file, a part at a time."""
    fields = {**TARGET_COLUMNS, **dict.fromkeys([*kept.column_names, *models], pa.float32())}
    schema, begin = pa.schema(list(fields.items())), 0
    with pq.ParquetWriter(path, schema) as writer:
        for part in parts:
            with run_dir.read_locally(part.name) as file:
                rows = pq.read_table(file, columns=[*TARGET_COLUMNS, *models])
            for name in kept.column_names:
                rows = rows.append_column(name, kept[name].slice(begin, part.rows))
            begin += part.rows
            writer.write_table(rows.select(schema.names))


class DayScores:
    """The file of scores of an attempt, read a column at a time: 100 million targets are 4 GB with all columns.

    Args:
        run_dir: the attempt's folder.
    """

    def __init__(self, run_dir: Folder) -> None:
        self.run_dir = run_dir

    @property
    def models(self) -> list[str]:
        """The models that have scores."""
        schema = pq.read_schema(f"{self.run_dir.root}/{SCORES_FILE}", filesystem=self.run_dir.fs)
        return [name for name in schema.names if name not in TARGET_COLUMNS]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return whole columns."""
        path = f"{self.run_dir.root}/{SCORES_FILE}"
        return pq.read_table(path, filesystem=self.run_dir.fs, columns=None if columns is None else list(columns))

    def column(self, name: str, made: Callable[[np.ndarray], np.ndarray] = lambda chunk: chunk) -> np.ndarray:
        """Return what is made of a column, [T]; of never more than a part of it at once.

        Args:
            made: of each value one, for some of them; of none, too.
        """
        with (
            self.run_dir.fs.open_input_file(f"{self.run_dir.root}/{SCORES_FILE}") as stream,
            closing(pq.ParquetFile(stream)) as file,
        ):
            none = file.schema_arrow.empty_table()[name].to_numpy()
            found, end = np.empty(file.metadata.num_rows, made(none).dtype), 0
            for batch in file.iter_batches(CHUNK, columns=[name]):
                found[end : end + len(batch)] = made(batch[name].to_numpy(zero_copy_only=False))
                end += len(batch)
        return found

"""The scores of a day and the caches of its users, bucket by bucket: the same bits, whoever makes them.

On a GPU, without Ray, Spark and pydantic: python -m pytest --noconftest tests/evaluation/test_day_scores.py
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from etl.stage.errors import StageError, TryAgainError
from etl.stage.folder import Folder
from etl.warehouse.schemas import EVALUATION
from etl.warehouse.store import DataFile, TableStore
from evaluation.cache_building import CacheBuilding
from evaluation.day_scores import SCORES_FILE, DayScores, score_day, targets_of
from evaluation.spread import Bucket, Spread, each_bucket
from tests.training.partitions import DT, packaged, published, random_partition
from training.config import ModelConfig
from training.scoring import CPU, CUDA, load_scorer

BUCKETS, USERS = 5, 40
KINDS = {
    "vql": ModelConfig(codes=16),
    "refined": ModelConfig(codes=16, refine_k=8),
    "recent": ModelConfig(codes=16, recent_window=20),
    "exact": ModelConfig(interest="softmax_attention"),
    "din": ModelConfig(interest="din", recent_window=40),
    "mean_pooling": ModelConfig(interest="mean_pooling"),
}
NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Partition = tuple[pa.Table, pa.Table]


@pytest.fixture(scope="module")
def partition() -> Partition:
    return random_partition(users=USERS, items=300, longest=400)


@pytest.fixture
def store(tmp_path: Path, partition: Partition) -> TableStore:
    return published(tmp_path, partition, BUCKETS)


@pytest.fixture
def packages(tmp_path: Path, partition: Partition) -> dict[str, str]:
    return {name: packaged(tmp_path / name, partition, config) for name, config in KINDS.items()}


def run_dir_of(store: TableStore, name: str) -> Folder:
    return Folder(f"{store.root}/runs/{name}", "--runs")


def scores_of(store: TableStore, packages: dict[str, str], spread: Spread, name: str) -> pa.Table:
    assert score_day(store, DT, run_dir_of(store, name), packages, spread=spread) == {}
    return DayScores(run_dir_of(store, name)).table()


def caches_of(store: TableStore, package: str, spread: Spread, attempt: str) -> list[DataFile]:
    sequences = store.require("sequences", DT)
    staging = store.begin_try(attempt, ["user_caches"], [DT], DT)
    work = CacheBuilding(store.warehouse, store.require("items", DT), sequences, package, staging)
    return each_bucket(work, sequences, spread, attempt)


def test_every_evaluation_target_has_one_row_with_what_its_own_history_says(store, packages, partition):
    items, sequences = partition
    found = scores_of(store, packages, Spread(device=CPU), "a")
    expected = []
    for bucket in range(BUCKETS):
        for row in sequences.take(np.arange(bucket, USERS, BUCKETS)).to_pylist():
            for place in np.flatnonzero(np.array(row["target_split"]) == EVALUATION):
                item = row["target_item_index"][place]
                expected.append(
                    {
                        "user_id": row["user_id"],
                        "item_id": items["item_id"][item].as_py(),
                        "time_ms": row["target_time_ms"][place],
                        "label": row["target_label"][place],
                        "history_length": min(row["target_history_end"][place], 50),
                        "is_random": row["target_is_random"][place],
                        "context": row["target_context"][place],
                        "train_occurrences": items["train_occurrences"][item].as_py(),
                    }
                )
    assert found.select(list(expected[0])).to_pylist() == expected
    order = pc.sort_indices(found, [("user_id", "ascending"), ("time_ms", "ascending")])
    for name in KINDS:  # a bucket by itself rounds otherwise than all users at once, and no more than that
        together = load_scorer(packages[name]).score(items, sequences)
        assert np.abs(found[name].take(order).to_numpy() - together.score).max() < 1e-6
    assert run_dir_of(store, "a").names() == ["scores", SCORES_FILE] and not run_dir_of(store, "a").files("scores")


def test_an_older_partition_does_not_say_what_chance_exposed(store, partition):
    items, sequences = partition
    manifest = store.require("sequences", DT)
    columns = targets_of(sequences.drop_columns("target_is_random"), items, manifest)
    assert not columns["is_random"].any() and targets_of(sequences, items, manifest)["is_random"].any()


def test_a_champion_that_cannot_score_has_no_column_and_a_model_of_the_attempt_stops_the_stage(store, packages):
    run_dir, mine = run_dir_of(store, "a"), {"vql": packages["vql"]}
    gone = {"champion": f"{store.root}/nowhere"}
    failed = score_day(store, DT, run_dir, mine | gone, excused=gone, spread=Spread(device=CPU))
    assert list(failed) == ["champion"] and "holds no model package" in failed["champion"]
    assert DayScores(run_dir).models == ["vql"]
    with pytest.raises(StageError, match="holds no model package"):
        score_day(store, DT, run_dir, mine | gone, spread=Spread(device=CPU))


def test_a_champion_is_scored_anew_beside_scores_that_stay_and_never_beside_those_of_other_rows(
    tmp_path, store, packages, partition
):
    run_dir, here = run_dir_of(store, "a"), Spread(device=CPU)
    before = scores_of(store, {"vql": packages["vql"], "champion": packages["exact"]}, here, "a")
    score_day(store, DT, run_dir, {"champion": packages["din"]}, excused=["champion"], keep=["vql"], spread=here)
    after = DayScores(run_dir).table()
    assert after.drop_columns("champion") == before.drop_columns("champion")
    assert after["champion"] == scores_of(store, {"din": packages["din"]}, here, "b")["din"]
    other = published(tmp_path, random_partition(users=USERS // 2, items=300, longest=400), BUCKETS)
    with pytest.raises(StageError, match=rf"has {len(after):,} targets, sequences of dt={DT} have "):
        score_day(other, DT, run_dir, {"champion": packages["din"]}, keep=["vql"], spread=here)


def test_a_file_that_cannot_be_read_is_named(store, packages):
    file = store.require("sequences", DT).files[3]
    Path(store.root, file.path).write_bytes(b"no parquet")
    with pytest.raises((StageError, RuntimeError), match=file.path):
        scores_of(store, {"vql": packages["vql"]}, Spread(device=CPU), "a")


@dataclass(frozen=True)
class Dying:
    """Kills its process at one of the buckets, the first time or every time."""

    folder: str
    always: bool

    def begin(self, device: str) -> Callable[[Bucket], tuple[int, str, int]]:
        def counted(bucket: Bucket) -> tuple[int, str, int]:
            marker = Path(self.folder, "died")
            if bucket[0].bucket == 2 and (self.always or not marker.exists()):
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return bucket[0].bucket, device, torch.get_num_threads()

        return counted


@pytest.mark.slow
@pytest.mark.ray
def test_any_number_of_workers_makes_the_same_bits_and_a_lost_one_is_replaced(tmp_path, store, packages):
    spreads = [Spread(workers, workers, CPU) for workers in (0, 1, 2, 3)]
    found = [scores_of(store, packages, spread, f"of-{spread.most}") for spread in spreads]
    assert all(other == found[0] for other in found[1:])
    caches = [caches_of(store, packages["vql"], spread, f"of-{spread.most}") for spread in spreads]
    of = lambda files: [(file.bucket, file.rows, file.digest) for file in files]  # noqa: E731
    assert all(of(other) == of(caches[0]) for other in caches[1:])
    assert sum(file.rows for file in caches[0]) == USERS

    sequences = store.require("sequences", DT)
    made = each_bucket(Dying(str(tmp_path), always=False), sequences, Spread(2, 2, CPU), "dying")
    assert [bucket for bucket, *_ in made] == list(range(BUCKETS)) and {device for _, device, _ in made} == {CPU}
    named = sequences.files[2].path
    with pytest.raises(TryAgainError, match=f"{named}: the worker that had it was lost, 5 times"):
        each_bucket(Dying(str(tmp_path), always=True), sequences, Spread(2, 2, CPU), "dying")
    Path(store.root, named).write_bytes(b"no parquet")
    with pytest.raises((StageError, RuntimeError), match=named):
        scores_of(store, {"vql": packages["vql"]}, Spread(2, 2, CPU), "a")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_is_said(store, packages):
    with pytest.raises(StageError, match="--device cuda: this process sees no GPU"):
        scores_of(store, packages, Spread(device=CUDA), "a")


@NEEDS_A_GPU
def test_a_gpu_scores_as_a_cpu_does_within_what_the_mechanical_gate_allows(tmp_path, record_property):
    partition = random_partition(users=1_000, items=3_000, longest=3_000)
    store = published(tmp_path, partition, 3)
    packages = {name: packaged(tmp_path / name, partition, config) for name, config in KINDS.items()}
    on = {device: scores_of(store, packages, Spread(device=device), device) for device in (CPU, CUDA)}
    assert len(on[CPU]) > 100 and on[CPU].drop_columns(list(KINDS)) == on[CUDA].drop_columns(list(KINDS))
    for name in KINDS:
        difference = np.abs(on[CPU][name].to_numpy() - on[CUDA][name].to_numpy())
        record_property(name, f"{difference.max():.1e}")
        print(name, f"largest difference {difference.max():.2e}, median {np.median(difference):.1e}")
        assert difference.max() < 1e-5
    files = {device: caches_of(store, packages["vql"], Spread(device=device), device) for device in (CPU, CUDA)}
    for one, other in zip(files[CPU], files[CUDA], strict=True):
        mine, theirs = (pq.read_table(f"{store.root}/{file.path}") for file in (one, other))
        assert mine["user_id"] == theirs["user_id"]
        for column, most in (("log_counts", 1e-4), ("value_means", 2e-3)):
            a, b = (rows[column].combine_chunks().flatten().to_numpy().astype(np.float64) for rows in (mine, theirs))
            assert np.array_equal(np.isinf(a), np.isinf(b))
            assert np.abs(a - b)[~np.isinf(a)].max() < most

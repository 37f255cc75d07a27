"""The whole model: caches, padding-free batches, requests with raw ids, packages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from etl.partitions import MS_PER_DAY, day_number
from tests.training.conftest import DT
from training.checkpoint import load_package, save_package
from training.data import Sequences, make_batch, split_targets
from training.scoring import load_scorer, request_of

ALL_MODELS = ("vql", "softmax_attention", "mean_pooling")


def _all_targets(sequences: Sequences) -> np.ndarray:
    return np.arange(len(sequences.target_item))


def test_scores_from_caches_equal_scores_from_events(loaded, make_model):
    sequences, _vocabulary, batches = loaded
    model = make_model()
    for user in range(sequences.users):
        targets = np.arange(*sequences.targets_of(user).indices(len(sequences.target_item)))
        for target in targets:  # the cache holds what this target may see
            batch = make_batch(
                sequences, batches.features, batches.user_rows, np.array([user]), [np.array([target])]
            ).to("cpu")
            with torch.no_grad():
                over_events = model(batch)[0]
            over_codes = model.score_with_caches(batch, model.user_caches(batch, int(batch.target_time_ms.min())))
            assert (over_events - over_codes).abs().max() <= 1e-5


@pytest.mark.parametrize("interest", ALL_MODELS)
def test_a_batch_of_many_users_equals_each_user_alone(interest, loaded, make_model):
    sequences, _, batches = loaded
    model = make_model(interest)
    with torch.no_grad():
        together = torch.cat([model(batch.to("cpu"))[0] for batch in batches.all_of(_all_targets(sequences))])
        alone = torch.cat(
            [
                model(
                    make_batch(
                        sequences,
                        batches.features,
                        batches.user_rows,
                        np.array([user]),
                        [np.arange(*sequences.targets_of(user).indices(10**9))],
                    ).to("cpu")
                )[0]
                for user in range(sequences.users)
            ]
        )
    assert (together - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("interest", ALL_MODELS)
def test_events_in_the_future_of_a_target_do_not_change_its_score(interest, loaded, make_model):
    sequences, _, batches = loaded
    model = make_model(interest)
    user = int(np.argmax(np.diff(sequences.history_start)))
    targets = np.arange(*sequences.targets_of(user).indices(10**9))
    with torch.no_grad():
        first = model(
            make_batch(sequences, batches.features, batches.user_rows, np.array([user]), [targets[:1]]).to("cpu")
        )[0]
        among = model(
            make_batch(sequences, batches.features, batches.user_rows, np.array([user]), [targets]).to("cpu")
        )[0]
    assert abs(float(first[0] - among[0])) <= 1e-5


def test_a_request_with_raw_ids_scores_as_the_partition_does(partition, loaded, make_model, tmp_path):
    items, rows = partition
    sequences, vocabulary, _ = loaded
    day_ms = day_number(DT) * MS_PER_DAY
    save_package(tmp_path, make_model(), vocabulary, {})
    scorer = load_scorer(tmp_path)
    scored = scorer.score(items, rows, day_ms)
    assert len(scored.score) == int((sequences.target_time_ms >= day_ms).sum())
    for user in np.unique(scored.user_id):
        mine = scored.user_id == user
        got = scorer.score_request(request_of(items, sequences, int(user), day_ms, max_targets=100))
        assert np.abs(got - scored.score[mine]).max() <= 1e-5


def test_a_request_with_unknown_ids_is_scored(loaded, make_model, tmp_path):
    save_package(tmp_path, make_model(), loaded[1], {})
    request = {
        "history_item_id": [5],
        "history_time_ms": [1],
        "history_feedback": [0],
        "history_watch_bucket": [0],
        "user_fields": ["never seen", ""],
        "target_item_id": [999_999_999],
        "target_time_ms": [2],
        "target_tab": [-1],
    }
    assert np.isfinite(load_scorer(tmp_path).score_request(request)).all()


def test_a_request_cannot_smuggle_the_future_into_a_history(loaded, make_model, tmp_path):
    save_package(tmp_path, make_model(), loaded[1], {})
    request = {
        "history_item_id": [1007],
        "history_time_ms": [10],
        "history_feedback": [1],
        "history_watch_bucket": [3],
        "user_fields": ["x", ""],
        "target_item_id": [1014],
        "target_time_ms": [20],
        "target_tab": [1],
    }
    scorer = load_scorer(tmp_path)
    leaking = {
        **request,
        "history_item_id": [1007, 1014],
        "history_time_ms": [10, 20],
        "history_feedback": [1, 255],
        "history_watch_bucket": [3, 9],
    }
    assert scorer.score_request(request) == pytest.approx(scorer.score_request(leaking), abs=1e-7)


def test_a_package_loads_to_the_same_model(loaded, make_model, tmp_path):
    model = make_model()
    save_package(tmp_path, model, loaded[1], {"a": 1})
    again, vocabulary = load_package(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert vocabulary.items.rows == loaded[1].items.rows


def test_rare_and_new_items_share_hashed_rows_and_frequent_ones_do_not(partition, loaded):
    items, _ = partition
    vocabulary = loaded[1]
    frequent = items["train_occurrences"].to_numpy() >= 5
    rows = vocabulary.item_features(items).id_row
    first_own_row = 1 + vocabulary.items.hashed_rows
    assert (rows[frequent] >= first_own_row).all()
    assert len(np.unique(rows[frequent])) == frequent.sum()
    assert ((rows[~frequent] >= 1) & (rows[~frequent] < first_own_row)).all()


def test_the_evaluation_day_is_never_trained_on(loaded):
    sequences = loaded[0]
    split = split_targets(sequences, DT, 0.2, seed=0)
    day_ms = day_number(DT) * MS_PER_DAY
    assert (sequences.target_time_ms[np.concatenate([split.train, split.validation])] < day_ms).all()
    assert (sequences.target_time_ms[split.evaluation] >= day_ms).all()
    together = np.sort(np.concatenate([split.train, split.validation, split.evaluation]))
    assert np.array_equal(together, _all_targets(sequences))


def test_workers_share_an_epoch_without_overlap_and_in_equal_steps(partition, loaded):
    from training.data import UserBatches

    items, _ = partition
    sequences, vocabulary, _ = loaded
    targets = _all_targets(sequences)
    seen = []
    for rank in range(2):
        batches = UserBatches(sequences, vocabulary, vocabulary.item_features(items), rank, 2, users_per_step=3, seed=5)
        seen.append([len(batch.target_start) - 1 for batch in batches.epoch(targets, 0, 100)])
    assert seen[0] == seen[1] == [3]

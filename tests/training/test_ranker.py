"""The whole model: caches, padding-free batches, requests with raw ids, packages."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from etl.datasets.definition import History
from etl.sequences.sequence_rows import visible_ends
from etl.warehouse.schemas import EVALUATION, SEQUENCES, TRAIN, VALIDATION
from tests.training.conftest import DAY_MS, vocabulary_of
from training.data import Sequences, make_batch, split_targets
from training.model.blocks import Layout
from training.package import Cutoff, load_package, save_package
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
            batch = make_batch(batches.joined, np.array([user]), [np.array([target])]).to("cpu")
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
                        batches.joined, np.array([user]), [np.arange(*sequences.targets_of(user).indices(10**9))]
                    ).to("cpu")
                )[0]
                for user in range(sequences.users)
            ]
        )
    assert (together - alone).abs().max() <= 1e-5


KINDS = [{"interest": name} for name in (*ALL_MODELS, "sdim")] + [
    {"interest": "recent_attention", "recent_window": 5},
    {"recent_window": 5},
    {"refine_k": 3},
    {"refine_k": 3, "recent_window": 5},
    {"kernel_components": 0, "refine_k": 3},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_pass_over_all_users_has_the_scores_and_gradients_of_the_pass_over_each(
    kind, loaded, make_model, monkeypatch
):
    sequences, _, batches = loaded
    monkeypatch.setattr(Layout, "of", functools.partial(Layout.of, most_pairs=3, tile=8))  # several layouts a batch
    model = make_model(**kind, dropout=0.0).train()
    batch = next(batches.all_of(_all_targets(sequences))).to("cpu")
    found = []
    for at_once in (False, True):
        model.interest.always_at_once = at_once
        model.zero_grad()
        logits, auxiliary = model(batch)
        (logits.square().sum() + auxiliary).backward()
        found.append((logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one - other).abs().max() <= 2e-5 * max(1.0, float(one.abs().max()))


@pytest.mark.parametrize("interest", ALL_MODELS)
def test_events_in_the_future_of_a_target_do_not_change_its_score(interest, loaded, make_model):
    sequences, _, batches = loaded
    model = make_model(interest)
    user = int(np.argmax(np.diff(sequences.history_start)))
    targets = np.arange(*sequences.targets_of(user).indices(10**9))
    with torch.no_grad():
        first = model(make_batch(batches.joined, np.array([user]), [targets[:1]]).to("cpu"))[0]
        among = model(make_batch(batches.joined, np.array([user]), [targets]).to("cpu"))[0]
    assert abs(float(first[0] - among[0])) <= 1e-5


def _seen_under(cutoff: Cutoff, rows: pa.Table) -> pa.Table:
    """Return the partition as the ETL builds it with this rule: fewer events are visible, the history is the same."""
    sequences = Sequences.from_arrow(rows)
    owner_of = lambda start: np.repeat(np.arange(len(start) - 1), np.diff(start))  # noqa: E731
    ends = visible_ends(
        owner_of(sequences.history_start),
        sequences.history_time_ms,
        sequences.history_start,
        owner_of(sequences.target_start),
        sequences.target_time_ms,
        History(cutoff=cutoff.kind, availability_lag_ms=cutoff.availability_lag_ms),
    )
    lists = pa.ListArray.from_arrays(pa.array(sequences.target_start, pa.int32()), pa.array(ends, pa.int32()))
    return rows.set_column(
        SEQUENCES.get_field_index("target_history_end"), SEQUENCES.field("target_history_end"), lists
    )


@pytest.mark.parametrize(
    "cutoff",
    [
        Cutoff(),
        Cutoff("event", 36 * 3_600_000),
        Cutoff("day_start"),
        Cutoff("day_start", 36 * 3_600_000),
    ],
    ids=lambda cutoff: f"{cutoff.kind}-{cutoff.availability_lag_ms}",
)
def test_a_request_with_raw_ids_scores_as_the_partition_does(cutoff, partition, loaded, make_model, tmp_path):
    items, rows = partition[0], _seen_under(cutoff, partition[1])
    vocabulary, sequences = loaded[1], Sequences.from_arrow(rows)
    save_package(tmp_path, make_model(), vocabulary, cutoff, {})
    scorer = load_scorer(tmp_path)
    scored = scorer.score(items, rows)
    evaluated = sequences.target_time_ms >= DAY_MS
    assert len(scored.score) == int(evaluated.sum())
    assert np.array_equal(scored.history_length, sequences.target_end[evaluated])
    hidden = 0
    for user in np.unique(scored.user_id):
        mine = scored.user_id == user
        request = request_of(items, sequences, int(user), max_targets=100)
        assert np.abs(scorer.score_request(request) - scored.score[mine]).max() <= 1e-5
        # The caller sends everything there is; the package knows what a target may see.
        whole = slice(*sequences.history_start[[user, user + 1]])
        everything = dataclasses.replace(
            sequences, target_end=np.full_like(sequences.target_end, whole.stop - whole.start)
        )
        request = request_of(items, everything, int(user), max_targets=100)
        hidden += len(request["history_item_id"]) - int(scored.history_length[mine].max())
        assert np.abs(scorer.score_request(request) - scored.score[mine]).max() <= 1e-5
    assert hidden > 0


def test_the_cutoff_of_a_package_is_the_rule_of_the_etl():
    time = np.array([DAY_MS, DAY_MS + 5, DAY_MS - 1])
    assert Cutoff().of(time).tolist() == time.tolist()
    assert Cutoff("event", 10).of(time).tolist() == (time - 10).tolist()
    assert Cutoff("day_start").of(time).tolist() == [DAY_MS, DAY_MS, DAY_MS - 86_400_000]
    assert Cutoff("day_start", 10).of(time).tolist() == [DAY_MS - 10, DAY_MS - 10, DAY_MS - 86_400_010]
    assert History() == History(cutoff=Cutoff().kind, availability_lag_ms=Cutoff().availability_lag_ms)


def test_a_request_with_unknown_ids_is_scored(loaded, make_model, tmp_path):
    save_package(tmp_path, make_model(), loaded[1], Cutoff(), {})
    request = {
        "history_item_id": [5],
        "history_time_ms": [1],
        "history_feedback": [0],
        "history_watch_bucket": [0],
        "user_fields": ["never seen", ""],
        "target_item_id": [999_999_999],
        "target_time_ms": [2],
        "target_context": [-1],
    }
    assert np.isfinite(load_scorer(tmp_path).score_request(request)).all()


def test_a_request_cannot_smuggle_the_future_into_a_history(loaded, make_model, tmp_path):
    save_package(tmp_path, make_model(), loaded[1], Cutoff(), {})
    request = {
        "history_item_id": [1007],
        "history_time_ms": [10],
        "history_feedback": [1],
        "history_watch_bucket": [3],
        "user_fields": ["x", ""],
        "target_item_id": [1014],
        "target_time_ms": [20],
        "target_context": [1],
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


def test_a_request_sees_no_event_that_was_not_known_yet(loaded, make_model, tmp_path):
    lag = 1_000
    save_package(tmp_path, make_model(), loaded[1], Cutoff("event", lag), {})
    request = {
        "history_item_id": [1007],
        "history_time_ms": [DAY_MS],
        "history_feedback": [1],
        "history_watch_bucket": [3],
        "user_fields": ["x", ""],
        "target_item_id": [1014],
        "target_time_ms": [DAY_MS + 2 * lag],
        "target_context": [1],
    }
    scorer = load_scorer(tmp_path)
    late = {
        **request,
        "history_item_id": [1007, 1014],
        "history_time_ms": [DAY_MS, DAY_MS + lag],  # known at the very time of the target, not before it
        "history_feedback": [1, 255],
        "history_watch_bucket": [3, 9],
    }
    assert scorer.score_request(request) == pytest.approx(scorer.score_request(late), abs=1e-7)
    known = {**late, "history_time_ms": [DAY_MS, DAY_MS + lag - 1]}
    assert abs(float(scorer.score_request(request)[0] - scorer.score_request(known)[0])) > 1e-6


def test_a_package_loads_to_the_same_model(loaded, make_model, tmp_path):
    model = make_model()
    save_package(tmp_path, model, loaded[1], Cutoff("day_start", 60_000), {"a": 1})
    again, vocabulary, cutoff = load_package(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert {name: field.rows for name, field in vocabulary.items.items()} == {
        name: field.rows for name, field in loaded[1].items.items()
    }
    assert cutoff == Cutoff("day_start", 60_000)


@pytest.mark.parametrize("kind", ["vql", "sdim", "mean_pooling"])
def test_a_package_from_before_kinds_had_modules_of_their_own_scores_as_it_did(
    kind, partition, loaded, make_model, tmp_path
):
    save_package(tmp_path, make_model(kind), loaded[1], Cutoff(), {})
    scores = load_scorer(tmp_path).score(*partition).score
    before = {"interest.planes_DXB": "hashed.planes_DXB", "interest.powers_B": "hashed.powers_B"}
    weights = load_file(tmp_path / "model.safetensors")
    older = {before.get(name, name.removeprefix("interest.")): weight for name, weight in weights.items()}
    assert older.keys() != weights.keys() or kind == "mean_pooling"
    save_file(older, tmp_path / "model.safetensors")
    assert np.array_equal(load_scorer(tmp_path).score(*partition).score, scores)


def test_rare_and_new_items_share_hashed_rows_and_frequent_ones_do_not(partition, loaded):
    items, _ = partition
    vocabulary = loaded[1]
    frequent = items["train_occurrences"].to_numpy() >= 5
    rows = vocabulary.item_features(items).rows["item_id"]
    first_own_row = 1 + vocabulary.item_ids.hashed_rows
    assert (rows[frequent] >= first_own_row).all()
    assert len(np.unique(rows[frequent])) == frequent.sum()
    assert ((rows[~frequent] >= 1) & (rows[~frequent] < first_own_row)).all()
    assert np.array_equal(vocabulary.item_ids.is_hashed(rows), ~frequent)


def test_the_evaluation_day_is_never_trained_on(loaded):
    sequences = loaded[0]
    split = split_targets(sequences, 0.2, seed=0)
    assert (sequences.target_time_ms[np.concatenate([split.train, split.validation])] < DAY_MS).all()
    assert (sequences.target_time_ms[split.evaluation] >= DAY_MS).all()
    together = np.sort(np.concatenate([split.train, split.validation, split.evaluation]))
    assert np.array_equal(together, _all_targets(sequences))
    assert 0 < len(split.validation) < len(split.train)


def test_validation_targets_of_the_partition_are_taken_as_they_are(partition):
    items, rows = partition
    sequences = Sequences.from_arrow(rows)
    marks = np.resize([TRAIN, VALIDATION, TRAIN, EVALUATION], len(sequences.target_item)).astype(np.int8)
    sequences = dataclasses.replace(sequences, target_split=marks)
    split = split_targets(sequences, 0.2, seed=0)
    for positions, code in ((split.train, TRAIN), (split.validation, VALIDATION), (split.evaluation, EVALUATION)):
        assert np.array_equal(positions, np.flatnonzero(marks == code))
    # Contexts of targets that are not for training stay unknown.
    assert set(vocabulary_of(items, sequences).contexts) == set(sequences.target_context[marks == TRAIN].tolist())

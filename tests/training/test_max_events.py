"""max_events bounds every target.

Each pass is the plain one over a history that was cut by hand, whatever its other targets see.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pyarrow as pa
import pytest
import torch

from etl.warehouse.schemas import SEQUENCES
from evaluation.cache_building import at_the_end
from tests.training.conftest import random_partition
from training.data import Joined, Sequences, make_batch
from training.model import passes
from training.model.blocks import Layout
from training.package import Cutoff, save_package
from training.scoring import load_scorer, request_of
from training.user_batches import UserBatches

torch.set_num_threads(1)  # many small products: a second thread only waits

KINDS = [{"interest": name} for name in ("vql", "softmax_attention", "mean_pooling", "sdim")] + [
    {"interest": "recent_attention", "recent_window": 5},
    {"recent_window": 5},
    {"refine_k": 3},
    {"refine_k": 3, "recent_window": 5},
    {"kernel_components": 0},
    {"interest": "softmax_attention", "kernel_components": 0},
]
PASSES = {
    "user after user": lambda patch, model: patch.setattr(passes, "prefers_factored", lambda *_: False),
    "factored": lambda patch, model: patch.setattr(passes, "prefers_factored", lambda *_: True),
    "all users at once": lambda patch, model: patch.setattr(model.interest, "always_at_once", True),
}
HISTORY = [name for name in SEQUENCES.names if name.startswith("history_")]
TARGET = [name for name in SEQUENCES.names if name.startswith("target_")]


def cut_by_hand(rows: pa.Table, most: int) -> pa.Table:
    """Return a row a target, whose history is what it may see."""
    cut = []
    for row in rows.to_pylist():
        for j, end in enumerate(row["target_history_end"]):
            seen = {name: row[name][:end][-most:] for name in HISTORY}
            mine = {name: [row[name][j]] for name in TARGET} | {"target_history_end": [len(seen["history_time_ms"])]}
            cut.append({"user_id": row["user_id"], "user_fields": row["user_fields"]} | seen | mine)
    return pa.Table.from_pylist(cut, schema=SEQUENCES)


def batches_of(rows: pa.Table, items: pa.Table, vocabulary, most: int | None, users: int = 16) -> UserBatches:
    return UserBatches(
        Joined.of(Sequences.from_arrow(rows, most), items, vocabulary), 0, 1, users_per_step=users, seed=0
    )


def logits_and_gradients(model, batches: UserBatches) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    every = np.arange(len(batches.joined.sequences.target_item))
    logits = torch.cat([model(batch.to("cpu"))[0] for batch in batches.all_of(every)])
    logits.square().sum().backward()
    return logits.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("most", [1, 3, 20])
@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_pass_is_the_plain_one_over_histories_cut_by_hand(kind, way, most, loaded, make_model, monkeypatch):
    vocabulary, model = loaded[1], make_model(**kind, dropout=0.0).train()
    for seed in range(2):
        items, rows = random_partition(users=5, longest=50, seed=seed)
        expected = logits_and_gradients(model, batches_of(cut_by_hand(rows, most), items, vocabulary, None, users=64))
        with monkeypatch.context() as patch:
            patch.setattr(Layout, "of", functools.partial(Layout.of, block=7, tile=3, most_pairs=9))
            PASSES[way](patch, model)
            found = logits_and_gradients(model, batches_of(rows, items, vocabulary, most))
        assert (found[0] - expected[0]).abs().max() <= 1e-5
        for one, other in zip(found[1], expected[1], strict=True):
            assert (one - other).abs().max() <= 2e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(
    "kind", [{}, {"recent_window": 5}, {"refine_k": 3}, {"refine_k": 3, "recent_window": 5}], ids=str
)
@pytest.mark.parametrize("most", [1, 3, 20])
def test_scores_from_caches_are_those_from_events_under_the_bound(kind, most, partition, loaded, make_model):
    items, rows = partition
    model, batches = make_model(**kind), batches_of(rows, items, loaded[1], most)
    sequences = batches.joined.sequences
    with torch.no_grad():
        for user in range(sequences.users):
            targets = np.arange(*sequences.targets_of(user).indices(10**9))
            among = model(make_batch(batches.joined, np.array([user]), [targets]).to("cpu"))[0][-1:]
            last = make_batch(batches.joined, np.array([user]), [targets[-1:]]).to("cpu")
            assert len(last.event_item) <= most
            over_codes = model.score_with_caches(last, model.user_caches(last, int(last.target_time_ms.min())))
            assert (among - over_codes).abs().max() <= 1e-5


def test_a_cache_at_the_end_of_a_partition_is_of_the_latest_events(partition, loaded):
    items, rows = partition
    flat = Sequences.from_arrow(rows)
    joined = Joined.of(at_the_end(flat, 4), items, loaded[1])
    batch = make_batch(joined, np.arange(flat.users), [np.array([user]) for user in range(flat.users)])
    expected = [time for user in rows["history_time_ms"].to_pylist() for time in user[-4:]]
    assert batch.event_time_ms.tolist() == expected


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_events_older_than_its_bound_do_not_change_a_targets_score(kind, partition, loaded, make_model):
    items, rows = partition
    model, most, moved = make_model(**kind), 4, 0
    before = batches_of(rows, items, loaded[1], most).joined.sequences
    rng = np.random.default_rng(3)

    def scores(sequences: Sequences) -> np.ndarray:
        every = np.arange(len(sequences.target_item))
        batches = UserBatches(Joined.of(sequences, items, loaded[1]), 0, 1, users_per_step=16, seed=0)
        return torch.cat([model(batch.to("cpu"))[0] for batch in batches.all_of(every)]).numpy()

    with torch.no_grad():
        was = scores(before)
        for target in np.flatnonzero(before.target_first > 0):
            user = np.searchsorted(before.target_start, target, side="right") - 1
            old = slice(int(before.history_start[user]), int(before.history_start[user] + before.target_first[target]))
            item, done = before.history_item.copy(), before.history_interaction.copy()
            item[old], done[old] = rng.integers(0, items.num_rows, len(item[old])), 0
            now = scores(dataclasses.replace(before, history_item=item, history_interaction=done))
            assert abs(now[target] - was[target]) <= 1e-6
            moved += int(np.abs(now - was).max() > 1e-4)
    assert moved > 0  # others see them


def test_a_bound_that_no_target_reaches_changes_nothing(partition, loaded):
    items, rows = partition
    longest = max(map(len, rows["history_time_ms"].to_pylist()))
    for free, bounded in zip(
        *(batches_of(rows, items, loaded[1], most).all_of(np.arange(48)) for most in (None, longest)), strict=True
    ):
        assert bounded.shared_from == [0] * len(bounded.shared_from)
        for name in free.__dataclass_fields__:
            if name != "items":
                assert np.array_equal(getattr(free, name), getattr(bounded, name)), name


def test_a_package_bounds_what_its_model_is_scored_on(partition, loaded, make_model, tmp_path):
    items, rows = partition
    save_package(tmp_path, make_model(), loaded[1], Cutoff(max_events=6), {})
    scorer = load_scorer(tmp_path)
    scored, everything = scorer.score(items, rows), Sequences.from_arrow(rows)
    by_hand = scorer.score(items, cut_by_hand(rows, 6))
    assert scored.history_length.tolist() == by_hand.history_length.tolist()
    assert scored.history_length.max() == 6
    assert np.abs(scored.score - by_hand.score).max() <= 1e-5
    for user in np.unique(scored.user_id):
        request = request_of(items, everything, int(user), max_targets=100)  # the caller sends all there is
        bounded = request_of(items, Sequences.from_arrow(rows, 6), int(user), max_targets=100)
        assert len(bounded["history_item_id"]) < len(request["history_item_id"]) or len(request["history_item_id"]) <= 6
        for sent in (request, bounded):
            assert np.abs(scorer.score_request(sent) - scored.score[scored.user_id == user]).max() <= 1e-5

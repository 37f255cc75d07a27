"""Every kind of interest in the registry is its own definition (oracles.py), in every pass, and one user's alone."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.claims.variants import TRIALS
from etl.stage.errors import StageError
from tests.training.oracles import ORACLES, config, interests
from training.config import ModelConfig
from training.model import passes
from training.model.blocks import Layout
from training.model.history import Events, Items, Targets
from training.model.interests import INTERESTS, interface
from training.model.interests.interface import Attention, Coded, Interest

torch.set_num_threads(1)

ITEMS, STATIC, NOW_MS, DAY_MS = 11, 5, 1_650_000_000_000, 86_400_000
# One to two tags an item, of six; 0 is none.
ROWS = {"item_id": torch.arange(ITEMS), "tags": torch.stack([1 + torch.arange(ITEMS) % 3, torch.arange(ITEMS) % 4], 1)}
KINDS = [(kind, settings) for kind, (_, tried) in ORACLES.items() for settings in tried]
# (events, targets) of each user: without history, without targets, and one longer than a block of the test's layouts.
USERS = [(0, 3), (9, 4), (1, 2), (19, 4), (5, 0), (0, 1)]
PASSES = {
    "user by user": lambda patch, interest: patch.setattr(passes, "prefers_factored", lambda *_: False),
    "factored": lambda patch, interest: patch.setattr(passes, "prefers_factored", lambda *_: True),
    "all at once": lambda patch, interest: patch.setattr(interest, "always_at_once", True),
}


def made(kind: str, settings: dict, seed: int = 0) -> Interest:
    """An interest as training would leave it: spread codewords, kernels of a rate a head."""
    torch.manual_seed(seed)
    interest = INTERESTS[kind](config(kind, **settings), STATIC).eval()
    with torch.no_grad():
        if isinstance(interest, Coded):
            interest.quantizer.start_from_keys(interest.keys(torch.randn(50, STATIC)), torch.Generator().manual_seed(0))
        for name, weights in interest.named_parameters():
            if "kernel" in name or "log_scale" in name:
                weights += 0.3 * torch.randn_like(weights)
    return interest


def batch(seed: int, users=tuple(USERS), most: int | None = None) -> tuple[Items, Events, Targets]:
    """A random batch; with an odd seed many events have equal times. `most` bounds what targets see."""
    draw = torch.Generator().manual_seed(seed)
    whole = lambda high, n: torch.randint(high, (n,), generator=draw)  # noqa: E731
    step = DAY_MS * 5 if seed % 2 else 1
    times = [(NOW_MS - whole(40 * DAY_MS, n) // step * step).sort().values for n, _ in users]
    ends = [whole(n + 1, t) for n, t in users]
    firsts = [torch.zeros_like(end) if most is None else (end - most).clamp(min=0) for end in ends]
    starts = [[0, *accumulate(user[i] for user in users)] for i in (0, 1)]
    events, targets = (start[-1] for start in starts)
    return (
        Items(torch.randn(ITEMS, STATIC, generator=draw), ROWS, {"item_id": "id", "tags": "categories"}),
        Events(whole(ITEMS, events), torch.randn(events, 2, 4, generator=draw), torch.cat(times), starts[0]),
        Targets(
            item_T=whole(ITEMS, targets),
            time_ms_T=NOW_MS + whole(DAY_MS, targets),
            first_T=torch.cat(firsts),
            end_T=torch.cat(ends),
            start=starts[1],
            cut_offs=[len(end.unique()) for end in ends],
            shared_from=[int(first.max()) if len(first) else 0 for first in firsts],
        ),
    )


@functools.cache
def defined(kind: str, settings: str, seed: int, most: int | None) -> torch.Tensor:
    """What the definition gives, worked out once for all passes."""
    of, tried = ORACLES[kind]
    (mine,) = [one for one in tried if str(one) == settings]
    return interests(of, made(kind, mine), *batch(seed, most=most))


def test_every_kind_has_a_definition_and_no_definition_is_of_a_kind_that_is_gone():
    assert ORACLES.keys() == INTERESTS.keys() - TRIALS.keys()


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=str)
@torch.no_grad()
def test_a_kind_is_its_definition(kind, settings, way, monkeypatch):
    monkeypatch.setattr(Layout, "of", functools.partial(Layout.of, block=8, tile=3, most_pairs=9))
    interest = made(kind, settings)
    PASSES[way](monkeypatch, interest)
    for seed, most in ((0, None), (1, None), (2, 4), (3, 4)):
        given = batch(seed, most=most)
        found, auxiliary = interest(*given)
        expected = defined(kind, str(settings), seed, most)
        assert found.shape == expected.shape and float(auxiliary) == 0
        assert (found - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=str)
@torch.no_grad()
def test_what_another_user_does_changes_nothing(kind, settings, at_once):
    interest = made(kind, settings)
    interest.always_at_once = at_once
    items, events, targets = batch(0)
    before = interest(items, events, targets)[0]
    others, others_targets = slice(events.start[3], events.start[4]), slice(targets.start[3], targets.start[4])
    value_EHd, item_E, time_ms_E = events.value_EHd.clone(), events.item_E.clone(), events.time_ms_E.clone()
    value_EHd[others], item_E[others], time_ms_E[others] = 100.0, 0, NOW_MS
    item_T = targets.item_T.clone()
    item_T[others_targets] = 0
    after = interest(items, Events(item_E, value_EHd, time_ms_E, events.start), replace(targets, item_T=item_T))[0]
    same = torch.ones(len(before), dtype=torch.bool)
    same[others_targets] = False
    assert (before[same] - after[same]).abs().max() <= 1e-6
    assert (before[~same] - after[~same]).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=str)
def test_a_batch_without_events_or_without_targets_is_no_error(kind, settings):
    for at_once in (False, True):
        interest = made(kind, settings).train()
        interest.always_at_once = at_once
        items, events, targets = batch(0, users=[(0, 2), (0, 1)])
        found, auxiliary = interest(items, events, targets)
        (found.sum() + auxiliary).backward() if (found.requires_grad or auxiliary.requires_grad) else None
        assert found.shape == (3, 2, 4) and not found.any()
        assert interest(*batch(0, users=[(4, 0)]))[0].shape == (0, 2, 4)


@pytest.mark.parametrize("kind", ["frozen_codebook", "random_codebook"])
def test_the_codewords_of_a_control_stay_where_they_began_and_its_keys_learn(kind):
    interest = made(kind, {}).train()
    quantizer, began = interest.quantizer, interest.quantizer.codebook_GCw.clone()
    for seed in range(3):
        items, events, targets = batch(seed)
        found, loss = interest(items, events, targets)
        (found.sum() + loss).backward()
        quantizer.move_averages()
        quantizer.usage_GC[:] = 0  # all of them look dead
        quantizer.revive(interest.keys(items.static_NS), torch.Generator().manual_seed(seed))
    assert torch.equal(quantizer.codebook_GCw, began) and quantizer.codebook_GCw.grad is None
    assert interest.to_key.weight.grad.abs().max() > 0


def test_a_random_codebook_has_the_spread_of_the_keys_and_none_of_their_clusters():
    key_NHd = torch.cat([torch.full((40, 2, 4), -3.0), torch.full((40, 2, 4), 3.0)])
    random, frozen = (made(kind, {"codes": 64}).quantizer for kind in ("random_codebook", "frozen_codebook"))
    for quantizer in (random, frozen):
        quantizer.start_from_keys(key_NHd, torch.Generator().manual_seed(0))
    assert abs(float(random.codebook_GCw.mean())) < 0.3 and 2.5 < float(random.codebook_GCw.std()) < 3.5
    assert (frozen.codebook_GCw.abs() - 3).abs().max() < 0.01 < (random.codebook_GCw.abs() - 3).abs().median()


def test_labels_teach_the_search_of_sim_and_reach_no_interest():
    interest = made("sim_soft", {"search_k": 3}).train()
    items, events, targets = batch(0)
    label_T = (torch.arange(len(targets.item_T)) % 2).float()
    found, loss = interest(items, events, replace(targets, label_T=label_T))
    turned, other = interest(items, events, replace(targets, label_T=1 - label_T))
    assert torch.equal(found, turned) and loss > 0 and loss != other
    loss.backward()
    assert interest.to_event.weight.grad.abs().max() > 0 and interest.to_target.weight.grad.abs().max() > 0
    assert interest.to_key.weight.grad is None
    assert interest(items, events, targets)[1] == 0
    assert interest.eval()(items, events, replace(targets, label_T=label_T))[1] == 0


@pytest.mark.parametrize(("kind", "settings"), {kind: settings for kind, settings in KINDS}.items(), ids=str)
def test_a_kind_trains_in_the_ranker(kind, settings, loaded, make_model):
    sequences, _, batches = loaded
    [given] = batches.all_of(np.arange(len(sequences.target_label)))
    model = make_model(kind, **settings).train()
    logits, auxiliary = model(given.to("cpu"))
    (logits.square().mean() + auxiliary).backward()
    assert len(logits) == len(sequences.target_label) and logits.isfinite().all()
    gradients = [weights.grad for weights in model.parameters() if weights.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert model.to_value.weight.grad.abs().max() > 0


def test_items_without_a_category_are_refused_with_what_they_have():
    items, events, targets = batch(0)
    bare = Items(items.static_NS, {"item_id": items.rows["item_id"]}, {"item_id": "id"})
    for kind, settings in (("category_pooling", {}), ("sim_hard", {"search_k": 2})):
        with pytest.raises(StageError, match="items have no category: their fields are item_id"):
            made(kind, settings)(bare, events, targets)


class Decayed(Attention):
    """Has queries and keys, a pass of its own over blocks, and says nothing of recordings."""

    def attend(self, query_THd: Tensor, keys: passes.Keys, events: Events, targets: Targets) -> Tensor:
        return passes.in_blocks(query_THd, keys, events, targets, self.softmax())


@pytest.mark.parametrize(
    ("kind", "settings"), [*KINDS, *((trial, {"groups": 2}) for trial in TRIALS), ("decayed", {})], ids=str
)
@torch.no_grad()
def test_steps_of_a_kind_are_recorded_only_if_it_reads_no_list(kind, settings, monkeypatch):
    """On a GPU a recorded step gives no list: a kind that reads one would stop there, in its first step."""
    monkeypatch.setitem(INTERESTS, "decayed", Decayed)
    monkeypatch.setattr(interface, "has_kernels", lambda _, softmax: not softmax.refine_k)
    monkeypatch.setattr(interface, "in_kernels", lambda query_THd, *_: torch.zeros_like(query_THd))
    interest = made(kind, settings)
    coded = ("vql", "frozen_codebook", "random_codebook")
    kernels_do_it = kind in ("softmax_attention", "recent_attention", *coded) and "refine_k" not in settings
    assert interest.reads_tensors_alone() == kernels_do_it
    if interest.reads_tensors_alone():
        items, events, targets = batch(0)
        no_lists = {"start": None, "cut_offs": None}
        interest(items, replace(events, start=None), replace(targets, **no_lists, shared_from=[0]))


def test_a_configuration_that_a_kind_cannot_run_is_refused_with_a_remedy():
    with pytest.raises(StageError, match="unknown interest 'rnn'") as refused:
        ModelConfig(interest="rnn")
    assert "softmax_attention" in refused.value.remedy
    with pytest.raises(StageError, match="recent_window"):
        ModelConfig(interest="recent_attention")


@pytest.mark.parametrize("kind", TRIALS)
def test_a_trial_of_the_claims_runs_as_a_kind_like_any_other(kind):
    interest = made(kind, {"groups": 2}).train()
    items, events, targets = batch(0)
    found, auxiliary = interest(items, events, targets)
    (found.square().sum() + auxiliary).backward()
    assert found.isfinite().all()
    assert interest.to_query.weight.grad.abs().max() > 0

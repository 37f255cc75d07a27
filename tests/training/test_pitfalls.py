"""Mistakes that implementations of VQL make, each planted.

The others of the list stand where the part is tested (docs/model.md).
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from benchmarks.train_step import make_batch
from training.config import ModelConfig
from training.model.attention import cache_attention, event_attention
from training.model.cache import build_cache
from training.model.history import one_user
from training.model.kernel import MixtureKernel
from training.model.quantizer import GroupedQuantizer
from training.model.ranker import FieldSizes, Ranker

NOW_MS, DAY_MS = 1_650_000_000_000, 86_400_000
SIZES = FieldSizes((("id", 20_000), ("category", 50)), (), 1)


def ranker(**settings) -> tuple[Ranker, object]:
    torch.manual_seed(0)
    model = Ranker(SIZES, ModelConfig(**settings))
    batch = make_batch(users=3, length=200, targets=8, cut_offs=4).to("cpu")
    with torch.no_grad():
        model.coded.quantizer.start_from_keys(
            model.coded.keys(model.items(batch.items)), torch.Generator().manual_seed(0)
        )
    return model, batch


def test_the_learned_scale_cannot_grow_beyond_its_cap_nor_logits_beyond_their_bound():
    model, batch = ranker()
    with torch.no_grad():
        static = model.items(batch.items)
        model.coded.log_scale_H.fill_(9.0)
        model.coded.to_query.weight.mul_(1e3)
        model.coded.to_key.weight.mul_(1e3)
        largest = (model.coded.queries(static).norm(dim=-1).max() * model.coded.keys(static).norm(dim=-1).max()).item()
    assert largest <= 4 * math.sqrt(16) * (1 + 1e-5)


def test_a_step_searches_each_distinct_item_once_however_many_events_there_are(monkeypatch):
    model, batch = ranker()
    searched = []
    plain = GroupedQuantizer.search
    monkeypatch.setattr(
        GroupedQuantizer, "search", lambda self, keys: (searched.append(len(keys)), plain(self, keys))[1]
    )
    model.train()(batch)
    assert searched == [len(batch.items.rows["item_id"])]


def test_plain_vql_scores_from_caches_without_reading_an_event():
    model, batch = ranker()
    model.eval()
    caches = model.user_caches(batch, NOW_MS)
    scores = model.score_with_caches(batch, caches)
    gone = torch.full_like(batch.event_item, 7)
    assert torch.equal(
        scores, model.score_with_caches(dataclasses.replace(batch, event_item=gone, event_interaction=gone), caches)
    )


def test_the_key_and_the_code_of_an_item_do_not_depend_on_what_the_user_did():
    model, batch = ranker()
    model.eval()
    values = []
    for interaction in (0, 5):
        changed = dataclasses.replace(batch, event_interaction=torch.full_like(batch.event_interaction, interaction))
        items, events = model._read(changed)
        values.append((events.value_EHd, model.coded.quantizer.search(model.coded.keys(items.static_NS))))
    assert torch.equal(values[0][1], values[1][1])
    assert (values[0][0] - values[1][0]).abs().max() > 0


@pytest.mark.parametrize("half_lives", [(), (2.0, 180.0)])
def test_the_two_forms_agree_on_a_history_of_100_000_events(half_lives):
    torch.manual_seed(0)
    length, codes = 100_000, 64
    key, value = torch.randn(length, 4, 8), torch.randn(length, 4, 8)
    query = torch.randn(3, 4, 8) * 8**-0.5
    quantizer = GroupedQuantizer(2, codes, 16)
    quantizer.start_from_keys(key[:2_000], torch.Generator().manual_seed(0), iterations=2)
    code = quantizer.search(key)
    hard = quantizer.quantized(code, key).detach()
    times = torch.sort(NOW_MS - (torch.rand(length) * 400 * DAY_MS).long()).values
    at, ends = torch.full((3,), NOW_MS + DAY_MS), torch.full((3,), length)
    kernel = MixtureKernel(4, half_lives) if half_lives else None
    book = quantizer.codebook_GCw.view(2, codes, 2, 8).transpose(1, 2).reshape(4, codes, 8)
    with torch.no_grad():
        over_codes = cache_attention(query, book, build_cache(code, value, times, NOW_MS, codes, kernel), at, kernel)
        over_events = event_attention(query, hard, *one_user(value, times, at, ends), kernel)
    assert (over_codes - over_events).abs().max() <= 1e-5


def test_a_query_before_the_reference_time_is_taken_as_at_it_and_never_overflows():
    torch.manual_seed(0)
    kernel = MixtureKernel(2, (1 / 24, 30.0))
    code, value, times = torch.randint(4, (30, 2)), torch.randn(30, 2, 3), NOW_MS - torch.arange(30).flip(0) * DAY_MS
    cache = build_cache(code, value, times, NOW_MS, 4, kernel)
    query, book = torch.randn(1, 2, 3), torch.randn(2, 4, 3)
    early, at = (
        cache_attention(query, book, cache, torch.tensor([NOW_MS - shift]), kernel) for shift in (300 * DAY_MS, 0)
    )
    assert torch.equal(early, at) and early.isfinite().all()


def test_all_equal_times_one_code_and_more_codes_than_events():
    torch.manual_seed(0)
    kernel = MixtureKernel(2, (0.1, 90.0))
    for length, codes in ((1, 64), (5, 1), (40, 500)):
        code, value = torch.randint(codes, (length, 2)), torch.randn(length, 2, 3)
        book, query = torch.randn(2, codes, 3), torch.randn(4, 2, 3)
        times, at = torch.full((length,), NOW_MS), torch.full((4,), NOW_MS)
        hard = book[torch.arange(2), code]
        over_events = event_attention(query, hard, *one_user(value, times, at, torch.full((4,), length)), kernel)
        over_codes = cache_attention(query, book, build_cache(code, value, times, NOW_MS, codes, kernel), at, kernel)
        assert (over_events - over_codes).abs().max() <= 1e-5


def test_a_batch_without_any_event_is_no_error():
    model, _ = ranker()
    batch = make_batch(users=2, length=20, targets=3, cut_offs=2)
    nothing = dataclasses.replace(
        batch,
        event_item=np.zeros(0, np.int64),
        event_interaction=np.zeros(0, np.int64),
        event_time_ms=np.zeros(0, np.int64),
        event_start=[0, 0, 0],
        target_end=np.zeros(6, np.int64),
        cut_offs=[1, 1],
    ).to("cpu")
    logits, auxiliary = model.train()(nothing)
    (logits.sum() + auxiliary).backward()
    assert logits.isfinite().all() and float(auxiliary.detach()) == 0

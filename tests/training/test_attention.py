"""VQL's attention: the form over events and the form over codes are one function, and the theorem's bound holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.warehouse.partitions import MS_PER_DAY
from training.model.attention import build_cache, cache_attention, event_attention
from training.model.history import one_user
from training.model.kernel import MixtureKernel
from training.model.quantizer import GroupedQuantizer

HEADS, WIDTH, GROUPS, CODES = 4, 8, 2, 8
NOW_MS = 1_650_000_000_000


def _problem(length: int, targets: int, seed: int, dtype=torch.float32, days: float = 60.0):
    torch.manual_seed(seed)
    quantizer = GroupedQuantizer(GROUPS, CODES, HEADS * WIDTH // GROUPS).to(dtype)
    keys = torch.randn(length, HEADS, WIDTH, dtype=dtype)
    values = torch.randn(length, HEADS, WIDTH, dtype=dtype)
    queries = torch.randn(targets, HEADS, WIDTH, dtype=dtype)
    times = torch.sort(NOW_MS - (torch.rand(length) * days * MS_PER_DAY).long()).values
    target_times = NOW_MS + (torch.rand(targets) * MS_PER_DAY).long()
    return quantizer, keys, values, queries, times, target_times


def _both_forms(length, targets, seed, kernel, dtype=torch.float32, days=60.0):
    quantizer, keys, values, queries, times, target_times = _problem(length, targets, seed, dtype, days)
    codes = quantizer.search(keys)
    hard = quantizer.quantized(codes, keys).to(dtype)
    over_events = event_attention(
        queries, hard, *one_user(values, times, target_times, torch.full((targets,), length)), kernel
    )
    codebook = (
        quantizer.codebook_GCw.view(GROUPS, CODES, HEADS // GROUPS, WIDTH).transpose(1, 2).reshape(HEADS, CODES, WIDTH)
    )
    cache = build_cache(codes, values, times, NOW_MS, CODES, kernel)
    return (
        over_events,
        cache_attention(queries, codebook, cache, target_times, kernel),
        cache,
        codebook,
        queries,
        target_times,
    )


@pytest.mark.parametrize("half_lives", [None, (1.0,), (0.5, 30.0), (0.05, 2.0, 90.0)])
@settings(max_examples=15)
@given(length=st.integers(1, 300), seed=st.integers(0, 10_000))
def test_cache_equals_event_level_attention(half_lives, length, seed):
    kernel = None if half_lives is None else MixtureKernel(HEADS, half_lives)
    over_events, over_codes, *_ = _both_forms(length, 5, seed, kernel)
    assert (over_events - over_codes).abs().max() <= 1e-5


def test_cache_survives_a_fast_kernel_over_years():
    # A one-hour half-life over 1,000 days: linear-space counts would be zero in fp32, and 0 / 0 the result.
    over_events, over_codes, *_ = _both_forms(200, 5, 3, MixtureKernel(HEADS, (1 / 24, 300.0)), days=1_000.0)
    assert torch.isfinite(over_codes).all()
    assert (over_events - over_codes).abs().max() <= 1e-5


def test_without_the_log_count_the_cache_is_wrong():
    over_events, _, cache, codebook, queries, times = _both_forms(300, 5, 0, None)
    present = torch.where(cache.log_count_HMC.isinf(), cache.log_count_HMC, torch.zeros_like(cache.log_count_HMC))
    broken = type(cache)(present, cache.mean_HMCd, cache.reference_time_ms)
    assert (over_events - cache_attention(queries, codebook, broken, times, None)).abs().max() > 0.02


def test_counts_sum_to_the_number_of_events():
    *_, cache, _, _, _ = _both_forms(123, 1, 0, None)
    assert torch.allclose(cache.log_count_HMC.exp().sum((1, 2)), torch.full((HEADS,), 123.0, dtype=torch.float64))


def test_an_empty_history_gives_zeros():
    over_events, over_codes, *_ = _both_forms(0, 3, 0, MixtureKernel(HEADS, (1.0, 30.0)))
    assert over_events.abs().max() == 0
    assert over_codes.abs().max() == 0


@settings(max_examples=25)
@given(length=st.integers(1, 80), seed=st.integers(0, 1_000))
def test_many_targets_in_one_pass_equal_one_by_one(length, seed):
    _, keys, values, queries, times, target_times = _problem(length, 6, seed)
    ends = torch.from_numpy(np.random.default_rng(seed).integers(0, length + 1, 6))
    kernel = MixtureKernel(HEADS, (1.0, 30.0))
    together = event_attention(queries, keys, *one_user(values, times, target_times, ends), kernel)
    for j, end in enumerate(ends.tolist()):
        one = event_attention(
            queries[j : j + 1],
            keys[:end],
            *one_user(values[:end], times[:end], target_times[j : j + 1], ends[j : j + 1]),
            kernel,
        )
        assert (together[j] - one[0]).abs().max() <= 1e-5


def test_events_after_the_cut_off_change_nothing():
    _, keys, values, queries, times, target_times = _problem(50, 3, 0)
    ends = torch.tensor([10, 20, 30])
    before = event_attention(queries, keys, *one_user(values, times, target_times, ends), None)
    values[30:] += 100.0
    keys[30:] -= 3.0
    assert torch.equal(before, event_attention(queries, keys, *one_user(values, times, target_times, ends), None))


def test_a_single_exponential_cannot_see_the_query_time_and_a_mixture_can():
    _, keys, values, queries, times, target_times = _problem(50, 3, 0)
    ends = torch.full((3,), 50)
    shifted = target_times + 20 * MS_PER_DAY

    @torch.no_grad()
    def moved(half_lives: tuple[float, ...]) -> float:
        kernel = MixtureKernel(HEADS, half_lives)
        before, after = (
            event_attention(queries, keys, *one_user(values, times, at, ends), kernel) for at in (target_times, shifted)
        )
        return float((before - after).abs().max())

    assert moved((5.0,)) <= 2e-5
    assert moved((1.0, 60.0)) > 1e-2


@settings(max_examples=40)
@given(length=st.integers(2, 400), seed=st.integers(0, 10_000))
def test_attention_error_stays_below_the_theorems_bound(length, seed):
    quantizer, keys, _, queries, *_ = _problem(length, 4, seed, torch.float64)
    exact = torch.einsum("thd,lhd->htl", queries, keys)
    coarse = torch.einsum("thd,lhd->htl", queries, quantizer.quantized(quantizer.search(keys), keys))
    error = (exact.softmax(-1) - coarse.softmax(-1)).abs().sum(-1)
    delta = coarse - exact
    spread = delta.amax(-1) - delta.amin(-1)
    assert (error <= 2 * torch.tanh(spread / 4) + 1e-9).all()
    assert (2 * torch.tanh(spread / 4) <= spread / 2 + 1e-12).all()


def test_the_task_gradient_goes_to_the_keys_and_not_to_the_codebook():
    quantizer, keys, values, queries, times, target_times = _problem(60, 4, 0)
    keys.requires_grad_(True)
    hard, _, _ = quantizer(keys, torch.ones(60), 0.25)
    seen = one_user(values, times, target_times, torch.full((4,), 60))
    event_attention(queries, hard, *seen, None).square().sum().backward()
    assert keys.grad.abs().max() > 0
    assert quantizer.codebook_GCw.grad is None or quantizer.codebook_GCw.grad.abs().max() == 0

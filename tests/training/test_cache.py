"""Caches: every way to the same set of events gives the same cache, and storage rounds by a known amount.

Legend: L events, H heads, d head width, G groups.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.warehouse.partitions import MS_PER_DAY
from training.model.attention import cache_attention, cache_part, combine, event_attention, event_part, window_part
from training.model.cache import (
    PeriodCaches,
    UserCache,
    append,
    build_cache,
    merge,
    merge_all,
    rebase,
    stored,
    to_dense,
    to_sparse,
)
from training.model.history import one_user
from training.model.kernel import MixtureKernel

torch.set_num_threads(1)

HEADS, WIDTH, GROUPS = 4, 8, 2
NOW_MS = 1_650_000_000_000
KERNELS = [None, (1.0,), (0.5, 30.0), (0.05, 2.0, 90.0)]


def _kernel(half_lives, dtype=torch.float64):
    if half_lives is None:
        return None
    kernel = MixtureKernel(HEADS, half_lives).to(dtype)
    with torch.no_grad():  # rates and weights of each head its own
        kernel.log_rate_HM += torch.linspace(-0.5, 0.5, HEADS)[:, None]
        kernel.weight_HM += torch.linspace(0.0, 1.0, len(half_lives))
    return kernel


def _events(length: int, codes: int, seed: int, dtype=torch.float64, days: float = 60.0):
    """Codes, values and sorted times; some seeds put all events, or many, at one time."""
    generator = torch.Generator().manual_seed(seed)
    codes_LG = torch.randint(codes, (length, GROUPS), generator=generator)
    value_LHd = torch.randn(length, HEADS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    step = [1, MS_PER_DAY, int(days * MS_PER_DAY) + 1][seed % 3]
    age_L = (torch.rand(length, generator=generator) * days * MS_PER_DAY).long() // step * step
    return codes_LG, value_LHd, torch.sort(NOW_MS - age_L).values


def _queries(targets: int, codes: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(99)
    query_THd = torch.randn(targets, HEADS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    codebook_HCd = torch.randn(HEADS, codes, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return query_THd, codebook_HCd, NOW_MS + (torch.rand(targets, generator=generator) * MS_PER_DAY).long()


def _assert_equal(left: UserCache, right: UserCache, kernel, tolerance: float) -> None:
    """Same codes, counts (relative), means and attention."""
    reference = max(left.reference_time_ms, right.reference_time_ms)
    left, right = rebase(left, reference, kernel), rebase(right, reference, kernel)
    assert torch.equal(left.log_count_HMC.isinf(), right.log_count_HMC.isinf())
    difference = (left.log_count_HMC - right.log_count_HMC).nan_to_num(0.0).abs()
    assert (difference <= tolerance * right.log_count_HMC.abs().clamp(min=1.0)).all()
    assert (left.mean_HMCd - right.mean_HMCd).abs().max() <= tolerance
    query_THd, codebook_HCd, times = _queries(3, left.log_count_HMC.shape[-1], left.mean_HMCd.dtype)
    outputs = [cache_attention(query_THd, codebook_HCd, cache, times, kernel) for cache in (left, right)]
    assert (outputs[0] - outputs[1]).abs().max() <= tolerance


def _slice(events, chosen):
    return tuple(part[chosen] for part in events)


cases = given(length=st.integers(0, 400), codes=st.sampled_from([1, 3, 32, 500]), seed=st.integers(0, 10_000))


@pytest.mark.parametrize("half_lives", KERNELS)
@settings(max_examples=20)
@cases
def test_append_and_merge_equal_a_rebuild(half_lives, length, codes, seed):
    kernel, events = _kernel(half_lives), _events(length, codes, seed)
    whole = build_cache(*events, NOW_MS, codes, kernel)
    cut = seed % (length + 1)
    first, last = _slice(events, slice(0, cut)), _slice(events, slice(cut, None))
    earlier = int(first[2].max()) if cut else NOW_MS
    _assert_equal(append(build_cache(*first, earlier, codes, kernel), *last, kernel), whole, kernel, 1e-12)
    halves = [build_cache(*_slice(events, slice(i, None, 2)), NOW_MS + i, codes, kernel) for i in range(2)]
    _assert_equal(merge(*halves, kernel), whole, kernel, 1e-12)
    _assert_equal(merge(*halves[::-1], kernel), whole, kernel, 1e-12)


@pytest.mark.parametrize("half_lives", KERNELS)
@settings(max_examples=20)
@cases
def test_the_order_of_events_does_not_matter(half_lives, length, codes, seed):
    kernel, events = _kernel(half_lives), _events(length, codes, seed)
    shuffled = _slice(events, torch.randperm(length, generator=torch.Generator().manual_seed(seed)))
    caches = [build_cache(*each, NOW_MS, codes, kernel) for each in (events, shuffled)]
    _assert_equal(*caches, kernel, 1e-12)


@pytest.mark.parametrize("half_lives", KERNELS[1:])
@settings(max_examples=20)
@given(days=st.integers(0, 4_000), seed=st.integers(0, 1_000))
def test_a_rebase_equals_building_at_the_other_time(half_lives, days, seed):
    kernel, events = _kernel(half_lives), _events(50, 8, seed)
    later = NOW_MS + days * MS_PER_DAY
    moved = rebase(build_cache(*events, NOW_MS, 8, kernel), later, kernel)
    built = build_cache(*events, later, 8, kernel)
    assert torch.allclose(moved.log_count_HMC, built.log_count_HMC, rtol=1e-12, atol=1e-12)
    assert moved.reference_time_ms == later
    _assert_equal(moved, built, kernel, 1e-11)  # 4,000 days at an hour's half-life: logs near -66,000


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("half_lives", KERNELS)
def test_a_thousand_random_operations_equal_a_rebuild(half_lives, dtype, tolerance):
    codes, draw = 16, random.Random(5)
    kernel = _kernel(half_lives, dtype)
    periods = PeriodCaches(MS_PER_DAY, codes, kernel)
    live = _events(0, codes, 0, dtype)
    now = NOW_MS
    for operation in range(1_000):
        now += draw.randrange(MS_PER_DAY // 20)
        kind = draw.choice(["append", "append", "merge", "expire", "rebase"])
        if kind in ("append", "merge"):
            fresh = _events(draw.randrange(6), codes, 3 * operation + draw.randrange(2), dtype)
            fresh = (*fresh[:2], fresh[2] - NOW_MS + now - draw.randrange(3) * MS_PER_DAY // 8)
            if kind == "append":
                periods.append(*fresh)
            else:  # another worker's caches of the same user
                other = PeriodCaches(MS_PER_DAY, codes, kernel)
                other.append(*fresh)
                for period, cache in other.caches.items():
                    mine = periods.caches.get(period)
                    periods.caches[period] = cache if mine is None else merge(cache, mine, kernel)
            live = tuple(torch.cat(pair) for pair in zip(live, fresh, strict=True))
        elif kind == "expire":
            before = now - 40 * MS_PER_DAY
            periods.expire(before)
            live = _slice(live, (live[2] // MS_PER_DAY + 1) * MS_PER_DAY > before)
        else:
            shift = draw.randrange(-2, 3) * MS_PER_DAY
            periods.caches = {p: rebase(c, c.reference_time_ms + shift, kernel) for p, c in periods.caches.items()}
        if operation % 200 == 199:
            reference = max(cache.reference_time_ms for cache in periods.caches.values())
            rebuilt = build_cache(*live, max(reference, int(live[2].max())), codes, kernel)
            _assert_equal(periods.live(), rebuilt, kernel, tolerance)
    assert len(live[2]) > 300 and len(periods.caches) > 20


def test_expired_periods_leave_nothing_behind():
    kernel, events = _kernel((0.5, 30.0)), _events(200, 8, 0)
    periods = PeriodCaches(7 * MS_PER_DAY, 8, kernel)
    periods.append(*events)
    periods.expire(NOW_MS - 14 * MS_PER_DAY)
    lasting = (events[2] // (7 * MS_PER_DAY) + 1) * 7 * MS_PER_DAY > NOW_MS - 14 * MS_PER_DAY
    assert 0 < lasting.sum() < 200
    _assert_equal(periods.live(), build_cache(*_slice(events, lasting), NOW_MS, 8, kernel), kernel, 1e-12)
    periods.expire(NOW_MS + 8 * MS_PER_DAY)
    assert periods.live() is None


def test_a_year_of_daily_appends_under_a_fast_kernel_stays_exact():
    # One event a day with an hour's half-life: linear counts would be 0 after five days.
    kernel, events = _kernel((1 / 24, 300.0), torch.float32), _events(365, 8, 0, torch.float32)
    times = NOW_MS - torch.arange(364, -1, -1) * MS_PER_DAY
    cache = build_cache(*_slice(events, slice(0, 0)), int(times[0]), 8, kernel)
    for day in range(365):
        cache = append(cache, events[0][day : day + 1], events[1][day : day + 1], times[day : day + 1], kernel)
    _assert_equal(cache, build_cache(*events[:2], times, NOW_MS, 8, kernel), kernel, 1e-5)


@settings(max_examples=25)
@cases
def test_the_sparse_form_keeps_the_non_empty_codes_alone_and_comes_back_the_same(length, codes, seed):
    kernel, events = _kernel((0.5, 30.0)), _events(length, codes, seed)
    cache = build_cache(*events, NOW_MS, codes, kernel)
    sparse = to_sparse(cache)
    used = sum(len(events[0][:, group].unique()) for group in range(GROUPS)) * (HEADS // GROUPS) * 2
    assert len(sparse.entry_K) == len(sparse.mean_Kd) == used
    back = to_dense(sparse)
    assert torch.equal(back.log_count_HMC, cache.log_count_HMC)
    assert torch.equal(back.mean_HMCd, cache.mean_HMCd)
    assert back.reference_time_ms == cache.reference_time_ms


@pytest.mark.parametrize("mean_dtype,tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_means_stored_in_half_precision_cost_what_their_mantissa_says(mean_dtype, tolerance):
    # Means of unit normal values reach 4: half a step is 2^-9 in fp16 (10 bits) there, 2^-7 in bf16 (7 bits).
    kernel, events = _kernel((0.5, 30.0), torch.float32), _events(3_000, 64, 1, torch.float32)
    cache = build_cache(*events, NOW_MS, 64, kernel)
    rounded = stored(cache, mean_dtype)
    assert rounded.mean_HMCd.dtype == mean_dtype and rounded.log_count_HMC.dtype == torch.float32
    query_THd, codebook_HCd, times = _queries(50, 64, torch.float32)
    exact, coarse = (cache_attention(query_THd, codebook_HCd, each, times, kernel) for each in (cache, rounded))
    error = float((exact - coarse).abs().max().detach())
    assert 0 < error <= tolerance
    back = to_dense(to_sparse(rounded))
    assert torch.equal(cache_attention(query_THd, codebook_HCd, back, times, kernel), coarse)


def test_large_values_survive_fp16_because_means_are_stored_and_not_sums():
    codes_LG, value_LHd, times = _events(5_000, 2, 1, torch.float32)
    rounded = stored(build_cache(codes_LG, value_LHd + 100.0, times, NOW_MS, 2, None), torch.float16)
    assert torch.isfinite(rounded.mean_HMCd).all()
    assert (rounded.mean_HMCd.float() - 100.0).abs().max() < 0.2


# --- the exact recent window: a cache of the older events and exact keys of the newest, in one softmax


def _window_problem(length, codes, seed):
    codes_LG, value_LHd, times = _events(length, codes, seed)
    query_THd, codebook_HCd, target_times = _queries(5, codes)
    code_LH = codes_LG.repeat_interleave(HEADS // GROUPS, dim=1)
    hard_LHd = codebook_HCd[torch.arange(HEADS), code_LH]
    key_LHd = hard_LHd + 0.5 * torch.randn(hard_LHd.shape, generator=torch.Generator().manual_seed(seed)).double()
    return codes_LG, value_LHd, times, query_THd, codebook_HCd, target_times, hard_LHd, key_LHd


@pytest.mark.parametrize("half_lives", KERNELS)
@settings(max_examples=20)
@given(
    length=st.integers(0, 200),
    codes=st.sampled_from([1, 3, 32]),
    seed=st.integers(0, 1_000),
    window=st.sampled_from([1, 7, 300]),
)
def test_the_windows_training_form_is_its_serving_form_is_one_softmax(half_lives, length, codes, seed, window):
    kernel = _kernel(half_lives)
    codes_LG, value_LHd, times, query_THd, codebook_HCd, target_times, hard_LHd, key_LHd = _window_problem(
        length, codes, seed
    )
    generator = torch.Generator().manual_seed(seed)
    end_T = torch.randint(length + 1, (5,), generator=generator)
    end_T[0] = length
    tail_end_T = (end_T - window).clamp(min=0)
    training = combine(
        event_part(query_THd, hard_LHd, *one_user(value_LHd, times, target_times, tail_end_T), kernel),
        window_part(query_THd, key_LHd, *one_user(value_LHd, times, target_times, end_T), kernel, window),
    ).out_THd
    for t, (end, tail_end) in enumerate(zip(end_T.tolist(), tail_end_T.tolist(), strict=True)):
        one, when = query_THd[t : t + 1], target_times[t : t + 1]
        # one softmax over keys of which the newest are exact
        mixed_LHd = torch.cat([hard_LHd[:tail_end], key_LHd[tail_end:end]])
        whole = event_attention(
            one, mixed_LHd, *one_user(value_LHd[:end], times[:end], when, torch.tensor([end])), kernel
        )
        assert (training[t] - whole[0]).abs().max() <= 1e-10
        # serving: the cache of the older events and the newest ones
        cache = build_cache(codes_LG[:tail_end], value_LHd[:tail_end], times[:tail_end], NOW_MS, codes, kernel)
        newest = slice(tail_end, end)
        seen = one_user(value_LHd[newest], times[newest], when, torch.tensor([end - tail_end]))
        recent = window_part(one, key_LHd[newest], *seen, kernel, window)
        serving = combine(cache_part(one, codebook_HCd, cache, when, kernel), recent).out_THd
        assert (training[t] - serving[0]).abs().max() <= 1e-10


def test_the_windows_keys_get_the_task_gradient_and_hidden_events_get_none():
    _, value_LHd, times, query_THd, _, target_times, hard_LHd, key_LHd = _window_problem(40, 8, 0)
    key_LHd.requires_grad_(True)
    end_T = torch.full((5,), 30)
    tail = event_part(query_THd, hard_LHd, *one_user(value_LHd, times, target_times, end_T - 8), None)
    recent = window_part(query_THd, key_LHd, *one_user(value_LHd, times, target_times, end_T), None, 8)
    combine(tail, recent).out_THd.square().sum().backward()
    touched = key_LHd.grad.abs().sum((1, 2)) > 0
    assert touched.nonzero()[:, 0].tolist() == list(range(22, 30))


def test_gradients_stay_finite_for_targets_that_see_nothing():
    kernel = _kernel((0.5, 30.0))
    _, value_LHd, times, query_THd, _, target_times, hard_LHd, key_LHd = _window_problem(40, 8, 0)
    for tensor in (query_THd, value_LHd, hard_LHd, key_LHd):
        tensor.requires_grad_(True)
    end_T = torch.tensor([0, 0, 3, 10, 40])
    tail = event_part(query_THd, hard_LHd, *one_user(value_LHd, times, target_times, (end_T - 8).clamp(min=0)), kernel)
    recent = window_part(query_THd, key_LHd, *one_user(value_LHd, times, target_times, end_T), kernel, 8)
    out_THd = combine(tail, recent).out_THd
    assert out_THd[:2].abs().max() == 0
    out_THd.square().sum().backward()
    gradients = [tensor.grad for tensor in (query_THd, value_LHd, hard_LHd, key_LHd, *kernel.parameters())]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_merge_all_of_one_cache_is_that_cache():
    cache = build_cache(*_events(10, 4, 0), NOW_MS, 4, None)
    assert merge_all([cache], None) is cache

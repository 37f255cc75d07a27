"""The factored pass is the item-level straight-through pass: same output, same gradients, whatever the cut-offs.

Legend: L events, T targets, H heads, d head width, G groups.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.warehouse.partitions import MS_PER_DAY
from training.model.attention import NOTHING, CodedKeys, combine, event_part, window_part
from training.model.factored import (
    TARGETS_PER_SEGMENT,
    bounded_factored_attention,
    factored_attention,
    prefers_factored,
)
from training.model.fused_codes import preferred
from training.model.history import one_user
from training.model.kernel import MixtureKernel

torch.set_num_threads(1)  # many small products: a second thread only waits

HEADS, WIDTH, GROUPS = 4, 4, 2
NOW_MS = 1_650_000_000_000
KERNELS = [None, (1.0,), (0.5, 30.0), (1 / 24, 2.0, 90.0)]


def _kernel(half_lives, dtype):
    if half_lives is None:
        return None
    kernel = MixtureKernel(HEADS, half_lives).to(dtype)
    with torch.no_grad():
        kernel.log_rate_HM += torch.linspace(-0.5, 0.5, HEADS)[:, None]
        kernel.weight_HM += torch.linspace(0.0, 1.0, len(half_lives))
    return kernel


def _problem(length, targets, codes, seed, cut_offs, dtype=torch.float64, one_code=False):
    """Leaf tensors and fixed inputs of one user; `cut_offs` distinct cut-offs at most."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    codes_LG = torch.randint(1 if one_code else codes, (length, GROUPS), generator=generator)
    step = [1, MS_PER_DAY, 100 * MS_PER_DAY][seed % 3]  # ties in time, or all times equal
    times = torch.sort(
        NOW_MS - (torch.rand(length, generator=generator) * 60 * MS_PER_DAY).long() // step * step
    ).values
    choices = torch.randint(length + 1, (cut_offs,), generator=generator)
    end_T = choices[torch.randint(cut_offs, (targets,), generator=generator)]
    gap = torch.randint(3 * MS_PER_DAY, (targets,), generator=generator)
    target_times = torch.where(end_T > 0, times[(end_T - 1).clamp(min=0)] if length else NOW_MS, NOW_MS) + gap
    leaves = [normal(targets, HEADS, WIDTH), normal(length, HEADS, WIDTH), normal(length, HEADS, WIDTH)]
    return leaves, normal(HEADS, codes, WIDTH), codes_LG, times, target_times, end_T


def _item_level(leaves, codebook_HCd, codes_LG, times, target_times, end_T, kernel):
    query_THd, key_LHd, value_LHd = leaves
    code_LH = codes_LG.repeat_interleave(HEADS // GROUPS, dim=1)
    hard_LHd = key_LHd + (codebook_HCd[torch.arange(HEADS), code_LH] - key_LHd).detach()
    return event_part(query_THd, hard_LHd, *one_user(value_LHd, times, target_times, end_T), kernel)


def _factored(leaves, codebook_HCd, codes_LG, times, target_times, end_T, kernel):
    query_THd, key_LHd, value_LHd = leaves
    keys = CodedKeys(key_LHd, codebook_HCd, codes_LG)
    return factored_attention(query_THd, keys, *one_user(value_LHd, times, target_times, end_T), kernel)


def _outputs_and_gradients(attend, problem, kernel):
    leaves, *rest = problem
    leaves = [leaf.clone().requires_grad_(True) for leaf in leaves]
    part = attend(leaves, *rest, kernel)
    generator = torch.Generator().manual_seed(1)
    pull = torch.randn(part.out_THd.shape, generator=generator, dtype=torch.float64).to(part.out_THd.dtype)
    loss = (pull * part.out_THd).sum() + (torch.sin(part.out_THd)).sum()
    loss = loss + 0.0 * leaves[0].sum()  # an empty history leaves the graph empty
    seen = part.lse_TH > NOTHING / 2
    loss = loss + (pull[..., 0] * part.lse_TH)[seen].sum()
    parameters = leaves + ([] if kernel is None else list(kernel.parameters()))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return [part.out_THd.detach(), torch.where(seen, part.lse_TH, NOTHING).detach(), *zeros]


def _assert_same(problem, kernel, tolerance, expected=_item_level, found=_factored):
    pairs = zip(
        _outputs_and_gradients(expected, problem, kernel),
        _outputs_and_gradients(found, problem, kernel),
        strict=True,
    )
    for expected, found in pairs:
        assert expected.shape == found.shape
        if expected.numel():
            assert torch.isfinite(found).all()
            assert (expected - found).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("half_lives", [None, (0.5, 30.0)])
@settings(max_examples=20)
@given(
    length=st.integers(0, 300),
    targets=st.integers(1, 80),
    most=st.integers(1, 300),
    seed=st.integers(0, 10_000),
    cut_offs=st.sampled_from([1, 2, 20, 10_000]),
)
def test_the_bounded_factored_pass_equals_the_item_level_with_the_same_bound(
    half_lives, length, targets, most, seed, cut_offs
):
    problem = _problem(length, targets, 16, seed, cut_offs)
    first_T = (problem[-1] - most).clamp(min=0)

    def item_level(leaves, codebook_HCd, codes_LG, times, target_times, end_T, kernel):
        hard_LHd = CodedKeys(leaves[1], codebook_HCd, codes_LG).hard_LHd()
        return event_part(leaves[0], hard_LHd, *one_user(leaves[2], times, target_times, end_T, first_T), kernel)

    def bounded(leaves, codebook_HCd, codes_LG, times, target_times, end_T, kernel):
        seen = one_user(leaves[2], times, target_times, end_T, first_T)
        return bounded_factored_attention(leaves[0], CodedKeys(leaves[1], codebook_HCd, codes_LG), *seen, kernel)

    _assert_same(problem, _kernel(half_lives, torch.float64), 1e-10, item_level, bounded)


@pytest.mark.parametrize("half_lives", KERNELS)
@settings(max_examples=30)
@given(
    length=st.integers(0, 300),
    targets=st.integers(1, 150),
    codes=st.sampled_from([1, 3, 16, 400]),
    seed=st.integers(0, 10_000),
    cut_offs=st.sampled_from([1, 2, 20, 10_000]),
)
def test_factored_equals_item_level_for_any_cut_offs(half_lives, length, targets, codes, seed, cut_offs):
    kernel = _kernel(half_lives, torch.float64)
    _assert_same(_problem(length, targets, codes, seed, cut_offs), kernel, 1e-10)


@pytest.mark.parametrize("half_lives", KERNELS)
@pytest.mark.parametrize("cut_offs", [1, 14, 10_000])
def test_long_histories_in_both_precisions(half_lives, cut_offs):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        _assert_same(_problem(2_000, 300, 32, 4, cut_offs, dtype), _kernel(half_lives, dtype), tolerance)


def test_all_events_in_one_code_of_many():
    _assert_same(_problem(500, 100, 64, 0, 10, one_code=True), _kernel((0.5, 30.0), torch.float64), 1e-10)


def test_a_long_gap_under_a_fast_kernel_stays_finite_and_right():
    # Half of the events a year before the others: under an hour's half-life their weight is e^-6000.
    leaves, codebook, codes_LG, times, target_times, end_T = _problem(200, 60, 8, 1, 10)
    times[:100] -= 365 * MS_PER_DAY
    for half_lives in ((1 / 24,), (1 / 24, 300.0)):
        _assert_same(
            (leaves, codebook, codes_LG, times, target_times, end_T), _kernel(half_lives, torch.float64), 1e-10
        )


def test_gradients_of_queries_values_and_kernel_pass_a_numerical_check():
    leaves, codebook, codes_LG, times, target_times, end_T = _problem(30, 40, 5, 1, 10_000)
    kernel = _kernel((0.5, 30.0), torch.float64)
    query_THd, key_LHd, value_LHd = leaves

    def attend(query_THd, value_LHd, log_rate_HM, weight_HM):
        kernel.log_rate_HM, kernel.weight_HM = torch.nn.Parameter(log_rate_HM), torch.nn.Parameter(weight_HM)
        del kernel.log_rate_HM, kernel.weight_HM
        kernel.log_rate_HM, kernel.weight_HM = log_rate_HM, weight_HM
        seen = one_user(value_LHd, times, target_times, end_T)
        part = factored_attention(query_THd, CodedKeys(key_LHd, codebook, codes_LG), *seen, kernel)
        return part.out_THd, part.lse_TH.clamp(min=-1e3)

    inputs = (query_THd, value_LHd, kernel.log_rate_HM.detach().clone(), kernel.weight_HM.detach().clone())
    del kernel.log_rate_HM, kernel.weight_HM
    kernel.log_rate_HM, kernel.weight_HM = inputs[2], inputs[3]
    assert torch.autograd.gradcheck(attend, tuple(tensor.requires_grad_(True) for tensor in inputs), fast_mode=True)


def test_the_codebook_gets_no_gradient_from_the_task_and_the_keys_do():
    leaves, codebook, *rest = _problem(50, 40, 5, 1, 10_000)
    leaves[1].requires_grad_(True)
    codebook.requires_grad_(True)
    _factored(leaves, codebook, *rest, None).out_THd.square().sum().backward()
    assert codebook.grad is None or codebook.grad.abs().max() == 0
    assert leaves[1].grad.abs().max() > 0


def test_events_after_the_cut_offs_change_nothing():
    leaves, codebook, codes_LG, times, target_times, _ = _problem(80, 50, 5, 1, 1)
    end_T = torch.arange(50) % 40
    kernel = _kernel((0.5, 30.0), torch.float64)
    before = _factored(leaves, codebook, codes_LG, times, target_times, end_T, kernel).out_THd
    leaves[2][39:] += 100.0
    codes_LG[39:] = 0
    times[39:] += MS_PER_DAY
    assert torch.equal(before, _factored(leaves, codebook, codes_LG, times, target_times, end_T, kernel).out_THd)


def test_it_joins_with_an_exact_window_as_the_item_level_pass_does():
    problem = _problem(200, 70, 8, 1, 10_000)
    kernel = _kernel((0.5, 30.0), torch.float64)

    def windowed(attend):
        def both(leaves, codebook, codes_LG, times, target_times, end_T, kernel):
            tail = attend(leaves, codebook, codes_LG, times, target_times, (end_T - 16).clamp(min=0), kernel)
            query_THd, key_LHd, value_LHd = leaves
            seen = one_user(value_LHd, times, target_times, end_T)
            return combine(tail, window_part(query_THd, key_LHd, *seen, kernel, 16))

        return both

    pairs = zip(
        _outputs_and_gradients(windowed(_item_level), problem, kernel),
        _outputs_and_gradients(windowed(_factored), problem, kernel),
        strict=True,
    )
    assert all((expected - found).abs().max() <= 1e-10 for expected, found in pairs)


def test_memory_does_not_hold_a_t_times_l():
    """What the pass saves for its gradient grows by a multiple of L + T, not of L T."""

    def saved(length, targets):
        leaves, *rest = _problem(length, targets, 16, 1, 10_000, torch.float32)
        sizes = []
        leaves = [leaf.requires_grad_(True) for leaf in leaves]

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _factored(leaves, *rest, _kernel((0.5, 30.0), torch.float32))
        return sum(sizes)

    small, large = saved(1_000, 8 * TARGETS_PER_SEGMENT), saved(4_000, 32 * TARGETS_PER_SEGMENT)
    assert large <= 4.5 * small


def test_the_pass_is_chosen_by_size():
    # milliseconds of item level / factored, one thread: see benchmarks/factored.py
    assert not prefers_factored(length=256, targets=64, cut_offs=1, with_kernel=True)  # 2.1 / 4.3
    assert not prefers_factored(length=1_024, targets=64, cut_offs=14, with_kernel=False)  # 1.8 / 13
    assert not prefers_factored(length=4_096, targets=128, cut_offs=128, with_kernel=False)  # 14 / 19
    assert prefers_factored(length=4_096, targets=64, cut_offs=1, with_kernel=True)  # 23 / 9
    assert prefers_factored(length=16_384, targets=256, cut_offs=14, with_kernel=False)  # 111 / 29
    assert prefers_factored(length=16_384, targets=256, cut_offs=256, with_kernel=True)  # 1220 / 90


def test_the_pass_on_a_gpu_is_chosen_by_size():
    """Measured: 16,384 events pay from some hundred targets on, with sixteen cut-offs too; 2,048 hardly ever do."""
    sizes = [  # events, targets, cut-offs, whether the factored pass was faster
        (16_384, 64, 1, True),
        (16_384, 64, 16, False),
        (16_384, 256, 16, True),
        (16_384, 256, 64, False),
        (16_384, 1_024, 64, True),
        (2_048, 64, 1, False),
        (2_048, 1_024, 1, True),
        (512, 256, 1, False),
        (0, 5, 1, False),
        (5, 0, 0, False),
    ]
    events, targets, cut_offs, faster = zip(*sizes, strict=True)
    starts = ([0, *accumulate(counts)] for counts in (events, targets))
    assert preferred(*starts, cut_offs, torch.Size((4, 128, 16)), 2).tolist() == list(faster)
    # Few targets do not fill its kernels: 32 users need some thousand events each (1.32, 1.37 ms; 1.54, 1.48 ms).
    for length, faster in (4_096, False), (8_192, True):
        starts = (list(range(0, 33 * each, each)) for each in (length, 64))
        assert (preferred(*starts, [1] * 32, torch.Size((4, 128, 16)), 2) == faster).all()
    # Tables of a head this wide would not fit.
    assert not preferred([0, 10**6], [0, 10**4], [1], torch.Size((4, 128, 128)), 2).any()

"""Refined codes: the serving form over an inverted file is the training form, and the selection is what it says.

Legend: L events, T targets, H heads, d head width, G groups.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.warehouse.partitions import MS_PER_DAY
from training.model.attention import CodedKeys, cache_attention, combine, event_attention, window_part
from training.model.cache import build_cache
from training.model.history import one_user
from training.model.kernel import MixtureKernel
from training.model.refined import CodedHistory, index_events, refined_cache_part, refined_event_part

torch.set_num_threads(1)

HEADS, WIDTH, GROUPS = 4, 8, 2
NOW_MS = 1_650_000_000_000
KERNELS = [None, (1.0,), (0.5, 30.0), (1 / 24, 2.0, 90.0)]


def _kernel(half_lives, dtype=torch.float64):
    if half_lives is None:
        return None
    kernel = MixtureKernel(HEADS, half_lives).to(dtype)
    with torch.no_grad():
        kernel.log_rate_HM += torch.linspace(-0.5, 0.5, HEADS)[:, None]
    return kernel


class Problem:
    """One user's history with keys near their codewords."""

    def __init__(self, length, codes, seed, dtype=torch.float64, targets=5, one_code=False):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        step = [1, MS_PER_DAY, 100 * MS_PER_DAY][seed % 3]
        age_L = (torch.rand(length, generator=generator) * 60 * MS_PER_DAY).long() // step * step
        self.codes = codes
        self.times = torch.sort(NOW_MS - age_L).values
        self.codes_LG = torch.randint(1 if one_code else codes, (length, GROUPS), generator=generator)
        self.codebook = normal(HEADS, codes, WIDTH)
        self.hard = self.codebook[torch.arange(HEADS), self.codes_LG.repeat_interleave(HEADS // GROUPS, dim=1)]
        self.keys, self.values = self.hard + 0.4 * normal(length, HEADS, WIDTH), normal(length, HEADS, WIDTH)
        self.queries = normal(targets, HEADS, WIDTH)
        self.target_times = NOW_MS + torch.randint(MS_PER_DAY, (targets,), generator=generator)

    def training(self, kernel, refine, end_T=None):
        end_T = torch.full((len(self.queries),), len(self.keys)) if end_T is None else end_T
        keys = CodedKeys(self.keys, self.codebook, self.codes_LG)
        seen = one_user(self.values, self.times, self.target_times, end_T)
        return refined_event_part(self.queries, keys, *seen, kernel, refine)

    def serving(self, kernel, refine, until=None):
        seen = slice(0, until)
        cache = build_cache(self.codes_LG[seen], self.values[seen], self.times[seen], NOW_MS, self.codes, kernel)
        index = index_events(self.codes_LG[seen], self.codes)
        history = CodedHistory(cache, index, self.keys[seen], self.values[seen], self.times[seen])
        return refined_cache_part(self.queries, self.codebook, history, self.target_times, kernel, refine)


@pytest.mark.parametrize("half_lives", KERNELS)
@settings(max_examples=40)
@given(
    length=st.integers(0, 300),
    codes=st.sampled_from([1, 3, 16, 400]),
    seed=st.integers(0, 10_000),
    refine=st.sampled_from([1, 5, 64]),
)
@torch.no_grad()
def test_serving_equals_training(half_lives, length, codes, seed, refine):
    problem, kernel = Problem(length, codes, seed), _kernel(half_lives)
    training, serving = problem.training(kernel, refine), problem.serving(kernel, refine)
    assert (training.out_THd - serving.out_THd).abs().max() <= 1e-10
    assert (training.lse_TH - serving.lse_TH).abs().max() <= 1e-10


@pytest.mark.parametrize("half_lives", KERNELS)
@torch.no_grad()
def test_serving_equals_training_in_single_precision(half_lives):
    for seed in range(8):
        problem, kernel = Problem(500, 32, seed, torch.float32), _kernel(half_lives, torch.float32)
        training, serving = problem.training(kernel, 16), problem.serving(kernel, 16)
        assert (training.out_THd - serving.out_THd).abs().max() <= 2e-5


@torch.no_grad()
def test_events_of_two_equal_codewords_are_refined_newest_first_too():
    for seed in range(6):
        problem = Problem(120, 4, seed)
        problem.codebook[:] = problem.codebook[:, :1]
        training, serving = problem.training(None, 10), problem.serving(None, 10)
        assert (training.out_THd - serving.out_THd).abs().max() <= 1e-10


@torch.no_grad()
def test_a_history_open_as_a_whole_is_exact_attention():
    for seed in range(6):
        problem, kernel = Problem(40, 8, seed), _kernel((0.5, 30.0))
        seen = one_user(problem.values, problem.times, problem.target_times, torch.full((5,), 40))
        exact = event_attention(problem.queries, problem.keys, *seen, kernel)
        assert (problem.serving(kernel, 64).out_THd - exact).abs().max() <= 1e-10
        assert (problem.training(kernel, 40).out_THd - exact).abs().max() <= 1e-10


@torch.no_grad()
def test_the_events_with_the_highest_quantized_logits_are_refined_and_newer_ones_first():
    # Without a kernel events of one code tie: the brute force below orders by (logit, position).
    problem = Problem(120, 6, 1)
    for refine in (1, 10, 50):
        found = problem.training(None, refine)
        logit_HTL = torch.einsum("thd,lhd->htl", problem.queries, problem.hard)
        exact_HTL = torch.einsum("thd,lhd->htl", problem.queries, problem.keys)
        code_LH = problem.codes_LG.repeat_interleave(HEADS // GROUPS, dim=1)
        for h in range(HEADS):
            for t in range(5):
                scores = (problem.queries[t, h] @ problem.codebook[h].T)[code_LH[:, h]]
                ranked = sorted(range(120), key=lambda i: (float(scores[i]), i), reverse=True)[:refine]
                logits = logit_HTL[h, t].clone()
                logits[ranked] = exact_HTL[h, t, ranked]
                assert torch.allclose(found.out_THd[t, h], logits.softmax(0) @ problem.values[:, h], atol=1e-10)


@torch.no_grad()
def test_refining_brings_the_output_nearer_to_exact_attention():
    problem, kernel = Problem(2_000, 16, 1, targets=40), _kernel((2.0, 180.0))
    end_T = torch.full((40,), 2_000)
    seen = one_user(problem.values, problem.times, problem.target_times, end_T)
    exact = event_attention(problem.queries, problem.keys, *seen, kernel)
    cache = build_cache(problem.codes_LG, problem.values, problem.times, NOW_MS, 16, kernel)
    plain = cache_attention(problem.queries, problem.codebook, cache, problem.target_times, kernel)
    errors = [float((plain - exact).norm())]
    errors += [float((problem.serving(kernel, refine).out_THd - exact).norm()) for refine in (16, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.9 * errors[0]


@torch.no_grad()
def test_it_joins_with_an_exact_window():
    problem, kernel, window = Problem(200, 8, 1), _kernel((0.5, 30.0)), 16
    end_T = torch.full((5,), 200)
    seen = one_user(problem.values, problem.times, problem.target_times, end_T)
    recent = window_part(problem.queries, problem.keys, *seen, kernel, window)
    training = combine(problem.training(kernel, 32, end_T - window), recent)
    serving = combine(problem.serving(kernel, 32, until=200 - window), recent)
    assert (training.out_THd - serving.out_THd).abs().max() <= 1e-10


def test_targets_see_only_what_lies_before_their_cut_off():
    problem, kernel = Problem(80, 8, 1), _kernel((0.5, 30.0))
    ends = torch.tensor([0, 1, 20, 40, 60])
    before = problem.training(kernel, 16, ends)
    assert before.out_THd[0].abs().max() == 0
    problem.values[60:] += 100.0
    problem.keys[60:] *= 5.0
    assert torch.equal(before.out_THd, problem.training(kernel, 16, ends).out_THd)


def test_gradients_reach_queries_and_keys_and_never_the_codebook():
    problem, kernel = Problem(80, 8, 1), _kernel((0.5, 30.0))
    tensors = [problem.queries, problem.keys, problem.values, problem.codebook, *kernel.parameters()]
    for tensor in tensors:
        tensor.requires_grad_(True)
    problem.training(kernel, 16, torch.tensor([0, 1, 20, 40, 60])).out_THd.square().sum().backward()
    assert problem.codebook.grad is None
    for tensor in (*tensors[:3], *kernel.parameters()):
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().max() > 0


def test_a_fully_refined_pass_has_the_gradients_of_exact_attention():
    problem, end_T = Problem(30, 8, 1), torch.full((5,), 30)

    def gradients(attend):
        leaves = [t.detach().clone().requires_grad_(True) for t in (problem.queries, problem.keys, problem.values)]
        return torch.autograd.grad(attend(*leaves).square().sum(), leaves)

    def exact(q, k, v):
        return event_attention(q, k, *one_user(v, problem.times, problem.target_times, end_T), None)

    def refined(q, k, v):
        seen = one_user(v, problem.times, problem.target_times, end_T)
        return refined_event_part(q, CodedKeys(k, problem.codebook, problem.codes_LG), *seen, None, 30).out_THd

    for expected, found in zip(gradients(exact), gradients(refined), strict=True):
        assert (expected - found).abs().max() <= 1e-10


@torch.no_grad()
def test_serving_reads_as_many_keys_for_a_long_history_as_for_a_short_one():
    """Keys and values are read by index alone; count what is read."""

    class Counting(torch.Tensor):
        read = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            if function is torch.Tensor.__getitem__:
                cls.read += result.numel()
            elif isinstance(result, torch.Tensor) and args and isinstance(args[0], Counting) and args[0].dim() == 3:
                assert result.numel() <= args[0].numel() and function.__name__ in ("__get__", "dim", "size"), function
            return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result

    reads = []
    for length in (200, 20_000):
        problem = Problem(length, 8, 1)
        Counting.read = 0
        problem.keys, index = problem.keys.as_subclass(Counting), index_events(problem.codes_LG, 8)
        cache = build_cache(problem.codes_LG, problem.values, problem.times, NOW_MS, 8, None)
        history = CodedHistory(cache, index, problem.keys, problem.values, problem.times)
        refined_cache_part(problem.queries, problem.codebook, history, problem.target_times, None, 16)
        reads.append(Counting.read)
    assert reads[0] == reads[1] == 5 * HEADS * 16 * WIDTH


def test_the_index_holds_every_event_once_oldest_first():
    problem = Problem(100, 7, 0)
    index = index_events(problem.codes_LG, 7)
    for group in range(GROUPS):
        for code in range(7):
            first, last = index.start_GX[group, code], index.start_GX[group, code + 1]
            mine = (problem.codes_LG[:, group] == code).nonzero()[:, 0]
            assert torch.equal(index.event_GL[group, first:last], mine)

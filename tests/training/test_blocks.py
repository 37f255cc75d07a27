"""The pass over all users at once is the pass over each user alone, for any lengths and cut-offs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.model.attention import CodedKeys, combine, event_attention, event_part, window_part
from training.model.blocks import Exact, Layout, block_attention
from training.model.fused import Seen
from training.model.history import one_user
from training.model.kernel import MixtureKernel
from training.model.refined import refined_event_part

HEADS, WIDTH, CODES, DAY_MS, NOW_MS = 2, 4, 5, 86_400_000, 1_650_000_000_000
USERS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 7)), max_size=6)


def problem(users, seed, half_lives):
    generator = torch.Generator().manual_seed(seed)
    events, targets = sum(n for n, _ in users), sum(t for _, t in users)
    query, key, value = (
        torch.randn(n, HEADS, WIDTH, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in (targets, events, events)
    )
    starts = [0, *itertools.accumulate(n for n, _ in users)], [0, *itertools.accumulate(t for _, t in users)]
    times = (
        torch.cat(
            [
                torch.zeros(0, dtype=torch.long),
                *((torch.randint(0, 400 * DAY_MS, (n,), generator=generator)).sort().values for n, _ in users),
            ]
        )
        + NOW_MS
    )
    end = torch.cat(
        [torch.zeros(0, dtype=torch.long), *(torch.randint(0, n + 1, (t,), generator=generator) for n, t in users)]
    )
    codes = torch.randint(CODES, (events, HEADS), generator=generator)
    book = torch.randn(HEADS, CODES, WIDTH, dtype=torch.float64, generator=generator)
    kernel = MixtureKernel(HEADS, half_lives).double() if half_lives else None
    return query, key, value, times, torch.full((targets,), NOW_MS + 500 * DAY_MS), end, codes, book, kernel, starts


def one_by_one(attend, starts):
    parts = [
        attend(slice(*e), slice(*t))
        for e, t in zip(itertools.pairwise(starts[0]), itertools.pairwise(starts[1]), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, HEADS, WIDTH, dtype=torch.float64)


@settings(max_examples=40)
@given(
    users=USERS,
    seed=st.integers(0, 1000),
    half_lives=st.sampled_from([(), (0.1, 100.0)]),
    block=st.integers(1, 9),
    tile=st.integers(1, 5),
    most_pairs=st.integers(1, 40),
)
def test_all_users_at_once_are_each_user_alone_with_equal_gradients(users, seed, half_lives, block, tile, most_pairs):
    query, key, value, times, at, end, _, _, kernel, starts = problem(users, seed, half_lives)
    layouts = Layout.of(*starts, query.device, block, tile, most_pairs)
    together = torch.cat(
        [block_attention(layout, query, key, value, Seen(times, at, end), kernel) for layout in layouts]
    )
    alone = one_by_one(
        lambda e, t: event_attention(query[t], key[e], *one_user(value[e], times[e], at[t], end[t]), kernel), starts
    )
    assert torch.allclose(together, alone, atol=1e-12)
    weight = torch.randn(together.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    leaves = [query, key, value, *(kernel.parameters() if kernel else ())]
    if len(query) and len(key):
        for ours, theirs in zip(
            *(
                torch.autograd.grad(
                    (out * weight).sum() + 0 * query.sum(), leaves, retain_graph=True, materialize_grads=True
                )
                for out in (together, alone)
            ),
            strict=True,
        ):
            assert torch.allclose(ours, theirs, atol=1e-11)


@settings(max_examples=40)
@given(
    users=USERS,
    seed=st.integers(0, 1000),
    half_lives=st.sampled_from([(), (0.1, 100.0)]),
    window=st.integers(0, 6),
    refine=st.integers(0, 12),
)
def test_recent_window_and_refined_codes_are_those_of_each_user_alone(users, seed, half_lives, window, refine):
    query, key, value, times, at, end, codes, book, kernel, starts = problem(users, seed, half_lives)
    hard = CodedKeys(key, book, codes).hard_LHd() if len(key) else key
    tail = (end - window).clamp(min=0)

    def alone(e, t):
        older = one_user(value[e], times[e], at[t], tail[t])
        if refine:
            part = refined_event_part(query[t], CodedKeys(key[e], book, codes[e]), *older, kernel, refine)
        else:
            part = event_part(query[t], hard[e], *older, kernel)
        newest = one_user(value[e], times[e], at[t], end[t])
        return combine(window_part(query[t], key[e], *newest, kernel, window), part).out_THd if window else part.out_THd

    (layout,) = Layout.of(*starts, query.device, block=4, tile=3)
    together = block_attention(
        layout, query, hard, value, Seen(times, at, end, exact_from_T=tail), kernel, Exact(key, refine)
    )
    assert torch.allclose(together, one_by_one(alone, starts), atol=1e-11)


def test_the_number_of_rows_follows_the_events_and_not_the_longest_history():
    lengths = [100_000, *[10] * 99]
    (layout,) = Layout.of([0, *itertools.accumulate(lengths)], list(range(0, 64 * 101, 64)), torch.device("cpu"))
    assert layout.event_NB.numel() <= sum(lengths) + 100 * 256
    assert layout.event_NB[layout.place_NB < 2**40].sort().values.tolist() == list(range(sum(lengths)))


@pytest.mark.parametrize("users", [[], [(0, 3)], [(3, 0)]])
def test_users_without_events_or_without_targets_are_no_error(users):
    query, key, value, times, at, end, *_, starts = problem(users, 0, ())
    (layout,) = Layout.of(*starts, query.device)
    out = block_attention(layout, query, key, value, Seen(times, at, end), None)
    assert out.shape == query.shape and not out.any()

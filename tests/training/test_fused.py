"""The fused pass is the plain one in double precision, for any histories. On a GPU, or by Triton's interpreter where
that is installed:

python -m pytest --noconftest tests/training/test_fused.py
TRITON_INTERPRET=1 python -m pytest --noconftest tests/training/test_fused.py
"""

import copy
import importlib.util
import itertools
import os
import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from training.model import fused as fused_module
from training.model.blocks import Exact, Layout, block_attention
from training.model.fused import Seen, Work, fused_attention
from training.model.fused_rows import Places, gathered, normalised, summed
from training.model.kernel import MixtureKernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="needs a GPU, or Triton's interpreter"),
]
DAY_MS, NOW_MS = 86_400_000, 1_650_000_000_000
SEED = random.SystemRandom().randrange(2**31)  # fresh inputs in every run; pytest prints it with a failure
USERS = [(130, 5), (0, 3), (7, 0), (64, 1), (200, 70), (1, 1), (3, 130)]
TOLERANCE = {"exact": 2e-5, "tf32": 1e-3, "bf16": 6e-3}


@dataclass
class Case:
    """Rows are query, key, value and exact key, in double precision."""

    rows: list[torch.Tensor]
    seen: Seen
    kernel: MixtureKernel | None
    starts: tuple[list[int], list[int]]
    weight: torch.Tensor


def case(users=USERS, half_lives=(2.0, 180.0), heads=2, width=16, days=400, first=False, window=None) -> Case:
    print("seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    normal = lambda rows: F.layer_norm(rows, (width,)) * width**-0.25  # noqa: E731
    events, targets = (sum(counts) for counts in zip(*users, strict=True))
    shapes = [(count, heads, width) for count in (targets, events, events)]
    query, key, exact = (normal(draw(*shape)) for shape in shapes)
    time, end, at = [], [], []
    for length, count in users:
        time.append(NOW_MS + torch.randint(0, max(1, int(days * DAY_MS)), (length,), generator=generator).sort().values)
        end.append(torch.randint(0, length + 1, (count,), generator=generator))
        end[-1][:1] = 0  # a target that sees nothing
        newest = time[-1][(end[-1] - 1).clamp(min=0)] if length else torch.full((count,), NOW_MS)
        at.append(newest + torch.randint(0, 5 * DAY_MS, (count,), generator=generator))
    time_E, end_T, at_T = (torch.cat(parts) for parts in (time, end, at))
    first_T = (torch.rand(targets, generator=generator) * (end_T + 1)).long().clamp(max=end_T) if first else None
    seen = Seen(time_E, at_T, end_T, first_T, None if window is None else (end_T - window).clamp(min=0))
    kernel = None
    if half_lives:
        kernel = MixtureKernel(heads, half_lives).double()
        with torch.no_grad():
            kernel.weight_HM += draw(*kernel.weight_HM.shape)
    starts = tuple([0, *itertools.accumulate(counts)] for counts in zip(*users, strict=True))
    return Case([query, key, draw(events, heads, width), exact], seen, kernel, starts, draw(targets, heads, width))


def on_device(made: Case) -> Case:
    move = lambda rows: None if rows is None else rows.to(DEVICE)  # noqa: E731
    seen = Seen(*(move(getattr(made.seen, name)) for name in made.seen.__dataclass_fields__))
    kernel = None if made.kernel is None else copy.deepcopy(made.kernel).to(DEVICE)
    return replace(made, rows=[move(rows) for rows in made.rows], seen=seen, kernel=kernel, weight=move(made.weight))


def outputs(attend, made: Case, dtype) -> dict[str, torch.Tensor]:
    """Outputs and gradients; the exact keys' gradient counts as the keys', straight through."""
    leaves = [rows.to(dtype).detach().requires_grad_() for rows in made.rows]
    kernel = None if made.kernel is None else copy.deepcopy(made.kernel).to(dtype)
    out = attend(*leaves, kernel)
    parameters = list(kernel.parameters()) if kernel else []
    found = torch.autograd.grad(
        (out * made.weight.to(out.dtype)).sum(), leaves + parameters, allow_unused=True, materialize_grads=True
    )
    query, key, value, exact, *rest = found
    names = {"out": out.detach(), "query": query, "key": key + exact, "value": value}
    return names | ({"kernel": torch.cat([grad.flatten() for grad in rest])} if rest else {})


def plain(made: Case) -> dict[str, torch.Tensor]:
    made, seen = on_device(made), on_device(made).seen

    def attend(query, key, value, exact, kernel):
        given = query, key, value, seen, kernel, None if seen.exact_from_T is None else Exact(exact)
        return torch.cat([block_attention(layout, *given) for layout in Layout.of(*made.starts, DEVICE)])

    return outputs(attend, made, torch.float64)


def fused(made: Case, precision="exact") -> dict[str, torch.Tensor]:
    made = on_device(made)
    work = Work.of(*made.starts, made.rows[0].shape[1], DEVICE)

    def attend(query, key, value, exact, kernel):
        return fused_attention(
            work, query, key, value, made.seen, kernel, None if made.seen.exact_from_T is None else exact
        )

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "exact" else "high")
    try:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            return outputs(attend, made, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def apart(ours: torch.Tensor, theirs: torch.Tensor, least: float = 0.0) -> float:
    """Relative distance, of numbers that are not all near zero; NaN, which is near nothing, stays NaN."""
    size = theirs.double().norm().clamp(min=max(1e-12, least * theirs.numel() ** 0.5))
    return float((ours.double() - theirs.double()).norm() / size)


def check(made: Case, precision="exact", least=0.0, times=1):
    ours, theirs = fused(made, precision), plain(made)
    distances = {name: apart(ours[name], theirs[name], least) for name in theirs}
    print(precision, {name: f"{distance:.1e}" for name, distance in distances.items()})
    for name, distance in distances.items():
        # A kernel's gradients are small differences of large sums.
        assert distance < times * TOLERANCE[precision] * (10 if name == "kernel" else 1), (name, distances)


@pytest.mark.parametrize("precision", TOLERANCE if DEVICE.type == "cuda" else ["exact"])
@pytest.mark.parametrize("half_lives", [(), (2.0, 180.0), (0.1, 5.0, 100.0)])
@pytest.mark.parametrize("keys", ["all", "bounded", "window"])
def test_outputs_and_gradients_are_those_of_the_plain_pass_in_double_precision(keys, half_lives, precision):
    users = USERS if DEVICE.type == "cuda" else [*USERS[:2], (70, 66)]
    made = case(users, half_lives, first=keys == "bounded", window=9 if keys == "window" else None)
    check(
        made, precision, times=1 if precision == "exact" else 2
    )  # of few events one has all the weight, and gradients cancel


@pytest.mark.parametrize("days", [0, 3000])
def test_equal_times_and_histories_of_many_half_lives(days):
    """In a block that spans a thousand half-lives the events that a target sees weigh nothing next to the block's
    newest one.
    """
    check(
        case([(100, 20), (300, 9)] if DEVICE.type == "cuda" else [(70, 9)], (1.0, 2.0), days=days), least=0.1, times=10
    )


@pytest.mark.parametrize("width", [4, 24, 64])
def test_heads_of_other_widths(width):
    check(case([(70, 5)], (2.0, 180.0), width=width))


@on_gpu
@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_history_of_a_hundred_thousand_events(precision):
    check(case([(100_003, 40), (50, 3)], heads=1), precision)


@pytest.mark.parametrize("window", [None, 9])
def test_every_element_is_written_and_targets_without_events_get_zeros(window):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        made = case(USERS[:4], window=window)
        found = fused(made)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(grad.isfinite().all() for grad in found.values())
    blind = made.seen.end_T == 0
    assert blind.any() and not found["out"][blind].any() and not found["query"][blind].any()


@pytest.mark.parametrize("count", [0, 3])
def test_a_batch_without_events_or_without_targets(count):
    made = case([(0, count), (9 - 3 * count, 0)])
    found = fused(made)
    assert not any(found[name].any() for name in ("out", "query", "key", "value"))


def test_equal_inputs_give_equal_bits_and_no_user_sees_another():
    made = case([(200, 30), (90, 70), (150, 20)] if DEVICE.type == "cuda" else [(20, 3), (9, 7), (15, 2)])
    first, second = fused(made), fused(made)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for rows, start in zip(made.rows, (1, 0, 0, 0), strict=True):  # the user in the middle
        rows[slice(*made.starts[1 if start else 0][1:3])] = float("nan")
    other = fused(made)
    for name, which in {"out": 1, "query": 1, "key": 0, "value": 0}.items():
        _, low, high, _ = made.starts[which]
        assert torch.equal(first[name][:low], other[name][:low]) and torch.equal(
            first[name][high:], other[name][high:]
        ), name
        assert other[name][low:high].isnan().any()


@on_gpu
def test_memory_does_not_hold_pairs_of_targets_and_events():
    made = on_device(case([(16_384, 1_024)] * 4))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused(made)
    pairs = 4 * 2 * 16_384 * 1_024 * 4  # bytes of one float a pair and head
    assert torch.cuda.max_memory_allocated() - before < pairs / 4


@pytest.mark.parametrize("width", [4, 24, 64])
def test_normalised_rows_and_their_gradients(width, monkeypatch):
    monkeypatch.setattr(fused_module, "available", lambda like: True)
    torch.manual_seed(SEED)
    print("seed", SEED)
    rows = (3 + 2 * torch.randn(131, 3, width, device=DEVICE, dtype=torch.float64)).requires_grad_()
    weight, near = torch.randn_like(rows), rows.detach().float().requires_grad_()
    theirs, ours = F.layer_norm(rows, (width,)), normalised(near)
    assert apart(ours, theirs) < 1e-5
    (theirs * weight).sum().backward()
    (ours * weight.float()).sum().backward()
    assert apart(near.grad, rows.grad) < 1e-5


@pytest.mark.parametrize("width", [16, 24, 64, 200])
@pytest.mark.parametrize(("events", "rows"), [(70, 5), (70, 60), (9_000, 300), (1, 1), (0, 3)])
def test_gradients_of_rows_are_summed_wherever_runs_of_equal_rows_begin(events, rows, width):
    """Many rows in 32 places in a row, and one row over many; in their order, and, of some thousands, sorted."""
    print("seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    row = torch.randint(rows, (events,), generator=generator).to(DEVICE)
    grad = torch.randn(events, width, generator=generator).to(DEVICE)
    found = summed(grad, Places(row), torch.Size((rows, width)))
    truth = torch.zeros(rows, width, dtype=torch.float64, device=DEVICE).index_add_(0, row, grad.double())
    assert apart(found, truth) < 1e-6


@on_gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("skewed", [False, True])
def test_rows_of_tables_and_their_gradients(skewed, bf16):
    torch.manual_seed(SEED)
    print("seed", SEED)
    table, other = (torch.randn(rows, 4, 16, device=DEVICE, requires_grad=True) for rows in (999, 77))
    item = (999 * torch.rand(20_001, device=DEVICE) ** (6 if skewed else 1)).long()
    kind = torch.randint(77, (20_001,), device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        both = gathered(table, Places(item), other, Places(kind))
        one = gathered(table, Places(item))
    weight = torch.randn(both.shape, device=DEVICE).to(both.dtype)
    assert torch.equal(both, (table[item] + other[kind]).to(both.dtype)) and torch.equal(one, table[item].to(one.dtype))
    found = [*torch.autograd.grad(both, (table, other), weight), *torch.autograd.grad(one, table, weight)]
    for grad, rows, count in zip(found, (item, kind, item), (999, 77, 999), strict=True):
        assert (
            apart(
                grad, torch.zeros(count, 4, 16, dtype=torch.float64, device=DEVICE).index_add_(0, rows, weight.double())
            )
            < 1e-6
        )

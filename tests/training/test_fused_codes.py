"""The fused factored pass is the plain pass over events in double precision, keys at codewords. On a GPU, or by
Triton's interpreter where that is installed:

python -m pytest --noconftest tests/training/test_fused_codes.py
TRITON_INTERPRET=1 python -m pytest --noconftest tests/training/test_fused_codes.py
"""

import copy
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.training.test_fused import DAY_MS, DEVICE, NOW_MS, SEED, apart, on_gpu, pytestmark
from training.model.blocks import Layout, block_attention
from training.model.fused import Seen, Work, fused_attention
from training.model.fused_codes import Coded, CodeWork, coded_attention, nearest
from training.model.fused_rows import Places, gathered
from training.model.kernel import MixtureKernel
from training.model.quantizer import straight_through

__all__ = ["pytestmark"]
ON_GPU = DEVICE.type == "cuda"
# (events, targets, distinct cut-offs): of very different length, without events, without targets, one cut-off, sixteen
USERS = (
    [(3000, 300, 16), (0, 3, 1), (7, 0, 0), (640, 65, 1), (1, 2, 2), (90, 130, 5), (20_000, 70, 3)]
    if ON_GPU
    else [(70, 9, 3), (0, 2, 1), (7, 0, 0), (1, 2, 2)]
)
TOLERANCE = {"exact": 2e-5, "tf32": 1e-3, "bf16": 4e-3}


@dataclass
class Case:
    """Rows are query [T, H, d], key [N, H, d] and value [E, H, d], in double precision."""

    rows: list[torch.Tensor]
    codebook: torch.Tensor
    codes: torch.Tensor
    item: torch.Tensor
    seen: Seen
    kernel: MixtureKernel | None
    starts: tuple[list[int], list[int]]
    cut_offs: list[int]
    weight: torch.Tensor


def case(users=USERS, half_lives=(2.0, 180.0), heads=2, groups=2, width=16, codes=11, days=400) -> Case:
    print("seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    whole = lambda high, count: torch.randint(0, max(1, int(high)), (count,), generator=generator)  # noqa: E731
    events, targets, _ = (sum(counts) for counts in zip(*users, strict=True))
    items = 57
    normal = lambda rows: F.layer_norm(rows, (width,)) * width**-0.25  # noqa: E731
    time, end, at = [], [], []
    for length, count, cut_offs in users:
        time.append(NOW_MS + whole(days * DAY_MS, length).sort().values)
        choices = torch.randperm(length + 1, generator=generator)[:cut_offs]
        end.append(choices[whole(len(choices), count)] if count else choices[:0])
        newest = time[-1][(end[-1] - 1).clamp(min=0)] if length else torch.full((count,), NOW_MS)
        at.append(newest + whole(5 * DAY_MS, count))
    seen = Seen(torch.cat(time).to(DEVICE), torch.cat(at).to(DEVICE), torch.cat(end).to(DEVICE))
    kernel = None
    if half_lives:
        kernel = MixtureKernel(heads, half_lives).double()
        with torch.no_grad():
            kernel.weight_HM += draw(*kernel.weight_HM.shape)
        kernel.to(DEVICE)
    starts = tuple([0, *itertools.accumulate(counts)] for counts in list(zip(*users, strict=True))[:2])
    rows = [normal(draw(targets, heads, width)), normal(draw(items, heads, width)), draw(events, heads, width)]
    return Case(
        [row.to(DEVICE) for row in rows],
        normal(draw(heads, codes, width)).to(DEVICE),
        torch.randint(codes, (items, groups), generator=generator).to(DEVICE),
        whole(items, events).to(DEVICE),
        seen,
        kernel,
        starts,
        [len(ends.unique()) for ends in end],
        draw(targets, heads, width).to(DEVICE),
    )


def outputs(attend, made: Case, dtype) -> dict[str, torch.Tensor]:
    """Outputs and gradients of `attend(query, hard keys of items, value, kernel)`."""
    leaves = [rows.to(dtype).detach().requires_grad_() for rows in made.rows]
    kernel = None if made.kernel is None else copy.deepcopy(made.kernel).to(dtype)
    heads, groups = made.codebook.shape[0], made.codes.shape[1]
    code_NH = made.codes.repeat_interleave(heads // groups, 1)
    word_NHd = made.codebook.to(dtype)[torch.arange(heads, device=DEVICE), code_NH]
    out = attend(leaves[0], straight_through(leaves[1], word_NHd), leaves[2], kernel)
    parameters = list(kernel.parameters()) if kernel else []
    found = torch.autograd.grad((out * made.weight.to(out.dtype)).sum(), leaves + parameters, materialize_grads=True)
    names = dict(zip(("out", "query", "key", "value"), (out.detach(), *found), strict=False))
    return names | ({"kernel": torch.cat([grad.flatten() for grad in found[3:]])} if kernel else {})


def plain(made: Case) -> dict[str, torch.Tensor]:
    def attend(query, hard, value, kernel):
        given = query, hard[made.item], value, made.seen, kernel
        return torch.cat([block_attention(layout, *given) for layout in Layout.of(*made.starts, DEVICE)])

    return outputs(attend, made, torch.float64)


def coded(made: Case, precision="exact", chosen=None) -> dict[str, torch.Tensor]:
    users = len(made.cut_offs)
    chosen = np.ones(users, bool) if chosen is None else chosen
    work = CodeWork.of(*made.starts, made.cut_offs, chosen, DEVICE)

    def attend(query, hard, value, kernel):
        keys = Coded(hard, made.codebook, made.codes, Places(made.item))
        value = value.bfloat16() if precision == "bf16" else value
        out = coded_attention(work, query, keys, value, made.seen, kernel)
        if chosen.all():
            return out
        rest = Work.of(*made.starts, query.shape[1], DEVICE, ~chosen)
        return out + fused_attention(rest, query, gathered(hard, Places(made.item)), value, made.seen, kernel)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "exact" else "high")
    try:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            return outputs(attend, made, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def check(made: Case, precision="exact", chosen=None, least=0.0, times=1):
    ours, theirs = coded(made, precision, chosen), plain(made)
    distances = {name: apart(ours[name], theirs[name], least) for name in theirs}
    print(precision, {name: f"{distance:.1e}" for name, distance in distances.items()})
    for name, distance in distances.items():
        # Gradients of a kernel, and in some draws those of keys (seed 880790789 in TF32: 1.3e-3), are small differences
        # of large sums.
        wider = {"kernel": 10, "key": 2 if precision == "tf32" else 1}.get(name, 1)
        assert distance < times * TOLERANCE[precision] * wider, name


@pytest.mark.parametrize("precision", TOLERANCE if ON_GPU else ["exact"])
@pytest.mark.parametrize("half_lives", [(), (2.0, 180.0), (0.1, 5.0, 100.0)])
def test_outputs_and_gradients_are_those_of_the_pass_over_events_in_double_precision(half_lives, precision):
    check(case(half_lives=half_lives), precision)


@pytest.mark.parametrize(
    ("heads", "groups", "width", "codes"), [(4, 2, 4, 3), (2, 1, 24, 20), (1, 1, 64, 11), (2, 2, 16, 130)]
)
def test_other_heads_groups_and_codes(heads, groups, width, codes):
    users = USERS if ON_GPU else [(40, 5, 2), (9, 3, 1)]
    check(case(users, heads=heads, groups=groups, width=width, codes=codes))


@pytest.mark.parametrize("days", [0, 3000])
def test_equal_times_and_histories_of_many_half_lives(days):
    check(case([(300, 90, 5), (100, 9, 9)] if ON_GPU else [(40, 6, 3)], (1.0, 2.0), days=days), least=0.1, times=10)


def test_users_by_the_pass_that_suits_each_of_them():
    check(case(), chosen=np.arange(len(USERS)) % 3 != 1)


def test_every_element_is_written_and_targets_without_events_get_zeros():
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        made = case()
        made.seen.end_T[:1] = 0
        made.cut_offs[0] += 1  # more than there are, maybe
        found, none = coded(made), coded(made, chosen=np.zeros(len(USERS), bool))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(grad.isfinite().all() for grad in (*found.values(), *none.values()))
    blind = made.seen.end_T == 0
    assert blind.any() and not found["out"][blind].any() and not found["query"][blind].any()


def test_more_segments_than_cut_offs_count_no_target_twice():
    made = case([(300, 90, 5), (100, 9, 9)] if ON_GPU else [(12, 3, 2), (5, 2, 1)])
    made.cut_offs = [cut_offs + 2 for cut_offs in made.cut_offs]
    check(made)


def test_equal_inputs_give_equal_bits_and_no_user_sees_another():
    made = case([(200, 30, 4), (90, 70, 3), (150, 20, 2)] if ON_GPU else [(20, 3, 2), (9, 7, 2), (15, 2, 1)])
    first, second = coded(made), coded(made)
    assert all(torch.equal(first[name], second[name]) for name in first if name != "key")
    for rows, which in zip((made.rows[0], made.rows[2]), (1, 0), strict=True):  # the user in the middle
        rows[slice(*made.starts[which][1:3])] = float("nan")
    other = coded(made)
    for name, which in {"out": 1, "query": 1, "value": 0}.items():
        _, low, high, _ = made.starts[which]
        assert torch.equal(first[name][:low], other[name][:low]) and torch.equal(
            first[name][high:], other[name][high:]
        ), name
        assert other[name][low:high].isnan().any()


@pytest.mark.parametrize(("groups", "codes", "width"), [(4, 128, 16), (1, 3, 64), (3, 200, 4), (2, 256, 24)])
def test_the_nearest_codes_are_those_by_brute_force(groups, codes, width):
    print("seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    keys, words = (torch.randn(*shape, width, generator=generator) for shape in ((301, groups), (groups, codes)))
    words[:, -1] = words[:, 0]  # the lower one of equal codes is taken
    keys, words = (keys + 50).to(DEVICE), (words + 50).to(DEVICE)
    centre = words.mean(1)
    shifted = words - centre[:, None]
    square = shifted.square().sum(-1)
    square[:, 1] = float("inf")  # no code
    found = nearest(keys, centre, shifted, square)
    apart_NGC = (keys[:, :, None].double() - words[None].double()).square().sum(-1)
    apart_NGC[:, :, 1] = float("inf")
    chosen, best = apart_NGC.gather(2, found[..., None])[..., 0], apart_NGC.amin(2)
    assert (chosen <= best + 1e-4).all() and (found == apart_NGC.argmin(2)).double().mean() > 0.999
    none = nearest(torch.full_like(keys, float("nan")), centre, shifted, square)
    assert none.amin() >= 0 and none.amax() < codes


@on_gpu
def test_a_recording_of_it_reads_new_inputs():
    made = case()
    work = CodeWork.of(*made.starts, made.cut_offs, np.ones(len(USERS), bool), DEVICE)
    leaves = [rows.float().requires_grad_() for rows in made.rows]
    codebook, kernel = made.codebook.float(), made.kernel.float()
    places = Places(made.item)

    def run() -> list[torch.Tensor]:
        keys = Coded(leaves[1], codebook, made.codes, places)
        out = coded_attention(work, leaves[0], keys, leaves[2], made.seen, kernel)
        return [out.detach(), *torch.autograd.grad((out * made.weight.float()).sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # refuses whatever waits for the device
        held = run()
    with torch.no_grad():
        leaves[0].neg_()
        leaves[2].normal_()
        made.seen.end_T.copy_(torch.where(made.seen.end_T == made.seen.end_T.max(), 0, made.seen.end_T))
    graph.replay()
    for recorded, now in zip(held, run(), strict=True):
        assert now.any() and apart(recorded, now) < 1e-6

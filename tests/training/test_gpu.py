"""On a GPU: the same figures as on the CPU, compiled, in bf16 and deterministic. Needs neither Spark nor pydantic:

python -m pytest --noconftest tests/training/test_gpu.py
"""

import dataclasses
import functools
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.train_step import make_batch
from evaluation.trials import model_config
from training.config import ModelConfig
from training.device_time import DeviceTime
from training.model import fused_codes
from training.model.attention import CodedKeys
from training.model.factored import factored_attention
from training.model.history import one_user
from training.model.interests import INTERESTS
from training.model.kernel import MixtureKernel
from training.model.ranker import FieldSizes, Ranker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = FieldSizes((("id", 20_000), ("category", 50)), (), 1)
KINDS = {
    "vql": ModelConfig(),
    "refined": ModelConfig(refine_k=8),
    "recent": ModelConfig(recent_window=20),
    "exact": ModelConfig(interest="softmax_attention"),
    "sdim": ModelConfig(interest="sdim"),
    "mean": ModelConfig(interest="mean_pooling"),
    "recent_attention": ModelConfig(interest="recent_attention", recent_window=9),
}


def ranker(kind: str) -> tuple[Ranker, object]:
    torch.manual_seed(0)
    model = Ranker(SIZES, dataclasses.replace(KINDS[kind], dropout=0.0))
    batch = make_batch(users=5, length=700, targets=20, cut_offs=6).to("cpu")
    if model.coded is not None:
        with torch.no_grad():
            model.coded.quantizer.start_from_keys(
                model.coded.keys(model.items(batch.items)), torch.Generator().manual_seed(0)
            )
    return model.train(), batch


def moved(batch, device: str):
    move = lambda value: value.to(device) if isinstance(value, torch.Tensor) else value  # noqa: E731
    items = type(batch.items)({name: rows.to(device) for name, rows in batch.items.rows.items()})
    return dataclasses.replace(
        batch,
        items=items,
        **{name: move(getattr(batch, name)) for name in batch.__dataclass_fields__ if name != "items"},
    )


def step(model: Ranker, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logits, auxiliary = model(batch)
    (logits.float().square().mean() + auxiliary).backward()
    return logits.detach().cpu(), [p.grad.clone().cpu() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_pass_over_all_users_is_the_cpu_pass_over_each(kind):
    model, batch = ranker(kind)
    on_cpu = step(model, batch)
    on_gpu = step(model.cuda(), moved(batch, "cuda"))
    assert (on_cpu[0] - on_gpu[0]).abs().max() < 1e-4
    for one, other in zip(on_cpu[1], on_gpu[1], strict=True):
        assert (one - other).abs().max() <= 1e-3 * max(1e-2, float(one.abs().max()))


def test_users_of_the_factored_pass_and_others_in_one_batch(monkeypatch):
    model, batch = ranker("vql")
    on_cpu = step(model, batch)
    monkeypatch.setattr(fused_codes, "preferred", lambda starts, *sizes: np.arange(len(starts) - 1) % 2 == 0)
    on_gpu = step(model.cuda(), moved(batch, "cuda"))
    assert (on_cpu[0] - on_gpu[0]).abs().max() < 1e-4
    for one, other in zip(on_cpu[1], on_gpu[1], strict=True):
        assert (one - other).abs().max() <= 1e-3 * max(1e-2, float(one.abs().max()))


@pytest.mark.parametrize("kind", ["vql", "refined", "exact"])
def test_compiled_is_eager(kind):
    model, batch = ranker(kind)
    model, batch = model.cuda(), moved(batch, "cuda")
    eager = step(model, batch)
    model.compile()
    for _ in range(2):
        compiled = step(model, batch)
        assert (eager[0] - compiled[0]).abs().max() < 1e-4
        for one, other in zip(eager[1], compiled[1], strict=True):
            assert (one - other).abs().max() <= 1e-3 * max(1e-2, float(one.abs().max()))


def test_bf16_stays_near_single_precision_with_fp32_search():
    model, batch = ranker("vql")
    model, batch = model.cuda(), moved(batch, "cuda")
    plain, _ = step(model, batch)
    keys = model.coded.keys(model.items(batch.items))
    with torch.autocast("cuda", torch.bfloat16):
        rounded, _ = step(model, batch)
        assert model.coded.keys(model.items(batch.items)).dtype == torch.float32
        assert torch.equal(model.coded.quantizer.search(keys), model.coded.quantizer.search(keys.float()))
    assert (plain - rounded.float()).abs().max() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_steps_have_the_same_bits(kind, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model, batch = ranker(kind)
    model, batch = model.cuda(), moved(batch, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(model, batch), step(model, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_the_factored_pass_runs_on_a_gpu_too():
    torch.manual_seed(0)
    kernel = MixtureKernel(2, (1.0, 90.0)).double()
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731, B023
        query, *arguments = (
            draw(9, 2, 4),
            draw(50, 2, 4),
            draw(2, 5, 4),
            torch.randint(5, (50, 2), generator=generator),
            draw(50, 2, 4),
        )
        times, ends = torch.arange(50) * 3_600_000, torch.randint(0, 51, (9,), generator=generator)
        at = torch.full((9,), 10**9)
        query, key, book, codes, *rest = (t.to(device) for t in (query, *arguments, times, at, ends))
        found.append(
            factored_attention(query, CodedKeys(key, book, codes), *one_user(*rest), kernel.to(device)).out_THd.cpu()
        )
    assert (found[0] - found[1]).abs().max() < 1e-12


def test_a_gpu_that_waits_for_the_host_is_idle_for_so_long():
    spent, pause_ms, steps = DeviceTime(), 20.0, 20
    square = torch.randn(4_096, 4_096, device="cuda")
    for _ in range(steps):
        spent.begin()
        square @ square
        spent.end()
        torch.cuda.synchronize()
        time.sleep(pause_ms / 1_000)
    working_ms, waiting_ms = spent.spent_ms()
    assert working_ms > 0 and waiting_ms >= pause_ms * (steps - 1)
    spent.pause()
    before = spent.spent_ms()
    for _ in range(steps):  # the host is ahead
        spent.begin()
        for _ in range(20):
            square @ square
        spent.end()
    torch.cuda.synchronize()
    working_ms, waiting_ms = (now - then for now, then in zip(spent.spent_ms(), before, strict=True))
    assert waiting_ms < 0.2 * working_ms


@functools.cache
def longest_batch():
    """What a step of the configuration `default` reads, every history at the length that the comparison ends with."""
    return make_batch(users=4, length=16_384, targets=128, cut_offs=128).to("cuda")


@pytest.mark.parametrize("name", INTERESTS)
def test_every_kind_trains_on_histories_of_16_384_events(name, record_property):
    torch.manual_seed(0)
    config = model_config(name, ModelConfig(dropout=0.0))
    model, batch = Ranker(SIZES, config).cuda().train(), longest_batch()
    if model.coded is not None:
        with torch.no_grad():
            keys_NHd = model.coded.keys(model.items(batch.items))
            model.coded.quantizer.start_from_keys(keys_NHd, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # a sum over all events, as that of DIN, is large
    torch.cuda.reset_peak_memory_stats()
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        logits, auxiliary = model(batch)
        loss = F.binary_cross_entropy_with_logits(logits, batch.target_label) + auxiliary
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    record_property("peak_gib", round(torch.cuda.max_memory_allocated() / 2**30, 1))
    assert np.isfinite(losses).all() and min(losses[1:]) < losses[0]
    assert all(weight.isfinite().all() for weight in model.parameters())
    torch.cuda.empty_cache()

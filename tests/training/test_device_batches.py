"""Batches gathered on a device hold what `make_batch` holds, and padding changes nothing."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.training.partitions import random_partition, vocabulary_of
from training.data import Batch, Chosen, Joined, Sequences, make_batch
from training.device_batches import DeviceRows, Sizes, ahead, fit, lists_of

DRAWS = [([3, 1, 0, 5], [3, 8, 2, 1]), ([0, 2], [0, 4]), ([0], [3]), ([], [])]  # users, targets of each; user 0 is new


def drawn(joined: Joined, users: list[int], counts: list[int], seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    rng, start = np.random.default_rng(seed), joined.sequences.target_start
    draw = lambda user, count: np.sort(rng.choice(np.arange(start[user], start[user + 1]), count, False))  # noqa: E731
    return np.array(users, np.int64), [draw(user, count) for user, count in zip(users, counts, strict=True)]


@pytest.fixture(params=[40, 4_000], ids=["all items are read", "few of many items are read"])
def joined(request) -> Joined:
    """Needs no other fixture: a machine with a GPU may lack what conftest.py imports (pytest --noconftest)."""
    known_items, known_rows = random_partition()
    items, rows = random_partition(items=request.param)
    sequences = Sequences.from_arrow(rows, max_events=25)
    return Joined.of(sequences, items, vocabulary_of(known_items, Sequences.from_arrow(known_rows)))


@pytest.mark.parametrize(("users", "counts"), DRAWS, ids=str)
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "rows that travel"])
def test_a_batch_gathered_on_the_device_is_the_one_made_on_the_host(users, counts, resident, joined):
    rows = DeviceRows(joined, torch.device("cpu"), resident)
    for seed in range(3):
        draw = drawn(joined, users, counts, seed)
        host, device = make_batch(joined, *draw).to("cpu"), rows.make_batch(*draw)
        for name in set(host.__dataclass_fields__) - {"items", "event_item", "target_item"}:
            one, other = getattr(host, name), getattr(device, name)
            assert torch.equal(one, other) and one.dtype == other.dtype if torch.is_tensor(one) else one == other, name
        for place in ("event_item", "target_item"):
            for field, column in host.items.rows.items():
                theirs = device.items.rows[field][getattr(device, place)]
                assert torch.equal(column[getattr(host, place)], theirs.long()), (place, field)


def test_the_bytes_of_an_event_and_of_a_target_are_as_said(joined):
    held = DeviceRows(joined, torch.device("cpu")).nbytes
    fields = sum(rows.size for rows in joined.items.rows.values()) + joined.user_rows.size
    assert held == 14 * len(joined.sequences.history_item) + 25 * len(joined.sequences.target_item) + 4 * fields
    assert DeviceRows(joined, torch.device("cpu"), resident=False).nbytes == 4 * fields
    assert fit(joined, 2 * held + 2) and not fit(joined, 2 * held)  # half of what is free


def test_a_gpu_holds_the_rows_where_they_take_less_than_half_of_what_it_has_free(joined, monkeypatch):
    held, made = DeviceRows(joined, torch.device("cpu")).nbytes, []
    monkeypatch.setattr(DeviceRows, "__init__", lambda rows, joined, device, resident: made.append(resident))
    for free in (2 * held + 2, 2 * held):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        DeviceRows.on_gpu(joined, torch.device("cuda"))
    assert made == [True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_lie_in_the_memory_of_a_gpu_that_has_room(joined):
    rows = DeviceRows.on_gpu(joined, torch.device("cuda"))
    assert rows is not None and rows.resident and rows.columns["history_item"].is_cuda


def step(model, batch) -> dict[str, torch.Tensor]:
    """Loss, gradients and codebook statistics of a training step."""
    model.zero_grad()
    logits, auxiliary = model.train()(batch)
    weight = None if batch.padding is None else batch.padding.target_weight
    loss = F.binary_cross_entropy_with_logits(logits, batch.target_label, weight, reduction="sum")
    (loss + auxiliary).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if model.coded is not None:
        found["statistics"] = model.coded.quantizer.step_GCk.clone()
    return found | {"loss": loss.detach(), "auxiliary": auxiliary.detach()}


def padded_batch(rows: DeviceRows, chosen: Chosen, sizes: Sizes) -> Batch:
    """Return a batch of these sizes, as a recorded step gathers it."""
    real, chosen = Sizes.of(chosen), chosen.padded(sizes.users - 2, sizes.events, sizes.targets)
    table = torch.from_numpy(np.concatenate(rows.table_of(chosen, np.array([real.targets, real.events] * 2))))
    return rows.gathered(table, sizes, lists_of(chosen), padded=True)


KINDS = [{}, {"ema_decay": 0.9}, {"recent_window": 4}, {"interest": "softmax_attention"}, {"interest": "mean_pooling"}]


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "rows that travel"])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_padding_changes_no_loss_no_gradient_and_no_statistic(kind, at_once, resident, joined, make_model):
    model = make_model(**kind, dropout=0.0)
    model.interest.always_at_once = at_once
    rows = DeviceRows(joined, torch.device("cpu"), resident)
    for seed, (users, counts) in enumerate(DRAWS[:2]):
        chosen = Chosen.of(joined.sequences, *(draw := drawn(joined, users, counts, seed)))
        exact = step(model, make_batch(joined, *draw).to("cpu"))
        for more_events, more_targets in ((0, 0), (300, 3)):
            sizes = Sizes.of(chosen)
            sizes = Sizes(sizes.users + 2 + seed, sizes.events + more_events, sizes.targets + more_targets)
            padded = step(model, padded_batch(rows, chosen, sizes))
            assert exact.keys() == padded.keys()
            for name, value in exact.items():
                assert (value - padded[name]).abs().max() <= 2e-6 * max(1.0, float(value.abs().max())), name


def test_batches_that_nobody_waits_for_any_more_are_not_made():
    """A training that ends before its time would end when 128 more tables are made."""
    made: list[int] = []

    def slow(number: int) -> int:
        made.append(number)
        time.sleep(0.02)
        return number

    batches = ahead(slow, range(1_000), most=100)
    assert next(batches) == 0
    batches.close()
    at_close = len(made)
    time.sleep(0.1)
    assert len(made) == at_close < 20

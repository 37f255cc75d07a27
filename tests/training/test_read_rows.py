"""Tables of which a step reads few rows: gradients, exchange and updates by rows are those of whole tables."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.train_loop import make_data
from tests.training import test_fused as fused_tests
from training import loop
from training.config import ModelConfig, TrainConfig, VocabularyConfig
from training.data import Chosen
from training.loop import Training, Worker, epoch_of, train_model
from training.read_rows import RowGradients, Rows, RowwiseAdagrad, join, read_in_part
from training.user_batches import UserBatches

IDS = torch.tensor([5, 2, 5, 9, 2, 5, 0])  # hashed items share rows


def gradient(table: nn.Embedding, seed: int, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return autograd's sparse gradient of a table and the whole one, of random gradients of `ids`."""
    values = torch.randn(len(ids), table.embedding_dim, generator=torch.Generator().manual_seed(seed))
    sparse, whole = (
        torch.autograd.grad((F.embedding(ids, table.weight, sparse=how) * values).sum(), table.weight)[0]
        for how in (True, False)
    )
    return sparse, whole


def test_rows_of_several_workers_add_up_to_the_gradient_of_the_whole_table():
    torch.manual_seed(1)
    tables = [nn.Embedding(11, 3), nn.Embedding(10, 2)]
    for table in tables:
        table.sparse = True
    # Three workers: one with more rows than the others, one without a part of the batch.
    theirs = [[gradient(table, seed, IDS[:size]) for table in tables] for seed, size in ((1, 7), (2, 4))]
    found = [[sparse for sparse, _ in worker] for worker in theirs] + [[None, None]]
    sent: list[torch.Tensor] = []
    for worker in found:
        RowGradients(tables, 3).summed(worker, 8, lambda out, mine: sent.append(mine) or out.zero_())
    for worker in found:
        rows = RowGradients(tables, 3).summed(worker, 8, lambda out, _: out.copy_(torch.cat(sent)))
        for number, table in enumerate(tables):
            expected = theirs[0][number][1] + theirs[1][number][1]
            ids, values = rows[number].ids.flatten(), rows[number].values.flatten(0, 1)
            got = torch.zeros_like(table.weight).index_add_(0, ids, values)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
            alone = ids[values.abs().sum(1) > 0]
            assert len(alone) == len(alone.unique()) == 4, "a row's sum stands once"


def test_row_wise_adagrad_moves_rows_that_were_read_as_its_definition_says():
    torch.manual_seed(2)
    table = nn.Embedding(11, 3)
    by_rows, adagrad = RowGradients([table], 1), RowwiseAdagrad([table], decay=0.1)
    weight, sums = table.weight.detach().double().clone(), torch.zeros(11, dtype=torch.float64)
    for step in range(4):
        sparse, whole = gradient(table, step, IDS[: 7 - step])
        adagrad.step(by_rows.summed([sparse], 8, lambda *_: None), torch.tensor(0.05))
        for row in range(11):
            if (g := whole[row].double()).any():
                sums[row] += g.square().mean()
                weight[row] -= 0.05 * (g / sums[row].sqrt() + 0.1 * weight[row])
    torch.testing.assert_close(table.weight.detach().double(), weight, rtol=0, atol=1e-6)
    assert torch.equal(table.weight[1], weight[1].float()), "a row that no step read"


@pytest.mark.skipif(
    not (torch.cuda.is_available() or fused_tests.INTERPRETED), reason="needs a GPU, or Triton's interpreter"
)
def test_kernels_of_rows_do_what_torch_does():
    from training import row_kernels

    torch.manual_seed(3)
    times = 1 if fused_tests.INTERPRETED else 500
    rows, width, places = 90 * times, 12, 200 * times
    ids, values = torch.randint(rows, (places,)), torch.randn(places, 5 + width)[:, 5:]
    last = torch.full((rows,), -1, dtype=torch.int32)
    ours, theirs = torch.zeros(2, places, width).unbind()
    join(ids, values, last.clone(), theirs)
    device = fused_tests.DEVICE
    there = [part.to(device) for part in (ids, values, last, ours)]
    row_kernels.join(*there)
    assert (there[2] == -1).all() and (theirs == 0).all(1).sum() == places - len(ids.unique())
    torch.testing.assert_close(there[3].cpu(), theirs, rtol=0, atol=1e-5)
    part = places // 4
    parts = there[0].view(4, part), torch.zeros(4, part + 10, width, device=device)[:, :part]  # a gap behind each
    parts[1].copy_(theirs.view(4, part, width))
    table, rate = nn.Embedding(rows, width), torch.tensor(0.1)
    expected = RowwiseAdagrad([table], decay=0.2)
    weight, sums = table.weight.detach().to(device, copy=True), torch.zeros(rows, device=device)
    for _ in range(3):
        expected.step([Rows(ids[None], theirs[None])], rate)
        row_kernels.adagrad(*parts, weight, sums, rate.to(device), (0.2, 1e-8))
    torch.testing.assert_close(sums.cpu(), expected.sums[0])
    torch.testing.assert_close(weight.cpu(), table.weight.detach())
    whole = torch.zeros_like(weight)
    row_kernels.put(*parts, whole)
    assert torch.equal(whole.cpu(), torch.zeros(rows, width).index_add_(0, ids, theirs))
    row_kernels.put(*parts, whole, zero=True)
    assert not whole.any()


@pytest.mark.skipif(
    not (torch.cuda.is_available() or fused_tests.INTERPRETED), reason="needs a GPU, or Triton's interpreter"
)
@pytest.mark.parametrize("workers", [2, 3])
def test_the_kernel_adds_up_rows_of_several_workers_in_their_order(workers):
    from training import row_kernels

    torch.manual_seed(4)
    # Many on a GPU, where warps that share an element may differ in what they read.
    times = 1 if fused_tests.INTERPRETED else 1_000
    rows, width, places = 150 * times, 12, 100 * times
    ids_WR = torch.stack([torch.randperm(rows)[:places] for _ in range(workers)])
    values_WRd = torch.randn(workers, places * width + 7)[:, 7:].unflatten(1, (places, width))
    values_WRd[:, 90 * times :] = 0  # left over
    values_WRd[1, ids_WR[1] == ids_WR[0, 0]] = -values_WRd[0, 0]  # a sum of exactly 0
    expected = torch.zeros(rows, width)
    for ids_R, values_Rd in zip(ids_WR, values_WRd, strict=True):
        expected.index_add_(0, ids_R, values_Rd)
    last = torch.full((rows,), -1, dtype=torch.int32, device=fused_tests.DEVICE)
    for _ in range(2 if times == 1 else 20):  # the second one finds `last` as the first one did
        ids, values = ids_WR.to(fused_tests.DEVICE), values_WRd.to(fused_tests.DEVICE, copy=True)
        row_kernels.merge(ids, values, last)
        ids, values = ids.flatten().cpu(), values.flatten(0, 1).cpu()
        assert torch.equal(torch.zeros(rows, width).index_add_(0, ids, values), expected)
        alone = ids[(values != 0).any(1)]
        assert len(alone) == len(alone.unique()), "a row's sum stands once"
        assert (last == -1).all()


@pytest.fixture(scope="module")
def trained():
    """Return what trains a model on data in which many items share rows, and says its weights."""
    config = TrainConfig(
        models={"it": ModelConfig(interest="softmax_attention", dropout=0.0)}, users_per_step=6, targets_per_visit=20,
        min_epoch_steps=12, vocabulary=VocabularyConfig(min_occurrences=60, hashed_rows=8),
    )  # fmt: skip
    data = make_data(users=20, length=90, items=60, config=config)
    assert data.hashed_event_share() > 0.2

    def train(**changes) -> dict[str, torch.Tensor]:
        changed = dataclasses.replace(config, **changes)
        return train_model("it", data, changed, Worker(), lambda _: None)[0].state_dict()

    return train, data, config


def test_adamw_by_rows_comes_to_the_weights_of_whole_gradients(trained, monkeypatch):
    train = trained[0]
    whole = train()
    monkeypatch.setattr(loop, "read_in_part", lambda tables, _rows: tables)
    for name, weight in train().items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=2e-5, msg=name)


def test_a_step_of_row_wise_adagrad_moves_the_rows_that_it_read_and_no_other(trained):
    config = dataclasses.replace(trained[2], table_learning_rate=0.05, users_per_step=1, max_epoch_steps=1, epochs=2)
    data = make_data(users=20, length=90, items=900, config=dataclasses.replace(config, vocabulary=VocabularyConfig()))
    run = Training("it", data, config, Worker(), loop.COLD)
    tables = run.model.items.of_ids()
    before = [table.weight.detach().clone() for table in tables]
    read = run.order(0)[0].items
    run.run_epoch(None)
    for kind in ("item_id", "author_id"):
        table = dict(zip(read.rows, run.model.items.tables, strict=True))[kind]
        moved = (table.weight != before[tables.index(table)]).any(1).nonzero().flatten()
        assert set(moved.tolist()) == set(np.unique(read.rows[kind]).tolist()), kind
        assert 0 < len(moved) < len(table.weight)


def test_a_table_is_exchanged_by_rows_where_a_step_reads_a_small_part_of_it():
    tables = [nn.Embedding(100, 2), nn.Embedding(1_000, 2)]
    assert read_in_part(tables, rows_a_step=60) == tables[1:]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_what_each_worker_reads(trained, world):
    _, data, config = trained
    sequences = data.joined.sequences
    for number in range(4):
        found = []
        for rank in range(world):
            order = epoch_of(UserBatches(data.joined, rank, world, 6, 7), data, config, 1)
            chosen = Chosen.of(sequences, *order.visited(number))
            found.append([len(chosen.target), chosen.event_start[-1]])
        assert np.array_equal(order.shares(number), found)

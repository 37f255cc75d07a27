"""The codebooks: search, losses, start, revival, and the moving-average update beside the gradient's.

Legend: N keys, H heads, d head width, G groups, C codes.
"""

from __future__ import annotations

import pytest
import torch

from training.model.quantizer import GroupedQuantizer

torch.set_num_threads(1)

HEADS, WIDTH, GROUPS, CODES = 4, 8, 2, 8


def _keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, HEADS, WIDTH, generator=torch.Generator().manual_seed(seed))


def _quantizer(ema_decay: float | None = None) -> GroupedQuantizer:
    torch.manual_seed(0)
    return GroupedQuantizer(GROUPS, CODES, HEADS * WIDTH // GROUPS, ema_decay)


def test_the_quantization_loss_is_the_mean_squared_key_error_over_events():
    quantizer, keys = _quantizer(), _keys(30)
    weight = torch.arange(30)
    _, loss, codes = quantizer(keys, weight, commitment=0.25)
    squared = (keys - quantizer.quantized(codes, keys)).square().sum((1, 2))
    assert float(loss) == pytest.approx(1.25 * float((squared * weight).sum() / weight.sum()), rel=1e-5)


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (3.0, 0.05), (1.0, 0.01)])
def test_the_gradients_of_the_loss_are_those_of_the_two_squared_distances(shift, spread):
    """For keys that lie close together far from the origin as well: differences of large sums would be lost there."""
    quantizer, keys = _quantizer(), (_keys(300) * spread + shift).requires_grad_()
    with torch.no_grad():
        quantizer.codebook_GCw.mul_(spread).add_(shift)
    weight = torch.arange(300.0)
    _, loss, codes = quantizer(keys, weight, commitment=0.25)
    found = torch.autograd.grad(loss, (keys, quantizer.codebook_GCw))
    keys, words = (rows.detach().double().requires_grad_() for rows in (keys, quantizer.codebook_GCw))
    group = torch.arange(GROUPS).expand_as(codes)
    word_NHd = words[group, codes].reshape(keys.shape)
    plain = 0.25 * (keys - word_NHd.detach()).square() + (keys.detach() - word_NHd).square()
    plain = (plain.sum((1, 2)) * weight).sum() / weight.sum()
    for ours, theirs in zip(found, torch.autograd.grad(plain, (keys, words)), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_search_is_right_for_keys_far_from_the_origin():
    quantizer, keys = _quantizer(), _keys(500)
    with torch.no_grad():
        quantizer.codebook_GCw += 1_000.0
    grouped = (keys + 1_000.0).double().reshape(500, GROUPS, -1)
    brute = (grouped[:, :, None] - quantizer.codebook_GCw.double()[None]).square().sum(-1).argmin(-1)
    assert (quantizer.search(keys + 1_000.0) == brute).float().mean() > 0.999


def test_dead_codes_come_back_with_their_usage_reset():
    quantizer, keys = _quantizer(), _keys(100)
    with torch.no_grad():
        quantizer.codebook_GCw[:, 0] = 1e6
        quantizer.usage_GC[:, 0] = 0.0
    assert (quantizer.dead_share() == 1 / CODES).all()
    quantizer.revive(keys, torch.Generator().manual_seed(0))
    assert (quantizer.dead_share() == 0).all()
    assert quantizer.codebook_GCw[:, 0].abs().max() < 1e3
    assert (quantizer.usage_GC[:, 0] > 0).all()


def test_kmeans_start_uses_every_code_on_spread_keys():
    quantizer, keys = _quantizer(), _keys(2_000)
    before = (keys - quantizer.quantized(quantizer.search(keys), keys)).square().mean()
    quantizer.start_from_keys(keys, torch.Generator().manual_seed(0))
    codes = quantizer.search(keys)
    assert all(len(codes[:, g].unique()) == CODES for g in range(GROUPS))
    assert (keys - quantizer.quantized(codes, keys)).square().mean() < before


def test_the_key_error_falls_with_more_codes_and_with_more_groups():
    keys = _keys(2_000)

    def error(groups: int, codes: int) -> float:
        quantizer = GroupedQuantizer(groups, codes, HEADS * WIDTH // groups)
        quantizer.start_from_keys(keys, torch.Generator().manual_seed(0))
        return float((keys - quantizer.quantized(quantizer.search(keys), keys)).square().mean().detach())

    by_codes, by_groups = [error(2, codes) for codes in (4, 16, 64)], [error(groups, 16) for groups in (1, 2, 4)]
    assert by_codes == sorted(by_codes, reverse=True)
    assert by_groups == sorted(by_groups, reverse=True)


def test_usage_perplexity_and_dead_share_say_how_even_the_codes_are():
    quantizer = _quantizer()
    assert torch.allclose(quantizer.perplexity_share(), torch.ones(GROUPS))
    assert torch.equal(quantizer.dead_share(), torch.zeros(GROUPS))
    quantizer.usage_GC[1] = torch.eye(CODES)[0]
    assert quantizer.perplexity_share()[1] == pytest.approx(1 / CODES)
    assert quantizer.dead_share().tolist() == [0.0, 1 - 1 / CODES]


# --- moving averages


def _train(quantizer: GroupedQuantizer, keys: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One step; return the assignments."""
    codes = quantizer.train()(keys, weight, 0.25)[2]
    quantizer.move_averages()
    return codes


def test_an_average_step_is_the_formula_written_out():
    quantizer, keys, weight = _quantizer(0.99), _keys(50), torch.arange(50)
    before = quantizer.average_GCk.clone()
    codes = _train(quantizer, keys, weight)
    grouped = keys.reshape(50, GROUPS, -1)
    for g in range(GROUPS):
        for c in range(CODES):
            mine = codes[:, g] == c
            share = CODES * weight[mine].float() / weight.sum()
            total = 0.99 * before[g, c, :-1] + 0.01 * (share[:, None] * grouped[mine, g]).sum(0)
            count = 0.99 * before[g, c, -1] + 0.01 * share.sum()
            assert torch.allclose(quantizer.codebook_GCw[g, c], total / count, atol=1e-6)


def test_averages_settle_on_the_mean_of_each_codes_keys():
    quantizer, keys = _quantizer(0.99), _keys(200)
    quantizer.start_from_keys(keys, torch.Generator().manual_seed(0), iterations=1)
    error = []
    for _ in range(1_000):
        codes = _train(quantizer, keys, torch.ones(200))
        error.append(float((keys - quantizer.quantized(codes, keys)).square().mean().detach()))
    assert error[-1] <= error[0]
    codes = quantizer.search(keys)
    grouped = keys.reshape(200, GROUPS, -1)
    for g in range(GROUPS):
        for c in codes[:, g].unique().tolist():
            mean = grouped[codes[:, g] == c, g].mean(0)
            assert (quantizer.codebook_GCw[g, c] - mean).abs().max() < 1e-2


def test_sums_over_workers_are_the_sums_of_the_whole_batch():
    keys, weight = _keys(60), torch.randint(1, 9, (60,), generator=torch.Generator().manual_seed(0))
    whole, *workers = (_quantizer(0.99) for _ in range(3))
    _train(whole, keys, weight)
    for worker, share in zip(workers, (slice(0, 20), slice(20, 60)), strict=True):
        worker.train()(keys[share], weight[share], 0.25)
    total = workers[0].step_GCk + workers[1].step_GCk  # the all-reduce
    for worker in workers:
        worker.step_GCk.copy_(total)
        worker.move_averages()
    assert torch.equal(workers[0].codebook_GCw, workers[1].codebook_GCw)
    assert torch.allclose(workers[0].codebook_GCw, whole.codebook_GCw, atol=1e-6)


def test_a_recomputed_forward_pass_counts_once():
    keys, (once, twice) = _keys(60), (_quantizer(0.99), _quantizer(0.99))
    twice.train()(keys, torch.ones(60), 0.25)
    for quantizer in (once, twice):
        _train(quantizer, keys, torch.ones(60))
    assert torch.equal(once.codebook_GCw, twice.codebook_GCw)


def test_an_unused_code_stays_where_it_is():
    quantizer, keys = _quantizer(0.9), _keys(60)
    with torch.no_grad():
        quantizer.codebook_GCw[:, 3] = 50.0
    quantizer._restart_averages(torch.ones(GROUPS, CODES, dtype=torch.bool))
    for _ in range(500):  # its weight sinks to 1e-23
        _train(quantizer, keys, torch.ones(60))
    assert torch.allclose(quantizer.codebook_GCw[:, 3], torch.tensor(50.0), rtol=1e-4)


def test_a_revived_code_is_not_pulled_back_by_its_old_averages():
    quantizer, keys = _quantizer(0.99), _keys(60)
    with torch.no_grad():
        quantizer.codebook_GCw[:, 3] = 50.0
        quantizer.usage_GC[:, 3] = 0.0
    quantizer._restart_averages(torch.ones(GROUPS, CODES, dtype=torch.bool))
    quantizer.revive(keys, torch.Generator().manual_seed(0))
    revived = quantizer.codebook_GCw[:, 3].clone()
    _train(quantizer, keys, torch.ones(60))
    assert (quantizer.codebook_GCw[:, 3] - revived).abs().max() < 0.2


def test_averages_take_no_gradient_and_no_codebook_loss_and_are_saved():
    quantizer, keys = _quantizer(0.99), _keys(30).requires_grad_(True)
    hard, loss, codes = quantizer.train()(keys, torch.ones(30), 0.25)
    squared = (keys - quantizer.quantized(codes, keys)).square().sum((1, 2)).mean()
    assert loss.item() == pytest.approx(0.25 * squared.item(), rel=1e-5)
    (hard.sum() + loss).backward()
    assert not quantizer.codebook_GCw.requires_grad and _quantizer().codebook_GCw.requires_grad
    assert quantizer.codebook_GCw.grad is None and keys.grad.abs().max() > 0
    assert "average_GCk" in quantizer.state_dict()
    assert "average_GCk" not in _quantizer().state_dict()


def test_groups_may_have_codebooks_of_different_sizes():
    torch.manual_seed(0)
    quantizer = GroupedQuantizer(groups=3, codes=(2, 5, 16), group_width=4, ema_decay=0.9)
    keys = torch.randn(400, 3, 4)
    quantizer.start_from_keys(keys, torch.Generator().manual_seed(0))
    quantizer.train()
    for _ in range(3):
        _, _, codes = quantizer(keys, torch.ones(400), 0.25)
        quantizer.move_averages()
        quantizer.revive(keys, torch.Generator().manual_seed(0))
        assert codes.amax(0).tolist() == [1, 4, 15]
    assert (quantizer.perplexity_share() > 0.5).all() and (quantizer.perplexity_share() <= 1).all()
    assert quantizer.dead_share().tolist() == [0, 0, 0]
    error = [(quantizer.lookup(codes) - keys)[:, g].square().sum(-1).mean() for g in range(3)]
    assert error[0] > error[1] > error[2]

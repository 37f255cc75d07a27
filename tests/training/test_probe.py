"""The theorem (docs/method.md#error-bound), inequality by inequality, and the tool that reports it.

Legend: L events, T targets, H heads, d head width.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.model.probe import AttentionErrors, attention_errors, probe_by_length, probe_warnings, shared_information

torch.set_num_threads(1)


def _random(length, targets, seed, scale=1.0, heads=3, width=6):
    """Queries, keys, codewords and a bias as a kernel would give, with some events hidden from some targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys = normal(length, heads, width)
    hard = keys + scale * normal(length, heads, width) * torch.rand(1, generator=generator)
    bias = -3.0 * torch.rand(heads, targets, length, generator=generator, dtype=torch.float64)
    hidden = torch.rand(targets, length, generator=generator) < 0.2
    hidden[:, 0] = False
    return scale * normal(targets, heads, width), keys, hard, bias.masked_fill(hidden, -torch.inf)


cases = given(
    length=st.integers(1, 2_000), seed=st.integers(0, 100_000), scale=st.sampled_from([0.0, 0.01, 0.3, 1.0, 3.0])
)


@settings(max_examples=100)
@cases
def test_every_inequality_of_the_theorem_holds(length, seed, scale):
    query, keys, hard, bias = _random(length, 4, seed, scale)
    found = attention_errors(query, keys, hard, bias)
    exact = torch.einsum("thd,lhd->htl", query, keys) + bias
    coarse = torch.einsum("thd,lhd->htl", query, hard) + bias
    log_alpha, log_alpha_hat = exact.log_softmax(-1), coarse.log_softmax(-1)
    alpha, alpha_hat, slack = log_alpha.exp(), log_alpha_hat.exp(), 1e-9
    seen = ~bias.isinf()
    # 1: every weight changes by a factor of e^Delta at most
    ratio = (log_alpha_hat - log_alpha)[seen].abs()
    assert (ratio <= found.delta[..., None].expand_as(bias)[seen] + slack).all()
    # 2 and 4
    assert torch.allclose(found.error, (alpha_hat - alpha).abs().sum(-1), atol=1e-12)
    assert (found.error <= found.bound + slack).all()
    assert (found.bound <= found.delta / 2 + slack).all()
    assert (found.delta <= 2 * found.cauchy + slack).all()
    assert (found.error <= found.cauchy + slack).all()
    assert torch.allclose(
        found.key_error.square(), (alpha * (keys - hard).square().sum(-1).T[:, None]).sum(-1), atol=1e-12
    )
    # 3
    divergence = torch.where(seen, alpha * (log_alpha - log_alpha_hat), 0.0).sum(-1)
    assert (divergence <= found.delta.square() / 8 + slack).all()
    # 5: values in a ball of radius R around any centre
    values = torch.nn.functional.normalize(torch.randn(length, 5, dtype=torch.float64), dim=-1) * 2.0 + 7.0
    moved = ((alpha_hat - alpha) @ values).norm(dim=-1)
    assert (moved <= 2.0 * found.error + slack).all()
    # 6: the attention-weighted key error
    factor = torch.where(found.delta > 1e-6, 2 * torch.expm1(found.delta / 2) / found.delta.clamp(min=1e-6), 1.0)
    assert (found.error <= factor * query.norm(dim=-1).T * found.key_error + 1e-7).all()


@pytest.mark.parametrize("delta", [0.1, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_the_two_level_construction_attains_the_bound(delta):
    # Two logit errors Delta apart, and exact weights of 1 / (1 + e^(Delta / 2)) on the higher one.
    odds = math.exp(-delta / 2)
    key = torch.tensor([math.log(odds), 0.0], dtype=torch.float64).view(2, 1, 1)
    hard = key + torch.tensor([delta, 0.0], dtype=torch.float64).view(2, 1, 1)
    found = attention_errors(torch.ones(1, 1, 1, dtype=torch.float64), key, hard)
    assert float(found.error) == pytest.approx(2 * math.tanh(delta / 4), rel=1e-12)
    assert float(found.error) == pytest.approx(float(found.bound), rel=1e-12)


def test_a_common_shift_of_all_codewords_costs_nothing():
    query, keys, _, bias = _random(50, 4, 0)
    found = attention_errors(query, keys, keys + 3.0, bias)
    assert found.delta.max() <= 1e-12 and found.error.max() <= 1e-12


def test_the_error_is_flat_in_length_for_a_fixed_codebook_and_bounded_keys():
    generator = torch.Generator().manual_seed(0)
    topics = torch.nn.functional.normalize(torch.randn(40, 2, 8, generator=generator), dim=-1)
    codebook = topics[:16]
    query = 2.0 * torch.nn.functional.normalize(torch.randn(32, 2, 8, generator=generator), dim=-1)
    errors = []
    for length in (2_000, 10_000, 50_000):
        topic = topics[torch.randint(40, (length,), generator=generator)]
        keys = torch.nn.functional.normalize(topic + 0.1 * torch.randn(length, 2, 8, generator=generator), dim=-1)
        nearest = torch.stack([torch.cdist(keys[:, h], codebook[:, h]).argmin(-1) for h in range(2)], 1)
        hard = torch.stack([codebook[nearest[:, h], h] for h in range(2)], 1)
        errors.append(float(attention_errors(query, keys, hard).error.mean()))
    assert max(errors) <= 1.05 * min(errors)


def test_probes_collect_users_by_length():
    lengths = [1, 99, 100, 5_000]
    errors = [attention_errors(*_random(min(length, 200), 4, length)) for length in lengths]
    probes = probe_by_length(zip(lengths, errors, strict=True))
    assert [(probe.shortest, probe.users) for probe in probes] == [(1, 2), (100, 1), (1_000, 1)]
    assert all(probe.holds and 0 <= probe.error <= probe.bound <= 2 for probe in probes)
    assert probes[1].error == pytest.approx(float(errors[2].error.mean()))
    assert probes[1].error_max == pytest.approx(float(errors[2].error.max()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        probes[0].error = 0.0


def _probe(key_error=0.1, bound=0.5, error=0.1, length=10):
    figure = torch.tensor([[0.0]])
    errors = AttentionErrors(figure, figure + bound, figure + error, figure + key_error, figure + 1.0)
    return probe_by_length([(length, errors)])[0]


def test_warnings_name_what_is_wrong_and_nothing_else():
    healthy, even = _probe(), torch.tensor([0.8, 0.6])
    assert probe_warnings([healthy, _probe(length=200)], even) == []
    assert "loose" in probe_warnings([_probe(bound=1.9)], even)[0]
    assert "above its bound" in probe_warnings([_probe(bound=0.05)], even)[0]
    assert "grows with length" in probe_warnings([healthy, _probe(key_error=0.2, length=200)], even)[0]
    assert probe_warnings([healthy], torch.tensor([0.8, 0.1]))[0].startswith("group 1: codes have collapsed")


def test_shared_information_says_whether_groups_partition_the_items_alike():
    generator = torch.Generator().manual_seed(0)
    codes, weight = (
        torch.randint(8, (5_000, 3), generator=generator),
        torch.randint(1, 9, (5_000,), generator=generator),
    )
    assert shared_information(codes, weight) < 0.02
    renamed = torch.stack([codes[:, 0], (codes[:, 0] + 3) % 8, 7 - codes[:, 0]], 1)
    assert shared_information(renamed, weight) == pytest.approx(1.0)
    assert shared_information(torch.stack([codes[:, 0], codes[:, 0], codes[:, 1]], 1), weight) == pytest.approx(
        1 / 3, abs=0.02
    )
    assert shared_information(torch.zeros(9, 2, dtype=torch.long), torch.ones(9)) == 1.0

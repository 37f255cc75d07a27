"""Decisions of the quality gate."""

from __future__ import annotations

import pytest

from evaluation.gate import quality_gate


def evaluation(auc_low=0.6, logloss=0.5, champion=None, low=0.0, seed_sd=None):
    paired = (
        {"vql_minus_champion": {"auc": {"value": low and low + 0.002, "low": low, "high": 0.02}}} if champion else {}
    )
    return {
        "models": [{"name": "mean_pooling"}, {"name": "vql", "auc": 0.65, "auc_low": auc_low, "logloss": logloss}],
        "champion": champion,
        "paired": paired,
        "auc_seed_sd": seed_sd,
    }


CHAMPION = {"version": "3", "warning": None, "logloss": 0.5}


@pytest.mark.parametrize(
    ("judged", "passes", "reason"),
    [
        (evaluation(), True, "no champion"),
        (evaluation(auc_low=0.5), False, "no champion"),
        (evaluation(auc_low=None), False, "unknown"),
        (evaluation(champion=CHAMPION, low=0.001), True, "lower bound 0.0010"),
        (evaluation(champion=CHAMPION, low=-0.004), True, "lower bound -0.0040"),
        (evaluation(champion=CHAMPION, low=-0.005), False, "lower bound -0.0050"),
        (evaluation(champion=CHAMPION, low=-0.008, seed_sd=0.002), True, "> -0.0085"),
        (evaluation(champion=CHAMPION, low=-0.009, seed_sd=0.002), False, "not above -0.0085"),
        (evaluation(champion=CHAMPION, low=-0.004, seed_sd=0.0004), True, "> -0.0050"),
        (evaluation(champion=CHAMPION, low=None), False, "unknown"),
        (evaluation(champion=CHAMPION, low=0.01, logloss=0.511), False, "log loss 0.5110"),
        (evaluation(champion=CHAMPION, low=0.01, logloss=0.509), True, "log loss"),
        (evaluation(champion={"version": "3", "warning": "cannot be loaded"}), False, "not comparable"),
    ],
)
def test_decision(judged, passes, reason):
    decision = quality_gate(judged, "vql")
    assert decision.passed is passes
    assert reason in decision.reason

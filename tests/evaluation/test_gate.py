"""Decisions of the quality gate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from evaluation.gate import quality_gate
from training.configs import default


def evaluation(auc_low=0.6, logloss=0.5, champion=None, low=0.0, seed_sd=None, **changes):
    """Half the interval is .002 wide, so that margins are those of the least power."""
    difference = {"value": low and low + 0.002, "low": low, "high": low and low + 0.004}
    vql = {"name": "vql", "auc": 0.65, "auc_low": auc_low, "logloss": logloss, "users": 1000}
    vql |= {"normalised_entropy": 0.8, "calibration": {"expected_ratio": 1.0}} | changes
    return {
        "models": [{"name": "mean_pooling"}, vql],
        "champion": champion,
        "anchor": champion,
        "paired": {"vql_minus_champion": {"auc": difference, "gauc": difference}} if champion else {},
        "slices": [],
        "auc_seed_sd": seed_sd,
    }


CHAMPION = {"version": "3", "warning": None, "logloss": 0.5}


@pytest.mark.parametrize(
    ("judged", "passes", "reason"),
    [
        (evaluation(), True, "no champion"),
        (evaluation(auc_low=0.55), False, "no champion"),
        (evaluation(normalised_entropy=1.001), False, "1.0010 times that of a constant"),
        (evaluation(normalised_entropy=None), False, "unknown"),
        (evaluation(calibration={"expected_ratio": 0.79}), False, "0.7900 times the positives"),
        (evaluation(calibration={"expected_ratio": 1.26}), False, "1.2600 times the positives"),
        (evaluation(calibration={"expected_ratio": None}), False, "unknown"),
        (evaluation(auc_low=None), False, "unknown"),
        (evaluation(champion=CHAMPION, low=0.001), True, "lower bound 0.0010"),
        (evaluation(champion=CHAMPION, low=-0.004), True, "lower bound -0.0040"),
        (evaluation(champion=CHAMPION, low=-0.005), False, "lower bound -0.0050"),
        (evaluation(champion=CHAMPION, low=-0.0104, seed_sd=0.002), True, "> -0.0105"),
        (evaluation(champion=CHAMPION, low=-0.0106, seed_sd=0.002), False, "not above -0.0105"),
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


# Measured: VQL of the default configuration on the simulated default, seeds 7 to 11; of the 20 differences none has a
# bound further below it, nor a higher ratio of log losses.
SEEDS_AUC = (0.7894, 0.7873, 0.7877, 0.7860, 0.7879)
WIDEST, HIGHEST_RATIO = 0.0020, 1.0077


@pytest.mark.parametrize(("lost", "passes"), [(0.0, True), (0.01, False)])
def test_retrains_with_other_seeds_pass_in_both_directions_and_a_real_loss_in_none(lost, passes):
    noise = default.config().auc_seed_sd
    assert noise == pytest.approx(np.std(SEEDS_AUC, ddof=1), abs=1e-4)
    for mine, champions in itertools.permutations(SEEDS_AUC, 2):
        low = mine - lost - champions - WIDEST
        judged = evaluation(champion=CHAMPION, low=low, logloss=0.5 * HIGHEST_RATIO, seed_sd=noise)
        assert quality_gate(judged, "vql").passed is passes, (mine, champions)

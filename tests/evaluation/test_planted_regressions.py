"""Regressions planted into scores of a day of 400 users: each is stopped by its check, and equal retrains pass.

An export that is wrong in the third decimal: test_stages.py. Ten times slower: test_mechanical_gate.py.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from evaluation import evaluate
from evaluation.gate import anchor_after, quality_gate
from evaluation.metrics import auc

USERS, TARGETS, SEED_SD = 400, 25, 0.0012
rng = np.random.default_rng(5)
USER = np.repeat(np.arange(USERS), TARGETS)
LENGTH = np.repeat(rng.permutation(USERS) + 1, TARGETS)
TRUTH = rng.normal(size=USERS * TARGETS)
SHORT, LONG = LENGTH <= USERS / 3, LENGTH > 2 * USERS / 3
# Noise that costs AUC as other seeds do: retrains differ by about SEED_SD between them, in scores far more.
SEED_NOISE = 0.25


def squash(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


LABEL = (rng.uniform(size=len(TRUTH)) < squash(1.5 * TRUTH)).astype(np.int8)


def trained(seed: int, lost: float | np.ndarray = 0.0) -> np.ndarray:
    """Scores of a training with that seed; `lost` (of every target) is how far noise replaces what is true."""
    draw = np.random.default_rng(seed)
    seeds, noise = draw.normal(size=(2, len(TRUTH)))
    return squash(1.5 * ((1 - lost) * TRUTH + lost * noise) + SEED_NOISE * seeds)


@functools.cache
def mean_pooling() -> np.ndarray:
    return trained(99, 0.85)


def judged(
    challenger: np.ndarray, champion: np.ndarray | None = None, anchor: np.ndarray | None = None, users: int = USERS
) -> dict:
    """Return what evaluation writes of these scores, of the first so many users."""
    rows = users > USER
    given = {"vql": challenger, "mean_pooling": mean_pooling(), "champion": champion, "anchor": anchor}
    scores = {name: score[rows] for name, score in given.items() if score is not None}
    served = {name: {"version": str(n), "warning": None} for n, name in enumerate(("anchor", "champion"), 1)}
    served = {name: known for name, known in served.items() if name in scores}
    scored = evaluate.Scored(USER[rows], LABEL[rows], LENGTH[rows], np.zeros(rows.sum(), bool), scores)
    return evaluate.compare(scored, "vql", served) | {"auc_seed_sd": SEED_SD}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(evaluate, "RESAMPLES", 30)


def test_equal_retrains_pass_twenty_of_twenty():
    aucs = []
    for seed in range(1, 21):
        found = judged(trained(seed), trained(seed + 100), trained(seed + 200))
        decision = quality_gate(found, "vql")
        assert decision.passed, (seed, decision.reason)
        assert anchor_after(found, "vql", "9") == "1"  # noise does not move it
        aucs.append(found["models"][0]["auc"])
    assert np.std(aucs, ddof=1) == pytest.approx(SEED_SD, rel=0.6)


def shuffled(score: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(score)


@pytest.mark.parametrize(
    ("challenger", "champion", "reason"),
    [
        (lambda: shuffled(trained(1)), None, "no champion; lower bound of AUC"),
        (lambda: shuffled(trained(1)), 2, "AUC minus champion's"),
        (lambda: shuffled(trained(1)), 2, "AUC minus mean_pooling's"),
        (lambda: trained(1, 0.12), 2, "AUC minus champion's"),
        (lambda: np.clip(trained(1) * 1.5, 0, 0.999), 2, "times the positives there are"),
        (lambda: trained(1) ** 3, 2, "times the positives there are"),
        (lambda: 0.5 + 0.02 * (trained(1) - 0.5), 2, "log loss"),
        (lambda: np.full(len(TRUTH), np.nan), 2, "unknown"),
        (lambda: np.where(np.arange(len(TRUTH)) == 777, np.nan, trained(1)), 2, "AUC minus champion's unknown"),
    ],
    ids=(
        "labels shuffled, no champion",
        "labels shuffled",
        "labels shuffled, against the floor",
        "worse everywhere",
        "probabilities too high",
        "probabilities too low",
        "probabilities of no use",
        "no score is a number",
        "one row is no number",
    ),
)
def test_a_planted_regression_is_stopped_by_its_check(challenger, champion, reason):
    decision = quality_gate(judged(challenger(), champion and trained(champion)), "vql")
    assert not decision.passed
    assert reason in decision.reason


@pytest.mark.parametrize(
    ("part", "events"), [(SHORT, "1 to 134"), (LONG, "268 to 400")], ids=("short histories", "long histories")
)
def test_a_loss_in_one_third_is_found_although_the_day_gains(part, events):
    found = judged(trained(1, np.where(part, 0.4, 0.0)), trained(2, 0.3))
    assert found["paired"]["vql_minus_champion"]["auc"]["low"] > 0
    decision = quality_gate(found, "vql")
    assert not decision.passed
    assert decision.reason.startswith(f"AUC of histories of {events} events minus champion's")
    assert ";" not in decision.reason  # nothing else fails


def test_a_toy_is_no_first_champion():
    """Better than nothing for sure, and than the pooled mean, which learned as little."""
    toy = judged(trained(1, 0.9))
    toy["paired"] = {}
    assert toy["models"][0]["auc_low"] > 0.5
    decision = quality_gate(toy, "vql")
    assert not decision.passed and "is not above 0.55" in decision.reason
    assert quality_gate(judged(trained(1)), "vql").passed


@pytest.mark.parametrize("users", [1, 12, 29])
def test_a_handful_of_users_promotes_nothing(users):
    for champion in (None, trained(2, 0.5)):
        decision = quality_gate(judged(trained(1), champion, users=users), "vql")
        assert not decision.passed and "unknown" in decision.reason


def test_small_losses_in_a_row_end_at_the_anchor():
    """Each model is .004 of AUC below the one before it, which is within what seeds and the day come to."""
    champion = anchor = trained(0)
    shares = np.linspace(0, 0.6, 7)
    below = [auc(LABEL, anchor) - auc(LABEL, trained(0, share)) for share in shares]
    for step in range(1, 31):
        challenger = trained(0, np.interp(0.004 * step, below, shares))
        found = judged(challenger, champion, anchor if step > 1 else None)
        assert found["paired"]["vql_minus_champion"]["auc"]["value"] == pytest.approx(-0.004, abs=0.002)
        decision = quality_gate(found, "vql")
        if not decision.passed:
            break
        assert anchor_after(found, "vql", str(step)) != str(step)
        champion = challenger
    assert step <= 8 and "AUC minus anchor's" in decision.reason
    assert "AUC minus champion's" not in decision.reason


def test_the_anchor_moves_to_what_is_better_by_more_than_noise():
    better, same = judged(trained(1), trained(2), trained(3, 0.3)), judged(trained(1), trained(2), trained(3))
    assert anchor_after(better, "vql", "9") == "9"
    assert anchor_after(same, "vql", "9") == "1"
    assert anchor_after(judged(trained(1), trained(2)), "vql", "9") == "2"  # frozen from now on: the old champion
    assert anchor_after(judged(trained(1)), "vql", "9") == "9"
    champion_is_anchor = judged(trained(1), trained(2, 0.3))
    champion_is_anchor["anchor"] = dict(champion_is_anchor["champion"])
    assert anchor_after(champion_is_anchor, "vql", "9") == "9"
    assert "anchor" not in quality_gate(champion_is_anchor, "vql").reason

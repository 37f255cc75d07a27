"""Metrics against definitions written out, and intervals against distributions that are known."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score
from torch import from_numpy, nn
from torchmetrics.classification import BinaryAUROC, BinaryCalibrationError
from torchmetrics.retrieval import RetrievalAUROC

from evaluation import metrics
from evaluation.metrics import LEAST_USERS, Bootstrap, auc, calibration, gauc, logloss, normalised_entropy, user_aucs

# (user, label, score) with few distinct scores, so that ties are common.
TARGETS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=40)


def brute_auc(label, score) -> float:
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in score[label == 1] for n in score[label == 0]]
    return float(np.mean(pairs)) if pairs else math.nan


def arrays(rows):
    user, label, score = (np.array(column) for column in zip(*rows, strict=True))
    return user, label.astype(np.int8), (score / 6 + 0.05).astype(np.float32)


@pytest.fixture(params=[3, metrics.CHUNK], scope="module")
def chunk(request):
    """Ties, users and resamples that go on behind the end of a chunk count as within one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CHUNK", request.param)
        yield


ANY_ROWS = settings(max_examples=60)


@ANY_ROWS
@given(TARGETS)
def test_auc_and_gauc_are_those_of_scikit_learn_on_ties_and_users_of_one_class(chunk, rows):
    user, label, score = arrays(rows)
    if 0 < label.sum() < len(label):
        assert auc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-9)
    parts = [user == one for one in np.unique(user) if 0 < label[user == one].mean() < 1]
    value, users = gauc(user, label, score)
    assert users == len(parts)
    if parts:
        expected = [roc_auc_score(label[part], score[part]) for part in parts]
        assert value == pytest.approx(np.average(expected, weights=[part.sum() for part in parts]), abs=1e-9)


def test_users_are_numbered_once():
    ids = np.array([70, -5, 70, 2**40])
    users, place = metrics.numbered(ids)
    assert users == 3 and place.dtype == np.int32 and place.tolist() == [1, 0, 1, 2]
    assert metrics.numbered(place)[1] is place
    assert metrics.numbered(place[[1, 3]])[1].tolist() == [0, 1]  # one has no target here
    assert metrics.numbered(np.zeros(0, np.int32))[0] == 0


def test_a_second_library_finds_the_same_auc_gauc_calibration_error_and_log_loss():
    """torchmetrics has no log loss: there torch's own is the second opinion."""
    rng, users, a_user = np.random.default_rng(2), 50, 40
    user = np.repeat(np.arange(users), a_user)
    # Bins of torchmetrics are of equal width, those of `calibration` of equally many targets: where scores are
    # spread evenly, these are the same bins. Every score occurs twice, so that there are ties.
    score = rng.permutation(np.repeat((np.arange(1_000) + 0.5) / 1_000, 2)).astype(np.float32)
    label = (rng.random(2_000) < 0.2 + 0.5 * score).astype(np.int8)
    assert all(0 < label[user == one].sum() < a_user for one in range(users))
    p, y, index = from_numpy(score), from_numpy(label.astype(np.int64)), from_numpy(user)
    assert auc(label, score) == pytest.approx(float(BinaryAUROC()(p, y)), abs=1e-6)
    # Of users with equally many impressions GAUC is the plain mean.
    assert gauc(user, label, score)[0] == pytest.approx(float(RetrievalAUROC()(p, y, indexes=index)), abs=1e-6)
    expected = float(BinaryCalibrationError(n_bins=metrics.CALIBRATION_BINS, norm="l1")(p, y))
    assert expected > 0.1 and calibration(label, score)["ece"] == pytest.approx(expected, abs=1e-6)
    assert logloss(label, score) == pytest.approx(float(nn.BCELoss()(p.double(), y.double())), abs=1e-9)
    assert logloss(label, score) == pytest.approx(log_loss(label, score.astype(np.float64)), abs=1e-9)


def test_many_targets_take_no_more_memory_than_their_columns_and_one_key(monkeypatch):
    targets, users = 2_000_000, 20_000
    monkeypatch.setattr(metrics, "CHUNK", 1 << 16)
    rng = np.random.default_rng(3)
    user, label = np.arange(targets) * users // targets, rng.integers(0, 2, targets, np.int8)
    score = rng.uniform(size=targets).astype(np.float32)
    tracemalloc.start()
    Bootstrap(user, label, {"a": score, "b": score}, resamples=2)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16 * targets + 20 * 2**20  # users in order, then a place and a key for each target


@ANY_ROWS
@given(TARGETS)
def test_auc_counts_pairs_and_half_of_ties(chunk, rows):
    _, label, score = arrays(rows)
    assert auc(label, score) == pytest.approx(brute_auc(label, score), nan_ok=True)


@settings(max_examples=60)
@given(TARGETS)
def test_gauc_is_the_weighted_mean_of_users_with_both_classes(rows):
    user, label, score = arrays(rows)
    parts = [(brute_auc(label[user == u], score[user == u]), (user == u).sum()) for u in np.unique(user)]
    parts = [(value, weight) for value, weight in parts if not math.isnan(value)]
    value, users = gauc(user * 1000 - 7, label, score)
    assert users == len(parts)
    expected = sum(v * w for v, w in parts) / sum(w for _, w in parts) if parts else math.nan
    assert value == pytest.approx(expected, nan_ok=True)


@ANY_ROWS
@given(TARGETS, st.integers(0, 1000))
def test_a_resample_of_users_equals_the_metrics_of_the_repeated_rows(chunk, rows, seed):
    user, label, score = arrays(rows)
    bootstrap = Bootstrap(user, label, {"m": score}, resamples=3, seed=seed)
    ids = np.unique(user)
    for resample, multiplicity in enumerate(bootstrap.multiplicity):
        copies, copy_user = [], []
        for u, times in zip(ids, multiplicity.astype(int), strict=True):
            for time in range(times):
                copies.append(np.flatnonzero(user == u))
                copy_user.append(np.full((user == u).sum(), u * 100 + time))
        index, owner = np.concatenate(copies), np.concatenate(copy_user)
        values = bootstrap.values["m"]
        assert values["auc"][resample] == pytest.approx(brute_auc(label[index], score[index]), nan_ok=True)
        assert values["gauc"][resample] == pytest.approx(gauc(owner, label[index], score[index])[0], nan_ok=True)
        assert values["logloss"][resample] == pytest.approx(logloss(label[index], score[index]))


def test_one_class_has_no_auc_and_no_targets_have_no_metric():
    assert math.isnan(auc(np.ones(3, np.int8), np.arange(3.0)))
    empty = np.zeros(0)
    assert math.isnan(auc(empty, empty))
    assert math.isnan(logloss(empty, empty))
    assert gauc(empty.astype(int), empty, empty)[1] == 0


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_score_that_is_no_number_leaves_nothing_known(kind):
    user, label = np.array([0, 0, 1, 1]), np.array([1, 0, 1, 0])
    score = np.array([0.9, 0.1, np.nan, 0.3], kind)
    assert (
        math.isnan(auc(label, score)) and math.isnan(gauc(user, label, score)[0]) and math.isnan(logloss(label, score))
    )


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_scores_of_any_kind_and_sign_are_ranked_as_they_are(kind):
    label, score = np.array([0, 0, 1, 1, 0, 1]), np.array([-3, 0, -0.0, 2, 1, -5]).astype(kind)
    assert auc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)


def test_a_user_of_one_class_has_no_part_in_gauc():
    user, label = np.array([0, 0, 1, 1, 1]), np.array([1, 0, 1, 1, 1])
    score = np.array([0.9, 0.1, 0.2, 0.3, 0.4])
    assert gauc(user, label, score) == (1.0, 1)
    assert np.isnan(user_aucs(user, label, score)[0]).tolist() == [False, True]


def test_logloss_of_a_certain_mistake_is_finite_in_fp32():
    assert logloss(np.array([1, 0]), np.array([0.0, 1.0], np.float32)) == pytest.approx(-math.log(1e-7), rel=1e-6)


def test_calibration_of_a_calibrated_and_of_a_doubled_score():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.45, 200_000)
    label = (rng.uniform(size=len(p)) < p).astype(np.int8)
    good, doubled = calibration(label, p), calibration(label, 2 * p)
    assert good["ece"] < 0.006
    assert good["expected_ratio"] == pytest.approx(1, abs=0.01)
    assert doubled["expected_ratio"] == pytest.approx(2, abs=0.02)
    assert doubled["ece"] == pytest.approx(0.25, abs=0.01)
    assert sum(b["targets"] for b in good["bins"]) == len(p)


def test_interval_of_a_mean_has_the_width_that_theory_gives():
    # One target a user: the log loss is a mean of independent values, its standard error is known.
    rng = np.random.default_rng(1)
    users = 4000
    score = rng.uniform(0.1, 0.9, users)
    label = (rng.uniform(size=users) < score).astype(np.int8)
    losses = -np.where(label > 0, np.log(score), np.log(1 - score))
    interval = Bootstrap(np.arange(users), label, {"m": score}, resamples=500).interval("m", "logloss")
    assert interval.low < interval.value < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * losses.std() / math.sqrt(users), rel=0.15)


def test_an_interval_over_a_handful_of_users_is_unknown():
    for users, known in ((1, False), (LEAST_USERS - 1, False), (LEAST_USERS, True)):
        user, rng = np.repeat(np.arange(users), 50), np.random.default_rng(4)
        label, score = rng.integers(0, 2, len(user)), rng.uniform(size=len(user))
        bootstrap = Bootstrap(user, label, {"a": score, "b": score[::-1]})
        for interval in (bootstrap.interval("a", "auc"), bootstrap.difference("a", "b", "gauc")):
            assert not math.isnan(interval.value)
            assert math.isnan(interval.low) == math.isnan(interval.high) == (not known)


def test_normalised_entropy_is_one_for_the_rate_itself_and_unknown_for_one_class():
    label = np.array([1, 0, 0, 0])
    assert normalised_entropy(label, np.full(4, 0.25)) == pytest.approx(1)
    assert normalised_entropy(label, np.array([0.9, 0.1, 0.1, 0.1])) == pytest.approx(
        -math.log(0.9) / (-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    )
    assert math.isnan(normalised_entropy(np.ones(3), np.full(3, 0.5)))


def test_users_are_resampled_not_targets():
    # A user's targets are copies of one another: intervals must not shrink with the number of copies.
    rng = np.random.default_rng(2)
    score, label = rng.uniform(0.1, 0.9, 300), rng.integers(0, 2, 300)
    width = []
    for copies in (1, 20):
        interval = Bootstrap(
            np.repeat(np.arange(300), copies), np.repeat(label, copies), {"m": np.repeat(score, copies)}
        ).interval("m", "auc")
        width.append(interval.high - interval.low)
    assert width[1] == pytest.approx(width[0])


def test_paired_difference_is_narrower_than_either_interval_and_finds_a_small_gain():
    rng = np.random.default_rng(3)
    user, truth = np.repeat(np.arange(400), 25), rng.normal(size=10_000)
    label = (rng.uniform(size=10_000) < 1 / (1 + np.exp(-truth))).astype(np.int8)
    squash = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    noise = rng.normal(size=10_000)
    bootstrap = Bootstrap(
        user,
        label,
        {"a": squash(truth + 0.3 * noise), "b": squash(truth + 0.6 * noise), "c": squash(truth + 0.3 * noise)},
    )
    difference, alone = bootstrap.difference("a", "b", "auc"), bootstrap.interval("a", "auc")
    assert 0 < difference.low < difference.value < difference.high
    assert difference.high - difference.low < 0.7 * (alone.high - alone.low)
    same = bootstrap.difference("a", "c", "gauc")
    assert (same.value, same.low, same.high) == (0, 0, 0)

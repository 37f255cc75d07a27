"""Two arms: intervals over users, the power that is announced, and a planted difference that is found as often."""

from __future__ import annotations

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.datasets.simulate import Simulation, exposures, true_probabilities, write_simulation
from etl.stage.errors import StageError
from evaluation import ab
from evaluation.ab import Arm, Difference, first_choices, power, read_out, replayed, split_in_two, users_needed

LIFT = 0.01  # of the click rate, relative
USERS = Simulation(users=36_000, length_scale=0.002, items=500)  # what a power of .8 takes


@pytest.fixture(scope="module")
def shown() -> dict[str, np.ndarray]:
    """Exposures of simulated users with their true probabilities."""
    return exposures(USERS)


def clicks(probability: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(len(probability)) < probability


def outcome(shown: dict[str, np.ndarray], lift: float, seed: int) -> Difference:
    """Run one test: half of the users have a click rate that is higher by `lift`."""
    user = shown["user_id"]
    treated = split_in_two(user, seed)
    click = clicks(shown["probability"] * np.where(treated, 1 + lift, 1), 1_000 + seed)
    return Difference.of(Arm.of(user[~treated], click[~treated]), Arm.of(user[treated], click[treated]))


def test_a_planted_difference_is_found_as_often_as_the_power_that_was_announced_says(shown):
    before = Arm.of(shown["user_id"], clicks(shown["probability"], 0))
    announced = power(before, LIFT, before.users / 2)
    found = [outcome(shown, LIFT, seed) for seed in range(20)]
    detected = sum(each.low > 0 for each in found)
    spread = (20 * announced * (1 - announced)) ** 0.5
    assert 0.8 < announced < 0.9 and abs(detected - 20 * announced) <= 2.5 * spread
    truth = LIFT * shown["probability"].mean()
    assert sum(each.low <= truth <= each.high for each in found) >= 17
    wanted = users_needed(before, LIFT, announced)
    assert wanted == pytest.approx(before.users / 2, rel=0.02)


def test_without_a_difference_a_test_seldom_finds_one_and_exposures_taken_for_independent_would(shown):
    found = [outcome(shown, 0.0, seed) for seed in range(20)]
    assert sum(each.p_value < 0.05 for each in found) <= 4
    user = np.repeat(np.arange(200), 500)
    taste = np.random.default_rng(0).normal(0.4, 0.1, 200).clip(0, 1)
    arm = Arm.of(user, clicks(taste[user], 0))
    assert arm.variance > 10 * arm.rate * (1 - arm.rate) / arm.exposures


def test_the_variance_is_that_of_other_users_drawn_from_the_same_ones(shown):
    user, click = shown["user_id"], clicks(shown["probability"], 3)
    arm = Arm.of(user, click)
    total, shown_U = np.bincount(user, weights=click), np.bincount(user)
    drawn = np.random.default_rng(0).integers(len(total), size=(300, len(total)))
    assert arm.variance == pytest.approx(np.var(total[drawn].sum(1) / shown_U[drawn].sum(1)), rel=0.25)


def log_of(treatment_users: int, extra: tuple[int, str] | None = None):
    user = np.arange(1_000 + treatment_users)
    arm = np.where(user < 1_000, "champion", "challenger")
    if extra:
        user, arm = np.append(user, extra[0]), np.append(arm, extra[1])
    return user, arm, np.arange(len(user)) % 3 == 0


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (log_of(1_000, (5, "challenger")), r"1 user\(s\) are in both arms, such as 5"),
        (log_of(1_200), "1,000 users in champion and 1,200 in challenger"),
        (log_of(1_000, (5, "third")), "the log has the arms challenger, champion, third"),
        ((np.arange(40), np.repeat(["champion", "challenger"], 20), np.zeros(40)), r"an arm has 20 user\(s\)"),
    ],
)
def test_a_log_that_says_nothing_of_the_arms_is_refused_with_the_reason(log, says):
    with pytest.raises(StageError, match=says):
        read_out(*log, "champion")


def test_the_first_choice_of_a_page_is_its_highest_score_and_of_ties_the_first():
    page, score = np.array([3, 1, 3, 1, 2]), np.array([0.2, 0.5, 0.9, 0.5, 0.0])
    assert first_choices(page, score).tolist() == [1, 4, 2]


def test_a_better_model_wins_on_the_true_users(shown):
    logit = np.log(shown["probability"] / (1 - shown["probability"]))
    noise = np.random.default_rng(1).normal(size=(2, len(logit)))
    scores = logit + 3.0 * noise[0], logit + 0.5 * noise[1]
    page = np.unique(shown["user_id"] * 10**14 + shown["time_ms"], return_inverse=True)[1]
    user, treated, click, truth = replayed(page, shown["user_id"], shown["probability"], scores, seed=0)
    found = read_out(user, np.where(treated, "new", "old"), click, "old")["difference"]
    assert truth > 0.02 and found["low"] <= truth <= found["high"] and found["low"] > 0


def test_the_commands_plan_read_and_replay(tmp_path, monkeypatch, capsys):
    def said(*words: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["ab", *map(str, words)])
        ab.main()
        return json.loads(capsys.readouterr().out)

    small = Simulation(users=120, length_scale=0.01, items=100)
    write_simulation(small, tmp_path / "raw")
    shown = exposures(small)
    columns = {name: shown[name] for name in ("user_id", "item_id", "time_ms")}
    treated = split_in_two(shown["user_id"], 0)
    log = {**columns, "arm": np.where(treated, "b", "a"), "is_click": clicks(shown["probability"], 0).astype(int)}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    plan = said("plan", "--log", tmp_path / "log.parquet", "--lift", "0.2")
    assert plan["users_an_arm"] == 60 and plan["power"] < 1 < plan["users_an_arm_for_power_0.8"]
    read = said("read", "--log", tmp_path / "log.parquet", "--control", "a")
    assert read["arms"]["a"]["users"] == read["arms"]["b"]["users"] == 60
    scores = {"bad": np.zeros(len(treated)), "best": shown["probability"]}
    pq.write_table(pa.table({**columns, **scores}), tmp_path / "scores.parquet")
    replay = said(
        *("replay", "--raw", tmp_path / "raw", "--scores", tmp_path / "scores.parquet"),
        *("--control", "bad", "--treatment", "best"),
    )
    assert replay["simulated"] is True and replay["true_difference"] > 0.05
    with pytest.raises(StageError, match=r"1 exposures are not in .*, such as user 7, item 3 at 5"):
        true_probabilities(tmp_path / "raw", np.array([7]), np.array([3]), np.array([5]))
    with pytest.raises(StageError, match="has no column arms"):
        said("read", "--log", tmp_path / "log.parquet", "--control", "a", "--arm", "arms")

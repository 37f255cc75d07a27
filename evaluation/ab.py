"""Two arms of an experiment: what it can find, what it found, and what it would be on the simulator's users.

    python -m evaluation.ab plan --log before.parquet --lift 0.01        # power, and the users that .8 of it takes
    python -m evaluation.ab read --log exposures.parquet --control champion
    python -m evaluation.ab replay --raw RAW --scores RUNS/A/scores.parquet --control softmax_attention --treatment vql

A log has one row an exposure: user, arm and click (0 or 1), as Parquet or CSV. Users are what was assigned, so they are
what varies: a click rate is clicks over exposures, and its variance that of a ratio of two means over users (the delta
method), never that of independent exposures.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from etl.datasets.simulate import true_probabilities
from etl.stage.commands import run_stage
from etl.stage.errors import StageError

NORMAL = NormalDist()
LEAST_USERS = 30  # of an arm: fewer say nothing of other users
LEAST_SPLIT_P = 0.001  # a split less likely than that has a cause


@dataclass(frozen=True)
class Arm:
    """Clicks over exposures of one arm's users.

    Attributes:
        variance: of `rate`, over users as they might have been drawn.
    """

    users: int
    exposures: int
    clicks: int
    rate: float
    variance: float

    @staticmethod
    def of(user: np.ndarray, click: np.ndarray) -> Arm:
        """Return the arm of exposures, [E] each. Raises: StageError: fewer than `LEAST_USERS` users."""
        owner = np.unique(user, return_inverse=True)[1]
        shown_U = np.bincount(owner).astype(np.float64)
        clicks_U = np.bincount(owner, weights=click)
        users = len(shown_U)
        if users < LEAST_USERS:
            raise StageError(f"an arm has {users} user(s): an interval over users needs {LEAST_USERS}", "wait for more")
        rate = clicks_U.sum() / shown_U.sum()
        residual_U = clicks_U - rate * shown_U  # its mean is 0: what a user adds to the rate's error
        variance = residual_U.var(ddof=1) / users / shown_U.mean() ** 2
        return Arm(users, int(shown_U.sum()), int(clicks_U.sum()), float(rate), float(variance))


@dataclass(frozen=True)
class Difference:
    """Rate of the treatment minus rate of the control, with its interval and the chance of one as large without any."""

    value: float
    low: float
    high: float
    relative: float
    p_value: float

    @staticmethod
    def of(control: Arm, treatment: Arm, alpha: float = 0.05) -> Difference:
        value, error = treatment.rate - control.rate, (control.variance + treatment.variance) ** 0.5
        reach = NORMAL.inv_cdf(1 - alpha / 2) * error
        p_value = 2 * NORMAL.cdf(-abs(value) / error) if error else float(value == 0)
        relative = value / control.rate if control.rate else float("nan")
        return Difference(value, value - reach, value + reach, relative, p_value)


def power(before: Arm, lift: float, users_an_arm: float, alpha: float = 0.05) -> float:
    """Return the chance that a test of so many users an arm finds a relative lift of the rate, two-sided.

    Args:
        before: the rate and its variance over users, from a log as long as the test will be.
    """
    error = (2 * before.variance * before.users / users_an_arm) ** 0.5
    reach, bound = abs(before.rate * lift) / error, NORMAL.inv_cdf(1 - alpha / 2)
    return NORMAL.cdf(reach - bound) + NORMAL.cdf(-reach - bound)


def users_needed(before: Arm, lift: float, wanted: float = 0.8, alpha: float = 0.05) -> int:
    """Return the users an arm with which a test finds a relative lift with the wanted power."""
    reach = NORMAL.inv_cdf(1 - alpha / 2) + NORMAL.inv_cdf(wanted)
    return int(np.ceil(2 * before.variance * before.users * (reach / (before.rate * lift)) ** 2))


def split_p_value(control: Arm, treatment: Arm, share: float = 0.5) -> float:
    """Return the chance of a split of the users as uneven as this one where `share` of them belong to the treatment."""
    users = control.users + treatment.users
    return 2 * NORMAL.cdf(-abs(treatment.users - share * users) / (users * share * (1 - share)) ** 0.5)


def read_out(user: np.ndarray, arm: np.ndarray, click: np.ndarray, control: str, alpha: float = 0.05) -> dict:
    """Return what a log of two arms says.

    Raises:
        StageError: there are not two arms, a user is in both, the split has a cause, or an arm has too few users.
    """
    names = sorted(set(arm.tolist()))
    if control not in names or len(names) != 2:
        raise StageError(f"the log has the arms {', '.join(names)}", "give a log of two, and one of them as --control")
    treatment = next(name for name in names if name != control)
    both = np.intersect1d(user[arm == control], user[arm == treatment])
    if len(both):
        raise StageError(
            f"{len(both):,} user(s) are in both arms, such as {both[0]}",
            "leave them out only if what moved them has nothing to do with the arms; else the assignment is broken",
        )
    arms = {name: Arm.of(user[arm == name], click[arm == name]) for name in (control, treatment)}
    if (p := split_p_value(arms[control], arms[treatment])) < LEAST_SPLIT_P:
        raise StageError(
            f"{arms[control].users:,} users in {control} and {arms[treatment].users:,} in {treatment}: by chance with"
            f" probability {p:.1g}",
            "find what loses users of one arm before its clicks are compared",
        )
    found = Difference.of(arms[control], arms[treatment], alpha)
    return {"arms": {name: asdict(each) for name, each in arms.items()}, "difference": asdict(found), "split_p": p}


def split_in_two(user: np.ndarray, seed: int) -> np.ndarray:
    """Return which exposures are the treatment's, bool [E]: half of the users, by a draw of each."""
    ids, owner = np.unique(user, return_inverse=True)
    return np.random.default_rng(seed).permutation(len(ids) % 2 + len(ids))[owner] % 2 == 1


def first_choices(page: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return the row of each page's highest score, of equal ones the first."""
    order = np.lexsort((np.arange(len(page)), -score, page))
    return order[np.flatnonzero(np.diff(page[order], prepend=-1))]


def replayed(
    page: np.ndarray, user: np.ndarray, likely: np.ndarray, scores: tuple[np.ndarray, np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Let each user's arm show them the best of every page, and draw their clicks.

    Args:
        page, user: int64 [E], of each candidate; likely: float64 [E], its true click probability.
        scores: of control and treatment, float [E].

    Returns:
        user, treated, click of every page shown, and the true difference of the rates had all users both arms.
    """
    first = [first_choices(page, score) for score in scores]
    truth = float(likely[first[1]].mean() - likely[first[0]].mean())
    treated = split_in_two(user[first[0]], seed)
    shown = np.where(treated, first[1], first[0])
    click = np.random.default_rng([seed, 1]).random(len(shown)) < likely[shown]
    return user[shown], treated, click, truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    plan, read, replay = (steps.add_parser(name) for name in ("plan", "read", "replay"))
    for each in (plan, read):
        each.add_argument("--log", required=True, type=Path)
        each.add_argument("--user", default="user_id", help="column (default: %(default)s)")
        each.add_argument("--click", default="is_click", help="column of 0 and 1 (default: %(default)s)")
    plan.add_argument("--lift", type=float, default=0.01, help="relative, of the rate (default: %(default)s)")
    plan.add_argument("--users", type=int, help="of each arm (default: half of the log's)")
    read.add_argument("--arm", default="arm", help="column (default: %(default)s)")
    replay.add_argument("--raw", required=True, type=Path, help="folder of simulated logs")
    replay.add_argument("--scores", required=True, type=Path, help="scores.parquet of an evaluation of these logs")
    replay.add_argument("--treatment", required=True, help="column of the scores")
    replay.add_argument("--seed", type=int, default=0, help="of the split and of the clicks")
    for each in (read, replay):
        each.add_argument("--control", required=True, help="an arm's name")
    for each in (plan, read, replay):
        each.add_argument("--alpha", type=float, default=0.05, help="two-sided (default: %(default)s)")
    args = parser.parse_args()
    print(json.dumps({"plan": _plan, "read": _read, "replay": _replay}[args.step](args), indent=1), flush=True)


def _plan(args: argparse.Namespace) -> dict:
    before = Arm.of(*_columns(args.log, args.user, args.click))
    users = args.users or before.users // 2
    return {
        "rate": before.rate,
        "lift": args.lift,
        "users_an_arm": users,
        "power": power(before, args.lift, users, args.alpha),
        "users_an_arm_for_power_0.8": users_needed(before, args.lift, alpha=args.alpha),
    }


def _read(args: argparse.Namespace) -> dict:
    user, arm, click = _columns(args.log, args.user, args.arm, args.click)
    return read_out(user, arm.astype(str), click, args.control, args.alpha)


def _replay(args: argparse.Namespace) -> dict:
    user, item, time_ms, *scores = _columns(args.scores, "user_id", "item_id", "time_ms", args.control, args.treatment)
    likely = true_probabilities(args.raw, user, item, time_ms)
    page = np.unique(np.stack([user, time_ms]), axis=1, return_inverse=True)[1].reshape(-1)
    user, treated, click, truth = replayed(page, user, likely, (scores[0], scores[1]), args.seed)
    arm = np.where(treated, args.treatment, args.control)
    found = read_out(user, arm, click, args.control, args.alpha)
    return {"simulated": True, **found, "true_difference": truth}


def _columns(path: Path, *names: str) -> list[np.ndarray]:
    """Return columns of a file. Raises: StageError: one is not there or has no value in some row."""
    if not path.is_file():
        raise StageError(f"there is no file {path}", "give the path of a Parquet or CSV file")
    rows: pa.Table = pq.read_table(path) if path.suffix == ".parquet" else pacsv.read_csv(path)
    for name in names:
        if name not in rows.column_names:
            raise StageError(f"{path} has no column {name}: {', '.join(rows.column_names)}", "name another one")
        if rows[name].null_count:
            raise StageError(f"{rows[name].null_count:,} rows of {path} have no {name}", "leave these rows out")
    return [rows[name].to_numpy() for name in names]


if __name__ == "__main__":
    run_stage(main)

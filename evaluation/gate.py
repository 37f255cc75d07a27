"""The quality gate: may a challenger replace the champion, judged on the day that neither was trained on.

Every check is made and every one that fails is said. What cannot be known passes no check: a bound of nan is above
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Thresholds:
    """What the quality gate asks; all of its figures stand here.

    Attributes:
        first_auc_low: without a champion, the lower bound of the AUC must lie above this: a model of a few steps has
            .50 to .52 on the simulated default, a trained one .78, mean pooling .56.
        floor_models: models of the same training that the challenger must not be inferior to, where they were trained.
        interval_margin, most_interval_margin: the part of a margin that stands for the day's power is half the width of
            the difference's interval, within these; between equal models it is .0013 to .0020 with 1,000 users.
        seed_deviations: a difference of so many standard deviations is what other seeds come to.
        least_auc_margin: a margin is at least this, where no noise of seeds is known, too.
        parts_ratio: margins of GAUC and of the AUC of a third are so many times as wide: a third of the targets has
            sqrt(3) times the noise of seeds.
        logloss_ratio: the log loss must be at most this times the other model's.
        most_normalised_entropy: log loss over that of the day's own rate for every target: above 1 the model says less
            than a constant.
        predicted_ratio: sum of probabilities over number of positives lies within these.
    """

    first_auc_low: float = 0.55
    floor_models: tuple[str, ...] = ("mean_pooling",)
    interval_margin: float = 0.002
    most_interval_margin: float = 0.01
    seed_deviations: float = 3.0
    least_auc_margin: float = 0.005
    parts_ratio: float = 2.0
    logloss_ratio: float = 1.02
    most_normalised_entropy: float = 1.0
    predicted_ratio: tuple[float, float] = (0.8, 1.25)

    def auc_margin(self, seed_sd: float | None, half_width: float, ratio: float = 1.0) -> float:
        """Return the margin: the lower bound of a difference must lie above minus this.

        Args:
            seed_sd: standard deviation of the AUC between trainings that differ by their seed alone; that of the
                difference of two is sqrt(2) times as much. None: not measured.
            half_width: of the difference's interval; nan counts as none.
            ratio: 1, or `parts_ratio`.
        """
        of_seeds = self.seed_deviations * math.sqrt(2) * (seed_sd or 0.0)
        of_day = max(self.interval_margin, min(half_width, ratio * self.most_interval_margin))
        return max(ratio * self.least_auc_margin, of_day + ratio * of_seeds)


@dataclass(frozen=True)
class Decision:
    """Outcome of a gate and its reason in one sentence."""

    passed: bool
    reason: str

    def to_dict(self) -> dict:
        return asdict(self)


def quality_gate(evaluation: Mapping, primary: str, thresholds: Thresholds = Thresholds()) -> Decision:
    """Decide from `evaluation.json`, which holds the configuration's seed noise.

    A comparison that cannot be made never passes: a model of a later partition has seen the challenger's evaluation
    day, and one that could not be loaded has no scores.
    """
    checks = list(_checks(evaluation, primary, thresholds))
    failed = [check.reason for check in checks if not check.passed]
    return Decision(not failed, "; ".join(failed or [check.reason for check in checks]))


def anchor_after(evaluation: Mapping, primary: str, version: str, thresholds: Thresholds = Thresholds()) -> str:
    """Return the version that the alias `anchor` names once `version` is promoted.

    The anchor stays where it is, so that small losses add up to no more than one margin, until a model is promoted that
    is better than it by more than a margin: what noise of seeds gives does not move it. Without one it is the champion
    of until now, or the first model itself.
    """
    anchor, champion = evaluation.get("anchor"), evaluation["champion"]
    if anchor is None:
        return champion["version"] if champion is not None else version
    other = "champion" if champion is not None and champion["version"] == anchor["version"] else "anchor"
    difference = evaluation["paired"][f"{primary}_minus_{other}"]["auc"]
    better = _number(difference["low"]) > thresholds.auc_margin(evaluation.get("auc_seed_sd"), _half_width(difference))
    return version if better else anchor["version"]


def _checks(evaluation: Mapping, primary: str, thresholds: Thresholds) -> Iterator[Decision]:
    challenger = next(row for row in evaluation["models"] if row["name"] == primary)
    yield from _probabilities(challenger, thresholds)
    for name in thresholds.floor_models:
        if (paired := evaluation["paired"].get(f"{primary}_minus_{name}")) is not None:
            yield _not_inferior(f"AUC minus {name}'s", paired["auc"], evaluation, thresholds)
    champion, anchor = evaluation["champion"], evaluation.get("anchor")
    if champion is None:
        low, floor = challenger["auc_low"], thresholds.first_auc_low
        passed = _number(low) > floor
        relation = "is above" if passed else "is not above"
        yield Decision(
            passed,
            f"no champion; lower bound of AUC {_show(low)} {relation} {floor} (users: {challenger.get('users')})",
        )
    else:
        yield from _against("champion", champion, challenger, evaluation, thresholds)
    if anchor is not None and (champion is None or champion["version"] != anchor["version"]):
        yield from _against("anchor", anchor, challenger, evaluation, thresholds)


def _probabilities(challenger: Mapping, thresholds: Thresholds) -> Iterator[Decision]:
    entropy, ratio = challenger.get("normalised_entropy"), challenger["calibration"]["expected_ratio"]
    if not _number(entropy) <= thresholds.most_normalised_entropy:
        yield Decision(
            False, f"log loss is {_show(entropy)} times that of a constant, above {thresholds.most_normalised_entropy}"
        )
    low, high = thresholds.predicted_ratio
    if not low <= _number(ratio) <= high:
        yield Decision(False, f"it predicts {_show(ratio)} times the positives there are, not {low} to {high} times")


def _against(
    name: str, other: Mapping, challenger: Mapping, evaluation: Mapping, thresholds: Thresholds
) -> Iterator[Decision]:
    """Compare with the champion or the anchor: AUC, log loss, GAUC, and AUC by length of the history."""
    if other.get("warning"):
        yield Decision(False, f"not comparable with {name} version {other['version']}: {other['warning']}")
        return
    pair = f"{challenger['name']}_minus_{name}"
    paired = evaluation["paired"][pair]
    yield _not_inferior(f"AUC minus {name}'s", paired["auc"], evaluation, thresholds)
    mine, theirs = challenger["logloss"], other["logloss"]
    passed = _number(mine) <= thresholds.logloss_ratio * _number(theirs)
    relation = "against" if passed else f"is more than {thresholds.logloss_ratio} x the"
    yield Decision(passed, f"log loss {_show(mine)} {relation} {name}'s {_show(theirs)}")
    # What is unknown in a part says nothing: the whole day is known, or has failed above.
    parts = [("GAUC", paired["gauc"])]
    for part in evaluation["slices"]:
        parts.append(
            (f"AUC of histories of {part['low']:,} to {part['high']:,} events", part.get("paired", {}).get(pair))
        )
    for what, difference in parts:
        if difference is None or difference["low"] is None or math.isnan(difference["low"]):
            continue
        found = _not_inferior(f"{what} minus {name}'s", difference, evaluation, thresholds, thresholds.parts_ratio)
        if not found.passed:
            yield found


def _not_inferior(
    what: str, difference: Mapping, evaluation: Mapping, thresholds: Thresholds, ratio: float = 1.0
) -> Decision:
    margin = thresholds.auc_margin(evaluation.get("auc_seed_sd"), _half_width(difference), ratio)
    passed = _number(difference["low"]) > -margin
    value, low = _show(difference["value"]), _show(difference["low"])
    if passed:
        return Decision(True, f"{what} {value}, lower bound {low} > -{_show(margin)}")
    return Decision(False, f"{what} {value} has lower bound {low}, which is not above -{_show(margin)}")


def _half_width(difference: Mapping) -> float:
    return (_number(difference["high"]) - _number(difference["low"])) / 2


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _show(value: float | None) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value:.4f}"

"""The quality gate: may a challenger replace the champion, judged on the day that neither was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Thresholds:
    """What the quality gate asks.

    Attributes:
        first_auc_low: without a champion, the lower bound of the AUC must lie above this.
        interval_margin: the bound lies below the difference by half the width of its interval over users; between equal
            models this is .0013 to .0020 with 1,000 of them.
        seed_deviations: a difference of so many standard deviations is what other seeds come to.
        least_auc_margin: the margin (see `auc_margin`) is at least this, where no noise of seeds is known, too.
        logloss_ratio: the log loss must be at most this times the champion's.
    """

    first_auc_low: float = 0.5
    interval_margin: float = 0.002
    seed_deviations: float = 3.0
    least_auc_margin: float = 0.005
    logloss_ratio: float = 1.02

    def auc_margin(self, seed_sd: float | None) -> float:
        """Return the margin: the lower bound of the AUC difference to the champion must lie above minus this.

        Args:
            seed_sd: standard deviation of the AUC between trainings that differ by their seed alone; that of the
                difference of two is sqrt(2) times as much. None: not measured.
        """
        of_seeds = self.seed_deviations * math.sqrt(2) * (seed_sd or 0.0)
        return max(self.least_auc_margin, self.interval_margin + of_seeds)


@dataclass(frozen=True)
class Decision:
    """Outcome of a gate and its reason in one sentence."""

    passed: bool
    reason: str

    def to_dict(self) -> dict:
        return asdict(self)


def quality_gate(evaluation: Mapping, primary: str, thresholds: Thresholds = Thresholds()) -> Decision:
    """Decide from `evaluation.json`, which holds the configuration's seed noise.

    A comparison that cannot be made never passes: a champion of a later partition has seen the challenger's evaluation
    day, and one that could not be loaded has no scores. nan fails every comparison.
    """
    challenger = next(row for row in evaluation["models"] if row["name"] == primary)
    champion = evaluation["champion"]
    if champion is None:
        passed = _number(challenger["auc_low"]) > thresholds.first_auc_low
        relation = "is above" if passed else "is not above"
        return Decision(
            passed,
            f"no champion; lower bound of AUC {_show(challenger['auc_low'])} {relation} {thresholds.first_auc_low}",
        )
    if champion.get("warning"):
        return Decision(False, f"not comparable with champion version {champion['version']}: {champion['warning']}")
    difference = evaluation["paired"][f"{primary}_minus_champion"]["auc"]
    margin = thresholds.auc_margin(evaluation.get("auc_seed_sd"))
    if not _number(difference["low"]) > -margin:
        return Decision(
            False,
            f"AUC minus champion's {_show(difference['value'])} has lower bound {_show(difference['low'])}, "
            f"which is not above -{_show(margin)}",
        )
    if not _number(challenger["logloss"]) <= thresholds.logloss_ratio * _number(champion["logloss"]):
        return Decision(
            False,
            f"log loss {_show(challenger['logloss'])} is more than {thresholds.logloss_ratio} x the champion's"
            f" {_show(champion['logloss'])}",
        )
    return Decision(
        True,
        f"AUC minus champion's {_show(difference['value'])}, lower bound {_show(difference['low'])} >"
        f" -{_show(margin)}; log loss {_show(challenger['logloss'])} against {_show(champion['logloss'])}",
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _show(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"

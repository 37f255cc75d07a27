"""What becomes of a version at its promotion, and how that is said; imports nothing, so that a DAG file may."""

from __future__ import annotations

PROMOTED, UNCHANGED, REFUSED = "promoted", "unchanged", "refused"  # unchanged: the champion is the same model
ROLLED_BACK = "rolled back to"
MOVED = (PROMOTED, ROLLED_BACK)  # the champion is another one afterwards
EVALUATION_PAGE = "evaluation/report.html"  # among the artifacts of the attempt's run in MLflow
_SAID = {
    PROMOTED: "promoted",
    UNCHANGED: "NOT promoted, it is the champion's equal",
    REFUSED: "NOT promoted, stays challenger",
    ROLLED_BACK: "is the champion again",
}
# What a person may decide, by name and with a reason.
PROMOTE, REFUSE, ROLLBACK = "promote", "refuse", "rollback"
ACTIONS = (ROLLBACK, PROMOTE, REFUSE)


def version_problem(action: str, version: object) -> str | None:
    """Return what is wrong with the version that an action is given, None where nothing is; nothing may be given."""
    if action == ROLLBACK:
        return None if version is None else "version: a rollback goes to the champion before and takes none"
    return f"version: which version to {action}?" if version is None else None


def sentence(outcome: str, model: str, version: str, reason: str) -> str:
    """Return what stands in the stage's log and in the run's note."""
    return f"{model} version {version} {_SAID[outcome]}: {reason}"

"""The one kind of failure that a stage tells its user about: what is wrong, where, and what to do."""

from __future__ import annotations


class StageError(Exception):
    """A stage cannot go on, for a reason that its user can mend.

    Args:
        what: what is wrong, naming the file, column, value or partition.
        remedy: what the user should do about it.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}\n  remedy: {remedy}")
        self.what = what
        self.remedy = remedy

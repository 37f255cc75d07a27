"""The failures that a stage reports to its user, and the exit code of each kind.

Imports next to nothing, so that a DAG file may.
"""

from __future__ import annotations

import re

EXIT_CORRECT = 2  # something for a person to correct; argparse's code, too
EXIT_GATE = 3  # a gate said no
EXIT_TRY_AGAIN = (
    75  # nothing to correct here: the same command line may succeed a minute later (EX_TEMPFAIL of sysexits.h)
)


class StageError(Exception):
    """A stage cannot go on, for a reason that its user can correct.

    Args:
        what: what is wrong, naming the file, column, value or partition.
        remedy: what the user should do about it.
    """

    exit_code = EXIT_CORRECT

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}\n  remedy: {remedy}")
        self.what = what
        self.remedy = remedy

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.remedy)  # a worker's comes back by pickle


class GateError(StageError):
    """A gate said no: the same data will be stopped again."""

    exit_code = EXIT_GATE


class TryAgainError(StageError):
    """A stage cannot go on now.

    A server does not answer, a worker was lost, somebody else changed what was being read.
    """

    exit_code = EXIT_TRY_AGAIN


def first_line(error: BaseException) -> str:
    """Return what an error says before the first line break, its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# How Arrow, boto3 and Spark's connectors say it, also in the middle of a trace of Java.
_NO_ANSWER = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|THROTTLING)|Could"
    r" not connect to the endpoint URL"
    r"|\((SlowDown|ServiceUnavailable|InternalError|RequestTimeout|503|500)\)|Connect timeout on endpoint URL|Read"
    r" timeout on endpoint URL|Connection was closed before"
)


def kind_of(error: BaseException) -> type[StageError]:
    """Return the kind of failure that an error of a store is.

    TryAgainError where it does not answer, else StageError.
    """
    return TryAgainError if _NO_ANSWER.search(str(error)) else StageError

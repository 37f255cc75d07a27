"""What every command line does.

Print its progress, and end with one clear message and the exit code of its kind when it fails.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from etl.stage.errors import StageError, TryAgainError, kind_of


def log(message: str) -> None:
    """Print one line of progress with the time, flushed, so that Airflow's log follows live."""
    print(time.strftime("%H:%M:%S"), message, flush=True)


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage.

    A StageError becomes one clear message and the exit code of its kind (a trace only with LONGVIEW_TRACE=1).
    """
    try:
        main()
    except Exception as error:
        cause = error if isinstance(error, StageError) else _no_answer(error)
        if cause is None or os.environ.get("LONGVIEW_TRACE") == "1":
            raise
        print(f"error: {cause}", file=sys.stderr, flush=True)
        sys.exit(cause.exit_code)


def _no_answer(error: Exception) -> StageError | None:
    """Return what to say of a store that does not answer; None for any other error, which is a crash."""
    if kind_of(error) is StageError:
        return None
    reason = next(
        (line.strip() for line in str(error).splitlines() if kind_of(Exception(line)) is TryAgainError), str(error)
    )
    return TryAgainError(f"a store does not answer: {reason[:500]}", "run the same command again once it does")

"""How the end of a stage becomes the end of its task: what is retried, how long, and what is said of it."""

from __future__ import annotations

import datetime as dtm
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from airflow.sdk import RetryDecision, RetryPolicy

from etl.stage.errors import EXIT_CORRECT, EXIT_GATE, EXIT_TRY_AGAIN, StageError
from infra import settings

WAIT_AFTER_CRASH = dtm.timedelta(seconds=20)


def retried() -> dict[str, Any]:
    """Return the arguments of a task that runs a command of the pipeline: how often it is tried, and after what."""
    return {
        "retries": len(settings.retry_waits()),
        "retry_policy": StageRetries(),
        "retry_delay": WAIT_AFTER_CRASH,
    }


class StageRetries(RetryPolicy):
    """Retry what may pass by itself for minutes, a crash once, and what a person or a gate has to say nothing of,
    never.

    Airflow asks it in the task's own process. A task needs the retries of `retried`; clearing it begins anew.
    """

    def evaluate(self, exception: BaseException, try_number: int, max_tries: int, context: Any = None) -> RetryDecision:
        waits = settings.retry_waits()
        tried = len(waits) - (max_tries - try_number)  # a clear raises both numbers
        code = exception.code if isinstance(exception, SystemExit) else None
        if code == EXIT_CORRECT:
            return RetryDecision.fail("there is something to correct: see the error line of the log")
        if code == EXIT_GATE:
            return RetryDecision.fail("a gate said no: see the error line of the log")
        if code == EXIT_TRY_AGAIN:
            return RetryDecision.retry(
                dtm.timedelta(seconds=waits[min(tried, len(waits)) - 1]), "try again: see the error line of the log"
            )
        if tried > 1:
            return RetryDecision.fail("it crashed again")
        return RetryDecision.retry(WAIT_AFTER_CRASH, "it crashed: one more try")


def explained(code: int) -> str:
    """Return what the end of a stage means, as the end of a sentence that begins with its module."""
    kinds = {
        EXIT_CORRECT: "found something to correct and is not tried again",
        EXIT_GATE: "was stopped by a gate and is not tried again",
        EXIT_TRY_AGAIN: "cannot go on now and is tried again, for some minutes",
    }
    return f"{kinds.get(code, 'crashed')} (exit code {code})"


def with_levels(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a stage, each with whether it is part of an error.

    `error:` and the indented lines below it.
    """
    telling = False
    for line in lines:
        line = line.rstrip()
        telling = line.startswith("error:") or (telling and line.startswith(" "))
        yield line, telling


def log_lines(log: Any, lines: Iterable[str]) -> str:
    """Log what a stage says, each line as it comes and at its level; return the first of an error, '' without one."""
    first = ""
    for line, is_error in with_levels(lines):
        (log.error if is_error else log.info)(line)
        first = first or (line if is_error else "")
    return first


def ends_as_a_stage(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a StageError that a method of a task raises end the task as it ends a stage: `error:` and `remedy:` in its
    log, and its exit code. The first line stays as `said` of the task, for the note of its run.

    Of all ways to fail, SystemExit is the one that Airflow puts no trace behind.
    """

    @functools.wraps(method)
    def ended(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except StageError as error:
            self.said = log_lines(self.log, f"error: {error}".splitlines())
            raise SystemExit(error.exit_code) from None

    return ended

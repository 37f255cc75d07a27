"""Runs suites with Great Expectations: one checkpoint a stage, a Data Docs page a suite, one JSON file an attempt.

    <reports>/gx/                                   the file context, built by code: suites, checkpoints, results
    <reports>/data_docs/index.html                  the site: every attempt's validations accumulate here
    <reports>/validations/<attempt>-<stage>.json    each expectation's severity, success and observed value
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.quality.suites import CRITICAL, WARNING, build_suite
from etl.quality.thresholds import THRESHOLDS

if TYPE_CHECKING:
    import pandas as pd

SITE = "partitions"
MAX_OBSERVED = 20  # observed values that are kept of an expectation


@dataclass(frozen=True)
class Check:
    """One frame to validate against one suite.

    Attributes:
        suite: name of the suite, see `etl.quality.suites.build_suite`.
        frame: what it validates.
        per_day: the frame has one row a day, named by its column dt, and is small.
    """

    suite: str
    frame: pd.DataFrame
    per_day: bool = True


@dataclass(frozen=True)
class Outcome:
    """One evaluated expectation.

    Attributes:
        threshold: the bounds or other arguments that it was evaluated with.
        observed: a value a day for stats tables (the failing days when it fails); what Great
            Expectations reports for other frames.
        page: path of the Data Docs page that shows it.
    """

    suite: str
    expectation: str
    column: str
    severity: str
    success: bool
    threshold: dict[str, Any]
    observed: Any
    notes: str
    remedy: str
    page: str

    def __str__(self) -> str:
        return f"{self.expectation} on {self.column} [{self.severity}]: observed {self.observed}, expected {self.threshold} ({self.notes})"


@dataclass(frozen=True)
class Report:
    """What the validation of one attempt's stage found."""

    outcomes: tuple[Outcome, ...]
    gx_success: bool
    max_severity_failure: str | None
    path: Path

    def failed(self, severity: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.success and outcome.severity == severity]


def validate(checks: Sequence[Check], stage: str, attempt: str, reports: Path, about: dict[str, Any]) -> Report:
    """Validate frames and write Data Docs and the results file.

    Args:
        checks: the frames of the stage and their suites.
        stage: names the checkpoint, and with the attempt the run.
        reports: folder of reports; a second process waits while this one writes below it.
        about: what else the results file should say (partition, data set, sampling).

    Returns:
        the outcomes. Gate on `max_severity_failure`: `gx_success` is False for a failed warning, too.
    """
    reports = reports.resolve()
    reports.mkdir(parents=True, exist_ok=True)
    with _lock(reports / ".gx.lock"):
        results, pages = _run_checkpoint(checks, stage, f"{attempt}-{stage}", reports)
    outcomes = [_outcome(check, item, page)
                for check, result, page in zip(checks, results, pages, strict=True) for item in result.results]  # fmt: skip
    worst = max((severity for result in results if (severity := result.get_max_severity_failure())), default=None)
    report = Report(
        outcomes=tuple(outcomes),
        gx_success=all(result.success for result in results),
        max_severity_failure=worst.value if worst else None,
        path=reports / "validations" / f"{attempt}-{stage}.json",
    )
    _write_report(report, checks, stage, attempt, about)
    return report


def _run_checkpoint(checks: Sequence[Check], stage: str, run_name: str, reports: Path) -> tuple[list[Any], list[str]]:
    """Return the validation result and the Data Docs page of each check, in order."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read at import
    import great_expectations as gx
    from great_expectations.checkpoint import UpdateDataDocsAction
    from great_expectations.core.run_identifier import RunIdentifier

    context = _context(reports)
    source = context.data_sources.add_or_update_pandas("partitions")
    results, pages = [], []
    for check in checks:
        asset = source.add_dataframe_asset(check.suite)
        suite = context.suites.add_or_update(build_suite(check.suite, THRESHOLDS))
        definition = context.validation_definitions.add_or_update(
            gx.ValidationDefinition(name=check.suite, data=asset.add_batch_definition_whole_dataframe("frame"), suite=suite))
        checkpoint = context.checkpoints.add_or_update(
            gx.Checkpoint(name=check.suite, validation_definitions=[definition], result_format="BASIC",
                          actions=[UpdateDataDocsAction(name="data_docs", site_names=[SITE])]))  # fmt: skip
        run = checkpoint.run(batch_parameters={"dataframe": check.frame}, run_id=RunIdentifier(run_name=run_name))
        [(identifier, result)] = run.run_results.items()
        [site] = context.get_docs_sites_urls(resource_identifier=identifier, site_name=SITE)
        results.append(result)
        pages.append(site["site_url"].removeprefix("file://"))
    return results, pages


def _context(reports: Path) -> Any:
    """Return the file context below the reports, its site and its silence set by code."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    project = reports / "gx"
    project.mkdir(exist_ok=True)
    context = gx.get_context(mode="file", project_root_dir=str(project))
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(reports / "data_docs")}
    context.variables.data_docs_sites = {
        SITE: {"class_name": "SiteBuilder", "store_backend": store, "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"}}
    }
    context.variables.save()
    return context


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time change the context: partitions of a backfill are audited side by side."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _outcome(check: Check, item: Any, page: str) -> Outcome:
    config, found = item.expectation_config, item.result
    kwargs = {name: value for name, value in config.kwargs.items() if name not in ("batch_id", "column", "column_list")}
    column = config.kwargs.get("column") or ",".join(config.kwargs.get("column_list", []))
    if check.per_day:
        observed: Any = _by_day(check.frame, column, None if item.success else found.get("partial_unexpected_list"))
    else:
        observed = found.get("observed_value", (found.get("partial_unexpected_list") or [])[:MAX_OBSERVED])
    if item.exception_info and (raised := _exception(item.exception_info)):
        observed = raised
    return Outcome(
        suite=check.suite, expectation=config.type, column=column, severity=str(config.severity.value), success=bool(item.success),
        threshold=kwargs, observed=observed, notes=str(config.notes or ""), remedy=str((config.meta or {}).get("remedy", "")),
        page=page)  # fmt: skip


def _by_day(frame: pd.DataFrame, column: str, only: list[Any] | None) -> dict[str, float | None]:
    """Return day -> value, all days or those whose value is among `only`; None is not known."""
    values = dict(zip(frame["dt"], map(_known, frame[column]), strict=True))
    if only is not None:
        wanted = {_known(value) for value in only}
        values = {dt: value for dt, value in values.items() if value in wanted}
    shown = dict(list(values.items())[:MAX_OBSERVED])
    return {**shown, "further days": len(values) - len(shown)} if len(shown) < len(values) else shown


def _known(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _exception(info: dict[str, Any]) -> str | None:
    """Return what an expectation raised: its info is one record, or a record a metric."""
    for record in [info, *(value for value in info.values() if isinstance(value, dict))]:
        if record.get("raised_exception"):
            return f"raised {record.get('exception_message')}"
    return None


def _write_report(report: Report, checks: Sequence[Check], stage: str, attempt: str, about: dict[str, Any]) -> None:
    failed = {severity: len(report.failed(severity)) for severity in (CRITICAL, WARNING, "info")}
    text = json.dumps(
        {
            **about,
            "stage": stage,
            "attempt": attempt,
            "summary": {
                "outcome": "failed" if failed[CRITICAL] else "warned" if failed[WARNING] else "passed",
                "max_severity_failure": report.max_severity_failure,
                "gx_success": report.gx_success,
                "evaluated": len(report.outcomes),
                "failed": failed,
            },
            "data_docs": sorted({outcome.page for outcome in report.outcomes}),
            "expectations": [asdict(outcome) for outcome in report.outcomes],
            "stats": {check.suite: json.loads(check.frame.to_json(orient="records")) for check in checks if check.per_day},
        },
        indent=1,
    )
    report.path.parent.mkdir(parents=True, exist_ok=True)
    report.path.write_text(text)

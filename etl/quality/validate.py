"""Runs suites with Great Expectations: a Data Docs page a suite, and one outcome an expectation.

    <reports>/gx/                     the file context, built by code: suites, checkpoints, results
    <reports>/data_docs/index.html    the site: every attempt's validations accumulate here
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.local_files import one_at_a_time
from etl.quality.gx import great_expectations
from etl.quality.kept import Outcome
from etl.quality.suites import UNKNOWN, build_suite, must_be_known
from etl.quality.thresholds import THRESHOLDS

if TYPE_CHECKING:
    from etl.quality.stats import Row

SITE = "partitions"
MAX_OBSERVED = 20  # observed values that are kept of an expectation


@dataclass(frozen=True)
class Check:
    """Rows of metrics to validate against one suite.

    Attributes:
        suite: name of the suite, see `etl.quality.suites.build_suite`.
        rows: one a day, or one a file.
        key: metric that names a row.
        details: metric -> what more to say when an expectation on it fails.
    """

    suite: str
    rows: Sequence[Row]
    key: str = "dt"
    details: Mapping[str, str] = field(default_factory=dict)


def validate(checks: Sequence[Check], run_name: str, reports: Path | None) -> list[Outcome]:
    """Validate rows of metrics; gate on the severities of what failed.

    Args:
        run_name: names the run on its pages.
        reports: folder of reports, for Data Docs; a second process waits while this one writes below it. None: no pages.
    """
    great_expectations()
    if reports is not None:
        reports = reports.resolve()
    checks = [_with_unknown(check) for check in checks]
    with one_at_a_time(reports / ".gx.lock") if reports is not None else nullcontext():
        results, pages = _run(checks, run_name, reports)
    return [_outcome(check, item, page) for check, result, page in zip(checks, results, pages, strict=True) for item in result.results]


def _with_unknown(check: Check) -> Check:
    """Count in each row the metrics that must be known and are not."""
    names = must_be_known(build_suite(check.suite, THRESHOLDS))
    unknown = [[name for name in names if _known(row[name]) is None] for row in check.rows]
    rows = [{**row, UNKNOWN: len(missing)} for row, missing in zip(check.rows, unknown, strict=True)]
    told = {UNKNOWN: f"not known: {', '.join(sorted({name for missing in unknown for name in missing}))}"}
    return replace(check, rows=rows, details={**check.details, **told})


def _run(checks: Sequence[Check], run_name: str, reports: Path | None) -> tuple[list[Any], list[str | None]]:
    """Return the validation result and the Data Docs page of each check, in order."""
    import great_expectations as gx
    import pandas as pd
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.resource_identifiers import ExpectationSuiteIdentifier

    context = _context(reports)
    source = context.data_sources.add_or_update_pandas("partitions")
    results, identifiers = [], []
    for check in checks:
        asset = source.add_dataframe_asset(check.suite)
        suite = build_suite(check.suite, THRESHOLDS)
        definition = gx.ValidationDefinition(name=check.suite, data=asset.add_batch_definition_whole_dataframe("frame"), suite=suite)
        # Adds or updates the suite and the definition, too: done one by one, each would go through the suite again.
        checkpoint = context.checkpoints.add_or_update(gx.Checkpoint(name=check.suite, validation_definitions=[definition], result_format="BASIC"))
        frame = pd.DataFrame(check.rows)
        run = checkpoint.run(batch_parameters={"dataframe": frame}, run_id=RunIdentifier(run_name=run_name))
        [(identifier, result)] = run.run_results.items()
        results.append(result)
        identifiers.append(identifier)
    if reports is None:
        return results, [None] * len(results)
    # Once for all suites: building writes the index anew each time.
    context.build_data_docs(site_names=[SITE], resource_identifiers=[*identifiers, *(ExpectationSuiteIdentifier(check.suite) for check in checks)])
    sites = [context.get_docs_sites_urls(resource_identifier=identifier, site_name=SITE) for identifier in identifiers]
    return results, [site["site_url"].removeprefix("file://") for [site] in sites]


def _context(reports: Path | None) -> Any:
    """Return the file context below the reports, its site and its silence set by code; one in memory without reports."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    if reports is None:
        context: Any = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        return context
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


def _outcome(check: Check, item: Any, page: str | None) -> Outcome:
    config, found = item.expectation_config, item.result
    expected = {name: value for name, value in config.kwargs.items() if name not in ("batch_id", "column")}
    column, success = config.kwargs["column"], bool(item.success)
    observed: Any = _by_row(check, column, None if success else found.get("partial_unexpected_list"))
    if item.exception_info and (raised := _exception(item.exception_info)):
        observed = raised
    notes, meta = str(config.notes or ""), config.meta or {}
    detail = check.details.get(column)
    message = f"{column} is {_shown(observed)}, expected {meta.get('bounds', expected)}: {notes}"
    return Outcome(
        suite=check.suite, expectation=config.type, column=column, severity=str(config.severity.value), success=success, observed=observed,
        expected=expected, remedy=str(meta.get("remedy", "")), message=message if success or not detail else f"{message.rstrip('.')}; {detail}",
        data_docs=page)  # fmt: skip


def _by_row(check: Check, column: str, only: Sequence[Any] | None) -> dict[str, float | None]:
    """Return day (or file) -> value, all or those whose value is among `only`; None is not known."""
    values = {str(row[check.key]): _known(row[column]) for row in check.rows}
    if only is not None:
        wanted = {_known(value) for value in only}
        values = {key: value for key, value in values.items() if value in wanted}
    shown = dict(list(values.items())[:MAX_OBSERVED])
    return {**shown, "further": len(values) - len(shown)} if len(shown) < len(values) else shown


def _known(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _shown(observed: Any) -> str:
    if not isinstance(observed, dict):
        return str(observed)
    return ", ".join(f"{'not known' if value is None else f'{value:.6g}'} ({key})" for key, value in observed.items())


def _exception(info: dict[str, Any]) -> str | None:
    """Return what an expectation raised: its info is one record, or a record a metric."""
    for record in [info, *(value for value in info.values() if isinstance(value, dict))]:
        if record.get("raised_exception"):
            return f"raised {record.get('exception_message')}"
    return None

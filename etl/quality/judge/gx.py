"""The one file that knows Great Expectations: runs suites with it, a Data Docs page a suite, one outcome an
expectation.

    <reports>/gx/                     the file context, built by code: suites, checkpoints, results
    <reports>/data_docs/              the site: removed when they are old (`etl.quality.report.prune`)

Importing it takes seconds: that is done once, without its telemetry, at the same time as whatever else there is to do.
It is imported as it is. It tries for databases and clouds that the gates do not need, a second of processor time;
keeping those from it by hiding modules would keep them from every other thread, too, and one that starts Spark
meanwhile fails. PySpark's packages import one another in circles, which two threads cannot do at once: whoever uses
Spark and a gate in one process imports pyspark.sql before the gate's thread begins (`etl.quality.judge.in_job` waits
for Spark's gateway).
"""

from __future__ import annotations

import importlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from etl.datasets.quality_rules import Expectation
from etl.metrics.thresholds import Thresholds
from etl.quality.judge.data_docs import gx_lock, write_home
from etl.quality.judge.outcomes import Outcome
from etl.quality.judge.suites import UNKNOWN, Expected, expected, must_be_known
from etl.quality.measure.measured import EVERY_ROW, Check
from etl.quality.measure.own_rules import AT_FAULT, OwnCheck
from etl.stage.errors import StageError
from etl.stage.local_files import one_at_a_time

if TYPE_CHECKING:
    from great_expectations.core import ExpectationSuite

SITE = "partitions"
MAX_OBSERVED = 20  # observed values that an outcome holds of an expectation


def great_expectations() -> ModuleType:
    """Return the module; other threads may ask for it, and import what they like, meanwhile."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read at import
    return importlib.import_module("great_expectations")


def import_early() -> None:
    """Begin the import; whatever else there is to do goes on."""
    threading.Thread(target=great_expectations, daemon=True).start()


def validate(
    checks: Sequence[Check | OwnCheck], run_name: str, reports: Path | None, thresholds: Thresholds
) -> list[Outcome]:
    """Validate rows of metrics, and of tables; gate on the severities of what failed.

    Args:
        run_name: names the run on its pages.
        reports: folder of reports, for Data Docs; a second process waits while this one writes below it. None: no
            pages.
        thresholds: of the data set.
    """
    great_expectations()
    if reports is not None:
        reports = reports.resolve()
    checks = [_with_unknown(check) if isinstance(check, Check) else check for check in checks]
    with one_at_a_time(gx_lock(reports)) if reports is not None else nullcontext():
        results, pages = _run(checks, run_name, reports, thresholds)
    outcomes = []
    for check, result, page in zip(checks, results, pages, strict=True):
        for item in result.results:
            outcomes.append(
                _outcome(check, item, page) if isinstance(check, Check) else _own_outcome(check, item, page)
            )
    return outcomes


def build_suite(check: Check | OwnCheck, thresholds: Thresholds) -> ExpectationSuite:
    """Return the suite of a check as Great Expectations knows it."""
    gx = great_expectations()
    if isinstance(check, OwnCheck):
        return gx.ExpectationSuite(name=check.suite, expectations=[built(own) for own in check.expectations])
    found = [_between(one) for one in expected(check.suite, thresholds, check.conditions)]
    return gx.ExpectationSuite(name=check.suite, expectations=found)


def _between(one: Expected) -> Any:
    import great_expectations.expectations as gxe
    from great_expectations.expectations.metadata_types import FailureSeverity

    notes = as_words(one.so_that)
    low, high = (None if bound is None else bound + 0 for bound in (one.low, one.high))  # plain numbers: JSON
    meta = {"remedy": one.remedy, "bounds": one.bounds, "must_be_known": one.known, "contract": one.contract}
    return gxe.ExpectColumnValuesToBeBetween(
        description=f"{one.severity}: {one.metric} is {one.bounds}. {notes}",
        column=one.metric,
        min_value=low,
        max_value=high,
        strict_min=one.strict,
        strict_max=one.strict,
        severity=FailureSeverity(one.severity),
        notes=notes,
        meta=meta,
    )


def built(own: Expectation) -> Any:
    """Return the expectation as Great Expectations knows it.

    Raises:
        StageError: its arguments are not its.
    """
    # whole: another thread may be at it, and a part of a package must not be imported from the middle
    great_expectations()
    import great_expectations.expectations as gxe
    from great_expectations.expectations.metadata_types import FailureSeverity

    try:
        return getattr(gxe, own.expectation)(
            **own.arguments,
            severity=FailureSeverity(own.severity),
            notes=own.reason,
            meta={"remedy": own.remedy, "own": own.name},
            description=f"{own.severity}: {own.name} of the definition. {own.reason}",
        )
    except Exception as error:
        raise StageError(
            f"quality.expectations ({own.name}): {own.expectation} does not take these arguments:"
            f" {' '.join(str(error).split())[:500]}",
            AT_FAULT.format(kind="expectations"),
        ) from error


def as_words(text: str) -> str:
    """Return a text that Data Docs pages do not read as tags."""
    return text.replace("<", "\u2039").replace(">", "\u203a")


def _with_unknown(check: Check) -> Check:
    """Count in each row the metrics that must be known and are not."""
    names = must_be_known(check.suite, check.conditions)
    unknown = [[name for name in names if _known(row[name]) is None] for row in check.rows]
    rows = [{**row, UNKNOWN: len(missing)} for row, missing in zip(check.rows, unknown, strict=True)]
    said = {
        str(row[check.key]): f"not known: {', '.join(missing)}"
        for row, missing in zip(rows, unknown, strict=True)
        if missing
    }
    return replace(check, rows=rows, details={**check.details, UNKNOWN: said})


def _frame(check: Check | OwnCheck) -> Any:
    import pandas as pd

    return pd.DataFrame(check.rows) if isinstance(check, Check) else check.sample.frame


def _run(
    checks: Sequence[Check | OwnCheck], run_name: str, reports: Path | None, thresholds: Thresholds
) -> tuple[list[Any], list[str | None]]:
    """Return the validation result and the Data Docs page of each check, in order."""
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.resource_identifiers import ExpectationSuiteIdentifier

    context = _context(reports)
    source = context.data_sources.add_or_update_pandas("partitions")
    results, identifiers = [], []
    batches: dict[str, Any] = {}
    for check in checks:
        if check.suite not in batches:  # own expectations have a check a day
            batches[check.suite] = source.add_dataframe_asset(check.suite).add_batch_definition_whole_dataframe("frame")
        batch = batches[check.suite]
        definition = gx.ValidationDefinition(name=check.suite, data=batch, suite=build_suite(check, thresholds))
        # Adds or updates the suite and the definition, too: done one by one, each would go through the suite again.
        checkpoint = context.checkpoints.add_or_update(
            gx.Checkpoint(name=check.suite, validation_definitions=[definition], result_format="BASIC")
        )
        run = checkpoint.run(batch_parameters={"dataframe": _frame(check)}, run_id=RunIdentifier(run_name=run_name))
        [(identifier, result)] = run.run_results.items()
        results.append(result)
        identifiers.append(identifier)
    if reports is None:
        return results, [None] * len(results)
    # Without its index: that reads every validation there is, each time.
    context.build_data_docs(
        site_names=[SITE],
        build_index=False,
        resource_identifiers=[*identifiers, *(ExpectationSuiteIdentifier(suite) for suite in batches)],
    )
    write_home(reports)
    sites = [context.get_docs_sites_urls(resource_identifier=identifier, site_name=SITE) for identifier in identifiers]
    return results, [site["site_url"].removeprefix("file://") for [site] in sites]


def _context(reports: Path | None) -> Any:
    """Return the file context below the reports, its site and its silence set by code; one in memory without
    reports."""
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
        SITE: {
            "class_name": "SiteBuilder",
            "store_backend": store,
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        }
    }
    context.variables.save()
    return context


def _outcome(check: Check, item: Any, page: str | None) -> Outcome:
    config = item.expectation_config
    expected = {name: value for name, value in config.kwargs.items() if name not in ("batch_id", "column")}
    column, success = config.kwargs["column"], bool(item.success)
    rows = check.rows if success else [row for row in check.rows if _fails(row[column], config.kwargs)] or check.rows
    values = {str(row[check.key]): _known(row[column]) for row in rows}
    observed: Any = dict(list(values.items())[:MAX_OBSERVED])
    more = check.details.get(column, {})
    details = [] if success else [text for key in (EVERY_ROW, *observed) if (text := more.get(key))]
    if len(observed) < len(values):
        observed["further"] = len(values) - len(observed)
    if raised := _exception(item.exception_info):
        observed = raised
    notes, meta = str(config.notes or ""), config.meta or {}
    message = f"{column} is {_shown(observed)}, expected {meta.get('bounds', expected)}: {notes}"
    return Outcome(
        suite=check.suite,
        expectation=config.type,
        column=column,
        severity=str(config.severity.value),
        success=success,
        observed=observed,
        expected=expected,
        remedy=str(meta.get("remedy", "")),
        message=f"{message.rstrip('.')}; {'; '.join(details)}" if details else message,
        data_docs=page,
        rows=() if success else tuple(values),
        passable=not meta.get("contract"),
    )


def _own_outcome(check: OwnCheck, item: Any, page: str | None) -> Outcome:
    config, found, sample = item.expectation_config, item.result, check.sample
    [own] = [own for own in check.expectations if own.name == config.meta["own"]]
    observed: Any = found.get("observed_value")
    if observed is None and "unexpected_count" in found:
        observed = f"{found['unexpected_count']:,} of {found.get('element_count', len(sample.frame)):,} rows"
        if some := found.get("partial_unexpected_list"):
            observed += f", such as {', '.join(str(value) for value in some[:3])}"
    observed = _exception(item.exception_info) or _plain(observed)
    arguments = _plain(own.arguments)
    said = as_words(own.reason).rstrip(".")
    message = (
        f"{own.name}: {own.expectation} {json.dumps(arguments, ensure_ascii=False)} of {sample.table} found {observed}"
        f" ({sample.dt}): {said}{sample.said}"
    )
    return Outcome(
        check.suite,
        config.type,
        own.name,
        own.severity,
        bool(item.success),
        {sample.dt: observed},
        arguments,
        own.remedy,
        message,
        page,
    )


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    return json.loads(json.dumps(value, default=str))


def _fails(value: Any, bounds: Mapping[str, Any]) -> bool:
    """Whether a value is out of bounds; an unknown one is not."""
    number = _known(value)
    if number is None:
        return False
    low, high = bounds.get("min_value"), bounds.get("max_value")
    below = low is not None and (number <= low if bounds.get("strict_min") else number < low)
    return below or (high is not None and (number >= high if bounds.get("strict_max") else number > high))


def _known(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _shown(observed: Any) -> str:
    if not isinstance(observed, dict):
        return str(observed)
    return ", ".join(f"{'not known' if value is None else f'{value:.6g}'} ({key})" for key, value in observed.items())


def _exception(info: dict[str, Any] | None) -> str | None:
    """Return what an expectation raised: its info is one record, or a record a metric."""
    if not info:
        return None
    for record in [info, *(value for value in info.values() if isinstance(value, dict))]:
        if record.get("raised_exception"):
            return f"raised {record.get('exception_message')}"
    return None

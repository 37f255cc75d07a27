"""Data Docs and reports that are old go: validations and pages together, and no report links to what is gone.

What the gates found stays below the warehouse (`etl.quality.judge.outcomes`): these are pages that show it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from etl.metrics.registry import GATES
from etl.quality.judge.data_docs import folders, gx_lock, index_lock
from etl.quality.report.write import write_index
from etl.stage.local_files import one_at_a_time, replace_text
from etl.warehouse.retention import Removed

_LINK = re.compile(r'<a href="[^"]*/data_docs/validations/[^"]*">([^<]*)</a>')


def prune_docs(reports: Path, dataset: str, before_ms: int, dry_run: bool) -> list[Removed]:
    """Delete the validations and pages of attempts of a data set, and of none, of which none was written since
    `before_ms`.
    """
    runs: dict[str, list[Path]] = {}
    removed = []
    with one_at_a_time(gx_lock(reports)), one_at_a_time(index_lock(reports)):
        for folder in folders(reports):
            for run in folder.glob("*/*/"):
                runs.setdefault(_attempt(run.name), []).append(run)
        owners = {page.stem: page.parts[-3] for page in reports.glob("partitions/*/dt=*/*.html")}
        for attempt, found in sorted(runs.items()):
            files = [path for run in found for path in run.rglob("*") if path.is_file()]
            if owners.get(attempt, dataset) != dataset or _newest_ms(files) >= before_ms:
                continue
            removed.append(Removed("data docs", attempt, len(files), _bytes(files)))
            if not dry_run:
                _unlink_reports(reports, attempt)
                for run in found:
                    shutil.rmtree(run)
    return removed


def prune_reports(reports: Path, dataset: str, before_ms: int, dry_run: bool) -> list[Removed]:
    """Delete the reports of a data set that were not written since `before_ms`, and write the index anew."""
    removed = []
    with one_at_a_time(index_lock(reports)):
        for page in sorted((reports / "partitions" / dataset).glob("dt=*/*.html")):
            files = [path for path in (page, page.with_suffix(".json")) if path.exists()]
            if _newest_ms(files) >= before_ms:
                continue
            removed.append(Removed("reports", page.stem, len(files), _bytes(files)))
            if not dry_run:
                for path in reversed(files):  # the index is made from the second
                    path.unlink()
                with contextlib.suppress(OSError):  # another attempt's is in it
                    page.parent.rmdir()
        if removed and not dry_run:
            write_index(reports)
    return removed


def _newest_ms(files: Iterable[Path]) -> int:
    return max((path.stat().st_mtime_ns // 1_000_000 for path in files), default=0)


def _bytes(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _attempt(run_name: str) -> str:
    return next((run_name.removesuffix(f"-{stage}") for stage in GATES if run_name.endswith(f"-{stage}")), run_name)


def _unlink_reports(reports: Path, attempt: str) -> None:
    for page in reports.glob(f"partitions/*/dt=*/{attempt}.html"):
        _rewrite(page, lambda text: _LINK.sub(r"\1 (no longer kept)", text))
        if (short := page.with_suffix(".json")).exists():
            _rewrite(
                short, lambda text: json.dumps({**json.loads(text), "data_docs": {}}, indent=1, ensure_ascii=False)
            )


def _rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Change a file; its age stays that of what it holds."""
    times = path.stat()
    replace_text(path, change(path.read_text(encoding="utf-8")))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

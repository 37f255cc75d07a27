"""Data Docs are kept of the newest attempts; the rest goes, validations and pages together, and no report links to what is gone.

    <reports>/gx/gx/uncommitted/validations/<suite>/<attempt>-<stage>/<time>/<batch>.json
    <reports>/data_docs/validations/<suite>/<attempt>-<stage>/<time>/<batch>.html

What the gates found is kept for good below the warehouse (`etl.quality.kept`): these are pages that show it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from etl.stage.local_files import replace_text

ATTEMPTS_KEPT = 60  # of all data sets that share a folder of reports

_HOME = '<!doctype html>\n<meta charset="utf-8"><meta http-equiv="refresh" content="0; url=../index.html"><a href="../index.html">all partitions</a>\n'
_LINK = re.compile(r'<a href="[^"]*/data_docs/validations/[^"]*">([^<]*)</a>')


def folders(reports: Path) -> tuple[Path, Path]:
    """Return the folders of validations and of their pages."""
    return reports / "gx" / "gx" / "uncommitted" / "validations", reports / "data_docs" / "validations"


def write_home(reports: Path) -> None:
    """Let the pages' link to their home lead to the index of partitions: Great Expectations' own reads every validation to be built."""
    home = reports / "data_docs" / "index.html"
    if not home.exists() or home.read_text(encoding="utf-8") != _HOME:
        home.parent.mkdir(parents=True, exist_ok=True)
        replace_text(home, _HOME)


def prune(reports: Path, stages: Iterable[str], keep: int = ATTEMPTS_KEPT) -> list[str]:
    """Delete the validations and pages of all but the newest attempts; return the attempts that are gone.

    The caller holds the lock of the folder.
    """
    newest: dict[str, str] = {}  # attempt -> time of its latest validation
    runs: dict[str, list[Path]] = {}
    for folder in folders(reports):
        for run in folder.glob("*/*/"):
            attempt = _attempt(run.name, stages)
            runs.setdefault(attempt, []).append(run)
            newest[attempt] = max([newest.get(attempt, ""), *(time.name for time in run.iterdir())])
    gone = sorted(newest, key=lambda attempt: newest[attempt], reverse=True)[keep:]
    for attempt in gone:
        _unlink_reports(reports, attempt)
        for run in runs[attempt]:
            shutil.rmtree(run)
    return gone


def _attempt(run_name: str, stages: Iterable[str]) -> str:
    return next((run_name.removesuffix(f"-{stage}") for stage in stages if run_name.endswith(f"-{stage}")), run_name)


def _unlink_reports(reports: Path, attempt: str) -> None:
    for page in reports.glob(f"partitions/*/dt=*/{attempt}.html"):
        replace_text(page, _LINK.sub(r"\1 (no longer kept)", page.read_text(encoding="utf-8")))
        short = page.with_suffix(".json")
        if short.exists():
            replace_text(short, json.dumps({**json.loads(short.read_text(encoding="utf-8")), "data_docs": {}}, indent=1, ensure_ascii=False))

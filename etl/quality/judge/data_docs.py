"""Where Data Docs and reports lie, and the locks of their folders.

    <reports>/gx/gx/uncommitted/validations/<suite>/<attempt>-<stage>/<time>/<batch>.json
    <reports>/data_docs/validations/<suite>/<attempt>-<stage>/<time>/<batch>.html

`etl.quality.report.prune` removes old ones.
"""

from __future__ import annotations

from pathlib import Path

from etl.stage.local_files import replace_text

_HOME = (
    '<!doctype html>\n<meta charset="utf-8"><meta http-equiv="refresh" content="0; url=../index.html"><a'
    ' href="../index.html">all partitions</a>\n'
)


def folders(reports: Path) -> tuple[Path, Path]:
    """Return the folders of validations and of their pages."""
    return reports / "gx" / "gx" / "uncommitted" / "validations", reports / "data_docs" / "validations"


def write_home(reports: Path) -> None:
    """Let the pages' link to their home lead to the index of partitions.

    Great Expectations' own reads every validation to be built.
    """
    home = reports / "data_docs" / "index.html"
    if not home.exists() or home.read_text(encoding="utf-8") != _HOME:
        home.parent.mkdir(parents=True, exist_ok=True)
        replace_text(home, _HOME)


def gx_lock(reports: Path) -> Path:
    """Return the file whose lock whoever changes validations and their pages holds."""
    return reports / ".gx.lock"


def index_lock(reports: Path) -> Path:
    """Return the file whose lock whoever changes reports or their index holds."""
    return reports / ".index.lock"

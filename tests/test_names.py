"""Pages, remarks and messages name files and modules that are there: a move forgets none of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = "etl|training|evaluation|infra|dags|benchmarks|tests"
PATH = re.compile(rf"(?<![\w./-])((?:{ROOMS}|docs)/[\w./*-]*(?:\.(?:py|sh|md|yaml)\b|/(?=[`),;: ])))")
MODULE = re.compile(rf"(?<![\w./-])((?:{ROOMS})\.[a-z][a-z0-9_]*\b(?:\.[A-Za-z_]\w*)*)\b(?![/(\"'-]|\.\w)")
DATED = ("benchmarks/LOG.md", "CHANGELOG.md")  # what was called so then
NOT_THERE = {  # CONTRIBUTING walks through these
    "etl/quality/longest.py",
    "etl.quality.longest",
    "training/configs/linear.py",
    "training.configs.linear",
}
FILE_NAMES = ("json", "py", "md", "png", "jsonl")  # `training.json` is a file of a run, no module


def texts() -> dict[str, str]:
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.sh", "Makefile", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listed.stdout.split() if name not in DATED and (ROOT / name).is_file()]
    return {name: (ROOT / name).read_text() for name in names}


def is_module(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name that is written in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        source = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
        if end == len(parts) and (source.is_file() or place.is_dir()):
            return True
        if source.is_file():
            return bool(re.search(rf"\b{re.escape(parts[end])}\b", source.read_text()))
    return False


def test_every_path_that_is_named_is_there() -> None:
    named = {(path, file) for file, text in texts().items() for path in PATH.findall(text)}
    assert len(named) > 60, "the pages are not read rightly"
    assert sorted(one for one in named if one[0] not in NOT_THERE and not list(ROOT.glob(one[0].rstrip("/")))) == []


def test_every_module_that_is_named_is_there() -> None:
    named = {
        (module, file)
        for file, text in texts().items()
        for module in MODULE.findall(text)
        if module.rsplit(".", 1)[1] not in FILE_NAMES
    }
    assert len(named) > 200, "the code is not read rightly"
    assert sorted(one for one in named if one[0] not in NOT_THERE and not is_module(one[0])) == []

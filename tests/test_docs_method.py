"""docs/method.md and what cites it: every section that is cited is there, and so is every test that the page names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/method.md").read_text()
ROOMS = ("training", "evaluation", "etl", "benchmarks", "dags", "infra", "tests")
SOURCES = [
    *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")),
    ROOT / "README.md",
    *(ROOT / "docs").glob("*.md"),
]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading of plain words."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_section_that_is_cited_is_a_heading() -> None:
    sections = {slug(heading) for heading in re.findall(r"^#+ (.+)$", PAGE, re.M)}
    cited = {
        (section, path.relative_to(ROOT).as_posix())
        for path in SOURCES
        for section in re.findall(r"method\.md#([\w-]+)", path.read_text())
    }
    cited |= {(section, "docs/method.md") for section in re.findall(r"\]\(#([\w-]+)\)", PAGE)}
    parts = {
        f"training/model/{name}.py"
        for name in ("attention", "cache", "factored", "kernel", "probe", "quantizer", "ranker", "refined")
    }
    assert parts <= {path for _, path in cited}, "a part of the method no longer says where it is explained"
    assert sorted((section, path) for section, path in cited if section not in sections) == []


def test_every_test_that_the_page_names_is_there() -> None:
    named = sorted(set(re.findall(r"`([\w/]*test_\w+\.py)::(\w+)`", PAGE)))
    assert len(named) > 40, "the page is not read rightly"
    files = {file: ROOT / (file if "/" in file else f"tests/training/{file}") for file, _ in named}
    tests = {
        (file, node.name)
        for file, path in files.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert [one for one in named if one not in tests] == []


def test_nothing_is_cited_that_a_reader_cannot_open() -> None:
    """The code once cited sections, by number, of a text that is not in the repository."""
    assert [path.name for path in SOURCES if re.search(r"\(vql[ :]", path.read_text())] == []

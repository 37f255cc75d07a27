"""A function is at most 60 lines, and has at most seven parameters: what is longer has parts that want names. Tests
are functions.

Constructors of records take what the record holds. Kernels take their tensors one by one: of these nothing is counted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_arrows import ROOT, SOURCES

MOST_LINES, MOST_PARAMETERS = 60, 7


def functions(source: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the functions of a source with their names within it, those in classes and in functions, too."""

    def below(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            inner = f"{name}.{child.name}" if named else name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield inner.lstrip("."), child
            yield from below(child, inner)

    yield from below(ast.parse(source), "")


def too_large(source: str) -> dict[str, str]:
    """Return the functions of a source that are longer or take more than they may, and by how much."""
    found = {}
    for name, function in functions(source):
        given = function.args
        names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)
        if kernel:
            continue
        lines = (function.end_lineno or 0) - function.lineno + 1
        parameters = len([name for name in names if name not in ("self", "cls", "ctx")])
        if lines > MOST_LINES:
            found[name] = f"{lines} lines"
        elif parameters > MOST_PARAMETERS and function.name != "__init__":
            found[name] = f"{parameters} parameters"
    return found


def test_every_function_is_short_and_takes_little() -> None:
    paths = [*SOURCES.values(), *sorted((ROOT / "tests").rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): too_large(path.read_text()) for path in paths}
    assert {path: large for path, large in found.items() if large} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f():\n" + "    pass\n" * 60, "f"),
        ("class A:\n    async def f(self):\n" + "        pass\n" * 60, "A.f"),
        ("def f():\n    def g(a, b, c, d, /, e, f, *, g, h): pass", "f.g"),
        ("def f(a, b, c, d, e, f, g): pass", None),
        ("class A:\n    def __init__(self, a, b, c, d, e, f, g, h): pass", None),
        ("def f():\n" + "    pass\n" * 59, None),
    ],
)
def test_one_that_is_too_large_is_seen(source: str, name: str | None) -> None:
    assert list(too_large(source)) == ([name] if name else [])

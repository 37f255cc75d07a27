"""Reads the YAML of a definition so that no value is another than the one that stands there.

YAML 1.1 turns `yes` into true, `01` and `0x1F` into 1 and 31, `12:30` into 750 and a key that stands twice into its
last value. Here plain values are read as by YAML 1.2: `true`, `false`, `null`, `~` and plain decimal numbers are what
they say, every other one is the text that stands there. Keys are always text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from etl.stage.errors import StageError

_PLAIN_VALUES = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """Plain data only."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        return {_key(key): self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(str(node.value).lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in _PLAIN_VALUES:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a file.

    Raises:
        StageError: it cannot be read, is no YAML, or holds a key twice, which is named with the keys around it.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StageError(
            f"the data set definition {path} cannot be read: {reason}",
            "give the path of an existing YAML file, in UTF-8",
        ) from None
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise StageError(
                f"the data set definition {path} is not a mapping of fields", f"begin with: name: {path.stem}"
            )
        if problems := list(_key_problems(node, "", frozenset())):
            raise StageError(
                f"the data set definition {path} is wrong: {'; '.join(problems)}",
                "correct these fields; docs/datasets.md explains each",
            )
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        raise StageError(
            f"the data set definition {path} is not YAML: {' '.join(str(error).split())}",
            "correct the place that is named",
        ) from None
    except RecursionError:
        raise StageError(f"the data set definition {path} is not YAML: it is nested too deeply", "correct it") from None
    finally:
        if loader is not None:
            loader.dispose()


def with_raw(text: str, raw: str) -> str:
    """Return the text of a right definition that names no folder of raw logs, with `run.raw`.

    All else stays as it stands.
    """
    node = _Loader(text).get_single_node()
    given = f"raw: {json.dumps(raw, ensure_ascii=False)}"
    run = next((value for key, value in node.value if key.value == "run"), None)
    return _with_first(text, run, given) if run is not None else _with_first(text, node, f"run: {{{given}}}")


def _with_first(text: str, mapping: yaml.MappingNode, field: str) -> str:
    """Return the text with one more field, the first of a mapping in it."""
    mark = mapping.start_mark
    if not mapping.flow_style:
        return text[: mark.index] + field + "\n" + " " * mark.column + text[mark.index :]
    return text[: mark.index + 1] + field + (", " if mapping.value else "") + text[mark.index + 1 :]


def _key(node: yaml.Node) -> Any:
    return node.value if isinstance(node, yaml.ScalarNode) else f"a {node.id}"


def _key_problems(node: yaml.Node, where: str, around: frozenset[int]):
    """Yield what is wrong with the keys of a node and of everything in it."""
    if id(node) in around:
        yield f"{where}: an anchor that holds itself"
        return
    inner = around | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for place, value in enumerate(node.value):
            yield from _key_problems(value, f"{where}.{place}", inner)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[Any, int] = {}
        for key, value in node.value:
            name = _key(key)
            field, line = f"{where}.{name}".lstrip("."), key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                yield f"{where or 'the top'}: line {line}: a key must be a name, not {name}"
            elif name == "<<":
                yield f"{field}: line {line}: merge keys are not read; write the fields out, or use extends"
            elif name in lines:
                yield f"{field}: given twice, in lines {lines[name]} and {line}; YAML would keep only the last"
            lines.setdefault(name, line)
            yield from _key_problems(value, field, inner)

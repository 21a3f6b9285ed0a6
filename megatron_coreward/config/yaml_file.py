"""YAML as a person writes it: the core schema of YAML 1.2, no key twice, and errors with line and cause.

PyYAML parses; what plain scalars mean is decided here, because its own rules are those of YAML 1.1, which read `off` as
false, `010` as 8, `1:30` as 90 and 2026-01-01 as a date. By the core schema of YAML 1.2 these are text and the integer
10. A number remembers how it was written, for keys that want text (`config.component`).

Invariants (tests/config/test_yaml_file.py):
  1. A plain scalar is null, true, false, a number or text by the core schema's regular expressions, and nothing else.
  2. A key that stands twice in a mapping is an error that names both lines.
  3. Everything that cannot be read is an `InputError` with the file and, if the parser knows it, line and cause.
"""

import re
import sys
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megatron_coreward.errors import InputError

_TAG = "tag:yaml.org,2002:"
_MERGE = "<<"  # no part of the core schema, and usual in files with anchors
_TAB = "a tab is used for indentation; YAML allows spaces only"
_CAUSES = {  # what the parser says -> what a person has to look for
    "mapping values are not allowed here": "a second ': ' in the line (text that has one needs quotes), or indentation "
    "that does not fit the lines above",
    "could not find expected ':'": "a key without ':', or indentation that does not fit the lines above",
    "expected <block end>": "indentation that does not fit the lines above",
}


class WrittenInt(int):
    """An integer with its source text."""

    text: str


class WrittenFloat(float):
    """A number with its source text."""

    text: str


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's parser with the resolvers of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own name and kind)


class _CoreDumper(yaml.SafeDumper):
    """PyYAML's writer, which also quotes text that is something else by the core schema, such as `0E0`."""


for _name, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
}.items():
    for _class in (_CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Args:
        what: what the file is, for messages, such as "config file".

    Raises:
        InputError: there is no such file, it cannot be read, or it is not a mapping in valid YAML.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except OSError as e:
        raise InputError(f"{what} {path} cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise InputError(
            f"{path}: not UTF-8 text, line {line} (byte 0x{e.object[e.start]:02x}); save it as UTF-8"
        ) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(plain(tree)).__name__
        raise InputError(f"{path}: expected keys and values, found {found}")
    return tree


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document; `where` names it in messages.

    Raises:
        InputError: it is not valid YAML, has a key twice, or has what the core schema does not.
    """
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as e:
        place = e.problem_mark or e.context_mark
        line = f", line {place.line + 1}, column {place.column + 1}" if place else ""
        raise InputError(f"{where}: not valid YAML{line}: {_cause(e)}") from None
    except yaml.YAMLError as e:  # a character that YAML does not allow, by its position
        raise InputError(f"{where}: not valid YAML ({str(e).splitlines()[0]})") from None
    except RecursionError:
        raise InputError(f"{where}: not valid YAML: nested too deeply") from None
    return None if node is None else _build(node, where, ())


def write_yaml(value: Any) -> str:
    """A YAML document that `parse_yaml` and parsers of YAML 1.1 read as the same value; keys keep their order."""
    return yaml.dump(value, Dumper=_CoreDumper, sort_keys=False)


def parse_scalar(text: str) -> Any:
    """What a plain scalar means; ` #` and `: ` are parts of the text, as nothing can follow it."""
    tag = _CoreLoader("").resolve(ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return _scalar(tag, text)


def plain(value: Any) -> Any:
    """The value without its source text."""
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, list):
        return [plain(child) for child in value]
    if isinstance(value, WrittenInt):
        return int(value)
    return float(value) if isinstance(value, WrittenFloat) else value


def as_text(value: Any) -> Any:
    """The value with numbers as the text that was written, inside of lists and mappings too."""
    if isinstance(value, dict):
        return {key: as_text(child) for key, child in value.items()}
    if isinstance(value, list):
        return [as_text(child) for child in value]
    return value.text if isinstance(value, WrittenInt | WrittenFloat) else value


def _cause(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem)
    if "'\\t'" in problem:
        return _TAB
    if error.context and problem.startswith("but "):
        return f"{error.context}, {problem}"
    return next((f"{cause} ({problem})" for start, cause in _CAUSES.items() if problem.startswith(start)), problem)


def _build(node: Node, where: str, inside: tuple[Node, ...]) -> Any:
    if any(node is outer for outer in inside):
        raise InputError(f"{where}, line {_line(node)}: contains itself (an alias to what it is a part of)")
    inside = (*inside, node)
    if isinstance(node, ScalarNode):
        try:
            return _scalar(node.tag, node.value)
        except ValueError as e:
            raise InputError(f"{where}, line {_line(node)}: {e}") from None
    if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
        return [_build(child, where, inside) for child in node.value]
    if isinstance(node, MappingNode) and node.tag == _TAG + "map":
        return _mapping(node, where, inside)
    raise InputError(f"{where}, line {_line(node)}: {node.tag.replace(_TAG, '!!')} is not supported here")


def _mapping(node: MappingNode, where: str, inside: tuple[Node, ...]) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, child in node.value:
        if not isinstance(key, ScalarNode):
            raise InputError(f"{where}, line {_line(key)}: a key is text; found a list or a mapping")
        name = key.value
        if name in lines:
            raise InputError(f"{where}, line {_line(key)}: key {name!r} is there already, in line {lines[name]}")
        lines[name] = _line(key)
        value = _build(child, where, inside)
        if name != _MERGE or key.style is not None:
            own[name] = value
            continue
        for source in reversed(value if isinstance(value, list) else [value]):
            if not isinstance(source, dict):
                raise InputError(f"{where}, line {_line(key)}: {_MERGE} takes a mapping or a list of mappings")
            merged |= source
    return merged | own


def _scalar(tag: str, text: str) -> Any:
    kind = tag.removeprefix(_TAG)
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return _whole(text)
    if kind == "float":
        number = WrittenFloat(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        number.text = text
        return number
    raise ValueError(f"{tag.replace(_TAG, '!!')} is not supported here")


def _whole(text: str) -> WrittenInt | str:
    if len(text) > sys.get_int_max_str_digits() > 0:  # which Python converts to no number
        return text
    number = WrittenInt(int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)))
    number.text = text
    return number


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1

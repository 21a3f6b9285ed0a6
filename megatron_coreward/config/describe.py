"""What a key of the configuration is, for people: type, limits, default and description, read from the schema."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from megatron_coreward.config.names import RENAMED_KEYS, did_you_mean
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.yaml_file import parse_scalar
from megatron_coreward.errors import InputError

_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_KINDS = {
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
    "object": "keys and values",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a recipe."""

    name: str  # with its groups, such as actor.lr
    kind: str  # type and limits, such as "integer ≥ 1"
    default: str  # as a recipe would have it, or "required"
    description: str  # one paragraph
    choices: tuple[str, ...]  # of an enumeration; empty if it is none
    is_union: bool  # of several types beside null


@dataclass(frozen=True, slots=True)
class Group:
    """Keys that belong together; the name is empty for those of the run itself."""

    name: str
    description: str
    keys: tuple[Key, ...]


def groups(model: type[BaseModel] = RunConfig) -> tuple[Group, ...]:
    """Every key of a configuration, the keys of the model itself first, and then those of its groups, at any depth."""
    return tuple(_groups(model, ""))


def all_keys(model: type[BaseModel] = RunConfig) -> dict[str, Key]:
    """The same as one table by name."""
    return {key.name: key for group in groups(model) for key in group.keys}


def _groups(model: type[BaseModel], prefix: str) -> Iterator[Group]:
    properties = model.model_json_schema()["properties"]
    own, inner = [], []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner.append((name, field.annotation))
            continue
        default = field.get_default(call_default_factory=True)
        own.append(
            Key(
                f"{prefix}{name}",
                _kind(properties[name]),
                "required" if default is PydanticUndefined else as_yaml(default),
                " ".join((field.description or "").split()),
                tuple(_choices(properties[name])),
                len([part for part in properties[name].get("anyOf", ()) if part.get("type") != "null"]) > 1,
            )
        )
    yield Group(prefix.rstrip("."), " ".join((model.__doc__ or "").split()), tuple(own))
    for name, group in inner:
        yield from _groups(group, f"{prefix}{name}.")


def as_yaml(value: Any) -> str:
    """A value as an override has it (`config.load`): what `key=` has to be followed by to mean this value."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_in_list(key)}: {_in_list(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_in_list, value))}]"
    text = str(value)
    if isinstance(value, int) or (text and text[0] not in "[{'\"" and isinstance(parse_scalar(text), str)):
        return text
    return json.dumps(text, ensure_ascii=False)


def _in_list(value: Any) -> str:
    text = as_yaml(value)
    if not isinstance(value, str | PurePath) or text.startswith('"') or re.fullmatch(r"[\w.+/@-]+", text):
        return text
    return json.dumps(text, ensure_ascii=False)


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        inner = _kind(schema["items"])
        at_least = f", at least {schema['minItems']}" if schema.get("minItems") else ""
        return f"list of {'paths' if inner == 'path' else inner}{at_least}"
    if schema.get("type") == "string":
        return "path" if schema.get("format") == "path" else "text"
    if "$ref" in schema or "type" not in schema:
        return "a group of keys" if "$ref" in schema else "any value"
    limits = [f"{sign} {as_yaml(schema[limit])}" for limit, sign in _LIMITS.items() if limit in schema]
    return " ".join([_KINDS[schema["type"]], ", ".join(limits)]).strip()


def _choices(schema: dict[str, Any]) -> Iterator[str]:
    for part in schema.get("anyOf", [schema.get("items", schema)]):
        yield from (str(value) for value in part.get("enum", [part["const"]] if "const" in part else []))


def find_keys(words: Sequence[str], model: type[BaseModel] = RunConfig) -> tuple[Group, ...]:
    """The keys that the words find, in their groups; all keys for no words.

    A word finds the key or the group of that name, or else every key in whose name or description a word begins so.

    Raises:
        InputError: a word finds nothing; the message names what is near.
    """
    everything = groups(model)
    wanted: set[str] = set()
    for word in words:
        keys = _found(word.lower(), everything)
        if not keys:
            raise InputError(_nothing_found(word, everything))
        wanted |= keys
    chosen = (
        replace(group, keys=tuple(key for key in group.keys if not words or key.name in wanted)) for group in everything
    )
    return tuple(group for group in chosen if group.keys)


def _found(word: str, everything: Sequence[Group]) -> set[str]:
    keys = [key for group in everything for key in group.keys]
    names = {key.name for key in keys}
    if word in names:
        return {word}
    inside = {name for name in names if name.startswith(f"{word.rstrip('.')}.")}
    begins = re.compile(rf"(?<![a-z0-9]){re.escape(word)}")
    return inside or {key.name for key in keys if begins.search(f"{key.name} {key.description}".lower())}


def _nothing_found(word: str, everything: Sequence[Group]) -> str:
    if word in RENAMED_KEYS:
        return f"key {word!r} is called {RENAMED_KEYS[word]!r} now"
    names = [name for group in everything for name in (group.name, *(key.name for key in group.keys)) if name]
    near = did_you_mean(word, [*names, *(name.rpartition(".")[2] for name in names)])
    return f"no key has {word!r} in its name or description{f'; did you mean {near!r}?' if near else ''}"

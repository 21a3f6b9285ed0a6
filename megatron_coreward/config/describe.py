"""What a key of the configuration is, for people: type, limits, default and description, read from the schema."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.yaml_file import parse_scalar

_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_KINDS = {"integer": "integer", "number": "number", "boolean": "true or false", "null": "null", "object": "keys"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a recipe."""

    name: str  # with its groups, such as actor.lr
    kind: str  # type and limits, such as "integer ≥ 1"
    default: str  # as a recipe would have it, or "required"
    description: str  # one paragraph
    choices: tuple[str, ...]  # of an enumeration; empty where there is none


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
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_in_list, value))}]"
    text = str(value)
    if isinstance(value, int) or (text and text[0] not in "[{'\"" and isinstance(parse_scalar(text), str)):
        return text
    return json.dumps(text, ensure_ascii=False)


def _in_list(value: Any) -> str:
    text = as_yaml(value)
    return text if re.fullmatch(r"[\w.+/@-]+", text) else json.dumps(text, ensure_ascii=False)


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
    limits = [f"{sign} {as_yaml(schema[limit])}" for limit, sign in _LIMITS.items() if limit in schema]
    return " ".join([_KINDS[schema["type"]], ", ".join(limits)]).strip()


def _choices(schema: dict[str, Any]) -> Iterator[str]:
    for part in schema.get("anyOf", [schema.get("items", schema)]):
        yield from (str(value) for value in part.get("enum", [part["const"]] if "const" in part else []))

"""Bad values and unknown keys as messages: where, what was found, what is allowed, and what the key is for."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megatron_coreward.config.describe import Key, all_keys, as_yaml
from megatron_coreward.config.names import did_you_mean

_LONGEST_VALUE = 80  # characters of a value that a message shows


def explain(where: str, model: type[BaseModel], failed: ValidationError, renamed: Mapping[str, str] = {}) -> str:
    """The message for what a configuration gets wrong: every problem with its key, and a line on that key.

    Args:
        where: the file, for the start of each problem.
        model: what the file was read as.
        renamed: old names of keys -> new ones.
    """
    keys = all_keys(model)
    messages: list[str] = []
    for error in failed.errors():
        name = ".".join(map(str, error["loc"]))
        key = _key_of(error["loc"], keys)
        if error["type"] == "extra_forbidden":
            problem = _unknown(name, keys, model, renamed)
        elif error["type"] == "missing":
            problem = f"key {name!r} is missing"
        elif key is None:
            problem = _wrong_group(name, error)
        else:
            problem = _wrong_value(name, key, error)
        messages.append(f"{where}: {problem}{_about(key)}")
    return "\n".join(dict.fromkeys(messages))  # the branches of a union say the same


def _key_of(location: Sequence[Any], keys: Mapping[str, Key]) -> Key | None:
    """The key that a location is in: pydantic adds places in lists and branches of unions to it."""
    names = (".".join(map(str, location[:length])) for length in range(len(location), 0, -1))
    return next((keys[name] for name in names if name in keys), None)


def _unknown(name: str, keys: Mapping[str, Key], model: type[BaseModel], renamed: Mapping[str, str]) -> str:
    if name in renamed:
        return f"key {name!r} is called {renamed[name]!r} now"
    group, _, last = name.rpartition(".")
    beside = _names_in(group, model)
    close = did_you_mean(last, beside)
    if close is not None:
        return f"unknown key {name!r}; did you mean {f'{group}.{close}'.lstrip('.')!r}?"
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(list(keys))}
    close = did_you_mean(last, elsewhere)
    if close is not None:
        return f"unknown key {name!r}; did you mean {elsewhere[close]!r}?"
    return f"unknown key {name!r}; allowed: {', '.join(beside)}"


def _names_in(group: str, model: Any) -> list[str]:
    """The names of a group's keys and groups, of the innermost group of the path that there is."""
    for part in group.split(".") if group else ():
        kind = model.model_fields[part].annotation if part in model.model_fields else None
        inner = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return list(model.model_fields)


def _about(key: Key | None) -> str:
    if key is None or not key.description:
        return ""
    kind = "" if key.choices else f" ({key.kind})"  # the problem names them
    return f"\n    {key.name}{kind}: {key.description}"


def _wrong_group(name: str, error: Any) -> str:
    if error["type"] == "model_type":
        return f"{name}: expected a group of keys, found {_found(error['input'])}"
    return f"{name}: {_message(error)}"


def _wrong_value(name: str, key: Key, error: Any) -> str:
    value = error["input"]
    if key.is_union and name != key.name:  # one of its branches: what all of them allow
        name, message = key.name, f"expected {key.kind}"
    else:
        message = _message(error)
    close = did_you_mean(value, key.choices) if isinstance(value, str) else None
    suggestion = "" if close is None else f"; did you mean {close!r}?"
    return f"{name}: {message}, found {_found(value)}{suggestion}"


def _message(error: Any) -> str:
    text = str(error["msg"]).removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _found(value: Any) -> str:
    text = as_yaml(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."

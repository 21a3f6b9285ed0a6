"""Methods of one's own: found by import path or by the name of an entry point, and checked when they are loaded.

A plugin is an instance, or a class that is made without arguments, with the attributes of `rewards.methods.base.Method`
and one more, `label_free`: whether it promises never to read the data set's answers. docs/methods.md has an example.
Loading one runs its module's code.
"""

import functools
import importlib
import importlib.metadata
import inspect
import re
from typing import Any

from megatron_coreward.config.names import did_you_mean
from megatron_coreward.config.needs import Needs
from megatron_coreward.errors import InputError

GROUP = "megatron_coreward.methods"  # of entry points
IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
EXAMPLE = "my_package.my_module:MyMethod"


def entry_points() -> dict[str, str]:
    """Name -> import path of the methods that installed packages offer."""
    return {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}


@functools.cache
def load(name: str) -> Any:
    """The method behind an import path or the name of an entry point; the same object every time.

    Raises:
        InputError: it cannot be imported, or it is no method; the message says what is missing.
    """
    path = name if IMPORT_PATH.fullmatch(name) else entry_points()[name]
    found = _import(name, path)
    if inspect.isclass(found):
        try:
            found = found()
        except Exception as error:
            raise InputError(f"method: {name}: cannot be made without arguments: {error}") from error
    for problem in _problems(found):
        raise InputError(f"method: {name}: {problem}")
    return found


def _import(name: str, path: str) -> Any:
    where, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{where}.".startswith(f"{error.name}."):
            raise InputError(
                f"method: {name}: there is no module {error.name}; it must be installed, or its folder on PYTHONPATH"
            ) from error
        raise InputError(f"method: {name}: importing {where} failed: {error}") from error
    except Exception as error:
        raise InputError(f"method: {name}: importing {where} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        near = did_you_mean(attribute, [known for known in vars(module) if not known.startswith("_")])
        raise InputError(
            f"method: {name}: module {where} has no {attribute!r}{f'; did you mean {near!r}?' if near else ''}"
        )
    return getattr(module, attribute)


def _problems(method: Any) -> list[str]:
    """What keeps an object from being a method; the first is the one to report."""
    problems = []
    if not isinstance(getattr(method, "name", None), str) or not method.name:
        problems.append("has no `name`; expected a text")
    needs = getattr(method, "needs", None)
    if not isinstance(needs, Needs):
        problems.append(f"has no `needs`; expected rewards.methods.base.Needs, found {needs!r}")
    score = getattr(method, "score", None)
    if not callable(score):
        problems.append("has no function `score(group, context)`")
    else:
        try:
            inspect.signature(score).bind(None, None)
        except (TypeError, ValueError):
            problems.append(f"its `score` must take (group, context), found {inspect.signature(score)}")
    label_free = getattr(method, "label_free", None)
    if not isinstance(label_free, bool):
        problems.append("does not say whether it is label-free; expected `label_free = True` or False")
    elif isinstance(needs, Needs) and label_free == needs.ground_truth:
        problems.append(
            "says `label_free = True`, and its needs name the data set's answers (ground_truth=True)"
            if label_free
            else "says `label_free = False`, and its needs do not name the data set's answers (ground_truth=False)"
        )
    return problems

"""The `method` of a run: a name of the table, a plugin's import path or name, or several with weights.

What the built-in methods need is a table here, so that a config is checked and planned without the rewards
themselves; a test holds the table against what the methods declare.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from megatron_coreward.config import plugins
from megatron_coreward.config.method_names import BUILT_IN as BUILT_IN
from megatron_coreward.config.method_names import MethodName as MethodName
from megatron_coreward.config.needs import Needs, together
from megatron_coreward.config.views import VIEWS
from megatron_coreward.errors import InputError

_NEEDS: Mapping[str, Needs] = MappingProxyType(
    {
        "co_rewarding_i": Needs(views=VIEWS),
        "co_rewarding_ii": Needs(teacher=True),
        "co_rewarding_i+ii": Needs(views=VIEWS, teacher=True),
        "co_rewarding_i+ii_original": Needs(teacher=True, teacher_views=("rephrased",)),
        "ground_truth": Needs(ground_truth=True),
        "self_certainty": Needs(token_stats=True),
        "entropy": Needs(token_stats=True),
        "self_harmony": Needs(views=VIEWS),
        "scrl": Needs(token_stats=True),
    }
)

BUILT_IN_NEEDS: Mapping[MethodName, Needs] = MappingProxyType({name: _NEEDS.get(name, Needs()) for name in BUILT_IN})

# Built-in methods that train on both views, that read rephrased questions, and that keep a teacher.
TWO_VIEW_METHODS: frozenset[MethodName] = frozenset(n for n, needs in BUILT_IN_NEEDS.items() if len(needs.views) == 2)
REPHRASED_METHODS: frozenset[MethodName] = frozenset(
    n for n, needs in BUILT_IN_NEEDS.items() if "rephrased" in needs.all_views
)
TEACHER_METHODS: frozenset[MethodName] = frozenset(n for n, needs in BUILT_IN_NEEDS.items() if needs.teacher)
# Whose labels are majority votes of the policy's own groups, which may be larger than what is trained on.
POLICY_VOTE_METHODS: frozenset[MethodName] = frozenset({"co_rewarding_i", "majority_voting"})

EXPECTED = (
    f"expected one of {', '.join(map(repr, BUILT_IN))}; or the import path of a method, such as {plugins.EXAMPLE}; or "
    f"the name of an entry point in the group {plugins.GROUP}; or a mapping of such methods to weights"
)


def check_method(value: Any) -> Any:
    """A setting of the key `method`, in its own types.

    Raises:
        ValueError: it is none, or it names a method that is not there.
    """
    if isinstance(value, str):
        return _known(value)
    if not isinstance(value, Mapping) or not value:
        raise ValueError(EXPECTED)
    weights = {}
    for name, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or not weight:
            raise ValueError(f"the weight of {name} must be a finite number other than 0, not {weight!r}")
        weights[_known(str(name))] = float(weight)
    return weights


def _known(name: str) -> str:
    if name in BUILT_IN or plugins.IMPORT_PATH.fullmatch(name) or name in plugins.entry_points():
        return name
    raise ValueError(EXPECTED)


_NAME_SCHEMA = [{"enum": list(BUILT_IN), "type": "string"}, {"type": "string", "pattern": "^[\\w.]+:\\w+$"}]

MethodSetting = Annotated[
    str | dict[str, float],
    BeforeValidator(check_method),
    WithJsonSchema(
        {
            "anyOf": [
                *_NAME_SCHEMA,
                {
                    "type": "object",
                    "propertyNames": {"anyOf": _NAME_SCHEMA},
                    "additionalProperties": {"type": "number"},
                    "minProperties": 1,
                },
            ]
        }
    ),
]


def parts_of(method: str | Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """The names of the methods with their weights, in the order in which they are written."""
    return ((method, 1.0),) if isinstance(method, str) else tuple(method.items())


def method_title(method: object) -> str:
    """A method for people: `majority_voting`, or `1.0 x co_rewarding_i + 0.1 x my.module:length_penalty`. What is no
    setting at all, such as a damaged file may have, is shown as it is."""
    if isinstance(method, Mapping):
        return " + ".join(f"{weight} x {name}" for name, weight in method.items())
    return str(method)


def needs_of(method: str | Mapping[str, float]) -> Needs:
    """What a run with this method has to provide.

    Raises:
        InputError: a plugin cannot be loaded, or a method that names no view stands alone.
    """
    parts = [
        BUILT_IN_NEEDS[name] if name in BUILT_IN_NEEDS else _plugin_needs(name)  # type: ignore[index]
        for name, _ in parts_of(method)
    ]
    if not any(needs.views for needs in parts):
        raise InputError(
            f"method: {method_title(method)}: its needs name no view, so it can only be mixed with a method that does"
        )
    return together(parts) if len(parts) > 1 else parts[0]


def _plugin_needs(name: str) -> Needs:
    needs: Needs = plugins.load(name).needs
    return needs

"""A JSON schema of recipes, with which an editor completes keys, shows their descriptions and marks wrong values."""

from typing import Any

from megatron_coreward.config.methods import BUILT_IN
from megatron_coreward.config.plugins import entry_points
from megatron_coreward.config.schema import RunConfig


def json_schema() -> dict[str, Any]:
    """Draft 2020-12. No key is required, because a recipe may have it from its `base` or from the command line."""
    schema = _for_editors(RunConfig.model_json_schema())
    names, _, mixture = schema["properties"]["method"]["anyOf"]
    for enumerated in (names, mixture["propertyNames"]["anyOf"][0]):
        enumerated["enum"] = [*BUILT_IN, *entry_points()]
    base = {
        "description": "Recipes whose keys this one takes over, by paths from its own folder.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    schema["properties"] = {"base": base, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _for_editors(node: Any) -> Any:
    """A part of pydantic's schema without titles, which repeat names, and with each description on one line."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    left: dict[str, Any] = {}
    for name, value in node.items():
        if name in ("properties", "$defs"):
            left[name] = {key: _for_editors(child) for key, child in value.items()}
        elif name == "description":
            left[name] = " ".join(value.split())
        elif name not in ("required", "title") and not (name == "default" and "$ref" in node):
            left[name] = _for_editors(value)
    return left

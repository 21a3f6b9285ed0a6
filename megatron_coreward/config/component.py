"""What every part of a configuration is: frozen, without unknown keys, each key described by the docstring below it.

The description of a key is the string literal that follows it in the class. Documentation, the `config` command, the
JSON schema and error messages are all made from it (`config.describe`), so units and limits belong there.
"""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from megatron_coreward.config.paths import check_text, expand_path
from megatron_coreward.config.yaml_file import as_text, plain

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

_TEXT = {str, Path, PurePosixPath}


class Component(BaseModel):
    """A group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Text stays as it was written (`run_dir: 010`), and paths are expanded (`config.paths`)."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
            return value  # a group: its own keys are looked at when it is read
        if not kinds <= _TEXT:
            return plain(value)
        value = as_text(value)
        if Path in kinds and isinstance(value, list | tuple):
            return [expand_path(item) if isinstance(item, str | Path) else item for item in value]
        if Path in kinds and isinstance(value, str | Path):
            return expand_path(value)
        if isinstance(value, str):
            check_text(value)
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types of the values that an annotation allows, in lists and mappings too; None is left out."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    parts = [part for part in get_args(annotation) if part not in (type(None), ...)]
    if get_origin(annotation) is Literal or not parts:
        return {annotation}
    return set().union(*map(_kinds, parts))

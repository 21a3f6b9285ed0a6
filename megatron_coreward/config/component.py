"""What every part of a configuration is: frozen, without unknown keys, each key described by the docstring below it.

The description of a key is the string literal that follows it in the class. Documentation, the `config` command, the
JSON schema and error messages are all made from it (`config.describe`), so units and limits belong there.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Component(BaseModel):
    """A group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

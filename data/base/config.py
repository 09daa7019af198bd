"""The settings of an entry point: types, ranges, defaults and meanings stated once, checked once, at the boundary.

A stage describes its settings as a subclass of `Settings`, one documented field a setting, in the types below:

    class TrainSettings(Settings):
        batch: Whole = Field(1024, ge=1)
        \"\"\"Tokens a step and a device.\"\"\"

`TrainSettings.of(mapping)` gives the checked settings, or raises one sentence that names the setting and the remedy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError

from data.base.errors import UserError


def _whole(value: Any) -> Any:
    """Accept 2e6 for 2000000, as YAML and the command line write large counts; a bool or a text is no number."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def _real(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
"""A whole number; 2e6 counts as one, true and "3" do not."""
Real = Annotated[float, Strict(), BeforeValidator(_real)]
"""A finite number."""
Flag = Annotated[bool, Strict()]
"""true or false, nothing else."""
Text = Annotated[str, Strict()]
"""A string."""


class Settings(BaseModel):
    """Settings of one group: immutable, no field that is not described, no NaN and no infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, arbitrary_types_allowed=True
    )

    @classmethod
    def of(cls, settings: Mapping[str, Any], at: str = "") -> Self:
        """Check resolved settings; `at` is the group's own name, for messages. Raises UserError for the first fault."""
        try:
            return cls.model_validate({str(name): value for name, value in settings.items()})
        except ValidationError as error:
            raise UserError(_sentence(cls, error, at)) from None


def _sentence(cls: type[BaseModel], error: ValidationError, at: str) -> str:
    """Return one sentence for the first thing that is wrong."""
    errors = error.errors(include_url=False)
    first = errors[0]
    path = _path(cls, [str(part) for part in first["loc"]])
    name = ".".join([at, *path] if at else path)
    if first["type"] == "extra_forbidden":
        return unknown(name, path, cls)
    if first["type"] == "missing":
        return f"{name} is missing: give {name}=..."
    said = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "value_error":
        return said
    if first["type"] in ("model_type", "dict_type", "model_attributes_type"):
        said = "a group of settings"
    if first["type"] in ("int_type", "int_from_float"):
        said = "a whole number"
    # A setting that takes one of several kinds, such as a word or a number, has an error for each of them.
    of_kinds = [each for each in errors[1:] if _path(cls, [str(part) for part in each["loc"]]) == path]
    said = " or ".join([said, *(each["msg"].removeprefix("Input should be ") for each in of_kinds)])
    return f"{name}={_shown(first['input'])} is not allowed: it should be {said}"


def _path(cls: type[BaseModel], loc: list[str]) -> list[str]:
    """Return the names of settings and list indices in an error's place,
    less pydantic's own for the parts of a union."""
    path: list[str] = []
    inside: type[BaseModel] | None = cls
    for part in loc:
        if inside is not None and (part in inside.model_fields or not path or part == loc[-1]):
            path.append(part)
            field = inside.model_fields.get(part)
            annotation = field.annotation if field else None
            inside = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        elif part.isdigit():
            path.append(part)
    return path


def _shown(value: Any) -> str:
    """Return a value as a user writes it on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def unknown(name: str, path: list[str], cls: type[BaseModel]) -> str:
    """Return the sentence for a setting that nothing reads, with the nearest one that exists."""
    names = _names(cls)
    near = [known for known in names if known.rpartition(".")[2] == path[-1]]
    near = near or difflib.get_close_matches(".".join(path), names, 1, 0.6)
    group = name[: -len(".".join(path))]
    hint = f"did you mean {group}{near[0]}?" if near else "leave it out"
    return f"{name} is no setting: {hint}"


def _names(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of all settings of a group and those below it."""
    found = []
    for name, field in cls.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _names(field.annotation, f"{prefix}{name}.")
    return found

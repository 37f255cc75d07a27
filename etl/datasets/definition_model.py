"""What every part of a data set's definition is.

A strict, frozen model that refuses a field it does not know, by name.
"""

from __future__ import annotations

import difflib
import typing
from typing import Any

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError


class DefinitionModel(pydantic.BaseModel):
    """Strict: a number is no text and no truth value is a number; what YAML reads is what counts."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _known_fields(cls, data: Any, handler: pydantic.ModelWrapValidatorHandler) -> Any:
        """Report unknown fields together with everything that is wrong with the known ones."""
        if not isinstance(data, dict):
            return handler(data)
        allowed = cls.model_fields
        unknown = [
            _unknown_field(str(name), list(allowed), value) for name, value in data.items() if name not in allowed
        ]
        known = {
            name: tuple(value) if isinstance(value, list) and _holds_tuple(allowed[name].annotation) else value
            for name, value in data.items()
            if name in allowed
        }
        if not unknown:
            return handler(known)
        try:
            handler(known)
        except pydantic.ValidationError as error:
            unknown += [
                InitErrorDetails(type=_custom(detail["type"], detail["msg"]), loc=detail["loc"], input=detail["input"])
                for detail in error.errors()
            ]
        raise pydantic.ValidationError.from_exception_data(cls.__name__, unknown)


def _unknown_field(name: str, allowed: list[str], value: Any) -> InitErrorDetails:
    near = difflib.get_close_matches(name, allowed, 1)
    said = f"unknown field {name!r}; allowed: {', '.join(allowed)}" + (f"; did you mean {near[0]!r}?" if near else "")
    return InitErrorDetails(type=_custom("unknown_field", said), loc=(name,), input=value)


def _custom(kind: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{said}", {"said": message})  # type: ignore[arg-type]


def _holds_tuple(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple or any(_holds_tuple(part) for part in typing.get_args(annotation))

"""What all settings share: frozen, checked once at the edge, errors in one sentence."""

from __future__ import annotations

import difflib
import math
import reprlib
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from bigseg.errors import ConfigError, UsageError
from bigseg.guards import check_location

if TYPE_CHECKING:
    from collections.abc import Mapping

S = TypeVar("S", bound="Settings")


def _without_secret(location: str) -> str:
    try:
        return check_location(location)
    except UsageError as error:
        # With a type of its own, so that no message shows the value.
        raise PydanticCustomError("location", "{reason}", {"reason": str(error)}) from None


Location = Annotated[str, AfterValidator(_without_secret)]


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def parse_settings(model: type[S], values: Mapping[str, Any], *, source: str) -> S:
    """`values` as a checked `model`, with errors in one sentence that name the key.

    Raises:
        ConfigError: for the first key that is unknown or has a wrong value.

    """
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(_sentence(model, error, source)) from None


def _sentence(model: type[Settings], error: pydantic.ValidationError, source: str) -> str:
    errors = error.errors()
    # A misspelt key that must be there is unknown and missing: the first says more.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_beside(model, first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{source}: unknown setting {key!r}{hint}"
    if first["type"] == "missing":
        return f"{source}: the setting {key!r} is missing; give it"
    if first["type"] == "location":
        return f"{source}: {key}: {first['msg']}"
    given = first["input"]
    # A location may hold a password.
    plain = isinstance(given, str | int | float | bool | list | tuple) and "://" not in str(given)
    shown = f" = {reprlib.repr(given)}" if plain else ""
    if isinstance(given, float) and not math.isfinite(given):
        return f"{source}: {key}{shown} is not a finite number; give one"
    return f"{source}: {key}{shown}: {first['msg'].removeprefix('Value error, ')}"


def _keys_beside(model: type[Settings], location: tuple[int | str, ...]) -> list[str]:
    current: type[Settings] = model
    for part in location[:-1]:
        field = current.model_fields.get(str(part))
        annotation = field.annotation if field else None
        # Of `X | None` the X.
        for inner in (annotation, *get_args(annotation)):
            if isinstance(inner, type) and issubclass(inner, Settings):
                current = inner
    return list(current.model_fields)

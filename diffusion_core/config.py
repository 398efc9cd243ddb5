"""What every configuration of the project has in common.

Each component owns its configuration class, beside the code that it configures. All of them are frozen pydantic
models that reject unknown fields, and every field is one of two kinds:

* an *identity* field changes numbers (the network's width, the seed, the batch size). It is part of the ids of
  everything made with it;
* an *execution* field does not (how many workers, how long to train, how often to save). Changing it continues the
  same run or the same image set. It is declared with `execution(...)` instead of `Field(...)`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class UserError(Exception):
    """Something that the user can mend. The message is one clear sentence and is shown without a traceback."""


class Config(BaseModel):
    """Base of every configuration: immutable, and strict about the names of its fields.

    `algorithm_version` is raised by a component when it changes what it computes for the same configuration, so that
    results of the older algorithm are never taken for results of the new one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="constants")

    algorithm_version: ClassVar[int] = 1


def execution(default: Any = ..., **options: Any) -> Any:
    """Declare an execution field: like `pydantic.Field`, but not part of any identity."""
    return Field(default, json_schema_extra={"execution": True}, **options)


def later(default: Any, **options: Any) -> Any:
    """Declare an identity field that a released configuration gets later: like `pydantic.Field`.

    Its default must mean what the configuration meant before. At the default it is left out of the identity, so that
    the ids of existing runs and sets stay what they are.
    """
    return Field(default, json_schema_extra={"later": True}, **options)


def identity(value: Any) -> Any:
    """The part of a configuration that changes numbers, as plain JSON values, with algorithm versions."""
    if isinstance(value, Config):
        fields = type(value).model_fields
        kept = {
            name: identity(getattr(value, name))
            for name, field in fields.items()
            if not _is(field, "execution") and not (_is(field, "later") and getattr(value, name) == field.default)
        }
        return {"algorithm_version": value.algorithm_version, **kept}
    if isinstance(value, dict):
        return {key: identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(item) for item in value]
    return value


def digest(*parts: Any) -> str:
    """A 16-digit hexadecimal id of the given parts: configurations (their identity), strings, numbers, lists, dicts."""
    text = json.dumps(identity(list(parts)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def explain(error: ValidationError) -> str:
    """One sentence about the first problem of a failed validation: the field, its value, and what is accepted."""
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    member = next((f" of {part}" for part in parts if "=" in part), "")  # of a union, as "kind=unet": no field
    field = ".".join(part for part in parts if "=" not in part) or "configuration"
    more = error.error_count() - 1
    also = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    if first["type"] == "extra_forbidden":
        return f"{field}: there is no such field{member}{also}."
    if first["type"] == "missing":
        return f"{field}: a value is needed and none was given{also}."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    message = message[:1].lower() + message[1:]
    if isinstance(first["input"], dict) and first["type"] == "value_error":
        return f"{field}: {message}{also}."  # fields that do not go together: the message names them
    return f"{field}: {_shown(first['input'])} is not accepted: {message}{also}."


def _is(field: Any, kind: str) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(kind))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""Who wins where settings come from several places: flags before the file, the file before what a resumed run brings.

Owns how text becomes values, and the one line a bad one earns. Knows no setting by name.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trimkv_core.options import SettingsError, flag_of, kinds_of, option_of

SettingsT = TypeVar("SettingsT", bound=BaseModel)


def merge(
    settings_class: type[SettingsT],
    *,
    flags: Mapping[str, object],
    file: Mapping[str, object],
    base: Mapping[str, object],
) -> SettingsT:
    """The settings of flags over those of a file over those of an earlier run.

    Raises:
        SettingsError: a name that is no setting, one that is missing, or a value that is not possible; one line that
            names where it came from and what is allowed.
    """
    merged: dict[str, object] = {}
    for name, value in {**base, **file, **flags}.items():
        field = settings_class.model_fields.get(name)
        merged[name] = value if field is None else _from_text(value, kinds_of(field.annotation))
    try:
        # JSON, and strict: lists are tuples and text is a path there, but no text is a number and no truth either.
        return settings_class.model_validate_json(json.dumps(merged, default=str), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise SettingsError(_one_line(details, settings_class, flags, file)) from None


def _from_text(value: object, kinds: frozenset[type]) -> object:
    """The number, truth or None that text stands for where the setting takes one; anything else as it is.

    Flags are text, and YAML reads `2e-4` as text too.
    """
    if isinstance(value, list | tuple):
        return [_from_text(item, kinds - {tuple}) for item in value] if float in kinds else list(value)
    if not isinstance(value, str) or str in kinds or Path in kinds:
        return None if value == "none" and types.NoneType in kinds else value
    text = value.strip().lower()
    if text == "none" and types.NoneType in kinds:
        return None
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return value


def _one_line(
    details: Sequence[ErrorDetails],
    settings_class: type[BaseModel],
    flags: Mapping[str, object],
    file: Mapping[str, object],
) -> str:
    """What was wrong, where it came from and what is allowed; everything that is missing at once."""
    missing = [flag_of(str(detail["loc"][0])) for detail in details if detail["type"] == "missing"]
    if missing:
        return f"{', '.join(missing)} must be given, as a flag or in the file of --config"
    unknown = [str(detail["loc"][0]) for detail in details if detail["type"] == "extra_forbidden"]
    if unknown:
        known = ", ".join(name for name in settings_class.model_fields if name not in ("config", "resume"))
        return f"no setting is called {', '.join(map(repr, unknown))} (in the file of --config); there are {known}"
    detail = details[0]
    if detail["type"] == "contradiction":
        return detail["msg"]
    name = str(detail["loc"][0])
    where = flag_of(name) if name in flags or name not in file else f"{name} in the file of --config"
    return f"{where}={detail['input']} is not possible: must be {option_of(settings_class, name).allowed}"

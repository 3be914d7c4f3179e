"""How a settings class meets the command line and a config file: flags, YAML or JSON, and one line for a bad value.

Owns how text becomes values and who wins: flags before the file, the file before what `base` brings, that before the
defaults. Knows no setting by name: it is handed the class that has them.
"""

from __future__ import annotations

import argparse
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

SettingsT = TypeVar("SettingsT", bound=BaseModel)


class SettingsError(ValueError):
    """A setting that cannot be; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Option:
    """How a setting looks on the command line.

    Attributes:
        group: heading of `--help` it stands under.
        metavar: what stands for its value there.
        allowed: what it takes, in the words of an error message.
        shown_default: its default in words, where the value itself says too little.
        alters_run: whether another value makes another run, so that a resumed one must keep it.
    """

    group: str
    metavar: str
    allowed: str
    shown_default: str | None = None
    alters_run: bool = True


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, where argparse would print its whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser(settings_class: type[BaseModel], *, program: str, usage: str, about: str, epilog: str) -> OneLineParser:
    """Flags of all settings, headed by group in the order of their first field; values stay text."""
    parser = OneLineParser(
        prog=program,
        usage=usage,
        description=about,
        epilog=epilog,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str, Any] = {}
    for name, field in settings_class.model_fields.items():
        option = option_of(settings_class, name)
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        default = "required" if field.is_required() else f"default: {option.shown_default or _shown(field.default)}"
        text = f"{field.description} ({default})".replace("%", "%%")
        kinds = _kinds(field.annotation)
        if bool in kinds:
            groups[option.group].add_argument(
                flag(name), nargs="?", const="true", choices=("true", "false"), metavar=option.metavar, help=text
            )
            groups[option.group].add_argument(
                f"--no-{flag(name)[2:]}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS
            )
        elif tuple in kinds:
            groups[option.group].add_argument(flag(name), nargs="+", action="extend", metavar=option.metavar, help=text)
        else:
            groups[option.group].add_argument(flag(name), metavar=option.metavar, help=text)
    return parser


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def option_of(settings_class: type[BaseModel], name: str) -> Option:
    """How the setting `name` looks on the command line."""
    return next(mark for mark in settings_class.model_fields[name].metadata if isinstance(mark, Option))


def contradiction(name: str, value: object, allowed: str) -> PydanticCustomError:
    """What a validator raises where settings are at odds with each other."""
    return PydanticCustomError(
        "contradiction",
        "{field}={value} is not possible: {allowed}",
        {"field": flag(name), "value": value, "allowed": allowed},
    )


def read_config_file(path: str | Path) -> dict[str, object]:
    """Settings of a YAML or JSON file (JSON is YAML) by field name; `seq-len` and `seq_len` are the same.

    Raises:
        SettingsError: the file cannot be read, holds no settings, or says one twice.
    """
    where = f"--config={path} is not possible"
    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{where}: must be a readable YAML or JSON file ({reason})") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not isinstance(node, yaml.MappingNode):
        raise SettingsError(f"{where}: must hold settings by name, such as 'seq-len: 1024'")
    names = [str(key.value).replace("-", "_") for key, _ in node.value]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(f"{where}: must say {twice} once")
    return {str(name).replace("-", "_"): value for name, value in loaded.items()}


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
        merged[name] = value if field is None else _from_text(value, _kinds(field.annotation))
    try:
        # JSON, and strict: lists are tuples and text is a path there, but no text is a number and no truth either.
        return settings_class.model_validate_json(json.dumps(merged, default=str), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise SettingsError(_one_line(details, settings_class, flags, file)) from None


def _kinds(annotation: object) -> frozenset[type]:
    """The plain types a field takes, and those of its items."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin is tuple:
        return frozenset({tuple}) | _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return frozenset().union(*(_kinds(part) for part in get_args(annotation)))
    kind = origin or annotation
    return frozenset({kind}) if isinstance(kind, type) else frozenset()


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
    missing = [flag(str(detail["loc"][0])) for detail in details if detail["type"] == "missing"]
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
    where = flag(name) if name in flags or name not in file else f"{name} in the file of --config"
    return f"{where}={detail['input']} is not possible: must be {option_of(settings_class, name).allowed}"


def _shown(default: object) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)

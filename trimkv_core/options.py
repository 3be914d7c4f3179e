"""How a settings class meets the command line and a file: flags, YAML or JSON, and what is said of a bad value.

Owns how a setting looks in `--help`, how a settings file is read, and the words of a contradiction. Knows no setting by
name: it is handed the class that has them. The service, the trainer and the evaluation put their programs on top.
"""

from __future__ import annotations

import argparse
import types
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticCustomError


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
        alters_run: whether another value makes another run, so that one that is resumed must keep it.
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


def add_flags(parser: argparse.ArgumentParser, settings_class: type[BaseModel], groups: Sequence[str] = ()) -> None:
    """Flags of all settings; values stay text, so that there is one judge of them.

    Args:
        parser: with `argument_default=argparse.SUPPRESS`: a flag that is not given says nothing.
        settings_class: whose fields carry an `Option` each.
        groups: headings that come first, in this order; others follow as their first field does.
    """
    headed: dict[str, Any] = {name: parser.add_argument_group(name) for name in groups}
    for name, field in settings_class.model_fields.items():
        option = option_of(settings_class, name)
        if option.group not in headed:
            headed[option.group] = parser.add_argument_group(option.group)
        group = headed[option.group]
        default = "required" if field.is_required() else f"default: {option.shown_default or _shown(field.default)}"
        text = f"{field.description} ({default})".replace("%", "%%")
        kinds = kinds_of(field.annotation)
        if bool in kinds:
            group.add_argument(flag_of(name), nargs="?", const="true", metavar=option.metavar, help=text)
            group.add_argument(
                f"--no-{flag_of(name)[2:]}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS
            )
        elif tuple in kinds:
            group.add_argument(flag_of(name), nargs="+", action="extend", metavar=option.metavar, help=text)
        else:
            group.add_argument(flag_of(name), metavar=option.metavar, help=text)


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def option_of(settings_class: type[BaseModel], name: str) -> Option:
    """How the setting `name` looks on the command line."""
    return next(mark for mark in settings_class.model_fields[name].metadata if isinstance(mark, Option))


def kinds_of(annotation: object) -> frozenset[type]:
    """The plain types a field takes, and those of its items."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds_of(get_args(annotation)[0])
    if origin is tuple:
        return frozenset({tuple}) | kinds_of(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return frozenset().union(*(kinds_of(part) for part in get_args(annotation)))
    kind = origin or annotation
    return frozenset({kind}) if isinstance(kind, type) else frozenset()


def contradiction(name: str, value: object, allowed: str) -> PydanticCustomError:
    """What a validator raises where settings are at odds with each other."""
    return PydanticCustomError(
        "contradiction",
        "{field}={value} is not possible: {allowed}",
        {"field": flag_of(name), "value": value, "allowed": allowed},
    )


def read_settings_file(path: str | Path, *, example: str) -> dict[str, object]:
    """Settings of a YAML or JSON file (JSON is YAML) by field name; `seq-len` and `seq_len` are the same, said once.

    Args:
        path: of the file.
        example: a line such a file may hold, for who wrote none.

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
        raise SettingsError(f"{where}: must hold settings by name, such as '{example}'")
    # Loading keeps the last of several; the nodes have them all.
    counts = Counter(_field_name(key.value) for key, _ in node.value)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise SettingsError(f"{where}: must say {twice} once")
    return {_field_name(name): value for name, value in loaded.items()}


def _field_name(name: object) -> str:
    return str(name).replace("-", "_")


def _shown(default: object) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)

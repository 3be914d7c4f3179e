"""Where values of settings come from: flags, environment `TRIMKV_…`, a YAML file; and the one line a bad value earns.

Owns how a setting looks on the command line and what is said of it there. Knows no setting by name: it is handed the
class that has them.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_origin

import yaml
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings

ENV_PREFIX = "TRIMKV_"
PROGRAM = "trimkv-serve"


class SettingsError(Exception):
    """A setting that cannot be; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Option:
    """How a setting looks on the command line.

    Attributes:
        group: heading of `--help` it stands under.
        metavar: what stands for its value there.
        allowed: what it takes, in the words of an error message.
        shown_default: its default in words, where the value itself says too little.
    """

    group: str
    metavar: str
    allowed: str
    shown_default: str | None = None


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, where argparse would print its whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser(settings_class: type[BaseSettings], groups: Sequence[str]) -> argparse.ArgumentParser:
    """Flags of all settings under the headings `groups`; values stay text, so that there is one judge of them."""
    parser = OneLineParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--flag value ...]",
        description="Serve a language model over the OpenAI API, each request's KV cache under its own budget. "
        f"See also: {PROGRAM} plan --help (how many sequences fit).",
        epilog=f"A flag goes before the environment ({ENV_PREFIX}KV_MEMORY=8GiB for --kv-memory 8GiB), the environment "
        "before the file of --config, the file before the defaults.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    headed = {name: parser.add_argument_group(name) for name in groups}
    for name, field in settings_class.model_fields.items():
        option = option_of(settings_class, name)
        default = option.shown_default or _shown(field.default)
        text = f"{field.description} (default: {default})".replace("%", "%%")
        group = headed[option.group]
        if field.annotation is bool:
            group.add_argument(_flag(name), nargs="?", const="true", metavar=option.metavar, help=text)
            group.add_argument(
                f"--no-{_flag(name)[2:]}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS
            )
        elif get_origin(field.annotation) is tuple:
            group.add_argument(_flag(name), action="append", metavar=option.metavar, help=text)
        else:
            group.add_argument(_flag(name), metavar=option.metavar, help=text)
    return parser


def _shown(default: object) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def option_of(settings_class: type[BaseSettings], name: str) -> Option:
    """How the setting `name` looks on the command line."""
    marks = [mark for mark in settings_class.model_fields[name].metadata if isinstance(mark, Option)]
    return marks[0]


def read_yaml(path: str | Path) -> dict[str, object]:
    """Settings of a YAML file by field name; `kv-memory` and `kv_memory` are the same, and said once."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded, names = yaml.safe_load(text), _names_in(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"--config={path} is not possible: must be a readable YAML file ({reason})") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise SettingsError(f"--config={path} is not possible: must hold settings by name, such as 'port: 8000'")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SettingsError(f"--config={path} is not possible: must say {twice[0]} once")
    return {_field_name(name): value for name, value in loaded.items()}


def _names_in(text: str) -> list[str]:
    """The field names at the top of a YAML document, repeated ones too, of which loading keeps the last."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return [_field_name(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []


def _field_name(name: object) -> str:
    return str(name).replace("-", "_")


def find_variable(name: str) -> str | None:
    """The environment variable that sets `name`, if any: as pydantic-settings looks, in any case and not empty."""
    wanted = f"{ENV_PREFIX}{name}".upper()
    found = [variable for variable, value in os.environ.items() if variable.upper() == wanted and value]
    return found[-1] if found else None


def contradiction(field: str, value: object, allowed: str) -> PydanticCustomError:
    """What a validator raises where settings are at odds with each other."""
    return PydanticCustomError(
        "contradiction",
        "{field}={value} is not possible: {allowed}",
        {"field": _flag(field), "value": value, "allowed": allowed},
    )


def one_line(detail: ErrorDetails, settings_class: type[BaseSettings], flags: Mapping[str, object]) -> str:
    """What was wrong with a value, where it came from and what is allowed."""
    if detail["type"] == "contradiction":
        return detail["msg"]
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return f"{name!r} in the file of --config is no setting; see {PROGRAM} --help"
    where = _flag(name) if name in flags else find_variable(name) or f"{name} in the file of --config"
    return f"{where}={detail['input']} is not possible: must be {option_of(settings_class, name).allowed}"

"""Where values of settings come from: flags, environment `TRIMKV_…`, a YAML file; and the one line a bad value earns.

Owns what the program says around its flags, and where a value came from. Knows no setting by name: it is handed the
class that has them. (How a setting looks on a command line: `trimkv_core.options`.)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence

from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings

from trimkv_core.options import OneLineParser, add_flags, flag_of, option_of

ENV_PREFIX = "TRIMKV_"
PROGRAM = "trimkv-serve"


def make_parser(settings_class: type[BaseSettings], groups: Sequence[str]) -> argparse.ArgumentParser:
    """Flags of all settings under the headings `groups`; values stay text, so that there is one judge of them."""
    parser = OneLineParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--flag value ...]",
        description="Serve a language model over the OpenAI API, each request's KV cache under its own budget. "
        f"See also: {PROGRAM} plan --help (how many sequences fit).",
        epilog=f"A flag goes before the environment ({ENV_PREFIX}KV_MEMORY=8GiB for --kv-memory 8GiB), the environment "
        "before the file of --config, the file before the defaults. Traces and metrics of OpenTelemetry: by its own "
        "variables, such as OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 (extra: otel).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_flags(parser, settings_class, groups)
    return parser


def find_variable(name: str) -> str | None:
    """The environment variable that sets `name`, if any: as pydantic-settings looks, in any case and not empty."""
    wanted = f"{ENV_PREFIX}{name}".upper()
    found = [variable for variable, value in os.environ.items() if variable.upper() == wanted and value]
    return found[-1] if found else None


def one_line(detail: ErrorDetails, settings_class: type[BaseSettings], flags: Mapping[str, object]) -> str:
    """What was wrong with a value, where it came from and what is allowed."""
    if detail["type"] == "contradiction":
        return detail["msg"]
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return f"{name!r} in the file of --config is no setting; see {PROGRAM} --help"
    where = flag_of(name) if name in flags else find_variable(name) or f"{name} in the file of --config"
    return f"{where}={detail['input']} is not possible: must be {option_of(settings_class, name).allowed}"

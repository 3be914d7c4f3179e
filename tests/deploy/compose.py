"""Compose files as Docker Compose reads them, as far as the shipped ones go.

That is: `!reset` and `!override`, `extends`, several files, variables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
# ${NAME:-default}, and ${NAME-default} where empty is a value of its own.
VARIABLE = re.compile(r"\$\{(\w+)(:?)-([^}]*)\}")


class _Reset:
    """What `!reset` leaves: the key goes, whatever an earlier file said."""


class _Override(list[Any]):
    """A list marked `!override`: it takes an earlier one's place."""


class _Loader(yaml.SafeLoader):
    pass


def _override(loader: _Loader, node: yaml.SequenceNode) -> _Override:
    return _Override(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("!reset", lambda loader, node: _Reset())
_Loader.add_constructor("!override", _override)


def load(name: str) -> dict[str, Any]:
    """One file, its `!reset` keys and `!override` lists marked."""
    found: dict[str, Any] = yaml.load((FOLDER / name).read_text(encoding="utf-8"), _Loader)
    return found


def extended(document: dict[str, Any]) -> dict[str, Any]:
    """The same with each service that extends another one laid over that."""
    services = {}
    for name, service in document["services"].items():
        own = dict(service)
        base = own.pop("extends", None)
        services[name] = merge(load(base["file"])["services"][base["service"]], own) if base else own
    return document | {"services": services}


def without_marks(value: Any) -> Any:
    """The same without what is marked `!reset`, and with plain lists where `!override` marks them: for the schema."""
    if isinstance(value, dict):
        return {key: without_marks(inner) for key, inner in value.items() if not isinstance(inner, _Reset)}
    return [without_marks(inner) for inner in value] if isinstance(value, list) else value


def merge(below: Any, above: Any) -> Any:
    """A later file over an earlier one: mappings key by key, lists one after the other."""
    if isinstance(below, dict) and isinstance(above, dict):
        merged = dict(below)
        for key, value in above.items():
            if isinstance(value, _Reset):
                merged.pop(key, None)
            elif isinstance(value, _Override):
                merged[key] = list(value)
            else:
                merged[key] = merge(merged[key], value) if key in merged else value
        return merged
    return below + above if isinstance(below, list) and isinstance(above, list) else above


def fill_in(value: Any, variables: Mapping[str, str]) -> Any:
    """Variables replaced by their values or defaults, everywhere."""
    if isinstance(value, dict):
        return {key: fill_in(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill_in(inner, variables) for inner in value]
    if isinstance(value, str):
        return VARIABLE.sub(lambda found: _filled(found, variables), value)
    return value


def _filled(found: re.Match[str], variables: Mapping[str, str]) -> str:
    name, colon, default = found.groups()
    value = variables.get(name, default)
    return default if colon and not value else value


def read_env() -> dict[str, str]:
    """`docker/.env`."""
    lines = (FOLDER / ".env").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=")[::2] for line in lines if line.strip() and not line.startswith("#"))
    return dict(pairs)

"""Compose files as Docker Compose reads them, as far as the shipped ones go: `!reset`, several files, variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Reset:
    """What `!reset` leaves: the key goes, whatever an earlier file said."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!reset", lambda loader, node: _Reset())


def load(name: str) -> dict[str, Any]:
    """One file, its `!reset` keys marked."""
    found: dict[str, Any] = yaml.load((FOLDER / name).read_text(encoding="utf-8"), _Loader)
    return found


def without_resets(value: Any) -> Any:
    """The same without what is marked, as the schema wants it."""
    if isinstance(value, dict):
        return {key: without_resets(inner) for key, inner in value.items() if not isinstance(inner, _Reset)}
    return [without_resets(inner) for inner in value] if isinstance(value, list) else value


def merge(below: Any, above: Any) -> Any:
    """A later file over an earlier one: mappings key by key, lists one after the other."""
    if isinstance(below, dict) and isinstance(above, dict):
        merged = dict(below)
        for key, value in above.items():
            if isinstance(value, _Reset):
                merged.pop(key, None)
            else:
                merged[key] = merge(merged[key], value) if key in merged else value
        return merged
    return below + above if isinstance(below, list) and isinstance(above, list) else above


def fill_in(value: Any, variables: Mapping[str, str]) -> Any:
    """`${NAME:-default}` replaced, everywhere."""
    if isinstance(value, dict):
        return {key: fill_in(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill_in(inner, variables) for inner in value]
    if isinstance(value, str):
        return VARIABLE.sub(lambda found: variables.get(found[1]) or found[2] or "", value)
    return value


def read_env() -> dict[str, str]:
    """`docker/.env`."""
    lines = (FOLDER / ".env").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=")[::2] for line in lines if line.strip() and not line.startswith("#"))
    return dict(pairs)

"""Where this package keeps what it makes once and uses often."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """The user's cache folder: $TRIMKV_CACHE_HOME, else $XDG_CACHE_HOME/trimkv, else ~/.cache/trimkv."""
    own, shared = os.environ.get("TRIMKV_CACHE_HOME"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser().absolute()
    return (Path(shared).absolute() if shared else Path.home() / ".cache") / "trimkv"

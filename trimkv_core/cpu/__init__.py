"""Kernels for the CPU, compiled by numba from Python: a newcomer's machine has no compiler.

Compiled code is kept in the user's cache folder, under a name that changes with the sources here: numba itself would
not notice that a function which another file calls has changed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba

from trimkv_core.cache_home import cache_home


def _cache_folder() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return str(cache_home() / f"numba-{numba.__version__}-{digest.hexdigest()[:16]}")


def _define() -> None:
    """Import the kernels with numba's cache in our folder, unless the user has named one."""
    asked = numba.config.CACHE_DIR
    if not asked:
        numba.config.CACHE_DIR = _cache_folder()
    try:
        from trimkv_core.cpu import attention, layer, linear, pointwise  # noqa: F401
    finally:
        numba.config.CACHE_DIR = asked


_define()

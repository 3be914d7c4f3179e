"""Kernels for the CPU, compiled by numba from Python: a newcomer's machine has no compiler.

Compiled code is kept in the user's cache folder, or in the one that $NUMBA_CACHE_DIR names, under a name that changes
with the sources here: numba itself would not notice that a function which another file calls has changed.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import shutil
import tempfile
from pathlib import Path

import numba

from trimkv_core.cache_home import cache_home

logger = logging.getLogger(__name__)


def _cache_name(sources: Path) -> str:
    digest = hashlib.sha256()
    for source in sorted(sources.glob("*.py")):
        digest.update(source.read_bytes())
    return f"numba-{numba.__version__}-{digest.hexdigest()[:16]}"


def _cache_folder() -> Path:
    """Where numba shall keep what it compiles; it exists and can be written to."""
    asked = numba.config.CACHE_DIR
    folder = (Path(asked) if asked else cache_home()) / _cache_name(Path(__file__).parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        # numba would look for another folder by itself, beside the sources or nowhere at all, and then not start.
        logger.warning(
            "compiled kernels cannot be kept in %s (%s): they are compiled at every start, half a minute; "
            "let TRIMKV_CACHE_HOME name a folder that can be written to",
            folder,
            error,
        )
        passing = tempfile.mkdtemp(prefix="trimkv-numba-")
        atexit.register(shutil.rmtree, passing, ignore_errors=True)
        return Path(passing)


def _define() -> None:
    """Import the kernels with numba's cache in our folder, and leave numba's own setting as it was."""
    asked = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_cache_folder())
    try:
        from trimkv_core.cpu import attention, layer, linear, pointwise  # noqa: F401
    finally:
        numba.config.CACHE_DIR = asked


_define()

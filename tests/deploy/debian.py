"""Programs of Debian packages that tests run for real."""

from __future__ import annotations

import os
import shutil

import pytest


def program(name: str, *, package: str) -> str:
    """The path of a program.

    Where it is missing, the test is skipped with the package's name, or fails if TRIMKV_REQUIRE_DEBIAN is 1, as in CI.
    """
    found = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))
    if found is not None:
        return found
    said = f"needs {name}: apt-get install {package}"
    if os.environ.get("TRIMKV_REQUIRE_DEBIAN") == "1":
        pytest.fail(said)
    pytest.skip(said)

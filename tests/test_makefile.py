"""`make serve`: which variables reach the command line. Nothing is installed and nothing runs (`make -n`)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def serve_command(*arguments: str, **environment: str) -> str:
    """The last line of the recipe: the server's own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    done = subprocess.run(
        ["make", "-n", "serve", *arguments],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if "trimkv-serve" in line][-1]


def test_only_a_host_on_the_command_line_is_an_address() -> None:
    assert "--host" not in serve_command(HOST="x86_64-conda-linux-gnu")
    assert "--host" not in serve_command("-e", HOST="x86_64-conda-linux-gnu")
    assert '--host "0.0.0.0"' in serve_command("HOST=0.0.0.0", HOST="x86_64-conda-linux-gnu")


def test_the_other_variables_count_from_the_environment_too() -> None:
    assert '--port "9000"' in serve_command(PORT="9000")

"""Where the tests' numbers and folders lie."""

from __future__ import annotations

from pathlib import Path

UPSTREAM = Path(__file__).parent / "data" / "upstream"

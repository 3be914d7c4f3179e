"""Settings that must stand before torch is imported."""

from __future__ import annotations

import os

# Waiting threads spin briefly, as in the server: on two cores a neighbour would otherwise slow the tests tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

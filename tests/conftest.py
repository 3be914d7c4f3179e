"""Settings that must stand before torch is imported."""

from __future__ import annotations

import os

# Waiting threads sleep: on two cores a neighbour would otherwise slow the tests tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

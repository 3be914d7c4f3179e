"""Settings that must stand before torch is imported, and those that must before a kernel is."""

from __future__ import annotations

import importlib.util
import os

# Waiting threads spin briefly, as in the server: on two cores a neighbour would otherwise slow the tests tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tests.kernels.interpreter import mend

# Triton decides whether to interpret when a kernel is defined, so this must stand before any of them is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        mend()

"""What starts numba's threads, and whether that is fit for decoding: a step is some four hundred launches.

Measured on two cores: 3 µs a launch by OpenMP, 160 µs by numba's own workqueue, which also ends the process when two
Python threads launch at once.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from trimkv_core.cpu.attention import use_threads
from trimkv_core.cpu.linear import multiply, pack_linear


def threading_note() -> str | None:
    """One line for the operator where launches are slow; None where they are not. Runs a kernel to find out."""
    use_threads(torch.get_num_threads())
    layer = pack_linear([torch.zeros(1, 1)], [None])
    multiply(layer, np.zeros((1, 1), np.float32), np.zeros((1, layer.panels.shape[2]), np.float32), False)
    if numba.threading_layer() != "workqueue":
        return None
    unset = " and unset NUMBA_THREADING_LAYER" if numba.config.THREADING_LAYER == "workqueue" else ""
    return (
        "numba starts its threads without OpenMP, 50 times as slowly: a decode step on this CPU takes twice as long or "
        f"more; install libgomp.so.1 (Debian's package libgomp1){unset}"
    )

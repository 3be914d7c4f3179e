"""Matrix products in float32, weights packed for the tiles of `vector`.

A row of the result depends on its own row of the input only, to the last bit, so an answer is the same alone and in
company; and a few rows run at the speed of reading the weights, where a general library takes twice as long.

Letters: R rows, K inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from trimkv_core.cpu.vector import LANES, multiply_rows

# Rows a task takes at once: they stay in the thread's cache from panel to panel.
_ROWS_A_TASK = 192


class Packed(NamedTuple):
    """Layers of one input side by side, as kernels take them.

    Attributes:
        panels: float32 [ceil(O / LANES), K, LANES].
        bias: float32 [padded O]; [0] without.
    """

    panels: np.ndarray
    bias: np.ndarray


def pack_linear(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Packed:
    """Pack layers of one input, weights [O, K] and biases [O] or None; the columns together are padded to LANES."""
    weight = torch.cat([weight.detach() for weight in weights])
    outputs, inputs = weight.shape
    padded = -(-outputs // LANES) * LANES
    rows = torch.zeros(padded, inputs)
    rows[:outputs] = weight
    start = torch.zeros(0)
    if any(bias is not None for bias in biases):
        start = torch.zeros(padded)
        parts = [
            weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
            for weight, bias in zip(weights, biases, strict=True)
        ]
        start[:outputs] = torch.cat(parts)
    panels = rows.view(padded // LANES, LANES, inputs).transpose(1, 2).contiguous()
    return Packed(panels.numpy(), start.numpy())


@numba.njit(parallel=True, nogil=True, cache=True)
def multiply(layer, x, out, adds):
    """out = x · Wᵀ + bias, or that added to what `out` holds.

    Args:
        layer: `Packed`.
        x: float32 [R, K].
        out: float32 [R, padded O].
        adds: whether to add.
    """
    blocks, inputs, _ = layer.panels.shape
    rows, width = out.shape
    row_tasks = (rows + _ROWS_A_TASK - 1) // _ROWS_A_TASK
    panels, bias, source, target = layer.panels.ctypes.data, layer.bias.ctypes.data, x.ctypes.data, out.ctypes.data
    has_bias = layer.bias.size > 0
    for task in prange(row_tasks * blocks):
        block, first = np.uintp(task % blocks), np.uintp((task // blocks) * _ROWS_A_TASK)
        column = np.uintp(4 * LANES) * block
        result = target + np.uintp(4 * width) * first + column
        multiply_rows(
            panels + column * np.uintp(inputs),
            LANES,
            source + np.uintp(4 * inputs) * first,
            inputs,
            result,
            width,
            bias + column if has_bias else np.uintp(0),
            result if adds else np.uintp(0),
            inputs,
            min(_ROWS_A_TASK, rows - (task // blocks) * _ROWS_A_TASK),
        )

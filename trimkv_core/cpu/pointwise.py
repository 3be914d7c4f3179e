"""The small operations between products, each one pass over its rows: norm, rotation, activation, log β.

Letters: T rows, E hidden size, I intermediate size, D head dimension.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import prange

from trimkv_core.cpu.vector import exp

_FAST = {"reassoc", "contract", "nsz", "arcp"}  # no "nnan": a NaN must stay one and be found


@numba.njit(inline="always")
def _sigmoid(x):
    small = exp(-abs(x))
    return (np.float32(1.0) if x >= 0 else small) / (np.float32(1.0) + small)


@numba.njit(inline="always")
def _norm_factor(row, width, eps):
    total = np.float32(0.0)
    for i in range(width):
        total += row[i] * row[i]
    return np.float32(1.0) / np.float32(math.sqrt(total / np.float32(width) + eps))


@numba.njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def rms_norm(x, weight, eps, out):
    """out = x / √(mean x² + eps) · weight: float32 [T, E], [E], number, [T, E]."""
    rows, width = x.shape
    for row in prange(rows):
        factor = _norm_factor(x[row], width, eps)
        for i in range(width):
            out[row, i] = weight[i] * (x[row, i] * factor)


@numba.njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def rotate(projected, cos, sin, query_norm, key_norm, eps, query, key, value):
    """Take query, key and value of a fused projection apart, norm them per head if asked, and rotate (RoPE).

    Args:
        projected: float32 [T, ≥ (query heads + 2 · heads) · D], in this order.
        cos, sin: float32 [T, rotated dimensions].
        query_norm, key_norm: float32 [D], or [0] for no norm.
        eps: of the norms.
        query, key, value: float32 out, [T, heads, D].
    """
    rows, query_heads, dim = query.shape
    heads = key.shape[1]
    rotated = cos.shape[1]
    half = rotated // 2
    for task in prange(rows * (query_heads + heads)):
        row, head = task // (query_heads + heads), task % (query_heads + heads)
        is_query = head < query_heads
        source = projected[row, head * dim : head * dim + dim]
        target = query[row, head] if is_query else key[row, head - query_heads]
        norm = query_norm if is_query else key_norm
        if norm.size:
            factor = _norm_factor(source, dim, eps)
            for i in range(dim):
                target[i] = norm[i] * (source[i] * factor)
        else:
            for i in range(dim):
                target[i] = source[i]
        for i in range(half):
            low, high = target[i], target[i + half]
            target[i] = low * cos[row, i] - high * sin[row, i]
            target[i + half] = high * cos[row, i + half] + low * sin[row, i + half]
        if not is_query:
            moved = (head + heads) * dim
            for i in range(dim):
                value[row, head - query_heads, i] = projected[row, moved + i]


@numba.njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def silu_multiply(gate_up, out):
    """out = silu(gate) · up: float32 [T, ≥ 2·I with gate first], [T, I]."""
    rows, width = out.shape
    for row in prange(rows):
        for i in range(width):
            gate = gate_up[row, i]
            out[row, i] = gate * _sigmoid(gate) * gate_up[row, width + i]


@numba.njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def silu(x, first, out):
    """out = silu of `out`'s width of columns of x from `first` on: float32 [T, …], number, [T, I]."""
    rows, width = out.shape
    for row in prange(rows):
        for i in range(width):
            value = x[row, first + i]
            out[row, i] = value * _sigmoid(value)


@numba.njit(nogil=True, cache=True)
def log_sigmoid(x, out):
    """out = log σ(x), as exact as float32 is, of `out`'s columns: float32 [T, ≥ H], [T, H]."""
    rows, heads = out.shape
    for row in range(rows):
        for head in range(heads):
            value = x[row, head]
            out[row, head] = min(value, np.float32(0.0)) - np.float32(math.log1p(math.exp(-abs(value))))

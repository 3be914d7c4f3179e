"""A decoder layer's two halves around attention, each one call from Python: a layer has twenty small operations, and
calling them one by one would cost more than they do.

Letters: T tokens, E hidden size, H KV heads, G query heads a KV head, D head dimension, I intermediate sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from trimkv_core.cpu.linear import Packed, multiply
from trimkv_core.cpu.pointwise import log_sigmoid, rms_norm, rotate, silu, silu_multiply


class LayerWeights(NamedTuple):
    """What a layer multiplies with.

    Attributes:
        input_norm, mlp_norm: float32 [E].
        query_norm, key_norm: float32 [D], or [0].
        norm_eps, head_eps: epsilons of the former and the latter two.
        projection: query, key, value and, with a gate, the gate's first layer.
        gate_inner: a gate's second layer; no panels for a gate of one layer.
        gate_last: to H heads, with the gate's bias.
        output, mlp, down: as in the model, gate and up side by side.
    """

    input_norm: np.ndarray
    mlp_norm: np.ndarray
    query_norm: np.ndarray
    key_norm: np.ndarray
    norm_eps: np.float32
    head_eps: np.float32
    projection: Packed
    gate_inner: Packed
    gate_last: Packed
    output: Packed
    mlp: Packed
    down: Packed


class Buffers(NamedTuple):
    """Where a step's intermediate results lie, float32, one row a token; used again by every layer.

    Attributes:
        normed: [T, E].
        projected: [T, columns of `projection`].
        query: [T, H·G, D].
        key, value: [T, H, D].
        gate_active: [T, I of the gate]; no columns without one.
        gate_hidden, gate_heads: [T, columns of `gate_inner`, `gate_last`].
        log_beta: [T, H].
        gate_up: [T, columns of `mlp`].
        active: [T, I].
    """

    normed: np.ndarray
    projected: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    gate_active: np.ndarray
    gate_hidden: np.ndarray
    gate_heads: np.ndarray
    log_beta: np.ndarray
    gate_up: np.ndarray
    active: np.ndarray


@numba.njit(nogil=True, cache=True)
def before_attention(weights, buffers, hidden, cos, sin):
    """Fill `query`, `key`, `value` (normed, rotated) and `log_beta` from hidden states, float32 [T, E]."""
    rms_norm(hidden, weights.input_norm, weights.norm_eps, buffers.normed)
    multiply(weights.projection, buffers.normed, buffers.projected, False)
    rotate(
        buffers.projected,
        cos,
        sin,
        weights.query_norm,
        weights.key_norm,
        weights.head_eps,
        buffers.query,
        buffers.key,
        buffers.value,
    )
    if buffers.gate_active.shape[1] == 0:
        return
    heads, dim = buffers.key.shape[1], buffers.key.shape[2]
    silu(buffers.projected, (buffers.query.shape[1] + 2 * heads) * dim, buffers.gate_active)
    if weights.gate_inner.panels.shape[0] > 0:
        multiply(weights.gate_inner, buffers.gate_active, buffers.gate_hidden, False)
        silu(buffers.gate_hidden, 0, buffers.gate_active)
    multiply(weights.gate_last, buffers.gate_active, buffers.gate_heads, False)
    log_sigmoid(buffers.gate_heads, buffers.log_beta)


@numba.njit(nogil=True, cache=True)
def after_attention(weights, buffers, mixed, hidden):
    """Add the attention's output and the MLP to hidden states in place: float32 [T, H·G·D], [T, E]."""
    multiply(weights.output, mixed, hidden, True)
    rms_norm(hidden, weights.mlp_norm, weights.norm_eps, buffers.normed)
    multiply(weights.mlp, buffers.normed, buffers.gate_up, False)
    silu_multiply(buffers.gate_up, buffers.active)
    multiply(weights.down, buffers.active, hidden, True)

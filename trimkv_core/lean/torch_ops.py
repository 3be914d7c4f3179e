"""Lean layers in plain PyTorch: any device, any dtype.

Letters as in `ops`; I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimkv_core.gates import RetentionGate
from trimkv_core.lean.families import DecoderModules, LayerModules, Norm
from trimkv_core.lean.ops import AttentionInput


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """Layers of one input as one product: weight [O, K], bias [O] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total += the layers' output."""
        total.addmm_(x, self.weight.t())
        if self.bias is not None:
            total += self.bias


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer's fused weights; `projection` ends with the gate's first layer where there is a gate."""

    projection: FusedLinear
    output: FusedLinear
    mlp: FusedLinear
    down: FusedLinear
    input_norm: Norm
    mlp_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    gate: RetentionGate | None


class TorchOps:
    """See `LeanOps`."""

    name = "torch"

    def __init__(self, modules: DecoderModules) -> None:
        self._embedding = modules.embedding
        self._head = modules.head
        self._norm = modules.norm
        self._num_heads = modules.num_heads
        self._num_query_heads = modules.num_query_heads
        self._head_dim = modules.head_dim

    def pack(self, layer: LayerModules) -> PackedLayer:
        # The gate reads what attention reads: its first layer rides along in the same product.
        first = () if layer.gate is None else (layer.gate.linear1,)
        return PackedLayer(
            projection=_fuse((*layer.attention, *first)),
            output=_fuse((layer.output,)),
            mlp=_fuse(layer.mlp),
            down=_fuse((layer.down,)),
            input_norm=layer.input_norm,
            mlp_norm=layer.mlp_norm,
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
            gate=layer.gate,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self._embedding.weight)

    def before_attention(self, layer: PackedLayer, hidden: Tensor, cos: Tensor, sin: Tensor) -> AttentionInput:
        projected = layer.projection(_rms_norm(hidden, layer.input_norm))
        columns = (self._num_query_heads + 2 * self._num_heads) * self._head_dim
        heads = projected[:, :columns].view(hidden.shape[0], -1, self._head_dim)
        query, key, value = torch.split(heads, [self._num_query_heads, self._num_heads, self._num_heads], 1)
        if layer.query_norm is not None:
            query = _rms_norm(query, layer.query_norm)
        if layer.key_norm is not None:
            key = _rms_norm(key, layer.key_norm)
        log_beta = None if layer.gate is None else layer.gate.from_first_layer(projected[:, columns:])
        return AttentionInput(_rotate(query, cos, sin), _rotate(key, cos, sin), value, log_beta)

    def after_attention(self, layer: PackedLayer, mixed: Tensor, hidden: Tensor) -> None:
        layer.output.add_to(hidden, mixed)
        gate, up = layer.mlp(_rms_norm(hidden, layer.mlp_norm)).chunk(2, -1)
        layer.down.add_to(hidden, F.silu(gate) * up)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(_rms_norm(hidden, self._norm), self._head.weight, self._head.bias)


def _fuse(linears: Sequence[nn.Linear]) -> FusedLinear:
    weights = [linear.weight.detach() for linear in linears]
    biases = [linear.bias for linear in linears]
    bias = None
    if any(part is not None for part in biases):
        parts = [
            weight.new_zeros(weight.shape[0]) if part is None else part.detach()
            for weight, part in zip(weights, biases, strict=True)
        ]
        bias = torch.cat(parts)
    return FusedLinear(weights[0] if len(weights) == 1 else torch.cat(weights), bias)


def _rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """As the models round it: statistics in float32, the weight applied in the model's dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * normed.to(x.dtype)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first dimensions of [T, heads, D]: cos, sin [T, rotated dimensions]."""
    size = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    turned = states[..., :size]
    low, high = turned.chunk(2, -1)
    result = turned * cos + torch.cat([-high, low], -1) * sin
    return result if size == states.shape[-1] else torch.cat([result, states[..., size:]], -1)

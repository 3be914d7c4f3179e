"""Lean layers on GPUs: library matmuls, and one Triton kernel for each thing between them.

Letters as in `ops`; I intermediate size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_core.gates import TwoLayerGate
from trimkv_core.kernels.fused import add_rms_norm, gate_log_beta, qk_norm_rope, silu_mul
from trimkv_core.lean.families import Norm
from trimkv_core.lean.ops import AttentionInput
from trimkv_core.lean.torch_ops import PackedLayer, TorchOps


class TritonOps(TorchOps):
    """See `LeanOps`."""

    name = "triton"

    def before_attention(self, layer: PackedLayer, hidden: Tensor, cos: Tensor, sin: Tensor) -> AttentionInput:
        projected = layer.projection(_norm(hidden, layer.input_norm))
        tokens, dim = hidden.shape[0], self._head_dim
        query = projected.new_empty(tokens, self._num_query_heads, dim)
        key = projected.new_empty(tokens, self._num_heads, dim)
        qk_norm_rope(
            projected,
            cos=cos,
            sin=sin,
            q_weight=None if layer.query_norm is None else layer.query_norm.weight,
            k_weight=None if layer.key_norm is None else layer.key_norm.weight,
            eps=0.0 if layer.query_norm is None else layer.query_norm.eps,
            q_out=query,
            k_out=key,
        )
        first = (self._num_query_heads + self._num_heads) * dim
        columns = first + self._num_heads * dim
        value = projected[:, first:columns].view(tokens, -1, dim)
        return AttentionInput(query, key, value, self._log_beta(layer, projected[:, columns:]))

    def _log_beta(self, layer: PackedLayer, features: Tensor) -> Tensor | None:
        gate = layer.gate
        if gate is None:
            return None
        if isinstance(gate, TwoLayerGate):
            features = gate.linear2(torch.nn.functional.silu(features))
        out = torch.empty(features.shape[0], self._num_heads, dtype=torch.float32, device=features.device)
        gate_log_beta(features, weight=gate.last_projection().weight, bias=gate.bias, out=out)
        return out

    def after_attention(self, layer: PackedLayer, mixed: Tensor, hidden: Tensor) -> None:
        layer.output.add_to(hidden, mixed)
        gate_up = layer.mlp(_norm(hidden, layer.mlp_norm))
        active = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        silu_mul(gate_up, out=active)
        layer.down.add_to(hidden, active)

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(_norm(hidden, self._norm), self._head.weight, self._head.bias)


def _norm(x: Tensor, norm: Norm) -> Tensor:
    out = torch.empty_like(x)
    add_rms_norm(x, None, weight=norm.weight, eps=norm.eps, out=out)
    return out

"""Lean layers on the CPU in float32: weights packed for tiles, buffers that are kept, kernels compiled by numba.

Letters as in `ops`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimkv_core.cpu.attention import use_threads
from trimkv_core.cpu.layer import Buffers, LayerWeights, after_attention, before_attention
from trimkv_core.cpu.linear import Packed, multiply, pack_linear
from trimkv_core.cpu.pointwise import rms_norm
from trimkv_core.cpu.vector import LANES
from trimkv_core.gates import RetentionGate, TwoLayerGate
from trimkv_core.lean.families import DecoderModules, LayerModules
from trimkv_core.lean.ops import AttentionInput

_NOTHING = np.zeros(0, np.float32)
_NO_LAYER = Packed(np.zeros((0, 1, LANES), np.float32), _NOTHING)


class NumbaOps:
    """See `LeanOps`. Results of a kind share one buffer."""

    name = "numba"

    def __init__(self, modules: DecoderModules) -> None:
        self._modules = modules
        self._last_projections: dict[int, Packed] = {}
        self._vocabulary = modules.head.out_features
        self._head = pack_linear([modules.head.weight], [modules.head.bias])
        # A row of a packed weight is found again as quickly: tied weights need no second copy.
        is_tied = modules.embedding.weight is modules.head.weight
        self._panels = torch.from_numpy(self._head.panels)
        self._embedding = None if is_tied else modules.embedding.weight.detach()
        self._buffers: Buffers | None = None
        self._current: tuple[int, Buffers, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None

    @staticmethod
    def supports(modules: DecoderModules) -> bool:
        """Whether rows of hidden states are whole tiles."""
        return modules.embedding.embedding_dim % LANES == 0

    def pack(self, layer: LayerModules) -> LayerWeights:
        gate = layer.gate
        first = [] if gate is None else [gate.linear1]
        packed = LayerWeights(
            input_norm=layer.input_norm.weight.numpy(),
            mlp_norm=layer.mlp_norm.weight.numpy(),
            query_norm=_NOTHING if layer.query_norm is None else layer.query_norm.weight.numpy(),
            key_norm=_NOTHING if layer.key_norm is None else layer.key_norm.weight.numpy(),
            norm_eps=np.float32(layer.input_norm.eps),
            head_eps=np.float32(0.0 if layer.query_norm is None else layer.query_norm.eps),
            projection=_pack(*layer.attention, *first),
            gate_inner=_pack(gate.linear2) if isinstance(gate, TwoLayerGate) else _NO_LAYER,
            gate_last=_NO_LAYER if gate is None else self._pack_last(gate),
            output=_pack(layer.output),
            mlp=_pack(*layer.mlp),
            down=_pack(layer.down),
        )
        if self._buffers is None:
            self._buffers = self._make_buffers(packed, layer)
        return packed

    def embed(self, token_ids: Tensor) -> Tensor:
        use_threads(torch.get_num_threads())
        if self._embedding is not None:
            return F.embedding(token_ids, self._embedding)
        return self._panels[token_ids // LANES, :, token_ids % LANES]

    def before_attention(self, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor) -> AttentionInput:
        buffers, (query, key, value, log_beta) = self._rows(hidden.shape[0])
        before_attention(layer, buffers, hidden.numpy(), cos.numpy(), sin.numpy())
        return AttentionInput(query, key, value, log_beta if buffers.gate_active.shape[1] else None)

    def after_attention(self, layer: LayerWeights, mixed: Tensor, hidden: Tensor) -> None:
        buffers, _ = self._rows(hidden.shape[0])
        after_attention(layer, buffers, mixed.numpy(), hidden.numpy())

    def logits(self, hidden: Tensor) -> Tensor:
        norm = self._modules.norm
        normed, out = torch.empty_like(hidden), torch.empty(hidden.shape[0], self._head.panels.shape[0] * LANES)
        rms_norm(hidden.numpy(), norm.weight.numpy(), np.float32(norm.eps), normed.numpy())
        multiply(self._head, normed.numpy(), out.numpy(), False)
        return out[:, : self._vocabulary]

    def _pack_last(self, gate: RetentionGate) -> Packed:
        """Tied gates share the last projection over all layers."""
        last = gate.last_projection().weight
        if id(last) not in self._last_projections:
            self._last_projections[id(last)] = pack_linear([last], [gate.bias])
        return self._last_projections[id(last)]

    def _make_buffers(self, packed: LayerWeights, layer: LayerModules) -> Buffers:
        """Buffers of one row; all layers have the same widths."""
        modules = self._modules
        dim, heads = modules.head_dim, modules.num_heads
        gate_width = 0 if layer.gate is None else layer.gate.linear1.out_features
        shapes: Any = {
            "normed": (modules.embedding.embedding_dim,),
            "projected": (_width(packed.projection),),
            "query": (modules.num_query_heads, dim),
            "key": (heads, dim),
            "value": (heads, dim),
            "gate_active": (gate_width,),
            "gate_hidden": (_width(packed.gate_inner),),
            "gate_heads": (_width(packed.gate_last),),
            "log_beta": (heads,),
            "gate_up": (_width(packed.mlp),),
            "active": (layer.down.in_features,),
        }
        return Buffers(**{name: np.zeros((1, *shape), np.float32) for name, shape in shapes.items()})

    def _rows(self, rows: int) -> tuple[Buffers, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The first `rows` rows of the buffers, and as tensors what attention takes of them."""
        if self._current is not None and self._current[0] == rows:
            return self._current[1:]
        if self._buffers is None:
            raise RuntimeError("no layer has been packed")
        if self._buffers.normed.shape[0] < rows:
            grown = (np.zeros((rows, *buffer.shape[1:]), np.float32) for buffer in self._buffers)
            self._buffers = Buffers(*grown)
        part = Buffers(*(buffer[:rows] for buffer in self._buffers))
        query, key, value, log_beta = (
            torch.from_numpy(array) for array in (part.query, part.key, part.value, part.log_beta)
        )
        self._current = (rows, part, (query, key, value, log_beta))
        return self._current[1:]


def _pack(*linears: nn.Linear) -> Packed:
    return pack_linear([linear.weight for linear in linears], [linear.bias for linear in linears])


def _width(layer: Packed) -> int:
    return int(layer.panels.shape[0]) * LANES

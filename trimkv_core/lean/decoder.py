"""One packed forward through a decoder's loaded weights, equal to the overlay's.

Owns the order of a layer's operations. Who computes them is `LeanOps`' business, where entries go and what attention
sees is the step's.

Letters: T tokens of the packed batch, E hidden size, H KV heads, G query heads a KV head, D head dimension, V
vocabulary, N rows whose logits are wanted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimkv_core.attention.base import LayerStep
from trimkv_core.lean.families import DecoderModules, LayerModules, read_decoder
from trimkv_core.lean.ops import LeanOps
from trimkv_core.lean.torch_ops import TorchOps


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's weights, as its operations have packed them, and what attention must know of it."""

    packed: Any
    scale: float
    window: int | None


class LeanDecoder:
    """Runs packed steps over the weights of a loaded model.

    Attributes:
        name: what start-up lines call it.
        num_query_heads: H·G.
    """

    def __init__(self, modules: DecoderModules, ops: LeanOps, *, frees_weights: bool = False) -> None:
        self.name = f"lean {ops.name}"
        self._ops = ops
        self.num_query_heads = modules.num_query_heads
        self._rotary = modules.rotary
        self._layers = []
        for layer in modules.layers:
            self._layers.append(_Layer(ops.pack(layer), layer.scale, layer.window))
            if frees_weights:
                _free(layer)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, position: Tensor, step: LayerStep, wanted: Tensor | None) -> Tensor:
        """Feed a packed batch and write its entries.

        Args:
            token_ids: int64 [T].
            position: int32 [T].
            step: where the entries go; its batch has T tokens.
            wanted: int64 [N], tokens whose next token's logits are asked for; None: all.

        Returns:
            [N, V], the model's dtype.
        """
        ops = self._ops
        hidden = ops.embed(token_ids)
        cos, sin = (part[0] for part in self._rotary(hidden[None], position[None].long()))
        for number, layer in enumerate(self._layers):
            query, key, value, log_beta = ops.before_attention(layer.packed, hidden, cos, sin)
            mixed = step.layer(number, query, key, value, log_beta=log_beta, scale=layer.scale, window=layer.window)
            ops.after_attention(layer.packed, mixed.flatten(1), hidden)
        return ops.logits(hidden if wanted is None else hidden.index_select(0, wanted))


def _free(layer: LayerModules) -> None:
    """Drop the weights that are packed now: a module that is run by mistake fails instead of answering wrongly."""
    first = () if layer.gate is None else (layer.gate.linear1,)
    for linear in (*layer.attention, *first, layer.output, *layer.mlp, layer.down):
        linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)


def make_lean_decoder(model: PreTrainedModel, *, frees_weights: bool = False) -> LeanDecoder | None:
    """A lean decoder with the best operations for the model's device and dtype; None for an unknown family.

    Args:
        model: loaded, with its gates if it has any.
        frees_weights: the model itself will not be run any more.
    """
    modules = read_decoder(model)
    if modules is None:
        return None
    return LeanDecoder(modules, _choose_ops(model, modules)(modules), frees_weights=frees_weights)


def _choose_ops(model: Any, modules: DecoderModules) -> Callable[[DecoderModules], LeanOps]:
    """The best operations that can be imported here."""
    if model.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from trimkv_core.lean.triton_ops import TritonOps

        return TritonOps
    if model.device.type == "cpu" and model.dtype == torch.float32 and importlib.util.find_spec("numba") is not None:
        from trimkv_core.lean.numba_ops import NumbaOps

        return NumbaOps if NumbaOps.supports(modules) else TorchOps
    return TorchOps

"""Where a decoder family keeps its weights: what the lean step needs of a loaded model, layer after layer.

Owns the table of families. A model that is not in it, or that does something the step does not, runs through the
overlay. Knows no attention and no kernels.

Letters: E hidden size, D head dimension, H KV heads, G query heads a KV head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from trimkv_core.gates import RetentionGate


@dataclass(frozen=True, slots=True)
class _Family:
    """How the modules of a family are called.

    Attributes:
        attention: projections whose outputs, side by side, are query, key and value.
        mlp: projections whose outputs, side by side, are gate and up.
        has_window: whether layers may have a sliding window.
    """

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj")
    has_window: bool = False


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(has_window=True),
    "qwen2": _Family(has_window=True),
    "qwen3": _Family(has_window=True),
    "phi3": _Family(attention=("qkv_proj",), mlp=("gate_up_proj",), has_window=True),
}


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm: weight [E] or [D], and its epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class LayerModules:
    """One decoder layer.

    Attributes:
        attention: linear modules whose outputs side by side are query, key and value.
        output, mlp, down: linear modules; `mlp`'s outputs side by side are gate and up.
        input_norm, mlp_norm: before attention, before the MLP.
        query_norm, key_norm: per head, None without.
        gate: retention gate, None without.
        scale: of the logits.
        window: the layer's sliding window, None without.
    """

    attention: tuple[nn.Linear, ...]
    output: nn.Linear
    mlp: tuple[nn.Linear, ...]
    down: nn.Linear
    input_norm: Norm
    mlp_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    gate: RetentionGate | None
    scale: float
    window: int | None


@dataclass(frozen=True, slots=True)
class DecoderModules:
    """A whole decoder.

    Attributes:
        layers: from the first to the last.
        norm: the last one.
        embedding: token embedding.
        head: to the vocabulary.
        rotary: the model's own RoPE module.
        num_query_heads, num_heads, head_dim: H·G, H, D.
    """

    layers: tuple[LayerModules, ...]
    norm: Norm
    embedding: nn.Embedding
    head: nn.Linear
    rotary: nn.Module
    num_query_heads: int
    num_heads: int
    head_dim: int


def read_decoder(model: PreTrainedModel) -> DecoderModules | None:
    """The modules of a loaded model; None for one that the lean step does not know."""
    config: Any = model.config
    family = _FAMILIES.get(config.model_type)
    if family is None or config.hidden_act != "silu":
        return None
    decoder: Any = model.get_decoder()
    return DecoderModules(
        layers=tuple(_read_layer(layer, family, config) for layer in decoder.layers),
        norm=_norm(decoder.norm),
        embedding=decoder.embed_tokens,
        head=model.lm_head,
        rotary=decoder.rotary_emb,
        num_query_heads=config.num_attention_heads,
        num_heads=config.num_key_value_heads,
        head_dim=decoder.layers[0].self_attn.head_dim,
    )


def _read_layer(layer: Any, family: _Family, config: Any) -> LayerModules:
    attention = layer.self_attn
    # Qwen decides by layer and keeps the answer there; Mistral and Phi-3 have one window for all.
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    if hasattr(attention, "layer_type") and not hasattr(attention, "sliding_window"):
        window = None
    return LayerModules(
        attention=tuple(getattr(attention, name) for name in family.attention),
        output=attention.o_proj,
        mlp=tuple(getattr(layer.mlp, name) for name in family.mlp),
        down=layer.mlp.down_proj,
        input_norm=_norm(layer.input_layernorm),
        mlp_norm=_norm(layer.post_attention_layernorm),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        gate=getattr(attention, "retention_gate", None),
        scale=attention.scaling,
        window=window if family.has_window else None,
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), float(module.variance_epsilon))

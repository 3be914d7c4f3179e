"""Gates and paged attention on any `transformers` decoder, without a copied modelling file.

Every attention layer gets a `retention_gate` and a hook that runs before it: the hook computes log β from the layer's
input and hands it, with the cache, down the attention keyword arguments to one registered attention function. Knows
how `transformers` calls attention; does not know where caches come from.

Letters: L layers, H KV heads, G query heads a KV head, D head dimension, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimkv_core.gates import RetentionGate

ATTENTION_NAME = "trimkv"
# `transformers` renamed the cache argument in 5.24; older releases are met on GPU machines.
_CACHE_ARGUMENTS = ("cache", "past_key_values")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAttention:
    """One layer's attention call, as `transformers` makes it.

    Attributes:
        query: [batch, H·G, tokens, D].
        key, value: [batch, H, tokens, D].
        padding: bool [batch, seen + tokens], False for padding; None: no padding.
        log_beta: float32 [batch, tokens, H]; None without a gate.
        scale: of the logits.
        window: the layer's own sliding window, None without one.
        num_layers: L, of the model that calls.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    padding: Tensor | None
    log_beta: Tensor | None
    scale: float
    window: int | None
    num_layers: int


class StepCache(Cache):
    """What the model is handed as its cache: attention goes through it to the pages.

    The base class's own storage stays empty: keys and values go to the pages in the attention function.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self._num_layers = num_layers

    def attend(self, layer: int, attention: LayerAttention) -> Tensor:
        """Run one layer's attention over the pages: [batch, tokens, H·G, D]."""
        raise NotImplementedError

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise NotImplementedError

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._num_layers

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self._num_layers

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * self._num_layers

    @property
    def is_initialized(self) -> bool:
        return True

    def __len__(self) -> int:
        return self._num_layers


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    trimkv_cache: StepCache | None = None,
    log_beta: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with `transformers`: pages if the hook brought some, plain attention if not."""
    if trimkv_cache is None:
        mask = _dense_mask(query, key, attention_mask, sliding_window)
        result, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
        return result, None
    call = LayerAttention(
        query=query,
        key=key,
        value=value,
        padding=attention_mask,
        log_beta=log_beta,
        scale=scaling,
        window=sliding_window,
        num_layers=module.config.num_hidden_layers,  # type: ignore[union-attr, arg-type]
    )
    return trimkv_cache.attend(int(module.layer_idx), call), None  # type: ignore[arg-type]


def _hand_mask_on(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask function registered with `transformers`: the 2-D padding mask reaches the layers as it is."""
    return attention_mask


def _dense_mask(query: Tensor, key: Tensor, padding: Tensor | None, window: int | None) -> Tensor:
    """Causal bool mask [batch or 1, 1, tokens, keys] for a cache that is not ours."""
    tokens, keys = query.shape[2], key.shape[2]
    at = torch.arange(keys - tokens, keys, device=query.device)[:, None]
    seen = torch.arange(keys, device=query.device)
    mask = seen <= at
    if window is not None:
        mask &= seen > at - window
    if padding is None:
        return mask[None, None]
    # A row of padding sees itself: a softmax over nothing would be NaN and spread.
    return (mask & padding[:, None, None, -keys:].bool()) | (seen == at)


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    cache = next((kwargs[name] for name in _CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
    if not isinstance(cache, StepCache):
        return args, kwargs
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    gate = getattr(module, "retention_gate", None)
    extra = {"trimkv_cache": cache, "log_beta": None if gate is None else gate(hidden)}
    return args, {**kwargs, **extra}


def register_attention() -> None:
    """Make `attn_implementation="trimkv"` known to `transformers`."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _hand_mask_on)


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of a decoder, layer after layer."""
    return [layer.self_attn for layer in model.get_decoder().layers]


def lay_over(model: PreTrainedModel) -> None:
    """Hook paged attention into every layer of a loaded decoder; a layer's `retention_gate` is used if it has one."""
    register_attention()
    model.config._attn_implementation = ATTENTION_NAME
    for attention in attention_layers(model):
        attention.register_forward_pre_hook(_before_attention, with_kwargs=True)


def gates_of(model: PreTrainedModel) -> list[RetentionGate]:
    """The gates of a model, empty without any."""
    gates = [getattr(attention, "retention_gate", None) for attention in attention_layers(model)]
    return [gate for gate in gates if isinstance(gate, RetentionGate)]


def fix_rope(model: PreTrainedModel, max_model_len: int) -> str | None:
    """Fix a RoPE that depends on the longest sequence to what `max_model_len` asks for.

    Left alone, the frequencies of one sequence would follow the longest one in its batch, and cached keys would not
    match later queries.

    Returns:
        One line for the operator, None if the model's RoPE does not depend on length.
    """
    rotary = model.get_decoder().rotary_emb
    kind = getattr(rotary, "rope_type", None)
    if not isinstance(kind, str) or not (kind == "longrope" or "dynamic" in kind):
        return None
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](rotary.config, rotary.inv_freq.device, seq_len=max_model_len)
    rotary.register_buffer("inv_freq", frequencies.to(rotary.inv_freq), persistent=False)
    rotary.original_inv_freq = rotary.inv_freq
    rotary.attention_scaling = scaling
    rotary.rope_type = "default"  # the per-forward update looks at this name
    return f"RoPE '{kind}' is fixed for sequences of up to {max_model_len} tokens"

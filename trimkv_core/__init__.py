"""DBTrimKV: one KV budget per sequence, shared by all layers and heads, on any `transformers` decoder."""

from trimkv_core.cache import PagedTrimKVCache, TrimKVCache
from trimkv_core.models import (
    TrimKVForCausalLM,
    TrimKVLlamaForCausalLM,
    TrimKVMistralForCausalLM,
    TrimKVPhi3ForCausalLM,
    TrimKVQwen2ForCausalLM,
    TrimKVQwen3ForCausalLM,
)

__all__ = [
    "PagedTrimKVCache",
    "TrimKVCache",
    "TrimKVForCausalLM",
    "TrimKVLlamaForCausalLM",
    "TrimKVMistralForCausalLM",
    "TrimKVPhi3ForCausalLM",
    "TrimKVQwen2ForCausalLM",
    "TrimKVQwen3ForCausalLM",
]

"""DBTrimKV: one KV budget per sequence, shared by all layers and heads, on any `transformers` decoder.

The names below are imported when they are first used: what only needs a budget does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "trimkv_core.cache" if name.endswith("Cache") else "trimkv_core.models"
    return getattr(import_module(module), name)

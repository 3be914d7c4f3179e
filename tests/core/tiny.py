"""Random models of a few thousand weights, one a family, with gates over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trimkv_core import TrimKVForCausalLM
from trimkv_core.checkpoint import GateConfig, save_gates
from trimkv_core.gates import GateKind, build_gates

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    # Layers with a sliding window of their own.
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 9}),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
}


def save_base(folder: Path, family: str, **overrides: Any) -> Any:
    """Write a random base model and return it as plain `transformers` runs it."""
    model_class, config_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**(SIZES | extra | overrides))).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def save_random_gates(folder: Path, base: Path, *, kind: GateKind = GateKind.RG10, **overrides: Any) -> GateConfig:
    """Write a gate checkpoint with random weights over a tiny base."""
    torch.manual_seed(1)
    config = GateConfig(
        **{
            "base_model": str(base),
            "kind": kind,
            "intermediate_size": 8,
            "is_tied": kind is GateKind.RG10,
            "is_global": kind is GateKind.RG10,
            "memory_size": 8,
            "bias_init": 3.0,
        }
        | overrides
    )
    gates = build_gates(config.shape(hidden_size=32, num_heads=2, num_layers=3), dtype=torch.float32)
    for gate in gates:
        for parameter in gate.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.7)
    save_gates(gates, config, folder)
    return config


def load(folder: Path, family: str, **overrides: Any) -> tuple[Any, Any]:
    """A plain model and the same with gates."""
    plain = save_base(folder / "base", family, **overrides)
    save_random_gates(folder / "gates", folder / "base")
    return plain, TrimKVForCausalLM.from_pretrained(str(folder / "gates"), dtype=torch.float32)

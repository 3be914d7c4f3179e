"""The benchmark's model: random weights in the shape of a real one, built on the device and saved nowhere.

Owns how weights and gates are drawn. Knows no cache and no clock.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_sizes import Sizes
from transformers import AutoModelForCausalLM, Qwen3Config

from trimkv_core.gates import GateKind, GateShape, RetentionGate, build_gates
from trimkv_core.overlay import ATTENTION_NAME, attention_layers, lay_over, register_attention

# What the last projection and the bias of random gates are drawn from: log β between -1 and -1e-4, different enough
# from head to head that streams end up as unequal as those of trained gates.
_PROJECTION_STD = 3.0
_BIAS_MEAN, _BIAS_STD = 6.0, 1.5


def model_config(sizes: Sizes) -> Qwen3Config:
    """The config of the model."""
    rope = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    return Qwen3Config(**sizes.model, rope_parameters=rope, eos_token_id=None, pad_token_id=None, bos_token_id=None)


def gate_shape(sizes: Sizes) -> GateShape:
    """The shape of the gates over it."""
    return GateShape(
        kind=GateKind.RG10,
        hidden_size=sizes.model["hidden_size"],
        intermediate_size=sizes.gate_width,
        num_heads=sizes.model["num_key_value_heads"],
        num_layers=sizes.model["num_hidden_layers"],
        is_tied=True,
    )


def build_model(sizes: Sizes, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random gates and paged attention laid over it."""
    register_attention()
    model = _build(sizes, device=device, dtype=dtype, attention=ATTENTION_NAME)
    lay_over(model)
    with torch.device(device):
        gates = build_gates(gate_shape(sizes), device=device, dtype=dtype)
    _draw_gates(gates)
    for attention, gate in zip(attention_layers(model), gates, strict=True):
        attention.retention_gate = gate.eval()
    return model


def build_plain_model(sizes: Sizes, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The model as `transformers` runs it, with SDPA."""
    return _build(sizes, device=device, dtype=dtype, attention="sdpa")


def _build(sizes: Sizes, *, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config(sizes), dtype=dtype, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _draw_gates(gates: list[RetentionGate]) -> None:
    last = gates[0].last_projection().weight
    last.normal_(std=_PROJECTION_STD)
    gates[0].bias.normal_(_BIAS_MEAN, _BIAS_STD)
    for gate in gates:
        gate.requires_grad_(False)
        for name, parameter in gate.named_parameters():
            # Else a layer's gates would all say nearly the same: a default bias outweighs what tokens differ in.
            if parameter is not last and name.endswith(("linear1.weight", "linear2.weight")):
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)

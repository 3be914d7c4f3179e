"""The fused kernels as Qwen3-4B asks for them, for a compiler: name, function, signature, constants."""

from __future__ import annotations

from typing import Any

from trimkv_core.kernels.fused import (
    add_rms_norm_kernel,
    gate_log_beta_kernel,
    qk_norm_rope_kernel,
    silu_mul_kernel,
)


def _signature(function: Any, pointers: dict[str, str], constants: dict[str, Any], **others: str) -> dict[str, str]:
    """Types of a kernel's arguments, in its order: what is neither pointer nor constant nor in `others` is a stride."""
    known = {**pointers, **others, **dict.fromkeys(constants, "constexpr")}
    return {name: known.get(name, "i32") for name in function.arg_names}


_NORM = {"E": 2560, "E_PADDED": 4096}
_ROPE = {"HQ": 32, "H": 8, "D": 128, "D_PADDED": 128, "R": 128, "HAS_Q_NORM": True, "HAS_K_NORM": True, "HEADS": 4}
_SILU = {"WIDTH": 9728, "COLUMNS": 1024}
_GATE = {"H": 8, "H_PADDED": 8, "WIDTH": 512, "COLUMNS": 256}
_NORM_POINTERS = dict.fromkeys(("x", "residual", "weight", "out", "residual_out"), "*bf16")
_ROPE_POINTERS = dict.fromkeys(("qkv", "cos", "sin", "q_weight", "k_weight", "q_out", "k_out"), "*bf16")
_GATE_POINTERS = {"features": "*bf16", "weight": "*fp32", "bias": "*fp32", "out": "*fp32"}


def _entry(
    name: str, function: Any, pointers: dict[str, str], constants: dict[str, Any], **others: str
) -> tuple[str, Any, dict[str, str], dict[str, Any]]:
    return name, function, _signature(function, pointers, constants, **others), constants


FUSED_KERNELS: tuple[tuple[str, Any, dict[str, str], dict[str, Any]], ...] = (
    _entry("add_rms_norm", add_rms_norm_kernel, _NORM_POINTERS, {**_NORM, "HAS_RESIDUAL": True}, eps="fp32"),
    _entry("rms_norm", add_rms_norm_kernel, _NORM_POINTERS, {**_NORM, "HAS_RESIDUAL": False}, eps="fp32"),
    _entry("qk_norm_rope", qk_norm_rope_kernel, _ROPE_POINTERS, _ROPE, eps="fp32"),
    _entry(
        "rope, Phi-3",
        qk_norm_rope_kernel,
        _ROPE_POINTERS,
        {**_ROPE, "HAS_Q_NORM": False, "HAS_K_NORM": False, "R": 96},
        eps="fp32",
    ),
    _entry("qk_norm_rope, keys only", qk_norm_rope_kernel, _ROPE_POINTERS, {**_ROPE, "HAS_Q_NORM": False}, eps="fp32"),
    _entry("silu_mul", silu_mul_kernel, dict.fromkeys(("gate_up", "out"), "*bf16"), _SILU),
    _entry("gate_log_beta", gate_log_beta_kernel, _GATE_POINTERS, _GATE),
)

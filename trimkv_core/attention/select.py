"""Which attention backend runs."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from trimkv_core.attention.base import AttentionBackend
from trimkv_core.attention.torch import TorchBackend
from trimkv_core.fp8 import FP8

BACKENDS = ("torch", "numba", "triton", "flash")
_WIDE = (torch.float32, torch.bfloat16)
# The GPUs whose kernels convert 8-bit floats of this kind.
_FP8_MIN_CAPABILITY = (8, 9)


def select_backend(
    name: str = "auto",
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
) -> AttentionBackend[Any]:
    """The backend called `name`; for `auto` the best that is there for a device and dtype, the reference without them.

    Args:
        name: of the backend, or `auto`.
        device: where it runs.
        dtype: of the model.
        kv_dtype: of stored keys and values; None: the model's.

    Raises:
        ValueError: no such backend, or it cannot serve that device and those types.
    """
    is_fp8 = kv_dtype == FP8
    if name == "auto":
        name = _best(device, dtype, is_fp8=is_fp8) if device is not None else TorchBackend.name
    if name == TorchBackend.name:
        return TorchBackend()
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown: use 'auto' or one of {', '.join(BACKENDS)}")
    if device is not None:
        _check(name, device, dtype)
    if is_fp8:
        _check_fp8(name, device)
    try:
        if name == "numba":
            from trimkv_core.attention.numba import NumbaBackend

            return NumbaBackend()
        if name == "triton":
            from trimkv_core.attention.triton import TritonBackend

            return TritonBackend()
        from trimkv_core.attention.flash import FlashBackend

        return FlashBackend()
    except ImportError as error:
        raise ValueError(f"backend={name!r} needs a package that is not here: {error}") from error


def _check(name: str, device: torch.device, dtype: torch.dtype | None) -> None:
    if name == "numba" and (device.type != "cpu" or dtype not in _WIDE):
        raise ValueError(f"backend='numba' serves float32 and bfloat16 on CPUs, not {dtype} on {device}")
    if name in {"triton", "flash"} and device.type != "cuda":
        raise ValueError(f"backend={name!r} serves GPUs, not {device}")


def _check_fp8(name: str, device: torch.device | None) -> None:
    if name != "triton":
        raise ValueError(
            f"kv_dtype='fp8_e4m3' is not possible with backend={name!r}: use backend 'triton' (GPUs) or 'torch', or "
            "kv_dtype 'auto'"
        )
    if device is not None and not _converts_fp8(device):
        raise ValueError(
            f"kv_dtype='fp8_e4m3' is not possible with backend='triton' on {device}, whose compute capability is below "
            f"{_FP8_MIN_CAPABILITY[0]}.{_FP8_MIN_CAPABILITY[1]}: use backend 'torch' or kv_dtype 'auto'"
        )


def _converts_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _FP8_MIN_CAPABILITY


def _best(device: torch.device, dtype: torch.dtype | None, *, is_fp8: bool) -> str:
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton" if not is_fp8 or _converts_fp8(device) else TorchBackend.name
    if is_fp8:
        return TorchBackend.name
    if device.type == "cpu" and dtype in _WIDE and importlib.util.find_spec("numba") is not None:
        return "numba"
    return TorchBackend.name

"""Keys and values as 8-bit floats: what is stored is float8_e4m3fn, and a float32 scale for each entry.

Pure functions, and the name that settings give this format. An entry is divided by amax / 448, so that its largest
element is the largest number of the format: three bits behind the point remain, half a step is a sixteenth of the
element at most. PyTorch's CPU operators know few 8-bit floats, so rows are copied as the bytes they are.

Letters: P pages, B entries a page, D head dimension, E entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
# Two float32 numbers an entry, one for its key and one for its value.
SCALE_BYTES = 8
# What `--kv-dtype` takes beside `auto`, which is the model's own.
KV_DTYPES = {"fp8_e4m3": FP8}


def choose_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of stored keys and values for a setting's value, `dtype` being the model's.

    Raises:
        ValueError: no such setting.
    """
    if name == "auto":
        return dtype
    if name not in KV_DTYPES:
        raise ValueError(f"kv_dtype={name!r} is unknown: use auto or {', '.join(KV_DTYPES)}")
    return KV_DTYPES[name]


def name_kv_dtype(dtype: torch.dtype) -> str:
    """What settings and start-up lines call a type of stored keys and values."""
    return next((name for name, known in KV_DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def scale_bytes_of(dtype: torch.dtype) -> int:
    """Bytes of the scales beside an entry's key and value: 0 unless they are 8-bit floats."""
    return SCALE_BYTES if dtype == FP8 else 0


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """Round to 8-bit floats: [E, D] → float8_e4m3fn [E, D] and float32 [E], as `kernels.append` does.

    An entry of zeros has scale 1.
    """
    wide = states.float()
    scale = wide.abs().amax(-1) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    return (wide / scale[..., None]).to(FP8), scale


def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` has rounded: float8_e4m3fn [..., D] and float32 [...] → [..., D] of `dtype`."""
    # All of the format fits the 16-bit types, and the product is rounded once: no float32 copy is made.
    return stored.to(dtype).mul_(scale[..., None])


def as_rows(storage: Tensor) -> Tensor:
    """[P, B, …] as rows [P·B, …] over the same memory; 8-bit floats as bytes."""
    rows = storage.view(-1, *storage.shape[2:])
    return rows.view(torch.uint8) if storage.dtype == FP8 else rows


def gather_pages(storage: Tensor, scale: Tensor | None, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values of whole pages.

    Args:
        storage: [P, B, D].
        scale: float32 [P, B]; None: the storage is read as it is.
        pages: int64 [N].
        dtype: of the result where there are scales.

    Returns:
        [N, B, D].
    """
    if scale is None:
        return storage.index_select(0, pages)
    stored = storage.view(torch.uint8).index_select(0, pages).view(FP8)
    return dequantise(stored, scale.index_select(0, pages), dtype)


def gather_slots(storage: Tensor, scale: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """As `gather_pages` for single entries: slots int64 [E], page · B + place → [E, D]."""
    stored = as_rows(storage).index_select(0, slots)
    if scale is None:
        return stored
    return dequantise(stored.view(FP8), scale.view(-1).index_select(0, slots), dtype)

"""Small host values to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values`, [n]. From pinned memory, since a copy from any other first waits for all queued work."""
    is_accelerated = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=is_accelerated).to(device, non_blocking=is_accelerated)

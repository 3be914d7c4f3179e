"""Which attention backend runs."""

from __future__ import annotations

from typing import Any

from trimkv_core.attention.base import AttentionBackend
from trimkv_core.attention.torch import TorchBackend

BACKENDS = ("torch",)


def select_backend(name: str = "auto") -> AttentionBackend[Any]:
    """The backend called `name`, or the best that is there for `auto`.

    Raises:
        ValueError: no such backend.
    """
    if name in {"auto", TorchBackend.name}:
        return TorchBackend()
    raise ValueError(f"backend={name!r} is unknown: use 'auto' or one of {', '.join(BACKENDS)}")

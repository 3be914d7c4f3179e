"""The capacity hinge: what makes gates forget at all.

Letters: L layers, H KV heads, T tokens of one document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Overrun:
    """The hinge's sum and over how many terms, so that documents can be averaged together.

    Attributes:
        total: scalar, Σ max(0, (S_t - B) / max(T_t - B, 1)).
        terms: scalar, how many of them are above 0.
    """

    total: Tensor
    terms: Tensor

    def mean(self) -> Tensor:
        """Mean over the terms above 0; 0 without any."""
        return self.total / self.terms.clamp(min=1.0)


def capacity_overrun(sums: Tensor, memory_size: float, *, is_global: bool) -> Overrun:
    """How far the soft size of one document exceeds its budget, as a share of the excess it would have undecayed.

    Source: the capacity loss of arXiv 2512.03324 (one budget a stream) and 2605.09649 (one for all), with the
    normalisation of trimkv 0.1.5: S_t is the retention sum, B the budget, T_t = t entries a stream, t from 0.

    Args:
        sums: float32 [L, H, T], of `retention_sums`.
        memory_size: M, entries a stream.
        is_global: one budget M·L·H over the sum of all streams; else M for each.
    """
    layers, heads, tokens = sums.shape
    seen = torch.arange(tokens, device=sums.device, dtype=sums.dtype)
    if is_global:
        streams = layers * heads
        sums, seen, budget = sums.sum((0, 1)), seen * streams, memory_size * streams
    else:
        budget = memory_size
    over = ((sums - budget) / (seen - budget).clamp(min=1.0)).clamp(min=0.0)
    return Overrun(over.sum(), (over > 0.0).sum().to(over.dtype))


def join_overruns(overruns: list[Overrun]) -> Overrun:
    """The overrun of several documents together."""
    return Overrun(torch.stack([o.total for o in overruns]).sum(), torch.stack([o.terms for o in overruns]).sum())

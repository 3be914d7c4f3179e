"""How much a stream still holds, softly: the retention sums Σ_{j ≤ t} exp f(log βⱼ · (t - j)), with their gradient.

The T×T matrix of retentions is never held: blocks of it are made, summed and dropped, in the backward pass again, so
that a stream costs O(T) memory. On a GPU a Triton kernel takes the blocks' place.

Letters: N streams, T tokens of one document.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimkv_core.training.shapes import DecayShape

_BLOCK = 128


def retention_sums(log_beta: Tensor, shape: DecayShape | None = None) -> Tensor:
    """Soft number of entries of every stream after every token (as trimkv 0.1.5).

    Args:
        log_beta: float32 [N, T], at most 0, of one document.
        shape: f; None: the papers'.

    Returns:
        float32 [N, T], at least 1.
    """
    result: Tensor = _RetentionSums.apply(log_beta, shape or DecayShape())  # type: ignore[no-untyped-call]
    return result


def _block(log_beta: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Ages [t, j] and scores [N, t, j] of tokens first ≤ t < last and entries j < last; ages below 0 are to come."""
    seen = torch.arange(first, last, device=log_beta.device, dtype=log_beta.dtype)
    age = seen[:, None] - torch.arange(last, device=log_beta.device, dtype=log_beta.dtype)
    return age, log_beta[:, None, :last] * age.clamp(min=0.0)


class _RetentionSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_beta: Tensor, shape: DecayShape) -> Tensor:
        ctx.save_for_backward(log_beta)
        ctx.shape = shape
        if log_beta.is_cuda:
            from trimkv_core.kernels.retention_sums import sum_retentions

            return sum_retentions(log_beta, epsilon=shape.epsilon, kappa=shape.kappa)
        tokens = log_beta.shape[1]
        result = torch.empty_like(log_beta)
        for first in range(0, tokens, _BLOCK):
            last = min(first + _BLOCK, tokens)
            age, score = _block(log_beta, first, last)
            result[:, first:last] = shape.bias(score).exp().masked_fill_(age < 0.0, 0.0).sum(-1)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (log_beta,), shape = ctx.saved_tensors, ctx.shape
        (grad,) = grads
        if log_beta.is_cuda:
            from trimkv_core.kernels.retention_sums import pull_retentions

            return pull_retentions(log_beta, grad, epsilon=shape.epsilon, kappa=shape.kappa), None
        result = torch.zeros_like(log_beta)
        tokens = log_beta.shape[1]
        for first in range(0, tokens, _BLOCK):
            last = min(first + _BLOCK, tokens)
            age, score = _block(log_beta, first, last)
            slope = shape.bias(score).exp().mul_(shape.slope(score)).mul_(age.clamp(min=0.0))
            result[:, :last] += torch.einsum("nt,ntj->nj", grad[:, first:last], slope)
        return result, None

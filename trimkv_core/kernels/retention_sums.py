"""The retention sums of training on a GPU: a program sums one tile of tokens over all entries before them.

    forward    S[n, t] = Σ_{j ≤ t} exp f(log β[n, j]·(t - j))                   a program: a stream, a tile of t
    backward   dlog β[n, j] = Σ_{t ≥ j} dS[n, t]·exp f(s)·f'(s)·(t - j)          a program: a stream, a tile of j

with f(s) = ε·s + (κ - ε)·min(s + 1, 0). Nothing of size T×T is stored.

Letters: N streams, T tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64


@triton.jit
def _retention(score, epsilon, kappa):
    return tl.exp(epsilon * score + (kappa - epsilon) * tl.minimum(score + 1.0, 0.0))


@triton.jit
def _forward(log_beta, sums, tokens, epsilon, kappa, TILE: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * tokens
    seen = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for first in range(0, (tl.program_id(1) + 1) * TILE, TILE):
        entry = first + tl.arange(0, TILE)
        beta = tl.load(log_beta + base + entry, mask=entry < tokens, other=0.0)
        # Entries down, tokens across: sums along columns take half the registers that sums along rows take.
        age = (seen[None, :] - entry[:, None]).to(tl.float32)
        retention = _retention(beta[:, None] * tl.maximum(age, 0.0), epsilon, kappa)
        is_past = (age >= 0.0) & (entry[:, None] < tokens)
        total += tl.sum(tl.where(is_past, retention, 0.0), axis=0)
    tl.store(sums + base + seen, total, mask=seen < tokens)


@triton.jit
def _backward(log_beta, grad, result, tokens, epsilon, kappa, TILE: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * tokens
    entry = tl.program_id(1) * TILE + tl.arange(0, TILE)
    beta = tl.load(log_beta + base + entry, mask=entry < tokens, other=0.0)
    total = tl.zeros([TILE], tl.float32)
    for first in range(tl.program_id(1) * TILE, tokens, TILE):
        seen = first + tl.arange(0, TILE)
        pull = tl.load(grad + base + seen, mask=seen < tokens, other=0.0)
        age = tl.maximum((seen[:, None] - entry[None, :]).to(tl.float32), 0.0)
        score = beta[None, :] * age
        slope = tl.where(score < -1.0, kappa, epsilon)
        total += tl.sum(pull[:, None] * _retention(score, epsilon, kappa) * slope * age, axis=0)
    tl.store(result + base + entry, total, mask=entry < tokens)


def sum_retentions(log_beta: Tensor, *, epsilon: float, kappa: float) -> Tensor:
    """The sums: float32 [N, T] both; shape parameters as in `training.shapes`."""
    log_beta = log_beta.contiguous()
    streams, tokens = log_beta.shape
    sums = torch.empty_like(log_beta)
    _forward[(streams, triton.cdiv(tokens, _TILE))](log_beta, sums, tokens, epsilon, kappa, TILE=_TILE)
    return sums


def pull_retentions(log_beta: Tensor, grad: Tensor, *, epsilon: float, kappa: float) -> Tensor:
    """The gradient of log β from that of the sums: float32 [N, T] all."""
    log_beta, grad = log_beta.contiguous(), grad.contiguous()
    streams, tokens = log_beta.shape
    result = torch.empty_like(log_beta)
    _backward[(streams, triton.cdiv(tokens, _TILE))](log_beta, grad, result, tokens, epsilon, kappa, TILE=_TILE)
    return result

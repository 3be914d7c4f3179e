"""Retention-gated attention for training: causal attention with a bias on every entry that says how far it has faded.

Owns two implementations that agree: `eager_attention` builds everything and leaves the gradient to autograd: the
reference. `blocked_attention` holds one block of queries at a time, in both directions, so that no T×T matrix outlives
its block. Both take one document; who packs several calls them one by one. Know no model. (GPUs: see `flex`.)

Letters: H KV heads, G query heads a KV head, D head dimension, T tokens of one document, K evictions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimkv_core.training.shapes import DecayShape

_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Decay:
    """The papers' bias: f(log βⱼ · (i - j)) on entry j for query i.

    Attributes:
        log_beta: float32 [H, T].
        shape: f.
    """

    log_beta: Tensor
    shape: DecayShape

    @property
    def source(self) -> Tensor:
        """What the gradient goes to."""
        return self.log_beta

    def without_source(self) -> Decay:
        """The same, holding no tensor: who keeps it keeps no memory alive."""
        return replace(self, log_beta=self.log_beta.new_empty(0))

    def bias(self, source: Tensor, first: int, last: int) -> Tensor:
        """Biases of queries first ≤ i < last on entries j < last: [H, i, j]; 0 where j > i."""
        return self.shape.bias(self._score(source, first, last))

    def pull(self, into: Tensor, source: Tensor, *, grad: Tensor, first: int, last: int) -> None:
        """Add the gradient of `source` from that of a block's biases [H, i, j] to `into`."""
        ages = self._ages(source, first, last)
        if not self.shape.is_plain:
            grad = grad * self.shape.slope(source[:, None, :last] * ages)
        into[:, :last] += torch.einsum("hij,ij->hj", grad, ages)

    @staticmethod
    def _ages(source: Tensor, first: int, last: int) -> Tensor:
        at = torch.arange(last, device=source.device, dtype=source.dtype)
        return (at[first:, None] - at).clamp(min=0.0)

    def _score(self, source: Tensor, first: int, last: int) -> Tensor:
        return source[:, None, :last] * self._ages(source, first, last)


@dataclass(frozen=True, slots=True)
class EvictionBias:
    """A bias that changes at evictions only: `table[h, k, j]` on entry j for the queries after the k-th eviction.

    Attributes:
        table: float32 [H, K, T]; row 0 before the first eviction.
        interval: tokens between evictions.
    """

    table: Tensor
    interval: int

    @property
    def source(self) -> Tensor:
        """What the gradient goes to."""
        return self.table

    def without_source(self) -> EvictionBias:
        """As `Decay.without_source`."""
        return replace(self, table=self.table.new_empty(0))

    def bias(self, source: Tensor, first: int, last: int) -> Tensor:
        """As `Decay.bias`."""
        rows = torch.arange(first, last, device=source.device) // self.interval
        if first // self.interval == (last - 1) // self.interval:
            rows = rows[:1]
        return source[:, rows, :last]

    def pull(self, into: Tensor, source: Tensor, *, grad: Tensor, first: int, last: int) -> None:
        """As `Decay.pull`."""
        # Only the few rows that the block reads, not zeros as large as the whole table for every block.
        lowest, highest = first // self.interval, (last - 1) // self.interval
        rows = torch.arange(first, last, device=source.device) // self.interval - lowest
        part = source.new_zeros(source.shape[0], highest + 1 - lowest, last).index_add_(1, rows, grad)
        into[:, lowest : highest + 1, :last] += part


Bias = Decay | EvictionBias


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Bias | None, scale: float, window: int | None = None
) -> Tensor:
    """Attention of one document, everything built at once.

    Args:
        query: [H·G, T, D].
        key, value: [H, T, D].
        bias: None: none.
        scale: of the logits.
        window: only entries above t - window are seen; None: all.

    Returns:
        [H·G, T, D], the query's dtype.
    """
    heads, tokens, _ = key.shape
    logits = (query.view(heads, -1, tokens, query.shape[-1]) @ key[:, None].transpose(-1, -2)).float() * scale
    if bias is not None:
        logits = logits + bias.bias(bias.source, 0, tokens)[:, None]
    logits = logits.masked_fill(~_visible(0, tokens, window, query.device), float("-inf"))
    return (logits.softmax(-1).to(value.dtype) @ value[:, None]).view_as(query)


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Bias | None, scale: float, window: int | None = None
) -> Tensor:
    """As `eager_attention`, a block of queries at a time, with a backward pass that makes each block anew."""
    source = query.new_empty(0) if bias is None else bias.source
    # Autograd keeps what it saves only as long as checkpointing lets it; what else is kept must hold no tensor.
    rule = None if bias is None else bias.without_source()
    result: Tensor = _Blocked.apply(query, key, value, source, rule, scale, window)  # type: ignore[no-untyped-call]
    return result


def _visible(first: int, last: int, window: int | None, device: torch.device) -> Tensor:
    """Which entries j < last the queries first ≤ i < last see: bool [i, j]."""
    at = torch.arange(last, device=device)
    visible = at <= at[first:, None]
    return visible if window is None else visible & (at > at[first:, None] - window)


@dataclass(frozen=True, slots=True)
class _Call:
    """What both passes need; `bias` holds no source of its own."""

    bias: Bias | None
    scale: float
    window: int | None

    def weights(self, query: Tensor, key: Tensor, source: Tensor, first: int, last: int) -> Tensor:
        """Attention weights of a block: float32 [H, G·i, j < last]."""
        heads = key.shape[0]
        block = query[:, first:last].reshape(heads, -1, query.shape[-1])
        logits = (block @ key[:, :last].transpose(1, 2)).float().mul_(self.scale)
        by_query = logits.view(heads, -1, last - first, last)
        if self.bias is not None:
            by_query += self.bias.bias(source, first, last)[:, None]
        if self.window is None:
            # Only the block's own square has entries to come.
            by_query[..., first:] += torch.full(
                (last - first, last - first), float("-inf"), device=logits.device
            ).triu_(1)
        else:
            by_query.masked_fill_(~_visible(first, last, self.window, logits.device), float("-inf"))
        return logits.softmax(-1)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - `apply` takes no keywords
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        source: Tensor,
        bias: Bias | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        call = _Call(bias, scale, window)
        _, tokens, dim = key.shape
        result = torch.empty_like(query)
        for first in range(0, tokens, _BLOCK):
            last = min(first + _BLOCK, tokens)
            weights = call.weights(query, key, source, first, last).to(value.dtype)
            result[:, first:last] = (weights @ value[:, :last]).view(-1, last - first, dim)
        ctx.save_for_backward(query, key, value, source)
        ctx.call = call
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, source = ctx.saved_tensors
        call: _Call = ctx.call
        heads, tokens, dim = key.shape
        needs_query, needs_key, needs_value, needs_source = ctx.needs_input_grad[:4]
        query_grad = torch.empty_like(query) if needs_query else None
        key_grad = torch.zeros_like(key, dtype=torch.float32) if needs_key else None
        value_grad = torch.zeros_like(value, dtype=torch.float32) if needs_value else None
        source_grad = torch.zeros_like(source) if needs_source else None
        for first in range(0, tokens, _BLOCK):
            last = min(first + _BLOCK, tokens)
            weights = call.weights(query, key, source, first, last)
            grad = grads[0][:, first:last].reshape(heads, -1, dim)
            if value_grad is not None:
                value_grad[:, :last] += (weights.to(grad.dtype).transpose(1, 2) @ grad).float()
            weight_grad = (grad @ value[:, :last].transpose(1, 2)).float()
            logit_grad = torch._softmax_backward_data(weight_grad, weights, -1, torch.float32)
            if source_grad is not None and call.bias is not None:
                summed = logit_grad.view(heads, -1, last - first, last).sum(1)
                call.bias.pull(source_grad, source, grad=summed, first=first, last=last)
            logit_grad = logit_grad.mul_(call.scale).to(query.dtype)
            if query_grad is not None:
                query_grad[:, first:last] = (logit_grad @ key[:, :last]).view(-1, last - first, dim)
            if key_grad is not None:
                block = query[:, first:last].reshape(heads, -1, dim)
                key_grad[:, :last] += (logit_grad.transpose(1, 2) @ block).float()
        return (
            query_grad,
            None if key_grad is None else key_grad.to(key.dtype),
            None if value_grad is None else value_grad.to(value.dtype),
            source_grad,
            None,
            None,
            None,
        )

"""Retention-gated attention for training: causal attention with a bias on every entry that says how far it has faded.

Owns two implementations that agree: `eager_attention` builds everything and leaves the gradient to autograd: the
reference. `blocked_attention` holds one block of queries at a time, in both directions, so that no T×T matrix outlives
its block. Both take one document; who packs several calls them one by one. Know no model. (GPUs: see `flex`.)

Letters: H KV heads, G query heads a KV head, D head dimension, T tokens of one document, K evictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
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
    def sources(self) -> tuple[Tensor, ...]:
        """What the gradient goes to."""
        return (self.log_beta,)

    def without_sources(self) -> Decay:
        """The same, holding no tensor: who keeps it keeps no memory alive."""
        return replace(self, log_beta=self.log_beta.new_empty(0))

    def bias(self, sources: Sequence[Tensor], first: int, last: int) -> Tensor:
        """Biases of queries first ≤ i < last on entries j < last: [H, i or 1, j]; 0 where j > i."""
        (log_beta,) = sources
        return self.shape.bias(log_beta[:, None, :last] * self._ages(log_beta, first, last))

    def pull(
        self, into: Sequence[Tensor | None], sources: Sequence[Tensor], *, grad: Tensor, first: int, last: int
    ) -> None:
        """Add the gradients of `sources` from that of a block's biases [H, i, j] to `into`; None: not wanted."""
        (log_beta,), (total,) = sources, into
        if total is None:
            return
        ages = self._ages(log_beta, first, last)
        if not self.shape.is_plain:
            grad = grad * self.shape.slope(log_beta[:, None, :last] * ages)
        total[:, :last] += torch.einsum("hij,ij->hj", grad, ages)

    @staticmethod
    def _ages(log_beta: Tensor, first: int, last: int) -> Tensor:
        at = torch.arange(last, device=log_beta.device, dtype=log_beta.dtype)
        return (at[first:, None] - at).clamp(min=0.0)


@dataclass(frozen=True, slots=True)
class EvictionBias:
    """A bias that changes at evictions only: -κ·w·softplus((depth[h, j] + reach[k, j]) / w) after the k-th eviction.

    Its argument is how far entry j lies beyond the line, in the logarithm of its score; see `evictions`.

    Attributes:
        depth: float32 [H, T], log|log β|.
        reach: float32 [1, K, T], or [H, K, T] where heads have lines of their own; row 0 before the first eviction.
        interval: tokens between evictions.
        sharpness, softness: κ and w.
    """

    depth: Tensor
    reach: Tensor
    interval: int
    sharpness: float
    softness: float

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """As `Decay.sources`."""
        return self.depth, self.reach

    def without_sources(self) -> EvictionBias:
        """As `Decay.without_sources`."""
        empty = self.depth.new_empty(0)
        return replace(self, depth=empty, reach=empty)

    def bias(self, sources: Sequence[Tensor], first: int, last: int) -> Tensor:
        """As `Decay.bias`."""
        lowest, highest = first // self.interval, (last - 1) // self.interval
        rows = self.at([source[..., :last] for source in sources], lowest, highest + 1)
        if lowest == highest:
            return rows
        return rows[:, torch.arange(first, last, device=rows.device) // self.interval - lowest]

    def at(self, sources: Sequence[Tensor], lowest: int, stop: int) -> Tensor:
        """The biases after evictions lowest ≤ k < stop: [H, k, T]."""
        beyond = _beyond(sources, lowest, stop)
        return F.softplus(beyond.div_(self.softness)).mul_(-self.sharpness * self.softness)

    def pull(
        self, into: Sequence[Tensor | None], sources: Sequence[Tensor], *, grad: Tensor, first: int, last: int
    ) -> None:
        """As `Decay.pull`."""
        lowest, highest = first // self.interval, (last - 1) // self.interval
        if lowest == highest:
            grad = grad.sum(1, keepdim=True)
        else:
            rows = torch.arange(first, last, device=grad.device) // self.interval - lowest
            grad = grad.new_zeros(grad.shape[0], highest + 1 - lowest, last).index_add_(1, rows, grad)
        beyond = _beyond([source[..., :last] for source in sources], lowest, highest + 1)
        grad = torch.sigmoid(beyond.div_(self.softness)).mul_(grad).mul_(-self.sharpness)
        depth, reach = into
        if depth is not None:
            depth[:, :last] += grad.sum(1)
        if reach is not None:
            reach[:, lowest : highest + 1, :last] += grad.sum(0, keepdim=True) if reach.shape[0] == 1 else grad


def _beyond(sources: Sequence[Tensor], lowest: int, stop: int) -> Tensor:
    """How far beyond the line entries are after evictions lowest ≤ k < stop: a new tensor, [H, k, T]."""
    depth, reach = sources
    return depth[:, None] + reach[:, lowest:stop]


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
        logits = logits + bias.bias(bias.sources, 0, tokens)[:, None]
    logits = logits.masked_fill(~_visible(0, tokens, window, query.device), float("-inf"))
    return (logits.softmax(-1).to(value.dtype) @ value[:, None]).view_as(query)


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Bias | None, scale: float, window: int | None = None
) -> Tensor:
    """As `eager_attention`, a block of queries at a time, with a backward pass that makes each block anew."""
    sources = () if bias is None else bias.sources
    # Autograd keeps what it saves only as long as checkpointing lets it; what else is kept must hold no tensor.
    rule = None if bias is None else bias.without_sources()
    result: Tensor = _Blocked.apply(query, key, value, rule, scale, window, *sources)  # type: ignore[no-untyped-call]
    return result


def _visible(first: int, last: int, window: int | None, device: torch.device) -> Tensor:
    """Which entries j < last the queries first ≤ i < last see: bool [i, j]."""
    at = torch.arange(last, device=device)
    visible = at <= at[first:, None]
    return visible if window is None else visible & (at > at[first:, None] - window)


@dataclass(frozen=True, slots=True)
class _Call:
    """What both passes need; `bias` holds no sources of its own."""

    bias: Bias | None
    scale: float
    window: int | None

    def weights(self, query: Tensor, key: Tensor, sources: Sequence[Tensor], first: int, last: int) -> Tensor:
        """Attention weights of a block: float32 [H, G·i, j < last]."""
        heads = key.shape[0]
        block = query[:, first:last].reshape(heads, -1, query.shape[-1])
        logits = (block @ key[:, :last].transpose(1, 2)).float().mul_(self.scale)
        by_query = logits.view(heads, -1, last - first, last)
        if self.bias is not None:
            by_query += self.bias.bias(sources, first, last)[:, None]
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
        bias: Bias | None,
        scale: float,
        window: int | None,
        *sources: Tensor,
    ) -> Tensor:
        call = _Call(bias, scale, window)
        _, tokens, dim = key.shape
        result = torch.empty_like(query)
        for first in range(0, tokens, _BLOCK):
            last = min(first + _BLOCK, tokens)
            weights = call.weights(query, key, sources, first, last).to(value.dtype)
            result[:, first:last] = (weights @ value[:, :last]).view(-1, last - first, dim)
        ctx.save_for_backward(query, key, value, *sources)
        ctx.call = call
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *sources = ctx.saved_tensors
        call: _Call = ctx.call
        heads, tokens, dim = key.shape
        needs_query, needs_key, needs_value, _, _, _, *needs_sources = ctx.needs_input_grad
        query_grad = torch.empty_like(query) if needs_query else None
        key_grad = torch.zeros_like(key, dtype=torch.float32) if needs_key else None
        value_grad = torch.zeros_like(value, dtype=torch.float32) if needs_value else None
        source_grads = [
            torch.zeros_like(source) if is_needed else None
            for source, is_needed in zip(sources, needs_sources, strict=True)
        ]
        for first in range(0, tokens, _BLOCK):
            last = min(first + _BLOCK, tokens)
            weights = call.weights(query, key, sources, first, last)
            grad = grads[0][:, first:last].reshape(heads, -1, dim)
            if value_grad is not None:
                value_grad[:, :last] += (weights.to(grad.dtype).transpose(1, 2) @ grad).float()
            weight_grad = (grad @ value[:, :last].transpose(1, 2)).float()
            logit_grad = torch._softmax_backward_data(weight_grad, weights, -1, torch.float32)
            if call.bias is not None and any(needs_sources):
                summed = logit_grad.view(heads, -1, last - first, last).sum(1)
                call.bias.pull(source_grads, sources, grad=summed, first=first, last=last)
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
            None,
            None,
            None,
            *source_grads,
        )

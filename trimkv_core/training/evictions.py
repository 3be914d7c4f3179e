"""Evictions acted out in training: which entries a hard budget would drop, and how far each is from the line.

The papers train with a decay that fades with age, and serve with evictions that are sharp. Here the budget itself is
acted out, at the intervals and with the pinned sinks of serving: at each eviction the M·L·H best entries define a line,
and an entry's bias says by how much, in the logarithm of its score, it falls short of it. Knows no model.

Letters: N streams, T tokens of one document, K evictions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimkv_core.training.attention import EvictionBias

_SMALLEST = 1e-30
# So far from the line that nothing is left of the bias; finite, as infinity times 0 is no number.
_SAFE = -1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionRule:
    """How evictions are acted out.

    Attributes:
        memory_size: M, entries a stream right after an eviction.
        interval: tokens between evictions.
        num_sink_tokens: first positions that are pinned.
        is_global: one budget over all streams, or one for each.
        sharpness: κ, nats of bias for a score e times too far from the line.
        softness: width, in the logarithm of the score, of the passage from kept to dropped.
    """

    memory_size: float
    interval: int = 64
    num_sink_tokens: int = 0
    is_global: bool = True
    sharpness: float = 4.0
    softness: float = 0.2


def eviction_lines(log_beta: Tensor, rule: EvictionRule) -> Tensor:
    """The lines log|score| that entries must stay below to be kept, at every eviction of one document.

    A line has a gradient: M·L·H entries stay whatever the scores, so who comes nearer pushes the others away. It moves
    with the entries around it, each by its share of σ'((log|score| - line) / softness), as a count of entries that is
    soft to that width would have it. Without this every entry would ask to be kept, and most of a gradient would be
    all scores together, which changes nothing.

    Args:
        log_beta: float32 [N, T].
        rule: see `EvictionRule`.

    Returns:
        float32 [K, N], [K, 1] under a global budget, +inf where everything fits; K = ⌈T/interval⌉, row 0 before the
        first eviction.
    """
    lines: Tensor = _Lines.apply(log_beta, rule)  # type: ignore[no-untyped-call]
    return lines


def _draw_lines(log_beta: Tensor, rule: EvictionRule) -> Tensor:
    streams, tokens = log_beta.shape
    depth = log_magnitude(log_beta)
    lines = log_beta.new_full((-(-tokens // rule.interval), 1 if rule.is_global else streams), math.inf)
    is_held = torch.ones_like(depth, dtype=torch.bool)
    # A budget that a spread draws may lie below one entry.
    limit = max(1, round(rule.memory_size * (streams if rule.is_global else 1)))
    for nth in range(1, lines.shape[0]):
        seen = nth * rule.interval
        score = torch.where(is_held[:, :seen], _scores(depth[:, :seen], seen, rule), math.inf)
        ranked = score.reshape(1, -1) if rule.is_global else score
        if limit >= ranked.shape[1]:
            continue
        line = ranked.kthvalue(limit, dim=1, keepdim=True).values  # +inf where fewer are held: nothing goes
        lines[nth] = line[:, 0]
        is_held[:, :seen] &= score <= line
    return lines


class _Lines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_beta: Tensor, rule: EvictionRule) -> Tensor:
        lines = _draw_lines(log_beta, rule)
        ctx.save_for_backward(log_beta, lines)
        ctx.rule = rule
        return lines

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (log_beta, lines), (grad,) = ctx.saved_tensors, grads
        rule: EvictionRule = ctx.rule
        depth = log_magnitude(log_beta)
        result = torch.zeros_like(log_beta)
        for nth in range(1, lines.shape[0]):
            seen = nth * rule.interval
            line = lines[nth][:, None]
            share = torch.sigmoid((_scores(depth[:, :seen], seen, rule) - line) / rule.softness)
            share = torch.where(torch.isfinite(line), share * (1.0 - share), 0.0)
            pull = grad[nth][:, None]
            count = share.sum() if rule.is_global else share.sum(1, keepdim=True)
            result[:, :seen] += share * (pull / count.clamp(min=_SMALLEST))
        # From log|log β| to log β.
        return result / log_beta.clamp(max=-_SMALLEST), None


def eviction_reach(lines: Tensor, tokens: int, rule: EvictionRule) -> Tensor:
    """How near the line age alone has brought every entry, at its worst so far: float32 [N or 1, K, T].

    Added to an entry's log|log β| it says how far beyond the line the entry lies, or lay at an earlier eviction: what
    was dropped stays dropped. Pins, and what an eviction has not seen, are far on the safe side.

    It grows with the square of a document, 1.1 GB at 131,072 tokens and an interval of 64; under a global budget all
    layers and heads share one.

    Args:
        lines: of `eviction_lines`, float32 [K, N or 1].
        tokens: T.
        rule: see `EvictionRule`.
    """
    evictions = torch.arange(lines.shape[0], device=lines.device, dtype=lines.dtype) * rule.interval
    age = evictions[:, None] + 1.0 - torch.arange(tokens, device=lines.device, dtype=lines.dtype)
    is_safe = age <= 1.0
    is_safe[:, : rule.num_sink_tokens] = True
    reach = (age.clamp(min=1.0).log() - lines.t()[:, :, None]).clamp(min=_SAFE)
    return reach.masked_fill(is_safe, _SAFE).cummax(1).values


def eviction_bias(log_beta: Tensor, reach: Tensor, rule: EvictionRule) -> EvictionBias:
    """The bias of one layer's heads, or of any streams: from float32 [N, T] and `eviction_reach`."""
    return EvictionBias(log_magnitude(log_beta), reach, rule.interval, rule.sharpness, rule.softness)


def log_magnitude(log_beta: Tensor) -> Tensor:
    """log|log β|: as linear in the gate's output as log β is not."""
    return log_beta.neg().clamp(min=_SMALLEST).log()


def _scores(depth: Tensor, seen: int, rule: EvictionRule) -> Tensor:
    """log|log β · age| of all entries after `seen` tokens; -inf for pins."""
    age = seen + 1.0 - torch.arange(seen, device=depth.device, dtype=depth.dtype)
    return (depth + age.log()).index_fill(
        1, torch.arange(min(rule.num_sink_tokens, seen), device=depth.device), -math.inf
    )

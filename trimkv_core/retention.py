"""Which entries survive an eviction: pure functions over flat lists of entries.

Entries of many sequences, each with rules of its own, are judged in one call and without padding: every entry carries
the number of its sequence and of its stream. Knows no pages, no pool and no model.

Letters: E entries, S sequences that are due, N streams (S·L·H), M `memory_size`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_core.budget import Budget, Scope, Strategy

PINNED = float("inf")
DROPPED = float("-inf")
NO_LIMIT = torch.iinfo(torch.int64).max


@dataclass(frozen=True, slots=True)
class Look:
    """One due sequence as the rules see it.

    Attributes:
        budget: its budget.
        seen: tokens it has seen, t.
    """

    budget: Budget
    seen: int


@dataclass(frozen=True, slots=True)
class EntryView:
    """The entries of all due sequences.

    Attributes:
        log_beta: float32 [E].
        position: int32 [E].
        sequence: int64 [E], in 0 … S-1.
        stream: int64 [E], in 0 … N-1, not decreasing.
        lengths: int64 [N], entries of every stream.
    """

    log_beta: Tensor
    position: Tensor
    sequence: Tensor
    stream: Tensor
    lengths: Tensor


def log_retention(log_beta: Tensor, age: Tensor) -> Tensor:
    """The score log β · age (as trimkv 0.1.5; arXiv 2605.09649).

    Args:
        log_beta: float32 [E], at most 0.
        age: float32 [E], t + 1 - position after t tokens.
    """
    return log_beta * age


def log_retention_ahead(log_beta: Tensor, age: Tensor, steps: Tensor) -> Tensor:
    """The log of the retention summed over the next `steps` tokens: (age + 1)·log β + log(1 - βⁿ) - log(1 - β).

    Stable near β → 1, where the quotient tends to n (as trimkv 0.1.5, `lookahead_steps` > 1).

    Args:
        log_beta: float32 [E].
        age: float32 [E], t + 1 - position.
        steps: float32 [E], n.
    """
    # expm1 keeps all digits of 1 - β for tiny log β; the clamp keeps 0 / 0 away, where the quotient is n.
    rate = log_beta.clamp(max=-torch.finfo(torch.float32).tiny * 2**24)
    geometric = torch.log(-torch.expm1(rate * steps)) - torch.log(-torch.expm1(rate))
    return log_beta * (age + 1.0) + geometric


def scores(view: EntryView, looks: list[Look]) -> Tensor:
    """Scores of all entries, float32 [E]; pinned entries (sinks, window) score +∞."""
    device = view.log_beta.device

    def per_entry(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)[view.sequence]

    seen = per_entry([look.seen for look in looks])
    age = (seen + 1 - view.position).to(torch.float32)
    result = log_retention(view.log_beta, age)
    if any(look.budget.lookahead_steps > 1 for look in looks):
        steps = per_entry([look.budget.lookahead_steps for look in looks])
        ahead = log_retention_ahead(view.log_beta, age, steps.to(torch.float32))
        result = torch.where(steps > 1, ahead, result)
    if any(look.budget.num_sink_tokens or look.budget.sliding_window_size for look in looks):
        is_sink = view.position < per_entry([look.budget.num_sink_tokens for look in looks])
        in_window = view.position >= seen - per_entry([look.budget.sliding_window_size for look in looks])
        result = result.masked_fill(is_sink | in_window, PINNED)
    return result


def rank_within(values: Tensor, group: Tensor) -> Tensor:
    """The rank of every value among those of its group, 0 for the highest; ties go to the earlier entry.

    Args:
        values: float32 [E], no NaN.
        group: int64 [E], at least 0 and below 2³¹.

    Returns:
        int64 [E].
    """
    # One integer sort instead of two: the group above, the value below, its bits turned so that they order as floats
    # do.
    bits = values.contiguous().view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = torch.argsort((group << 32) - ordered, stable=True)
    counts = torch.bincount(group)
    first = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    return rank - first[group]


def survivors(view: EntryView, looks: list[Look]) -> Tensor:
    """Which entries stay, bool [E].

    The threshold first, where the strategy has one; then, where more than the budget remains, the budget. Pins survive
    both, and so do the `min_tokens_per_head` best entries of every stream.
    """
    score = scores(view, looks)
    keep = torch.ones_like(score, dtype=torch.bool)
    if any(look.budget.strategy is Strategy.THRESHOLD for look in looks):
        keep = _above_threshold(view, looks, score)
        score = torch.where(keep, score, DROPPED)
    if any(look.budget.is_bounded for look in looks):
        keep = keep & _within_budget(view, looks, score)
    return keep


def _above_threshold(view: EntryView, looks: list[Look], score: Tensor) -> Tensor:
    limits = [look.budget.alpha_threshold or 0.0 for look in looks]
    keep = score >= torch.tensor(limits, dtype=torch.float64, device=score.device).log().float()[view.sequence]
    floors = [look.budget.min_tokens_per_head for look in looks]
    if any(floors):
        keep |= rank_within(score, view.stream) < torch.tensor(floors, device=score.device)[view.sequence]
    return keep


def _within_budget(view: EntryView, looks: list[Look], score: Tensor) -> Tensor:
    """The budget's rule; entries that are gone already score `DROPPED` and rank last."""
    is_shared = [look.budget.scope is Scope.GLOBAL for look in looks]
    if all(is_shared) and not any(look.budget.min_tokens_per_head for look in looks):
        # A stream's own best are the sequence's best: no second sort.
        limits = [_entries(look, view.lengths.numel() // len(looks)) for look in looks]
        return rank_within(score, view.sequence) < torch.tensor(limits, device=score.device)[view.sequence]
    quota = _local_quota(view, looks)
    if any(is_shared):
        shared = torch.tensor(is_shared, device=score.device)[:, None]
        quota = torch.where(shared, _global_quota(view, looks, score), quota)
    return rank_within(score, view.stream) < quota.view(-1)[view.stream]


def _entries(look: Look, streams: int) -> int:
    memory = look.budget.memory_size
    return NO_LIMIT if memory is None else streams * memory


def _global_quota(view: EntryView, looks: list[Look], score: Tensor) -> Tensor:
    """How many entries every stream may keep, int64 [S, L·H]: the L·H·(M - f) best over all streams say how many each
    deserves, and each gets f = `min_tokens_per_head` more."""
    device = score.device
    streams = view.lengths.numel() // len(looks)
    floors = torch.tensor([look.budget.min_tokens_per_head for look in looks], device=device)
    limits = torch.tensor([_entries(look, streams) for look in looks], device=device)
    is_left = (score != DROPPED).long()
    is_best = (rank_within(score, view.sequence) < (limits - streams * floors)[view.sequence]).long() * is_left
    deserved = torch.zeros_like(view.lengths).index_add_(0, view.stream, is_best).view(len(looks), streams)
    left = torch.zeros_like(limits).index_add_(0, view.sequence, is_left)
    return torch.where((left > limits)[:, None], deserved + floors[:, None], NO_LIMIT)


def _local_quota(view: EntryView, looks: list[Look]) -> Tensor:
    """How many entries every stream may keep, int64 [S, L·H]: M once it holds M + buffer (threshold: always M)."""
    device = view.lengths.device
    memory = torch.tensor([_entries(look, 1) for look in looks], device=device)[:, None]
    slack = [0 if look.budget.strategy is Strategy.THRESHOLD else look.budget.buffer_size for look in looks]
    is_full = view.lengths.view(len(looks), -1) - torch.tensor(slack, device=device)[:, None] >= memory
    return torch.where(is_full, memory, NO_LIMIT)

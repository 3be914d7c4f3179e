"""Other ways to choose which entries stay, each as its paper has it: one small class a method, one `score` each.

Every stream keeps the M best; +∞ pins. Scores are functions of what a cache holds when the cut is made. Where several
query heads share a KV head, what they say is averaged. The first positions are pinned for every method alike, whether
its paper has sinks or not: some fall apart without them, and a comparison should not be won by that. Knows no cache.

Letters: L layers, H KV heads, G query heads a KV head, n entries a stream, D head dimension, W queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

PINNED = float("inf")


class MethodError(ValueError):
    """A method that does not exist, or a budget it cannot work with; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """What the streams of one sequence hold when a cut is made.

    Attributes:
        key, value: [L, H, n, D], keys after RoPE.
        position: int64 [L, H, n], increasing in every stream.
        seen: tokens seen.
        scale: of attention logits.
        attention: float32 [L, H, n], attention received from all queries so far; None unless asked for.
        queries: [L, H, G, W, D], the latest queries after RoPE, fewer than asked for at the start; None unless asked
            for.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    seen: int
    scale: float
    attention: Tensor | None = None
    queries: Tensor | None = None


class Method(Protocol):
    """One baseline."""

    @property
    def name(self) -> str:
        """What `--methods` and tables call it."""

    @property
    def sinks(self) -> int:
        """First positions that are never evicted."""

    @property
    def observes_attention(self) -> bool:
        """Whether `Entries.attention` is asked for."""

    def query_window(self, memory_size: int) -> int:
        """W, how many of the latest queries are asked for."""

    def check(self, memory_size: int) -> None:
        """Raise `MethodError` for a budget the method cannot work with."""

    def score(self, entries: Entries, memory_size: int) -> Tensor:
        """Float [L, H, n]; the M highest of each stream stay."""


@dataclass(frozen=True, slots=True)
class _Baseline:
    """What most methods share.

    Attributes:
        sinks: first positions that are never evicted.
    """

    sinks: int = 0

    @property
    def observes_attention(self) -> bool:
        return False

    def query_window(self, memory_size: int) -> int:
        return 0

    def check(self, memory_size: int) -> None:
        if memory_size < 2 * self.sinks or memory_size < 2:
            raise MethodError(
                f"a budget of {memory_size} entries is too small for {self.sinks} sinks and as many others: "
                f"use at least {max(2 * self.sinks, 2)}"
            )

    def _pin(self, score: Tensor, entries: Entries, recent: int) -> Tensor:
        """Sinks and the `recent` newest positions stay whatever they score."""
        is_pinned = (entries.position < self.sinks) | (entries.position >= entries.seen - recent)
        return score.masked_fill(is_pinned, PINNED)


@dataclass(frozen=True, slots=True)
class StreamingLLM(_Baseline):
    """Sinks and the newest entries (arXiv 2309.17453). Positions stay as they were, not counted anew in the cache."""

    name = "streaming-llm"

    def score(self, entries: Entries, memory_size: int) -> Tensor:
        return self._pin(entries.position.float(), entries, 0)


@dataclass(frozen=True, slots=True)
class KeyNorm(_Baseline):
    """Keys of a small L2 norm stay (arXiv 2406.11430); half of the budget is for the newest."""

    name = "key-norm"

    def score(self, entries: Entries, memory_size: int) -> Tensor:
        return self._pin(-entries.key.float().norm(dim=-1), entries, memory_size // 2)


@dataclass(frozen=True, slots=True)
class KeyDifference(_Baseline):
    """Keys least like the mean of all normalised keys stay (KeyDiff, arXiv 2504.15364)."""

    name = "key-diff"

    def score(self, entries: Entries, memory_size: int) -> Tensor:
        key = F.normalize(entries.key.float(), dim=-1)
        return self._pin(-F.cosine_similarity(key, key.mean(2, keepdim=True), dim=-1), entries, 0)


@dataclass(frozen=True, slots=True)
class HeavyHitters(_Baseline):
    """H2O (arXiv 2306.14048): half of the budget for the newest, half for those that received most attention in all.

    Attributes:
        is_averaged: attention per query that could see the entry, not its sum, which favours old entries
            ("observed attention").
    """

    is_averaged: bool = False

    @property
    def name(self) -> str:
        return "observed-attention" if self.is_averaged else "h2o"

    @property
    def observes_attention(self) -> bool:
        return True

    def score(self, entries: Entries, memory_size: int) -> Tensor:
        if entries.attention is None:
            raise MethodError(f"{self.name} needs the attention of the queries so far")
        score = entries.attention
        if self.is_averaged:
            score = score / (entries.seen - entries.position)
        return self._pin(score, entries, memory_size // 2)


@dataclass(frozen=True, slots=True)
class SnapKV(_Baseline):
    """Entries the latest queries attend to, smoothed over neighbours, and those queries' own (arXiv 2404.14469).

    Attributes:
        window: queries that vote, at most half of the budget beside the sinks.
        pooling: entries over which their votes are averaged.
    """

    window: int = 32
    pooling: int = 5

    name = "snapkv"

    def query_window(self, memory_size: int) -> int:
        return max(min(self.window, (memory_size - self.sinks) // 2), 1)

    def score(self, entries: Entries, memory_size: int) -> Tensor:
        votes = recent_attention(entries).mean((2, 3))
        window = self.query_window(memory_size)
        # The window's own entries stay anyway and lend nothing to their neighbours.
        votes = votes.masked_fill(entries.position >= entries.seen - window, 0.0)
        votes = F.avg_pool1d(votes, self.pooling, stride=1, padding=self.pooling // 2)
        return self._pin(votes, entries, window)


@dataclass(frozen=True, slots=True)
class TOVA(_Baseline):
    """What the latest query attends to, averaged over all heads of a layer, stays (arXiv 2401.06104)."""

    name = "tova"

    def query_window(self, memory_size: int) -> int:
        return 1

    def score(self, entries: Entries, memory_size: int) -> Tensor:
        votes = recent_attention(entries)[:, :, :, -1].mean((1, 2))
        return self._pin(votes[:, None].expand(entries.position.shape), entries, 0)


@dataclass(frozen=True, slots=True)
class RandomRecent(_Baseline):
    """Sinks, the newest for half of the budget, and a uniform sample of all others: the floor for any choice.

    An entry's luck is drawn once, from its layer, head and position, so that the sample stays uniform over the past.
    """

    seed: int = 0

    name = "random-recent"

    def score(self, entries: Entries, memory_size: int) -> Tensor:
        layers, heads, _ = entries.position.shape
        stream = torch.arange(layers * heads, device=entries.position.device).view(layers, heads, 1)
        return self._pin(_luck(entries.position, stream, self.seed), entries, memory_size // 2)


def _luck(position: Tensor, stream: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for every entry, int64 [L, H, n] and [L, H, 1]: multiplications and shifts of 31 bits."""
    mixed = position * 0x2545F491 + stream * 0x1B873593 + seed * 0x19D699A5 + 0x3C6EF372
    for factor in (0x45D9F3B, 0x119DE1F3, 0x2C1B3C6D):
        mixed = ((mixed & 0x7FFFFFFF) ^ ((mixed & 0x7FFFFFFF) >> 16)) * factor
    return (mixed & 0x7FFFFFFF).double().div(2**31).float()


def recent_attention(entries: Entries) -> Tensor:
    """Attention of the latest queries over the entries, float32 [L, H, G, W, n].

    Raises:
        MethodError: no queries were remembered.
    """
    if entries.queries is None:
        raise MethodError("this method needs the latest queries")
    logits = torch.einsum("lhgwd,lhnd->lhgwn", entries.queries, entries.key).float() * entries.scale
    window = entries.queries.shape[3]
    asked_at = torch.arange(entries.seen - window, entries.seen, device=entries.position.device)
    is_ahead = entries.position[:, :, None] > asked_at[:, None]
    return torch.softmax(logits.masked_fill(is_ahead[:, :, None], float("-inf")), -1)

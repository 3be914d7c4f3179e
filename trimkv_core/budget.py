"""What a sequence may hold, and what that costs at worst.

Owns the meaning of a budget: its fields, their ranges, the eviction points that follow from them and the ceilings in
entries and pages that admission may rely on. Knows no tensors, no model and no pool.

Letters: L layers, H KV heads, M `memory_size`, B `block_size`, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_BLOCK_SIZE = 256
MAX_BUFFER_SIZE = 4096
MAX_LOOKAHEAD_STEPS = 1024


class BudgetError(ValueError):
    """A budget that contradicts itself or leaves its range.

    Attributes:
        field: name of the offending `Budget` field.
        value: what was asked.
        allowed: what would have been accepted, in words.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value!r} is not possible: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class Strategy(StrEnum):
    """Which entries an eviction drops."""

    FIXED_BUDGET = "fixed_budget"
    THRESHOLD = "threshold"
    DENSE = "dense"


class Scope(StrEnum):
    """Over what a budget is shared: all streams of a sequence (DBTrimKV) or each stream by itself (TrimKV)."""

    GLOBAL = "global"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a cache: how many streams there are and what one entry weighs.

    Attributes:
        num_layers: L.
        num_heads: H, KV heads a layer.
        head_dim: D.
        block_size: B, entries a page.
        kv_itemsize: bytes of one key or value element.
        scale_bytes: bytes of what an entry's key and value are multiplied by; 0 where nothing.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    block_size: int
    kv_itemsize: int
    scale_bytes: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise BudgetError("block_size", self.block_size, f"1 to {MAX_BLOCK_SIZE} entries a page")

    @property
    def streams(self) -> int:
        """L·H, the streams of one sequence."""
        return self.num_layers * self.num_heads

    @property
    def kv_bytes(self) -> int:
        """Bytes of one entry's key and value, and of their scales."""
        return 2 * self.head_dim * self.kv_itemsize + self.scale_bytes

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry: key, value, their scales, log β (float32) and position (int32)."""
        return self.kv_bytes + 8

    @property
    def page_bytes(self) -> int:
        """Bytes a page costs, with its slots in the free stack, the page lists and the copy they are rewritten from.

        The slots are int32 each. On a CPU lists are rewritten in place, and four of these bytes are to spare.
        """
        return self.block_size * self.entry_bytes + 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much one sequence may remember, and by which rule it forgets.

    Attributes:
        memory_size: M, entries a stream holds on average right after an eviction; None: no ceiling.
        buffer_size: slack in entries a stream before an eviction runs (global: on average).
        strategy: see `Strategy`.
        scope: see `Scope`.
        alpha_threshold: for `threshold`, the retention β^age under which an entry goes, in (0, 1).
        min_tokens_per_head: entries every stream keeps whatever the others need.
        sliding_window_size: newest positions of every stream that are never evicted.
        num_sink_tokens: first positions of every stream that are never evicted.
        lookahead_steps: how many coming steps an entry is scored over.
        prefill_chunk: prompt tokens between eviction points; 0: none before the whole prompt is in.

    Raises:
        BudgetError: a field out of range, or fields that contradict each other.
    """

    memory_size: int | None
    buffer_size: int = 32
    strategy: Strategy = Strategy.FIXED_BUDGET
    scope: Scope = Scope.GLOBAL
    alpha_threshold: float | None = None
    min_tokens_per_head: int = 0
    sliding_window_size: int = 0
    num_sink_tokens: int = 0
    lookahead_steps: int = 1
    prefill_chunk: int = 0

    def __post_init__(self) -> None:
        if self.memory_size is not None and self.memory_size < 1:
            raise BudgetError("memory_size", self.memory_size, "at least 1, or None for no ceiling")
        if not 1 <= self.buffer_size <= MAX_BUFFER_SIZE:
            raise BudgetError("buffer_size", self.buffer_size, f"1 to {MAX_BUFFER_SIZE}")
        if not 1 <= self.lookahead_steps <= MAX_LOOKAHEAD_STEPS:
            raise BudgetError("lookahead_steps", self.lookahead_steps, f"1 to {MAX_LOOKAHEAD_STEPS}")
        for field in ("min_tokens_per_head", "sliding_window_size", "num_sink_tokens", "prefill_chunk"):
            if getattr(self, field) < 0:
                raise BudgetError(field, getattr(self, field), "0 or more")
        self._check_strategy()
        pinned = self.num_sink_tokens + self.sliding_window_size + self.min_tokens_per_head
        if self.memory_size is not None and pinned > self.memory_size:
            raise BudgetError(
                "memory_size",
                self.memory_size,
                f"num_sink_tokens={self.num_sink_tokens} + sliding_window_size={self.sliding_window_size} + "
                f"min_tokens_per_head={self.min_tokens_per_head} = {pinned} must not exceed memory_size",
            )

    def _check_strategy(self) -> None:
        alpha = self.alpha_threshold
        if self.strategy is Strategy.THRESHOLD:
            if alpha is None:
                raise BudgetError("alpha_threshold", alpha, "strategy 'threshold' needs a value between 0 and 1")
            if not 0.0 < alpha < 1.0:
                raise BudgetError("alpha_threshold", alpha, "between 0 and 1, both excluded")
        elif alpha is not None:
            raise BudgetError("alpha_threshold", alpha, f"only strategy 'threshold' takes one, not '{self.strategy}'")
        if self.strategy is Strategy.DENSE and self.memory_size is not None:
            raise BudgetError("memory_size", self.memory_size, "strategy 'dense' keeps everything and takes no budget")

    @classmethod
    def dense(cls) -> Budget:
        """Keep everything."""
        return cls(memory_size=None, strategy=Strategy.DENSE)

    @property
    def is_bounded(self) -> bool:
        """Whether the sequence has a ceiling that does not grow with its length."""
        return self.memory_size is not None

    @property
    def can_evict(self) -> bool:
        """Whether any eviction point can ever drop an entry."""
        return self.is_bounded or self.strategy is Strategy.THRESHOLD

    def is_eviction_point(self, seen: int, prompt_tokens: int) -> bool:
        """Whether the trigger is looked at once `seen` tokens are in, the first `prompt_tokens` of them the prompt."""
        if seen >= prompt_tokens:
            return True
        return self.prefill_chunk > 0 and seen % self.prefill_chunk == 0

    def is_due(self, *, before: int, seen: int, held: int, longest: int, streams: int) -> bool:
        """Whether an eviction point reached now evicts.

        Args:
            before: tokens seen at the eviction point before this one.
            seen: tokens seen now.
            held: entries held now, in all streams.
            longest: entries in the fullest stream.
            streams: L·H.
        """
        if self.strategy is Strategy.THRESHOLD:
            return seen // self.buffer_size > before // self.buffer_size
        if self.memory_size is None:
            return False
        limit = self.memory_size + self.buffer_size
        return longest >= limit if self.scope is Scope.LOCAL else held >= streams * limit

    def ceiling_entries(self, streams: int, *, total_tokens: int, forward_tokens: int = 1) -> int:
        """The most entries the sequence ever holds.

        Args:
            streams: L·H.
            total_tokens: prompt and new tokens together.
            forward_tokens: c, tokens that the running forward adds (its chunk in prefill, 1 in decode).
        """
        if self.memory_size is None:
            return streams * total_tokens
        return streams * (min(total_tokens, self.memory_size + self.buffer_size) + forward_tokens)

    def ceiling_pages(self, geometry: Geometry, *, total_tokens: int, forward_tokens: int = 1) -> int:
        """The most pages the sequence ever holds: its ceiling in entries, and a part-filled page in every stream."""
        streams, block = geometry.streams, geometry.block_size
        longest = streams * -(-total_tokens // block)
        if not self.is_bounded:
            return longest
        entries = self.ceiling_entries(streams, total_tokens=total_tokens, forward_tokens=forward_tokens)
        return min(longest, (entries + streams * (block - 1)) // block)


def lane_pages(geometry: Geometry, tokens: int) -> int:
    """Pages that one forward of `tokens` prompt tokens may need on top of the ceilings of its sequences."""
    return -(-geometry.streams * tokens // geometry.block_size)

"""What one forward is made of: segments of sequences, packed token after token. Values only: nothing here decides.

Letters: S segments, L layers, H KV heads, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """What one sequence feeds in one forward: `tokens` more tokens for row `row`."""

    row: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A packed batch whose pages are allocated, segment after segment, segments of one token first.

    Attributes:
        segments: S of them.
        num_decode: how many leading segments have one token.
        lengths_before, lengths_after: int64 [S, L, H], entries a stream without and with this batch's.
        first_page: int64 [S, L, H], where each stream's pages begin in the arena.
        row_pages: pages of each segment's row, host numbers.
        slots: int64 [L, H, T], where each token's entries go.
        position: int32 [T], logical position of each token.
    """

    segments: tuple[Segment, ...]
    num_decode: int
    lengths_before: Tensor
    lengths_after: Tensor
    first_page: Tensor
    row_pages: tuple[int, ...]
    slots: Tensor
    position: Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.position.numel()

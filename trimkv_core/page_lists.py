"""Page lists: one int32 arena in which every sequence has a region for the numbers of its pages.

A region holds a sequence's pages stream after stream, without gaps; where a stream begins follows from the lengths.
So a table costs four bytes a page, whatever the context and however unequal the streams: a table as wide as the
context would cost 12 % of the pool. Owns the arena and where regions lie. Knows no pages' contents.

    arena   | row 2's pages ....| free |row 0's pages .........| free      |
                                       ^ start(0)              ^ start(0) + capacity(0)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class _Region:
    start: int
    capacity: int


class PageLists:
    """Regions of an int32 arena, one a row.

    Attributes:
        arena: int32 [capacity]; one tensor for good if it was given a capacity.
    """

    @torch.inference_mode(False)
    def __init__(self, *, device: torch.device | str, capacity: int | None = None) -> None:
        self.arena = torch.zeros(capacity or 0, dtype=torch.int32, device=device)
        self._regions: dict[int, _Region] = {}
        self._is_fixed = capacity is not None

    def start(self, row: int) -> int:
        """Where the region of `row` begins."""
        return self._regions[row].start

    def open(self, row: int, capacity: int) -> None:
        """Give `row` a region for `capacity` pages."""
        # No empty regions: two of them would begin at one place, and their order would not be their extent's.
        capacity = max(capacity, 1)
        self._regions[row] = _Region(self._find_gap(capacity), capacity)

    def close(self, row: int) -> None:
        """Take the region of `row` back."""
        del self._regions[row]

    def ensure(self, row: int, capacity: int, *, used: int) -> None:
        """Make the region of `row` hold `capacity` pages, moving its `used` first ones if it must."""
        region = self._regions[row]
        if region.capacity >= capacity:
            return
        pages = self.arena[region.start : region.start + used].clone()
        self.close(row)
        # Room to spare costs nothing where the arena grows with it; in a fixed one it is another row's.
        try:
            self.open(row, capacity if self._is_fixed else max(capacity, 2 * region.capacity))
        except RuntimeError:
            self._regions[row] = region
            raise
        start = self.start(row)
        self.arena[start : start + used] = pages

    def trim(self, row: int, capacity: int) -> None:
        """Take back what the region of `row` has beyond `capacity` pages; it must not use them."""
        region = self._regions[row]
        region.capacity = min(region.capacity, max(capacity, 1))

    def _find_gap(self, capacity: int) -> int:
        """First fit between regions, at the end, or behind a compaction or a growth."""
        end = 0
        for region in sorted(self._regions.values(), key=lambda region: region.start):
            if region.start - end >= capacity:
                return end
            end = region.start + region.capacity
        if self.arena.numel() - end >= capacity:
            return end
        used = sum(region.capacity for region in self._regions.values())
        if self._is_fixed and used + capacity > self.arena.numel():
            raise RuntimeError(f"page lists of {used} + {capacity} pages do not fit {self.arena.numel()}")
        self._rebuild(max(self.arena.numel(), used + capacity))
        return used

    @torch.inference_mode(False)
    def _rebuild(self, size: int) -> None:
        arena = self.arena.new_zeros(size)
        start = 0
        for region in self._regions.values():
            arena[start : start + region.capacity] = self.arena[region.start : region.start + region.capacity]
            region.start = start
            start += region.capacity
        if self._is_fixed:
            self.arena.copy_(arena)
        else:
            self.arena = arena

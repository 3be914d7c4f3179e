"""Gates under test: entries in pages, truly evicted by log β · age under a global or local budget, or kept for ever.

Knows the sequence table and nothing of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimkv_core.attention.base import AttentionBackend, PagedStep
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget, Geometry
from trimkv_core.evaluation.feeding import MemoryStep
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

BLOCK_SIZE = 16


class PagedMemory:
    """Sequences in pages under one budget.

    Args:
        geometry: of the model's cache.
        backend: that attends over the pages.
        budget: of every sequence.
        dtype, device: of stored keys and values.
        chunk: the most tokens a forward adds to a sequence.
    """

    def __init__(
        self,
        geometry: Geometry,
        backend: AttentionBackend[Any],
        budget: Budget,
        *,
        dtype: torch.dtype,
        device: torch.device,
        chunk: int,
    ) -> None:
        self.budget = budget
        self.table = SequenceTable(PagePool(geometry, geometry.streams, dtype=dtype, device=device), 1, can_grow=True)
        self._backend, self._chunk = backend, chunk
        self._looked: dict[int, int] = {}

    def open(self, total_tokens: int) -> int:
        pages = self.budget.ceiling_pages(
            self.table.geometry, total_tokens=total_tokens, forward_tokens=min(self._chunk, total_tokens)
        )
        row = self.table.open(pages)
        self._looked[row] = 0
        return row

    def extend(self, segments: Sequence[Segment]) -> MemoryStep:
        batch = self.table.extend(segments)
        return MemoryStep(batch.position, PagedStep(self._backend, self.table, batch))

    def settle(self, rows: Sequence[int]) -> None:
        due = [(row, self.budget) for row in rows if self.table.is_due(row, self.budget, before=self._looked[row])]
        self.table.evict(due)
        for row in rows:
            self._looked[row] = self.table.seen(row)

    def peak(self, row: int) -> float:
        return self.table.peak(row) / self.table.geometry.streams

    def close(self, row: int) -> None:
        self.table.close(row)

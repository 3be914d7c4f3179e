"""A sequence table whose decode steps, evictions and endings run on the device without the host waiting for them.

Prefill chunks go the base class's way, with its one wait before the first layer. Between, only the device knows which
pages are whose; the host's mirror of entries is exact, since what a plain budget leaves follows from what there was.

Letters: R rows, S = L·H streams of a sequence, N rows of a decode batch, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimkv_core.batches import Segment, StepBatch
from trimkv_core.budget import Budget, Scope, Strategy
from trimkv_core.kernels.allocate import add_entries, release
from trimkv_core.kernels.evict import evict
from trimkv_core.kernels.memory import DeviceMemory
from trimkv_core.page_lists import PageLists
from trimkv_core.pages import PagePool
from trimkv_core.sequences import Eviction, SequenceSnapshot, SequenceTable
from trimkv_core.transfers import to_device


class DeviceSequenceTable(SequenceTable):
    """See the module's docstring. Its tensors stay where they are for good, so that captured work may name them.

    Attributes:
        memory: the tensors, as kernels take them.
        null_row: R, what pads a batch.
    """

    @torch.inference_mode(False)
    def __init__(self, pool: PagePool, max_sequences: int) -> None:
        super().__init__(pool, max_sequences)
        device, streams = pool.device, self.geometry.streams
        # Promises add up to the pool at most, and so do lists that are no longer than promised.
        capacity = pool.num_pages + max_sequences
        self.page_lists = PageLists(device=device, capacity=capacity)
        self.lengths = torch.zeros(max_sequences + 1, streams, dtype=torch.int32, device=device)
        self.null_row = max_sequences
        self.memory = DeviceMemory(
            key=pool.key,
            value=pool.value,
            key_scale=pool.key_scale,
            value_scale=pool.value_scale,
            log_beta=pool.log_beta,
            position=pool.position,
            free=pool.free,
            num_free=pool.free_count,
            arena=self.page_lists.arena,
            scratch=torch.zeros(capacity, dtype=torch.int32, device=device),
            starts=torch.zeros(max_sequences + 1, dtype=torch.int64, device=device),
            lengths=self.lengths,
            seen=torch.zeros(max_sequences + 1, dtype=torch.int32, device=device),
        )
        self._promised: dict[int, int] = {}
        self._known_starts: list[int] = []

    def open(self, page_capacity: int) -> int:
        row = super().open(page_capacity)
        self._promised[row] = page_capacity
        self.memory.seen[row] = 0
        self._tell_starts()
        return row

    def close(self, row: int, *, scrub: bool = False) -> None:
        del self._promised[row]
        if scrub:
            super().close(row, scrub=True)
            self.lengths[row] = 0
            return
        release(self.memory, to_device([row], torch.int32, self.pool.device))
        self.pool.note_device_change()
        del self._rows[row]
        self.page_lists.close(row)
        self._free_rows.append(row)

    def extend(self, segments: Sequence[Segment]) -> StepBatch:
        batch = super().extend(segments)
        self._tell_seen([segment.row for segment in segments])
        self._tell_starts()
        return batch

    def restore(self, snapshot: SequenceSnapshot, *, page_capacity: int = 0) -> int:
        row = super().restore(snapshot, page_capacity=page_capacity)
        self._tell_seen([row])
        return row

    def reset(self) -> None:
        """As the base class; captured work goes on with the same tensors."""
        super().reset()
        for tensor in (self.memory.lengths, self.memory.seen, self.memory.starts):
            tensor.zero_()
        self._promised.clear()
        self._known_starts = []

    def add_decoded(self, rows: Tensor, *, slots: Tensor, first_page: Tensor, position: Tensor) -> None:
        """Make room for one token of each row, on the device only: may be captured.

        Args:
            rows: int32 [N], distinct but for the null row.
            slots: int32 [S, N], out: page · B + place of the new entries.
            first_page: int32 [N, S], out: where streams begin in the arena.
            position: int32 [N], out: of the tokens.
        """
        add_entries(self.memory, rows, slots=slots, first_page=first_page, position=position)

    def note_decoded(self, rows: Sequence[int]) -> None:
        """Tell the host's mirror of a decode step of `rows` that the device has been given."""
        for row in rows:
            self._rows[row].feed(1, streams=self.geometry.streams, pages=None)
        self.pool.note_device_change()

    def evict(self, due: Sequence[tuple[int, Budget]]) -> list[Eviction]:
        """As the base class; without waiting where what remains is known beforehand."""
        if all(_is_plain(budget) for _, budget in due):
            results: dict[int, Eviction] = {}
            groups: dict[tuple[Scope, int], list[tuple[int, Budget]]] = {}
            for row, budget in due:
                # The kernels take as much scratch for every row as for the longest: rows of one group are at most
                # twice as long as each other.
                size = self._rows[row].held.bit_length()
                groups.setdefault((budget.scope, size), []).append((row, budget))
            for (scope, _), members in groups.items():
                results |= self._evict_plain(members, scope)
            evictions = [results[row] for row, _ in due]
        else:
            evictions = super().evict(due)
        for row, _ in due:
            self.page_lists.trim(row, self._promised[row])
        return evictions

    def _evict_plain(self, due: Sequence[tuple[int, Budget]], scope: Scope) -> dict[int, Eviction]:
        for row, _ in due:
            self._rows[row].pages = None  # before anything can fail half-way

        def column(values: list[int]) -> Tensor:
            return to_device(values, torch.int32, self.pool.device)

        budgets = [budget for _, budget in due]
        evict(
            self.memory,
            column([row for row, _ in due]),
            memory_size=column([budget.memory_size or 0 for budget in budgets]),
            sinks=column([budget.num_sink_tokens for budget in budgets]),
            window=column([budget.sliding_window_size for budget in budgets]),
            buffer=column([budget.buffer_size for budget in budgets]),
            is_global=scope is Scope.GLOBAL,
            max_entries=max(self._rows[row].held for row, _ in due),
        )
        self.pool.note_device_change()
        return {row: self._note_evicted(row, budget) for row, budget in due}

    def _note_evicted(self, row: int, budget: Budget) -> Eviction:
        state, streams, memory = self._rows[row], self.geometry.streams, budget.memory_size or 0
        before = state.held
        if budget.scope is Scope.LOCAL:
            # Local budgets cut all streams alike, so all are as long as the longest.
            state.longest = memory if state.longest >= memory + budget.buffer_size else state.longest
            state.held = streams * state.longest
        else:
            state.held = min(before, streams * memory)
        return Eviction(row, before - state.held, state.held)

    def _tell_seen(self, rows: list[int]) -> None:
        seen = to_device([self._rows[row].seen for row in rows], torch.int32, self.pool.device)
        self.memory.seen.index_copy_(0, to_device(rows, torch.int64, self.pool.device), seen)

    def _tell_starts(self) -> None:
        """Tell the device where page lists begin, if that has changed."""
        starts = [self.page_lists.start(row) if row in self._rows else 0 for row in range(self.null_row + 1)]
        if starts != self._known_starts:
            self._known_starts = starts
            self.memory.starts.copy_(to_device(starts, torch.int64, self.pool.device))


def _is_plain(budget: Budget) -> bool:
    return (
        budget.strategy is Strategy.FIXED_BUDGET
        and budget.lookahead_steps == 1
        and budget.min_tokens_per_head == 0
        and budget.memory_size is not None
    )

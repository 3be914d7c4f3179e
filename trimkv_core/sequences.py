"""The sequence table: which pages a sequence holds, how long its streams are, and how they grow and shrink.

Owns the page lists and lengths of all sequences, and is the only one who takes pages from the pool or gives them back.
The lengths live on the device; the host mirrors what it needs to decide (tokens seen, entries held). It waits for the
device once a step, before the first layer, and a few times an eviction, after the last: never inside the layer loop.
Knows no attention and no model.

Letters: S rows (sequences) in a call, L layers, H KV heads, N = S·L·H streams, T tokens, P pages, B block size, E
entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_core.batches import Segment, StepBatch
from trimkv_core.budget import Budget
from trimkv_core.page_lists import PageLists
from trimkv_core.pages import InvariantError, PagePool, PoolExhausted, StoredEntries
from trimkv_core.retention import EntryView, Look, survivors


@dataclass(frozen=True, slots=True)
class Eviction:
    """What an eviction did to one row."""

    row: int
    evicted: int
    held: int


@dataclass(frozen=True, slots=True)
class SequenceSnapshot:
    """A sequence's entries, detached from the pool: stream after stream.

    Attributes:
        lengths: int32 [L·H].
        key, value: [E, D], as they are stored.
        log_beta: float32 [E].
        position: int32 [E].
        seen: tokens seen.
        peak: the most entries ever held.
        key_scale, value_scale: float32 [E], what 8-bit keys and values are multiplied by; None for other types.
    """

    lengths: Tensor
    key: Tensor
    value: Tensor
    log_beta: Tensor
    position: Tensor
    seen: int
    peak: int
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


@dataclass(slots=True)
class _Row:
    """The host's mirror of one sequence; `pages` None: only the device knows."""

    seen: int = 0
    held: int = 0
    longest: int = 0
    pages: int | None = 0
    peak: int = 0

    def feed(self, tokens: int, *, streams: int, pages: int | None) -> None:
        """Take note of `tokens` more tokens in every stream, and of the pages held then."""
        self.seen += tokens
        self.held += tokens * streams
        self.longest += tokens
        self.pages = pages
        self.peak = max(self.peak, self.held)


@dataclass(frozen=True, slots=True)
class _PageEnumeration:
    """All pages of some rows, row after row, stream after stream: int64 [count] each."""

    stream: Tensor
    local: Tensor
    listed_at: Tensor


class SequenceTable:
    """Up to `max_sequences` sequences over one pool; with `can_grow`, rows and pool grow as they are needed.

    Attributes:
        pool: the pool it takes pages from.
        page_lists: see `PageLists`.
        lengths: int32 [max_sequences, L·H].
    """

    @torch.inference_mode(False)
    def __init__(self, pool: PagePool, max_sequences: int, *, can_grow: bool = False) -> None:
        self.pool = pool
        self.geometry = pool.geometry
        self.page_lists = PageLists(device=pool.device)
        self.lengths = torch.zeros(max_sequences, self.geometry.streams, dtype=torch.int32, device=pool.device)
        self._can_grow = can_grow
        self._num_rows = max_sequences
        self._rows: dict[int, _Row] = {}
        self._free_rows = list(range(max_sequences - 1, -1, -1))

    # ---- opening and closing -------------------------------------------------------------------------------------

    @property
    def open_rows(self) -> tuple[int, ...]:
        """Rows in use."""
        return tuple(self._rows)

    def open(self, page_capacity: int) -> int:
        """Start an empty sequence and return its row.

        Args:
            page_capacity: pages it is expected to hold at most; a wrong guess costs a copy of the list, no more.

        Raises:
            RuntimeError: all rows are in use.
        """
        if not self._free_rows:
            if not self._can_grow:
                raise RuntimeError(f"all {self._num_rows} sequence rows are in use")
            self._add_rows()
        row = self._free_rows[-1]
        self.page_lists.open(row, page_capacity)
        self._free_rows.pop()
        self._rows[row] = _Row()
        self.lengths[row] = 0
        return row

    @torch.inference_mode(False)
    def _add_rows(self) -> None:
        count = self._num_rows
        self.lengths = torch.cat([self.lengths, torch.zeros_like(self.lengths)])
        self._num_rows = 2 * count
        self._free_rows = list(range(2 * count - 1, count - 1, -1))

    def close(self, row: int, *, scrub: bool = False) -> None:
        """End a sequence: its pages go back to the pool, zeroed if what they hold may be no numbers."""
        state = self._rows.pop(row)
        start = self.page_lists.start(row)
        pages = self.page_lists.arena[start : start + self._count_pages(row, state)]
        if scrub:
            self.pool.scrub(pages)
        self.pool.release(pages)
        self.page_lists.close(row)
        self._free_rows.append(row)

    def reset(self) -> None:
        """Make every row free; the pool has been reset."""
        for row in self._rows:
            self.page_lists.close(row)
        self._rows.clear()
        self._free_rows = list(range(self._num_rows - 1, -1, -1))

    # ---- figures -------------------------------------------------------------------------------------------------

    def seen(self, row: int) -> int:
        """Logical tokens of the sequence."""
        return self._rows[row].seen

    def held(self, row: int) -> int:
        """Entries it holds now."""
        return self._rows[row].held

    def peak(self, row: int) -> int:
        """The most entries it ever held, inside a forward too."""
        return self._rows[row].peak

    def pages(self, row: int) -> int:
        """Pages it holds now."""
        return self._count_pages(row, self._rows[row])

    def _count_pages(self, row: int, state: _Row) -> int:
        if state.pages is None:
            state.pages = int((-(-self.lengths[row] // self.geometry.block_size)).sum())
        return state.pages

    def lengths_of(self, row: int) -> Tensor:
        """Entries of every stream, int32 [L, H]."""
        return self.lengths[row].view(self.geometry.num_layers, self.geometry.num_heads).clone()

    def layer_entries(self, rows: Sequence[int]) -> list[list[int]]:
        """Entries of every layer of some rows: [S][L]."""
        shape = (len(rows), self.geometry.num_layers, self.geometry.num_heads)
        result: list[list[int]] = self.lengths[list(rows)].view(shape).sum(-1).tolist()
        return result

    def positions_of(self, row: int, layer: int, head: int) -> Tensor:
        """Logical positions one stream holds, int32 [entries], sorted."""
        stream = layer * self.geometry.num_heads + head
        slots, lengths = self._slots_of(row)
        start = int(lengths[:stream].sum())
        stop = start + int(lengths[stream])
        return self.pool.position.view(-1)[slots[start:stop]].sort().values

    def page_positions(self, row: int) -> Tensor:
        """Logical positions in the pages of a row, page by page, stream after stream: int32 [≥ P, B].

        What lies behind the end of a stream, which `lengths_of` tells, means nothing, nor do rows behind all pages:
        only the device may know how many those are. Nothing here waits for it.
        """
        geometry, start = self.geometry, self.page_lists.start(row)
        most = (self._rows[row].held + geometry.streams * (geometry.block_size - 1)) // geometry.block_size
        return self.pool.position[self.page_lists.arena[start : start + most].long()]

    def is_due(self, row: int, budget: Budget, *, before: int) -> bool:
        """Whether an eviction point reached now evicts; `before`: tokens seen at the one before."""
        state = self._rows[row]
        return budget.is_due(
            before=before, seen=state.seen, held=state.held, longest=state.longest, streams=self.geometry.streams
        )

    # ---- growing -------------------------------------------------------------------------------------------------

    def extend(self, segments: Sequence[Segment]) -> StepBatch:
        """Make room for the entries of one forward, in all streams of all segments at once.

        Args:
            segments: one a row at most, those of one token first.

        Raises:
            PoolExhausted: too few pages are free. Nothing has changed then.
        """
        geometry, device = self.geometry, self.pool.device
        layers, heads, block = geometry.num_layers, geometry.num_heads, geometry.block_size
        rows = torch.tensor([segment.row for segment in segments], device=device)
        tokens = torch.tensor([segment.tokens for segment in segments], device=device)
        before = self.lengths[rows].long()
        after = before + tokens[:, None]
        pages_before, pages_after = -(-before // block), -(-after // block)
        held_pages, row_pages = torch.stack([pages_before.sum(1), pages_after.sum(1)]).tolist()
        first_page = self._add_pages(segments, pages_before, pages_after, held_pages, row_pages)
        self.lengths[rows] = after.int()

        segment_of_token = torch.repeat_interleave(
            torch.arange(len(segments), device=device), tokens, output_size=sum(s.tokens for s in segments)
        )
        first_token = torch.cumsum(tokens, 0) - tokens
        nth = torch.arange(segment_of_token.numel(), device=device) - first_token[segment_of_token]
        index = before.t()[:, segment_of_token] + nth
        page = self.page_lists.arena[first_page.t()[:, segment_of_token] + index // block].long()
        seen = torch.tensor([self._rows[segment.row].seen for segment in segments], device=device)
        for segment, pages in zip(segments, row_pages, strict=True):
            self._rows[segment.row].feed(segment.tokens, streams=geometry.streams, pages=pages)
        shape = (len(segments), layers, heads)
        return StepBatch(
            segments=tuple(segments),
            num_decode=sum(segment.tokens == 1 for segment in segments),
            lengths_before=before.view(shape),
            lengths_after=after.view(shape),
            first_page=first_page.view(shape),
            row_pages=tuple(row_pages),
            slots=(page * block + index % block).view(layers, heads, -1),
            position=(seen[segment_of_token] + nth).int(),
        )

    def _add_pages(
        self,
        segments: Sequence[Segment],
        pages_before: Tensor,
        pages_after: Tensor,
        held_pages: list[int],
        row_pages: list[int],
    ) -> Tensor:
        """Insert fresh pages at the end of streams that need them; returns where streams begin, int64 [S, L·H]."""
        total = sum(row_pages)
        fresh = self._take(total - sum(held_pages))
        for segment, held, pages in zip(segments, held_pages, row_pages, strict=True):
            self.page_lists.ensure(segment.row, pages, used=held)
        arena = self.page_lists.arena
        base = torch.tensor([self.page_lists.start(segment.row) for segment in segments], device=arena.device)[:, None]
        first_before = base + torch.cumsum(pages_before, 1) - pages_before
        first_after = base + torch.cumsum(pages_after, 1) - pages_after
        if fresh.numel():
            listed = self._enumerate(pages_after, first_after, total)
            is_fresh = listed.local >= pages_before.view(-1)[listed.stream]
            kept_at = (first_before.view(-1)[listed.stream] + listed.local).masked_fill(is_fresh, 0)
            arena[listed.listed_at] = arena[kept_at].masked_scatter(is_fresh, fresh)
        return first_after

    def _take(self, count: int) -> Tensor:
        if self._can_grow and count > self.pool.num_free:
            self.pool.grow(max(self.pool.num_pages + count - self.pool.num_free, self.pool.num_pages * 3 // 2))
        return self.pool.allocate(count)

    @staticmethod
    def _enumerate(pages: Tensor, first_page: Tensor, total: int) -> _PageEnumeration:
        """List all pages of streams that hold `pages` each (int64 [S, L·H]) and begin at `first_page` in the arena."""
        counts = pages.reshape(-1)
        streams = torch.arange(counts.numel(), device=counts.device)
        stream = torch.repeat_interleave(streams, counts, output_size=total)
        first = torch.cumsum(counts, 0) - counts
        local = torch.arange(total, device=counts.device) - first[stream]
        return _PageEnumeration(stream, local, first_page.reshape(-1)[stream] + local)

    # ---- shrinking -----------------------------------------------------------------------------------------------

    def evict(self, due: Sequence[tuple[int, Budget]]) -> list[Eviction]:
        """Cut the rows that are due, each by its own budget, all in one batch.

        Entries from a stream's tail fill the holes of what went, and emptied pages go back to the pool.
        """
        if not due:
            return []
        geometry, pool = self.geometry, self.pool
        rows = [row for row, _ in due]
        index = torch.tensor(rows, device=pool.device)
        lengths = self.lengths[index].long()
        first_page = self._first_pages(rows, lengths)
        stream, nth, slot = self._list_entries(lengths, first_page, sum(self._rows[row].held for row in rows))
        view = EntryView(
            log_beta=pool.log_beta.view(-1)[slot],
            position=pool.position.view(-1)[slot],
            sequence=stream // geometry.streams,
            stream=stream,
            lengths=lengths.view(-1),
        )
        keep = survivors(view, [Look(budget, self._rows[row].seen) for row, budget in due])
        kept = torch.zeros_like(view.lengths).index_add_(0, stream, keep.long()).view_as(lengths)
        in_front = nth < kept.view(-1)[stream]
        pool.move(slot[keep & ~in_front], slot[~keep & in_front])
        self._drop_pages(rows, lengths, kept, first_page)
        self.lengths[index] = kept.int()

        result = []
        figures = torch.stack([kept.sum(1), kept.amax(1), (-(-kept // geometry.block_size)).sum(1)], 1).tolist()
        for row, (held, longest, pages) in zip(rows, figures, strict=True):
            state = self._rows[row]
            result.append(Eviction(row, state.held - held, held))
            state.held, state.longest, state.pages = held, longest, pages
        return result

    def _first_pages(self, rows: Sequence[int], lengths: Tensor) -> Tensor:
        pages = -(-lengths // self.geometry.block_size)
        base = torch.tensor([self.page_lists.start(row) for row in rows], device=lengths.device)
        return base[:, None] + torch.cumsum(pages, 1) - pages

    def _list_entries(self, lengths: Tensor, first_page: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every entry's stream, place in its stream and slot, int64 [E] each."""
        block = self.geometry.block_size
        listed = self._enumerate(lengths, torch.zeros_like(lengths), total)
        stream, nth = listed.stream, listed.local
        page = self.page_lists.arena[first_page.view(-1)[stream] + nth // block].long()
        return stream, nth, page * block + nth % block

    def _drop_pages(self, rows: Sequence[int], lengths: Tensor, kept: Tensor, first_page: Tensor) -> None:
        block, arena = self.geometry.block_size, self.page_lists.arena
        pages_before, pages_after = -(-lengths // block), -(-kept // block)
        listed = self._enumerate(pages_before, first_page, sum(self.pages(row) for row in rows))
        pages = arena[listed.listed_at]
        stays = listed.local < pages_after.view(-1)[listed.stream]
        first_after = self._first_pages(rows, kept).view(-1)[listed.stream] + listed.local
        arena[first_after[stays]] = pages[stays]
        self.pool.release(pages[~stays])

    # ---- looking, copying, checking ------------------------------------------------------------------------------

    def _slots_of(self, row: int) -> tuple[Tensor, Tensor]:
        lengths = self.lengths[row][None].long()
        _, _, slots = self._list_entries(lengths, self._first_pages([row], lengths), self._rows[row].held)
        return slots, lengths[0]

    def snapshot(self, row: int) -> SequenceSnapshot:
        """Copy a sequence out of the pool."""
        slots, lengths = self._slots_of(row)
        entries = self.pool.load(slots)
        return SequenceSnapshot(
            lengths=lengths.int(),
            key=entries.key,
            value=entries.value,
            key_scale=entries.key_scale,
            value_scale=entries.value_scale,
            log_beta=entries.log_beta,
            position=entries.position,
            seen=self._rows[row].seen,
            peak=self._rows[row].peak,
        )

    def restore(self, snapshot: SequenceSnapshot, *, page_capacity: int = 0) -> int:
        """Open a row that holds what `snapshot` holds.

        Args:
            snapshot: of any table of the same geometry.
            page_capacity: pages it is expected to hold at most; what the snapshot holds if that is more.

        Raises:
            PoolExhausted: too few pages are free. Nothing has changed then.
            RuntimeError: all rows are in use. Nothing has changed then.
        """
        lengths = snapshot.lengths.long()[None]
        pages = -(-lengths // self.geometry.block_size)
        count, held, longest = (int(value) for value in (pages.sum(), lengths.sum(), lengths.max()))
        row = self.open(max(count, page_capacity))
        try:
            fresh = self._take(count)
        except PoolExhausted:
            self.close(row)
            raise
        start = self.page_lists.start(row)
        self.page_lists.arena[start : start + count] = fresh
        self.lengths[row] = snapshot.lengths
        self._rows[row] = _Row(seen=snapshot.seen, held=held, longest=longest, pages=count, peak=snapshot.peak)
        slots, _ = self._slots_of(row)
        entries = StoredEntries(
            key=snapshot.key,
            value=snapshot.value,
            key_scale=snapshot.key_scale,
            value_scale=snapshot.value_scale,
            log_beta=snapshot.log_beta,
            position=snapshot.position,
        )
        self.pool.store(slots, entries)
        return row

    def check_invariants(self) -> None:
        """Check lengths, page lists and the pool against each other.

        Raises:
            InvariantError: says which sum failed.
        """
        held: list[Tensor] = []
        for row, state in self._rows.items():
            lengths = self.lengths[row].long()
            pages = int((-(-lengths // self.geometry.block_size)).sum())
            if int(lengths.min()) < 0 or int(lengths.sum()) != state.held or pages != self._count_pages(row, state):
                raise InvariantError(
                    f"row {row}: lengths hold {int(lengths.sum())} entries in {pages} pages, "
                    f"the host counts {state.held} in {state.pages}"
                )
            start = self.page_lists.start(row)
            held.append(self.page_lists.arena[start : start + pages])
        empty = self.page_lists.arena[:0]
        self.pool.check_invariants(torch.cat(held) if held else empty)

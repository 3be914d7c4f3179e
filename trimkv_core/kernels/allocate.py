"""Growing and ending sequences: pages out of the free stack and back, page lists and lengths kept in step.

One decode step adds one entry to every stream of every row. Which of a stream's steps needs a page depends on what
evictions left of it, so nearly every step some stream of a row grows, and the lists behind it move (see `layout.py`).
Nothing here waits for the device or depends on a value in its shapes: it may stand in a CUDA graph. That a page is free
is admission's promise; were it broken, `num_free` falls below 0 and the null page is written to.

Letters: N rows of a call, S streams of a row, B entries a page, P pages.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trimkv_core.kernels.layout import PAGE_TILE, STREAM_TILE, copy_lists, lists_before_and_after, settle
from trimkv_core.kernels.memory import DeviceMemory

_ADVANCE_TILE = 256
_RELEASE_TILE = 1024


@triton.jit
def _grow(
    rows,
    lengths,
    seen,
    starts,
    arena,
    scratch,
    free,
    num_free,
    slots,
    first_page,
    position,
    null_row,
    null_page,
    num_streams,
    num_rows,
    B: tl.constexpr,
    STREAMS_PADDED: tl.constexpr,
    STREAMS: tl.constexpr,
    PAGES: tl.constexpr,
):
    nth = tl.program_id(0)
    row = tl.load(rows + nth)
    stream = tl.program_id(1) * STREAMS + tl.arange(0, STREAMS)
    is_stream = stream < num_streams
    if tl.program_id(1) == 0:
        tl.store(position + nth, tl.load(seen + row))
    start = tl.load(starts + row)
    if row == null_row:
        tl.store(slots + stream * num_rows + nth, tl.zeros_like(stream) + null_page * B, mask=is_stream)
        tl.store(
            first_page + nth * num_streams + stream,
            (tl.zeros_like(stream) + start).to(first_page.dtype.element_ty),
            mask=is_stream,
        )
    else:
        before = lengths + row * num_streams
        pages, _, first_before, first_after = lists_before_and_after(
            before, before, stream, num_streams, 1, B, STREAMS_PADDED
        )
        place = tl.load(before + stream, mask=is_stream, other=0) % B
        grows = (is_stream & (place == 0)).to(tl.int32)
        top = tl.atomic_add(num_free, -tl.sum(grows, 0), sem="relaxed")
        at = top - tl.cumsum(grows, 0)
        fresh = tl.load(free + at, mask=(grows > 0) & (at >= 0), other=null_page)
        last = tl.load(arena + start + first_before + pages - 1, mask=is_stream & (grows == 0), other=0)
        tl.store(slots + stream * num_rows + nth, tl.where(grows > 0, fresh, last) * B + place, mask=is_stream)
        first = (start + first_after).to(first_page.dtype.element_ty)
        tl.store(first_page + nth * num_streams + stream, first, mask=is_stream)
        tl.store(scratch + start + first_after + pages, fresh, mask=grows > 0)
        moved = tl.where(first_before != first_after, pages, 0)
        copy_lists(arena + start + first_before, scratch + start + first_after, tl.zeros_like(moved), moved, PAGES)


@triton.jit
def _advance(rows, lengths, seen, null_row, num_streams, TILE: tl.constexpr):
    row = tl.load(rows + tl.program_id(0))
    if row != null_row:
        stream = tl.program_id(1) * TILE + tl.arange(0, TILE)
        at = lengths + row * num_streams + stream
        tl.store(at, tl.load(at, mask=stream < num_streams, other=0) + 1, mask=stream < num_streams)
        if tl.program_id(1) == 0:
            tl.store(seen + row, tl.load(seen + row) + 1)


@triton.jit
def _release(
    rows,
    lengths,
    seen,
    starts,
    arena,
    free,
    num_free,
    num_streams,
    B: tl.constexpr,
    STREAMS_PADDED: tl.constexpr,
    PAGES: tl.constexpr,
):
    row = tl.load(rows + tl.program_id(0))
    stream = tl.arange(0, STREAMS_PADDED)
    is_stream = stream < num_streams
    length = tl.load(lengths + row * num_streams + stream, mask=is_stream, other=0)
    count = tl.sum((length + B - 1) // B, 0)
    bottom = tl.atomic_add(num_free, count, sem="relaxed")
    start = tl.load(starts + row)
    for begin in range(0, count, PAGES):
        place = begin + tl.arange(0, PAGES)
        page = tl.load(arena + start + place, mask=place < count, other=0)
        tl.store(free + bottom + place, page, mask=(place < count) & (bottom + place >= 0))
    tl.store(lengths + row * num_streams + stream, tl.zeros_like(stream), mask=is_stream)
    tl.store(seen + row, 0)


def add_entries(memory: DeviceMemory, rows: Tensor, *, slots: Tensor, first_page: Tensor, position: Tensor) -> None:
    """Make room for one more token in every stream of every row.

    Args:
        memory: whose lengths and `seen` grow by one, and whose page lists by what that needs.
        rows: int32 [N], distinct but for the null row.
        slots: int32 [S, N], out: page · B + place in the page of the new entries; the null page's for the null row.
        first_page: int32 or int64 [N, S], out: where the streams' pages begin in the arena from now on.
        position: int32 [N], out: the new token's.
    """
    count, streams = rows.numel(), memory.num_streams
    _grow[(count, triton.cdiv(streams, STREAM_TILE))](
        rows,
        memory.lengths,
        memory.seen,
        memory.starts,
        memory.arena,
        memory.scratch,
        memory.free,
        memory.num_free,
        slots,
        first_page,
        position,
        memory.null_row,
        memory.null_page,
        streams,
        count,
        B=memory.block_size,
        STREAMS_PADDED=triton.next_power_of_2(streams),
        STREAMS=STREAM_TILE,
        PAGES=PAGE_TILE,
    )
    settle(memory, rows, kept=None, growth=1)
    _advance[(count, triton.cdiv(streams, _ADVANCE_TILE))](
        rows, memory.lengths, memory.seen, memory.null_row, streams, TILE=_ADVANCE_TILE
    )


def release(memory: DeviceMemory, rows: Tensor) -> None:
    """Empty rows: all their pages go to the free stack, lengths and tokens seen to 0.

    Args:
        memory: whose.
        rows: int32 [n], distinct but for the null row.
    """
    streams = memory.num_streams
    _release[(rows.numel(),)](
        rows,
        memory.lengths,
        memory.seen,
        memory.starts,
        memory.arena,
        memory.free,
        memory.num_free,
        streams,
        B=memory.block_size,
        STREAMS_PADDED=triton.next_power_of_2(streams),
        PAGES=_RELEASE_TILE,
    )

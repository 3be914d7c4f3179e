"""Where page lists lie: the arithmetic and the copying that growing and shrinking share.

A row's streams lie without gaps, so one that grows or shrinks moves all behind it. Programs of one row cannot wait for
one another; so a first launch puts the new lists together in the scratch, reading the arena only, and a second one
copies them back.

    arena    aaa bb ccc          a stream's shift: how far its list moves
    scratch  ... bbB ccc         here b grew by a page: shifts 0, 0, 1
    arena    aaa bbB ccc         nothing of a is ever copied

Letters: N rows of a call, S streams of a row, B entries a page.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trimkv_core.kernels.memory import DeviceMemory

# Streams and pages of the tile a program copies at a time.
STREAM_TILE = 16
PAGE_TILE = 64


@triton.jit
def sum_before(counts, until, num_streams, PER: tl.constexpr, STREAMS_PADDED: tl.constexpr):
    """Σ of counts over the streams before `until`, each rounded up to wholes of `PER` (1: the sum itself)."""
    stream = tl.arange(0, STREAMS_PADDED)
    count = tl.load(counts + stream, mask=(stream < until) & (stream < num_streams), other=0)
    return tl.sum((count + PER - 1) // PER, 0)


@triton.jit
def lists_before_and_after(
    before,
    after,
    stream,
    num_streams,
    GROWTH: tl.constexpr,
    B: tl.constexpr,
    STREAMS_PADDED: tl.constexpr,
):
    """Pages of a tile of streams, and where their lists begin in the row's region, before and after a change.

    `before` and `after` point at the lengths of a row; `GROWTH` more entries are counted after.
    """
    every = tl.arange(0, STREAMS_PADDED)
    in_front = (every < tl.min(stream, 0)) & (every < num_streams)
    all_before = tl.load(before + every, mask=in_front, other=0)
    # A masked length grows by nothing.
    all_after = tl.where(in_front, tl.load(after + every, mask=in_front, other=0) + GROWTH, 0)
    is_stream = stream < num_streams
    pages_before = (tl.load(before + stream, mask=is_stream, other=0) + B - 1) // B
    grown = tl.where(is_stream, tl.load(after + stream, mask=is_stream, other=0) + GROWTH, 0)
    pages_after = (grown + B - 1) // B
    first_before = tl.sum((all_before + B - 1) // B, 0) + tl.cumsum(pages_before, 0) - pages_before
    first_after = tl.sum((all_after + B - 1) // B, 0) + tl.cumsum(pages_after, 0) - pages_after
    return pages_before, pages_after, first_before, first_after


@triton.jit
def copy_lists(source, target, begin, end, PAGES: tl.constexpr):
    """Copy, for every stream of a tile, the page numbers from place `begin` to `end`: pointers and int32 [streams]."""
    first = tl.min(tl.where(begin < end, begin, 2**30), 0)
    last = tl.max(tl.where(begin < end, end, 0), 0)
    for start in range(first, last, PAGES):
        place = (start + tl.arange(0, PAGES))[None, :]
        is_copied = (place >= begin[:, None]) & (place < end[:, None])
        page = tl.load(source[:, None] + place, mask=is_copied, other=0)
        tl.store(target[:, None] + place, page, mask=is_copied)


@triton.jit
def _settle(
    rows,
    lengths,
    kept,
    starts,
    arena,
    scratch,
    null_row,
    num_streams,
    GROWTH: tl.constexpr,
    B: tl.constexpr,
    STREAMS_PADDED: tl.constexpr,
    STREAMS: tl.constexpr,
    PAGES: tl.constexpr,
):
    nth = tl.program_id(0)
    row = tl.load(rows + nth)
    if row != null_row:
        stream = tl.program_id(1) * STREAMS + tl.arange(0, STREAMS)
        before = lengths + row * num_streams
        after = kept + nth * num_streams
        if GROWTH > 0:
            after = before
        pages_before, pages_after, first_before, first_after = lists_before_and_after(
            before, after, stream, num_streams, GROWTH, B, STREAMS_PADDED
        )
        # Of a list that stays where it is, only the fresh pages are in the scratch.
        begin = tl.where(first_before == first_after, pages_before, 0)
        first = tl.load(starts + row) + first_after
        copy_lists(scratch + first, arena + first, tl.minimum(begin, pages_after), pages_after, PAGES)


def settle(memory: DeviceMemory, rows: Tensor, *, kept: Tensor | None, growth: int) -> None:
    """Copy the page lists that stand in the scratch into the arena; lengths must be the old ones still.

    Args:
        memory: whose.
        rows: int32 [N].
        kept: int32 [N, S], the new lengths; None: the old ones and `growth`.
        growth: entries every stream gains.
    """
    streams = memory.num_streams
    _settle[(rows.numel(), triton.cdiv(streams, STREAM_TILE))](
        rows,
        memory.lengths,
        memory.lengths if kept is None else kept,
        memory.starts,
        memory.arena,
        memory.scratch,
        memory.null_row,
        streams,
        GROWTH=growth,
        B=memory.block_size,
        STREAMS_PADDED=triton.next_power_of_2(streams),
        STREAMS=STREAM_TILE,
        PAGES=PAGE_TILE,
    )

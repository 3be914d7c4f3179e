"""Evicting rows: the best entries stay, those at a stream's end fill the holes, emptied pages are free again.

All rows of a call go through a fixed number of launches, and nothing waits for the device. Equal to
`SequenceTable.evict` with strategy `fixed_budget`, a look-ahead of 1 and no floor: the same entries stay in every
stream, in the same places.

    keys     9 2 7 1 8 | 3 6 …       threshold 6: the stream keeps 3
    moves    1 . . . 4 |             holes in front from the left, what fills them from the right
    stream   9 8 7                   place 4 moved to place 1

Letters: n rows that are evicted, S streams of a row, B entries a page, D head dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimkv_core.kernels.layout import (
    PAGE_TILE,
    STREAM_TILE,
    copy_lists,
    lists_before_and_after,
    settle,
    sum_before,
)
from trimkv_core.kernels.memory import DeviceMemory
from trimkv_core.kernels.select import Choice, choose_over_rows, choose_over_streams, score

_TILE = 256
_MOVE_TILE = 16


@triton.jit
def _count(
    rows,
    lengths,
    keys,
    threshold,
    above,
    equal,
    max_entries,
    num_streams,
    choices,
    STREAMS_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    nth = tl.program_id(0)
    stream = tl.program_id(1)
    of_row = lengths + tl.load(rows + nth) * num_streams
    length = tl.load(of_row + stream)
    of_stream = keys + nth.to(tl.int64) * max_entries
    of_stream += sum_before(of_row, stream, num_streams, 1, STREAMS_PADDED)
    limit = tl.load(threshold + nth * choices + stream % choices)
    num_above = 0
    num_equal = 0
    for start in range(0, length, TILE):
        entry = start + tl.arange(0, TILE)
        key = tl.load(of_stream + entry, mask=entry < length, other=0)
        num_above += tl.sum(((key > limit) & (entry < length)).to(tl.int32), 0)
        num_equal += tl.sum(((key == limit) & (entry < length)).to(tl.int32), 0)
    tl.store(above + nth * num_streams + stream, num_above)
    tl.store(equal + nth * num_streams + stream, num_equal)


@triton.jit
def _plan_moves(
    rows,
    lengths,
    keys,
    threshold,
    quota,
    above,
    equal,
    kept,
    moves,
    num_moves,
    max_entries,
    num_streams,
    choices,
    IS_GLOBAL: tl.constexpr,
    STREAMS_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    nth = tl.program_id(0)
    stream = tl.program_id(1)
    of_row = lengths + tl.load(rows + nth) * num_streams
    length = tl.load(of_row + stream)
    begin = nth.to(tl.int64) * max_entries + sum_before(of_row, stream, num_streams, 1, STREAMS_PADDED)
    limit = tl.load(threshold + nth * choices + stream % choices)
    allowed = tl.load(quota + nth * choices + stream % choices)
    if IS_GLOBAL:
        # Ties go to the earlier streams.
        allowed = tl.maximum(allowed - sum_before(equal + nth * num_streams, stream, num_streams, 1, STREAMS_PADDED), 0)
    at = nth * num_streams + stream
    staying = tl.load(above + at) + tl.minimum(allowed, tl.load(equal + at))
    tl.store(kept + at, staying)
    holes = 0
    if staying < length:
        movers = 0
        ties = 0
        for start in range(0, length, TILE):
            entry = start + tl.arange(0, TILE)
            is_held = entry < length
            key = tl.load(keys + begin + entry, mask=is_held, other=0)
            is_tie = is_held & (key == limit)
            nth_tie = ties + tl.cumsum(is_tie.to(tl.int32), 0) - 1
            stays = is_held & ((key > limit) | (is_tie & (nth_tie < allowed)))
            is_hole = (is_held & (entry < staying) & (stays == 0)).to(tl.int32)
            is_mover = (stays & (entry >= staying)).to(tl.int32)
            tl.store(moves + begin + holes + tl.cumsum(is_hole, 0) - 1, entry, mask=is_hole > 0)
            tl.store(moves + begin + length - movers - tl.cumsum(is_mover, 0), entry, mask=is_mover > 0)
            ties += tl.sum(is_tie.to(tl.int32), 0)
            holes += tl.sum(is_hole, 0)
            movers += tl.sum(is_mover, 0)
    tl.store(num_moves + at, holes)


@triton.jit
def _move(
    rows,
    lengths,
    starts,
    arena,
    moves,
    num_moves,
    key,
    value,
    key_scale,
    value_scale,
    log_beta,
    position,
    max_entries,
    num_streams,
    B: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    STREAMS_PADDED: tl.constexpr,
    MOVES: tl.constexpr,
):
    nth = tl.program_id(0)
    stream = tl.program_id(1)
    row = tl.load(rows + nth)
    of_row = lengths + row * num_streams
    count = tl.load(num_moves + nth * num_streams + stream)
    if count > 0:
        length = tl.load(of_row + stream)
        listed = arena + tl.load(starts + row) + sum_before(of_row, stream, num_streams, B, STREAMS_PADDED)
        of_stream = moves + nth.to(tl.int64) * max_entries
        of_stream += sum_before(of_row, stream, num_streams, 1, STREAMS_PADDED)
        dim = tl.arange(0, D_PADDED)[None, :]
        for start in range(0, count, MOVES):
            move = start + tl.arange(0, MOVES)
            is_move = move < count
            is_element = is_move[:, None] & (dim < D)
            hole = tl.load(of_stream + move, mask=is_move, other=0)
            mover = tl.load(of_stream + length - 1 - move, mask=is_move, other=0)
            target = tl.load(listed + hole // B, mask=is_move, other=0).to(tl.int64) * B + hole % B
            source = tl.load(listed + mover // B, mask=is_move, other=0).to(tl.int64) * B + mover % B
            from_element, to_element = source[:, None] * D + dim, target[:, None] * D + dim
            tl.store(key + to_element, tl.load(key + from_element, mask=is_element), mask=is_element)
            tl.store(value + to_element, tl.load(value + from_element, mask=is_element), mask=is_element)
            tl.store(log_beta + target, tl.load(log_beta + source, mask=is_move), mask=is_move)
            tl.store(position + target, tl.load(position + source, mask=is_move), mask=is_move)
            if HAS_SCALES:
                tl.store(key_scale + target, tl.load(key_scale + source, mask=is_move), mask=is_move)
                tl.store(value_scale + target, tl.load(value_scale + source, mask=is_move), mask=is_move)


@triton.jit
def _drop_pages(
    rows,
    lengths,
    kept,
    starts,
    arena,
    scratch,
    free,
    num_free,
    num_streams,
    B: tl.constexpr,
    STREAMS_PADDED: tl.constexpr,
    STREAMS: tl.constexpr,
    PAGES: tl.constexpr,
):
    nth = tl.program_id(0)
    row = tl.load(rows + nth)
    stream = tl.program_id(1) * STREAMS + tl.arange(0, STREAMS)
    before, after, first_before, first_after = lists_before_and_after(
        lengths + row * num_streams, kept + nth * num_streams, stream, num_streams, 0, B, STREAMS_PADDED
    )
    listed = arena + tl.load(starts + row) + first_before
    moved = tl.where(first_before != first_after, after, 0)
    copy_lists(listed, scratch + tl.load(starts + row) + first_after, tl.zeros_like(moved), moved, PAGES)
    emptied = before - after
    top = tl.atomic_add(num_free, tl.sum(emptied, 0), sem="relaxed") + tl.cumsum(emptied, 0) - emptied
    # Below 0 nothing lies: admission's promise was broken, and the pool will be rebuilt.
    copy_lists(listed, free + top - after, after + tl.minimum(tl.maximum(-top, 0), emptied), before, PAGES)


def _keep(memory: DeviceMemory, rows: Tensor, choice: Choice, *, is_global: bool) -> Tensor:
    """Move what stays together in its stream, and return how much that is: int32 [n, S]."""
    count, streams, max_entries = rows.numel(), memory.num_streams, choice.keys.shape[1]
    kept = torch.empty(count, streams, dtype=torch.int32, device=rows.device)
    above, equal, num_moves = (torch.empty_like(kept) for _ in range(3))
    moves = torch.empty_like(choice.keys)
    padded, choices = triton.next_power_of_2(streams), choice.quota.shape[1]
    _count[(count, streams)](
        rows,
        memory.lengths,
        choice.keys,
        choice.threshold,
        above,
        equal,
        max_entries,
        streams,
        choices,
        STREAMS_PADDED=padded,
        TILE=_TILE,
    )
    _plan_moves[(count, streams)](
        rows,
        memory.lengths,
        choice.keys,
        choice.threshold,
        choice.quota,
        above,
        equal,
        kept,
        moves,
        num_moves,
        max_entries,
        streams,
        choices,
        IS_GLOBAL=is_global,
        STREAMS_PADDED=padded,
        TILE=_TILE,
    )
    _move[(count, streams)](
        rows,
        memory.lengths,
        memory.starts,
        memory.arena,
        moves,
        num_moves,
        memory.key,
        memory.value,
        memory.log_beta if memory.key_scale is None else memory.key_scale,
        memory.log_beta if memory.value_scale is None else memory.value_scale,
        memory.log_beta,
        memory.position,
        max_entries,
        streams,
        B=memory.block_size,
        D=memory.head_dim,
        D_PADDED=triton.next_power_of_2(memory.head_dim),
        HAS_SCALES=memory.key_scale is not None,
        STREAMS_PADDED=padded,
        MOVES=_MOVE_TILE,
    )
    return kept


def evict(
    memory: DeviceMemory,
    rows: Tensor,
    *,
    memory_size: Tensor,
    sinks: Tensor,
    window: Tensor,
    buffer: Tensor | None = None,
    is_global: bool,
    max_entries: int,
) -> Tensor:
    """Cut rows to their budgets.

    Args:
        memory: whose.
        rows: int32 [n], distinct but for the null row.
        memory_size: int32 [n]. Global: the S · memory_size best entries of the row stay. Local: of a stream that holds
            at least memory_size + buffer, the memory_size best.
        sinks, window: int32 [n], first and newest positions that are never evicted.
        buffer: int32 [n], for local budgets.
        is_global: which of the two.
        max_entries: no row holds more entries; 8 bytes each are taken for the time of the call.

    Returns:
        int32 [n], entries each row holds now; nobody waited for them.

    Raises:
        ValueError: a local budget without a buffer.
    """
    keys = score(memory, rows, sinks=sinks, window=window, max_entries=max_entries)
    if is_global:
        choice = choose_over_rows(memory, rows, keys=keys, memory_size=memory_size)
    elif buffer is not None:
        choice = choose_over_streams(memory, rows, keys=keys, memory_size=memory_size, buffer=buffer)
    else:
        raise ValueError("buffer=None is not possible with local budgets: they say when a stream is due")
    kept = _keep(memory, rows, choice, is_global=is_global)
    streams = memory.num_streams
    _drop_pages[(rows.numel(), triton.cdiv(streams, STREAM_TILE))](
        rows,
        memory.lengths,
        kept,
        memory.starts,
        memory.arena,
        memory.scratch,
        memory.free,
        memory.num_free,
        streams,
        B=memory.block_size,
        STREAMS_PADDED=triton.next_power_of_2(streams),
        STREAMS=STREAM_TILE,
        PAGES=PAGE_TILE,
    )
    settle(memory, rows, kept=kept, growth=0)
    memory.lengths.index_copy_(0, rows.long(), kept)
    return kept.sum(1, dtype=torch.int32)

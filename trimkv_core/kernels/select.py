"""Which entries an eviction keeps: scores, and by them a threshold for every row or every stream.

Nothing is sorted. A score's bits, turned so that they order as integers, are narrowed down from the top: 11, 11 and 10
at a time over all entries of a row, the count in every bucket telling in which one the last kept entry lies. A stream
of its own is short enough for one program to halve the range of integers 32 times. Either way the outcome is a
threshold and how many of the entries that equal it may stay, the earlier ones.

    keys     int32 [n, entries]   row after row, stream after stream, as places in the streams follow
    choice   threshold, quota     kept: keys above the threshold, and the first `quota` that equal it

Letters: n rows that are evicted, S streams of a row, B entries a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimkv_core.kernels.layout import sum_before
from trimkv_core.kernels.memory import DeviceMemory

# Bits above the digit, below it, and of it, from the highest digit to the lowest.
_DIGITS = ((0, 21, 11), (11, 10, 11), (22, 0, 10))
_CHUNK = 8192
_TILE = 1024
_STREAM_TILE = 256
# A quota for those who may keep everything.
NO_LIMIT = tl.constexpr(2**31 - 1)
LOWEST = tl.constexpr(-(2**31))


@dataclass(frozen=True, slots=True)
class Choice:
    """Who stays: int32 [n, 1] for rows as a whole, [n, S] for streams by themselves.

    Attributes:
        keys: int32 [n, entries], ordered scores.
        threshold: keys above it stay.
        quota: how many keys that equal it stay.
    """

    keys: Tensor
    threshold: Tensor
    quota: Tensor


@triton.jit
def _score(
    rows,
    lengths,
    seen,
    starts,
    arena,
    log_beta,
    position,
    sinks,
    window,
    keys,
    max_entries,
    num_streams,
    B: tl.constexpr,
    STREAMS_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    nth = tl.program_id(0)
    stream = tl.program_id(1)
    row = tl.load(rows + nth)
    of_row = lengths + row * num_streams
    length = tl.load(of_row + stream)
    listed = arena + tl.load(starts + row) + sum_before(of_row, stream, num_streams, B, STREAMS_PADDED)
    to = keys + nth.to(tl.int64) * max_entries + sum_before(of_row, stream, num_streams, 1, STREAMS_PADDED)
    now = tl.load(seen + row)
    last_sink = tl.load(sinks + nth)
    first_of_window = now - tl.load(window + nth)
    for start in range(0, length, TILE):
        entry = start + tl.arange(0, TILE)
        is_held = entry < length
        page = tl.load(listed + entry // B, mask=is_held, other=0)
        slot = page.to(tl.int64) * B + entry % B
        at = tl.load(position + slot, mask=is_held, other=0)
        score = tl.load(log_beta + slot, mask=is_held, other=0.0) * (now + 1 - at).to(tl.float32)
        score = tl.where((at < last_sink) | (at >= first_of_window), float("inf"), score)
        bits = score.to(tl.int32, bitcast=True)
        tl.store(to + entry, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), mask=is_held)


@triton.jit
def _digit(key, BELOW: tl.constexpr, BITS: tl.constexpr, IS_TOP: tl.constexpr):
    """The digit of a key; of the highest, which carries the sign, from the lowest value on."""
    if IS_TOP:
        digit = (key >> BELOW) + 2 ** (BITS - 1)
    else:
        digit = (key >> BELOW) & (2**BITS - 1)
    return digit


@triton.jit
def _count_digits(
    rows,
    lengths,
    keys,
    prefix,
    histogram,
    max_entries,
    num_streams,
    BELOW: tl.constexpr,
    BITS: tl.constexpr,
    IS_TOP: tl.constexpr,
    STREAMS_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    nth = tl.program_id(0)
    begin = tl.program_id(1) * CHUNK
    held = sum_before(lengths + tl.load(rows + nth) * num_streams, num_streams, num_streams, 1, STREAMS_PADDED)
    if begin < held:
        wanted = tl.load(prefix + nth)
        counts = tl.zeros([2**BITS], tl.int32)
        for start in range(begin, tl.minimum(begin + CHUNK, held), TILE):
            entry = start + tl.arange(0, TILE)
            is_counted = entry < held
            key = tl.load(keys + nth.to(tl.int64) * max_entries + entry, mask=is_counted, other=0)
            if not IS_TOP:
                is_counted = is_counted & ((key >> (BELOW + BITS)) == wanted)
            counts += tl.histogram(_digit(key, BELOW, BITS, IS_TOP), 2**BITS, mask=is_counted)
        digit = tl.arange(0, 2**BITS)
        tl.atomic_add(histogram + nth * 2**BITS + digit, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _pick_digit(histogram, memory_size, prefix, remaining, num_streams, BITS: tl.constexpr, IS_TOP: tl.constexpr):
    nth = tl.program_id(0)
    digit = tl.arange(0, 2**BITS)
    counts = tl.load(histogram + nth * 2**BITS + digit)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    if IS_TOP:
        limit = tl.load(memory_size + nth).to(tl.int64) * num_streams
        # Whoever holds no more than that keeps it all: no bucket reaches so far, and the digits stay the lowest.
        wanted = tl.where(tl.sum(counts, 0) <= limit, NO_LIMIT, limit).to(tl.int32)
    else:
        wanted = tl.load(remaining + nth)
    is_picked = (above < wanted) & (counts >= wanted - above)
    picked = tl.sum(tl.where(is_picked, digit, 0), 0)
    if IS_TOP:
        tl.store(prefix + nth, picked - 2 ** (BITS - 1))
    else:
        tl.store(prefix + nth, (tl.load(prefix + nth) << BITS) | picked)
    tl.store(remaining + nth, wanted - tl.sum(tl.where(is_picked, above, 0), 0))


@triton.jit
def _halve(
    rows,
    lengths,
    keys,
    memory_size,
    buffer,
    threshold,
    quota,
    max_entries,
    num_streams,
    STREAMS_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    nth = tl.program_id(0)
    stream = tl.program_id(1)
    of_row = lengths + tl.load(rows + nth) * num_streams
    length = tl.load(of_row + stream)
    limit = tl.load(memory_size + nth)
    lowest = tl.full([], LOWEST, tl.int64)
    above = 0
    if length - tl.load(buffer + nth) >= limit:
        of_stream = keys + nth.to(tl.int64) * max_entries
        of_stream += sum_before(of_row, stream, num_streams, 1, STREAMS_PADDED)
        # The largest integer that `limit` keys reach lies in [lowest, highest].
        highest = tl.full([], 2**31 - 1, tl.int64)
        for _ in range(32):
            middle = lowest + ((highest - lowest + 1) >> 1)
            reached = 0
            for start in range(0, length, TILE):
                entry = start + tl.arange(0, TILE)
                key = tl.load(of_stream + entry, mask=entry < length, other=0)
                reached += tl.sum(((key >= middle) & (entry < length)).to(tl.int32), 0)
            lowest = tl.where(reached >= limit, middle, lowest)
            highest = tl.where(reached >= limit, highest, middle - 1)
            # What the last failure reached is what lies above the answer.
            above = tl.where(reached >= limit, above, reached)
    else:
        limit = tl.full([], NO_LIMIT, tl.int32)
    tl.store(threshold + nth * num_streams + stream, lowest.to(tl.int32))
    tl.store(quota + nth * num_streams + stream, limit - above)


def score(memory: DeviceMemory, rows: Tensor, *, sinks: Tensor, window: Tensor, max_entries: int) -> Tensor:
    """Scores log β · age of all entries as integers that order alike, int32 [n, max_entries]; pins score +∞.

    Args:
        memory: whose.
        rows: int32 [n].
        sinks, window: int32 [n], first and newest positions that are never evicted.
        max_entries: no row holds more.
    """
    streams = memory.num_streams
    keys = torch.empty(rows.numel(), max_entries, dtype=torch.int32, device=rows.device)
    _score[(rows.numel(), streams)](
        rows,
        memory.lengths,
        memory.seen,
        memory.starts,
        memory.arena,
        memory.log_beta,
        memory.position,
        sinks,
        window,
        keys,
        max_entries,
        streams,
        B=memory.block_size,
        STREAMS_PADDED=triton.next_power_of_2(streams),
        TILE=_STREAM_TILE,
    )
    return keys


def choose_over_rows(memory: DeviceMemory, rows: Tensor, *, keys: Tensor, memory_size: Tensor) -> Choice:
    """The S · memory_size best of every row.

    Args:
        memory: whose.
        rows: int32 [n].
        keys: int32 [n, entries], see `score`.
        memory_size: int32 [n].
    """
    count, streams, max_entries = rows.numel(), memory.num_streams, keys.shape[1]
    histograms = torch.zeros(len(_DIGITS), count, 2048, dtype=torch.int32, device=rows.device)
    prefix = torch.zeros(count, 1, dtype=torch.int32, device=rows.device)
    remaining = torch.zeros(count, 1, dtype=torch.int32, device=rows.device)
    for histogram, (skipped, below, bits) in zip(histograms, _DIGITS, strict=True):
        is_top = skipped == 0
        _count_digits[(count, triton.cdiv(max_entries, _CHUNK))](
            rows,
            memory.lengths,
            keys,
            prefix,
            histogram,
            max_entries,
            streams,
            BELOW=below,
            BITS=bits,
            IS_TOP=is_top,
            STREAMS_PADDED=triton.next_power_of_2(streams),
            CHUNK=_CHUNK,
            TILE=_TILE,
        )
        _pick_digit[(count,)](histogram, memory_size, prefix, remaining, streams, BITS=bits, IS_TOP=is_top)
    return Choice(keys, threshold=prefix, quota=remaining)


def choose_over_streams(
    memory: DeviceMemory, rows: Tensor, *, keys: Tensor, memory_size: Tensor, buffer: Tensor
) -> Choice:
    """The memory_size best of every stream that holds at least memory_size + buffer; all of the others.

    Args:
        memory: whose.
        rows: int32 [n].
        keys: int32 [n, entries], see `score`.
        memory_size, buffer: int32 [n].
    """
    count, streams = rows.numel(), memory.num_streams
    threshold = torch.empty(count, streams, dtype=torch.int32, device=rows.device)
    quota = torch.empty_like(threshold)
    _halve[(count, streams)](
        rows,
        memory.lengths,
        keys,
        memory_size,
        buffer,
        threshold,
        quota,
        keys.shape[1],
        streams,
        STREAMS_PADDED=triton.next_power_of_2(streams),
        TILE=_TILE,
    )
    return Choice(keys, threshold=threshold, quota=quota)

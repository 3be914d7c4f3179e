"""Attention over pages on the CPU, read where they lie: nothing is gathered for decoding, nothing padded over streams.

Decoding: one task a row and KV head, taken by whichever thread is free, since streams differ twenty-fold in length; an
online softmax from page to page. Prefill: what a head sees is packed once for the tiles of `vector`, then one task a
query head and block of tokens: all logits of the block, their softmax, the product with the values.

A row's numbers depend on its own sequence only. bfloat16 pages are read as their bits and widened.

Letters: S segments, N rows that decode, L layers, H KV heads, G query heads a KV head, T tokens, D head dimension, P
pages, B block size, W entries that a chunk sees.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import prange

from trimkv_core.cpu.vector import LANES, dot, exp, fetch_ahead, multiply_rows, next_number, widen

_FAST = {"reassoc", "contract", "nsz", "arcp"}
_LOWEST = np.float32(-3.0e38)
NO_WINDOW = -1
_LINE_BYTES = 64
# Tokens a prefill task takes: eight tiles, whose logits stay in the second-level cache.
BLOCK_TOKENS = 48


def use_threads(count: int) -> int:
    """Run this thread's kernels on `count` threads, or on as many as numba has; returns how many.

    To be called before a thread's first kernel: numba starts its pool then, and with OpenMP that gives the starting
    thread's torch as many threads as there are processors, whatever $OMP_NUM_THREADS says.
    """
    of_torch = torch.get_num_threads()
    bounded: int = max(1, min(count, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(bounded)
    if torch.get_num_threads() != of_torch:
        torch.set_num_threads(of_torch)
    return bounded


@numba.njit(parallel=True, nogil=True, cache=True)
def append(key, value, log_beta, position, slots, own_key, own_value, own_log_beta, own_position):
    """Write a layer's entries.

    Args:
        key, value: [P, B, D], float32 or bits.
        log_beta: float32 [P·B].
        position: int32 [P, B].
        slots: int64 [H, T].
        own_key, own_value: [T, H, D], as key.
        own_log_beta: float32 [T, H]; [0, 0]: none.
        own_position: int32 [T].
    """
    tokens, heads, dim = own_key.shape
    block = key.shape[1]
    for task in prange(tokens * heads):
        token, head = task // heads, task % heads
        slot = slots[head, token]
        page, place = slot // block, slot % block
        for d in range(dim):
            key[page, place, d] = own_key[token, head, d]
            value[page, place, d] = own_value[token, head, d]
        position[page, place] = own_position[token]
        if own_log_beta.size:
            log_beta[slot] = own_log_beta[token, head]


@numba.njit(inline="always")
def _fetch_page(storage, page, count, is_ready, width, buffer):
    """The address of a page's rows as float32 of `width` numbers: where they lie, or widened and padded in `buffer`."""
    if is_ready:
        return storage[page].ctypes.data
    for i in range(count):
        for d in range(storage.shape[2]):
            buffer[i, d] = widen(storage[page, i, d])
    return buffer.ctypes.data


@numba.njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def decode(
    key,
    value,
    position,
    arena,
    first_page,
    lengths,
    layer,
    query,
    query_position,
    scale,
    window,
    is_ready,
    threads,
    counter,
    out,
):
    """One query token a row over the pages of its streams.

    Args:
        key, value: float32, or bfloat16 as uint16: [P, B, D].
        position: int32 [P, B].
        arena: int32 [A], page lists.
        first_page, lengths: int64 [S, L, H]; the first N segments are the rows.
        layer: which layer.
        query: float32 [N, H·G, D].
        query_position: int32 [≥ N].
        scale: of the logits.
        window: only entries above the query's position - window count; NO_WINDOW: all.
        is_ready: whether pages are float32 and D a multiple of LANES, so that they are used where they lie.
        threads: how many there are.
        counter: int64 [1], scratch.
        out: float32 [N, H·G, D]; zeros where a stream is empty.
    """
    rows, query_heads, dim = query.shape
    block, heads = key.shape[1], lengths.shape[2]
    group = query_heads // heads
    width = (dim + LANES - 1) // LANES * LANES
    page_bytes = block * dim * key.itemsize
    counter[0] = 0
    address = counter.ctypes.data
    for _ in prange(threads):
        # Of this thread; zeros, since the padding of a row must be a number.
        keys = np.zeros((0 if is_ready else block, width), np.float32)
        values = np.zeros((0 if is_ready else block, width), np.float32)
        asked = np.zeros((group, width), np.float32)
        mixed = np.zeros((group, width), np.float32)
        logits = np.empty((group, block), np.float32)
        best = np.empty(group, np.float32)
        total = np.empty(group, np.float32)
        while True:
            task = next_number(address)
            if task >= rows * heads:
                break
            row, head = task // heads, task % heads
            length, listed = lengths[row, layer, head], first_page[row, layer, head]
            oldest = query_position[row] - window if window != NO_WINDOW else -1
            asked[:, :dim] = query[row, head * group : (head + 1) * group]
            mixed[:] = 0
            best[:] = _LOWEST
            total[:] = 0
            for first in range(0, length, block):
                page = arena[listed + first // block]
                count = min(block, length - first)
                if first + block < length:
                    # Pages lie anywhere, and no hardware guesses where the next one does.
                    following = arena[listed + first // block + 1]
                    key_address, value_address = key[following].ctypes.data, value[following].ctypes.data
                    for line in range(0, page_bytes, _LINE_BYTES):
                        fetch_ahead(key_address + np.uintp(line))
                        fetch_ahead(value_address + np.uintp(line))
                key_rows = _fetch_page(key, page, count, is_ready, width, keys)
                for i in range(count):
                    key_row = key_rows + np.uintp(4 * i * width)
                    for member in range(group):
                        logits[member, i] = dot(asked[member].ctypes.data, key_row, width) * scale
                if oldest >= 0:
                    for i in range(count):
                        if position[page, i] <= oldest:
                            logits[:, i] = -np.inf
                for member in range(group):
                    line = logits[member]
                    highest = best[member]
                    for i in range(count):
                        highest = max(highest, line[i])
                    fade = exp(best[member] - highest)
                    best[member] = highest
                    if fade != 1:
                        for d in range(width):
                            mixed[member, d] *= fade
                    added = np.float32(0.0)
                    for i in range(count):
                        weight = exp(line[i] - highest)
                        line[i] = weight
                        added += weight
                    total[member] = total[member] * fade + added
                value_rows = _fetch_page(value, page, count, is_ready, width, values)
                for lane in range(0, width, LANES):
                    slice_ = mixed[0, lane:].ctypes.data
                    multiply_rows(
                        value_rows + np.uintp(4 * lane),
                        width,
                        logits.ctypes.data,
                        block,
                        slice_,
                        width,
                        np.uintp(0),
                        slice_,
                        count,
                        group,
                    )
            for member in range(group):
                for d in range(dim):
                    # An empty stream has a total of 0 and gives 0; a NaN gives NaN.
                    share = mixed[member, d] / total[member] if total[member] != 0 else np.float32(0.0)
                    out[row, head * group + member, d] = share


@numba.njit(parallel=True, nogil=True, cache=True)
def pack_seen(key, value, position, arena, first_page, lengths, own_key, own_value, own_position, keys, values, places):
    """Lay what a chunk sees of one layer side by side for the tiles: the entries held, then the chunk's own.

    Args:
        key, value, position, arena: as in `decode`.
        first_page, lengths: int64 [H], of the streams before the chunk.
        own_key, own_value: float32 [T, H, D].
        own_position: int32 [T].
        keys: out, float32 [H, W / LANES, D, LANES].
        values: out, float32 [H, padded D / LANES, W, LANES].
        places: out, int32 [H, W], positions.
    """
    heads, panels, dim, _ = keys.shape
    block, tokens = key.shape[1], own_key.shape[0]
    for task in prange(heads * panels):
        head, panel = task // panels, task % panels
        length, listed = lengths[head], first_page[head]
        for lane in range(LANES):
            at = panel * LANES + lane
            own = at - length
            if own < 0:
                page, place = arena[listed + at // block], at % block
                places[head, at] = position[page, place]
                for d in range(dim):
                    keys[head, panel, d, lane] = widen(key[page, place, d])
                    values[head, d // LANES, at, d % LANES] = widen(value[page, place, d])
            elif own < tokens:
                places[head, at] = own_position[own]
                for d in range(dim):
                    keys[head, panel, d, lane] = own_key[own, head, d]
                    values[head, d // LANES, at, d % LANES] = own_value[own, head, d]
            else:  # never seen, but a product with it must be a number
                for d in range(dim):
                    keys[head, panel, d, lane] = 0
                    values[head, d // LANES, at, d % LANES] = 0


@numba.njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def prefill(keys, values, places, lengths, query, query_position, scale, window, threads, counter, out):
    """Every token of a chunk over what `pack_seen` has packed, causally.

    Args:
        keys, values, places: of `pack_seen`.
        lengths: int64 [H], entries held before the chunk.
        query: float32 [T, H·G, D].
        query_position: int32 [T].
        scale, window: as in `decode`.
        threads: how many there are.
        counter: int64 [1], scratch.
        out: float32 [T, H·G, D].
    """
    tokens, query_heads, dim = query.shape
    heads, panels = keys.shape[0], keys.shape[1]
    slices = values.shape[1]
    width = panels * LANES
    group = query_heads // heads
    blocks = (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    stride = query_heads * dim
    counter[0] = 0
    address = counter.ctypes.data
    for _ in prange(threads):
        logits = np.empty((BLOCK_TOKENS, width), np.float32)
        mixed = np.empty((BLOCK_TOKENS, slices * LANES), np.float32)
        totals = np.empty(BLOCK_TOKENS, np.float32)
        while True:
            task = next_number(address)
            if task >= blocks * query_heads:
                break
            # Late blocks see more: they go first, so that the last tasks are short.
            first = (blocks - 1 - task // query_heads) * BLOCK_TOKENS
            asking = task % query_heads
            head = asking // group
            count = min(BLOCK_TOKENS, tokens - first)
            held = lengths[head]
            seen = held + first + count
            for panel in range((seen + LANES - 1) // LANES):
                multiply_rows(
                    keys[head, panel].ctypes.data,
                    LANES,
                    query[first, asking].ctypes.data,
                    stride,
                    logits[0, panel * LANES :].ctypes.data,
                    width,
                    np.uintp(0),
                    np.uintp(0),
                    dim,
                    count,
                )
            for row in range(count):
                line = logits[row]
                visible = held + first + row + 1
                if window != NO_WINDOW:
                    oldest = query_position[first + row] - window
                    for i in range(visible):
                        if places[head, i] <= oldest:
                            line[i] = -np.inf
                highest = _LOWEST
                for i in range(visible):
                    highest = max(highest, line[i])
                total = np.float32(0.0)
                for i in range(visible):
                    weight = exp((line[i] - highest) * scale)
                    line[i] = weight
                    total += weight
                line[visible:seen] = 0
                totals[row] = total
            for part in range(slices):
                multiply_rows(
                    values[head, part].ctypes.data,
                    LANES,
                    logits.ctypes.data,
                    width,
                    mixed[0, part * LANES :].ctypes.data,
                    slices * LANES,
                    np.uintp(0),
                    np.uintp(0),
                    seen,
                    count,
                )
            for row in range(count):
                for d in range(dim):
                    out[first + row, asking, d] = mixed[row, d] / totals[row]

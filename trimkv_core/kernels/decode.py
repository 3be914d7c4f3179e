"""Attention of one new token a row over what its streams hold, read page by page where it lies.

A program attends for all query heads of one KV head of one row, over one of `splits` parts of the stream: it gathers
the keys and values of a tile of entries at a time through the page list and folds them into a running softmax in
float32. Where there are several parts, a second kernel puts them together. Streams of a layer differ twenty-fold in
length, so a part is never smaller than a tile: short streams leave most of their programs nothing to do, and those end
at once.

    stream of 150 entries, 2 parts, tiles of 64:  part 0 [64][64]   part 1 [22]
    stream of  40 entries:                        part 0 [40]       part 1 –

Letters: N rows, H KV heads, G query heads a KV head, S streams of a row, D head dimension, B entries a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimkv_core.kernels.memory import PagedEntries

_LOG2_E = 1.4426950408889634
# A matrix product takes at least 16 rows. Most of them idle, beside loads that take ten times as long; sums instead of
# products need twice the registers, even for one query head.
_DOT_ROWS = 16
# While a tile is worked on, the next one's entries are fetched and the page numbers of the one behind it.
STAGES = 3
_MAX_SPLITS = 64
# Ragged streams: with a few programs a multiprocessor, the long ones find room beside the short ones.
_PROGRAMS_PER_SM = 4
# Under so many pages a part, putting the parts together costs more than it saves.
_PAGES_PER_SPLIT = 8


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """What the parts of split streams leave for each other.

    Attributes:
        partial: float32 [N, H·G, splits, D], each part's attention.
        weight: float32 [N, H·G, splits], the base-2 logarithm of what its softmax divided by.
    """

    partial: Tensor
    weight: Tensor


@cache
def multiprocessors(device: torch.device) -> int:
    """How many `device` has; 1 for a CPU that interprets."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(num_rows: int, num_heads: int, num_sms: int, pages_guess: int) -> int:
    """Parts that fill the device, a power of two: none too small to be worth it.

    Args:
        num_rows: N.
        num_heads: H.
        num_sms: multiprocessors of the device.
        pages_guess: pages a typical stream holds.
    """
    wanted = _PROGRAMS_PER_SM * num_sms // max(num_rows * num_heads, 1)
    worthwhile = pages_guess // _PAGES_PER_SPLIT
    splits = max(1, min(wanted, worthwhile, _MAX_SPLITS))
    return 1 << (splits.bit_length() - 1)


def entry_tile(itemsize: int) -> int:
    """Entries of a tile, for keys of so many bytes an element: 8-bit floats lie beside what they are widened to."""
    return 64 if itemsize == 2 else 32


def padded_group(group: int) -> int:
    """Rows of the matrix products that serve G query heads."""
    return max(_DOT_ROWS, 1 << (group - 1).bit_length())


def workspace_for(
    num_rows: int, num_query_heads: int, head_dim: int, *, splits: int, device: torch.device | str
) -> DecodeWorkspace | None:
    """Room for `splits` parts of each of N rows' H·G query heads; None where streams are not split."""
    if splits == 1:
        return None
    shape = (num_rows, num_query_heads, splits)
    return DecodeWorkspace(
        partial=torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        weight=torch.empty(shape, dtype=torch.float32, device=device),
    )


# One kernel for all layers, whatever their numbers divide by.
@triton.jit(do_not_specialize=["layer", "window"])
def _attend(
    query,
    query_by_row,
    query_by_head,
    out,
    out_by_row,
    out_by_head,
    partial,
    weight,
    key,
    value,
    key_scale,
    value_scale,
    position,
    arena,
    lengths,
    rows,
    first_page,
    now,
    layer,
    window,
    scale,
    num_streams,
    num_heads,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
):
    nth = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(rows + nth)
    stream = layer * num_heads + head
    length = tl.load(lengths + row * num_streams + stream)
    listed = arena + tl.load(first_page + nth * num_streams + stream)
    part = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    begin = split * part
    end = tl.minimum(begin + part, length)

    group = tl.arange(0, G_PADDED)
    dim = tl.arange(0, D_PADDED)
    is_group = (group < G)[:, None] & (dim < D)[None, :]
    of_query = nth.to(tl.int64) * query_by_row + (head * G + group)[:, None] * query_by_head + dim[None, :]
    q = tl.load(query + of_query, mask=is_group, other=0.0)
    if HAS_WINDOW:
        oldest = tl.load(now + nth) - window

    best = tl.full([G_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([G_PADDED], tl.float32)
    mixed = tl.zeros([G_PADDED, D_PADDED], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        entry = start + tl.arange(0, TILE)
        is_held = entry < end
        page = tl.load(listed + entry // B, mask=is_held, other=0)
        slot = page.to(tl.int64) * B + entry % B
        element = slot[:, None] * D + dim[None, :]
        is_element = is_held[:, None] & (dim < D)[None, :]
        k = tl.load(key + element, mask=is_element, other=0.0)
        v = tl.load(value + element, mask=is_element, other=0.0)
        if HAS_WINDOW:
            is_held = is_held & (tl.load(position + slot, mask=is_held, other=0) > oldest)
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        if HAS_SCALES:
            logits *= tl.load(key_scale + slot, mask=is_held, other=0.0)[None, :]
        logits = tl.where(is_held[None, :], logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, 1))
        # Where a window hides all entries so far, ∞ - ∞ must not be asked for.
        finite = tl.where(new_best == float("-inf"), 0.0, new_best)
        fade = tl.exp2(best - finite)
        weights = tl.exp2(logits - finite[:, None])
        total = total * fade + tl.sum(weights, 1)
        if HAS_SCALES:
            weights *= tl.load(value_scale + slot, mask=is_held, other=0.0)[None, :]
        mixed = tl.dot(weights.to(q.dtype), v.to(q.dtype), mixed * fade[:, None], input_precision="ieee")
        best = new_best

    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    if SPLITS == 1:
        of_out = nth.to(tl.int64) * out_by_row + (head * G + group)[:, None] * out_by_head + dim[None, :]
        tl.store(out + of_out, mixed.to(out.dtype.element_ty), mask=is_group)
    else:
        at = ((nth * num_heads + head) * G + group).to(tl.int64) * SPLITS + split
        # Nothing seen: log2 0.
        tl.store(weight + at, best + tl.log2(tl.where(total > 0.0, total, 1.0)), mask=group < G)
        if begin < end:
            tl.store(partial + at[:, None] * D + dim[None, :], mixed, mask=is_group)


@triton.jit
def _combine(
    partial,
    weight,
    out,
    out_by_row,
    out_by_head,
    num_query_heads,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    nth = tl.program_id(0)
    head = tl.program_id(1)
    at = (nth * num_query_heads + head).to(tl.int64) * SPLITS + tl.arange(0, SPLITS)
    dim = tl.arange(0, D_PADDED)
    logarithm = tl.load(weight + at)
    best = tl.max(logarithm, 0)
    weights = tl.exp2(logarithm - tl.where(best == float("-inf"), 0.0, best))
    # Parts that saw nothing wrote nothing.
    is_there = (logarithm > float("-inf"))[:, None] & (dim < D)[None, :]
    parts = tl.load(partial + at[:, None] * D + dim[None, :], mask=is_there, other=0.0)
    total = tl.sum(weights, 0)
    mixed = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    to = out + nth.to(tl.int64) * out_by_row + head * out_by_head + dim
    tl.store(to, mixed.to(out.dtype.element_ty), mask=dim < D)


def decode_attention(
    memory: PagedEntries,
    rows: Tensor,
    *,
    first_page: Tensor,
    layer: int,
    query: Tensor,
    out: Tensor,
    num_heads: int,
    scale: float,
    window: int | None,
    position: Tensor,
    splits: int,
    workspace: DecodeWorkspace | None,
) -> None:
    """Attend with one token a row, whose own entry is in the pages already. Empty streams give zeros.

    Args:
        memory: what is attended to; lengths are read on the device.
        rows: int32 or int64 [N].
        first_page: int32 or int64 [N, S], where the streams' pages begin in the arena.
        layer: which.
        query: [N, H·G, D], its last dimension contiguous.
        out: [N, H·G, D], the same.
        num_heads: H.
        scale: of the logits.
        window: only positions above position - window are seen; None: all.
        position: int32 [N], the tokens'.
        splits: parts a stream is attended to in, a power of two; see `choose_splits`.
        workspace: see `workspace_for`.

    Raises:
        ValueError: streams are to be split and there is no workspace.
    """
    count, query_heads, dim = query.shape
    group = query_heads // num_heads
    if splits > 1 and workspace is None:
        raise ValueError(f"splits={splits} needs a workspace: see workspace_for")
    partial = out if workspace is None else workspace.partial
    weight = out if workspace is None else workspace.weight
    padded = triton.next_power_of_2(dim)
    _attend[(count, num_heads, splits)](
        query,
        query.stride(0),
        query.stride(1),
        out,
        out.stride(0),
        out.stride(1),
        partial,
        weight,
        memory.key,
        memory.value,
        memory.position if memory.key_scale is None else memory.key_scale,
        memory.position if memory.value_scale is None else memory.value_scale,
        memory.position,
        memory.arena,
        memory.lengths,
        rows,
        first_page,
        position,
        layer,
        0 if window is None else window,
        scale * _LOG2_E,
        memory.lengths.shape[1],
        num_heads,
        G=group,
        G_PADDED=padded_group(group),
        D=dim,
        D_PADDED=max(16, padded),
        B=memory.key.shape[1],
        TILE=entry_tile(memory.key.element_size()),
        SPLITS=splits,
        HAS_SCALES=memory.key_scale is not None,
        HAS_WINDOW=window is not None,
        STAGES=STAGES,
    )
    if splits > 1:
        _combine[(count, query_heads)](
            partial, weight, out, out.stride(0), out.stride(1), query_heads, D=dim, D_PADDED=padded, SPLITS=splits
        )

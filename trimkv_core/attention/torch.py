"""The reference backend: plain PyTorch on any device.

Decoding works on pages as tiles. Under a global budget the streams of a layer differ twenty-fold in length, so a padded
gather would mostly move padding; a tile is one page of one stream, the softmax is put together over a stream's tiles,
and the waste is at most one page a stream.

    stream 0  [page][page][page]      tiles      0  0  0  1  2  2
    stream 1  [page]               →  q·kᵀ   [tiles, G, B]   one batched product
    stream 2  [page][page]            softmax over all tiles of a stream, Σ p·v added up by stream

A prefill chunk of one sequence gathers its heads' cached entries side by side and attends to them and, causally, to
itself.

Letters: S segments, L layers, H KV heads, G query heads a KV head, T tokens, D head dimension, P pages, B block size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_core.attention.base import AttentionBackend
from trimkv_core.batches import StepBatch
from trimkv_core.fp8 import FP8, dequantise, gather_pages, gather_slots, quantise
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

_MASKED = float("-inf")


@dataclass(frozen=True, slots=True)
class _DecodeTiles:
    """Pages of all decoding rows, layer after layer.

    Attributes:
        page: int64 [tiles].
        owner: int64 [tiles], s·H + h of the row and head it belongs to.
        bias: float32 [tiles, 1, B], 0 or -∞ for places that hold no entry.
        layer_start: L + 1 host numbers, where each layer's tiles begin.
        position: int32 [S], the query's position.
    """

    page: Tensor
    owner: Tensor
    bias: Tensor
    layer_start: list[int]
    position: Tensor


@dataclass(frozen=True, slots=True)
class _PrefillChunk:
    """One segment of several tokens.

    Attributes:
        start, stop: its tokens in the packed batch.
        cached: int64 [L, H], entries held before it.
        first_page: int64 [L, H], where each stream's pages begin in the arena.
        widths: L host numbers, the longest of the layer's streams.
        position: int32 [stop - start].
    """

    start: int
    stop: int
    cached: Tensor
    first_page: Tensor
    widths: list[int]
    position: Tensor


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """What all layers of a step share."""

    pool: PagePool
    arena: Tensor
    slots: Tensor
    position: Tensor
    num_decode: int
    tiles: _DecodeTiles | None
    chunks: tuple[_PrefillChunk, ...]
    causal: Tensor | None


class TorchBackend(AttentionBackend[TorchPlan]):
    """See the module's docstring."""

    name = "torch"

    def plan(self, table: SequenceTable, batch: StepBatch) -> TorchPlan:
        chunks = _plan_chunks(batch)
        longest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        causal = torch.full((longest, longest), _MASKED, device=table.pool.device, dtype=torch.float32).triu(1)
        # Slots, head after head: the order in which a layer's keys are laid out for writing.
        return TorchPlan(
            pool=table.pool,
            arena=table.page_lists.arena,
            slots=batch.slots.flatten(1),
            position=batch.position.repeat(table.geometry.num_heads),
            num_decode=batch.num_decode,
            tiles=_plan_tiles(table, batch) if batch.num_decode else None,
            chunks=chunks,
            causal=causal if chunks else None,
        )

    def append(self, plan: TorchPlan, layer: int, key: Tensor, value: Tensor, log_beta: Tensor | None) -> None:
        plan.pool.write_layer(plan.slots[layer], key, value, log_beta, plan.position)

    def attend(
        self,
        plan: TorchPlan,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        parts = []
        if plan.tiles is not None:
            parts.append(_decode(plan.pool, plan.tiles, layer, query[: plan.num_decode], scale=scale, window=window))
        if plan.chunks and plan.pool.dtype == FP8:
            # A chunk attends to its own entries as they are stored: where it is cut changes no number.
            key, value = (dequantise(*quantise(states), query.dtype) for states in (key, value))
        for chunk in plan.chunks:
            own = slice(chunk.start, chunk.stop)
            parts.append(_prefill(plan, chunk, layer, (query[own], key[own], value[own]), scale=scale, window=window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _plan_tiles(table: SequenceTable, batch: StepBatch) -> _DecodeTiles:
    count, block = batch.num_decode, table.geometry.block_size
    device = table.pool.device
    # [L, S, H]: layer after layer, so that a layer's tiles are one slice.
    lengths = batch.lengths_after[:count].transpose(0, 1).contiguous()
    pages = -(-lengths // block)
    flat = pages.view(-1)
    stream = torch.repeat_interleave(
        torch.arange(flat.numel(), device=device), flat, output_size=sum(batch.row_pages[:count])
    )
    local = torch.arange(stream.numel(), device=device) - (torch.cumsum(flat, 0) - flat)[stream]
    first_page = batch.first_page[:count].transpose(0, 1).reshape(-1)
    place = local[:, None] * block + torch.arange(block, device=device)
    is_empty = place >= lengths.view(-1)[stream][:, None]
    return _DecodeTiles(
        page=table.page_lists.arena[first_page[stream] + local].long(),
        owner=stream % (count * table.geometry.num_heads),
        bias=torch.zeros(is_empty.shape, device=device).masked_fill_(is_empty, _MASKED)[:, None],
        layer_start=[0, *torch.cumsum(pages.sum((1, 2)), 0).tolist()],
        position=batch.position[:count],
    )


def _plan_chunks(batch: StepBatch) -> tuple[_PrefillChunk, ...]:
    chunks = []
    start = batch.num_decode
    widths: list[list[int]] = batch.lengths_before.amax(2).tolist() if start < len(batch.segments) else []
    for index in range(batch.num_decode, len(batch.segments)):
        stop = start + batch.segments[index].tokens
        chunks.append(
            _PrefillChunk(
                start=start,
                stop=stop,
                cached=batch.lengths_before[index],
                first_page=batch.first_page[index],
                widths=widths[index],
                position=batch.position[start:stop],
            )
        )
        start = stop
    return tuple(chunks)


def _decode(
    pool: PagePool, tiles: _DecodeTiles, layer: int, query: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """[S, H·G, D] → [S, H·G, D]; the token's own entry is in the pages already."""
    rows, query_heads, dim = query.shape
    here = slice(tiles.layer_start[layer], tiles.layer_start[layer + 1])
    page, owner, bias = tiles.page[here], tiles.owner[here], tiles.bias[here]
    if window is not None:
        oldest = (tiles.position - window)[owner // pool.geometry.num_heads]
        bias = bias.masked_fill((pool.position[page] <= oldest[:, None])[:, None], _MASKED)
    heads = pool.geometry.num_heads
    by_stream = (query * scale).reshape(rows * heads, query_heads // heads, dim)
    key = gather_pages(pool.key, pool.key_scale, page, query.dtype)
    logits = torch.bmm(by_stream.index_select(0, owner), key.transpose(1, 2)).float() + bias
    best = logits.new_full(by_stream.shape[:2], torch.finfo(torch.float32).min)
    best.scatter_reduce_(0, owner[:, None].expand(-1, best.shape[1]), logits.amax(-1), "amax")
    weights = torch.exp(logits - best.index_select(0, owner)[:, :, None])
    value = gather_pages(pool.value, pool.value_scale, page, query.dtype)
    mixed = torch.bmm(weights.to(value.dtype), value)
    numerator = torch.zeros(by_stream.shape, device=query.device).index_add_(0, owner, mixed.float())
    denominator = torch.zeros_like(best).index_add_(0, owner, weights.sum(-1))
    return (numerator / denominator[:, :, None]).to(query.dtype).view(rows, query_heads, dim)


def _prefill(
    plan: TorchPlan,
    chunk: _PrefillChunk,
    layer: int,
    own: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """[T, H·G, D] → [T, H·G, D], heads as a batch of their own since each holds another number of entries."""
    query, key, value = own
    tokens, query_heads, dim = query.shape
    heads = key.shape[1]
    grouped = query.reshape(tokens, heads, query_heads // heads, dim).permute(1, 2, 0, 3)
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    width = chunk.widths[layer]
    if width == 0 and window is None:
        mixed = F.scaled_dot_product_attention(
            grouped, *_for_every_query_head(grouped, key, value), is_causal=True, scale=scale
        )
        return mixed.permute(2, 0, 1, 3).reshape(tokens, query_heads, dim)
    place = torch.arange(width, device=query.device)
    cached = chunk.cached[layer][:, None]
    listed_at = chunk.first_page[layer][:, None] + place // plan.pool.geometry.block_size
    is_empty = place >= cached
    page = plan.arena[listed_at.masked_fill(is_empty, 0)].long()
    slots = page * plan.pool.geometry.block_size + place % plan.pool.geometry.block_size
    # Empty places gather a page that may be somebody else's; a NaN there would outlive any mask.
    pool = plan.pool
    gathered = []
    for storage, scales, fresh in ((pool.key, pool.key_scale, key), (pool.value, pool.value_scale, value)):
        held = gather_slots(storage, scales, slots.view(-1), query.dtype).view(*slots.shape, dim)
        gathered.append(torch.cat([held.masked_fill_(is_empty[:, :, None], 0), fresh], 1))
    mask = _chunk_mask(plan, chunk, slots, is_empty, window=window, dtype=query.dtype)
    mixed = F.scaled_dot_product_attention(
        grouped, *_for_every_query_head(grouped, *gathered), attn_mask=mask[:, None], scale=scale
    )
    return mixed.permute(2, 0, 1, 3).reshape(tokens, query_heads, dim)


def _for_every_query_head(grouped: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    group = grouped.shape[1]
    return key[:, None].expand(-1, group, -1, -1), value[:, None].expand(-1, group, -1, -1)


def _chunk_mask(
    plan: TorchPlan,
    chunk: _PrefillChunk,
    slots: Tensor,
    is_empty: Tensor,
    *,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Additive mask [H, T, cached + T]: held entries to the left, the chunk itself, causally, to the right."""
    heads, width = slots.shape
    tokens = chunk.stop - chunk.start
    if plan.causal is None:
        raise RuntimeError("a plan with prefill chunks has a causal mask")
    mask = plan.causal.new_zeros(heads, tokens, width + tokens, dtype=dtype)
    mask[:, :, :width].masked_fill_(is_empty[:, None], _MASKED)
    mask[:, :, width:] = plan.causal[:tokens, :tokens]
    if window is not None:
        held = plan.pool.position.view(-1)[slots]
        seen = torch.cat([held, chunk.position.expand(heads, -1)], 1)
        mask.masked_fill_(seen[:, None] <= (chunk.position - window)[None, :, None], _MASKED)
    return mask

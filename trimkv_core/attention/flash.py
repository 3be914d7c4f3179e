"""The backend for pages of 256 entries: flash-attn reads them in place.

Optional: FlashAttention-2 takes paged keys only in multiples of 256 entries, which wastes memory on short streams;
with smaller pages another backend decodes. Every (sequence, KV head) of a layer is a sequence of its own to the kernel,
with G query heads and one KV head. Prefill is `PackedPrefill`'s. Knows no model and no scheduler.

Letters: S segments, L layers, H KV heads, G query heads a KV head, N = S·H streams of a layer, T tokens, D head
dimension, P pages, B block size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_core.attention.base import AttentionBackend
from trimkv_core.attention.varlen import (
    FLASH_DTYPES,
    FlashAttnVarlen,
    PackedPlan,
    PackedPrefill,
    require_flash_attn,
)
from trimkv_core.batches import StepBatch
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

PAGE_MULTIPLE = 256


@dataclass(frozen=True, slots=True)
class FlashDecodePlan:
    """What all layers of a step share.

    Attributes:
        pool: of the sequence table.
        lengths: int32 [L, N], with the token's own entry.
        block_table: int32 [L, N, most pages of a stream]; places behind a stream's last page hold any page.
        widths: L host numbers, the most pages of a stream in each layer.
        position: int32 [S], the query's position.
    """

    pool: PagePool
    lengths: Tensor
    block_table: Tensor
    widths: list[int]
    position: Tensor


class FlashDecode:
    """The decoding rows' part of a step, through `flash_attn_with_kvcache`.

    Raises:
        ImportError: flash-attn is not installed; says what to install.
    """

    def __init__(self) -> None:
        self._attend: Callable[..., Any] = require_flash_attn().flash_attn_with_kvcache

    @staticmethod
    def figures(table: SequenceTable, batch: StepBatch) -> Tensor | None:
        """What the host must know, int64 [1, L] on the device; None without a decoding row."""
        if not batch.num_decode:
            return None
        longest = batch.lengths_after[: batch.num_decode].amax((0, 2))
        return -(-longest // table.geometry.block_size)[None]

    def plan(
        self, table: SequenceTable, batch: StepBatch, *, figures: list[list[int]] | None = None
    ) -> FlashDecodePlan | None:
        """Block tables of all layers; waits for the device once, or never if `figures` are on the host already.

        Args:
            table: that extended `batch`.
            batch: of this step.
            figures: `figures(table, batch)` as lists.

        Returns:
            None without a decoding row.
        """
        count, block = batch.num_decode, table.geometry.block_size
        if not count:
            return None
        if figures is None:
            on_device = self.figures(table, batch)
            figures = [] if on_device is None else on_device.tolist()
        widths = figures[0]
        lengths = batch.lengths_after[:count].transpose(0, 1).flatten(1)
        first_page = batch.first_page[:count].transpose(0, 1).flatten(1)
        place = torch.arange(max(widths), device=lengths.device)
        is_empty = place >= -(-lengths // block)[:, :, None]
        listed_at = (first_page[:, :, None] + place).masked_fill_(is_empty, 0)
        return FlashDecodePlan(
            pool=table.pool,
            lengths=lengths.int(),
            block_table=table.page_lists.arena[listed_at],
            widths=widths,
            position=batch.position[:count],
        )

    def attend(self, plan: FlashDecodePlan, layer: int, query: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Attention of the decoding rows, without synchronising; their own entries are written.

        A layer with a sliding window gathers its pages and runs on plain PyTorch, masked by position: a stream is
        unordered and has holes, so the kernel's own window, which counts keys, would cut other entries.

        Args:
            plan: of this step.
            layer: which layer.
            query: [S, H·G, D], the decoding rows' only.
            scale: of the logits.
            window: only positions above t - window are seen; None: all.

        Returns:
            [S, H·G, D], the query's dtype.
        """
        rows, query_heads, dim = query.shape
        heads = plan.pool.geometry.num_heads
        by_stream = query.reshape(rows * heads, 1, query_heads // heads, dim)
        block_table = plan.block_table[layer, :, : plan.widths[layer]]
        if window is not None:
            oldest = (plan.position - window).repeat_interleave(heads)
            mixed = _attend_gathered(plan, layer, by_stream, block_table, oldest=oldest, scale=scale)
        else:
            mixed = self._attend(
                by_stream,
                plan.pool.key.unsqueeze(2),
                plan.pool.value.unsqueeze(2),
                cache_seqlens=plan.lengths[layer],
                block_table=block_table,
                softmax_scale=scale,
            )
        return mixed.reshape(rows, query_heads, dim)


def _attend_gathered(
    plan: FlashDecodePlan, layer: int, query: Tensor, block_table: Tensor, *, oldest: Tensor, scale: float
) -> Tensor:
    """[N, 1, G, D] → [N, 1, G, D] over positions above `oldest` (int32 [N])."""
    pages = block_table.long()
    place = torch.arange(pages.shape[1] * plan.pool.geometry.block_size, device=query.device)
    is_empty = place >= plan.lengths[layer][:, None]
    is_hidden = is_empty | (plan.pool.position[pages].flatten(1) <= oldest[:, None])
    # Places behind a stream's end may be somebody else's; a NaN there would outlive any mask.
    key, value = (
        storage[pages].flatten(1, 2).masked_fill_(is_empty[:, :, None], 0)[:, None].expand(-1, query.shape[2], -1, -1)
        for storage in (plan.pool.key, plan.pool.value)
    )
    mask = ~is_hidden[:, None, None]
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask, scale=scale).transpose(
        1, 2
    )


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """What all layers of a step share; `decode` and `prefill` are None where the batch has no such segments.

    Attributes:
        pool: of the sequence table.
        slots: int64 [L, H·T], head after head.
        position: int32 [H·T].
        num_decode: how many leading tokens decode.
    """

    pool: PagePool
    slots: Tensor
    position: Tensor
    num_decode: int
    decode: FlashDecodePlan | None
    prefill: PackedPlan | None


class FlashBackend(AttentionBackend[FlashPlan]):
    """See the module's docstring.

    Raises:
        ImportError: flash-attn is not installed; says what to install.
    """

    name = "flash"

    def __init__(self) -> None:
        self._decode = FlashDecode()
        self._prefill = PackedPrefill(FlashAttnVarlen())

    def plan(self, table: SequenceTable, batch: StepBatch) -> FlashPlan:
        """Everything the layers share; waits for the device once.

        Raises:
            ValueError: pages or a dtype that flash-attn does not take.
        """
        _check(table.pool)
        wanted = [self._decode.figures(table, batch), self._prefill.figures(batch)]
        figures: list[list[int]] = torch.cat([part for part in wanted if part is not None]).tolist()
        own = 1 if batch.num_decode else 0
        return FlashPlan(
            pool=table.pool,
            slots=batch.slots.flatten(1),
            position=batch.position.repeat(table.geometry.num_heads),
            num_decode=batch.num_decode,
            decode=self._decode.plan(table, batch, figures=figures[:own]),
            prefill=self._prefill.plan(table, batch, figures=figures[own:]),
        )

    def append(self, plan: FlashPlan, layer: int, key: Tensor, value: Tensor, log_beta: Tensor | None) -> None:
        plan.pool.write_layer(plan.slots[layer], key, value, log_beta, plan.position)

    def attend(
        self,
        plan: FlashPlan,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        parts = []
        if plan.decode is not None:
            own = query[: plan.num_decode]
            parts.append(self._decode.attend(plan.decode, layer, own, scale=scale, window=window))
        if plan.prefill is not None:
            own = query[plan.num_decode :]
            parts.append(self._prefill.attend(plan.prefill, layer, own, scale=scale, window=window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check(pool: PagePool) -> None:
    block = pool.geometry.block_size
    if block % PAGE_MULTIPLE:
        raise ValueError(
            f"block_size={block} is not possible with backend 'flash': flash-attn reads pages of a multiple of "
            f"{PAGE_MULTIPLE} entries; set block_size={PAGE_MULTIPLE} or choose another backend"
        )
    if pool.device.type == "cuda" and pool.dtype not in FLASH_DTYPES:
        raise ValueError(
            f"dtype={str(pool.dtype).removeprefix('torch.')} is not possible with backend 'flash': flash-attn computes "
            "float16 and bfloat16; choose another backend"
        )

"""Prefill attention over packed keys: one variable-length kernel call a layer, whatever the streams' lengths.

The streams of a layer differ twenty-fold in length, so every KV head of every segment is a sequence of its own, with G
query heads and one KV head, and nothing is padded. Heads lie outermost, so that a transpose packs the queries:

    sequence    head 0, segment 0 | head 0, segment 1 | head 1, segment 0 | head 1, segment 1
    queries     T0 tokens         | T1                | T0                | T1
    keys        held  own T0      | held   own T1     | held own T0       | own T1             as many as the stream has

`append` came before, so a stream's pages hold the chunk's own entries last, in order, and one gather fetches both.
Query i of a chunk of T sees every held entry and the chunk's first i + 1: causal, aligned to the bottom right corner,
which is what the flash kernels mean by causal.

Owns which variable-length kernel runs, and is the only module that imports `flash_attn`. Knows no decoding.

Letters: S prefill segments, L layers, H KV heads, G query heads a KV head, N = H·S sequences of a layer, T tokens of
all prefill segments, E entries of a layer, D head dimension, B block size.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_core.batches import StepBatch
from trimkv_core.fp8 import gather_slots
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

logger = logging.getLogger(__name__)

FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_MAX_HEAD_DIM = 256
_FLASH_MIN_CAPABILITY = (8, 0)
_CAUSAL = (-1, 0)


@dataclass(frozen=True, slots=True)
class PackedLengths:
    """Where the sequences of one packed call begin and end.

    Attributes:
        cu_queries, cu_keys: int32 [N + 1], cumulative.
        max_queries, max_keys: host numbers, the longest sequence.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


class VarlenKernel(Protocol):
    """Causal attention of packed sequences, aligned to the bottom right.

    Attributes:
        name: what the start-up lines call it.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, lengths: PackedLengths, scale: float) -> Tensor:
        """Attend without synchronising with the host.

        Args:
            query: [H·T, G, D], contiguous in D.
            key, value: [E, 1, D].
            lengths: of the N sequences; none has fewer keys than queries.
            scale: of the logits.

        Returns:
            [H·T, G, D], the query's dtype.
        """


class FlashAttnVarlen:
    """`flash_attn_varlen_func` of flash-attn; aligned to the bottom right since 2.1.

    Raises:
        ImportError: flash-attn is not installed; says what to install.
    """

    name = "flash-attn"

    def __init__(self) -> None:
        self._attend: Callable[..., Any] = require_flash_attn().flash_attn_varlen_func

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, lengths: PackedLengths, scale: float) -> Tensor:
        result: Tensor = self._attend(
            query,
            key,
            value,
            cu_seqlens_q=lengths.cu_queries,
            cu_seqlens_k=lengths.cu_keys,
            max_seqlen_q=lengths.max_queries,
            max_seqlen_k=lengths.max_keys,
            softmax_scale=scale,
            causal=True,
        )
        return result


class TorchVarlen:
    """`torch.nn.attention.varlen.varlen_attn`, the FlashAttention-2 that PyTorch ships for CUDA.

    2.11 has `scale` and `window_size` and documents equal head counts only; `enable_gqa` came with 2.12. Without it the
    one KV head is shown G times by a stride of 0, which copies nothing.
    """

    name = "torch varlen"

    def __init__(self, attend: Callable[..., Any] | None = None) -> None:
        self._attend: Callable[..., Any] = _torch_varlen_attn() if attend is None else attend
        self._has_gqa = "enable_gqa" in inspect.signature(self._attend).parameters

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, lengths: PackedLengths, scale: float) -> Tensor:
        options: dict[str, bool] = {}
        if self._has_gqa:
            options["enable_gqa"] = True
        else:
            key, value = key.expand(-1, query.shape[1], -1), value.expand(-1, query.shape[1], -1)
        result: Tensor = self._attend(
            query,
            key,
            value,
            lengths.cu_queries,
            lengths.cu_keys,
            lengths.max_queries,
            lengths.max_keys,
            scale=scale,
            window_size=_CAUSAL,
            **options,
        )
        return result


class SdpaVarlen:
    """SDPA over sequences padded to the longest: any device and dtype, and as much padding as the reference backend."""

    name = "sdpa"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, lengths: PackedLengths, scale: float) -> Tensor:
        return _attend_padded(query, key, value, lengths=lengths, scale=scale)


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """What all layers of a step share.

    Attributes:
        pool, arena: of the sequence table.
        lengths: int64 [L, N], entries of every sequence with the batch's own.
        first_page: int64 [L, N], where each stream's pages begin in the arena.
        cu_queries: int32 [N + 1].
        cu_keys: int32 [L, N + 1].
        totals, longest: L host numbers each, E and the longest stream.
        max_queries: host number, tokens of the longest segment.
        position: int32 [T], of the queries.
    """

    pool: PagePool
    arena: Tensor
    lengths: Tensor
    first_page: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    totals: list[int]
    longest: list[int]
    max_queries: int
    position: Tensor


class PackedPrefill:
    """The prefill segments' part of a step, for any backend to call after its `append`.

    Layers of the base model with a sliding window take the plain PyTorch path of `SdpaVarlen`, with a mask by position:
    a stream is unordered and has holes, so a kernel's own window, which counts keys, would cut other entries.

    Attributes:
        kernel: what attends in layers without a window; None until the first queries: `select_varlen` for them.
    """

    def __init__(self, kernel: VarlenKernel | None = None) -> None:
        self.kernel = kernel

    @staticmethod
    def figures(batch: StepBatch) -> Tensor | None:
        """What the host must know, int64 [2, L] on the device; None without a prefill segment.

        For a backend that has figures of its own and wants to wait for the device once for both.
        """
        if batch.num_decode == len(batch.segments):
            return None
        lengths = batch.lengths_after[batch.num_decode :]
        return torch.stack([lengths.sum((0, 2)), lengths.amax((0, 2))])

    def plan(
        self, table: SequenceTable, batch: StepBatch, *, figures: list[list[int]] | None = None
    ) -> PackedPlan | None:
        """Everything the layers share; waits for the device once, or never if `figures` are on the host already.

        Args:
            table: that extended `batch`.
            batch: of this step.
            figures: `figures(batch)` as lists.

        Returns:
            None without a prefill segment.
        """
        first = batch.num_decode
        if first == len(batch.segments):
            return None
        if figures is None:
            on_device = self.figures(batch)
            figures = [] if on_device is None else on_device.tolist()
        totals, longest = figures
        heads = table.geometry.num_heads
        # [L, H, S] as [L, N].
        lengths = batch.lengths_after[first:].permute(1, 2, 0).flatten(1)
        tokens = (batch.lengths_after - batch.lengths_before)[first:, 0, 0]
        total = sum(segment.tokens for segment in batch.segments[first:])
        starts = torch.cumsum(tokens, 0) - tokens
        head_starts = torch.arange(heads, device=tokens.device)[:, None] * total
        return PackedPlan(
            pool=table.pool,
            arena=table.page_lists.arena,
            lengths=lengths,
            first_page=batch.first_page[first:].permute(1, 2, 0).flatten(1),
            cu_queries=F.pad((head_starts + starts).flatten(), (0, 1), value=heads * total).int(),
            cu_keys=F.pad(torch.cumsum(lengths, 1), (1, 0)).int(),
            totals=totals,
            longest=longest,
            max_queries=max(segment.tokens for segment in batch.segments[first:]),
            position=batch.position[batch.num_tokens - total :],
        )

    def attend(self, plan: PackedPlan, layer: int, query: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Attention of the prefill segments' tokens, without synchronising.

        Args:
            plan: of this step.
            layer: which layer; its entries are written.
            query: [T, H·G, D], the prefill segments' only.
            scale: of the logits.
            window: the base model's own sliding window: only positions above t - window are seen; None: all.

        Returns:
            [T, H·G, D], the query's dtype.
        """
        tokens, query_heads, dim = query.shape
        heads = plan.pool.geometry.num_heads
        packed = query.reshape(tokens, heads, -1, dim).transpose(0, 1).reshape(heads * tokens, -1, dim)
        slots = _slots(plan, layer)
        key, value = (
            gather_slots(storage, scales, slots, query.dtype)[:, None]
            for storage, scales in ((plan.pool.key, plan.pool.key_scale), (plan.pool.value, plan.pool.value_scale))
        )
        lengths = PackedLengths(plan.cu_queries, plan.cu_keys[layer], plan.max_queries, plan.longest[layer])
        if self.kernel is None:
            # By the queries and not by the pool, whose 8-bit floats no kernel takes.
            self.kernel = select_varlen(query.device, query.dtype, dim)
        if window is None:
            mixed = self.kernel(packed, key, value, lengths=lengths, scale=scale)
        else:
            positions = _Positions(plan.position.repeat(heads), plan.pool.position.view(-1)[slots], window)
            mixed = _attend_padded(packed, key, value, lengths=lengths, scale=scale, positions=positions)
        return mixed.view(heads, tokens, -1, dim).transpose(0, 1).reshape(tokens, query_heads, dim)


def select_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> VarlenKernel:
    """The best kernel that is there: flash-attn, PyTorch's own, SDPA.

    The flash kernels want an NVIDIA GPU of compute capability 8.0 or more, float16 or bfloat16, and a head dimension
    that is a multiple of 8 and at most 256.
    """
    fits = dtype in FLASH_DTYPES and head_dim % 8 == 0 and head_dim <= _FLASH_MAX_HEAD_DIM
    if device.type != "cuda" or not fits or torch.cuda.get_device_capability(device) < _FLASH_MIN_CAPABILITY:
        return SdpaVarlen()
    if import_flash_attn() is not None:
        return FlashAttnVarlen()
    if torch.backends.cuda.is_flash_attention_available() and _has_torch_varlen():
        return TorchVarlen()
    return SdpaVarlen()


def import_flash_attn() -> ModuleType | None:
    """The module `flash_attn` of FlashAttention-2; None without it."""
    try:
        module = importlib.import_module("flash_attn")
    except ModuleNotFoundError as error:
        if error.name != "flash_attn":
            logger.warning("flash-attn is installed and cannot be imported: %s", error)
        return None
    except (ImportError, OSError) as error:
        # Built for another PyTorch or CUDA.
        logger.warning("flash-attn is installed and cannot be imported: %s", error)
        return None
    # The packages of later generations share the name and not the functions.
    return module if hasattr(module, "flash_attn_varlen_func") else None


def require_flash_attn() -> ModuleType:
    """The module `flash_attn`.

    Raises:
        ImportError: it is not there; says what to install.
    """
    module = import_flash_attn()
    if module is None:
        raise ImportError("flash-attn is not installed: run `pip install flash-attn --no-build-isolation`")
    return module


def _torch_varlen_attn() -> Callable[..., Any]:
    function: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return function


def _has_torch_varlen() -> bool:
    try:
        parameters = inspect.signature(_torch_varlen_attn()).parameters
    except (ImportError, AttributeError):
        return False
    return {"scale", "window_size"} <= parameters.keys()


def _slots(plan: PackedPlan, layer: int) -> Tensor:
    """Slots of a layer's entries, sequence after sequence: int64 [E].

    By layer and not for all at once: dense sequences of 131,072 tokens would take half a gigabyte of indices.
    """
    block = plan.pool.geometry.block_size
    sequence = torch.repeat_interleave(plan.lengths[layer], output_size=plan.totals[layer])
    nth = torch.arange(plan.totals[layer], device=sequence.device) - plan.cu_keys[layer][sequence]
    page = plan.arena[plan.first_page[layer][sequence] + nth // block].long()
    return page * block + nth % block


@dataclass(frozen=True, slots=True)
class _Positions:
    """What a window needs: int32 [H·T] and [E], and its width."""

    query: Tensor
    key: Tensor
    window: int


def _attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: PackedLengths,
    scale: float,
    positions: _Positions | None = None,
) -> Tensor:
    """What a `VarlenKernel` computes, in plain PyTorch over sequences padded to the longest."""
    query_at, _ = _pad(lengths.cu_queries, lengths.max_queries)
    key_at, no_key = _pad(lengths.cu_keys, lengths.max_keys)
    # Row 0 stands in for padding, and belongs to some other sequence: a NaN there would outlive any mask.
    padded_key, padded_value = (
        packed[:, 0][key_at].masked_fill_(no_key[:, :, None], 0)[:, None].expand(-1, query.shape[1], -1, -1)
        for packed in (key, value)
    )
    own = torch.arange(lengths.max_queries, device=query.device)[:, None]
    place = torch.arange(lengths.max_keys, device=query.device)
    held = (lengths.cu_keys.diff() - lengths.cu_queries.diff())[:, None, None]
    hidden = no_key[:, None] | (place > held + own)
    if positions is not None:
        oldest = positions.query[query_at] - positions.window
        hidden = hidden | (positions.key[key_at][:, None] <= oldest[:, :, None])
    mixed = F.scaled_dot_product_attention(
        query[query_at].transpose(1, 2), padded_key, padded_value, attn_mask=~hidden[:, None], scale=scale
    )
    sequence = torch.repeat_interleave(lengths.cu_queries.diff(), output_size=query.shape[0])
    nth = torch.arange(query.shape[0], device=query.device) - lengths.cu_queries[sequence]
    return mixed.transpose(1, 2)[sequence, nth]


def _pad(cumulative: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows of packed sequences, side by side: int64 [N, width], 0 where there is none, and where that is."""
    place = torch.arange(width, device=cumulative.device)
    is_empty = place >= cumulative.diff()[:, None]
    return (cumulative[:-1, None] + place).masked_fill_(is_empty, 0), is_empty

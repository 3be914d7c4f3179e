"""The CPU backend: pages read in place by compiled kernels; float32 and bfloat16.

Owns what a step tells the kernels of `trimkv_core.cpu`. Letters: S segments, L layers, H KV heads, G query heads a KV
head, T tokens, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimkv_core.attention.base import AttentionBackend
from trimkv_core.batches import StepBatch
from trimkv_core.cpu import attention as kernels
from trimkv_core.cpu.vector import LANES
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable

Array = np.ndarray[Any, Any]

SUPPORTED = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One segment of several tokens.

    Attributes:
        start, stop: its tokens in the packed batch.
        index: of the segment.
        panels: L host numbers, panels of LANES entries that the widest head of a layer sees.
    """

    start: int
    stop: int
    index: int
    panels: list[int]


@dataclass(frozen=True, slots=True)
class _OwnTokens:
    """A chunk's share of a layer's tensors: query and mixed [T, H·G, D], key and value [T, H, D], float32."""

    tokens: slice
    query: Array
    key: Array
    value: Array
    mixed: Array


@dataclass(frozen=True, slots=True)
class NumbaPlan:
    """The step's figures as arrays over the same memory; names as in `StepBatch` and `PagePool`."""

    pool: PagePool
    key: Array
    value: Array
    log_beta: Array
    entry_position: Array
    arena: Array
    first_page: Array
    lengths_before: Array
    lengths_after: Array
    slots: Array
    position: Array
    num_decode: int
    chunks: tuple[_Chunk, ...]
    threads: int
    is_ready: bool


class NumbaBackend(AttentionBackend[NumbaPlan]):
    """See the module's docstring."""

    name = "numba"

    def __init__(self) -> None:
        self._counter = np.zeros(1, np.int64)
        self._scratch = torch.empty(0)

    def plan(self, table: SequenceTable, batch: StepBatch) -> NumbaPlan:
        pool = table.pool
        if pool.device.type != "cpu" or pool.dtype not in SUPPORTED:
            raise ValueError(f"backend 'numba' serves float32 and bfloat16 on CPUs, not {pool.dtype} on {pool.device}")
        return NumbaPlan(
            pool=pool,
            key=_bits(pool.key),
            value=_bits(pool.value),
            log_beta=pool.log_beta.view(-1).numpy(),
            entry_position=pool.position.numpy(),
            arena=table.page_lists.arena.numpy(),
            first_page=batch.first_page.numpy(),
            lengths_before=batch.lengths_before.numpy(),
            lengths_after=batch.lengths_after.numpy(),
            slots=batch.slots.numpy(),
            position=batch.position.numpy(),
            num_decode=batch.num_decode,
            chunks=_plan_chunks(batch),
            threads=kernels.use_threads(torch.get_num_threads()),
            is_ready=pool.dtype == torch.float32 and table.geometry.head_dim % LANES == 0,
        )

    def append(self, plan: NumbaPlan, layer: int, key: Tensor, value: Tensor, log_beta: Tensor | None) -> None:
        if key.requires_grad or value.requires_grad:
            raise RuntimeError("backend 'numba' computes no gradients: run it under torch.no_grad(), or use 'torch'")
        if key.dtype != plan.pool.dtype or value.dtype != plan.pool.dtype:
            # Bits are copied as they are: of another type they would be numbers, only wrong ones.
            raise ValueError(f"pages of {plan.pool.dtype} cannot take {key.dtype} keys and {value.dtype} values")
        kernels.append(
            plan.key,
            plan.value,
            plan.log_beta,
            plan.entry_position,
            plan.slots[layer],
            _bits(key.contiguous()),
            _bits(value.contiguous()),
            _NO_GATE if log_beta is None else log_beta.contiguous().numpy(),
            plan.position,
        )

    def attend(
        self,
        plan: NumbaPlan,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        asked, own_key, own_value = (states.contiguous().float() for states in (query, key, value))
        mixed = torch.empty_like(asked)
        numbers = (np.float32(scale), kernels.NO_WINDOW if window is None else window)
        if plan.num_decode:
            rows = slice(0, plan.num_decode)
            kernels.decode(
                plan.key,
                plan.value,
                plan.entry_position,
                plan.arena,
                plan.first_page,
                plan.lengths_after,
                layer,
                asked.numpy()[rows],
                plan.position,
                *numbers,
                plan.is_ready,
                plan.threads,
                self._counter,
                mixed.numpy()[rows],
            )
        for chunk in plan.chunks:
            tokens = slice(chunk.start, chunk.stop)
            parts = [states.numpy()[tokens] for states in (asked, own_key, own_value, mixed)]
            own = _OwnTokens(tokens, *parts)
            self._attend_chunk(plan, chunk, layer, own, numbers)
        return mixed.to(query.dtype)

    def _attend_chunk(
        self, plan: NumbaPlan, chunk: _Chunk, layer: int, own: _OwnTokens, numbers: tuple[np.float32, int]
    ) -> None:
        position, held = plan.position[own.tokens], plan.lengths_before[chunk.index, layer]
        heads, dim = own.key.shape[1:]
        width = chunk.panels[layer] * LANES
        slices = -(-dim // LANES)
        keys, values, places = self._take_scratch(heads * dim * width, heads * slices * LANES * width, heads * width)
        keys, values = keys.reshape(heads, -1, dim, LANES), values.reshape(heads, slices, width, LANES)
        places = places.view(np.int32).reshape(heads, width)
        kernels.pack_seen(
            plan.key,
            plan.value,
            plan.entry_position,
            plan.arena,
            plan.first_page[chunk.index, layer],
            held,
            own.key,
            own.value,
            position,
            keys,
            values,
            places,
        )
        kernels.prefill(
            keys, values, places, held, own.query, position, *numbers, plan.threads, self._counter, own.mixed
        )

    def _take_scratch(self, *sizes: int) -> list[Array]:
        """float32 arrays of these sizes, in memory that is kept from layer to layer."""
        if self._scratch.numel() < sum(sizes):
            self._scratch = torch.zeros(sum(sizes))
        return [part.numpy() for part in torch.split(self._scratch[: sum(sizes)], list(sizes))]


_NO_GATE = np.zeros((0, 0), np.float32)


def _bits(states: Tensor) -> Array:
    """float32 as it is, bfloat16 as its bits."""
    return states.numpy() if states.dtype == torch.float32 else states.view(torch.uint16).numpy()


def _plan_chunks(batch: StepBatch) -> tuple[_Chunk, ...]:
    chunks = []
    start = batch.num_decode
    for index in range(batch.num_decode, len(batch.segments)):
        stop = start + batch.segments[index].tokens
        longest: list[int] = batch.lengths_after[index].amax(1).tolist()
        chunks.append(_Chunk(start, stop, index, [-(-width // LANES) for width in longest]))
        start = stop
    return tuple(chunks)

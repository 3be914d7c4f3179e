"""The backend for GPUs: entries are written and decodes attended to by Triton kernels, pages read where they lie.

Prefill chunks go to a library's variable-length attention, see `varlen`: for them planning waits for the device once;
the kernels read lengths and page lists on the device. On the CPU it runs under `TRITON_INTERPRET=1`, for tests.

Letters: S segments, L layers, H KV heads, G query heads a KV head, T tokens, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_core.attention.base import AttentionBackend
from trimkv_core.attention.varlen import PackedPlan, PackedPrefill
from trimkv_core.batches import StepBatch
from trimkv_core.kernels.append import append
from trimkv_core.kernels.decode import choose_splits, decode_attention, multiprocessors, workspace_for
from trimkv_core.sequences import SequenceTable
from trimkv_core.transfers import to_device


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """A pool and its page lists as the kernels see them; attributes as in `DeviceMemory`."""

    key: Tensor
    value: Tensor
    log_beta: Tensor
    position: Tensor
    arena: Tensor
    lengths: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @classmethod
    def of(cls, table: SequenceTable) -> PoolMemory:
        """The memory `table` stands in right now; it lasts until the table is next extended."""
        pool = table.pool
        return cls(
            key=pool.key,
            value=pool.value,
            log_beta=pool.log_beta,
            position=pool.position,
            arena=table.page_lists.arena,
            lengths=table.lengths,
            key_scale=pool.key_scale,
            value_scale=pool.value_scale,
        )


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """What all layers of a step share.

    Attributes:
        memory: what the kernels work on.
        slots: int64 [L, H, T].
        position: int32 [T].
        num_heads: H.
        rows: int64 [decodes].
        first_page: int64 [decodes, L·H].
        splits: parts a decoding stream is attended to in.
        prefill: the chunks' plan, if there are any.
    """

    memory: PoolMemory
    slots: Tensor
    position: Tensor
    num_heads: int
    rows: Tensor
    first_page: Tensor
    splits: int
    prefill: PackedPlan | None


class TritonBackend(AttentionBackend[TritonPlan]):
    """See the module's docstring."""

    name = "triton"

    def __init__(self) -> None:
        self._prefill = PackedPrefill()

    def plan(self, table: SequenceTable, batch: StepBatch) -> TritonPlan:
        count, streams, device = batch.num_decode, table.geometry.streams, table.pool.device
        rows = [segment.row for segment in batch.segments[:count]]
        pages = sum(batch.row_pages[:count]) // max(count * streams, 1)
        return TritonPlan(
            memory=PoolMemory.of(table),
            slots=batch.slots,
            position=batch.position,
            num_heads=table.geometry.num_heads,
            rows=to_device(rows, torch.int64, device),
            first_page=batch.first_page[:count].flatten(1),
            splits=choose_splits(count, table.geometry.num_heads, multiprocessors(device), pages),
            prefill=self._prefill.plan(table, batch),
        )

    def append(self, plan: TritonPlan, layer: int, key: Tensor, value: Tensor, log_beta: Tensor | None) -> None:
        append(plan.memory, plan.slots[layer], key=key, value=value, log_beta=log_beta, position=plan.position)

    def attend(
        self,
        plan: TritonPlan,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        count = plan.rows.numel()
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if count:
            splits = plan.splits
            decode_attention(
                plan.memory,
                plan.rows,
                first_page=plan.first_page,
                layer=layer,
                query=query[:count],
                out=out[:count],
                num_heads=plan.num_heads,
                scale=scale,
                window=window,
                position=plan.position,
                splits=splits,
                workspace=workspace_for(*query[:count].shape, splits=splits, device=query.device),
            )
        if plan.prefill is not None:
            out[count:] = self._prefill.attend(plan.prefill, layer, query[count:], scale=scale, window=window)
        return out

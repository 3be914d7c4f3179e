"""What both caches share: rows of one batch over one pool, written and read in every layer, cut after every forward.

Owns a pool and a table that grow as they are needed. Knows no argument names of the published classes.

Letters: L layers, H KV heads, G query heads a KV head, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimkv_core.attention.base import AttentionBackend, PagedStep
from trimkv_core.attention.flash import PAGE_MULTIPLE
from trimkv_core.attention.select import select_backend
from trimkv_core.attention.varlen import import_flash_attn
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget, BudgetError, Geometry
from trimkv_core.overlay import LayerAttention, StepCache
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable


class BudgetedCache(StepCache):
    """A batch of sequences under one budget, evicted after every forward."""

    def __init__(
        self,
        budget: Budget,
        *,
        num_layers: int | None,
        num_heads: int | None,
        max_seq_len: int | None,
        num_blocks_ratio: float,
        block_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        super().__init__(num_layers or 0)
        if num_blocks_ratio <= 0:
            raise ValueError(f"num_blocks_ratio={num_blocks_ratio} is not possible: a share above 0 is needed")
        Geometry(num_layers=1, num_heads=1, head_dim=1, block_size=block_size, kv_itemsize=2)
        self.budget = budget
        self._num_heads = num_heads
        self._max_seq_len = max_seq_len
        self._num_blocks_ratio = num_blocks_ratio
        self._block_size = block_size
        self._device = None if device is None else torch.device(device)
        self._dtype = dtype
        self._asked_backend = backend
        self._backend = select_backend(backend)
        self._table: SequenceTable | None = None
        self._rows: list[int] = []
        self._padded_length = 0
        self._step: PagedStep[Any] | None = None
        self._seen_before: dict[int, int] = {}
        self._token_index: Tensor | None = None

    # ---- looking inside ------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, 0 before the first forward."""
        return len(self._rows)

    def lengths(self, batch_index: int = 0) -> Tensor:
        """Entries of every stream of one sequence: int32 [L, H]."""
        return self._open_table().lengths_of(self._rows[batch_index])

    def positions(self, layer: int, head: int, batch_index: int = 0) -> Tensor:
        """Logical positions that one stream holds, counting real tokens from 0: int32 [entries], sorted."""
        return self._open_table().positions_of(self._rows[batch_index], layer, head)

    def seen_tokens(self, batch_index: int = 0) -> int:
        """Real tokens one sequence has seen."""
        return self._open_table().seen(self._rows[batch_index])

    def peak_entries(self, batch_index: int = 0) -> int:
        """The most entries one sequence ever held, inside a forward too."""
        return self._open_table().peak(self._rows[batch_index])

    def check_invariants(self) -> None:
        """Check the table and the pool against each other; raises InvariantError."""
        self._open_table().check_invariants()

    def _open_table(self) -> SequenceTable:
        if self._table is None:
            raise RuntimeError("the cache is empty: run a forward first")
        return self._table

    # ---- what `transformers` calls -------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed so far, padding included, as `generate` counts them."""
        return self._padded_length

    def reset(self) -> None:
        """Forget everything; the pool stays."""
        for row in self._rows:
            self._open_table().close(row)
        self._rows = []
        self._padded_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row beam_idx[i] was (beam search)."""
        self._pick(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows."""
        self._pick(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._pick([index for index in range(len(self._rows)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: what was evicted does not come back. Raises NotImplementedError for anything but 0."""
        if tokens_to_remove:
            raise NotImplementedError("a budgeted cache cannot be cropped: evicted entries do not come back")

    def _pick(self, indices: Sequence[int]) -> None:
        table = self._open_table()
        snapshots = [table.snapshot(row) for row in self._rows]
        for row in self._rows:
            table.close(row)
        self._rows = [table.restore(snapshots[index]) for index in indices]

    # ---- one forward ---------------------------------------------------------------------------------------------

    def attend(self, layer: int, attention: LayerAttention) -> Tensor:
        if attention.log_beta is None and self.budget.can_evict:
            raise BudgetError(
                "memory_size", self.budget.memory_size, "a model without gates keeps everything; use None"
            )
        if layer == 0:
            self._begin(attention)
        batch, query_heads, tokens, dim = attention.query.shape
        mixed = attention.query.new_zeros(0, query_heads, dim)
        if self._step is not None:
            mixed = self._attend_to_pages(self._step, layer, attention)
        if layer == attention.num_layers - 1:
            self._end(tokens)
        if self._token_index is not None:
            padded = mixed.new_zeros(batch * tokens, query_heads, dim)
            mixed = padded.index_copy_(0, self._token_index, mixed)
        return mixed.view(batch, tokens, query_heads, dim)

    def _attend_to_pages(self, step: PagedStep[Any], layer: int, attention: LayerAttention) -> Tensor:
        return step.layer(
            layer,
            self._pack(attention.query),
            self._pack(attention.key),
            self._pack(attention.value),
            log_beta=None if attention.log_beta is None else self._select(attention.log_beta.flatten(0, 1)),
            scale=attention.scale,
            window=attention.window,
        )

    def _pack(self, states: Tensor) -> Tensor:
        """[batch, heads, tokens, D] → [real tokens, heads, D], in the order of the step's segments."""
        return self._select(states.transpose(1, 2).flatten(0, 1))

    def _select(self, rows: Tensor) -> Tensor:
        return rows if self._token_index is None else rows.index_select(0, self._token_index)

    def _begin(self, attention: LayerAttention) -> None:
        batch, _, tokens, _ = attention.query.shape
        if self._table is None:
            self._table = self._build_table(attention)
            self._backend = self._choose_backend(self._table.pool)
        if not self._rows:
            pages = self._page_capacity(tokens)
            self._rows = [self._table.open(pages) for _ in range(batch)]
        if len(self._rows) != batch:
            raise ValueError(f"the cache holds {len(self._rows)} sequences, the forward brings {batch}")
        counts = self._find_real_tokens(attention.padding, batch, tokens)
        order = sorted((index for index in range(batch) if counts[index]), key=lambda index: counts[index] != 1)
        self._seen_before = {row: self._table.seen(row) for row in self._rows}
        segments = [Segment(self._rows[index], counts[index]) for index in order]
        # A chunk may be padding in every row, and then there is nothing to write or to see.
        self._step = PagedStep(self._backend, self._table, self._table.extend(segments)) if segments else None

    def _choose_backend(self, pool: PagePool) -> AttentionBackend[Any]:
        """The reference on CPUs; on GPUs kernels, and flash-attn's own paged decode for pages as large as it wants."""
        name = self._asked_backend
        if name != "auto" or pool.device.type != "cuda":
            return self._backend
        is_half = pool.dtype in {torch.bfloat16, torch.float16}
        if is_half and self._block_size % PAGE_MULTIPLE == 0 and import_flash_attn() is not None:
            name = "flash"
        return select_backend(name, device=pool.device, dtype=pool.dtype)

    def _find_real_tokens(self, padding: Tensor | None, batch: int, tokens: int) -> list[int]:
        """Real tokens of every row, and where they are if some are padding."""
        self._token_index = None
        if padding is None:
            return [tokens] * batch
        if padding.dim() != 2 or padding.shape[0] != batch or padding.shape[1] < tokens:
            raise ValueError(
                f"attention_mask {list(padding.shape)} is not possible: a paged cache takes a 2-D mask "
                f"[{batch}, {self._padded_length + tokens}] that marks padding"
            )
        is_real = padding[:, -tokens:].bool()
        counts: list[int] = is_real.sum(1).tolist()
        if min(counts) == tokens:
            return counts
        flat = torch.arange(batch * tokens, device=padding.device).view(batch, tokens)
        singles_first = sorted(range(batch), key=lambda index: counts[index] != 1)
        self._token_index = torch.cat([flat[index][is_real[index]] for index in singles_first])
        return counts

    def _end(self, tokens: int) -> None:
        table = self._open_table()
        self._padded_length += tokens
        self._step = None
        due = [row for row in self._rows if table.is_due(row, self.budget, before=self._seen_before[row])]
        table.evict([(row, self.budget) for row in due])

    # ---- sizing --------------------------------------------------------------------------------------------------

    def _build_table(self, attention: LayerAttention) -> SequenceTable:
        batch, heads, tokens, dim = attention.key.shape
        for name, given, found in (
            ("num_layers", self._num_layers, attention.num_layers),
            ("num_heads", self._num_heads, heads),
        ):
            if given and given != found:
                raise ValueError(f"{name}={given} does not fit the model, which has {found}")
        device = attention.key.device
        if self._device is not None and self._device.type != device.type:
            raise ValueError(f"device={str(self._device)!r} does not fit the model, which is on {str(device)!r}")
        dtype = attention.key.dtype
        if self._dtype is not None and self._dtype != dtype:
            raise ValueError(f"dtype={self._dtype} does not fit the model's keys, which are {dtype}")
        self._num_layers = attention.num_layers
        geometry = Geometry(attention.num_layers, heads, dim, self._block_size, dtype.itemsize)
        self._geometry = geometry
        pages = max(1, int(batch * self._page_capacity(tokens) * self._num_blocks_ratio))
        pool = PagePool(geometry, pages, dtype=dtype, device=device)
        return SequenceTable(pool, batch, can_grow=True)

    def _page_capacity(self, tokens: int) -> int:
        """Pages a sequence starts with: its ceiling if it has one, else what the first forward needs."""
        if self.budget.is_bounded and self._max_seq_len is not None:
            return self.budget.ceiling_pages(self._geometry, total_tokens=self._max_seq_len)
        return Budget.dense().ceiling_pages(self._geometry, total_tokens=tokens)

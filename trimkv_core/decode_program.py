"""One decode step as one piece of device work: pages, forward, the next token, nothing of it known to the host.

Captured as a CUDA graph for a few batch sizes at start-up and replayed; a batch in between is padded with the null row,
whose entries go to the null page. Steps follow one another without the host: a step's tokens are the next one's input,
and are copied to the host on the side.

Letters: N rows of the captured batch, L layers, H KV heads, G query heads a KV head, D head dimension, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimkv_core.device_sequences import DeviceSequenceTable
from trimkv_core.kernels.append import append
from trimkv_core.kernels.decode import DecodeWorkspace, choose_splits, decode_attention, multiprocessors, workspace_for
from trimkv_core.lean.decoder import LeanDecoder
from trimkv_core.transfers import to_device

logger = logging.getLogger(__name__)

# Logits [N, V] → the next token's ids, int64 [N]; below 0: none.
Chooser = Callable[[Tensor], Tensor]

_WARM_UPS = 2
# Pages of a stream that make splitting it worthwhile are not known at capture; this many are met at M = 1,024.
_PAGES_GUESS = 64


@dataclass(frozen=True, slots=True)
class _DeviceStep:
    """`LayerStep` of a decode batch whose figures are all on the device.

    Attributes:
        table: whose memory.
        rows, position: int32 [N].
        slots: int32 [L, H, N].
        first_page: int32 [N, L·H].
        splits: parts a stream is attended to in.
        workspace: for them.
    """

    table: DeviceSequenceTable
    rows: Tensor
    position: Tensor
    slots: Tensor
    first_page: Tensor
    splits: int
    workspace: DecodeWorkspace | None

    def layer(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        log_beta: Tensor | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        memory = self.table.memory
        append(memory, self.slots[layer], key=key, value=value, log_beta=log_beta, position=self.position)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        decode_attention(
            memory,
            self.rows,
            first_page=self.first_page,
            layer=layer,
            query=query,
            out=out,
            num_heads=self.table.geometry.num_heads,
            scale=scale,
            window=window,
            position=self.position,
            splits=self.splits,
            workspace=self.workspace,
        )
        return out


class DecodeProgram:
    """A decode step of up to N rows.

    Attributes:
        size: N.
    """

    def __init__(
        self, decoder: LeanDecoder, table: DeviceSequenceTable, last_tokens: Tensor, *, size: int, num_query_heads: int
    ) -> None:
        geometry, device = table.geometry, table.pool.device
        self.size = size
        self._decoder = decoder
        self._table = table
        self._last_tokens = last_tokens
        self._rows = torch.full((size,), table.null_row, dtype=torch.int32, device=device)
        slots = torch.zeros(geometry.streams, size, dtype=torch.int32, device=device)
        splits = choose_splits(size, geometry.num_heads, multiprocessors(device), _PAGES_GUESS)
        self._slots = slots
        self._step = _DeviceStep(
            table=table,
            rows=self._rows,
            position=torch.zeros(size, dtype=torch.int32, device=device),
            slots=slots.view(geometry.num_layers, geometry.num_heads, size),
            first_page=torch.zeros(size, geometry.streams, dtype=torch.int32, device=device),
            splits=splits,
            workspace=workspace_for(size, num_query_heads, geometry.head_dim, splits=splits, device=device),
        )
        self._graphs: dict[Chooser, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def capture(self, choosers: Sequence[Chooser], memory: Any, stream: torch.cuda.Stream) -> None:
        """Record the step with each of `choosers` in graph memory `memory`, on `stream`; with padding only."""
        self._rows.fill_(self._table.null_row)
        for choose in choosers:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._compute(choose)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                chosen = self._compute(choose)
            self._graphs[choose] = (graph, chosen)

    @torch.inference_mode()
    def run(self, rows: Sequence[int], choose: Chooser) -> Tensor:
        """Feed each row its last token and choose the next: int64 [rows], on the device, good until the next run.

        Nothing here waits for the device.
        """
        padded = [*rows, *[self._table.null_row] * (self.size - len(rows))]
        self._rows.copy_(to_device(padded, torch.int32, self._rows.device), non_blocking=True)
        recorded = self._graphs.get(choose)
        if recorded is None:
            chosen = self._compute(choose)
        else:
            graph, chosen = recorded
            graph.replay()
        self._table.note_decoded(rows)
        return chosen[: len(rows)]

    def _compute(self, choose: Chooser) -> Tensor:
        step = self._step
        self._table.add_decoded(self._rows, slots=self._slots, first_page=step.first_page, position=step.position)
        rows = self._rows.long()
        logits = self._decoder.forward(self._last_tokens.index_select(0, rows), step.position, step, None)
        chosen = choose(logits)
        self._last_tokens.index_copy_(0, rows, chosen.clamp(min=0))
        return chosen


class PendingTokens:
    """Tokens on their way to the host."""

    def __init__(self, chosen: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if chosen.is_cuda:
            self._host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            self._host.copy_(chosen, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = chosen.clone()

    def wait(self) -> list[int]:
        """The tokens, as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens


class DecodePrograms:
    """A program for each of a few batch sizes, and the last tokens of all rows.

    Attributes:
        sizes: captured batch sizes, smallest first.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        decoder: LeanDecoder,
        table: DeviceSequenceTable,
        *,
        max_rows: int,
        num_query_heads: int,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """Programs over one table.

        Args:
            decoder: computes the forward.
            table: the sequences.
            max_rows: the largest batch.
            num_query_heads: H·G.
            sizes: batch sizes, smallest first and `max_rows` last; None: `batch_sizes(max_rows)`.
        """
        device = table.pool.device
        self.sizes = batch_sizes(max_rows) if sizes is None else tuple(sizes)
        # One more for the null row.
        self._last_tokens = torch.zeros(table.null_row + 1, dtype=torch.int64, device=device)
        self._programs = {
            size: DecodeProgram(decoder, table, self._last_tokens, size=size, num_query_heads=num_query_heads)
            for size in self.sizes
        }

    def capture(self, choosers: Callable[[int], Sequence[Chooser]]) -> None:
        """Record all programs, the largest first so that the smaller ones fit its memory; `choosers` by batch size."""
        memory = torch.cuda.graph_pool_handle()  # one for all: only one of them runs at a time
        # One stream as well: libraries keep a workspace for each.
        stream = torch.cuda.Stream(self._last_tokens.device)  # type: ignore[no-untyped-call]
        for size in reversed(self.sizes):
            self._programs[size].capture(choosers(size), memory, stream)
        logger.info("captured decode steps of %s sequences", ", ".join(map(str, self.sizes)))

    def size_for(self, count: int) -> int:
        """The smallest captured batch that holds `count` rows."""
        return next(size for size in self.sizes if size >= count)

    def set_last_tokens(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Tell the device of tokens that the host has chosen."""
        device = self._last_tokens.device
        self._last_tokens.index_copy_(0, to_device(rows, torch.int64, device), to_device(tokens, torch.int64, device))

    def run(self, rows: Sequence[int], choose: Chooser) -> PendingTokens:
        """One decode step of `rows`; nothing waits for the device."""
        return PendingTokens(self._programs[self.size_for(len(rows))].run(rows, choose))


def batch_sizes(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then multiples of 8 up to 64 and of 32 above, and `max_rows` itself."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(96, max_rows + 1, 32), max_rows}
    return tuple(sorted(size for size in sizes if size <= max_rows))

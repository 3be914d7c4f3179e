"""The model and its memory: one packed forward a step, one batch of evictions after it.

Owns the model, the pool and the sequence table. Knows no queues and no text.

Letters: S segments, T tokens, L layers, H KV heads, G query heads a KV head, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from service.generation.sampler import SamplingState
from trimkv_core.attention.base import AttentionBackend, LayerStep, PagedStep
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget, Geometry, Scope
from trimkv_core.pages import PagePool
from trimkv_core.sequences import Eviction, SequenceTable
from trimkv_core.transfers import to_device

logger = logging.getLogger(__name__)

# Compilers treat multiples of 16 apart, and prefill chunks are such.
_WARM_UP_TOKENS = 16
_NOTICEABLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Feed:
    """What one sequence feeds: its next token ids, and whether the distribution after the last is wanted."""

    row: int
    token_ids: Sequence[int]
    wants_logits: bool


class TokensInFlight(Protocol):
    """Tokens on their way to the host."""

    def wait(self) -> list[int]:
        """The tokens, as soon as they are there."""


class AheadRunner(Protocol):
    """Decode steps that are launched before the tokens of the one before are read: see `service.engine.ahead`."""

    def can_choose(self, state: SamplingState) -> bool:
        """Whether a request's next token can be chosen on the device."""

    def set_last_tokens(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Tell the device of tokens that the host has chosen."""

    def launch(self, rows: Sequence[int], sampling: Sequence[SamplingState]) -> TokensInFlight:
        """One decode step: each row's last token is its input."""


AheadFactory = Callable[[PagePool, int], tuple[SequenceTable, AheadRunner]]


class PackedDecoder(Protocol):
    """What computes a packed forward: the lean step, or the model itself under the overlay."""

    @property
    def name(self) -> str:
        """What start-up lines call it."""

    def forward(self, token_ids: Tensor, position: Tensor, step: LayerStep, wanted: Tensor | None) -> Tensor:
        """int64 [T], int32 [T], where the entries go, int64 [N] or None → [N, V], as `LeanDecoder.forward`."""


class ModelRunner:
    """Runs steps.

    Attributes:
        table: the sequences in memory.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        backend: AttentionBackend[Any],
        geometry: Geometry,
        *,
        num_pages: int,
        max_num_seqs: int,
        dtype: torch.dtype,
        device: torch.device,
        ahead: AheadFactory | None = None,
    ) -> None:
        """Allocate the pool.

        Args:
            decoder: computes forwards.
            backend: writes and reads pages.
            geometry: of the pool.
            num_pages: of the pool.
            max_num_seqs: rows of the table.
            dtype, device: of the pool.
            ahead: makes decode steps that stay on the device; None where there are none.
        """
        self._decoder = decoder
        self._backend = backend
        self._pool = PagePool(geometry, num_pages, dtype=dtype, device=device)
        self.table: SequenceTable
        self.ahead: AheadRunner | None = None
        if ahead is None:
            self.table = SequenceTable(self._pool, max_num_seqs)
        else:
            self.table, self.ahead = ahead(self._pool, max_num_seqs)

    def rebuild(self) -> None:
        """Start over with an empty pool in the memory of the old one; every row is gone."""
        self._pool.reset()
        self.table.reset()

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed]) -> Tensor:
        """Feed all sequences at once.

        Args:
            feeds: one a row, those of a single token first.

        Returns:
            [wanted, V]: the next token's logits of every feed that wants them, in order; the model's dtype.
        """
        batch = self.table.extend([Segment(feed.row, len(feed.token_ids)) for feed in feeds])
        device = batch.position.device
        token_ids = [token for feed in feeds for token in feed.token_ids]
        wanted, end = [], 0
        for feed in feeds:
            end += len(feed.token_ids)
            if feed.wants_logits:
                wanted.append(end - 1)
        return self._decoder.forward(
            to_device(token_ids, torch.int64, device),
            batch.position,
            PagedStep(self._backend, self.table, batch),
            to_device(wanted, torch.int64, device),
        )

    @torch.inference_mode()
    def evict(self, due: Sequence[tuple[int, Budget]]) -> list[Eviction]:
        """Cut the rows that are due."""
        return self.table.evict(due)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Take every kind of step once, so that nothing is compiled while a request waits; leaves no trace."""
        started = time.monotonic()
        budgets = [Budget(memory_size=1, buffer_size=1, scope=scope) for scope in Scope]
        budget = budgets[0]
        pages = budget.ceiling_pages(
            self._pool.geometry, total_tokens=3 * _WARM_UP_TOKENS, forward_tokens=_WARM_UP_TOKENS + 2
        )
        if pages > self._pool.num_free:
            return
        row = self.open(pages)
        try:
            for cut in budgets:
                self.forward([Feed(row, (0,) * _WARM_UP_TOKENS, wants_logits=True)])
                self.evict([(row, cut)])
                self.forward([Feed(row, (0,), wants_logits=True)])
        finally:
            self.close(row)
        seconds = time.monotonic() - started
        if seconds > _NOTICEABLE_SECONDS:
            logger.info("compiled kernels in %.0f s; they are kept for the next start", seconds)

    def open(self, pages: int) -> int:
        """Start a sequence that is promised `pages`."""
        return self.table.open(pages)

    def close(self, row: int, *, scrub: bool = False) -> None:
        """End a sequence, wiping what it wrote if that may be no numbers."""
        self.table.close(row, scrub=scrub)

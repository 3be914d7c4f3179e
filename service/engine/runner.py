"""The model and its memory: one packed forward a step, one batch of evictions after it.

Owns the model, the pool and the sequence table. Knows no queues and no text.

Letters: S segments, T tokens, L layers, H KV heads, G query heads a KV head, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.engine.row_padding import CANDIDATES, find_stable_rows
from trimkv_core.attention.base import AttentionBackend, PagedStep
from trimkv_core.batches import Segment
from trimkv_core.budget import Budget, Geometry
from trimkv_core.overlay import LayerAttention, StepCache
from trimkv_core.pages import PagePool
from trimkv_core.sequences import Eviction, SequenceTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Feed:
    """What one sequence feeds: its next token ids, and whether the distribution after the last is wanted."""

    row: int
    token_ids: Sequence[int]
    wants_logits: bool


class _PackedCache(StepCache):
    """What the model sees of a packed step: [1, T (+ padding)] tokens of many sequences."""

    def __init__(self, num_layers: int, step: PagedStep[Any]) -> None:
        super().__init__(num_layers)
        self._step = step

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def attend(self, layer: int, attention: LayerAttention) -> Tensor:
        tokens = self._step.batch.num_tokens
        query, key, value = (
            states[0, :, :tokens].transpose(0, 1) for states in (attention.query, attention.key, attention.value)
        )
        mixed = self._step.layer(
            layer,
            query,
            key,
            value,
            log_beta=None if attention.log_beta is None else attention.log_beta[0, :tokens],
            scale=attention.scale,
            window=attention.window,
        )
        padding = attention.query.shape[2] - tokens
        if padding:
            mixed = torch.cat([mixed, mixed.new_zeros(padding, *mixed.shape[1:])])
        return mixed[None]


class ModelRunner:
    """Runs steps.

    Attributes:
        table: the sequences in memory.
    """

    def __init__(
        self,
        model: Any,
        backend: AttentionBackend[Any],
        geometry: Geometry,
        *,
        num_pages: int,
        max_num_seqs: int,
    ) -> None:
        self._model = model
        self._backend = backend
        self._geometry = geometry
        self._max_num_seqs = max_num_seqs
        self._min_rows = _choose_min_rows(model)
        pool = PagePool(geometry, num_pages, dtype=model.dtype, device=model.device)
        self.table = SequenceTable(pool, max_num_seqs)

    def rebuild(self) -> None:
        """Start over with an empty pool in the memory of the old one; every row is gone."""
        self.table.pool.reset()
        self.table = SequenceTable(self.table.pool, self._max_num_seqs)

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
        padding = max(self._min_rows - len(token_ids), 0)
        wanted, end = [], 0
        for feed in feeds:
            end += len(feed.token_ids)
            if feed.wants_logits:
                wanted.append(end - 1)
        kept = wanted + wanted[-1:] * max(self._min_rows - len(wanted), 0) if wanted else [0]
        output = self._model(
            input_ids=torch.tensor([token_ids + [0] * padding], device=device),
            position_ids=torch.nn.functional.pad(batch.position.long(), (0, padding))[None],
            past_key_values=_PackedCache(self._geometry.num_layers, PagedStep(self._backend, self.table, batch)),
            use_cache=True,
            logits_to_keep=torch.tensor(kept, device=device),
        )
        logits: Tensor = output.logits[0, : len(wanted)]
        return logits

    @torch.inference_mode()
    def evict(self, due: Sequence[tuple[int, Budget]]) -> list[Eviction]:
        """Cut the rows that are due."""
        return self.table.evict(due)

    def open(self, pages: int) -> int:
        """Start a sequence that is promised `pages`."""
        return self.table.open(pages)

    def close(self, row: int, *, scrub: bool = False) -> None:
        """End a sequence, wiping what it wrote if that may be no numbers."""
        self.table.close(row, scrub=scrub)


def _choose_min_rows(model: Any) -> int:
    """Rows a forward is padded to: in float32 on a CPU, where answers are promised to be the same alone and in
    company."""
    if model.dtype != torch.float32 or model.device.type != "cpu":
        return 1
    rows = find_stable_rows(module.weight for module in model.modules() if isinstance(module, nn.Linear))
    if rows is None:
        logger.warning("this CPU's matrix products depend on the batch: answers may differ in company by a rounding")
    return rows or CANDIDATES[0]

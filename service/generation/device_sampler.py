"""Choosing tokens inside a captured decode step: greedy rows, and rows that draw among a few best.

Owns the parameters' buffers, which a captured step reads, and which requests may be chosen for this way: those whose
token follows from the logits, the parameters and one random number, for certain. Penalties need the tokens before, and
filters that may keep any number of tokens now and then need a second look: both wait for the host (`Sampler`).

Letters: N rows of a captured batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.generation.drawing import Filters, best_ids, choose_best, draw_among_best
from service.generation.sampler import CANDIDATES, SamplingState
from trimkv_core.transfers import to_device

Chooser = Callable[[Tensor], Tensor]
_COLUMNS = 6


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one captured batch size reads, and its two ways to choose.

    Attributes:
        columns: float64 [6, N]: temperature, top_k, top_p, min_p, the random number, whether the row is greedy.
    """

    columns: Tensor
    greedy: Chooser
    drawn: Chooser


class DeviceSampler:
    """Choosers for a few batch sizes."""

    def __init__(self, vocab_size: int, device: torch.device, sizes: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._batches = {size: self._make(size) for size in sizes}

    def choosers(self, size: int) -> tuple[Chooser, Chooser]:
        """What a batch of `size` may be captured with."""
        batch = self._batches[size]
        return batch.greedy, batch.drawn

    def can_choose(self, state: SamplingState) -> bool:
        """Whether the row's next token can be chosen here."""
        params = state.params
        is_narrow = 0 < params.top_k < min(CANDIDATES, self._vocab_size)
        return (params.temperature == 0.0 or is_narrow) and state.counts is None and not state.forbidden_ids

    def prepare(self, size: int, states: Sequence[SamplingState]) -> Chooser:
        """Put the rows' parameters where the captured step reads them; takes a random number of each that draws."""
        batch = self._batches[size]
        if all(state.params.temperature == 0.0 for state in states):
            return batch.greedy
        rows = [_row_of(state) for state in states]
        # Padding draws too; what it draws is nobody's.
        rows += [(1.0, 1.0, 1.0, 0.0, 0.0, 1.0)] * (size - len(rows))
        flat = [value for row in zip(*rows, strict=True) for value in row]
        batch.columns.copy_(to_device(flat, torch.float64, self._device).view(_COLUMNS, size), non_blocking=True)
        return batch.drawn

    def _make(self, size: int) -> _Batch:
        columns = torch.ones(_COLUMNS, size, dtype=torch.float64, device=self._device)
        candidates = min(CANDIDATES, self._vocab_size)

        def draw(logits: Tensor) -> Tensor:
            temperature, top_k, top_p, min_p, uniform, greedy = columns.unsqueeze(-1).unbind(0)
            filters = Filters(
                temperature=temperature.float(),
                top_k=top_k.long(),
                top_p=top_p,
                min_p=min_p.float(),
                uniform=uniform,
            )
            wide = logits.float()
            # Equal logits at the edge of the candidates would leave the row undecided, and nobody here looks again.
            best = best_ids(wide, candidates)
            drawn = draw_among_best(wide, filters, candidates=candidates, is_nucleus=False, ids=best)
            return torch.where(greedy[:, 0] > 0, choose_best(logits), drawn)

        return _Batch(columns, choose_best, draw)


def _row_of(state: SamplingState) -> tuple[float, ...]:
    params = state.params
    if params.temperature == 0.0:
        return (1.0, 1.0, 1.0, 0.0, 0.0, 1.0)
    return (params.temperature, float(params.top_k), params.top_p, params.min_p, state.draw(), 0.0)

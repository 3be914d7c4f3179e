"""A cache in which every stream holds the same number of entries, whichever a baseline's score says.

Owns keys, values and positions of its sequences, what a score may want to know of the attention so far, and the cut
itself. Entries that go are gone: they are gathered out of dense tensors. How entries are scored is a baseline's
business.

Letters: S segments, L layers, H KV heads, G query heads a KV head, T tokens of the packed batch, D head dimension, n
entries a stream, W queries that are remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_core.batches import Segment
from trimkv_core.budget import Geometry
from trimkv_core.evaluation.baselines import Entries, Method
from trimkv_core.evaluation.feeding import MemoryStep

_MASKED = float("-inf")


@dataclass(slots=True)
class _Sequence:
    """One sequence; the first `held` places of every stream are in use, in the order of positions.

    Attributes:
        key, value: [L, H, capacity, D].
        position: int64 [L, H, capacity].
        attention: float32 [L, H, capacity], what each entry has received so far; None if the method does not ask.
        queries: [L, H·G, W, D], the latest ones at the end; None before the first, or if the method does not ask.
        seen, held, peak: tokens seen, entries a stream holds, the most it ever held.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    attention: Tensor | None
    queries: list[Tensor | None]
    seen: int = 0
    held: int = 0
    peak: int = 0


class UniformMemory:
    """Sequences whose streams all hold the same number of entries.

    Args:
        geometry: of the model's cache.
        method: says which entries stay.
        memory_size: M.
        buffer: an eviction starts at M + buffer entries.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        geometry: Geometry,
        method: Method,
        *,
        memory_size: int,
        buffer: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        method.check(memory_size)
        self._geometry, self._method = geometry, method
        self._memory_size, self._buffer = memory_size, buffer
        self._window = method.query_window(memory_size)
        self._dtype, self._device = dtype, device
        self._sequences: dict[int, _Sequence] = {}
        self._opened = 0
        self._scale = 1.0

    def open(self, total_tokens: int) -> int:
        geometry, device = self._geometry, self._device
        shape = (geometry.num_layers, geometry.num_heads, min(total_tokens, self._memory_size + self._buffer))
        self._sequences[self._opened] = _Sequence(
            key=torch.zeros(*shape, geometry.head_dim, dtype=self._dtype, device=device),
            value=torch.zeros(*shape, geometry.head_dim, dtype=self._dtype, device=device),
            position=torch.zeros(shape, dtype=torch.int64, device=device),
            attention=torch.zeros(shape, device=device) if self._method.observes_attention else None,
            queries=[None] * geometry.num_layers,
        )
        self._opened += 1
        return self._opened - 1

    def extend(self, segments: Sequence[Segment]) -> MemoryStep:
        parts = []
        for segment in segments:
            state = self._sequences[segment.row]
            start, stop = state.held, state.held + segment.tokens
            self._ensure(state, stop)
            at = torch.arange(state.seen, state.seen + segment.tokens, device=self._device)
            state.position[:, :, start:stop] = at
            state.held, state.seen, state.peak = stop, state.seen + segment.tokens, max(state.peak, stop)
            parts.append(at)
        return MemoryStep(torch.cat(parts).int(), _UniformStep(self, segments))

    def _ensure(self, state: _Sequence, entries: int) -> None:
        """Room for `entries` a stream."""
        missing = entries - state.position.shape[2]
        if missing <= 0:
            return
        for name in ("key", "value", "position", "attention"):
            held = getattr(state, name)
            if held is not None:
                setattr(
                    state, name, torch.cat([held, torch.zeros_like(held[:, :, :1]).repeat_interleave(missing, 2)], 2)
                )

    def attend(
        self, row: int, layer: int, states: tuple[Tensor, Tensor, Tensor], scale: float, window: int | None
    ) -> Tensor:
        """Write one layer's entries of a segment, then attend: query [t, H·G, D], key and value [t, H, D]."""
        query, key, value = states
        state, tokens, heads = self._sequences[row], query.shape[0], key.shape[1]
        held, before = state.held, state.held - tokens
        state.key[layer, :, before:held] = key.transpose(0, 1)
        state.value[layer, :, before:held] = value.transpose(0, 1)
        # Heads first; query heads of one KV head lie side by side.
        asked = query.transpose(0, 1).reshape(heads, -1, query.shape[2])
        logits = torch.bmm(asked, state.key[layer, :, :held].transpose(1, 2)).float().mul_(scale)
        logits = logits.view(heads, -1, tokens, held)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        logits[..., before:].masked_fill_(hidden, _MASKED)
        if window is not None:
            oldest = state.position[layer, :, before:held] - window
            logits.masked_fill_((state.position[layer, :, None, :held] <= oldest[:, :, None])[:, None], _MASKED)
        weights = torch.softmax(logits, -1)
        if state.attention is not None:
            state.attention[layer, :, :held] += weights.mean(1).sum(1)
        if self._window:
            self._remember(state, layer, query)
        self._scale = scale
        mixed = torch.bmm(weights.view(heads, -1, held).to(value.dtype), state.value[layer, :, :held])
        return mixed.view(-1, tokens, query.shape[2]).transpose(0, 1)

    def _remember(self, state: _Sequence, layer: int, query: Tensor) -> None:
        latest = query[-self._window :].transpose(0, 1).clone()
        earlier = state.queries[layer]
        if earlier is not None and latest.shape[1] < self._window:
            latest = torch.cat([earlier, latest], 1)[:, -self._window :]
        state.queries[layer] = latest

    def settle(self, rows: Sequence[int]) -> None:
        for row in rows:
            state = self._sequences[row]
            if state.held >= self._memory_size + self._buffer:
                self._cut(state, self._choose(row))

    def entries(self, row: int) -> Entries:
        """What a method's score sees of a sequence."""
        state, held = self._sequences[row], self._sequences[row].held
        queries = [layer for layer in state.queries if layer is not None]
        shape = (self._geometry.num_layers, self._geometry.num_heads, -1, len(queries) and queries[0].shape[1])
        return Entries(
            key=state.key[:, :, :held],
            value=state.value[:, :, :held],
            position=state.position[:, :, :held],
            seen=state.seen,
            scale=self._scale,
            attention=None if state.attention is None else state.attention[:, :, :held],
            queries=torch.stack(queries).view(*shape, self._geometry.head_dim) if queries else None,
        )

    def _choose(self, row: int) -> Tensor:
        """Places that stay, int64 [L, H, M], in order."""
        score = self._method.score(self.entries(row), self._memory_size)
        best = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., : self._memory_size]
        return best.sort(-1).values

    def _cut(self, state: _Sequence, places: Tensor) -> None:
        size = places.shape[2]
        wide = places[..., None].expand(-1, -1, -1, self._geometry.head_dim)
        for states in (state.key, state.value):
            states[:, :, :size] = states.gather(2, wide)
        state.position[:, :, :size] = state.position.gather(2, places)
        if state.attention is not None:
            state.attention[:, :, :size] = state.attention.gather(2, places)
            state.attention[:, :, size:] = 0
        state.held = size

    def peak(self, row: int) -> float:
        return float(self._sequences[row].peak)

    def close(self, row: int) -> None:
        del self._sequences[row]


class _UniformStep:
    """One forward's layers over a uniform memory."""

    def __init__(self, memory: UniformMemory, segments: Sequence[Segment]) -> None:
        self._memory, self._segments = memory, segments

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
        """As `LayerStep.layer`; gates are not asked."""
        sizes = [segment.tokens for segment in self._segments]
        parts = zip(self._segments, *(torch.split(states, sizes) for states in (query, key, value)), strict=True)
        mixed = [self._memory.attend(part[0].row, layer, part[1:], scale, window) for part in parts]
        return torch.cat(mixed)

"""Sequences on the engine's own runner: set up, aged, decoded and evicted, with a mark before every step.

Owns the only calls into `ModelRunner`: how a decode step is run is changed here and nowhere else. Does what the engine
does between its queues and its sampler: eviction points by the request's own count, pages by admission's ceiling.
Knows no rows and no limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from gpu_timing import Clock
from torch import Tensor

from service.engine.runner import AheadFactory, Feed, ModelRunner, PackedDecoder
from trimkv_core.attention.select import select_backend
from trimkv_core.budget import Budget, Geometry, lane_pages
from trimkv_core.byte_ledger import geometry_of
from trimkv_core.decode_program import DecodePrograms, PendingTokens
from trimkv_core.device_sequences import DeviceSequenceTable
from trimkv_core.lean.decoder import LeanDecoder, make_lean_decoder
from trimkv_core.overlay_decoder import OverlayDecoder
from trimkv_core.pages import PagePool
from trimkv_core.sequences import SequenceTable


@dataclass(slots=True)
class Stream:
    """One sequence.

    Attributes:
        row: its row in the table.
        budget: its budget.
        token: the token it feeds next.
        looked_at: tokens seen at its last eviction point.
    """

    row: int
    budget: Budget
    token: int
    looked_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRun:
    """What some decode steps took.

    Attributes:
        seconds: all of them together, evictions included.
        step_seconds: each of them.
        evict_seconds: the evictions alone.
        evictions: how many sequences were cut.
        held: entries a stream held on average while attention read them.
    """

    seconds: float
    step_seconds: tuple[float, ...]
    evict_seconds: float
    evictions: int
    held: float


class Driver:
    """A model, its pool and sequences over it.

    Attributes:
        geometry: of the cache.
        how: how decode steps are run, for the table.
    """

    def __init__(
        self,
        model: Any,
        *,
        cases: Sequence[tuple[int, Budget]],
        batches: Sequence[int],
        lane_tokens: int,
        block_size: int = 16,
        backend: str = "auto",
    ) -> None:
        """A pool for whichever of the `cases`, how many sequences of which budget, needs most.

        Args:
            model: with gates and paged attention; the lean step takes its weights.
            cases: what will be open at once, one after another.
            batches: batch sizes that decode, to capture; the largest of the cases is captured too.
            lane_tokens: prompt tokens of one forward.
            block_size: entries a page.
            backend: for attention, as in `--backend`.
        """
        device, dtype = model.device, model.dtype
        self._clock = Clock(device)
        self._random = torch.Generator().manual_seed(0)
        self._vocabulary: int = model.config.vocab_size
        self._lane_tokens = lane_tokens
        self.geometry: Geometry = geometry_of(model.config, block_size=block_size, dtype=dtype)
        self._total_tokens: int = model.config.max_position_embeddings
        chosen = select_backend(backend, device=device, dtype=dtype)
        decoder: PackedDecoder = make_lean_decoder(model, frees_weights=True) or OverlayDecoder(model)
        ahead = None
        if chosen.name == "triton" and isinstance(decoder, LeanDecoder):
            ahead = _greedy_factory(decoder, sizes=sorted({*batches, max(count for count, _ in cases)}))
        self.how = f"{decoder.name} step, {'CUDA graphs' if ahead else 'eager'}, attention {chosen.name}"
        self._runner = ModelRunner(
            decoder,
            chosen,
            self.geometry,
            num_pages=max(count * self.pages(budget) for count, budget in cases)
            + lane_pages(self.geometry, lane_tokens),
            max_num_seqs=max(count for count, _ in cases),
            dtype=dtype,
            device=device,
            ahead=ahead,
        )

    @property
    def table(self) -> SequenceTable:
        """The sequences in memory."""
        return self._runner.table

    def pages(self, budget: Budget) -> int:
        """Pages that admission reserves for a sequence, whatever the model's context."""
        return budget.ceiling_pages(self.geometry, total_tokens=self._total_tokens)

    # ---- setting up ----------------------------------------------------------------------------------------------

    def start(self, count: int, budget: Budget, *, tokens: int, distinct: int | None = None) -> list[Stream]:
        """Open sequences that have seen `tokens` random tokens each, evicted as `budget` says.

        Args:
            count: how many.
            budget: of each; its `prefill_chunk` is how much one is fed at a time.
            tokens: prompt tokens.
            distinct: how many are computed; the others are copies of them. None: all.
        """
        unique = min(count, count if distinct is None else distinct)
        streams = [self._open(budget) for _ in range(unique)]
        chunk = min(budget.prefill_chunk or tokens, tokens)
        group = max(self._lane_tokens // chunk, 1)
        for first in range(0, unique, group):
            for start in range(0, tokens, chunk):
                self._feed_prompt(streams[first : first + group], min(chunk, tokens - start), prompt_tokens=tokens)
        copies = [self._copy(streams[index % unique], shift=0) for index in range(unique, count)]
        return streams + copies

    def _open(self, budget: Budget) -> Stream:
        return Stream(row=self._runner.open(self.pages(budget)), budget=budget, token=0, looked_at=0)

    def _feed_prompt(self, streams: Sequence[Stream], tokens: int, *, prompt_tokens: int) -> None:
        ids = torch.randint(0, self._vocabulary, (len(streams), tokens), generator=self._random).tolist()
        feeds = [Feed(stream.row, line, wants_logits=True) for stream, line in zip(streams, ids, strict=True)]
        logits = self._runner.forward(feeds)
        for stream, token in zip(streams, logits.argmax(-1).tolist(), strict=True):
            stream.token = token
        self._evict(streams, prompt_tokens=prompt_tokens)

    def age(self, streams: Sequence[Stream], seen: int) -> list[Stream]:
        """Copies of sequences that look as if they had seen `seen` tokens: every position is moved up.

        Their keys keep the RoPE of their true positions, which changes the numbers of attention but none of its work.
        """
        return [self._copy(stream, shift=seen - self.table.seen(stream.row)) for stream in streams]

    def _copy(self, stream: Stream, *, shift: int) -> Stream:
        snapshot = self.table.snapshot(stream.row)
        moved = replace(snapshot, seen=snapshot.seen + shift, position=snapshot.position + shift)
        row = self.table.restore(moved, page_capacity=self.pages(stream.budget))
        return replace(stream, row=row, looked_at=stream.looked_at + shift)

    def stop(self, streams: Sequence[Stream]) -> None:
        """Close sequences."""
        for stream in streams:
            self._runner.close(stream.row)

    # ---- decoding ------------------------------------------------------------------------------------------------

    def decode(self, streams: Sequence[Stream], steps: int) -> DecodeRun:
        """Run `steps` greedy decode steps of all `streams` together; the most likely token is fed next."""
        clock, table = self._clock, self.table
        evictions: list[tuple[Any, Any]] = []
        cut, held = 0, 0
        ahead, last = self._runner.ahead, None
        if ahead is not None:
            ahead.set_last_tokens([stream.row for stream in streams], [stream.token for stream in streams])
        clock.synchronize()
        marks = [clock.mark()]
        for _ in range(steps):
            if ahead is None:
                self._step(streams)
            else:  # nobody reads a token before the last step
                last = ahead.launch([stream.row for stream in streams], ())
            held += sum(table.held(stream.row) for stream in streams)
            before = clock.mark()
            count = self._evict(streams, prompt_tokens=0)
            if count:
                cut += count
                evictions.append((before, clock.mark()))
            marks.append(clock.mark())
        clock.synchronize()
        if last is not None:
            for stream, token in zip(streams, last.wait(), strict=True):
                stream.token = max(token, 0)
        return DecodeRun(
            seconds=clock.seconds(marks[0], marks[-1]),
            step_seconds=tuple(clock.seconds(*pair) for pair in pairwise(marks)),
            evict_seconds=sum(clock.seconds(*pair) for pair in evictions),
            evictions=cut,
            held=held / (steps * len(streams) * self.geometry.streams),
        )

    def _step(self, streams: Sequence[Stream]) -> None:
        logits = self._runner.forward([Feed(stream.row, [stream.token], wants_logits=True) for stream in streams])
        for stream, token in zip(streams, logits.argmax(-1).tolist(), strict=True):
            stream.token = token

    def _evict(self, streams: Sequence[Stream], *, prompt_tokens: int) -> int:
        due = []
        for stream in streams:
            seen = self.table.seen(stream.row)
            if not stream.budget.is_eviction_point(seen, prompt_tokens):
                continue
            if self.table.is_due(stream.row, stream.budget, before=stream.looked_at):
                due.append((stream.row, stream.budget))
            stream.looked_at = seen
        if due:
            self._runner.evict(due)
        return len(due)


class _GreedyAhead:
    """Captured decode steps that choose the most likely token."""

    def __init__(self, programs: DecodePrograms) -> None:
        self._programs = programs

    def can_choose(self, state: Any) -> bool:
        """Always: there are no requests here."""
        return True

    @torch.inference_mode()
    def set_last_tokens(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """What the rows feed next."""
        self._programs.set_last_tokens(rows, tokens)

    def launch(self, rows: Sequence[int], sampling: Sequence[Any]) -> PendingTokens:
        """One step."""
        return self._programs.run(rows, _most_likely)


def _most_likely(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _greedy_factory(decoder: LeanDecoder, *, sizes: Sequence[int]) -> AheadFactory:
    def make(pool: PagePool, max_num_seqs: int) -> tuple[SequenceTable, _GreedyAhead]:
        table = DeviceSequenceTable(pool, max_num_seqs)
        programs = DecodePrograms(
            decoder, table, max_rows=max_num_seqs, num_query_heads=decoder.num_query_heads, sizes=sizes
        )
        if pool.device.type == "cuda":
            programs.capture(lambda _size: (_most_likely,))
        return table, _GreedyAhead(programs)

    return make

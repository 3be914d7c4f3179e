"""The one feeding regime: tokens in small chunks, eviction after each, whatever the method.

With larger chunks most tokens would still see entries that have not been evicted yet, and any method would look good.
Owns the order in which probes are read and what is taken from the logits. What is remembered, and how it is attended
to, is a `Memory`'s business; which model reads, a `Decoder`'s.

Letters: T tokens of the packed batch, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from trimkv_core.attention.base import LayerStep
from trimkv_core.batches import Segment
from trimkv_core.evaluation.tasks import Probe, ProbeError, ProbeResult

LANES = 4

Observer = Callable[[int, int, Tensor], None]
"""Called with a probe's number, how many of its predictions came before, and logits [n, V] of the next n."""


@dataclass(frozen=True, slots=True)
class Regime:
    """How every method reads.

    Attributes:
        chunk: tokens between eviction points.
        buffer: entries a stream over the budget (on average) that start an eviction.
        sinks: first positions that every baseline keeps.
    """

    chunk: int = 64
    buffer: int = 8
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.buffer < 1 or self.sinks < 0:
            raise ValueError(f"chunk and buffer must be at least 1, sinks at least 0: {self}")


@dataclass(frozen=True, slots=True)
class MemoryStep:
    """One forward's way to what is remembered.

    Attributes:
        position: int32 [T], logical positions of the fed tokens.
        layers: what the decoder's layers are handed.
    """

    position: Tensor
    layers: LayerStep


class Decoder(Protocol):
    """A loaded model that runs packed steps; as `LeanDecoder`."""

    name: str

    def forward(self, token_ids: Tensor, position: Tensor, step: LayerStep, wanted: Tensor | None) -> Tensor:
        """Feed int64 [T]; logits [N, V] of the rows `wanted`."""


class Memory(Protocol):
    """The entries of some sequences under one method and budget."""

    def open(self, total_tokens: int) -> int:
        """Start a sequence of at most `total_tokens` tokens; its row."""

    def extend(self, segments: Sequence[Segment]) -> MemoryStep:
        """Make room for one forward, segments of one token first."""

    def settle(self, rows: Sequence[int]) -> None:
        """An eviction point of these rows."""

    def peak(self, row: int) -> float:
        """The most entries a stream of the row ever held, the mean over its streams."""

    def close(self, row: int) -> None:
        """Forget a sequence."""


class Answerer(Protocol):
    """Whoever answers probes: a reader here, or a package in another process."""

    def answer(self, probes: Sequence[Probe]) -> list[ProbeResult]:
        """Results in the order of the probes."""


@dataclass(slots=True)
class _Lane:
    """A sequence that is being read, or read and then continued.

    Attributes:
        number: of its probe or prompt.
        row: in the memory.
        ids: tokens known so far.
        prompt: how many of them were given.
        stop: tokens to be fed in the end.
        wanted: predicted positions that lie ahead, in order.
        nll, best: of those behind.
        fed: tokens fed.
    """

    number: int
    row: int
    ids: list[int]
    prompt: int
    stop: int
    wanted: deque[int]
    nll: list[float] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    fed: int = 0

    def next_stop(self, chunk: int) -> int:
        """How far the next forward goes: to the next eviction point of the prompt, or one generated token."""
        if self.fed >= self.prompt:
            return self.fed + 1
        return min(self.fed // chunk * chunk + chunk, self.prompt, self.stop)

    @property
    def is_done(self) -> bool:
        return self.fed >= self.stop


class Reader:
    """Reads probes with a model and a memory, several at once.

    Args:
        decoder: the model.
        memory: method and budget.
        chunk: tokens between eviction points.
        device: of both.
        lanes: sequences a forward.
        sees_whole_prompt: nothing is evicted before everything up to the first prediction is in.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: Memory,
        *,
        chunk: int,
        device: torch.device,
        lanes: int = LANES,
        sees_whole_prompt: bool = False,
    ) -> None:
        self._decoder, self._memory = decoder, memory
        self._chunk, self._device, self._lanes = chunk, device, lanes
        self._sees_whole_prompt = sees_whole_prompt

    @torch.inference_mode()
    def answer(self, probes: Sequence[Probe], observe: Observer | None = None) -> list[ProbeResult]:
        """Read every probe; the results do not depend on the company a probe is read in."""
        results: dict[int, ProbeResult] = {}
        waiting = deque(enumerate(probes))
        active: list[_Lane] = []
        while waiting or active:
            while waiting and len(active) < self._lanes:
                active.append(self._open_probe(*waiting.popleft()))
            self._advance(active, observe)
            for lane in [lane for lane in active if lane.is_done]:
                results[lane.number] = ProbeResult(tuple(lane.nll), tuple(lane.best), self._memory.peak(lane.row))
                self._memory.close(lane.row)
                active.remove(lane)
        return [results[number] for number in range(len(probes))]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[int, ...]]:
        """Continue every prompt greedily; an eviction point after every generated token."""
        continued: dict[int, tuple[int, ...]] = {}
        waiting = deque(enumerate(prompts))
        active: list[_Lane] = []
        while waiting or active:
            while waiting and len(active) < self._lanes:
                number, prompt = waiting.popleft()
                size, total = len(prompt), len(prompt) + new_tokens
                wanted = deque(range(size, total))
                active.append(_Lane(number, self._memory.open(total), list(prompt), size, total - 1, wanted))
            self._advance(active, None)
            for lane in [lane for lane in active if lane.is_done]:
                continued[lane.number] = tuple(lane.best)
                self._memory.close(lane.row)
                active.remove(lane)
        return [continued[number] for number in range(len(prompts))]

    def _open_probe(self, number: int, probe: Probe) -> _Lane:
        """Nothing is fed behind the last prediction."""
        if len(probe.ids) < 2:
            raise ProbeError(f"probe {number} has {len(probe.ids)} tokens: nothing can be predicted")
        stop = probe.spans[-1].stop - 1 if probe.spans else len(probe.ids)
        # What follows the prompt of a whole-prompt method is fed token by token, as it would be generated.
        prompt = max(probe.spans[0].start - 1, 1) if self._sees_whole_prompt and probe.spans else stop
        row = self._memory.open(stop)
        return _Lane(number, row, list(probe.ids), prompt, stop, deque(probe.positions()))

    def _advance(self, active: Sequence[_Lane], observe: Observer | None) -> None:
        """One forward: the next chunk or token of every lane, its predictions, and eviction."""
        sizes = {lane.row: lane.next_stop(self._chunk) - lane.fed for lane in active}
        order = sorted(active, key=lambda lane: sizes[lane.row] > 1)
        step = self._memory.extend([Segment(lane.row, sizes[lane.row]) for lane in order])
        ids = [token for lane in order for token in lane.ids[lane.fed : lane.fed + sizes[lane.row]]]
        rows, counts, start = [], [], 0
        for lane in order:
            size = sizes[lane.row]
            ahead = [at - 1 - lane.fed + start for at in lane.wanted if at - 1 < lane.fed + size]
            rows += ahead
            counts.append(len(ahead))
            start += size
        logits = self._decoder.forward(self._tensor(ids), step.position, step.layers, self._tensor(rows))
        for lane, part in zip(order, torch.split(logits, counts), strict=True):
            lane.fed += sizes[lane.row]
            if part.shape[0]:
                self._take(lane, part.float(), observe)
        due = [lane.row for lane in order if not self._sees_whole_prompt or lane.fed >= lane.prompt]
        self._memory.settle(due)

    def _take(self, lane: _Lane, logits: Tensor, observe: Observer | None) -> None:
        """What a lane's predictions [n, V] say."""
        if observe is not None:
            observe(lane.number, len(lane.nll), logits)
        best: list[int] = logits.argmax(-1).tolist()
        targets = []
        for token in best:
            at = lane.wanted.popleft()
            if at == len(lane.ids):
                lane.ids.append(token)
            targets.append(lane.ids[at])
        lane.best += best
        lane.nll += (logits.logsumexp(-1) - logits.gather(1, self._tensor(targets)[:, None])[:, 0]).tolist()

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

"""A fleet in one process: real `EngineReplica`s around engines that do as they are told, and calls that can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from service.engine.interface import (
    AbortReason,
    EngineState,
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    KvDetail,
    ModelInfo,
    QueueSlot,
    RequestStats,
    SamplingParams,
    StreamChoice,
    TextDelta,
)
from service.fleet.calls import ReplicaReport
from service.fleet.replica import EngineReplica
from service.metrics import Metrics
from tests.service import scripted
from trimkv_core.budget import Budget

INFO = replace(
    scripted.INFO,
    budget=Budget(memory_size=64, prefill_chunk=512),
    sampling_defaults={},
    pool_pages=1000,
    pool_bytes=400_000,
)


def request(name: str = "r", *, prompt: int = 5, arrival: float = 0.0) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_ids=[1] * prompt,
        sampling=SamplingParams(max_tokens=8),
        budget=INFO.budget,
        arrival=arrival,
    )


def word(text: str) -> TextDelta:
    return TextDelta(text=text, token_ids=(7,), prompt_tokens=5, completion_tokens=1)


def end(text: str = "") -> Finished:
    reason = FinishReason.STOP
    return Finished(text=text, token_ids=(), finish_reason=reason, prompt_tokens=5, completion_tokens=2, kv=scripted.KV)


class ToldEngine:
    """An engine that says what `say` puts, and remembers what it was asked."""

    def __init__(self) -> None:
        self.state = EngineState.LOADING
        self.last_step_age_seconds = 0.0
        self.failure: BaseException | None = None
        self.submitted: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.running: tuple[RequestStats, ...] = ()
        self._answers: dict[str, asyncio.Queue[Event]] = {}

    @property
    def info(self) -> ModelInfo:
        return INFO

    def start(self) -> None:
        self.state = EngineState.READY

    def say(self, name: str, *events: Event) -> None:
        for event in events:
            self._answers[name].put_nowait(event)

    def reserve(self) -> QueueSlot:
        return nullcontext()  # type: ignore[return-value]

    def submit(self, asked: GenerationRequest, slot: QueueSlot) -> AsyncIterator[Event]:
        self.submitted.append(asked)
        self._answers[asked.request_id] = asyncio.Queue()
        return self._events(self._answers[asked.request_id])

    async def _events(self, answer: asyncio.Queue[Event]) -> AsyncIterator[Event]:
        while True:
            event = await answer.get()
            yield event
            if isinstance(event, Finished | Failed):
                return

    def abort(self, request_id: str, reason: AbortReason = AbortReason.CLIENT) -> None:
        self.aborted.append(request_id)

    async def stats(self) -> EngineStats:
        return EngineStats(
            geometry=INFO.geometry,
            pages_total=1000,
            pages_free=750,
            pages_used=250,
            pages_reserved=500,
            pool_bytes=400_000,
            running=self.running,
            waiting=2,
            waiting_by_reason={"capacity": 2},
            queued_prompt_tokens=12,
            restarts=1,
        )

    async def kv_detail(self, request_id: str, *, positions: StreamChoice | None = None) -> KvDetail | None:
        return None

    async def drain(self, timeout_seconds: float) -> None:
        self.state = EngineState.DRAINING


class LostError(Exception):
    """What a call raises whose other end has died."""


class Batches:
    """A call's events, which `cut` ends as a dead process does."""

    def __init__(self, source: AsyncIterator[tuple[Event, ...]]) -> None:
        self.is_cancelled = False
        self._source = source
        self._cut = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[tuple[Event, ...]]:
        return self._events()

    async def _events(self) -> AsyncIterator[tuple[Event, ...]]:
        cut = asyncio.create_task(self._cut.wait())
        while True:
            step = asyncio.ensure_future(anext(self._source, None))
            await asyncio.wait([step, cut], return_when=asyncio.FIRST_COMPLETED)
            if cut.done():
                step.cancel()
                raise LostError("the actor died")
            batch = step.result()
            if batch is None:
                cut.cancel()
                return
            yield batch

    def cut(self) -> None:
        self._cut.set()

    def cancel(self) -> None:
        self.is_cancelled = True


class PretendFleet:
    """A `Fleet` of `replicas`; requests go to them in turn."""

    def __init__(self, engines: Sequence[ToldEngine], *, end_process: Callable[[], None] = lambda: None) -> None:
        self.engines = engines
        self.replicas = [
            EngineReplica(f"e{number}", engine, Metrics(), watchdog_seconds=10, end_process=end_process)
            for number, engine in enumerate(engines)
        ]
        self.calls: dict[str, Batches] = {}
        self.arrived: dict[str, float] = {}
        self.times_asked = 0
        self.hangs = False

    async def start(self) -> None:
        for replica in self.replicas:
            await replica.start()

    def generate(self, asked: GenerationRequest, arrived: float) -> Batches:
        replica = self.replicas[len(self.calls) % len(self.replicas)]
        self.arrived[asked.request_id] = arrived
        self.calls[asked.request_id] = Batches(replica.generate(asked, arrived))
        return self.calls[asked.request_id]

    async def info(self) -> ModelInfo:
        return self.replicas[0].info()

    async def reports(self) -> Sequence[ReplicaReport]:
        self.times_asked += 1
        if self.hangs:
            raise TimeoutError
        return [await replica.report() for replica in self.replicas]

    async def kv_details(self, request_id: str, positions: StreamChoice | None) -> Sequence[KvDetail]:
        found = [await replica.kv_detail(request_id, positions) for replica in self.replicas]
        return [detail for detail in found if detail is not None]

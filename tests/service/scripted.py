"""An engine that does what a test tells it, for what a real one cannot be made to do, and a server around it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType

import uvicorn
from tokenizers import Tokenizer, decoders, models

from service.api.context import ApiContext
from service.app import create_app
from service.engine.interface import (
    AbortReason,
    EngineState,
    EngineStats,
    Event,
    Finished,
    FinishedRequest,
    FinishReason,
    GenerationRequest,
    KvDetail,
    KVUsage,
    ModelInfo,
    QueueSlot,
    RejectionReason,
    RequestStats,
    StreamChoice,
    SubmitError,
    TextDelta,
)
from service.generation.chat_format import ChatFormat, ChatMessage
from service.metrics import Metrics
from service.settings import Settings
from trimkv_core.budget import Budget, Geometry

GEOMETRY = Geometry(num_layers=2, num_heads=3, head_dim=4, block_size=16, kv_itemsize=4)
INFO = ModelInfo(
    model="tiny/model",
    tokenizer_path="tiny",
    gates="tiny/gates",
    has_gates=True,
    backend="torch",
    dtype="float32",
    device="cpu",
    max_model_len=1000,
    vocab_size=300,
    geometry=GEOMETRY,
    budget=Budget(memory_size=64, num_sink_tokens=4, prefill_chunk=512),
    trained_memory_size=64,
    eos_token_ids=(2,),
    sampling_defaults={"temperature": 0.5, "top_k": 20},
    pool_pages=100,
    pool_bytes=40_000,
)
DENSE_INFO = replace(INFO, gates=None, has_gates=False, budget=Budget.dense(), trained_memory_size=None)
KV = KVUsage(
    budget_entries=384,
    retained_entries=6,
    evicted_entries=6,
    peak_entries=12,
    evictions=1,
    bytes=240,
    peak_bytes=480,
    dense_bytes=384,
)
RUNNING = RequestStats(
    request_id="chatcmpl-1",
    phase="decode",
    prompt_tokens=5,
    completion_tokens=3,
    seen_tokens=7,
    budget=INFO.budget,
    entries_logical=42,
    entries_physical=40,
    layer_entries=(18, 22),
    pages_used=6,
    pages_reserved=12,
    evictions=1,
    evicted_entries=2,
    peak_entries=41,
)
ENDED = FinishedRequest(
    request_id="chatcmpl-1",
    finish_reason=FinishReason.STOP,
    abort_reason=None,
    prompt_tokens=5,
    completion_tokens=3,
    budget_entries_per_stream=64,
    kv=KV,
    time_to_first_token=0.2,
    e2e_latency=1.0,
    queue_time=0.1,
    prefill_time=0.1,
    decode_time=0.8,
)
Script = Callable[[GenerationRequest], AsyncIterator[Event]]


def delta(text: str, count: int) -> TextDelta:
    return TextDelta(text=text, token_ids=(7,), prompt_tokens=5, completion_tokens=count)


def finished(text: str = "", count: int = 2, reason: FinishReason = FinishReason.STOP) -> Finished:
    return Finished(text=text, token_ids=(), finish_reason=reason, prompt_tokens=5, completion_tokens=count, kv=KV)


def say(*events: Event, pause: float = 0.0) -> Script:
    """A script that sends `events`, each after `pause` seconds, and then ends."""

    async def script(request: GenerationRequest) -> AsyncIterator[Event]:
        for event in events:
            await asyncio.sleep(pause)
            yield event

    return script


async def hang(request: GenerationRequest) -> AsyncIterator[Event]:
    """A script that says one word and never ends."""
    yield delta("one", 1)
    await asyncio.sleep(3600)


class ScriptedEngine:
    """An `Engine` that follows `script` for every request."""

    def __init__(self, script: Script | None = None, *, info: ModelInfo = INFO) -> None:
        self.script = script or say(delta("Hel", 1), finished("lo"))
        self._info = info
        self.state = EngineState.READY
        self.last_step_age_seconds = 0.0
        self.submitted: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.slots_held = 0
        self.refusal: SubmitError | None = None
        self.drained = threading.Event()
        self.running: tuple[RequestStats, ...] = ()
        self.detail: Callable[[str, StreamChoice | None], KvDetail | None] = lambda _id, _positions: None

    @property
    def info(self) -> ModelInfo:
        if self.state is EngineState.LOADING:
            raise RuntimeError("loading")
        return self._info

    def start(self) -> None:
        pass

    def reserve(self) -> QueueSlot:
        if self.state is EngineState.DRAINING:
            raise SubmitError(RejectionReason.DRAINING, "the server drains")
        if self.state is not EngineState.READY:
            raise SubmitError(RejectionReason.NOT_READY, "the model is loading")
        return _Slot(self)

    def submit(self, request: GenerationRequest, slot: QueueSlot) -> AsyncIterator[Event]:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(request)
        return self.script(request)

    def abort(self, request_id: str, reason: AbortReason = AbortReason.CLIENT) -> None:
        self.aborted.append(request_id)

    async def stats(self) -> EngineStats:
        return EngineStats(
            geometry=GEOMETRY,
            pages_total=100,
            pages_free=75,
            pages_used=25,
            pages_reserved=50,
            pool_bytes=40_000,
            running=self.running,
            waiting=2,
            waiting_by_reason={"capacity": 2},
            queued_prompt_tokens=12,
            restarts=0,
        )

    async def kv_detail(self, request_id: str, *, positions: StreamChoice | None = None) -> KvDetail | None:
        return self.detail(request_id, positions)

    async def drain(self, timeout_seconds: float) -> None:
        self.state = EngineState.DRAINING
        self.drained.set()


class _Slot:
    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine

    def __enter__(self) -> QueueSlot:
        self._engine.slots_held += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._engine.slots_held -= 1


class CountingChatFormat(ChatFormat):
    """One token a character, all of them the same: back in text each is a `w`."""

    def __init__(self) -> None:
        self.backend = Tokenizer(models.WordLevel({"w": 1}, unk_token="w"))
        self.backend.decoder = decoders.Fuse()

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        return [1] * sum(len(message.content or "") for message in messages)


@contextlib.contextmanager
def serving(engine: ScriptedEngine, *, metrics: Metrics | None = None, **settings: object) -> Iterator[str]:
    """The service around `engine` on a real port; the address without a path."""
    app = create_app(
        settings=Settings(model="tiny/model", **settings),
        engine=engine,
        metrics=metrics or Metrics(),
    )
    context: ApiContext = app.state.context
    context.chat_format = CountingChatFormat()
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="httptools", lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def wait_for(is_true: Callable[[], object], *, seconds: float = 10.0) -> None:
    """Wait until `is_true()`, or fail."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)

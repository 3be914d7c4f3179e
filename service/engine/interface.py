"""The one seam between the API and whatever runs the model.

Owns the values that cross it (requests in, events and figures out), the errors a submission may meet, and the two
protocols: `Engine`, which the API calls, and `EngineObserver`, which the engine reports to. Knows no HTTP and no
tensors, so an engine may run in this process, in a child process, or behind another server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from trimkv_core.budget import Budget, Geometry


class FinishReason(StrEnum):
    """Why an answer ended, in OpenAI's words; `abort` is never sent to a client."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class AbortReason(StrEnum):
    """Why a request was taken out before its end."""

    CLIENT = "client_disconnected"
    SHUTDOWN = "shutdown"


class RejectionReason(StrEnum):
    """Why a request was turned away at the door."""

    QUEUE_REQUESTS = "queue_requests"
    QUEUE_TOKENS = "queue_tokens"
    NEVER_FITS = "never_fits"
    DRAINING = "draining"
    NOT_READY = "not_ready"


class SubmitError(Exception):
    """A request that the engine does not take; `reason` is also the metric's label."""

    def __init__(self, reason: RejectionReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class EngineState(StrEnum):
    """Where an engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when the answer ends.

    Attributes:
        max_tokens: tokens generated at most.
        temperature: 0 is greedy.
        top_p, top_k, min_p: filters; 1.0, 0 and 0.0 switch them off.
        seed: the same ids every time, alone or in company; None draws one.
        presence_penalty, frequency_penalty: on generated tokens; 0.0 switches them off.
        repetition_penalty: on prompt and generated tokens; 1.0 switches it off.
        min_tokens: tokens generated before a stop token or stop string counts.
        ignore_eos: whether the model's own end tokens are ignored.
        stop: strings that end the answer.
        stop_token_ids: token ids that end the answer, beside the model's own.
        include_stop_str_in_output: whether a stop string stays in the text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOrigin:
    """Where a request came from. The engine only hands it on, to what is told of the request's end.

    Attributes:
        http_request_id: `X-Request-Id` of the answer that carries it.
        model: the served name it was asked under.
        is_streaming: whether the answer goes out as it is made.
        trace_headers: W3C `traceparent` and `tracestate`, as far as the client sent them.
    """

    http_request_id: str | None = None
    model: str | None = None
    is_streaming: bool = False
    trace_headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One answer to make.

    Attributes:
        request_id: made by the server, unique.
        prompt_ids: token ids, at least one.
        sampling: see `SamplingParams`.
        budget: see `trimkv_core.budget.Budget`; its `prefill_chunk` belongs to the request.
        priority: lower goes first.
        arrival: `time.monotonic()` when the HTTP request came in, before tokenising.
        origin: for logs and traces.
    """

    request_id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    budget: Budget
    priority: int = 0
    arrival: float
    origin: RequestOrigin = RequestOrigin()


@dataclass(frozen=True, slots=True, kw_only=True)
class KVUsage:
    """What a request's cache really did.

    Attributes:
        budget_entries: M·L·H, or None when nothing is ever evicted.
        retained_entries: entries held at the end.
        evicted_entries: entries dropped; retained + evicted = (prompt + completion − 1)·L·H.
        peak_entries: the most held at any time, inside a forward too.
        evictions: how many times the cache was cut.
        bytes, peak_bytes: the same entries in bytes (key, value, log β, position).
        dense_bytes: keys and values of all tokens seen.
    """

    budget_entries: int | None
    retained_entries: int
    evicted_entries: int
    peak_entries: int
    evictions: int
    bytes: int
    peak_bytes: int
    dense_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """New tokens of an answer; `text` may be empty while characters or a stop string are undecided."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of an answer, with the last of its text. Always the last event unless `Failed` is."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    kv: KVUsage


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The engine could not finish this answer; the last event."""

    message: str


Event = TextDelta | Finished | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """One request as `GET /v1/kv` shows it.

    Attributes:
        phase: `prefill` or `decode`; of a single request also `waiting` and `ended`.
        seen_tokens: logical tokens in the cache.
        entries_logical: seen_tokens·L·H.
        entries_physical: entries held now.
        layer_entries: entries held now, by layer.
        pages_used, pages_reserved: pages held now, and promised.
    """

    request_id: str
    phase: str
    prompt_tokens: int
    completion_tokens: int
    seen_tokens: int
    budget: Budget
    entries_logical: int
    entries_physical: int
    layer_entries: tuple[int, ...]
    pages_used: int
    pages_reserved: int
    evictions: int
    evicted_entries: int
    peak_entries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPositions:
    """Logical positions that one stream holds, sorted."""

    layer: int
    head: int
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamChoice:
    """Streams whose positions are wanted; None: all layers, all heads."""

    layer: int | None = None
    head: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDetail:
    """One request's cache, stream by stream, taken between two steps.

    Attributes:
        request: its figures at that moment.
        age_seconds: how long ago that was.
        head_entries: entries held, [L][H].
        token_streams: for every seen token in order, the prompt's first, how many of the L·H streams hold it; None
            where that would have cost too much to find out.
        positions: of the streams asked for; None if none were, or if they are not known.
    """

    request: RequestStats
    age_seconds: float
    head_entries: tuple[tuple[int, ...], ...]
    token_streams: tuple[int, ...] | None
    positions: tuple[StreamPositions, ...] | None


class TooManyPositions(Exception):
    """More positions were asked for than one answer carries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The pool, the queue and every running request, taken between two steps.

    Attributes:
        pages_total, pages_free, pages_used: used + free = total.
        pages_reserved: all promises, their used part included.
        pool_bytes: memory of the pool.
        waiting_by_reason: why the waiting wait: `capacity` (pages), `slots` (sequences), `order` (behind another).
        queued_prompt_tokens: prompt tokens of the waiting.
    """

    geometry: Geometry
    pages_total: int
    pages_free: int
    pages_used: int
    pages_reserved: int
    pool_bytes: int
    running: tuple[RequestStats, ...]
    waiting: int
    waiting_by_reason: Mapping[str, int]
    queued_prompt_tokens: int
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What was loaded, for `/v1/models`, the start-up lines and `trimkv_model_info`.

    Attributes:
        budget: the server's default budget (its `prefill_chunk` included); dense when `has_gates` is False.
        trained_memory_size: the checkpoint's M, None without gates.
        eos_token_ids: the model's own end tokens.
        sampling_defaults: temperature, top_p, top_k, min_p, repetition_penalty as far as generation_config.json names
        them. pool_pages, pool_bytes: the pool.
        tokenizer_path: folder, repo id, GGUF file or `embedded`: what `ChatFormat.load` reads.
    """

    model: str
    tokenizer_path: str
    gates: str | None
    has_gates: bool
    backend: str
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    geometry: Geometry
    budget: Budget
    trained_memory_size: int | None
    eos_token_ids: tuple[int, ...]
    sampling_defaults: Mapping[str, float]
    pool_pages: int
    pool_bytes: int


class QueueSlot(Protocol):
    """A place in the queue, held while a prompt is being tokenised. Use it as a context manager: unless a submission
    took the place over, leaving the block gives it back."""

    def __enter__(self) -> QueueSlot: ...

    def __exit__(self, *exc: object) -> None: ...


class Engine(Protocol):
    """What the API may ask of an engine. Every method is called on the event loop and never blocks it."""

    @property
    def state(self) -> EngineState: ...

    @property
    def info(self) -> ModelInfo:
        """What was loaded. Raises RuntimeError until `state` has left LOADING."""
        ...

    @property
    def last_step_age_seconds(self) -> float:
        """How long the running step has been running; 0 while idle."""
        ...

    def reserve(self) -> QueueSlot:
        """Take a place in the queue before tokenising.

        Raises:
            SubmitError: not ready, draining, or the queue is full (QUEUE_REQUESTS).
        """
        ...

    def submit(self, request: GenerationRequest, slot: QueueSlot) -> AsyncIterator[Event]:
        """Queue `request` in `slot` and return its events. Ending the iteration early does not abort the request.

        Raises:
            SubmitError: draining, QUEUE_TOKENS, or NEVER_FITS with the numbers.
        """
        ...

    def abort(self, request_id: str, reason: AbortReason = AbortReason.CLIENT) -> None:
        """Take a request out before the next step ends; unknown or ended ids are ignored."""
        ...

    async def stats(self) -> EngineStats:
        """Figures taken between two steps; the last ones known while a step takes long."""
        ...

    async def kv_detail(self, request_id: str, *, positions: StreamChoice | None = None) -> KvDetail | None:
        """One request's cache, stream by stream; None for an id that is unknown, or ended some time ago.

        Args:
            positions: streams whose positions are wanted as well.

        Raises:
            TooManyPositions: these streams hold more than one answer carries.
            TimeoutError: the running step takes too long.
        """
        ...

    async def drain(self, timeout_seconds: float) -> None:
        """Take no more requests, let the running ones end, abort what is left after the timeout, stop the worker."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """What is known of a request when it has ended, for metrics and the log line.

    Times in seconds; None where the phase was never reached. `sampling` None: not said.
    """

    request_id: str
    finish_reason: FinishReason
    abort_reason: AbortReason | None
    prompt_tokens: int
    completion_tokens: int
    budget_entries_per_stream: int | None
    kv: KVUsage | None
    time_to_first_token: float | None
    e2e_latency: float
    queue_time: float | None
    prefill_time: float | None
    decode_time: float | None
    sampling: SamplingParams | None = None
    origin: RequestOrigin = RequestOrigin()


class EngineObserver(Protocol):
    """What an engine reports as it goes, on its own thread: implementations are thread-safe and quick."""

    def on_step(
        self, *, duration_seconds: float, prefill_tokens: int, prefill_sequences: int, decode_sequences: int
    ) -> None: ...

    def on_tokens(self, *, inter_token_seconds: Sequence[float]) -> None:
        """One value per token generated in this step that was not its request's first."""
        ...

    def on_prompt(self, *, tokens: int) -> None:
        """A prompt is wholly in the cache."""
        ...

    def on_first_token(self, *, seconds_since_arrival: float) -> None: ...

    def on_eviction(self, *, strategy: str, sequences: int, entries: int, duration_seconds: float) -> None: ...

    def on_finished(self, request: FinishedRequest) -> None: ...

    def on_rejected(self, reason: RejectionReason) -> None: ...

    def on_restart(self) -> None: ...

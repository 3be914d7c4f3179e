"""The Prometheus side of the service: what is counted, in which buckets, under which names.

Owns one registry. Counters and histograms are fed by the engine as it goes (`EngineObserver`, on the engine's thread);
gauges are read from the engine when somebody scrapes. Knows no HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import anyio
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.engine.interface import (
    AbortReason,
    Engine,
    EngineState,
    EngineStats,
    FinishedRequest,
    FinishReason,
    ModelInfo,
    RejectionReason,
)
from trimkv_core.budget import Strategy

logger = logging.getLogger(__name__)

PREFIX = "trimkv_"
# A scrape waits this long for the figures between two steps, then repeats the last ones.
STATS_TIMEOUT_SECONDS = 2.0

TIME_TO_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
INTER_TOKEN_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10,
)  # fmt: skip
REQUEST_SECONDS_BUCKETS = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
STEP_SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
COMPRESS_SECONDS_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000)
BUDGET_BUCKETS = (16, 32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

WAITING_REASONS = ("capacity", "slots", "order")
STEP_PHASES = ("prefill", "decode", "mixed")


class Metrics:
    """All metrics of one service. Implements `service.engine.interface.EngineObserver`."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped in prometheus_client 0.26
        self.registry = CollectorRegistry()
        self._gauges = _EngineGauges()
        self.registry.register(self._gauges)
        self._build_counters()
        self._build_histograms()

    def _build_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._finished = self._counter(
            "request_success", "Requests that ended, by how.", "finished_reason", tuple(FinishReason)
        )
        self._rejections = self._counter(
            "admission_rejections", "Requests turned away at the door.", "reason", tuple(RejectionReason)
        )
        self._aborted = self._counter(
            "requests_aborted", "Requests taken out before their end.", "reason", tuple(AbortReason)
        )
        self._evictions = self._counter(
            "kv_evictions", "Times a sequence's cache was cut.", "strategy", (Strategy.FIXED_BUDGET, Strategy.THRESHOLD)
        )
        self._evicted_entries = self._counter("kv_evicted_entries", "Cache entries dropped.")
        self._restarts = self._counter("engine_restarts", "Times the pool was rebuilt empty after a broken step.")

    def _build_histograms(self) -> None:
        self._time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "From the arrival of a request to its first token, tokenisation included.",
            TIME_TO_FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one request.", INTER_TOKEN_BUCKETS
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_SECONDS_BUCKETS
        )
        self._queue_time = self._histogram("request_queue_time_seconds", "Time in the queue.", REQUEST_SECONDS_BUCKETS)
        self._prefill_time = self._histogram(
            "request_prefill_time_seconds", "From admission to the first token.", REQUEST_SECONDS_BUCKETS
        )
        self._decode_time = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", REQUEST_SECONDS_BUCKETS
        )
        self._request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens a request.", TOKEN_BUCKETS
        )
        self._request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens a request.", TOKEN_BUCKETS
        )
        self._request_budget = self._histogram(
            "request_kv_budget", "kv_budget of requests that have one.", BUDGET_BUCKETS
        )
        self._retained_ratio = self._histogram(
            "request_kv_retained_ratio", "Entries held at the end of a request, of all it ever wrote.", RATIO_BUCKETS
        )
        self._compress = self._histogram(
            "kv_compress_duration_seconds", "Duration of one batch of evictions.", COMPRESS_SECONDS_BUCKETS
        )
        self._step_duration = self._histogram(
            "step_duration_seconds", "Duration of an engine step.", STEP_SECONDS_BUCKETS, "phase", STEP_PHASES
        )
        self._step_batch = self._histogram(
            "step_batch_size", "Sequences in an engine step.", BATCH_BUCKETS, "phase", STEP_PHASES
        )

    def _counter(self, name: str, text: str, label: str | None = None, values: Sequence[str] = ()) -> Counter:
        counter = Counter(PREFIX + name, text, (label,) if label else (), registry=self.registry)
        for value in values:
            counter.labels(str(value))
        return counter

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float], label: str | None = None, values: Sequence[str] = ()
    ) -> Histogram:
        histogram = Histogram(PREFIX + name, text, (label,) if label else (), registry=self.registry, buckets=buckets)
        for value in values:
            histogram.labels(value)
        return histogram

    def on_step(
        self, *, duration_seconds: float, prefill_tokens: int, prefill_sequences: int, decode_sequences: int
    ) -> None:
        phase = _phase(prefill_sequences=prefill_sequences, decode_sequences=decode_sequences)
        self._step_duration.labels(phase).observe(duration_seconds)
        self._step_batch.labels(phase).observe(prefill_sequences + decode_sequences)

    def on_tokens(self, *, inter_token_seconds: Sequence[float]) -> None:
        self._generation_tokens.inc(len(inter_token_seconds))
        for seconds in inter_token_seconds:
            self._inter_token.observe(seconds)

    def on_prompt(self, *, tokens: int) -> None:
        self._prompt_tokens.inc(tokens)

    def on_first_token(self, *, seconds_since_arrival: float) -> None:
        self._generation_tokens.inc()
        self._time_to_first_token.observe(seconds_since_arrival)

    def on_eviction(self, *, strategy: str, sequences: int, entries: int, duration_seconds: float) -> None:
        self._evictions.labels(str(strategy)).inc(sequences)
        self._evicted_entries.inc(entries)
        self._compress.observe(duration_seconds)

    def on_finished(self, request: FinishedRequest) -> None:
        self._finished.labels(request.finish_reason.value).inc()
        if request.abort_reason is not None:
            self._aborted.labels(request.abort_reason.value).inc()
        self._e2e.observe(request.e2e_latency)
        for histogram, seconds in (
            (self._queue_time, request.queue_time),
            (self._prefill_time, request.prefill_time),
            (self._decode_time, request.decode_time),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        self._request_prompt_tokens.observe(request.prompt_tokens)
        self._request_generation_tokens.observe(request.completion_tokens)
        if request.budget_entries_per_stream is not None:
            self._request_budget.observe(request.budget_entries_per_stream)
        if request.kv is not None and (written := request.kv.retained_entries + request.kv.evicted_entries):
            self._retained_ratio.observe(request.kv.retained_entries / written)

    def on_rejected(self, reason: RejectionReason) -> None:
        self._rejections.labels(reason.value).inc()

    def on_restart(self) -> None:
        self._restarts.inc()

    async def render(self, engine: Engine, *, accept: str, stats: EngineStats | None = None) -> tuple[bytes, str]:
        """The exposition of all metrics, and its content type.

        Args:
            accept: the scraper's `Accept` header, which chooses between the Prometheus and the OpenMetrics format.
            stats: the engine's figures where the caller has them; None asks for them.
        """
        await self._gauges.refresh(engine, stats)
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _EngineGauges(Collector):
    """Gauges out of the engine's last figures. Every series whose labels are known exists from the start, at 0."""

    def __init__(self) -> None:
        self._info: ModelInfo | None = None
        self._stats: EngineStats | None = None
        self._step_age = 0.0

    async def refresh(self, engine: Engine, stats: EngineStats | None) -> None:
        self._step_age = engine.last_step_age_seconds
        if engine.state in (EngineState.LOADING, EngineState.FAILED):
            return
        self._info = engine.info
        if stats is not None:
            self._stats = stats
            return
        with anyio.move_on_after(STATS_TIMEOUT_SECONDS) as scope:
            self._stats = await engine.stats()
        if scope.cancelled_caught:
            logger.warning("engine gave no figures within %g s; the last known ones are served", STATS_TIMEOUT_SECONDS)

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._pool()
        yield from self._entries()
        yield _gauge("engine_last_step_age_seconds", "Age of the running step; 0 while idle.", self._step_age)
        if self._info is not None:
            yield _model_info(self._info)

    def describe(self) -> Iterator[Metric]:
        """Names alone, for the registry's check of duplicates; there is no engine to ask yet."""
        return self.collect()

    def _requests(self) -> Iterator[Metric]:
        stats = self._stats
        reasons = dict.fromkeys(WAITING_REASONS, 0) | dict(stats.waiting_by_reason if stats else {})
        yield _gauge("num_requests_running", "Requests being computed.", len(stats.running) if stats else 0)
        yield _gauge("num_requests_waiting", "Requests in the queue.", stats.waiting if stats else 0)
        yield _labelled("num_requests_waiting_by_reason", "Requests in the queue, by why.", "reason", reasons)

    def _pool(self) -> Iterator[Metric]:
        stats = self._stats
        pages = {
            "free": stats.pages_free if stats else 0,
            "used": stats.pages_used if stats else 0,
            "reserved": stats.pages_reserved if stats else 0,
        }
        usage = stats.pages_used / stats.pages_total if stats and stats.pages_total else 0.0
        yield _labelled("kv_pages", "Pages of the pool; used + free = all, reserved = all promises.", "state", pages)
        yield _gauge("kv_pool_bytes", "Memory of the page pool.", stats.pool_bytes if stats else 0)
        yield _gauge("kv_cache_usage_perc", "Used pages of all pages, 0 to 1.", usage)

    def _entries(self) -> Iterator[Metric]:
        stats = self._stats
        running = stats.running if stats else ()
        streams = stats.geometry.streams if stats else 0
        entries = {
            "logical": sum(request.entries_logical for request in running),
            "physical": sum(request.entries_physical for request in running),
            "allocated": stats.pages_used * stats.geometry.block_size if stats else 0,
        }
        layers = [0] * (stats.geometry.num_layers if stats else 0)
        for request in running:
            for layer, held in enumerate(request.layer_entries):
                layers[layer] += held
        budgets = sum((request.budget.memory_size or 0) * streams for request in running)
        yield _labelled(
            "kv_entries", "Entries: seen tokens (logical), held (physical), room in used pages.", "kind", entries
        )
        by_layer = {str(layer): held for layer, held in enumerate(layers)}
        yield _labelled("kv_layer_entries", "Entries held, by layer.", "layer", by_layer)
        yield _gauge("kv_budget_entries", "Sum of the budgets of running requests, in entries.", budgets)


def _phase(*, prefill_sequences: int, decode_sequences: int) -> str:
    if prefill_sequences and decode_sequences:
        return "mixed"
    return "prefill" if prefill_sequences else "decode"


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=(label,))
    for label_value, value in values.items():
        family.add_metric((label_value,), value)
    return family


def _model_info(info: ModelInfo) -> Metric:
    labels = {
        "model": info.model,
        "gates": info.gates or "",
        "backend": info.backend,
        "dtype": info.dtype,
        "device": info.device,
        "max_model_len": str(info.max_model_len),
        "kv_budget": str(info.budget.memory_size or 0),
    }
    family = GaugeMetricFamily(PREFIX + "model_info", "What is served; always 1.", labels=tuple(labels))
    family.add_metric(tuple(labels.values()), 1)
    return family

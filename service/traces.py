"""OpenTelemetry, for who has it: one span a request with its phases inside, and the gen_ai metrics of a server.

The standard variables set everything: `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_TRACES_EXPORTER` switch it on; the SDK
reads `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`, `OTEL_BSP_…` and the exporter's own. Spans
are made when a request has ended, out of what the engine measured: nothing is traced while tokens are made. Names are
those of the semantic conventions; what the cache did is under `trimkv.kv.`. No prompt and no answer is in any of them.

The one module that imports OpenTelemetry, which is optional: `pip install 'trimkv-serve[otel]'`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from service.engine.interface import FinishedRequest, FinishReason
from service.logs import LoggedMetrics

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

DEFAULT_SERVICE_NAME = "trimkv-serve"
# The conventions' buckets, in seconds.
_REQUEST_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
_PER_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_EXPORTERS = ("otlp", "console", "none")

Attribute = str | int | float | tuple[str, ...]


class TracesError(Exception):
    """Traces or metrics were asked for that cannot be had; the message says what to change."""


class _Phase(NamedTuple):
    name: str
    start: int
    end: int


def open_traces(environ: Mapping[str, str]) -> Traces | None:
    """What the `OTEL_…` variables ask for; None if they ask for nothing.

    Raises:
        TracesError: OpenTelemetry is not installed, or an exporter is unknown.
    """
    traces, metrics = (_exporter(environ, signal) for signal in ("TRACES", "METRICS"))
    if traces is None and metrics is None:
        return None
    try:
        from opentelemetry.sdk.resources import Resource
    except ImportError as error:
        raise TracesError(
            "OTEL_ variables ask for traces or metrics, but OpenTelemetry is not installed: "
            "pip install 'trimkv-serve[otel]', or set OTEL_SDK_DISABLED=true"
        ) from error
    # `create` reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, and says "unknown_service" where they say nothing.
    resource = Resource.create({} if _names_service(environ) else {"service.name": DEFAULT_SERVICE_NAME})
    opened = Traces(
        tracer_provider=_tracer_provider(traces, resource, environ) if traces else None,
        meter_provider=_meter_provider(metrics, resource, environ) if metrics else None,
    )
    logger.info("OpenTelemetry: traces to %s, metrics to %s", traces or "none", metrics or "none")
    return opened


class Traces:
    """Tells OpenTelemetry of ended requests.

    Args:
        tracer_provider: None for no spans.
        meter_provider: None for no metrics.
    """

    def __init__(self, *, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> None:
        self._tracer_provider = tracer_provider
        self._meter_provider = meter_provider
        self._tracer = tracer_provider.get_tracer("trimkv") if tracer_provider else None
        meter = meter_provider.get_meter("trimkv") if meter_provider else None
        if meter is None:
            self._duration = self._first_token = self._per_token = None
            return
        self._duration = meter.create_histogram(
            "gen_ai.server.request.duration",
            unit="s",
            description="From arrival to the last token.",
            explicit_bucket_boundaries_advisory=_REQUEST_BUCKETS,
        )
        self._first_token = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            unit="s",
            description="From arrival to the first token.",
            explicit_bucket_boundaries_advisory=_FIRST_TOKEN_BUCKETS,
        )
        self._per_token = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            unit="s",
            description="Mean time of a token after the first.",
            explicit_bucket_boundaries_advisory=_PER_TOKEN_BUCKETS,
        )

    def on_finished(self, request: FinishedRequest) -> None:
        """On the engine's thread: spans go to a queue, numbers into histograms."""
        self._measure(request)
        self._trace(request)

    def close(self) -> None:
        """Send what is left."""
        for provider in (self._tracer_provider, self._meter_provider):
            if provider is not None:
                provider.shutdown()

    def _measure(self, request: FinishedRequest) -> None:
        if self._duration is None or self._first_token is None or self._per_token is None:
            return
        labels = _labels(request)
        self._duration.record(request.e2e_latency, labels)
        if request.time_to_first_token is not None:
            self._first_token.record(request.time_to_first_token, labels)
        if request.decode_time is not None and request.completion_tokens > 1:
            self._per_token.record(request.decode_time / (request.completion_tokens - 1), labels)

    def _trace(self, request: FinishedRequest) -> None:
        if self._tracer is None:
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        end = time.time_ns()
        start = end - _nanoseconds(request.e2e_latency)
        span = self._tracer.start_span(
            f"{_operation(request)} {request.origin.model or ''}".rstrip(),
            context=extract(dict(request.origin.trace_headers)),
            kind=SpanKind.SERVER,
            start_time=start,
            attributes=_attributes(request),
        )
        if request.finish_reason is FinishReason.ERROR:
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for phase in _phases(request, start=start):
            self._tracer.start_span(phase.name, context=inside, start_time=phase.start).end(phase.end)
        span.end(end)


class TracedMetrics(LoggedMetrics):
    """Metrics and log lines that also tell OpenTelemetry of every ended request."""

    def __init__(self, traces: Traces) -> None:
        super().__init__()
        self._traces = traces

    def on_finished(self, request: FinishedRequest) -> None:
        super().on_finished(request)
        try:
            self._traces.on_finished(request)
        except Exception:  # whatever an SDK meets, it must not fail a step of the engine
            logger.exception("a request could not be traced id=%s", request.request_id)


def _exporter(environ: Mapping[str, str], signal: str) -> str | None:
    """The exporter asked for, None for none: as the specification reads the variables, but off by default."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    variable = f"OTEL_{signal}_EXPORTER"
    name = environ.get(variable, "").strip().lower()
    has_endpoint = any(
        environ.get(endpoint) for endpoint in ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    )
    name = name or ("otlp" if has_endpoint else "none")
    if name not in _EXPORTERS:
        raise TracesError(f"{variable}={name} is not possible: {', '.join(_EXPORTERS)}")
    return None if name == "none" else name


def _names_service(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("OTEL_SERVICE_NAME")) or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")


def _otlp_module(environ: Mapping[str, str], signal: str) -> ModuleType:
    """The OTLP exporter module of the protocol asked for."""
    from importlib import import_module

    specific = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}S_PROTOCOL")
    protocol = specific or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    package = {"http/protobuf": "http", "grpc": "grpc"}.get(protocol)
    if package is None:
        raise TracesError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is not possible: http/protobuf, grpc")
    try:
        return import_module(f"opentelemetry.exporter.otlp.proto.{package}.{signal}_exporter")
    except ImportError as error:
        raise TracesError(f"{protocol} needs pip install opentelemetry-exporter-otlp-proto-{package}") from error


def _tracer_provider(exporter: str, resource: Resource, environ: Mapping[str, str]) -> TracerProvider:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    target = ConsoleSpanExporter() if exporter == "console" else _otlp_module(environ, "trace").OTLPSpanExporter()
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(target))
    return provider


def _meter_provider(exporter: str, resource: Resource, environ: Mapping[str, str]) -> MeterProvider:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

    target = ConsoleMetricExporter() if exporter == "console" else _otlp_module(environ, "metric").OTLPMetricExporter()
    return MeterProvider(resource=resource, metric_readers=[PeriodicExportingMetricReader(target)])


def _operation(request: FinishedRequest) -> str:
    return "chat" if request.request_id.startswith("chat") else "text_completion"


def _labels(request: FinishedRequest) -> dict[str, Attribute]:
    """What metrics and spans share: never a request id."""
    labels: dict[str, Attribute] = {
        "gen_ai.operation.name": _operation(request),
        "gen_ai.provider.name": "trimkv",
    }
    if request.origin.model is not None:
        labels |= {"gen_ai.request.model": request.origin.model, "gen_ai.response.model": request.origin.model}
    if request.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        labels["error.type"] = request.abort_reason.value if request.abort_reason else "engine_error"
    return labels


def _attributes(request: FinishedRequest) -> dict[str, Attribute]:
    attributes = _labels(request) | {
        "gen_ai.response.id": request.request_id,
        "gen_ai.response.finish_reasons": (request.finish_reason.value,),
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": request.completion_tokens,
    }
    optional: dict[str, Attribute | None] = {
        "http.request.header.x-request-id": request.origin.http_request_id,
        "trimkv.kv.budget": request.budget_entries_per_stream,
    }
    if request.sampling is not None:
        optional |= {
            "gen_ai.request.max_tokens": request.sampling.max_tokens,
            "gen_ai.request.temperature": request.sampling.temperature,
            "gen_ai.request.top_p": request.sampling.top_p,
            "gen_ai.request.seed": request.sampling.seed,
        }
    if request.kv is not None:
        optional |= {
            "trimkv.kv.retained_entries": request.kv.retained_entries,
            "trimkv.kv.evicted_entries": request.kv.evicted_entries,
            "trimkv.kv.evictions": request.kv.evictions,
            "trimkv.kv.peak_bytes": request.kv.peak_bytes,
            "trimkv.kv.dense_bytes": request.kv.dense_bytes,
        }
    return attributes | {name: value for name, value in optional.items() if value is not None}


def _phases(request: FinishedRequest, *, start: int) -> list[_Phase]:
    """Queue, prefill and decode, one after another, as far as the request came."""
    phases: list[_Phase] = []
    for name, seconds in (
        ("queue", request.queue_time),
        ("prefill", request.prefill_time),
        ("decode", request.decode_time),
    ):
        if seconds is None:
            break
        end = start + _nanoseconds(seconds)
        phases.append(_Phase(name, start, end))
        start = end
    return phases


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)

"""OpenTelemetry, for who has it: one span a request with its phases inside, and the gen_ai metrics of a server.

The standard variables set everything: `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_EXPORTER` or `OTEL_METRICS_EXPORTER`
switch it on; the SDK reads `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`, `OTEL_BSP_…` and the
exporter's own. Spans are made when a request has ended, out of what the engine measured: nothing is traced while tokens
are made. What is said of a request, and in which words, is `service.gen_ai`'s business.

The one module that imports OpenTelemetry, which is optional: `pip install 'trimkv-serve[otel]'`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from service import gen_ai
from service.engine.interface import FinishedRequest
from service.logs import LoggedMetrics

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

DEFAULT_SERVICE_NAME = "trimkv-serve"
# What the last spans and figures get to reach a collector when the process ends; one that is gone would take longer.
CLOSE_SECONDS = 5.0
_EXPORTERS = ("otlp", "console", "none")


class _Unavailable(Exception):
    """Traces or metrics were asked for that cannot be had; the message says what to change."""


def open_traces(environ: Mapping[str, str]) -> Traces | None:
    """What the `OTEL_…` variables ask for; None if that is nothing, or cannot be had.

    The variables are often set for a whole cluster, and telemetry is no reason not to serve: what cannot be had is said
    once, with what to change.
    """
    try:
        return _open(environ)
    except _Unavailable as error:
        logger.warning("no OpenTelemetry: %s", error)
    except Exception as error:  # whatever an SDK makes of a variable that it cannot read
        logger.warning("no OpenTelemetry, its variables cannot be used: %s: %s", type(error).__name__, error)
    return None


class Traces:
    """Tells OpenTelemetry of ended requests.

    Args:
        tracer_provider: None for no spans.
        meter_provider: None for no metrics.
    """

    def __init__(self, *, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> None:
        self._providers = [provider for provider in (tracer_provider, meter_provider) if provider is not None]
        self._tracer = tracer_provider.get_tracer(gen_ai.PROVIDER) if tracer_provider else None
        meter = meter_provider.get_meter(gen_ai.PROVIDER) if meter_provider else None
        self._histograms = {
            name: meter.create_histogram(
                name, unit="s", description=gen_ai.DESCRIPTIONS[name], explicit_bucket_boundaries_advisory=buckets
            )
            for name, buckets in gen_ai.BUCKETS.items()
            if meter is not None
        }

    def on_finished(self, request: FinishedRequest) -> None:
        """On the engine's thread: spans go to a queue, numbers into histograms."""
        if self._histograms:
            labels = gen_ai.labels(request)
            for name, seconds in gen_ai.measurements(request).items():
                self._histograms[name].record(seconds, labels)
        self._trace(request)

    def close(self) -> None:
        """Send what is left, for as long as `CLOSE_SECONDS` allow."""
        closing = [threading.Thread(target=provider.shutdown, daemon=True) for provider in self._providers]
        for thread in closing:
            thread.start()
        end = time.monotonic() + CLOSE_SECONDS
        for thread in closing:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in closing):
            logger.warning("OpenTelemetry: the last spans or figures did not reach their collector")

    def _trace(self, request: FinishedRequest) -> None:
        if self._tracer is None:
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        end = time.time_ns()
        start = end - gen_ai.nanoseconds(request.e2e_latency)
        span = self._tracer.start_span(
            gen_ai.span_name(request),
            context=extract(dict(request.origin.trace_headers)),
            kind=SpanKind.SERVER,
            start_time=start,
            attributes=gen_ai.span_attributes(request),
        )
        if not gen_ai.is_success(request):
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for phase in gen_ai.phases(request, start=start):
            self._tracer.start_span(phase.name, context=inside, start_time=phase.start).end(phase.end)
        span.end(end)


class TracedMetrics(LoggedMetrics):
    """Metrics and log lines that also tell OpenTelemetry of every ended request."""

    def __init__(self, traces: Traces) -> None:
        super().__init__()
        self._traces = traces
        self._has_failed = False

    def on_finished(self, request: FinishedRequest) -> None:
        super().on_finished(request)
        try:
            self._traces.on_finished(request)
        except Exception:  # whatever an SDK meets, it must not fail a step of the engine
            if not self._has_failed:
                logger.exception("a request could not be traced id=%s (said once)", request.request_id)
            self._has_failed = True


def _open(environ: Mapping[str, str]) -> Traces | None:
    traces, metrics = (_exporters(environ, signal) for signal in ("TRACES", "METRICS"))
    if not traces and not metrics:
        return None
    try:
        # The first reads OTEL_PROPAGATORS when it is imported: here, and not when the first request has ended.
        import opentelemetry.propagate
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise _Unavailable(
            "OTEL_ variables ask for traces or metrics, but it is not installed: pip install 'trimkv-serve[otel]', "
            "or set OTEL_SDK_DISABLED=true"
        ) from error
    resource = _resource(environ)
    opened = Traces(
        tracer_provider=_tracer_provider(traces, resource, environ) if traces else None,
        meter_provider=_meter_provider(metrics, resource, environ) if metrics else None,
    )
    logger.info("OpenTelemetry: traces to %s, metrics to %s", _listed(traces), _listed(metrics))
    return opened


def _exporters(environ: Mapping[str, str], signal: str) -> tuple[str, ...]:
    """The exporters asked for: as the specification reads the variables, but none by default."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    variable = f"OTEL_{signal}_EXPORTER"
    has_endpoint = any(
        environ.get(endpoint) for endpoint in ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    )
    asked = environ.get(variable, "").strip().lower() or ("otlp" if has_endpoint else "none")
    names = tuple(dict.fromkeys(name.strip() for name in asked.split(",")))
    if not set(names) <= set(_EXPORTERS):
        raise _Unavailable(f"{variable}={asked} is not possible: {', '.join(_EXPORTERS)}, or several with commas")
    return tuple(name for name in names if name != "none")


def _listed(exporters: tuple[str, ...]) -> str:
    return ", ".join(exporters) or "none"


def _resource(environ: Mapping[str, str]) -> Resource:
    from opentelemetry.sdk.resources import Resource

    said = environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    names_service = bool(environ.get("OTEL_SERVICE_NAME")) or "service.name=" in said
    # `create` reads both variables, and says "unknown_service" where they say nothing.
    return Resource.create({} if names_service else {"service.name": DEFAULT_SERVICE_NAME})


def _otlp_module(environ: Mapping[str, str], signal: str) -> ModuleType:
    """The OTLP exporter module of the protocol asked for."""
    from importlib import import_module

    specific = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}S_PROTOCOL")
    protocol = specific or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    package = {"http/protobuf": "http", "grpc": "grpc"}.get(protocol)
    if package is None:
        raise _Unavailable(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is not possible: http/protobuf, grpc")
    try:
        return import_module(f"opentelemetry.exporter.otlp.proto.{package}.{signal}_exporter")
    except ImportError as error:
        raise _Unavailable(f"{protocol} needs pip install opentelemetry-exporter-otlp-proto-{package}") from error


def _tracer_provider(exporters: tuple[str, ...], resource: Resource, environ: Mapping[str, str]) -> TracerProvider:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        target = ConsoleSpanExporter() if exporter == "console" else _otlp_module(environ, "trace").OTLPSpanExporter()
        provider.add_span_processor(BatchSpanProcessor(target))
    return provider


def _meter_provider(exporters: tuple[str, ...], resource: Resource, environ: Mapping[str, str]) -> MeterProvider:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

    targets = [
        ConsoleMetricExporter() if exporter == "console" else _otlp_module(environ, "metric").OTLPMetricExporter()
        for exporter in exporters
    ]
    readers = [PeriodicExportingMetricReader(target) for target in targets]
    return MeterProvider(resource=resource, metric_readers=readers, shutdown_on_exit=False)

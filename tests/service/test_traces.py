"""OpenTelemetry: off unless asked for, spans and metrics by the conventions, over a real OTLP endpoint."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs pip install 'trimkv-serve[otel]'")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service import traces
from service.engine.interface import AbortReason, FinishedRequest, FinishReason, RequestOrigin, SamplingParams
from service.traces import TracedMetrics, Traces, TracesError, open_traces
from tests.service.test_logs import ENDED

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
REQUEST = replace(
    ENDED,
    sampling=SamplingParams(max_tokens=40, temperature=0.5, seed=3),
    origin=RequestOrigin(
        http_request_id="req-7", model="tiny/model", trace_headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}
    ),
)
SIGNALS = ("traces", "metrics")


class Told:
    """What a `Traces` told its providers."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.traces = Traces(tracer_provider=provider, meter_provider=MeterProvider(metric_readers=[self.reader]))

    def spans(self, *requests: FinishedRequest) -> dict[str, Any]:
        for request in requests:
            self.traces.on_finished(request)
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def points(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: metric.data.data_points
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def test_a_request_is_a_span_of_its_callers_trace() -> None:
    span = Told().spans(REQUEST)["chat tiny/model"]
    assert span.kind is SpanKind.SERVER
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(REQUEST.e2e_latency)
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "trimkv",
        "gen_ai.request.model": "tiny/model",
        "gen_ai.response.model": "tiny/model",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 3,
        "http.request.header.x-request-id": "req-7",
        "trimkv.kv.budget": 64,
        "trimkv.kv.retained_entries": 6,
        "trimkv.kv.evicted_entries": 6,
        "trimkv.kv.evictions": 1,
        "trimkv.kv.peak_bytes": 480,
        "trimkv.kv.dense_bytes": 384,
    }


def test_its_phases_lie_inside_one_after_another() -> None:
    spans = Told().spans(REQUEST)
    parent = spans["chat tiny/model"]
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert [phase.parent.span_id for phase in phases] == [parent.context.span_id] * 3
    assert phases[0].start_time == parent.start_time
    for before, after in itertools.pairwise(phases):
        assert before.end_time == after.start_time
    assert phases[-1].end_time <= parent.end_time
    assert [(phase.end_time - phase.start_time) / 1e9 for phase in phases] == pytest.approx([0.1, 0.1, 0.8])


def test_one_that_never_began_has_no_phases_and_no_token_times() -> None:
    told = Told()
    refused = replace(
        REQUEST,
        finish_reason=FinishReason.ABORT,
        abort_reason=AbortReason.CLIENT,
        queue_time=None,
        prefill_time=None,
        decode_time=None,
        time_to_first_token=None,
        kv=None,
    )
    spans = told.spans(refused)
    assert set(spans) == {"chat tiny/model"}
    assert spans["chat tiny/model"].attributes["error.type"] == "client_disconnected"
    assert set(told.points()) == {"gen_ai.server.request.duration"}


def test_a_failure_is_an_error() -> None:
    span = Told().spans(replace(REQUEST, finish_reason=FinishReason.ERROR))["chat tiny/model"]
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "engine_error"


def test_metrics_are_the_conventions_and_know_no_request() -> None:
    told = Told()
    told.spans(REQUEST, REQUEST)
    points = told.points()
    expected = {
        "gen_ai.server.request.duration": 2.0,
        "gen_ai.server.time_to_first_token": 0.4,
        "gen_ai.server.time_per_output_token": 0.8,
    }
    assert set(points) == set(expected)
    for name, total in expected.items():
        (point,) = points[name]
        assert (point.count, point.sum) == (2, pytest.approx(total))
        assert "chatcmpl-1" not in str(dict(point.attributes))
    assert 0.32 in points["gen_ai.server.request.duration"][0].explicit_bounds


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_nothing_is_told_unless_asked(environ: dict[str, str]) -> None:
    assert open_traces(environ) is None


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "jaeger"}, "OTEL_TRACES_EXPORTER=jaeger is not possible: otlp, console, none"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"},
            "carrier-pigeon is not possible: http/protobuf, grpc",
        ),
    ],
)
def test_what_cannot_be_had_is_said(environ: dict[str, str], said: str) -> None:
    with pytest.raises(TracesError, match=said):
        open_traces(environ)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(TracesError, match=r"trimkv-serve\[otel\]"):
        open_traces({"OTEL_TRACES_EXPORTER": "console"})


def test_a_failing_sdk_never_fails_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    told.traces._tracer = None
    told.traces._duration = type("Broken", (), {"record": lambda *_: 1 / 0})()  # type: ignore[assignment]
    TracedMetrics(told.traces).on_finished(REQUEST)
    assert "could not be traced id=chatcmpl-1" in caplog.text


def test_opentelemetry_is_imported_in_one_module_only() -> None:
    service = Path(traces.__file__).parent
    guilty = {path.name for path in service.rglob("*.py") if "opentelemetry" in path.read_text().lower()}
    assert guilty == {"traces.py"}


@pytest.fixture
def collector() -> Iterator[tuple[str, dict[str, list[bytes]]]]:
    """An OTLP endpoint over HTTP: its address, and bodies by path."""
    heard: dict[str, list[bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.setdefault(self.path, []).append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", heard
    server.shutdown()


def test_spans_and_metrics_reach_a_collector(
    collector: tuple[str, dict[str, list[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    address, heard = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    opened = open_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": address})
    assert opened is not None
    TracedMetrics(opened).on_finished(REQUEST)
    opened.close()
    assert set(heard) == {f"/v1/{signal}" for signal in SIGNALS}
    sent = ExportTraceServiceRequest.FromString(heard["/v1/traces"][0]).resource_spans[0]
    resource = {attribute.key: attribute.value.string_value for attribute in sent.resource.attributes}
    assert resource["service.name"] == "trimkv-serve"
    assert {span.name for span in sent.scope_spans[0].spans} == {"chat tiny/model", "queue", "prefill", "decode"}
    metrics = ExportMetricsServiceRequest.FromString(heard["/v1/metrics"][0]).resource_metrics[0]
    assert "gen_ai.server.time_to_first_token" in {metric.name for metric in metrics.scope_metrics[0].metrics}

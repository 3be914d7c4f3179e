"""OpenTelemetry: off unless asked for, spans and metrics by the conventions, over a real OTLP endpoint."""

from __future__ import annotations

import itertools
import logging
import re
import sys
import threading
import time
from dataclasses import replace
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
from service.traces import TracedMetrics, Traces, open_traces
from tests.service.collector import collecting
from tests.service.test_logs import ENDED

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
REQUEST = replace(
    ENDED,
    sampling=SamplingParams(max_tokens=40, temperature=0.5, top_k=20, seed=3, stop=("a secret",)),
    origin=RequestOrigin(
        http_request_id="req-7",
        model="tiny/model",
        is_streaming=True,
        trace_headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
    ),
)


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
    assert span.status.status_code is StatusCode.UNSET
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
        "gen_ai.request.top_k": 20.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stream": True,
        "http.response.header.x-request-id": ("req-7",),
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


@pytest.mark.parametrize(
    ("reason", "abort", "error_type"),
    [
        (FinishReason.ERROR, None, "engine_error"),
        (FinishReason.ABORT, AbortReason.CLIENT, "client_disconnected"),
        (FinishReason.ABORT, AbortReason.SHUTDOWN, "shutdown"),
    ],
)
def test_an_answer_without_its_end_is_an_error_and_only_its_duration_counts(
    reason: FinishReason, abort: AbortReason | None, error_type: str
) -> None:
    told = Told()
    span = told.spans(replace(REQUEST, finish_reason=reason, abort_reason=abort))["chat tiny/model"]
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == error_type
    points = told.points()
    assert set(points) == {"gen_ai.server.request.duration"}
    assert points["gen_ai.server.request.duration"][0].attributes["error.type"] == error_type


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
        assert dict(point.attributes) == {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "trimkv",
            "gen_ai.request.model": "tiny/model",
            "gen_ai.response.model": "tiny/model",
        }
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
        (
            {"OTEL_TRACES_EXPORTER": "otlp,jaeger"},
            "OTEL_TRACES_EXPORTER=otlp,jaeger is not possible: otlp, console, none, or several with commas",
        ),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"},
            "carrier-pigeon is not possible: http/protobuf, grpc",
        ),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "ValueError: max_queue_size"),
    ],
)
def test_what_cannot_be_had_is_said_and_no_reason_not_to_serve(
    environ: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert open_traces(environ) is None
    (record,) = (record for record in caplog.records if record.name == traces.__name__)
    assert record.levelno == logging.WARNING
    assert said in record.message


def test_without_the_package_it_says_once_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    assert open_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}) is None
    (record,) = caplog.records
    assert "pip install 'trimkv-serve[otel]'" in record.message


def test_several_exporters_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    both = {"OTEL_TRACES_EXPORTER": "console, otlp", "OTEL_METRICS_EXPORTER": "none"}
    assert traces._exporters(both, "TRACES") == ("console", "otlp")
    assert traces._exporters(both, "METRICS") == ()


def test_a_failing_sdk_never_fails_the_engine_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    told.traces._histograms = {"gen_ai.server.request.duration": None}  # type: ignore[dict-item]
    metrics = TracedMetrics(told.traces)
    metrics.on_finished(REQUEST)
    metrics.on_finished(REQUEST)
    assert caplog.text.count("could not be traced id=chatcmpl-1") == 1


def test_a_collector_that_is_gone_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(traces, "CLOSE_SECONDS", 0.2)
    stuck = threading.Event()
    provider = TracerProvider()
    monkeypatch.setattr(provider, "shutdown", lambda: stuck.wait(30))
    opened = Traces(tracer_provider=provider, meter_provider=None)
    started = time.monotonic()
    opened.close()
    stuck.set()
    assert time.monotonic() - started < 5
    assert "did not reach their collector" in caplog.text


def test_opentelemetry_is_imported_in_one_module_only() -> None:
    service = Path(traces.__file__).parent
    guilty = {
        path.name
        for path in service.rglob("*.py")
        if re.search(r"^\s*(import|from) opentelemetry", path.read_text(), re.MULTILINE)
    }
    assert guilty == {"traces.py"}


def test_spans_and_metrics_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        opened = open_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address})
        assert opened is not None
        TracedMetrics(opened).on_finished(REQUEST)
        opened.close()
    assert set(collector.bodies) == {"/v1/traces", "/v1/metrics"}
    (resource,) = collector.resources()
    assert resource["service.name"] == "trimkv-serve"
    assert resource["service.instance.id"], "the metrics of two replicas would be one series"
    assert {span.name for span in collector.spans()} == {"chat tiny/model", "queue", "prefill", "decode"}
    assert collector.metrics() >= {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }

"""An OTLP endpoint over HTTP that remembers what it is told."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Collector:
    """What was sent, by path."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.bodies: dict[str, list[bytes]] = {}

    def resources(self) -> list[dict[str, str]]:
        """The attributes of those who sent spans."""
        return [
            {attribute.key: attribute.value.string_value for attribute in sent.resource.attributes}
            for sent in self._spans_sent()
        ]

    def spans(self) -> list[Any]:
        """All spans, as messages of OTLP."""
        return [span for sent in self._spans_sent() for scope in sent.scope_spans for span in scope.spans]

    def metrics(self) -> set[str]:
        """Names of all metrics."""
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

        return {
            metric.name
            for body in self.bodies.get("/v1/metrics", [])
            for sent in ExportMetricsServiceRequest.FromString(body).resource_metrics
            for scope in sent.scope_metrics
            for metric in scope.metrics
        }

    def _spans_sent(self) -> list[Any]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        return [
            sent
            for body in self.bodies.get("/v1/traces", [])
            for sent in ExportTraceServiceRequest.FromString(body).resource_spans
        ]


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.bodies.setdefault(self.path, []).append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()

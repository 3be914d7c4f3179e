"""A real Prometheus on the metrics of a fleet: one target, whose engines the rules and the dashboards tell apart."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.engine.interface import RejectionReason
from service.fleet.engine import FleetEngine
from service.fleet.metrics import FleetMetrics
from service.metrics import Metrics
from tests.deploy.dashboards import Query, queries
from tests.deploy.prometheus import Prometheus, has_values, scraping
from tests.deploy.proxy import free_port
from tests.fleet.pretend import PretendFleet, ToldEngine
from tests.service import scripted
from tests.service.live import wait_for

LOAD_SECONDS = 10
RATE_INTERVAL = "12s"

RUNNING = replace(
    scripted.RUNNING, entries_logical=600, entries_physical=390, layer_entries=(300, 90), evicted_entries=210
)


def work(metrics: Metrics) -> None:
    """One of each thing that an engine reports."""
    metrics.on_prompt(tokens=80)
    metrics.on_first_token(seconds_since_arrival=0.2)
    metrics.on_tokens(inter_token_seconds=[0.05] * 20)
    for phase in ((1, 0), (1, 3), (0, 3)):
        metrics.on_step(duration_seconds=0.1, prefill_tokens=80, prefill_sequences=phase[0], decode_sequences=phase[1])
    metrics.on_eviction(strategy="fixed_budget", sequences=1, entries=70, duration_seconds=0.01)
    metrics.on_finished(scripted.ENDED)


class Door:
    """A fleet of two engines that do as they are told, and the address of its metrics."""

    def __init__(self) -> None:
        self.fleet = PretendFleet([ToldEngine(), ToldEngine()])
        self.metrics = FleetMetrics("door")
        self._engine = FleetEngine(
            self.fleet, self.metrics, max_queue_requests=1, max_queue_tokens=100, prefill_chunk=512
        )
        self._port = free_port()
        app = Starlette(routes=[Route("/metrics", self._show)], lifespan=self._start)
        self._server = uvicorn.Server(uvicorn.Config(app, port=self._port, log_level="error", access_log=False))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.run, daemon=True)
        thread.start()
        try:
            wait_for(lambda: self._server.started, "the door", 20)
            yield
        finally:
            self._server.should_exit = True
            thread.join(timeout=20)

    @contextlib.asynccontextmanager
    async def _start(self, app: Starlette) -> AsyncIterator[None]:
        await self.fleet.start()
        yield

    async def _show(self, request: Request) -> Response:
        body, content_type = await self.metrics.render(self._engine, accept=request.headers["accept"])
        return Response(body, headers={"Content-Type": content_type})


@dataclass(frozen=True, slots=True)
class Watched:
    prometheus: Prometheus
    start: float
    end: float

    def ask(self, query: Query) -> list[dict[str, str]]:
        """The labels of a query's series, after looking that they have values."""
        found = self.prometheus.answer(query, start=self.start, end=self.end)
        assert has_values(found), str(query)
        return [each["metric"] for each in found]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The first engine works, the second idles."""
    door = Door()
    door.fleet.engines[0].running = (RUNNING,)
    with door.open(), scraping([door.url], tmp_path_factory.mktemp("prometheus")) as prometheus:
        start = time.time()
        while time.time() < start + LOAD_SECONDS:
            work(door.fleet.replicas[0]._metrics)
            door.metrics.on_rejected(RejectionReason.QUEUE_REQUESTS)
            time.sleep(0.2)
        prometheus.catch_up()
        yield Watched(prometheus, start, time.time())


def test_every_rule_evaluates(watched: Watched) -> None:
    for rule in watched.prometheus.rules():
        assert rule["health"] == "ok", rule
        assert not rule.get("lastError"), rule


def test_every_panels_query_has_an_answer(watched: Watched) -> None:
    for query in queries(rate_interval=RATE_INTERVAL):
        watched.ask(query)


def test_engines_of_one_target_are_told_apart(watched: Watched) -> None:
    def values(expression: str) -> dict[str, float]:
        found = watched.prometheus.now(expression)
        assert len({each["metric"]["instance"] for each in found}) == 1
        return {each["metric"]["replica"]: float(each["value"][1]) for each in found}

    assert values("instance:trimkv_kv_pages_reserved:ratio") == {"e0": 0.5, "e1": 0.5}
    assert values("instance:trimkv_kv_budget:utilisation") == {"e0": 390 / (64 * 6)}
    tokens = values("instance:trimkv_generation_tokens:rate5m")
    assert tokens["e0"] > 0
    assert tokens["e1"] == 0


def test_the_table_has_a_line_for_each_engine(watched: Watched) -> None:
    table = [query for query in queries(rate_interval=RATE_INTERVAL) if query.panel == "Engines"]
    assert len(table) > 5
    for query in table:
        engines = [labels["engine"].split()[1] for labels in watched.ask(query)]
        assert sorted(engines) == ["e0", "e1"], str(query)


def test_what_the_door_turns_away_is_counted_once(watched: Watched) -> None:
    away = 'trimkv_admission_rejections_total{reason="queue_requests"}'
    found = {each["metric"]["replica"]: float(each["value"][1]) for each in watched.prometheus.now(away)}
    assert found["door"] > 0
    assert found["e0"] == found["e1"] == 0

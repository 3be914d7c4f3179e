"""A fleet on Ray Serve: the service's API as the ingress, engines as a deployment that follows demand.

    serve run deploy.ray.app:app model=embedded max_replicas=2

The only module that imports `ray`: it carries the calls of `service.fleet.calls.Fleet`, and says how many of what there
are. What is called, and what happens when an engine is lost, is `service.fleet`'s business.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.edge import REQUEST_ID_HEADER
from service.engine.interface import Event, GenerationRequest, KvDetail, ModelInfo, StreamChoice, TooManyPositions
from service.environment import prepare_environment
from service.fleet.calls import EventBatches, ReplicaReport
from service.fleet.options import DRAIN_MARGIN_SECONDS, FleetOptions, read_arguments
from service.settings import Settings

# While a step takes long, an engine repeats its last figures after a second.
REPORT_SECONDS = 3.0
DETAIL_SECONDS = 10.0
# Each engine keeps to these limits itself, so that one that is late does not cost the answers of the others. What is
# over them by this much hangs altogether.
HANGING_SECONDS = 2.0
HEALTH_CHECK_PERIOD_SECONDS = 5.0
HEALTH_CHECK_TIMEOUT_SECONDS = 30.0
# Beside the requests that it computes, an engine is given some that wait: it never idles until the next is sent.
WAITING_SHARE = 0.25
TARGET_SHARE = 0.75
# The door counts its own queue; Serve must not cut it short, and health checks and metrics come on top.
DOOR_ONGOING_REQUESTS = 100_000
EXIT_FAILURE = 1


class RayFleet:
    """A `Fleet` whose calls go through a Serve handle: to the less busy of two engines drawn at random."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    def generate(self, request: GenerationRequest, arrived: float) -> EventBatches:
        """Have one engine make an answer."""
        handle = self._handle.options(method_name="generate", stream=True)
        return cast(EventBatches, handle.remote(request, arrived))

    async def info(self) -> ModelInfo:
        """What an engine has loaded."""
        return cast(ModelInfo, await self._handle.options(method_name="info").remote())

    async def reports(self) -> Sequence[ReplicaReport]:
        """Of the engines that answer."""
        found = await self._ask_all("report", seconds=REPORT_SECONDS)
        return [report for report in found if isinstance(report, ReplicaReport)]

    async def kv_details(self, request_id: str, positions: StreamChoice | None) -> Sequence[KvDetail]:
        """Of the engine that knows this request."""
        found = await self._ask_all("kv_detail", request_id, positions, seconds=DETAIL_SECONDS)
        details = [detail for detail in found if isinstance(detail, KvDetail)]
        failures = [_cause(failure) for failure in found]
        known = [failure for failure in failures if isinstance(failure, TooManyPositions | TimeoutError)]
        if not details and known:
            raise known[0]
        return details

    async def _ask_all(self, method: str, *arguments: object, seconds: float) -> Sequence[object]:
        """What every engine answers, or raises.

        Raises:
            TimeoutError: one of them hangs.
        """
        try:
            answers = self._handle.broadcast(method, *arguments, seconds)
            found = await answers.results_async(timeout_s=seconds + HANGING_SECONDS, return_exceptions=True)
        except DeploymentUnavailableError:  # there are no engines
            return ()
        return cast("Sequence[object]", found)


class EngineDeployment:
    """One engine in a process of its own."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        prepare_environment(settings.log_format)
        from service.engine.worker import EngineWorker
        from service.fleet.replica import EngineReplica
        from service.logs import LoggedMetrics, setup_logging
        from service.traces import TracedMetrics, open_traces

        setup_logging(settings.log_level, log_format=settings.log_format)
        self._traces = open_traces(os.environ)
        metrics = TracedMetrics(self._traces) if self._traces else LoggedMetrics()
        # The door has counted them already, for the whole fleet.
        config = replace(settings.engine_config(), max_queue_requests=1_000_000, max_queue_tokens=2**40)
        self._replica = EngineReplica(
            serve.get_replica_context().replica_tag,
            EngineWorker(config, metrics),
            metrics,
            watchdog_seconds=settings.watchdog_seconds,
            end_process=_end_process,
        )
        await self._replica.start()

    async def generate(self, request: GenerationRequest, arrived: float) -> AsyncIterator[tuple[Event, ...]]:
        async for events in self._replica.generate(request, arrived):
            yield events

    async def info(self) -> ModelInfo:
        return self._replica.info()

    async def report(self, seconds: float) -> ReplicaReport:
        async with asyncio.timeout(seconds):
            return await self._replica.report()

    async def kv_detail(self, request_id: str, positions: StreamChoice | None, seconds: float) -> KvDetail | None:
        async with asyncio.timeout(seconds):
            return await self._replica.kv_detail(request_id, positions)

    async def check_health(self) -> None:
        """Asked by Serve, which replaces an engine that raises three times in a row."""
        self._replica.check_health()

    async def __del__(self) -> None:
        """Called by Serve once the last answer has ended, or has had its time."""
        replica = getattr(self, "_replica", None)
        if replica is not None:
            await replica.drain(0.0)
            if self._traces:
                await asyncio.to_thread(self._traces.close)


class Door:
    """The service's own app, with a fleet where one process has its engine."""

    def __init__(self, engines: DeploymentHandle[Any], settings: Settings) -> None:
        self._engines = engines
        self._settings = settings

    def __serve_build_asgi_app__(self) -> Any:
        """The app, built in the process that runs it; Serve's name for it."""
        from service.app import create_app
        from service.fleet.engine import FleetEngine
        from service.fleet.metrics import FleetMetrics
        from service.logs import setup_logging

        settings = self._settings
        setup_logging(settings.log_level, log_format=settings.log_format)
        metrics = FleetMetrics(f"door-{serve.get_replica_context().replica_tag}")
        engine = FleetEngine(
            RayFleet(self._engines),
            metrics,
            max_queue_requests=settings.max_queue_requests,
            max_queue_tokens=settings.max_queue_tokens,
            prefill_chunk=settings.prefill_chunk,
        )
        api = create_app(settings=settings, engine=engine, metrics=metrics)
        api.add_middleware(OneRequestId)
        return api


class OneRequestId:
    """Leaves the answer's `X-Request-Id` to Serve's proxy, which handed it in, and would add it a second time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID_HEADER]
            await send(message)

        await self._app(scope, receive, send_without_id)


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """The application out of `name=value` arguments: see `FleetOptions`, and `trimkv-serve --help` for the settings.

    Raises:
        SettingsError: an argument that is not possible; one line.
    """
    options, settings = read_arguments(arguments)
    return fleet(options, settings)


def fleet(options: FleetOptions, settings: Settings) -> serve.Application:
    """The application of a fleet of this size."""
    waiting = max(1, round(WAITING_SHARE * settings.max_num_seqs))
    grace = settings.drain_timeout + DRAIN_MARGIN_SECONDS
    # Every request has a line of the service's own at its end. Serve's would add one for each probe and each scrape.
    logging_config = LoggingConfig(enable_access_log=False, encoding=settings.log_format.upper())
    engines = serve.deployment(
        EngineDeployment,
        name="engine",
        max_ongoing_requests=settings.max_num_seqs + waiting,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas or options.min_replicas,
            target_ongoing_requests=options.target_ongoing_requests or TARGET_SHARE * settings.max_num_seqs,
            upscale_delay_s=options.upscale_delay_s,
            downscale_delay_s=options.downscale_delay_s,
        ),
        graceful_shutdown_timeout_s=grace,
        health_check_period_s=HEALTH_CHECK_PERIOD_SECONDS,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_SECONDS,
        logging_config=logging_config,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
    ).bind(settings)
    return serve.deployment(
        serve.ingress()(Door),
        name="door",
        num_replicas=1,
        max_ongoing_requests=DOOR_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=grace,
        logging_config=logging_config,
        ray_actor_options={"num_cpus": 1},
    ).bind(engines, settings)


def _cause(failure: object) -> object:
    """What an engine raised, without the traceback that Ray makes part of its text."""
    return failure.cause if isinstance(failure, RayTaskError) else failure


def _end_process() -> None:
    os._exit(EXIT_FAILURE)

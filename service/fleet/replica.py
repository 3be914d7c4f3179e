"""One engine of a fleet: what its process answers to the door.

Owns the change from one machine's clock to another's, the bundling of events into messages, and the end of a process
whose engine has failed. Knows no HTTP, and nothing of what carries its answers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from service.engine.interface import (
    EngineState,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    KvDetail,
    ModelInfo,
    StreamChoice,
    SubmitError,
)
from service.fleet.calls import ReplicaReport
from service.metrics import Metrics

if TYPE_CHECKING:
    from service.app import StartableEngine

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
# What the last events of a failed engine get to leave the process.
LAST_WORDS_SECONDS = 2.0
# A message costs what carries it more than its tokens do: a stream sends no more than these many seconds apart allow.
BUNDLE_SECONDS = 0.03


class ReplicaUnhealthyError(RuntimeError):
    """This engine must be replaced; the message says why."""


class EngineReplica:
    """An engine, and the calls that a `Fleet` carries to it.

    Args:
        end_process: called when the engine has failed: an engine that takes no requests would otherwise look idle,
            and be sent all of them.
    """

    def __init__(
        self,
        name: str,
        engine: StartableEngine,
        metrics: Metrics,
        *,
        watchdog_seconds: float,
        end_process: Callable[[], None],
    ) -> None:
        self._name = name
        self._engine = engine
        self._metrics = metrics
        self._watchdog_seconds = watchdog_seconds
        self._end_process = end_process
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model, and return once it can be asked.

        Raises:
            ReplicaUnhealthyError: it cannot be loaded.
        """
        self._engine.start()
        while self._engine.state is EngineState.LOADING:  # noqa: ASYNC110 -- the engine's thread tells nobody
            await asyncio.sleep(POLL_SECONDS)
        if self._engine.state is EngineState.FAILED:
            raise ReplicaUnhealthyError(f"the engine could not be started: {self._failure()}")
        self._watching = asyncio.create_task(self._watch())

    async def generate(self, request: GenerationRequest, arrived: float) -> AsyncIterator[tuple[Event, ...]]:
        """The events of one answer, all that have come at a time; see `Fleet.generate`."""
        engine = self._engine
        local = replace(request, arrival=time.monotonic() - max(0.0, time.time() - arrived))
        try:
            with engine.reserve() as slot:
                events = engine.submit(local, slot)
        except SubmitError as error:
            # The door has accepted it, so this is the last that is said of it.
            logger.warning("refused id=%s: %s", request.request_id, error)
            yield (Failed(message=str(error)),)
            return
        try:
            async for batch in in_batches(events):
                yield batch
        finally:  # the door left, or ended this call: an ended answer is not harmed
            engine.abort(request.request_id)

    def info(self) -> ModelInfo:
        """What is loaded."""
        return self._engine.info

    async def report(self) -> ReplicaReport:
        """This engine's figures and metrics."""
        stats = await self._engine.stats()
        exposition, _ = await self._metrics.render(self._engine, accept="", stats=stats)
        return ReplicaReport(
            name=self._name,
            host=socket.gethostname(),
            pid=os.getpid(),
            stats=stats,
            exposition=exposition.decode(),
        )

    async def kv_detail(self, request_id: str, positions: StreamChoice | None) -> KvDetail | None:
        """One request's cache; None where it is not this engine's."""
        return await self._engine.kv_detail(request_id, positions=positions)

    def check_health(self) -> None:
        """Look whether the engine steps.

        Raises:
            ReplicaUnhealthyError: it has failed, or its running step is older than the watchdog allows.
        """
        if self._engine.state is EngineState.FAILED:
            raise ReplicaUnhealthyError(f"the engine failed: {self._failure()}")
        age = self._engine.last_step_age_seconds
        if age > self._watchdog_seconds:
            raise ReplicaUnhealthyError(
                f"the running step is {age:.1f} s old; the watchdog allows {self._watchdog_seconds:g} s"
            )

    async def drain(self, timeout_seconds: float) -> None:
        """Let running answers end, and stop the engine."""
        if self._watching is not None:
            self._watching.cancel()
        await self._engine.drain(timeout_seconds)

    async def _watch(self) -> None:
        while self._engine.state is not EngineState.FAILED:  # noqa: ASYNC110 -- as above
            await asyncio.sleep(POLL_SECONDS)
        logger.critical("the engine failed, this process ends: %s", self._failure())
        await asyncio.sleep(LAST_WORDS_SECONDS)
        self._end_process()

    def _failure(self) -> str:
        failure = getattr(self._engine, "failure", None)
        return f"{type(failure).__name__}: {failure}"


async def in_batches(
    events: AsyncIterator[Event], *, pause_seconds: float = BUNDLE_SECONDS
) -> AsyncIterator[tuple[Event, ...]]:
    """`events`, bundled: the first at once, then all that came within `pause_seconds` of the last bundle."""
    arrived: asyncio.Queue[Event | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async for event in events:
                arrived.put_nowait(event)
        finally:
            arrived.put_nowait(None)

    pumping = asyncio.create_task(pump())
    try:
        while True:
            batch = [await arrived.get()]
            while not arrived.empty():
                batch.append(arrived.get_nowait())
            said = tuple(event for event in batch if event is not None)
            if said:
                yield said
            if None in batch or isinstance(said[-1], Finished | Failed):
                break
            await asyncio.sleep(pause_seconds)
        if pumping.done():
            pumping.result()  # what the source raised is the reader's business
    finally:
        pumping.cancel()

"""The process around the app: its signals and its exit status.

Owns the graceful end (SIGTERM: no new requests, running ones end, then the port closes) and the hard one (an engine
that failed ends the process with a non-zero status, so that an orchestrator starts another). Knows no endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api.context import ApiContext
from service.engine.interface import EngineState
from service.port import LISTEN_BACKLOG
from service.settings import Settings

logger = logging.getLogger(__name__)

# Seconds that answers already made get to reach their clients after the drain.
FLUSH_SECONDS = 5
KEEP_ALIVE_SECONDS = 75


class Server(uvicorn.Server):
    """A uvicorn server that drains the engine before it closes the port.

    A second signal cuts the drain short.

    Attributes:
        exit_status: 0 after an ordered end, 1 when the service failed.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            server_header=False,
            backlog=LISTEN_BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(config)
        self.exit_status = 0
        self._context: ApiContext = app.state.context
        self._drain_timeout = settings.drain_timeout
        self._signals = 0
        self._drain: asyncio.Task[None] | None = None
        self._flush_until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Only remember it: the event loop acts on it in `on_tick`."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if await super().on_tick(counter):
            return True
        if self._has_failed():
            self.exit_status = 1
            return True
        if self._signals == 0:
            return False
        if self._drain is None:
            logger.info("draining: running requests get %g s to end", self._drain_timeout)
            self._drain = asyncio.create_task(self._context.engine.drain(self._drain_timeout))
        if self._signals > 1:
            logger.warning("second signal: ending now")
            self.force_exit = True
            return True
        return self._drain.done() and self._is_flushed()

    def _is_flushed(self) -> bool:
        """Whether the answers made before the end of the drain have gone out, or had their time."""
        if not self._flush_until:
            self._flush_until = time.monotonic() + FLUSH_SECONDS
        return not self.server_state.tasks or time.monotonic() > self._flush_until

    def _has_failed(self) -> bool:
        context = self._context
        if context.engine.state is EngineState.FAILED:
            failure = getattr(context.engine, "failure", None)
            logger.critical("the engine failed: %s: %s", type(failure).__name__, failure)
            return True
        return context.failure is not None

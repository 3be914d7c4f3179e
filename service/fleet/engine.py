"""A fleet as one `Engine`: what the API of the door talks to.

Owns the queue before the fleet and the relay of each answer's events. An answer whose engine is lost ends in an error
event; nobody else's does, and nothing is computed twice unless its client asks again: a request that has taken one
engine down must not be handed to the next. Knows nothing of what carries its calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

from service.engine.admission import AdmissionLedger, QueueGate
from service.engine.interface import (
    AbortReason,
    EngineObserver,
    EngineState,
    EngineStats,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    KvDetail,
    ModelInfo,
    QueueSlot,
    RejectionReason,
    StreamChoice,
    SubmitError,
)
from service.engine.mailbox import Mailbox
from service.fleet.calls import Fleet
from service.fleet.figures import FleetFigures

logger = logging.getLogger(__name__)

CONNECT_AGAIN_SECONDS = 1.0
# What relays that were cut off get to put their last event.
LAST_WORDS_SECONDS = 5.0
LOST = "The engine that made this answer was lost. Ask again: another one will answer."
SHUT_DOWN = "The server shut down before this answer ended. Ask again."


class FleetEngine:
    """An `Engine` whose requests are computed by the engines of `fleet`. `start()` it on the event loop.

    Args:
        max_queue_requests, max_queue_tokens: bounds of the requests without a first token, wherever they wait.
        prefill_chunk: the engines' own, for the check whether a request can ever fit.

    Attributes:
        figures: of all engines.
    """

    def __init__(
        self,
        fleet: Fleet,
        observer: EngineObserver,
        *,
        max_queue_requests: int,
        max_queue_tokens: int,
        prefill_chunk: int,
    ) -> None:
        self.figures = FleetFigures(fleet)
        self._fleet = fleet
        self._observer = observer
        self._gate = QueueGate(max_requests=max_queue_requests, max_tokens=max_queue_tokens)
        self._prefill_chunk = prefill_chunk
        self._state = EngineState.LOADING
        self._info: ModelInfo | None = None
        self._ledger: AdmissionLedger | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._relays: dict[str, asyncio.Task[None]] = {}
        self._unanswered = 0

    @property
    def state(self) -> EngineState:
        """LOADING until an engine of the fleet is ready."""
        return self._state

    @property
    def info(self) -> ModelInfo:
        """What the first engine that answered has loaded; all of a fleet load the same."""
        if self._info is None:
            raise RuntimeError("no engine of the fleet has answered yet")
        return self._info

    @property
    def last_step_age_seconds(self) -> float:
        """0: the door computes no steps. An engine whose step hangs is replaced, its door need not be."""
        return 0.0

    @property
    def unanswered(self) -> int:
        """Requests without a first token, wherever they wait."""
        return self._unanswered

    def start(self) -> None:
        """Look for an engine that is ready."""
        self._connecting = asyncio.create_task(self._connect())

    def reserve(self) -> QueueSlot:
        """Take a place in the queue before tokenising."""
        try:
            self._check_open()
            return self._gate.reserve()
        except SubmitError as error:
            self._observer.on_rejected(error.reason)
            raise

    def submit(self, request: GenerationRequest, slot: QueueSlot) -> AsyncIterator[Event]:
        """Hand a request to the fleet and return its events."""
        try:
            self._check_open()
            if self._ledger is None:
                raise RuntimeError("no engine of the fleet has answered yet")
            self._ledger.check_fits(request)
            self._gate.occupy(slot, len(request.prompt_ids))
        except SubmitError as error:
            self._observer.on_rejected(error.reason)
            raise
        mailbox = Mailbox()
        self._unanswered += 1
        relay = _Relay(self._fleet, request, mailbox, on_first=self._on_first)
        task = asyncio.create_task(relay.run())
        self._relays[request.request_id] = task
        # A task that is cancelled before its first step runs no `finally`: the end is the task's, not the relay's.
        task.add_done_callback(lambda _: self._end(relay))
        return mailbox.events()

    def abort(self, request_id: str, reason: AbortReason = AbortReason.CLIENT) -> None:
        """Take a request out; unknown or ended ids are ignored."""
        relay = self._relays.get(request_id)
        if relay is not None:
            relay.cancel()

    async def stats(self) -> EngineStats:
        """The fleet's figures, added up."""
        return await self.figures.stats()

    async def kv_detail(self, request_id: str, *, positions: StreamChoice | None = None) -> KvDetail | None:
        """One request's cache, from the engine that has it."""
        return next(iter(await self._fleet.kv_details(request_id, positions)), None)

    async def drain(self, timeout_seconds: float) -> None:
        """Take no more requests and let the running ones end; the engines go on, for other doors."""
        if self._connecting is not None:
            self._connecting.cancel()
        self._state = EngineState.DRAINING
        running = list(self._relays.values())
        if not running:
            return
        _, left = await asyncio.wait(running, timeout=timeout_seconds)
        for relay in left:
            relay.cancel()
        if left:
            await asyncio.wait(left, timeout=LAST_WORDS_SECONDS)

    def _check_open(self) -> None:
        if self._state is EngineState.DRAINING:
            raise SubmitError(RejectionReason.DRAINING, "the server is shutting down")
        if self._state is not EngineState.READY:
            raise SubmitError(RejectionReason.NOT_READY, "no engine of the fleet is ready yet")

    async def _connect(self) -> None:
        while self._info is None:
            try:
                self._info = await self._fleet.info()
            except Exception as error:  # whatever carries the call may raise anything until an engine is up
                logger.warning("no engine of the fleet is ready: %s", error)
                await asyncio.sleep(CONNECT_AGAIN_SECONDS)
        info = self._info
        self._ledger = AdmissionLedger(info.geometry, info.pool_pages, prefill_chunk=self._prefill_chunk)
        self._state = EngineState.READY
        logger.info("the fleet serves %s with gates %s on %s", info.model, info.gates or "none", info.device)

    def _on_first(self, request: GenerationRequest) -> None:
        self._gate.leave(len(request.prompt_ids))
        self._unanswered -= 1

    def _end(self, relay: _Relay) -> None:
        self._relays.pop(relay.request.request_id, None)
        relay.close()


class _Relay:
    """One answer's events on their way from an engine elsewhere to the API.

    Args:
        on_first: called once, when the first events come or the relay ends without any.
    """

    def __init__(
        self,
        fleet: Fleet,
        request: GenerationRequest,
        mailbox: Mailbox,
        *,
        on_first: Callable[[GenerationRequest], None],
    ) -> None:
        self.request = request
        self._fleet = fleet
        self._mailbox = mailbox
        self._on_first = on_first
        self._is_answered = False
        self._has_ended = False

    async def run(self) -> None:
        """Hand over all events up to the last; a lost engine's last is `Failed`."""
        request = self.request
        arrived = time.time() - (time.monotonic() - request.arrival)
        batches = self._fleet.generate(request, arrived)
        try:
            async for events in batches:
                self._hand_over(events)
                if self._has_ended:
                    return
            logger.error("lost id=%s: its engine stopped without a last event", request.request_id)
        except asyncio.CancelledError:
            batches.cancel()
            raise
        except Exception as error:  # a dead process, machine or network, in the words of whatever carries the call
            logger.error("lost id=%s: %s: %s", request.request_id, type(error).__name__, _first_line(error))
        self._hand_over((Failed(message=LOST),))

    def close(self) -> None:
        """The relay is over, however it ended: whoever still reads is told."""
        if not self._has_ended:
            self._hand_over((Failed(message=SHUT_DOWN),))

    def _hand_over(self, events: tuple[Event, ...]) -> None:
        if not self._is_answered:
            self._is_answered = True
            self._on_first(self.request)
        for event in events:
            self._has_ended = self._has_ended or isinstance(event, Finished | Failed)
            self._mailbox.put(event)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]

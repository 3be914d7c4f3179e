"""The worker: one thread that owns the engine core, and the bridge between it and the event loop.

Everything that touches the pool runs on the worker's thread, between steps: the API's calls become commands in a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TypeVar

from service.engine.admission import QueueGate
from service.engine.config import EngineConfig
from service.engine.core import EngineCore
from service.engine.interface import (
    AbortReason,
    EngineObserver,
    EngineState,
    EngineStats,
    Event,
    GenerationRequest,
    KvDetail,
    ModelInfo,
    QueueSlot,
    RejectionReason,
    StreamChoice,
    SubmitError,
)
from service.engine.loader import LoadedEngine, load_engine
from service.engine.mailbox import Dispatcher, Mailbox
from service.engine.pictures import CachePicture
from service.engine.request import RequestState
from service.generation.sampler import SamplingState
from service.generation.stopping import AnswerStream

logger = logging.getLogger(__name__)

_STATS_TIMEOUT_SECONDS = 1.0
_DETAIL_TIMEOUT_SECONDS = 10.0

Command = Callable[[EngineCore], None]
Result = TypeVar("Result")


class EngineWorker:
    """An `Engine` in this process. `start()` on the event loop, then use it as the protocol says.

    Attributes:
        failure: why the engine is FAILED.
    """

    def __init__(self, config: EngineConfig, observer: EngineObserver) -> None:
        self.failure: BaseException | None = None
        self._config = config
        self._observer = observer
        self._state = EngineState.LOADING
        self._loaded: LoadedEngine | None = None
        self._core: EngineCore | None = None
        self._gate = QueueGate(max_requests=config.max_queue_requests, max_tokens=config.max_queue_tokens)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._last_stats: EngineStats | None = None
        self._step_started: float | None = None
        self._is_stopping = False
        self._idle_waiters: list[Future[None]] = []
        self._thread: threading.Thread | None = None

    # ---- the Engine protocol, on the event loop ------------------------------------------------------------------

    def start(self) -> None:
        """Start the worker's thread, which loads the model first."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._main, args=(loop,), name="trimkv-engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return self._state

    @property
    def info(self) -> ModelInfo:
        """What was loaded."""
        if self._loaded is None:
            raise RuntimeError("the model is not loaded")
        return self._loaded.info

    @property
    def last_step_age_seconds(self) -> float:
        """How long the running step has been running; 0 while idle."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    def reserve(self) -> QueueSlot:
        """Take a place in the queue before tokenising."""
        try:
            self._check_open()
            return self._gate.reserve()
        except SubmitError as error:
            self._observer.on_rejected(error.reason)
            raise

    def submit(self, request: GenerationRequest, slot: QueueSlot) -> AsyncIterator[Event]:
        """Queue a request and return its events."""
        try:
            self._check_open()
            if self._loaded is None:
                raise RuntimeError("the model is not loaded")
            pages = self._loaded.ledger.check_fits(request)
            self._gate.occupy(slot, len(request.prompt_ids))
        except SubmitError as error:
            self._observer.on_rejected(error.reason)
            raise
        eos = self._loaded.info.eos_token_ids
        state = RequestState(
            request=request,
            mailbox=Mailbox(),
            sampling=SamplingState(request.sampling, prompt_ids=request.prompt_ids, eos_token_ids=eos),
            answer=AnswerStream(
                self._loaded.tokenizer, request.sampling, eos_token_ids=eos, prompt_ids=request.prompt_ids
            ),
            pages=pages,
        )
        self._commands.put(lambda core: core.add(state))
        return state.mailbox.events()

    def abort(self, request_id: str, reason: AbortReason = AbortReason.CLIENT) -> None:
        """Take a request out before the next step ends."""
        self._commands.put(lambda core: core.abort(request_id, reason))

    async def stats(self) -> EngineStats:
        """Figures taken between two steps; the last ones known while a step takes long."""
        if self._state is not EngineState.FAILED and self._core is not None:
            answer: Future[EngineStats] = Future()
            self._commands.put(lambda core: _settle(answer, core.stats))
            try:
                async with asyncio.timeout(_STATS_TIMEOUT_SECONDS):
                    self._last_stats = await asyncio.wrap_future(answer)
            except TimeoutError:
                logger.warning("the running step is %.1f s old; figures are older", self.last_step_age_seconds)
        if self._last_stats is None:
            raise RuntimeError("the engine has no figures yet")
        return self._last_stats

    async def kv_detail(self, request_id: str, *, positions: StreamChoice | None = None) -> KvDetail | None:
        """One request's cache, stream by stream, taken between two steps; None if nothing is known of it."""
        if self._state is EngineState.FAILED or self._core is None:
            return None
        answer: Future[CachePicture | None] = Future()
        self._commands.put(lambda core: _settle(answer, lambda: core.picture(request_id)))
        async with asyncio.timeout(_DETAIL_TIMEOUT_SECONDS):
            picture = await asyncio.wrap_future(answer)
        return None if picture is None else await asyncio.to_thread(picture.develop, positions)

    async def drain(self, timeout_seconds: float) -> None:
        """Take no more requests, let the running ones end, abort the rest, stop the worker."""
        if self._state is EngineState.READY:
            self._state = EngineState.DRAINING
            idle: Future[None] = Future()
            self._commands.put(lambda core: self._idle_waiters.append(idle))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await asyncio.wrap_future(idle)
        # What still runs is aborted by the worker on its way out.
        self._is_stopping = True
        self._commands.put(lambda core: None)
        # While loading, the thread only looks up once the weights are in; the process need not wait for that.
        if self._thread is not None and self._core is not None:
            await asyncio.to_thread(self._thread.join)

    def _check_open(self) -> None:
        if self._state is EngineState.DRAINING:
            raise SubmitError(RejectionReason.DRAINING, "the server is shutting down")
        if self._state is not EngineState.READY:
            raise SubmitError(RejectionReason.NOT_READY, f"the model is not ready: {self._state.value}")

    # ---- the worker's thread -------------------------------------------------------------------------------------

    def _main(self, loop: asyncio.AbstractEventLoop) -> None:
        dispatcher = Dispatcher(loop)
        try:
            self._loaded = load_engine(self._config)
            core = self._loaded.build_core(dispatcher, self._observer, self._left_queue)
            core.runner.warm_up()
            self._last_stats = core.stats()
            self._core = core
            self._state = EngineState.READY
            self._serve(core)
        except BaseException as error:
            self.failure = error
            self._state = EngineState.FAILED
            logger.critical("the engine stopped: %s", error, exc_info=self._core is not None)
            if self._core is not None:
                self._run_commands(self._core, wait=False)
                self._core.fail_all("the engine stopped")
        finally:
            self._step_started = None

    def _serve(self, core: EngineCore) -> None:
        while not self._is_stopping:
            self._run_commands(core, wait=not core.scheduler.has_work)
            if not core.scheduler.has_work:
                self._report_idle()
                continue
            self._step_started = time.monotonic()
            core.step()
            self._step_started = None
        self._run_commands(core, wait=False)
        core.abort_all(AbortReason.SHUTDOWN)
        core.flush()

    def _run_commands(self, core: EngineCore, *, wait: bool) -> None:
        """Run what the API asked for; block for it while there is nothing else to do."""
        is_blocking = wait
        while True:
            try:
                command = self._commands.get(block=is_blocking)
            except queue.Empty:
                break
            command(core)
            is_blocking = False
        core.flush()

    def _report_idle(self) -> None:
        for waiter in self._idle_waiters:
            _settle(waiter, lambda: None)
        self._idle_waiters.clear()

    def _left_queue(self, state: RequestState) -> None:
        self._gate.leave(state.prompt_tokens)


def _settle(answer: Future[Result], compute: Callable[[], Result]) -> None:
    """Answer a caller on the event loop, unless it has given up waiting."""
    if not answer.set_running_or_notify_cancel():
        return
    try:
        answer.set_result(compute())
    except Exception as error:
        answer.set_exception(error)

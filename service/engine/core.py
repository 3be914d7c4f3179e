"""The engine without threads: admit, step, evict, sample, end. Everything here happens on one thread, in order.

Owns the running requests' lives. Knows no event loop: events go to a `Dispatcher`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.admission import AdmissionLedger
from service.engine.figures import engine_stats, row_of, usage_of
from service.engine.interface import (
    AbortReason,
    EngineObserver,
    EngineStats,
    Failed,
    Finished,
    FinishReason,
    KVUsage,
    TextDelta,
)
from service.engine.mailbox import Dispatcher
from service.engine.pictures import CachePicture, CachePictures
from service.engine.request import RequestState
from service.engine.runner import Feed, ModelRunner, TokensInFlight
from service.engine.scheduler import Scheduler, StepPlan
from service.generation.sampler import Sampler
from trimkv_core.budget import Budget
from trimkv_core.pages import InvariantError

logger = logging.getLogger(__name__)

_RESTART_WINDOW_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A decode step whose tokens the host has not read yet.

    Attributes:
        states: its requests.
        tokens: theirs, in order; below 0 for one whose numbers overflowed.
        usage: by request id, what the caches held right after it.
    """

    states: tuple[RequestState, ...]
    tokens: TokensInFlight
    usage: Mapping[str, KVUsage]


class EngineBroken(RuntimeError):
    """The engine cannot go on; the process should end and be started again."""


class EngineCore:
    """One model, one pool, many requests.

    Attributes:
        scheduler: the queues.
        ledger: the promises.
        runner: model and memory.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Sampler,
        ledger: AdmissionLedger,
        scheduler: Scheduler,
        *,
        dispatcher: Dispatcher,
        observer: EngineObserver,
        left_queue: Callable[[RequestState], None],
    ) -> None:
        self.runner = runner
        self.ledger = ledger
        self.scheduler = scheduler
        self._sampler = sampler
        self._dispatcher = dispatcher
        self._observer = observer
        self._left_queue = left_queue
        self._requests: dict[str, RequestState] = {}
        self._in_flight: StepInFlight | None = None
        self._pictures = CachePictures()
        self._restarts = 0
        self._restarted_at = float("-inf")

    # ---- between steps -------------------------------------------------------------------------------------------

    def add(self, state: RequestState) -> None:
        """Queue a request."""
        self._requests[state.request.request_id] = state
        self.scheduler.add(state)

    def abort(self, request_id: str, reason: AbortReason) -> None:
        """Take a request out and free what it holds; unknown and ended ones are ignored."""
        state = self._requests.get(request_id)
        if state is not None:
            self._end(state, FinishReason.ABORT, text="", token_ids=(), abort_reason=reason)

    def abort_all(self, reason: AbortReason) -> None:
        """Take every request out."""
        for request_id in list(self._requests):
            self.abort(request_id, reason)

    def step(self) -> None:
        """Admit who fits, run one forward, evict, sample, and hand the tokens out.

        A failing step fails its own requests and no others.

        Raises:
            EngineBroken: the device is lost, or the pool had to be rebuilt twice within a minute.
        """
        self._admit()
        plan = self.scheduler.plan()
        try:
            runs_ahead = self._can_run_ahead(plan)
            if self._in_flight is not None and not runs_ahead:
                self._settle()
                plan = self.scheduler.plan()
                runs_ahead = self._can_run_ahead(plan)
            if runs_ahead:
                self._run_ahead(plan)
            elif plan.work:
                self._run(plan)
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(plan.work))
            self._recover(plan, error)
        finally:
            self._dispatcher.flush()

    def flush(self) -> None:
        """Hand out what aborts have left."""
        self._dispatcher.flush()

    def _admit(self) -> None:
        while (state := self.scheduler.pop_admissible()) is not None:
            self._left_queue(state)
            try:
                state.row = self.runner.open(state.pages)
            except Exception:
                logger.exception("request %s cannot be started", state.request.request_id)
                self._fail(state, "the engine could not start this request; it may be sent again")
                continue
            state.admitted_at = time.monotonic()

    # ---- one step ------------------------------------------------------------------------------------------------

    def _run(self, plan: StepPlan) -> None:
        started = time.monotonic()
        was_prefilling = [item.state.is_prefilling for item in plan.work]
        logits = self.runner.forward([_feed_of(item.state, item.tokens) for item in plan.work])
        for item in plan.work:
            item.state.fed += item.tokens
        self._evict([item.state for item in plan.work])
        self._emit([item.state for item in plan.work if not item.state.is_prefilling], logits)
        prefill = [item for item, is_prefill in zip(plan.work, was_prefilling, strict=True) if is_prefill]
        self._observer.on_step(
            duration_seconds=time.monotonic() - started,
            prefill_tokens=sum(item.tokens for item in prefill),
            prefill_sequences=len(prefill),
            decode_sequences=len(plan.work) - len(prefill),
        )

    def _can_run_ahead(self, plan: StepPlan) -> bool:
        """Whether a step can be launched before the tokens of the one before are known to the host."""
        ahead = self.runner.ahead
        return (
            ahead is not None
            and bool(plan.work)
            and all(not state.is_prefilling and ahead.can_choose(state.sampling) for state in plan.states)
        )

    def _run_ahead(self, plan: StepPlan) -> None:
        """Launch a step, then hand out the tokens of the one before while the device computes.

        A sequence whose answer ends with a token still unread is fed once more: its promise covers that entry, and what
        it gives is dropped. One that has all the tokens it may have is not.
        """
        ahead = self.runner.ahead
        if ahead is None:
            raise RuntimeError("this runner has no steps that run ahead")
        started = time.monotonic()
        waiting = {} if self._in_flight is None else self._in_flight.usage
        states = [
            state
            for state in plan.states
            if state.generated + (state.request.request_id in waiting) < state.request.sampling.max_tokens
        ]
        launched = None
        if states:
            fresh = [state for state in states if state.request.request_id not in waiting]
            ahead.set_last_tokens([row_of(state) for state in fresh], [state.last_token for state in fresh])
            tokens = ahead.launch([row_of(state) for state in states], [state.sampling for state in states])
            for state in states:
                state.fed += 1
            self._evict(states)
            usage = {state.request.request_id: self._usage(state) for state in states}
            launched = StepInFlight(tuple(states), tokens, usage)
        self._settle()
        self._in_flight = launched
        if not states:
            return
        self._observer.on_step(
            duration_seconds=time.monotonic() - started,
            prefill_tokens=0,
            prefill_sequences=0,
            decode_sequences=len(states),
        )

    def _settle(self) -> None:
        """Hand out the tokens of the step in flight."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return
        pairs = [
            (state, None if token < 0 else token)
            for state, token in zip(step.states, step.tokens.wait(), strict=True)
            # Others have ended since: by a token before, or aborted.
            if state.request.request_id in self._requests
        ]
        for state, token in pairs:
            if token is not None:
                state.sampling.advance(token)
        self._hand_out(pairs, step.usage)

    def _evict(self, states: Sequence[RequestState]) -> None:
        due: list[RequestState] = []
        for state in states:
            budget, row = state.request.budget, row_of(state)
            if not budget.is_eviction_point(state.fed, state.prompt_tokens):
                continue
            if self.runner.table.is_due(row, budget, before=state.looked_at):
                due.append(state)
            state.looked_at = state.fed
        if not due:
            return
        started = time.monotonic()
        work: list[tuple[int, Budget]] = [(row_of(state), state.request.budget) for state in due]
        evictions = self.runner.evict(work)
        seconds = time.monotonic() - started
        for state, eviction in zip(due, evictions, strict=True):
            state.evictions += eviction.evicted > 0
            state.evicted_entries += eviction.evicted
        for strategy in {state.request.budget.strategy for state in due}:
            mine = [
                eviction.evicted
                for state, eviction in zip(due, evictions, strict=True)
                if state.request.budget.strategy is strategy and eviction.evicted
            ]
            self._observer.on_eviction(
                strategy=strategy.value,
                sequences=len(mine),
                entries=sum(mine),
                duration_seconds=seconds * len(mine) / len(due),
            )

    def _emit(self, states: Sequence[RequestState], logits: Tensor) -> None:
        """Sample one token for each of `states` and hand it out."""
        if not states:
            return
        tokens = self._sampler.sample(logits, [state.sampling for state in states])
        self._hand_out(list(zip(states, tokens, strict=True)), {})

    def _hand_out(self, pairs: Sequence[tuple[RequestState, int | None]], usage: Mapping[str, KVUsage]) -> None:
        """Give each request its token, None for one that could not be chosen.

        `usage`: what caches held after their own step, where another has been launched since.
        """
        now = time.monotonic()
        gaps: list[float] = []
        for state, token in pairs:
            if token is None:
                self._fail(state, "the model's numbers overflowed for this request")
                continue
            state.last_token = token
            state.generated += 1
            if state.last_token_at is None:
                state.prefilled_at = now
                self._observer.on_prompt(tokens=state.prompt_tokens)
                self._observer.on_first_token(seconds_since_arrival=now - state.request.arrival)
            else:
                gaps.append(now - state.last_token_at)
            state.last_token_at = now
            progress = state.answer.push(token)
            if progress.finish_reason is not None:
                kv = usage.get(state.request.request_id)
                self._end(state, progress.finish_reason, text=progress.text, token_ids=(token,), kv=kv)
            else:
                delta = TextDelta(
                    text=progress.text,
                    token_ids=(token,),
                    prompt_tokens=state.prompt_tokens,
                    completion_tokens=state.generated,
                )
                self._dispatcher.add(state.mailbox, delta)
        self._observer.on_tokens(inter_token_seconds=gaps)

    # ---- endings -------------------------------------------------------------------------------------------------

    def _end(
        self,
        state: RequestState,
        reason: FinishReason,
        *,
        text: str,
        token_ids: tuple[int, ...],
        abort_reason: AbortReason | None = None,
        kv: KVUsage | None = None,
    ) -> None:
        kv = kv or self._usage(state)
        if state.row is not None:
            self._pictures.keep_last(state, self.runner.table)
        self._free(state)
        finished = Finished(
            text=text,
            token_ids=token_ids,
            finish_reason=reason,
            prompt_tokens=state.prompt_tokens,
            completion_tokens=state.generated,
            kv=kv,
        )
        self._dispatcher.add(state.mailbox, finished)
        self._observer.on_finished(state.summary(reason, now=time.monotonic(), kv=kv, abort_reason=abort_reason))

    def _fail(self, state: RequestState, message: str) -> None:
        self._dispatcher.add(state.mailbox, Failed(message=message))
        self._observer.on_finished(state.summary(FinishReason.ERROR, now=time.monotonic(), kv=None))
        # What a failed computation wrote may be NaN, and masking does not silence a NaN for the pages' next owner.
        self._free(state, scrub=True)

    def _free(self, state: RequestState, *, scrub: bool = False) -> None:
        del self._requests[state.request.request_id]
        self._pictures.forget(state.request.request_id)
        if not self.scheduler.remove(state):
            self._left_queue(state)
            return
        self.ledger.release(state.pages)
        row, state.row = state.row, None
        if row is not None and row in self.runner.table.open_rows:
            self.runner.close(row, scrub=scrub)

    def _recover(self, plan: StepPlan, error: Exception) -> None:
        """Fail a broken step's requests; if its traces in memory do not add up, start over with an empty pool."""
        if _is_device_error(error):
            self.fail_all(f"the device failed: {error}")
            raise EngineBroken(f"the device failed: {error}") from error
        in_flight, self._in_flight = self._in_flight, None
        try:
            for state in (*plan.states, *(in_flight.states if in_flight else ())):
                if state.row is not None:  # in both, or ended: failed once
                    self._fail(state, "the engine failed while computing this answer; it may be sent again")
            self.runner.table.check_invariants()
        except (InvariantError, RuntimeError, LookupError) as broken:
            self._restart(broken)

    def _restart(self, broken: Exception) -> None:
        logger.error("the pool's invariants do not hold, it is rebuilt empty: %s", broken)
        self.runner.rebuild()
        for state in list(self.scheduler.running):
            self._fail(state, "the engine had to restart; the request may be sent again")
        self._restarts += 1
        self._observer.on_restart()
        now = time.monotonic()
        if now - self._restarted_at < _RESTART_WINDOW_SECONDS:
            self.fail_all("the engine stopped")
            raise EngineBroken(f"the pool broke twice within {_RESTART_WINDOW_SECONDS:.0f} s: {broken}") from broken
        self._restarted_at = now

    def fail_all(self, message: str) -> None:
        """End everything, waiting or running, with an error; memory is not touched any more."""
        for state in self._requests.values():
            self._dispatcher.add(state.mailbox, Failed(message=message))
            self._observer.on_finished(state.summary(FinishReason.ERROR, now=time.monotonic(), kv=None))
        self._requests.clear()
        self._in_flight = None
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()
        self._dispatcher.flush()

    # ---- figures -------------------------------------------------------------------------------------------------

    def _usage(self, state: RequestState) -> KVUsage:
        return usage_of(state, self.runner.table)

    def stats(self) -> EngineStats:
        """The pool, the queue and every running request."""
        return engine_stats(self.runner.table, self.ledger, self.scheduler, restarts=self._restarts)

    def picture(self, request_id: str) -> CachePicture | None:
        """One request's cache, as it is or was at its end; None if nothing is known of it."""
        state = self._requests.get(request_id)
        if state is None:
            return self._pictures.of_ended(request_id)
        return self._pictures.of_running(state, self.runner.table)


def _feed_of(state: RequestState, tokens: int) -> Feed:
    end = state.fed + tokens
    if not state.is_prefilling:
        return Feed(row_of(state), (state.last_token,), wants_logits=True)
    return Feed(row_of(state), state.request.prompt_ids[state.fed : end], wants_logits=end == state.prompt_tokens)


def _is_device_error(error: BaseException) -> bool:
    """A lost accelerator: nothing on it can be used again in this process."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    # Triton has no exception of its own for a launch that fails.
    return isinstance(error, torch.AcceleratorError) or "Triton Error [CUDA]" in str(error)

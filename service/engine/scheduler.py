"""What runs next: the waiting queue, the running requests, and the plan of a step.

Owns the queues. `pop_admissible()` moves the head of the queue to the running if its pages can be promised; `plan()`
decides and changes nothing. First come, first served within a priority, and nobody overtakes the head.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

from service.engine.admission import AdmissionLedger
from service.engine.request import RequestState


@dataclass(frozen=True, slots=True)
class Work:
    """A request's share of a step: its next `tokens` tokens."""

    state: RequestState
    tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: decodes and prefill chunks, those of a single token first."""

    work: tuple[Work, ...]

    @property
    def states(self) -> list[RequestState]:
        """The requests in it."""
        return [item.state for item in self.work]


class Scheduler:
    """Queues and the choice of a step's work.

    Attributes:
        running: admitted requests in the order of their admission.
    """

    def __init__(self, ledger: AdmissionLedger, *, max_num_seqs: int, prefill_chunk: int) -> None:
        self.running: list[RequestState] = []
        self._waiting: list[RequestState] = []
        self._ledger = ledger
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk = prefill_chunk
        self._arrivals = itertools.count()

    @property
    def waiting(self) -> list[RequestState]:
        """Requests in the order in which they will be admitted."""
        return self._waiting

    @property
    def has_work(self) -> bool:
        """Whether a step would have anything to do."""
        return bool(self.running or self._waiting)

    def add(self, state: RequestState) -> None:
        """Queue a request behind those of its priority."""
        state.order = (state.request.priority, next(self._arrivals))
        bisect.insort(self._waiting, state, key=lambda waiting: waiting.order)

    def remove(self, state: RequestState) -> bool:
        """Take a request out; whether it was running."""
        is_running = state in self.running
        (self.running if is_running else self._waiting).remove(state)
        return is_running

    def pop_admissible(self) -> RequestState | None:
        """The head of the queue if it may start now, moved to the running and its pages promised."""
        if self._blocked_by() is not None or not self._waiting:
            return None
        state = self._waiting.pop(0)
        self._ledger.admit(state.pages)
        self.running.append(state)
        return state

    def _blocked_by(self) -> str | None:
        if not self._waiting:
            return None
        if len(self.running) >= self._max_num_seqs:
            return "slots"
        return None if self._ledger.fits(self._waiting[0].pages) else "capacity"

    def waiting_by_reason(self) -> dict[str, int]:
        """Why the waiting wait: the head for `slots` or `capacity`, the others for their `order`."""
        reasons = {"slots": 0, "capacity": 0, "order": max(len(self._waiting) - 1, 0)}
        blocked_by = self._blocked_by()
        if blocked_by is not None:
            reasons[blocked_by] = 1
        elif self._waiting:
            reasons["order"] += 1
        return reasons

    def plan(self) -> StepPlan:
        """All decodes, and prompt tokens up to the lane's limit.

        A request's chunks are cut where its own eviction points and the lane's size say, counted from the prompt's
        start, never where the lane happens to be full: so its numbers are the same alone and in company.
        """
        work = [Work(state, 1) for state in self.running if not state.is_prefilling]
        room = self._prefill_chunk
        for state in self.running:
            if not state.is_prefilling:
                continue
            tokens = self._next_chunk(state)
            if tokens > room:
                break
            room -= tokens
            work.append(Work(state, tokens))
        work.sort(key=lambda item: item.tokens != 1)
        return StepPlan(tuple(work))

    def _next_chunk(self, state: RequestState) -> int:
        """Tokens up to the next eviction point or the prompt's end, in pieces the lane can take.

        A chunk that the lane can take is never cut: tokens of an unfinished chunk would stay in the lane's pages. Who
        wants larger chunks has reserved them, and is cut at multiples of the lane's size.
        """
        chunk = state.request.budget.prefill_chunk
        ends = [state.prompt_tokens]
        if chunk:
            ends.append(_next_multiple(state.fed, chunk))
        if not 0 < chunk <= self._prefill_chunk:
            ends.append(_next_multiple(state.fed, self._prefill_chunk))
        return min(ends) - state.fed


def _next_multiple(value: int, step: int) -> int:
    return (value // step + 1) * step

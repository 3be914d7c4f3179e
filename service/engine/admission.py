"""Who may start: worst-case reservations against one pool, and a bounded queue before it.

If the sum of all reservations and of the prefill lane fits the pool, no step can ever find it empty: that is the
promise that an admitted request is never preempted. Knows no pages' numbers and no model.
"""

from __future__ import annotations

import threading

from service.engine.interface import GenerationRequest, QueueSlot, RejectionReason, SubmitError
from trimkv_core.budget import Budget, Geometry, lane_pages


class AdmissionLedger:
    """Promises against the pool; used by the worker thread, except for `reservation` and `check_fits`, which only read.

    Attributes:
        capacity: pages of the pool.
        reserved: pages promised to admitted requests.
    """

    def __init__(self, geometry: Geometry, capacity: int, *, prefill_chunk: int) -> None:
        self.geometry = geometry
        self.capacity = capacity
        self.reserved = 0
        self.prefill_chunk = prefill_chunk
        self.lane = lane_pages(geometry, prefill_chunk)

    def reservation(self, prompt_tokens: int, max_tokens: int, budget: Budget) -> int:
        """Pages a request is promised.

        What one forward adds is the lane's, unless the request wants no eviction point before more tokens are in than
        the lane computes at once: then it brings the room for them itself.
        """
        chunk = budget.prefill_chunk or prompt_tokens
        own = min(prompt_tokens, chunk) if chunk > self.prefill_chunk else 0
        return budget.ceiling_pages(self.geometry, total_tokens=prompt_tokens + max_tokens, forward_tokens=1 + own)

    def check_fits(self, request: GenerationRequest) -> int:
        """The request's reservation in pages.

        Raises:
            SubmitError: it exceeds the whole pool, so it could never start.
        """
        prompt, new = len(request.prompt_ids), request.sampling.max_tokens
        pages = self.reservation(prompt, new, request.budget)
        if pages > self.capacity - self.lane:
            budget = request.budget
            kept = "everything (dense)" if budget.memory_size is None else f"kv_budget={budget.memory_size}"
            raise SubmitError(
                RejectionReason.NEVER_FITS,
                f"{prompt} prompt tokens and up to {new} new ones with {kept}, kv_buffer={budget.buffer_size}, "
                f"kv_prefill_chunk={budget.prefill_chunk} need {pages} pages; the pool has {self.capacity}, of which "
                f"{self.lane} serve prefill: ask for a smaller budget, chunk or max_tokens",
            )
        return pages

    def fits(self, pages: int) -> bool:
        """Whether `pages` more can be promised now."""
        return self.reserved + pages <= self.capacity - self.lane

    def admit(self, pages: int) -> None:
        """Promise `pages`."""
        self.reserved += pages

    def release(self, pages: int) -> None:
        """Take a promise back at the end of its request."""
        self.reserved -= pages


class QueueGate:
    """The bounds of the waiting queue, counted where requests come in (event loop) and go on (worker)."""

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._requests = 0
        self._tokens = 0
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Prompt tokens of the waiting."""
        return self._tokens

    def reserve(self) -> GateSlot:
        """Take a place.

        Raises:
            SubmitError: all places are taken.
        """
        with self._lock:
            if self._requests >= self._max_requests:
                raise SubmitError(
                    RejectionReason.QUEUE_REQUESTS, f"the queue is full: {self._max_requests} requests wait already"
                )
            self._requests += 1
        return GateSlot(self)

    def occupy(self, slot: QueueSlot, tokens: int) -> None:
        """Make a reserved place a waiting request's, with its prompt tokens.

        Raises:
            SubmitError: its tokens do not fit; the slot stays its holder's.
        """
        if not isinstance(slot, GateSlot):
            raise TypeError("a queue slot comes from this engine's reserve()")
        with self._lock:
            if self._tokens + tokens > self._max_tokens:
                raise SubmitError(
                    RejectionReason.QUEUE_TOKENS,
                    f"the queue is full: {self._tokens} prompt tokens wait, {tokens} more exceed {self._max_tokens}",
                )
            self._tokens += tokens
            slot.is_held = False

    def leave(self, tokens: int) -> None:
        """A waiting request went on, or out."""
        with self._lock:
            self._requests -= 1
            self._tokens -= tokens

    def _give_back(self) -> None:
        with self._lock:
            self._requests -= 1


class GateSlot:
    """A place in the queue; see `QueueSlot`."""

    def __init__(self, gate: QueueGate) -> None:
        self._gate = gate
        self.is_held = True

    def __enter__(self) -> GateSlot:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.is_held:
            self.is_held = False
            self._gate._give_back()

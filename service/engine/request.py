"""One request inside the engine: how far it is, and what it must still be told.

Plain mutable state, touched by the worker thread only. Decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.interface import AbortReason, FinishedRequest, FinishReason, GenerationRequest, KVUsage
from service.engine.mailbox import Mailbox
from service.generation.sampler import SamplingState
from service.generation.stopping import AnswerStream


@dataclass(slots=True, eq=False)
class RequestState:
    """A request from its submission to its end.

    Attributes:
        request: what was asked.
        mailbox: where its events go.
        sampling, answer: what choosing and ending its tokens need.
        pages: reserved for it.
        row: in the sequence table; None until it is admitted.
        fed: tokens in the cache, prompt and generated.
        looked_at: tokens in the cache at its last eviction point.
        last_token: generated last, to be fed next.
        generated: tokens generated so far.
        evictions, evicted_entries: what its cache lost.
        admitted_at, prefilled_at, last_token_at: monotonic seconds, None before they happened.
    """

    request: GenerationRequest
    mailbox: Mailbox
    sampling: SamplingState
    answer: AnswerStream
    pages: int
    row: int | None = None
    fed: int = 0
    looked_at: int = 0
    last_token: int = -1
    generated: int = 0
    evictions: int = 0
    evicted_entries: int = 0
    admitted_at: float | None = None
    prefilled_at: float | None = None
    last_token_at: float | None = None
    order: tuple[int, int] = field(default=(0, 0))

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def is_prefilling(self) -> bool:
        """Whether some of the prompt is not in the cache yet."""
        return self.fed < self.prompt_tokens

    def summary(
        self, reason: FinishReason, *, now: float, kv: KVUsage | None, abort_reason: AbortReason | None = None
    ) -> FinishedRequest:
        """What metrics and the log line want to know at the end."""
        arrival = self.request.arrival
        return FinishedRequest(
            request_id=self.request.request_id,
            finish_reason=reason,
            abort_reason=abort_reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.generated,
            budget_entries_per_stream=self.request.budget.memory_size,
            kv=kv,
            time_to_first_token=_between(arrival, self.prefilled_at),
            e2e_latency=now - arrival,
            queue_time=_between(arrival, self.admitted_at),
            prefill_time=_between(self.admitted_at, self.prefilled_at),
            decode_time=_between(self.prefilled_at, self.last_token_at),
            sampling=self.request.sampling,
            origin=self.request.origin,
        )


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start

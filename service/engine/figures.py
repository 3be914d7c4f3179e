"""What the engine says of itself: a request's use of its cache, and the state of pool and queues. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from service.engine.admission import AdmissionLedger
from service.engine.interface import EngineStats, KVUsage, RequestStats
from service.engine.request import RequestState
from service.engine.scheduler import Scheduler
from trimkv_core.sequences import SequenceTable


def row_of(state: RequestState) -> int:
    """The row of an admitted request.

    Raises:
        RuntimeError: it is not admitted.
    """
    if state.row is None:
        raise RuntimeError(f"request {state.request.request_id} is not admitted")
    return state.row


def usage_of(state: RequestState, table: SequenceTable) -> KVUsage:
    """What a request's cache holds and has held."""
    geometry = table.geometry
    held = 0 if state.row is None else table.held(state.row)
    peak = 0 if state.row is None else table.peak(state.row)
    budget = state.request.budget
    return KVUsage(
        budget_entries=None if budget.memory_size is None else budget.memory_size * geometry.streams,
        retained_entries=held,
        evicted_entries=state.evicted_entries,
        peak_entries=peak,
        evictions=state.evictions,
        bytes=held * geometry.entry_bytes,
        peak_bytes=peak * geometry.entry_bytes,
        dense_bytes=state.fed * geometry.streams * geometry.kv_bytes,
    )


def engine_stats(table: SequenceTable, ledger: AdmissionLedger, scheduler: Scheduler, *, restarts: int) -> EngineStats:
    """The pool, the queue and every running request."""
    pool = table.pool
    running = [state for state in scheduler.running if state.row is not None]
    layers = table.layer_entries([row_of(state) for state in running]) if running else []
    return EngineStats(
        geometry=table.geometry,
        pages_total=pool.num_pages,
        pages_free=pool.num_free,
        pages_used=pool.num_used,
        pages_reserved=ledger.reserved + (ledger.lane if running else 0),
        pool_bytes=pool.num_bytes,
        running=tuple(
            request_stats(state, table, layer_entries=per, pages=table.pages(row_of(state)))
            for state, per in zip(running, layers, strict=True)
        ),
        waiting=len(scheduler.waiting),
        waiting_by_reason=scheduler.waiting_by_reason(),
        queued_prompt_tokens=sum(state.prompt_tokens for state in scheduler.waiting),
        restarts=restarts,
    )


def waiting_stats(state: RequestState, table: SequenceTable) -> RequestStats:
    """A request that has no row yet: all figures of its cache are 0."""
    return RequestStats(
        request_id=state.request.request_id,
        phase="waiting",
        prompt_tokens=state.prompt_tokens,
        completion_tokens=0,
        seen_tokens=0,
        budget=state.request.budget,
        entries_logical=0,
        entries_physical=0,
        layer_entries=(0,) * table.geometry.num_layers,
        pages_used=0,
        pages_reserved=0,
        evictions=0,
        evicted_entries=0,
        peak_entries=0,
    )


def request_stats(
    state: RequestState, table: SequenceTable, *, layer_entries: Sequence[int], pages: int
) -> RequestStats:
    """A running request, whose layers hold `layer_entries`, [L], in `pages` pages."""
    row = row_of(state)
    return RequestStats(
        request_id=state.request.request_id,
        phase="prefill" if state.is_prefilling else "decode",
        prompt_tokens=state.prompt_tokens,
        completion_tokens=state.generated,
        seen_tokens=table.seen(row),
        budget=state.request.budget,
        entries_logical=table.seen(row) * table.geometry.streams,
        entries_physical=table.held(row),
        layer_entries=tuple(layer_entries),
        pages_used=pages,
        pages_reserved=state.pages,
        evictions=state.evictions,
        evicted_entries=state.evicted_entries,
        peak_entries=table.peak(row),
    )

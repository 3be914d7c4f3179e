"""`GET /v1/kv`: the page pool and every running request, as they were between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from service.api.context import ApiContext
from service.api.knobs import FIELD_NAMES
from service.engine.interface import EngineState, EngineStats, RejectionReason, RequestStats, SubmitError
from trimkv_core.budget import Budget


class PoolBody(BaseModel):
    """The page pool: used + free = total; reserved = all promises, their used part included."""

    pages_total: int
    pages_free: int
    pages_used: int
    pages_reserved: int
    usage: float
    block_size: int
    bytes: int
    entry_bytes: int
    num_layers: int
    num_heads: int


class QueueBody(BaseModel):
    """Who waits, and why."""

    requests: int
    prompt_tokens: int
    by_reason: Mapping[str, int]


class RequestBody(BaseModel):
    """One running request.

    Attributes:
        budget: its knobs, in the names of the request fields.
        entries_logical: entries a dense cache would hold now.
        entries_physical: entries held now.
        layer_entries: the same by layer, over all its heads.
    """

    id: str
    phase: str
    prompt_tokens: int
    completion_tokens: int
    seen_tokens: int
    budget: Mapping[str, int | float | str | None]
    entries_logical: int
    entries_physical: int
    entries_peak: int
    layer_entries: tuple[int, ...]
    pages_used: int
    pages_reserved: int
    evictions: int
    evicted_entries: int


class KvBody(BaseModel):
    """The whole picture."""

    object: Literal["kv"] = "kv"
    pool: PoolBody
    queue: QueueBody
    requests: tuple[RequestBody, ...]
    restarts: int


def kv_router(context: ApiContext) -> APIRouter:
    """The route of the cache's figures."""
    router = APIRouter(tags=["TrimKV"])

    @router.get("/v1/kv")
    async def get_kv() -> KvBody:
        if context.engine.state in (EngineState.LOADING, EngineState.FAILED):
            raise SubmitError(RejectionReason.NOT_READY, "The model is still loading; try again in a moment.")
        return _body(await context.engine.stats())

    return router


def _body(stats: EngineStats) -> KvBody:
    geometry = stats.geometry
    return KvBody(
        pool=PoolBody(
            pages_total=stats.pages_total,
            pages_free=stats.pages_free,
            pages_used=stats.pages_used,
            pages_reserved=stats.pages_reserved,
            usage=stats.pages_used / stats.pages_total if stats.pages_total else 0.0,
            block_size=geometry.block_size,
            bytes=stats.pool_bytes,
            entry_bytes=geometry.entry_bytes,
            num_layers=geometry.num_layers,
            num_heads=geometry.num_heads,
        ),
        queue=QueueBody(
            requests=stats.waiting, prompt_tokens=stats.queued_prompt_tokens, by_reason=dict(stats.waiting_by_reason)
        ),
        requests=tuple(_request(request) for request in stats.running),
        restarts=stats.restarts,
    )


def _request(request: RequestStats) -> RequestBody:
    return RequestBody(
        id=request.request_id,
        phase=request.phase,
        prompt_tokens=request.prompt_tokens,
        completion_tokens=request.completion_tokens,
        seen_tokens=request.seen_tokens,
        budget=_budget(request.budget),
        entries_logical=request.entries_logical,
        entries_physical=request.entries_physical,
        entries_peak=request.peak_entries,
        layer_entries=request.layer_entries,
        pages_used=request.pages_used,
        pages_reserved=request.pages_reserved,
        evictions=request.evictions,
        evicted_entries=request.evicted_entries,
    )


def _budget(budget: Budget) -> dict[str, int | float | str | None]:
    """The knobs by the names a client knows; no ceiling is `kv_budget` 0, as in a request."""
    knobs: dict[str, int | float | str | None] = {
        outside: getattr(budget, inside) for inside, outside in FIELD_NAMES.items()
    }
    return knobs | {"kv_budget": budget.memory_size or 0, "kv_strategy": budget.strategy.value}

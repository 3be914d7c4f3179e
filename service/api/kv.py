"""`GET /v1/kv`: the page pool and every running request; `GET /v1/kv/{request_id}`: one request, stream by stream.

Both as they were between two steps. Knows no text: neither says what a prompt is. But whoever may ask learns of every
request, whoever sent it, how long it is and what its cache does.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from service.api.context import ApiContext
from service.api.errors import ApiError, invalid_value, show
from service.api.knobs import FIELD_NAMES
from service.engine.interface import (
    EngineState,
    EngineStats,
    KvDetail,
    RejectionReason,
    RequestStats,
    StreamChoice,
    SubmitError,
    TooManyPositions,
)
from trimkv_core.budget import Budget

# Figures of a moment; a cache on the way would show an old one.
_FRESH = {"Cache-Control": "no-store"}


class PoolBody(BaseModel):
    """The page pool: used + free = total; reserved = all promises, their used part included.

    Attributes:
        entry_bytes: of one entry.
        dense_entry_bytes: of the same entry in a cache that keeps all, which needs its key and value only.
    """

    pages_total: int
    pages_free: int
    pages_used: int
    pages_reserved: int
    usage: float
    block_size: int
    bytes: int
    entry_bytes: int
    dense_entry_bytes: int
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


class StreamBody(BaseModel):
    """Logical positions that one stream holds, sorted."""

    layer: int
    head: int
    positions: tuple[int, ...]


class DetailBody(RequestBody):
    """One request: running, waiting, or ended a minute ago at most.

    Attributes:
        phase: `waiting`, `prefill`, `decode` or `ended`.
        age_seconds: how old these figures are.
        num_layers, num_heads: L and H.
        head_entries: entries held, by layer and head.
        token_streams: for every token of the prompt, then of the answer, as far as the cache has seen them: how many of
            the L·H streams hold it. Null for a cache so large that this is not looked up.
        positions: positions held, of the streams asked for.
    """

    object: Literal["kv.request"] = "kv.request"
    age_seconds: float
    num_layers: int
    num_heads: int
    head_entries: tuple[tuple[int, ...], ...]
    token_streams: tuple[int, ...] | None
    positions: tuple[StreamBody, ...] | None


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
        _check_loaded(context)
        return _body(await context.engine.stats())

    @router.get("/v1/kv/{request_id}", response_model=DetailBody)
    async def get_kv_of_request(
        request_id: str,
        positions: bool = False,
        layer: Annotated[int | None, Query(ge=0)] = None,
        head: Annotated[int | None, Query(ge=0)] = None,
    ) -> Response:
        """`positions=true` adds the positions held: of all streams, or of one `layer`, one `head`, or both."""
        _check_loaded(context)
        geometry = context.engine.info.geometry
        for name, value, count in (("layer", layer, geometry.num_layers), ("head", head, geometry.num_heads)):
            if value is not None and value >= count:
                raise invalid_value(name, value, f"an integer from 0 to {count - 1}")
        is_choosing = positions or layer is not None or head is not None
        choice = StreamChoice(layer=layer, head=head) if is_choosing else None
        detail = await _look(context, request_id, choice)
        # Written here: FastAPI would check thousands of numbers once more.
        return Response(_detail(detail).model_dump_json(), media_type="application/json", headers=_FRESH)

    return router


def _check_loaded(context: ApiContext) -> None:
    if context.engine.state in (EngineState.LOADING, EngineState.FAILED):
        raise SubmitError(RejectionReason.NOT_READY, "The model is still loading; try again in a moment.")


async def _look(context: ApiContext, request_id: str, choice: StreamChoice | None) -> KvDetail:
    try:
        detail = await context.engine.kv_detail(request_id, positions=choice)
    except TooManyPositions as error:
        raise ApiError(
            HTTPStatus.BAD_REQUEST, f"{error}; choose a layer and a head.", param="positions", code="too_many_positions"
        ) from error
    except TimeoutError as error:
        raise ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "The running step takes long, and a cache is looked at between two; try again in a moment.",
            code="engine_busy",
            retry_after=1,
        ) from error
    if detail is None:
        raise ApiError(
            HTTPStatus.NOT_FOUND,
            f"The request {show(request_id)} is not known: none with this id runs, or ended within the last minute.",
            param="request_id",
            code="request_not_found",
        )
    return detail


def _detail(detail: KvDetail) -> DetailBody:
    return DetailBody(
        **_request(detail.request).model_dump(),
        age_seconds=round(detail.age_seconds, 3),
        num_layers=len(detail.head_entries),
        num_heads=len(detail.head_entries[0]),
        head_entries=detail.head_entries,
        token_streams=detail.token_streams,
        positions=None
        if detail.positions is None
        else tuple(
            StreamBody(layer=stream.layer, head=stream.head, positions=stream.positions) for stream in detail.positions
        ),
    )


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
            dense_entry_bytes=geometry.kv_bytes,
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

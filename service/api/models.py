"""`GET /v1/models` and `/v1/models/{id}`: what can be asked for, under which names, within which limits."""

from __future__ import annotations

from http import HTTPStatus
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from service.api.context import ApiContext
from service.api.errors import ApiError, show
from service.engine.interface import EngineState, RejectionReason, SubmitError


class ModelCard(BaseModel):
    """One served name.

    Attributes:
        root: the model behind the name, as it was loaded.
        max_model_len: tokens of prompt and answer together.
        has_gates: whether requests may have a budget at all.
        kv_budget: M of a request that names none; 0: dense.
        kv_buffer, kv_sink_tokens, kv_prefill_chunk: the other defaults of such a request.
        kv_trained_budget: the checkpoint's own M, None without gates.
        max_kv_budget, allow_dense: the operator's caps.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "trimkv-serve"
    root: str
    max_model_len: int
    has_gates: bool
    gates: str | None
    kv_budget: int
    kv_strategy: str
    kv_buffer: int
    kv_sink_tokens: int
    kv_prefill_chunk: int
    kv_trained_budget: int | None
    max_kv_budget: int | None
    allow_dense: bool


class ModelList(BaseModel):
    """All served names."""

    object: Literal["list"] = "list"
    data: tuple[ModelCard, ...]


def models_router(context: ApiContext) -> APIRouter:
    """The routes of the model list."""
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=_cards(context))

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> ModelCard:
        for card in _cards(context):
            if card.id == model_id:
                return card
        raise ApiError(
            HTTPStatus.NOT_FOUND,
            f"The model {show(model_id)} does not exist; this server has {', '.join(context.served_names)}.",
            param="model",
            code="model_not_found",
        )

    return router


def _cards(context: ApiContext) -> tuple[ModelCard, ...]:
    if context.engine.state in (EngineState.LOADING, EngineState.FAILED):
        raise SubmitError(RejectionReason.NOT_READY, "The model is still loading; try again in a moment.")
    info, settings = context.engine.info, context.settings
    return tuple(
        ModelCard(
            id=name,
            created=context.created,
            root=info.model,
            max_model_len=info.max_model_len,
            has_gates=info.has_gates,
            gates=info.gates,
            kv_budget=info.budget.memory_size or 0,
            kv_strategy=info.budget.strategy,
            kv_buffer=info.budget.buffer_size,
            kv_sink_tokens=info.budget.num_sink_tokens,
            kv_prefill_chunk=info.budget.prefill_chunk,
            kv_trained_budget=info.trained_memory_size,
            max_kv_budget=settings.max_kv_budget,
            allow_dense=settings.allow_dense or not info.has_gates,
        )
        for name in context.served_names
    )

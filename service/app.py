"""Wiring: one FastAPI app out of settings, an engine and its metrics.

Owns the order of start and stop: the port opens first, the engine loads on its own thread, then the tokenizer; at the
end the engine drains. Knows no endpoint's inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.api.chat import chat_router
from service.api.context import ApiContext
from service.api.edge import ReadyMiddleware, RequestIdMiddleware
from service.api.errors import install_error_handlers
from service.api.health import health_router
from service.api.kv import kv_router
from service.api.models import models_router
from service.api.page import page_router
from service.api.schemas import ChatCompletionRequest
from service.api.tokenize import tokenize_router
from service.engine.interface import Engine, EngineState
from service.generation.chat_format import ChatFormat
from service.metrics import Metrics
from service.settings import Settings

logger = logging.getLogger(__name__)

LOADING_POLL_SECONDS = 0.05


class StartableEngine(Engine, Protocol):
    """An engine that the app starts and stops."""

    def start(self) -> None:
        """Begin to load on a thread of its own; `state` tells how it goes."""
        ...


def create_app(*, settings: Settings, engine: StartableEngine, metrics: Metrics) -> FastAPI:
    """The service as an ASGI app.

    Its lifespan starts `engine` without waiting for it and drains it at the end. `app.state.context` holds the
    `ApiContext`, whose `failure` says why the service can never become ready.
    """
    context = ApiContext(settings=settings, engine=engine, metrics=metrics)
    if settings.log_content:
        logger.warning("prompts and answers are logged (--log-content)")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        becoming_ready = asyncio.create_task(_become_ready(context))
        try:
            yield
        finally:
            becoming_ready.cancel()
            await engine.drain(settings.drain_timeout)

    app = FastAPI(
        title="TrimKV serve",
        summary="OpenAI chat completions, each request's KV cache under its own budget.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.context = context
    app.openapi = functools.partial(_openapi, app)  # type: ignore[method-assign]  # how FastAPI documents to do it
    app.add_middleware(ReadyMiddleware, check_ready=context.check_ready)
    app.add_middleware(RequestIdMiddleware)  # the last one added is the outermost
    install_error_handlers(app)
    for router in (chat_router, tokenize_router, models_router, kv_router, health_router):
        app.include_router(router(context))
    app.include_router(page_router())
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that the endpoints read themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        body = ChatCompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(body.pop("$defs", {}))
        schemas[ChatCompletionRequest.__name__] = body
        app.openapi_schema = document
    return app.openapi_schema


async def _become_ready(context: ApiContext) -> None:
    """Load the tokenizer once the model is there; without it nothing can be served."""
    engine = context.engine
    while engine.state is EngineState.LOADING:  # noqa: ASYNC110 -- the engine's thread may be in another process
        await asyncio.sleep(LOADING_POLL_SECONDS)
    if engine.state is EngineState.FAILED:
        return
    try:
        context.chat_format = await asyncio.to_thread(ChatFormat.load, engine.info.tokenizer_path)
    except Exception as error:
        logger.exception("the tokenizer of %s cannot be loaded", engine.info.tokenizer_path)
        context.failure = error
        return
    logger.info("ready, served as %s", ", ".join(context.served_names))

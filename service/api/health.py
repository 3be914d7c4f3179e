"""Health and metrics: what an orchestrator asks. Knows no client."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.api.context import ApiContext
from service.api.errors import ApiError
from service.engine.interface import EngineState

RETRY_AFTER_SECONDS = 2


class HealthBody(BaseModel):
    """All is well."""

    status: str
    engine: EngineState
    last_step_age_seconds: float


def health_router(context: ApiContext) -> APIRouter:
    """The routes of liveness, readiness and metrics."""
    router = APIRouter(tags=["Operation"])

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live")
    async def live() -> HealthBody:
        engine, allowed = context.engine, context.settings.watchdog_seconds
        if engine.state is EngineState.FAILED or context.failure is not None:
            raise _unhealthy("The engine has failed; the log says why.", code="engine_failed")
        age = engine.last_step_age_seconds
        if age > allowed:
            raise _unhealthy(
                f"The running step is {age:.1f} s old; the watchdog allows {allowed:g} s (--watchdog-seconds).",
                code="engine_stuck",
            )
        return HealthBody(status="alive", engine=engine.state, last_step_age_seconds=age)

    @router.head("/health/ready", include_in_schema=False)
    @router.head("/health", include_in_schema=False)
    @router.get("/health/ready")
    @router.get("/health")
    async def ready() -> HealthBody:
        engine = context.engine
        if not context.is_ready:
            # A loaded model waits for its tokenizer: still loading, seen from outside.
            state = EngineState.LOADING if engine.state is EngineState.READY else engine.state
            raise _unhealthy(f"The server is not ready: it is {state}.", code=state.value)
        return HealthBody(status="ready", engine=engine.state, last_step_age_seconds=engine.last_step_age_seconds)

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        body, content_type = await context.metrics.render(context.engine, accept=request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    return router


def _unhealthy(message: str, *, code: str) -> ApiError:
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, code=code, retry_after=RETRY_AFTER_SECONDS)

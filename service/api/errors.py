"""Errors as a client sees them: one type, one envelope, one place where a status is chosen.

Owns the OpenAI error envelope, the mapping from what went wrong (a bad value, a submission the engine refused,
FastAPI's own 404 and 405) to status, type, param and code, and the line that a refusal leaves. Knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service.engine.interface import RejectionReason, SubmitError
from service.logs import log_refused

RETRY_AFTER_SECONDS: Mapping[RejectionReason, int] = {
    RejectionReason.QUEUE_REQUESTS: 1,
    RejectionReason.QUEUE_TOKENS: 1,
    RejectionReason.DRAINING: 5,
    RejectionReason.NOT_READY: 2,
}
MAX_SHOWN_CHARACTERS = 120


class ErrorBody(BaseModel):
    """The inside of the envelope."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(BaseModel):
    """What every answer that is not a success carries."""

    error: ErrorBody


class ApiError(Exception):
    """Something the client must be told.

    Attributes:
        status: HTTP status.
        body: what the envelope holds.
        retry_after: seconds for the `Retry-After` header, None for no header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message=message, type=_error_type(status), param=param, code=code)
        self.retry_after = retry_after

    def envelope(self) -> ErrorEnvelope:
        return ErrorEnvelope(error=self.body)

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        headers = dict(headers or {})
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return JSONResponse(self.envelope().model_dump(), status_code=self.status, headers=headers)


def invalid_value(param: str, value: object, allowed: str, *, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field, the value and what would have been accepted."""
    return ApiError(
        HTTPStatus.BAD_REQUEST, f"{param}={show(value)} is not possible: {allowed}.", param=param, code=code
    )


def missing_value(param: str, needed: str) -> ApiError:
    """A 400 for a field that is not there and without which the others mean nothing."""
    return ApiError(
        HTTPStatus.BAD_REQUEST, f"{param} is missing: {needed}.", param=param, code="missing_required_parameter"
    )


def show(value: object) -> str:
    """`value` as an error message may repeat it: short, whatever a client sent."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return "(a number too long to print)"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}…"


def from_submit_error(error: SubmitError) -> ApiError:
    """A refusal of the engine: 400 where waiting cannot help, else 503 with `Retry-After`."""
    code = error.reason.value
    if error.reason is RejectionReason.NEVER_FITS:
        return ApiError(HTTPStatus.BAD_REQUEST, str(error), param="kv_budget", code=code)
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE, str(error), code=code, retry_after=RETRY_AFTER_SECONDS[error.reason]
    )


def refuse(scope: Scope, error: ApiError, *, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that is not served; a POST, which would have had a line at its end, has it now."""
    if scope["method"] == "POST":
        log_refused(path=scope["path"], status=error.status, code=error.body.code, param=error.body.param)
    return error.response(headers)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app` in the envelope."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return refuse(request.scope, error)

    async def on_submit_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, SubmitError)
        return refuse(request.scope, from_submit_error(error))

    async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return refuse(request.scope, _from_http_exception(request, error), headers=error.headers)

    async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return refuse(
            request.scope,
            ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {first['msg']}", param=param, code="invalid_value"),
        )

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(SubmitError, on_submit_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)


def internal_error() -> ApiError:
    """The 500 for whatever nobody foresaw; the details are in the log, under the answer's `X-Request-Id`."""
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "The server met an error of its own; its log has the details under this answer's X-Request-Id.",
        code="internal_error",
    )


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        return ApiError(error.status_code, f"There is nothing at {where}.", code="not_found")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(
            error.status_code, f"{where} is not possible: this path takes {allowed}.", code="method_not_allowed"
        )
    return ApiError(error.status_code, str(error.detail))


def _error_type(status: int) -> str:
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return "service_unavailable_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"

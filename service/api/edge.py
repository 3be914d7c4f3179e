"""What happens to every HTTP request before and after its endpoint.

Owns the request id on every answer and every line of the log, the last catch of an unforeseen exception, the 503 of
every POST until the service is ready, and the size limit of a body. Knows no endpoint. Plain ASGI: a wrapper that
buffers would hide a client's departure from the streams below it.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import ApiError, from_submit_error, internal_error, refuse
from service.engine.interface import SubmitError
from service.logs import current_http_request, log_refused

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
# What nginx logs for a client that left; nobody reads it.
CLIENT_CLOSED_REQUEST = 499
# Bytes over the limit that are still read, and dropped: a client that is cut off while it sends never sees the 413.
MAX_DISCARDED_BYTES = 64 << 20
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/=+@#-]{1,128}")


class RequestIdMiddleware:
    """Puts `X-Request-Id` on every answer (the client's where it is sane), and turns a stray exception into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = asked if _SANE_REQUEST_ID.fullmatch(asked) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["http_request_id"] = request_id
        current_http_request.set(request_id)  # of this task, which ends with the request
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            if has_started:
                raise
            log_refused(path=scope["path"], status=CLIENT_CLOSED_REQUEST, code="client_disconnected")
        except Exception:
            if has_started:
                raise
            logger.exception("unforeseen error path=%s", scope["path"])
            await internal_error().response()(scope, receive, send_with_id)


class ReadyMiddleware:
    """Answers every POST, whatever its path and body, with a 503 for as long as `check_ready` raises `SubmitError`."""

    def __init__(self, app: ASGIApp, *, check_ready: Callable[[], None]) -> None:
        self._app = app
        self._check_ready = check_ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                self._check_ready()
            except SubmitError as error:
                await refuse(scope, from_submit_error(error))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def http_request_id(request: Request) -> str:
    """The id that `RequestIdMiddleware` gave this request."""
    return str(request.state.http_request_id)


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 when it is longer than `max_bytes`.
        ClientDisconnect: the client left while sending it.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes + MAX_DISCARDED_BYTES:
        raise _too_large(max_bytes)
    body = bytearray()
    seen = 0
    async for piece in request.stream():
        seen += len(piece)
        if seen > max_bytes + MAX_DISCARDED_BYTES:
            break
        if seen <= max_bytes:
            body += piece
    if seen > max_bytes:
        raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"The body is larger than the {max_bytes:,} bytes this server takes (--max-body-bytes).",
        code="body_too_large",
    )

"""Server-sent events as this service sends them.

Owns the headers, the keep-alive comment, the closing `[DONE]`, and the promise that a stream that ends for whatever
reason tells its source so. Knows nothing of what the events say.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from service.api.errors import internal_error

logger = logging.getLogger(__name__)

_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
_SEPARATOR = "\n"


class EventStream(EventSourceResponse):
    """A 200 whose body is `data:` lines, then `[DONE]`.

    Args:
        content: the data of the events, in order.
        on_close: called exactly once when the response is over: sent, cut short by a client that left, or never begun.
        keepalive_seconds: a comment goes out after this much silence or talk alike; 0 for none.
        headers: beside the ones of every event stream.
    """

    def __init__(
        self,
        content: AsyncIterator[str],
        *,
        on_close: Callable[[], None],
        keepalive_seconds: float,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(
            _with_done(content),
            headers=_HEADERS | dict(headers),
            ping=keepalive_seconds,
            ping_message_factory=_ping,
            sep=_SEPARATOR,
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator's `finally`: a client that leaves early enough cancels a generator that never started.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def _with_done(content: AsyncIterator[str]) -> AsyncIterator[ServerSentEvent]:
    try:
        async for data in content:
            yield ServerSentEvent(data, sep=_SEPARATOR)
    except Exception:
        logger.exception("unforeseen error in a stream")
        yield ServerSentEvent(internal_error().envelope().model_dump_json(), sep=_SEPARATOR)
    yield ServerSentEvent("[DONE]", sep=_SEPARATOR)


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep=_SEPARATOR)

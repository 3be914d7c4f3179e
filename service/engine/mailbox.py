"""From the worker thread to the event loop: each request's events, handed over once a step.

Owns the queues that the API's iterators read. Knows no model and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from service.engine.interface import Event, Failed, Finished


class Mailbox:
    """One request's events, written by the worker through a `Dispatcher`, read by one coroutine."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Add an event; on the event loop's thread."""
        self._queue.put_nowait(event)

    async def events(self) -> AsyncIterator[Event]:
        """All events up to the last."""
        while True:
            event = await self._queue.get()
            yield event
            if isinstance(event, Finished | Failed):
                return


class Dispatcher:
    """Collects a step's events and wakes the event loop once for all of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: list[tuple[Mailbox, Event]] = []

    def add(self, mailbox: Mailbox, event: Event) -> None:
        """Add an event to the next hand-over."""
        self._pending.append((mailbox, event))

    def flush(self) -> None:
        """Hand everything over; a loop that is closed already has no readers left."""
        if not self._pending:
            return
        batch, self._pending = self._pending, []
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, batch)


def _deliver(batch: list[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in batch:
        mailbox.put(event)

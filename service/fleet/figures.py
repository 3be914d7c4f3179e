"""The figures of a whole fleet: what all engines report, asked once for all who want to know, and added up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from service.engine.interface import EngineStats, RejectionReason, SubmitError
from service.fleet.calls import Fleet, ReplicaReport

logger = logging.getLogger(__name__)

# Several who look within this time see the same figures: pages that poll must not cost the engines anything.
MAX_AGE_SECONDS = 0.5
# An engine that hangs hides what the others say. Until it is replaced, what was last heard is better than nothing.
MAX_SILENCE_SECONDS = 180.0


class FleetFigures:
    """Reports of all engines, no older than `MAX_AGE_SECONDS` unless one of them hangs."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._lock = asyncio.Lock()
        self._reports: Sequence[ReplicaReport] = ()
        self._asked = self._heard = float("-inf")

    async def reports(self) -> Sequence[ReplicaReport]:
        """One report an engine, in the order of their names; those of engines that do not answer are missing."""
        async with self._lock:
            if time.monotonic() - self._asked > MAX_AGE_SECONDS:
                await self._ask()
                self._asked = time.monotonic()
            return self._reports

    @property
    def age_seconds(self) -> float:
        """How old the reports are; 0 before there are any."""
        return time.monotonic() - self._heard if self._reports else 0.0

    async def _ask(self) -> None:
        try:
            found = await self._fleet.reports()
        except TimeoutError:
            age = self.age_seconds
            logger.warning("an engine of the fleet hangs, and hides the others' figures; the last are %.0f s old", age)
            if age > MAX_SILENCE_SECONDS:
                self._reports = ()
            return
        self._reports = sorted(found, key=lambda report: report.name)
        self._heard = time.monotonic()

    async def stats(self) -> EngineStats:
        """The fleet as one engine.

        Raises:
            SubmitError: no engine answers.
        """
        reports = await self.reports()
        if not reports:
            raise SubmitError(RejectionReason.NOT_READY, "no engine of the fleet answers")
        return add_up([report.stats for report in reports])


def add_up(parts: Sequence[EngineStats]) -> EngineStats:
    """Several engines' figures as one's; at least one, all of one model."""
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.waiting_by_reason)
    return replace(
        parts[0],
        pages_total=sum(part.pages_total for part in parts),
        pages_free=sum(part.pages_free for part in parts),
        pages_used=sum(part.pages_used for part in parts),
        pages_reserved=sum(part.pages_reserved for part in parts),
        pool_bytes=sum(part.pool_bytes for part in parts),
        running=tuple(request for part in parts for request in part.running),
        waiting=sum(part.waiting for part in parts),
        waiting_by_reason=dict(reasons),
        queued_prompt_tokens=sum(part.queued_prompt_tokens for part in parts),
        restarts=sum(part.restarts for part in parts),
    )

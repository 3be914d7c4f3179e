"""What the door of a fleet asks of the engines behind it.

Owns the values and the protocol that cross from the process with the API to the processes with the models. Knows
nothing of what carries them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from service.engine.interface import (
    EngineStats,
    Event,
    GenerationRequest,
    KvDetail,
    ModelInfo,
    StreamChoice,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """One engine of the fleet at a moment.

    Attributes:
        name: unique in the fleet; the value of the label `replica`.
        host, pid: where its process runs.
        stats: its pool, queue and running requests.
        exposition: its metrics in Prometheus' text format.
    """

    name: str
    host: str
    pid: int
    stats: EngineStats
    exposition: str


class EventBatches(Protocol):
    """The events of one answer from an engine elsewhere, some at a time; any exception means that it was lost."""

    def __aiter__(self) -> AsyncIterator[tuple[Event, ...]]: ...

    def cancel(self) -> None:
        """Tell the engine that nobody waits any more; an ended answer is not harmed by it."""
        ...


class Fleet(Protocol):
    """The engines, however they are reached. A call goes to one of them that has room, unless it says all."""

    def generate(self, request: GenerationRequest, arrived: float) -> EventBatches:
        """Have one engine make an answer.

        Args:
            arrived: when the HTTP request came in, in Unix seconds: monotonic clocks of two machines differ, so
                `request.arrival` means nothing there.
        """
        ...

    async def info(self) -> ModelInfo:
        """What an engine has loaded; waits until one has."""
        ...

    async def reports(self) -> Sequence[ReplicaReport]:
        """Of the engines that answer.

        Raises:
            TimeoutError: one of them hangs, and nobody can tell what the others said.
        """
        ...

    async def kv_details(self, request_id: str, positions: StreamChoice | None) -> Sequence[KvDetail]:
        """Of all engines that know this request, which is one or none.

        Raises:
            TooManyPositions: as `Engine.kv_detail`, from the engine that knows it.
            TimeoutError: that engine, or another, takes too long to say.
        """
        ...

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator

import pytest

from service.engine.interface import (
    EngineState,
    EngineStats,
    Event,
    Failed,
    GenerationRequest,
    QueueSlot,
    RejectionReason,
    SubmitError,
)
from service.fleet import replica as replica_module
from service.fleet.replica import EngineReplica, ReplicaUnhealthyError, in_batches
from service.metrics import Metrics
from tests.fleet.pretend import INFO, ToldEngine, end, request, word


def make(engine: ToldEngine, *, ends: list[str] | None = None) -> EngineReplica:
    noted = [] if ends is None else ends
    return EngineReplica("e0", engine, Metrics(), watchdog_seconds=10, end_process=lambda: noted.append("ended"))


async def test_the_first_event_leaves_at_once_and_those_that_follow_quickly_as_one_bundle() -> None:
    events: list[Event] = [word("a"), word("b"), word("c"), end("d")]

    async def source() -> AsyncIterator[Event]:
        for event in events:
            yield event
            await asyncio.sleep(0.005)

    began = time.monotonic()
    bundles = in_batches(source(), pause_seconds=0.2)
    assert await anext(bundles) == (events[0],)
    assert time.monotonic() - began < 0.1
    assert [bundle async for bundle in bundles] == [tuple(events[1:])]


async def test_what_a_source_raises_is_not_swallowed() -> None:
    async def source() -> AsyncIterator[Event]:
        yield word("a")
        raise ValueError("broken")

    bundles = in_batches(source())
    assert await anext(bundles) == (word("a"),)
    with pytest.raises(ValueError, match="broken"):
        await anext(bundles)


async def test_a_call_that_is_given_up_aborts_its_request() -> None:
    engine = ToldEngine()
    replica = make(engine)
    await replica.start()
    bundles = replica.generate(request("a"), 0.0)
    step = asyncio.ensure_future(anext(bundles))
    await asyncio.sleep(0.02)
    engine.say("a", word("x"))
    assert await step == (word("x"),)
    waiting = asyncio.ensure_future(anext(bundles))
    await asyncio.sleep(0.02)
    assert engine.aborted == []
    waiting.cancel()
    await asyncio.wait([waiting])
    assert engine.aborted == ["a"]


async def test_a_report_looks_at_the_engine_once() -> None:
    class Counted(ToldEngine):
        looks = 0

        async def stats(self) -> EngineStats:
            self.looks += 1
            return await super().stats()

    engine = Counted()
    replica = make(engine)
    await replica.start()
    report = await replica.report()
    assert engine.looks == 1
    assert f'trimkv_kv_pages{{state="used"}} {report.stats.pages_used:.1f}' in report.exposition


async def test_an_engines_refusal_is_an_event_and_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Full(ToldEngine):
        def submit(self, asked: GenerationRequest, slot: QueueSlot) -> AsyncIterator[Event]:
            raise SubmitError(RejectionReason.QUEUE_REQUESTS, "the queue is full")

    replica = make(Full())
    await replica.start()
    assert [event async for events in replica.generate(request("a"), 0.0) for event in events] == [
        Failed(message="the queue is full")
    ]
    assert "refused id=a: the queue is full" in caplog.text


def test_what_crosses_survives_the_crossing() -> None:
    for value in (request("a"), word("x"), end("y"), INFO):
        assert pickle.loads(pickle.dumps(value)) == value


async def test_an_engine_that_cannot_load_says_why() -> None:
    engine = ToldEngine()
    engine.failure = ValueError("no such model")

    def start() -> None:
        engine.state = EngineState.FAILED

    engine.start = start  # type: ignore[method-assign]
    with pytest.raises(ReplicaUnhealthyError, match="no such model"):
        await make(engine).start()


async def test_a_step_that_hangs_is_unhealthy_and_one_that_runs_is_not() -> None:
    engine = ToldEngine()
    replica = make(engine)
    await replica.start()
    engine.last_step_age_seconds = 9.9
    replica.check_health()
    engine.last_step_age_seconds = 10.1
    with pytest.raises(ReplicaUnhealthyError, match=r"10\.1 s old"):
        replica.check_health()


async def test_the_process_of_a_failed_engine_ends_and_one_that_drains_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_module, "LAST_WORDS_SECONDS", 0.0)
    monkeypatch.setattr(replica_module, "POLL_SECONDS", 0.01)
    for drains, expected in ((False, ["ended"]), (True, [])):
        ends: list[str] = []
        engine = ToldEngine()
        replica = make(engine, ends=ends)
        await replica.start()
        if drains:
            await replica.drain(0.0)
        engine.state = EngineState.FAILED
        await asyncio.sleep(0.1)
        assert ends == expected

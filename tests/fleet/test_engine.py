from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from service.engine.interface import EngineState, Event, Failed, Finished, RejectionReason, SubmitError
from service.fleet import figures as figures_module
from service.fleet.engine import LOST, SHUT_DOWN, FleetEngine
from service.metrics import Metrics
from tests.fleet.pretend import PretendFleet, ToldEngine, end, request, word

SETTLE_SECONDS = 0.05


class Door:
    """A started fleet of two, and the engine in front of it."""

    def __init__(self) -> None:
        self.engines = (ToldEngine(), ToldEngine())
        self.fleet = PretendFleet(self.engines)
        self.metrics = Metrics()
        self.engine = FleetEngine(
            self.fleet, self.metrics, max_queue_requests=3, max_queue_tokens=100, prefill_chunk=512
        )

    async def open(self) -> None:
        await self.fleet.start()
        self.engine.start()
        while self.engine.state is not EngineState.READY:  # noqa: ASYNC110 -- as the app does
            await asyncio.sleep(0.001)

    async def ask(self, name: str, *, prompt: int = 5, arrival: float | None = None) -> AsyncIterator[Event]:
        asked = request(name, prompt=prompt, arrival=time.monotonic() if arrival is None else arrival)
        with self.engine.reserve() as slot:
            events = self.engine.submit(asked, slot)
        await asyncio.sleep(SETTLE_SECONDS)
        return events


@pytest.fixture
async def door() -> Door:
    opened = Door()
    await opened.open()
    return opened


async def text_of(events: AsyncIterator[Event]) -> str:
    said = [event async for event in events]
    assert isinstance(said[-1], Finished), said[-1]
    return "".join(event.text for event in said if not isinstance(event, Failed))


async def test_before_an_engine_has_answered_nothing_is_taken() -> None:
    closed = Door()
    assert closed.engine.state is EngineState.LOADING
    with pytest.raises(SubmitError) as caught:
        closed.engine.reserve()
    assert caught.value.reason is RejectionReason.NOT_READY
    with pytest.raises(RuntimeError):
        _ = closed.engine.info


async def test_answers_come_whole_and_in_order_from_both_engines(door: Door) -> None:
    answers = [await door.ask(name) for name in ("a", "b")]
    assert [[asked.request_id for asked in engine.submitted] for engine in door.engines] == [["a"], ["b"]]
    for name, engine in zip("ab", door.engines, strict=True):
        engine.say(name, word(f"{name}1 "), word(f"{name}2 "), end(f"{name}3"))
    assert [await text_of(events) for events in answers] == ["a1 a2 a3", "b1 b2 b3"]


async def test_a_lost_engine_ends_its_own_answers_only_and_none_is_computed_twice(door: Door) -> None:
    lost, kept = await door.ask("lost"), await door.ask("kept")
    door.engines[0].say("lost", word("half"))
    door.engines[1].say("kept", word("whole "))
    await asyncio.sleep(SETTLE_SECONDS)
    door.fleet.calls["lost"].cut()
    said = [event async for event in lost]
    assert said == [word("half"), Failed(message=LOST)]
    door.engines[1].say("kept", end("answer"))
    assert await text_of(kept) == "whole answer"
    assert [asked.request_id for engine in door.engines for asked in engine.submitted] == ["lost", "kept"]


async def test_a_client_that_leaves_frees_its_engine_and_its_place(door: Door) -> None:
    for _ in range(2):  # three places: without the first three's, the fourth would be refused
        for name in ("x", "y", "z"):
            await door.ask(name)
        for name in ("x", "y", "z"):
            door.engine.abort(name)
        await asyncio.sleep(SETTLE_SECONDS)
        assert all(door.fleet.calls[name].is_cancelled for name in ("x", "y", "z"))
        assert door.engine.unanswered == 0


async def test_a_client_that_leaves_at_once_gives_its_place_back_too(door: Door) -> None:
    for number in range(5):
        with door.engine.reserve() as slot:
            door.engine.submit(request(f"r{number}"), slot)
        door.engine.abort(f"r{number}")  # before its relay took a step
        await asyncio.sleep(SETTLE_SECONDS)
    assert door.engine.unanswered == 0


async def test_the_queue_is_bounded_until_first_tokens_come(door: Door) -> None:
    for name in "abc":
        await door.ask(name)
    with pytest.raises(SubmitError) as caught:
        door.engine.reserve()
    assert caught.value.reason is RejectionReason.QUEUE_REQUESTS
    door.engines[0].say("a", word("hello"))
    await asyncio.sleep(SETTLE_SECONDS)
    await door.ask("d")
    rejected = door.metrics.registry.get_sample_value(
        "trimkv_admission_rejections_total", {"reason": RejectionReason.QUEUE_REQUESTS}
    )
    assert rejected == 1


async def test_what_cannot_fit_any_engine_is_refused_before_it_is_sent(door: Door) -> None:
    with door.engine.reserve() as slot, pytest.raises(SubmitError) as caught:
        door.engine.submit(request("long", prompt=101), slot)
    assert caught.value.reason is RejectionReason.QUEUE_TOKENS
    assert not door.fleet.calls


async def test_the_time_of_arrival_survives_the_change_of_clocks(door: Door) -> None:
    await door.ask("old", arrival=time.monotonic() - 7.0)
    assert time.time() - door.fleet.arrived["old"] == pytest.approx(7.0, abs=1.0)
    assert time.monotonic() - door.engines[0].submitted[0].arrival == pytest.approx(7.0, abs=1.0)


async def test_draining_lets_running_answers_end(door: Door) -> None:
    events = await door.ask("a")
    draining = asyncio.create_task(door.engine.drain(10))
    await asyncio.sleep(SETTLE_SECONDS)
    with pytest.raises(SubmitError) as caught:
        door.engine.reserve()
    assert caught.value.reason is RejectionReason.DRAINING
    assert not draining.done()
    door.engines[0].say("a", end("done"))
    assert await text_of(events) == "done"
    await asyncio.wait_for(draining, 5)
    assert all(engine.state is EngineState.READY for engine in door.engines)  # other doors may use them


async def test_draining_for_too_long_tells_who_still_reads(door: Door) -> None:
    events = await door.ask("a")
    door.engines[0].say("a", word("half"))
    await asyncio.wait_for(door.engine.drain(0.1), 5)
    assert [event async for event in events] == [word("half"), Failed(message=SHUT_DOWN)]
    assert door.fleet.calls["a"].is_cancelled


async def test_the_fleets_figures_are_all_engines_added_up_and_asked_once(door: Door) -> None:
    first, second = await asyncio.gather(door.engine.stats(), door.engine.stats())
    assert (first.pages_total, first.pages_used, first.waiting, first.restarts) == (2000, 500, 4, 2)
    assert dict(first.waiting_by_reason) == {"capacity": 4}
    assert second == first
    assert door.fleet.times_asked == 1


async def test_an_engine_that_hangs_leaves_the_last_figures_for_a_while(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await door.engine.stats()
    door.fleet.hangs = True
    monkeypatch.setattr(figures_module, "MAX_AGE_SECONDS", 0.0)
    assert await door.engine.stats() == before
    assert door.engine.figures.age_seconds > 0
    monkeypatch.setattr(figures_module, "MAX_SILENCE_SECONDS", 0.0)
    with pytest.raises(SubmitError):
        await door.engine.stats()
    door.fleet.hangs = False
    assert await door.engine.stats() == before


async def test_several_who_look_do_not_wait_for_a_hanging_engine_one_after_the_other(door: Door) -> None:
    door.fleet.hangs = True
    await asyncio.gather(*(door.engine.figures.reports() for _ in range(5)))
    assert door.fleet.times_asked == 1


async def test_a_fleet_without_engines_says_so_where_it_is_asked_for_figures() -> None:
    engine = FleetEngine(PretendFleet([]), Metrics(), max_queue_requests=1, max_queue_tokens=1, prefill_chunk=512)
    with pytest.raises(SubmitError) as caught:
        await engine.stats()
    assert caught.value.reason is RejectionReason.NOT_READY

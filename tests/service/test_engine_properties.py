"""An admitted request is never preempted and never meets an empty pool, whatever comes and goes."""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from service.engine.config import EngineConfig
from service.engine.core import EngineBroken
from service.engine.interface import Failed, Finished, FinishReason, RejectionReason, SubmitError
from service.engine.loader import LoadedEngine, load_engine
from tests.core.tiny import save_base, save_random_gates
from tests.service.harness import Answer, Engine
from trimkv_core.budget import Budget, Strategy
from trimkv_core.pages import PoolExhausted

CHUNK = 8
CONFIG: dict[str, Any] = {"prefill_chunk": CHUNK, "block_size": 4, "max_num_seqs": 6, "device": "cpu"}


@cache
def loaded() -> LoadedEngine:
    folder = Path(tempfile.mkdtemp(prefix="tiny-engine-"))
    save_base(folder / "base", "qwen3")
    save_random_gates(folder / "gates", folder / "base")
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder / "base")
    return load_engine(
        EngineConfig(model=str(folder / "base"), gates=str(folder / "gates"), kv_memory_bytes=80_000, **CONFIG)
    )


def build_engine() -> Engine:
    engine = Engine(EngineConfig(**CONFIG), loaded())
    # Every engine has the model in common and counts its own promises.
    engine.core.ledger.reserved = 0
    return engine


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    chunk = draw(st.sampled_from([0, 3, 5, 7, CHUNK, 20]))
    memory = draw(st.integers(2, 12))
    return draw(
        st.sampled_from(
            [
                Budget(memory_size=memory, buffer_size=3, prefill_chunk=chunk),
                Budget(memory_size=memory, buffer_size=1, prefill_chunk=chunk, min_tokens_per_head=2),
                Budget(
                    memory_size=memory,
                    buffer_size=4,
                    prefill_chunk=chunk,
                    strategy=Strategy.THRESHOLD,
                    alpha_threshold=0.3,
                ),
                Budget.dense(),
            ]
        )
    )


class EngineMachine(RuleBasedStateMachine):
    """Submit, step and abort in any order on a pool that holds a handful of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = build_engine()
        self.rng = random.Random(0)
        self.answers: list[Answer] = []

    @rule(budget=budgets(), prompt=st.integers(1, 40), new=st.integers(1, 12), priority=st.integers(0, 1))
    def submit(self, budget: Budget, prompt: int, new: int, priority: int) -> None:
        ids = [self.rng.randrange(64) for _ in range(prompt)]
        try:
            self.answers.append(self.engine.submit(ids, budget, max_tokens=new, priority=priority))
        except SubmitError as error:
            assert error.reason is RejectionReason.NEVER_FITS

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        alive = [answer for answer in self.answers if not answer.has_ended]
        if alive:
            victim = data.draw(st.sampled_from(alive))
            self.engine.abort(victim)
            assert victim.finished.finish_reason is FinishReason.ABORT

    @invariant()
    def nothing_fails_and_promises_hold(self) -> None:
        core = self.engine.core
        core.runner.table.check_invariants()
        stats = core.stats()
        assert stats.pages_used + stats.pages_free == stats.pages_total
        assert stats.pages_used <= stats.pages_reserved <= stats.pages_total
        assert stats.pages_reserved == sum(s.pages_reserved for s in stats.running) + (
            core.ledger.lane if stats.running else 0
        )
        for answer in self.answers:
            assert not any(isinstance(event, Failed) for event in answer.events)
        for request in stats.running:
            budget = request.budget
            total = request.prompt_tokens + 12
            chunk = max(CHUNK, budget.prefill_chunk or request.prompt_tokens)
            ceiling = budget.ceiling_entries(stats.geometry.streams, total_tokens=total, forward_tokens=chunk)
            assert request.peak_entries <= ceiling

    def teardown(self) -> None:
        self.engine.run()
        core = self.engine.core
        core.runner.table.check_invariants()
        assert core.runner.table.pool.num_used == 0
        assert core.ledger.reserved == 0
        for answer in self.answers:
            assert answer.has_ended
            assert isinstance(answer.events[-1], Finished)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_the_head_of_the_queue_is_never_overtaken_within_its_priority() -> None:
    engine = build_engine()
    running = engine.submit([1] * 10, Budget.dense(), max_tokens=30)
    engine.step()
    large = engine.submit([1] * 10, Budget.dense(), max_tokens=70)
    small = engine.submit([1] * 3, Budget(memory_size=2), max_tokens=2)
    urgent = engine.submit([1] * 3, Budget(memory_size=2), max_tokens=2, priority=-1)
    engine.step()
    assert running.state.row is not None
    assert urgent.state.row is not None
    assert large.state.row is None
    assert small.state.row is None
    assert engine.core.scheduler.waiting_by_reason() == {"slots": 0, "capacity": 1, "order": 1}
    engine.run()


def test_a_long_prompt_never_stalls_a_running_stream_for_more_than_one_chunk() -> None:
    engine = build_engine()
    stream = engine.submit([1, 2, 3], Budget(memory_size=4), max_tokens=12)
    engine.step()
    engine.submit([5] * 60, Budget(memory_size=4, prefill_chunk=CHUNK), max_tokens=2)
    for expected in range(2, 9):
        engine.step()
        assert len(stream.token_ids) == expected
    engine.run()


def test_decoding_many_sequences_is_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine()
    for _ in range(5):
        engine.submit([1, 2], Budget(memory_size=4), max_tokens=6)
    while any(state.is_prefilling for state in engine.core.scheduler.running) or engine.core.scheduler.waiting:
        engine.step()
    calls: list[int] = []
    forward = engine.core.runner.forward

    def counted(feeds: Any) -> Any:
        calls.append(len(feeds))
        return forward(feeds)

    monkeypatch.setattr(engine.core.runner, "forward", counted)
    engine.step()
    assert calls == [5]
    engine.run()


def test_a_failing_step_fails_its_own_requests_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine()
    doomed = engine.submit([1, 2, 3], Budget(memory_size=4), max_tokens=9)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.loaded._decoder, "forward", lambda *_args: 1 / 0)
        waiting = engine.submit([4] * 5, Budget(memory_size=4), max_tokens=3, priority=1)
        engine.step()
    assert isinstance(doomed.events[-1], Failed)
    assert isinstance(waiting.events[-1], Failed)
    later = engine.submit([1, 2, 3], Budget(memory_size=4), max_tokens=3)
    engine.run()
    assert later.finished.finish_reason is FinishReason.LENGTH
    assert engine.core.stats().restarts == 0
    engine.core.runner.table.check_invariants()


def test_a_broken_pool_is_rebuilt_and_a_second_break_within_a_minute_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = build_engine()

    def leak_a_page(*_args: Any) -> None:
        engine.core.runner.table.pool.allocate(1)
        raise PoolExhausted("made up")

    monkeypatch.setattr(engine.loaded._decoder, "forward", leak_a_page)
    first = engine.submit([1, 2, 3], Budget(memory_size=4))
    engine.step()
    assert isinstance(first.events[-1], Failed)
    assert engine.core.stats().restarts == 1
    assert engine.core.runner.table.pool.num_used == 0
    second = engine.submit([1, 2, 3], Budget(memory_size=4))
    with pytest.raises(EngineBroken, match="twice within 60 s"):
        engine.step()
    engine._collect()
    assert isinstance(second.events[-1], Failed)


def test_chunks_of_odd_sizes_side_by_side_stay_within_the_lane() -> None:
    engine = build_engine()
    for chunk in (5, 7, 3, 5):
        engine.submit([1] * 37, Budget(memory_size=2, buffer_size=1, prefill_chunk=chunk), max_tokens=1)
    geometry, held = engine.loaded.info.geometry, 0
    while engine.core.scheduler.has_work:
        engine.step()
        running = engine.core.stats().running
        held = max(held, sum(request.entries_physical for request in running))
        assert held <= geometry.streams * (3 * len(running) + CHUNK)


def test_what_is_no_number_dies_with_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine()
    healthy = engine.submit([3] * 4, Budget(memory_size=4), max_tokens=12)
    engine.step()
    ops = engine.loaded._decoder._ops  # type: ignore[attr-defined]
    embed = ops.embed

    def overflow(ids: torch.Tensor) -> torch.Tensor:
        return torch.where((ids == 63)[:, None], torch.inf, embed(ids))

    monkeypatch.setattr(ops, "embed", overflow)
    doomed = engine.submit([63] * 6, Budget.dense(), max_tokens=4)
    engine.run()
    assert isinstance(doomed.events[-1], Failed)
    assert healthy.finished.completion_tokens == 12
    monkeypatch.undo()
    pool = engine.core.runner.table.pool
    assert bool(pool.key.isfinite().all() and pool.value.isfinite().all())
    engine.submit([5] * 6, Budget.dense(), max_tokens=4)
    engine.run()
    assert engine.core.stats().restarts == 0


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    engine = build_engine()
    with pytest.raises(SubmitError, match=r"need \d+ pages; the pool has \d+") as caught:
        engine.submit([1] * 400, Budget(memory_size=4, prefill_chunk=0), max_tokens=4)
    assert caught.value.reason is RejectionReason.NEVER_FITS

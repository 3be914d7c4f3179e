"""What a request gets and keeps is its own: the same alone and in any company."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from service.engine.config import EngineConfig
from tests.service.harness import Answer, Engine
from trimkv_core.budget import Budget, Strategy

CHUNK = 64
SINKS = {"num_sink_tokens": 4}
# (prompt tokens, budget): six different budgets, prompts of one token up to more than ten chunks.
REQUESTS: list[tuple[int, Budget]] = [
    (700, Budget(memory_size=16, buffer_size=8, prefill_chunk=64, **SINKS)),
    (333, Budget(memory_size=48, buffer_size=16, prefill_chunk=64, **SINKS)),
    (90, Budget(memory_size=32, buffer_size=4, prefill_chunk=50, min_tokens_per_head=2, **SINKS)),
    (200, Budget(memory_size=64, buffer_size=32, prefill_chunk=0, sliding_window_size=8, **SINKS)),
    (
        260,
        Budget(
            memory_size=40,
            buffer_size=8,
            strategy=Strategy.THRESHOLD,
            alpha_threshold=0.05,
            prefill_chunk=100,
            **SINKS,
        ),
    ),
    (150, Budget.dense()),
    (1, Budget(memory_size=8, buffer_size=2, lookahead_steps=4, prefill_chunk=64)),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig(dtype="float32", device="cpu", prefill_chunk=CHUNK, kv_memory_bytes=1 << 28))


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(100, 40_000) for _ in range(length)] for length, _ in REQUESTS]


def submit(engine: Engine, index: int, **sampling: Any) -> Answer:
    return engine.submit(prompts()[index], REQUESTS[index][1], max_tokens=24, **sampling)


def kept(answer: Answer) -> list[list[int]]:
    assert answer.snapshot is not None
    streams = torch.split(answer.snapshot.position, answer.snapshot.lengths.tolist())
    return [sorted(stream.tolist()) for stream in streams]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Answer]:
    answers = []
    for index in range(len(REQUESTS)):
        answers.append(submit(engine, index))
        engine.run()
    return answers


def test_greedy_answers_and_kept_positions_are_the_same_alone_and_all_at_once(
    engine: Engine, alone: list[Answer]
) -> None:
    together = [submit(engine, index) for index in range(len(REQUESTS))]
    engine.run()
    for mine, other in zip(together, alone, strict=True):
        assert mine.token_ids == other.token_ids
        assert kept(mine) == kept(other)
        assert mine.finished.kv == other.finished.kv


def test_coming_and_going_of_others_changes_nothing(engine: Engine, alone: list[Answer]) -> None:
    rng = random.Random(0)
    order = list(range(len(REQUESTS))) * 2
    rng.shuffle(order)
    answers: list[tuple[int, Answer]] = []
    aborted: list[Answer] = []
    for index in order:
        answers.append((index, submit(engine, index)))
        aborted.append(engine.submit([5] * 80, Budget(memory_size=8), max_tokens=100))
        for _ in range(rng.randrange(6)):
            engine.step()
        engine.abort(aborted[-1])
    engine.run()
    for index, answer in answers:
        assert answer.token_ids == alone[index].token_ids
        assert kept(answer) == kept(alone[index])


def test_a_seeded_request_draws_the_same_ids_in_a_full_batch(engine: Engine) -> None:
    def seeded() -> list[Answer]:
        return [
            submit(engine, index, temperature=0.9, top_p=0.95, top_k=40 * (index % 2), seed=index, min_p=0.01)
            for index in range(5)
        ]

    one_by_one = []
    for index in range(5):
        one_by_one.append(
            submit(engine, index, temperature=0.9, top_p=0.95, top_k=40 * (index % 2), seed=index, min_p=0.01)
        )
        engine.run()
    together = seeded() + [submit(engine, 5, temperature=1.0) for _ in range(3)]
    engine.run()
    assert [answer.token_ids for answer in together[:5]] == [answer.token_ids for answer in one_by_one]


def test_usage_adds_up_and_stays_under_the_ceiling(engine: Engine, alone: list[Answer]) -> None:
    geometry = engine.loaded.info.geometry
    for (prompt_tokens, budget), answer in zip(REQUESTS, alone, strict=True):
        kv = answer.finished.kv
        fed = prompt_tokens + 24 - 1
        assert kv.retained_entries + kv.evicted_entries == fed * geometry.streams
        assert answer.snapshot is not None
        assert kv.retained_entries == int(answer.snapshot.lengths.sum())
        chunk = min(prompt_tokens, max(CHUNK, budget.prefill_chunk or prompt_tokens))
        ceiling = budget.ceiling_entries(geometry.streams, total_tokens=prompt_tokens + 24, forward_tokens=chunk)
        assert kv.peak_entries <= ceiling
        assert kv.dense_bytes == fed * geometry.streams * geometry.kv_bytes


def test_the_pool_is_empty_when_everything_has_ended(engine: Engine) -> None:
    engine.run()
    engine.core.runner.table.check_invariants()
    assert engine.core.runner.table.pool.num_used == 0
    assert engine.core.ledger.reserved == 0

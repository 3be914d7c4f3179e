"""The engine with steps that run ahead of the host against the one that waits: the same answers, the same caches."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from service.engine.config import EngineConfig
from service.engine.interface import Failed, FinishReason
from service.engine.loader import LoadedEngine, load_engine
from tests.core.tiny import save_base, save_random_gates
from tests.service.harness import Answer, Engine
from trimkv_core import TrimKVForCausalLM
from trimkv_core.attention.triton import TritonBackend
from trimkv_core.budget import Budget, Scope, Strategy
from trimkv_core.lean.decoder import LeanDecoder
from trimkv_core.lean.families import read_decoder
from trimkv_core.lean.torch_ops import TorchOps

CHUNK = 12
BUDGETS = [
    Budget(memory_size=5, buffer_size=2, prefill_chunk=CHUNK, num_sink_tokens=1),
    Budget.dense(),
    Budget(memory_size=4, buffer_size=3, scope=Scope.LOCAL, prefill_chunk=7),
    Budget(memory_size=6, buffer_size=2, strategy=Strategy.THRESHOLD, alpha_threshold=0.3, prefill_chunk=CHUNK),
    Budget(memory_size=6, buffer_size=2, min_tokens_per_head=2, prefill_chunk=0),
]
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "seed": 3},
    {"temperature": 0.7, "top_p": 0.8, "seed": 4},  # may need a second look: waits for the host
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 7, "min_p": 0.05, "seed": 5, "min_tokens": 4, "ignore_eos": False},
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedEngine, LoadedEngine]:
    """The same weights behind the engine that waits, and behind the one that does not."""
    folder = tmp_path_factory.mktemp("tiny")
    save_base(folder / "base", "qwen3", eos_token_id=2)
    save_random_gates(folder / "gates", folder / "base")
    config = EngineConfig(
        model=str(folder / "gates"),
        dtype="float32",
        backend="torch",
        kv_memory_bytes=1 << 20,
        block_size=4,
        prefill_chunk=CHUNK,
        max_num_seqs=6,
    )
    model = TrimKVForCausalLM.from_pretrained(str(folder / "gates"), dtype=torch.float32)
    loaded = load_engine(config)
    model.to(loaded._device)
    modules = read_decoder(model)
    assert modules is not None
    waits = dataclasses.replace(loaded, _decoder=LeanDecoder(modules, TorchOps(modules)))
    return waits, dataclasses.replace(waits, _backend=TritonBackend())


def serve(loaded: LoadedEngine, *, count: int, abort: bool) -> tuple[list[Answer], int]:
    """Requests that arrive while others run; the answers, and how many steps were in flight at once with another."""
    engine = Engine(loaded._config, loaded)
    engine.core.ledger.reserved = 0
    rng = random.Random(2)
    answers, overlapped = [], 0
    for index in range(count):
        prompt = [rng.randrange(3, 60) for _ in range(rng.choice([1, 5, 12, 30]))]
        sampling = {"max_tokens": rng.choice([1, 2, 9, 14])} | SAMPLINGS[index % len(SAMPLINGS)]
        answers.append(engine.submit(prompt, BUDGETS[(index // 2) % len(BUDGETS)], **sampling))
        for _ in range(rng.choice([0, 3, 8])):
            engine.step()
            overlapped += engine.core._in_flight is not None
        if abort and index == 1:
            engine.abort(answers[1])
    while engine.core.scheduler.has_work:
        engine.step()
        overlapped += engine.core._in_flight is not None
    table = engine.core.runner.table
    table.check_invariants()
    assert not table.open_rows
    assert table.pool.num_used == 0
    return answers, overlapped


def told(answer: Answer) -> tuple[Any, ...]:
    end = answer.events[-1]
    assert not isinstance(end, Failed)
    return answer.token_ids, end


def test_answers_and_caches_are_those_of_an_engine_that_waits(engines: tuple[LoadedEngine, LoadedEngine]) -> None:
    waits, runs_ahead = engines
    expected, none = serve(waits, count=10, abort=False)
    found, overlapped = serve(runs_ahead, count=10, abort=False)
    assert none == 0
    assert overlapped > 10
    for left, right in zip(found, expected, strict=True):
        assert told(left) == told(right)


def test_an_abort_between_launch_and_reading_drops_the_token(engines: tuple[LoadedEngine, LoadedEngine]) -> None:
    answers, _ = serve(engines[1], count=6, abort=True)
    assert answers[1].finished.finish_reason in {FinishReason.ABORT, FinishReason.LENGTH}
    assert all(not isinstance(answer.events[-1], Failed) for answer in answers)


def test_a_failing_launch_fails_the_step_in_flight_too(
    engines: tuple[LoadedEngine, LoadedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(engines[1]._config, engines[1])
    engine.core.ledger.reserved = 0
    doomed = [engine.submit([3, 4, 5], Budget(memory_size=4, buffer_size=2), max_tokens=20) for _ in range(2)]
    for _ in range(4):
        engine.step()
    assert engine.core._in_flight is not None
    with monkeypatch.context() as patch:
        patch.setattr(engine.core.runner.ahead, "launch", lambda *_args: 1 / 0)
        engine.step()
    assert all(isinstance(answer.events[-1], Failed) for answer in doomed)
    assert engine.core._in_flight is None
    healthy = engine.submit([3, 4, 5], Budget(memory_size=4, buffer_size=2), max_tokens=5)
    engine.run()
    assert healthy.finished.completion_tokens == 5
    engine.core.runner.table.check_invariants()

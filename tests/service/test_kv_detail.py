"""`GET /v1/kv/{request_id}`: what is shown is what the table holds, and looking changes nothing and costs little."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch

from service.engine import pictures
from service.engine.config import EngineConfig
from service.engine.interface import (
    KvDetail,
    StreamChoice,
    StreamPositions,
    TooManyPositions,
)
from service.engine.loader import LoadedEngine, load_engine
from service.engine.request import RequestState
from tests.core.tiny import save_base, save_random_gates
from tests.service.harness import Answer, Engine
from tests.service.scripted import INFO, RUNNING, ScriptedEngine, serving
from trimkv_core import TrimKVForCausalLM
from trimkv_core.budget import Budget
from trimkv_core.lean.decoder import LeanDecoder
from trimkv_core.lean.families import read_decoder
from trimkv_core.lean.torch_ops import TorchOps
from trimkv_core.sequences import SequenceTable

CHUNK = 12
SMALL = Budget(memory_size=5, buffer_size=2, prefill_chunk=CHUNK, num_sink_tokens=1)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
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
        max_num_seqs=4,
    )
    model = TrimKVForCausalLM.from_pretrained(str(folder / "gates"), dtype=torch.float32)
    loaded = load_engine(config)
    model.to(loaded._device)
    modules = read_decoder(model)
    assert modules is not None
    return dataclasses.replace(loaded, _decoder=LeanDecoder(modules, TorchOps(modules)))


@pytest.fixture(params=["waits", "runs ahead"])
def engine(request: pytest.FixtureRequest, loaded: LoadedEngine) -> Engine:
    """An engine over the plain table, and one over the device's, whose steps run ahead of the host."""
    if request.param == "runs ahead":
        pytest.importorskip("triton")
        from trimkv_core.attention.triton import TritonBackend

        loaded = dataclasses.replace(loaded, _backend=TritonBackend())
    engine = Engine(loaded._config, loaded)
    engine.core.ledger.reserved = 0
    assert (engine.core.runner.ahead is not None) is (request.param == "runs ahead")
    return engine


@pytest.fixture(autouse=True)
def fresh_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look takes a new picture, unless a test says otherwise."""
    monkeypatch.setattr(pictures, "MIN_AGE_SECONDS", 0.0)
    monkeypatch.setattr(pictures, "TIME_SHARE", 1)


def prompt(length: int = 40) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(3, 60) for _ in range(length)]


def look(engine: Engine, answer: Answer, choice: StreamChoice | None = None) -> KvDetail:
    picture = engine.core.picture(answer.state.request.request_id)
    assert picture is not None
    return picture.develop(choice)


def step(engine: Engine, times: int) -> None:
    for _ in range(times):
        engine.step()


def held(engine: Engine, answer: Answer) -> list[list[list[int]]]:
    """Positions by layer and head, by the table's own word."""
    table, row = engine.core.runner.table, answer.state.row
    assert row is not None
    layers, heads = table.geometry.num_layers, table.geometry.num_heads
    return [[table.positions_of(row, layer, head).tolist() for head in range(heads)] for layer in range(layers)]


def counted(positions: list[list[list[int]]], seen: int) -> tuple[int, ...]:
    flat = [position for layer in positions for head in layer for position in head]
    return tuple(flat.count(position) for position in range(seen))


@pytest.mark.parametrize("steps", [1, 3, 9], ids=["first chunk", "second chunk", "answering"])
def test_a_picture_is_what_the_table_holds(engine: Engine, steps: int) -> None:
    answer = engine.submit(prompt(), SMALL, max_tokens=20)
    engine.submit(prompt(9), Budget.dense(), max_tokens=20)
    step(engine, steps)
    detail = look(engine, answer, StreamChoice())
    table, row = engine.core.runner.table, answer.state.row
    assert row is not None
    positions, seen = held(engine, answer), table.seen(row)
    assert detail.request.seen_tokens == seen
    assert detail.request.phase == ("decode" if steps == 9 else "prefill")
    assert [list(layer) for layer in detail.head_entries] == [[len(head) for head in layer] for layer in positions]
    assert detail.request.layer_entries == tuple(sum(layer) for layer in detail.head_entries)
    assert detail.request.entries_physical == sum(detail.request.layer_entries) == table.held(row)
    assert detail.request.pages_used == table.pages(row)
    assert detail.token_streams == counted(positions, seen)
    assert detail.positions is not None
    assert {(stream.layer, stream.head): list(stream.positions) for stream in detail.positions} == {
        (layer, head): positions[layer][head] for layer in range(len(positions)) for head in range(len(positions[0]))
    }
    assert 0 in {position for position, count in enumerate(detail.token_streams) if count == table.geometry.streams}


def test_one_stream_can_be_asked_for(engine: Engine) -> None:
    answer = engine.submit(prompt(), SMALL, max_tokens=20)
    step(engine, 7)
    positions = held(engine, answer)
    (stream,) = look(engine, answer, StreamChoice(layer=1, head=0)).positions or ()
    assert (stream.layer, stream.head, list(stream.positions)) == (1, 0, positions[1][0])
    of_layer = look(engine, answer, StreamChoice(layer=1)).positions or ()
    assert [list(stream.positions) for stream in of_layer] == positions[1]
    assert look(engine, answer).positions is None


def test_a_dense_cache_is_shown_without_being_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = engine.submit(prompt(), Budget.dense(), max_tokens=20)
    step(engine, 6)
    monkeypatch.setattr(engine.core.runner.table, "page_positions", lambda _row: 1 / 0)
    detail = look(engine, answer, StreamChoice(layer=0, head=0))
    seen = detail.request.seen_tokens
    assert detail.token_streams == (engine.core.runner.table.geometry.streams,) * seen
    assert detail.positions == (StreamPositions(layer=0, head=0, positions=tuple(range(seen))),)


def test_who_waits_is_shown_as_waiting(engine: Engine) -> None:
    answer = engine.submit(prompt(), SMALL)
    detail = look(engine, answer)
    assert detail.request.phase == "waiting"
    assert detail.token_streams == ()
    assert {held for layer in detail.head_entries for held in layer} == {0}


def test_an_ended_request_shows_what_it_held_at_the_end(engine: Engine) -> None:
    answer = engine.submit(prompt(), SMALL, max_tokens=9)
    engine.run()
    detail = look(engine, answer, StreamChoice())
    assert detail.request.phase == "ended"
    assert detail.request.pages_used == detail.request.pages_reserved == 0
    assert answer.snapshot is not None
    streams = torch.split(answer.snapshot.position, answer.snapshot.lengths.tolist())
    assert [list(stream.positions) for stream in detail.positions or ()] == [sorted(s.tolist()) for s in streams]
    assert detail.token_streams is not None
    assert sum(detail.token_streams) == answer.snapshot.position.numel()
    if engine.core.runner.ahead is None:  # else one more step had been launched
        assert sum(detail.token_streams) == answer.finished.kv.retained_entries


def test_an_aborted_request_can_still_be_looked_at(engine: Engine) -> None:
    answer = engine.submit(prompt(), SMALL, max_tokens=20)
    step(engine, 6)
    before = look(engine, answer).head_entries
    engine.abort(answer)
    assert look(engine, answer).head_entries == before
    assert engine.core.runner.table.open_rows == ()


def test_what_ended_long_ago_is_forgotten(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = engine.submit(prompt(), SMALL, max_tokens=2)
    engine.run()
    monkeypatch.setattr(pictures, "ENDED_SECONDS", -1.0)
    assert engine.core.picture(answer.state.request.request_id) is None
    assert engine.core.picture("chatcmpl-never") is None


def test_ended_requests_are_kept_within_bounds(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_ENDED", 2)
    answers = []
    for _ in range(3):
        answers.append(engine.submit(prompt(), SMALL, max_tokens=2))
        engine.run()
    assert engine.core.picture(answers[0].state.request.request_id) is None
    assert look(engine, answers[1]).token_streams is not None
    monkeypatch.setattr(pictures, "MAX_ENDED_BYTES", 0)
    last = engine.submit(prompt(), SMALL, max_tokens=2)
    engine.run()
    detail = look(engine, last, StreamChoice())
    assert detail.token_streams is None
    assert detail.positions is None
    assert sum(map(sum, detail.head_entries)) == detail.request.entries_physical
    assert engine.core._pictures._ended_bytes == 0


def test_a_cache_too_large_to_list_still_shows_its_lengths(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_LISTED_ENTRIES", 1)
    answer = engine.submit(prompt(), SMALL, max_tokens=20)
    step(engine, 7)
    detail = look(engine, answer, StreamChoice())
    assert detail.token_streams is None
    assert detail.positions is None
    assert sum(map(sum, detail.head_entries)) == detail.request.entries_physical


def test_an_answer_carries_only_so_many_positions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = engine.submit(prompt(), SMALL, max_tokens=20)
    step(engine, 7)
    lengths = look(engine, answer).head_entries
    monkeypatch.setattr(pictures, "MAX_ANSWERED_POSITIONS", lengths[0][0])
    assert look(engine, answer, StreamChoice(layer=0, head=0)).positions
    with pytest.raises(TooManyPositions, match="positions are more than"):
        look(engine, answer, StreamChoice())


def test_a_young_picture_is_shown_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MIN_AGE_SECONDS", 60.0)
    answer = engine.submit(prompt(), SMALL, max_tokens=20)
    step(engine, 6)
    seen = look(engine, answer).request.seen_tokens
    step(engine, 2)
    assert look(engine, answer).request.seen_tokens == seen
    monkeypatch.setattr(pictures, "MIN_AGE_SECONDS", 0.0)
    assert look(engine, answer).request.seen_tokens > seen


def test_pictures_take_no_more_than_their_share_of_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "TIME_SHARE", 1e9)
    answer = engine.submit(prompt(), SMALL, max_tokens=20)
    step(engine, 6)
    seen = look(engine, answer).request.seen_tokens
    step(engine, 2)
    assert look(engine, answer).request.seen_tokens == seen


def test_looking_changes_nothing(engine: Engine) -> None:
    def answer_of(*, is_watched: bool) -> Answer:
        answer = engine.submit(prompt(33), SMALL, max_tokens=12)
        while engine.core.scheduler.has_work:
            engine.step()
            if is_watched:
                look(engine, answer, StreamChoice())
        return answer

    watched, alone = answer_of(is_watched=True), answer_of(is_watched=False)
    assert watched.token_ids == alone.token_ids
    assert watched.finished.kv == alone.finished.kv
    engine.core.runner.table.check_invariants()


def test_no_picture_is_taken_of_a_running_request_that_nobody_looks_at(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[RequestState] = []
    take = pictures._take

    def noted(state: RequestState, table: SequenceTable) -> pictures.CachePicture:
        taken.append(state)
        return take(state, table)

    monkeypatch.setattr(pictures, "_take", noted)
    answer = engine.submit(prompt(), SMALL, max_tokens=20)
    step(engine, 12)
    assert taken == []
    engine.abort(answer)
    assert taken == [answer.state]


def test_a_picture_for_which_there_is_no_memory_costs_no_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_row: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(engine.core.runner.table, "page_positions", refuse)
    answer = engine.submit(prompt(), SMALL, max_tokens=6)
    engine.run()
    assert answer.finished.completion_tokens == 6
    assert engine.core.picture(answer.state.request.request_id) is None
    assert engine.core.runner.table.open_rows == ()


# ---- over HTTP ---------------------------------------------------------------------------------------------------

STATS = replace(
    RUNNING,
    prompt_tokens=3,
    completion_tokens=2,
    seen_tokens=4,
    entries_logical=24,
    entries_physical=8,
    layer_entries=(5, 3),
    evicted_entries=16,
    peak_entries=20,
)


def detail_of(request_id: str, choice: StreamChoice | None) -> KvDetail | None:
    if request_id != "chatcmpl-1":
        return None
    chosen = None if choice is None else (StreamPositions(layer=0, head=2, positions=(0, 3)),)
    return KvDetail(
        request=STATS,
        age_seconds=0.01,
        head_entries=((1, 2, 2), (1, 1, 1)),
        token_streams=(6, 0, 1, 1),
        positions=chosen,
    )


@pytest.fixture
def scripted() -> ScriptedEngine:
    engine = ScriptedEngine()
    engine.detail = detail_of
    return engine


@pytest.fixture
def client(scripted: ScriptedEngine) -> Iterator[httpx.Client]:
    with serving(scripted) as address, httpx.Client(base_url=address) as client:
        yield client


def test_the_wire_says_it_all(client: httpx.Client) -> None:
    answer = client.get("/v1/kv/chatcmpl-1")
    assert answer.headers["cache-control"] == "no-store"
    body: dict[str, Any] = answer.json()
    assert body["id"] == "chatcmpl-1"
    assert body["object"] == "kv.request"
    assert (body["num_layers"], body["num_heads"]) == (2, 3)
    assert body["head_entries"] == [[1, 2, 2], [1, 1, 1]]
    assert body["token_streams"] == [6, 0, 1, 1]
    assert (body["entries_logical"], body["entries_physical"]) == (24, 8)
    assert body["budget"]["kv_budget"] == INFO.budget.memory_size
    assert body["positions"] is None
    assert client.get("/v1/kv/chatcmpl-1", params={"layer": 0, "head": 2}).json()["positions"] == [
        {"layer": 0, "head": 2, "positions": [0, 3]}
    ]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/kv/chatcmpl-2", 404, "request_not_found"),
        ("/v1/kv/chatcmpl-1?layer=2", 400, "invalid_value"),
        ("/v1/kv/chatcmpl-1?head=3", 400, "invalid_value"),
        ("/v1/kv/chatcmpl-1?layer=-1", 400, "invalid_value"),
    ],
)
def test_what_is_not_there_is_said(client: httpx.Client, path: str, status: int, code: str) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (TooManyPositions("9 positions are more than 3"), 400, "too_many_positions"),
        (TimeoutError(), 503, "engine_busy"),
    ],
)
def test_an_engine_that_cannot_tell_says_why(
    scripted: ScriptedEngine, client: httpx.Client, error: Exception, status: int, code: str
) -> None:
    def refuse(_id: str, _choice: StreamChoice | None) -> KvDetail | None:
        raise error

    scripted.detail = refuse
    answer = client.get("/v1/kv/chatcmpl-1?positions=true")
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert (status == 503) == ("retry-after" in answer.headers)


@pytest.mark.parametrize("is_streaming", [True, False])
def test_an_answers_id_is_in_a_header_before_its_first_token(client: httpx.Client, is_streaming: bool) -> None:
    body = {"model": "tiny/model", "messages": [{"role": "user", "content": "hello"}], "stream": is_streaming}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.headers["x-trimkv-id"] in answer.text

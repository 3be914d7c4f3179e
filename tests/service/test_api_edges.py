from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest

from service.app import create_app
from service.engine.interface import (
    EngineState,
    Event,
    Failed,
    FinishReason,
    GenerationRequest,
    SubmitError,
)
from service.metrics import Metrics
from service.port import PortError, open_port
from service.server import Server
from service.settings import Settings
from tests.service.scripted import (
    KV,
    RUNNING,
    CountingChatFormat,
    ScriptedEngine,
    delta,
    finished,
    hang,
    say,
    serving,
    wait_for,
)

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny/model", "messages": [{"role": "user", "content": "hello"}]}
KV_BODY = {name: getattr(KV, name) for name in KV.__slots__}


@contextlib.contextmanager
def client_of(engine: ScriptedEngine, **settings: object) -> Iterator[httpx.Client]:
    with serving(engine, **settings) as address, httpx.Client(base_url=address, timeout=10) as client:
        yield client


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream; everything but the closing mark as JSON."""
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


def test_an_answer_at_once_has_openais_shape_and_our_usage() -> None:
    engine = ScriptedEngine()
    with client_of(engine) as client:
        answer = client.post(CHAT, json=BODY).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"] == engine.submitted[0].request_id
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "kv": KV_BODY}


def test_a_stream_begins_with_the_role_and_ends_with_done() -> None:
    with client_of(ScriptedEngine(say(delta("Hel", 1), delta("", 2), finished("lo", 3)))) as client:
        response = client.post(CHAT, json=BODY | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache, no-transform"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    chunks = events(response)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_the_usage_chunk_comes_only_when_asked_for() -> None:
    with client_of(ScriptedEngine()) as client:
        response = client.post(CHAT, json=BODY | {"stream": True, "stream_options": {"include_usage": True}})
    *chunks, last = events(response)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "kv": KV_BODY}
    assert all(chunk["usage"] is None for chunk in chunks)


def test_continuous_usage_stands_in_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    with client_of(ScriptedEngine(say(delta("", 1), delta("a", 2), finished("", 3)))) as client:
        response = client.post(CHAT, json=BODY | {"stream": True, "stream_options": options})
    assert [chunk["usage"]["completion_tokens"] for chunk in events(response)] == [1, 1, 2, 3, 3]


def test_the_official_client_reads_both_ways() -> None:
    with serving(ScriptedEngine()) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        messages: Any = BODY["messages"]
        whole = client.chat.completions.create(model="tiny/model", messages=messages, extra_body={"kv_budget": 32})
        assert whole.choices[0].message.content == "Hello"
        assert whole.usage is not None
        assert whole.usage.kv["budget_entries"] == 384  # type: ignore[attr-defined]
        stream = client.chat.completions.create(
            model="tiny/model", messages=messages, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello"
        assert chunks[-1].usage is not None
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError, match="kv_budget"):
            client.chat.completions.create(model="tiny/model", messages=messages, extra_body={"kv_budget": -1})
        assert client.models.list().data[0].id == "tiny/model"
        assert client.models.retrieve("tiny/model").max_model_len == 1000  # type: ignore[attr-defined]


def test_an_error_after_the_200_is_an_event_before_done() -> None:
    with client_of(ScriptedEngine(say(delta("a", 1), Failed(message="the step broke")))) as client:
        response = client.post(CHAT, json=BODY | {"stream": True})
        assert response.status_code == 200
        error = events(response)[-1]["error"]
        assert error["message"] == "the step broke"
        assert error["type"] == "server_error"
        response = client.post(CHAT, json=BODY)
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "the step broke"


def test_the_official_client_raises_an_error_in_a_stream() -> None:
    with serving(ScriptedEngine(say(delta("a", 1), Failed(message="the step broke")))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        with pytest.raises(openai.APIError, match="the step broke"):
            list(client.chat.completions.create(**BODY, stream=True))


def test_an_answer_cut_short_by_the_shutdown_may_be_asked_for_again() -> None:
    with client_of(ScriptedEngine(say(delta("a", 1), finished("", 1, FinishReason.ABORT)))) as client:
        response = client.post(CHAT, json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert response.headers["retry-after"]


@pytest.mark.parametrize("is_streaming", [True, False])
def test_an_abort_or_a_missing_end_is_never_sent_as_an_answer(is_streaming: bool) -> None:
    async def broken(request: GenerationRequest) -> AsyncIterator[Event]:
        yield delta("a", 1)
        raise RuntimeError("secret")

    for script in (say(delta("a", 1), finished("", 1, FinishReason.ABORT)), say(delta("a", 1)), broken):
        with client_of(ScriptedEngine(script)) as client:
            response = client.post(CHAT, json=BODY | {"stream": is_streaming})
        if is_streaming:
            assert "error" in events(response)[-1]
        else:
            assert response.status_code >= 500
        assert "secret" not in response.text


def test_a_client_that_leaves_a_stream_is_aborted_and_nobody_else() -> None:
    engine = ScriptedEngine(hang)
    with client_of(engine) as client, client.stream("POST", CHAT, json=BODY | {"stream": True}) as other:
        other_lines = other.iter_lines()
        next(other_lines)
        with client.stream("POST", CHAT, json=BODY | {"stream": True}) as response:
            next(response.iter_lines())
        wait_for(lambda: engine.aborted)
        assert engine.aborted == [engine.submitted[1].request_id]


def test_a_client_that_leaves_while_the_whole_answer_is_made_is_aborted() -> None:
    engine = ScriptedEngine(hang)
    with client_of(engine) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=BODY, timeout=0.5)
        wait_for(lambda: engine.aborted)
    assert engine.aborted == [engine.submitted[0].request_id]


def test_a_client_that_leaves_before_the_stream_begins_is_aborted() -> None:
    engine = ScriptedEngine(hang)
    body = json.dumps(BODY | {"stream": True}).encode()
    with serving(engine) as address:
        port = int(address.rsplit(":", 1)[1])
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
        wait_for(lambda: len(engine.submitted) == len(set(engine.aborted)))
        assert {request.request_id for request in engine.submitted} == set(engine.aborted)


def test_a_silent_stream_carries_comments_never_events() -> None:
    engine = ScriptedEngine(say(finished("x", 1), pause=0.5))
    with client_of(engine, keepalive_seconds=0.1) as client:
        response = client.post(CHAT, json=BODY | {"stream": True})
    lines = [line for line in response.text.split("\n") if line]
    assert lines.count(": ping") >= 2
    assert all(line.startswith("data: ") or line == ": ping" for line in lines)


def test_what_a_request_asks_for_reaches_the_engine() -> None:
    engine = ScriptedEngine()
    with client_of(engine) as client:
        client.post(
            CHAT, json=BODY | {"kv_budget": 32, "priority": -3, "seed": 7, "max_completion_tokens": 9, "max_tokens": 5}
        )
        client.post(CHAT, json=BODY)
        client.post(CHAT, json=BODY | {"kv_budget": 0})
    first, second, third = engine.submitted
    assert (first.budget.memory_size, first.priority, first.sampling.seed) == (32, -3, 7)
    assert first.sampling.max_tokens == 9
    assert second.sampling.max_tokens == 995
    assert third.sampling.max_tokens == 995
    assert list(first.prompt_ids) == [1] * 5
    assert engine.slots_held == 0


def test_min_tokens_lengthen_a_dense_answer_without_a_limit() -> None:
    engine = ScriptedEngine()
    with client_of(engine, default_max_tokens=10) as client:
        assert client.post(CHAT, json=BODY | {"kv_budget": 0, "min_tokens": 30}).status_code == 200
    assert engine.submitted[0].sampling.max_tokens == 30


def test_a_request_turned_away_while_the_tokenizer_loads_is_counted() -> None:
    app = create_app(settings=Settings(model="tiny/model"), engine=ScriptedEngine(), metrics=Metrics())
    with pytest.raises(SubmitError):
        app.state.context.check_ready()
    count = app.state.context.metrics.registry.get_sample_value(
        "trimkv_admission_rejections_total", {"reason": "not_ready"}
    )
    assert count == 1


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_a_probe_may_ask_for_the_head_alone(path: str) -> None:
    engine = ScriptedEngine()
    with client_of(engine) as client:
        response = client.head(path)
        assert (response.status_code, response.content) == (200, b"")
        engine.state = EngineState.FAILED
        assert client.head(path).status_code == 503


def test_health_follows_the_engine() -> None:
    engine = ScriptedEngine()
    with client_of(engine, watchdog_seconds=2) as client:

        def status(path: str) -> int:
            return client.get(path).status_code

        assert [status("/health/live"), status("/health/ready"), status("/health")] == [200, 200, 200]
        engine.last_step_age_seconds = 1.9
        assert status("/health/live") == 200
        engine.last_step_age_seconds = 2.1
        assert [status("/health/live"), status("/health/ready")] == [503, 200]
        engine.last_step_age_seconds = 0.0
        for state in (EngineState.LOADING, EngineState.DRAINING):
            engine.state = state
            assert [status("/health/live"), status("/health/ready"), status("/health")] == [200, 503, 503]
        engine.state = EngineState.FAILED
        assert [status("/health/live"), status("/health/ready")] == [503, 503]
        assert client.get("/v1/models").status_code == 503
        assert client.get("/metrics").status_code == 200


def test_models_lists_every_served_name() -> None:
    with client_of(ScriptedEngine(), served_model_name=("a", "b/c")) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["a", "b/c"]
        card = client.get("/v1/models/b/c").json()
        assert (card["object"], card["max_model_len"], card["has_gates"], card["kv_budget"]) == (
            "model",
            1000,
            True,
            64,
        )
        assert client.get("/v1/models/tiny/model").status_code == 404
        assert client.post(CHAT, json=BODY | {"model": "b/c"}).json()["model"] == "b/c"


def test_kv_shows_the_pool_and_every_running_request() -> None:
    engine = ScriptedEngine()
    engine.running = (RUNNING,)
    with client_of(engine) as client:
        body = client.get("/v1/kv").json()
    pool = body["pool"]
    assert (pool["pages_used"] + pool["pages_free"], pool["usage"]) == (pool["pages_total"], 0.25)
    request = body["requests"][0]
    assert (request["id"], request["entries_physical"], request["layer_entries"]) == ("chatcmpl-1", 40, [18, 22])
    assert (request["budget"]["kv_budget"], request["budget"]["kv_strategy"]) == (64, "fixed_budget")
    assert body["queue"] == {"requests": 2, "prompt_tokens": 12, "by_reason": {"capacity": 2}}


def test_the_openapi_document_describes_the_body_and_leaves_no_reference_open() -> None:
    with client_of(ScriptedEngine()) as client:
        document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert "kv_budget" in schemas["ChatCompletionRequest"]["properties"]
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))
    assert "ChatCompletionRequest" in references
    assert set(references) <= set(schemas)


# ---- the process -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_of(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, str, threading.Thread]]:
    """The server that the command line runs, on a thread."""
    monkeypatch.setattr("service.app.ChatFormat.load", lambda path: CountingChatFormat())
    settings = Settings(model="tiny/model", drain_timeout=5)
    listener = open_port("127.0.0.1", 0)
    server = Server(create_app(settings=settings, engine=engine, metrics=Metrics()), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server, f"http://127.0.0.1:{listener.getsockname()[1]}", thread
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def test_the_port_opens_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    engine.state = EngineState.LOADING
    with process_of(engine, monkeypatch) as (_, address, _), httpx.Client(base_url=address) as client:
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
        assert client.get("/metrics").status_code == 200
        refusal = client.post(CHAT, json=BODY)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "not_ready")
        engine.state = EngineState.READY
        wait_for(lambda: client.get("/health/ready").status_code == 200)
        assert client.post(CHAT, json=BODY).status_code == 200


def test_a_signal_lets_the_running_answer_end_and_takes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class DrainingEngine(ScriptedEngine):
        async def drain(self, timeout_seconds: float) -> None:
            self.state = EngineState.DRAINING
            await asyncio.sleep(1.2)
            self.drained.set()

    engine = DrainingEngine(say(delta("a", 1), finished("b", 2), pause=0.4))
    with process_of(engine, monkeypatch) as (server, address, thread), httpx.Client(base_url=address) as client:
        wait_for(lambda: client.get("/health/ready").status_code == 200)
        with client.stream("POST", CHAT, json=BODY | {"stream": True}) as response:
            server.handle_exit(15, None)
            wait_for(lambda: engine.state is EngineState.DRAINING)
            refusal = httpx.post(f"{address}{CHAT}", json=BODY)
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "draining")
            response.read()
        assert events(response)[-1]["choices"][0]["finish_reason"] == "stop"
        thread.join(10)
        assert not thread.is_alive()
        assert server.exit_status == 0


def test_an_engine_that_fails_ends_the_process_with_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    engine.state = EngineState.LOADING
    with process_of(engine, monkeypatch) as (server, _, thread):
        engine.state = EngineState.FAILED
        thread.join(10)
        assert not thread.is_alive()
        assert server.exit_status == 1


def test_a_tokenizer_that_cannot_be_loaded_ends_the_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tokenizer(path: str) -> None:
        raise OSError("no such tokenizer")

    engine = ScriptedEngine()
    engine.state = EngineState.LOADING
    with process_of(engine, monkeypatch) as (server, _, thread):
        monkeypatch.setattr("service.app.ChatFormat.load", no_tokenizer)
        engine.state = EngineState.READY
        thread.join(10)
        assert not thread.is_alive()
        assert server.exit_status == 1


def test_a_taken_port_is_said_in_one_line() -> None:
    with open_port("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match=f"--port={port}") as caught:
            open_port("127.0.0.1", port)
    assert "\n" not in str(caught.value)

"""Every request leaves one last line, however it ends; a real server under `--log-format json` writes nothing else."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from service.engine.core import EngineBroken
from service.engine.interface import EngineState, Failed, RejectionReason, SubmitError
from service.logs import LoggedMetrics
from tests.service import live
from tests.service.collector import Collector, collecting
from tests.service.harness import Engine
from tests.service.scripted import ScriptedEngine, delta, say, serving, wait_for
from tests.service.test_engine_properties import build_engine
from trimkv_core.budget import Budget
from trimkv_core.pages import PoolExhausted

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny/model", "messages": [{"role": "user", "content": "hello"}]}
TRACE = "0af7651916cd43dd8448eb211c80319c"


def last_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [
        {"message": record.event, **record.fields}  # type: ignore[attr-defined]
        for record in caplog.records
        if getattr(record, "event", None) in ("finished", "refused")
    ]


# ---- turned away at the door -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        (CHAT, BODY | {"temperature": 9}, 400, "invalid_value", "temperature"),
        (CHAT, BODY | {"kv_buget": 9}, 400, "unknown_parameter", "kv_buget"),
        (CHAT, BODY | {"model": "other"}, 404, "model_not_found", "model"),
        (CHAT, BODY | {"user": "x" * 9000}, 413, "body_too_large", None),
        ("/tokenize", {"model": "tiny/model"}, 400, "missing_required_parameter", "messages"),
        ("/nowhere", BODY, 404, "not_found", None),
        ("/health", BODY, 405, "method_not_allowed", None),
    ],
)
def test_a_refused_request_leaves_one_line(
    caplog: pytest.LogCaptureFixture, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    with caplog.at_level(logging.INFO), serving(ScriptedEngine(), max_body_bytes=5000) as address:
        answer = httpx.post(f"{address}{path}", json=body, headers={"X-Request-Id": "mine-1"})
    assert answer.status_code == status
    assert last_lines(caplog) == [
        {
            "message": "refused",
            "http_request_id": "mine-1",
            "path": path,
            "status": status,
            "code": code,
            "param": param,
        }
    ]


@pytest.mark.parametrize("reason", list(RejectionReason))
def test_a_request_that_the_engine_does_not_take_leaves_one_line(
    caplog: pytest.LogCaptureFixture, reason: RejectionReason
) -> None:
    engine = ScriptedEngine()
    engine.refusal = SubmitError(reason, "no room")
    with caplog.at_level(logging.INFO), serving(engine) as address:
        answer = httpx.post(f"{address}{CHAT}", json=BODY)
    (line,) = last_lines(caplog)
    assert (line["message"], line["status"], line["code"]) == ("refused", answer.status_code, reason.value)
    assert line["http_request_id"] == answer.headers["x-request-id"]


def test_a_request_before_the_model_is_loaded_leaves_one_line(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine()
    engine.state = EngineState.LOADING
    with caplog.at_level(logging.INFO), serving(engine) as address:
        httpx.post(f"{address}{CHAT}", json=BODY)
        httpx.get(f"{address}/health/ready")
    (line,) = last_lines(caplog)
    assert (line["status"], line["code"]) == (503, "not_ready")


def test_a_client_that_leaves_before_its_request_is_read_leaves_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), serving(ScriptedEngine()) as address:
        host, _, port = address.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        wait_for(lambda: last_lines(caplog))
    (line,) = last_lines(caplog)
    assert (line["status"], line["code"]) == (499, "client_disconnected")


def test_an_unforeseen_error_is_one_line_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = ScriptedEngine()
    engine.refusal = RuntimeError("never thought of")  # type: ignore[assignment]
    with caplog.at_level(logging.INFO), serving(engine) as address:
        assert httpx.post(f"{address}{CHAT}", json=BODY).status_code == 500
    (record,) = (record for record in caplog.records if record.exc_info)
    assert record.message == f"unforeseen error path={CHAT}"
    assert last_lines(caplog) == []


@pytest.mark.parametrize("is_streaming", [True, False])
def test_an_answer_that_failed_in_the_engine_was_not_refused(
    caplog: pytest.LogCaptureFixture, is_streaming: bool
) -> None:
    engine = ScriptedEngine(say(delta("a", 1), Failed(message="the engine failed")))
    with caplog.at_level(logging.INFO), serving(engine) as address:
        answer = httpx.post(f"{address}{CHAT}", json=BODY | {"stream": is_streaming})
    assert answer.headers["x-trimkv-id"] == engine.submitted[0].request_id
    assert "the engine failed" in answer.text
    assert last_lines(caplog) == []  # its line is the engine's, and this one writes none


# ---- ended by the engine ---------------------------------------------------------------------------------------------


def logged_engine() -> Engine:
    engine = build_engine()
    engine.core._observer = LoggedMetrics()
    return engine


def reasons(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str | None]]:
    return [(line["reason"], line["abort"]) for line in last_lines(caplog)]


def test_answers_and_aborts_leave_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    engine = logged_engine()
    with caplog.at_level(logging.INFO):
        engine.submit([1, 2, 3], Budget(memory_size=4), max_tokens=2)
        running = engine.submit([1] * 10, Budget.dense(), max_tokens=30)
        engine.step()
        waiting = engine.submit([1] * 10, Budget.dense(), max_tokens=70)
        engine.step()
        assert waiting.state.row is None
        for leaving in (waiting, running, running):
            engine.abort(leaving)
        engine.run()
    assert sorted(reasons(caplog)) == [
        ("abort", "client_disconnected"),
        ("abort", "client_disconnected"),
        ("length", None),
    ]
    assert len({line["id"] for line in last_lines(caplog)}) == 3


def test_requests_of_a_failed_step_leave_one_line_each(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = logged_engine()
    with caplog.at_level(logging.INFO), monkeypatch.context() as patch:
        patch.setattr(engine.loaded._decoder, "forward", lambda *_args: 1 / 0)
        for _ in range(2):
            engine.submit([1, 2, 3], Budget(memory_size=4), max_tokens=9)
        engine.step()
    assert reasons(caplog) == [("error", None)] * 2
    assert len({line["id"] for line in last_lines(caplog)}) == 2


def test_requests_of_an_engine_that_ends_leave_one_line_each(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = logged_engine()

    def leak_a_page(*_args: Any) -> None:
        engine.core.runner.table.pool.allocate(1)
        raise PoolExhausted("made up")

    monkeypatch.setattr(engine.loaded._decoder, "forward", leak_a_page)
    with caplog.at_level(logging.INFO):
        engine.submit([1, 2, 3], Budget(memory_size=4))
        engine.step()
        engine.submit([1, 2, 3], Budget(memory_size=4))
        engine.submit([1] * 10, Budget.dense(), max_tokens=70)
        with pytest.raises(EngineBroken):
            engine.step()
    assert reasons(caplog) == [("error", None)] * 3
    assert len({line["id"] for line in last_lines(caplog)}) == 3


# ---- a real server ---------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "What is the capital of France, and of Kyrgyzstan?"}]
LONG = {"max_tokens": 6000, "ignore_eos": True}


@dataclass
class Said:
    """What a server wrote and told while it met a day's clients."""

    raw: list[str]
    collector: Collector

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.raw]

    @property
    def last(self) -> dict[str, dict[str, Any]]:
        return {line["http_request_id"]: line for line in self.lines if line["message"] in ("finished", "refused")}


@pytest.fixture(scope="module")
def said() -> Iterator[Said]:
    with collecting() as collector:
        flags = ("--log-format", "json", "--max-num-seqs", "1", "--kv-memory", "200MB", "--drain-timeout", "1")
        with live.serving(*flags, OTEL_EXPORTER_OTLP_ENDPOINT=collector.address) as server:
            _meet_clients(server)
            assert server.process.wait(60) == 0
            live.wait_for(lambda: "Finished server process" in "".join(server.lines), "the last line")
        yield Said(server.lines, collector)


def _meet_clients(server: live.Live) -> None:
    url = f"{server.url}{CHAT}"

    def ask(name: str, **fields: Any) -> dict[str, Any]:
        body = {"model": "embedded", "messages": QUESTION, "temperature": 0, "max_tokens": 5, "kv_budget": 16}
        headers = {"X-Request-Id": name, "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        return {"url": url, "json": body | fields, "headers": headers, "timeout": 120}

    httpx.post(**ask("whole"))
    httpx.post(**ask("streamed", stream=True))
    httpx.post(**ask("refused", temperature=9))
    with httpx.stream("POST", **ask("left", stream=True, **LONG)) as answer:
        lines = answer.iter_lines()  # one that nobody holds closes the connection
        next(lines)
        live.wait_for(lambda: bool(server.kv()["requests"]), "a running request")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(**ask("left-waiting", priority=1) | {"timeout": 0.5})
        live.wait_for(lambda: not server.kv()["queue"]["requests"], "the waiting request's departure")
    live.wait_for(lambda: not server.kv()["requests"], "the running request's departure")
    for path in ("/health", "/metrics", "/v1/kv", "/v1/models"):
        httpx.get(f"{server.url}{path}", timeout=60)
    with httpx.stream("POST", **ask("cut", stream=True, **LONG)) as answer:
        lines = answer.iter_lines()
        next(lines)
        threading.Thread(target=server.process.terminate).start()
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_all_that_a_server_writes_is_json(said: Said) -> None:
    assert said.raw
    for line in said.lines:
        assert {"time", "level", "logger", "message"} <= set(line)
    loggers = {line["logger"] for line in said.lines}
    assert {"uvicorn.error", "uvicorn.access", "service.logs", "service.engine.loader"} <= loggers


def test_each_of_its_requests_leaves_one_last_line(said: Said) -> None:
    names = Counter(line["http_request_id"] for line in said.lines if line["message"] in ("finished", "refused"))
    assert names == dict.fromkeys(("whole", "streamed", "refused", "left", "left-waiting", "cut"), 1)
    ends = {name: (line.get("reason"), line.get("abort")) for name, line in said.last.items()}
    assert ends == {
        "whole": ("length", None),
        "streamed": ("length", None),
        "refused": (None, None),
        "left": ("abort", "client_disconnected"),
        "left-waiting": ("abort", "client_disconnected"),
        "cut": ("abort", "shutdown"),
    }
    assert said.last["refused"]["status"] == 400
    assert {name: line["stream"] for name, line in said.last.items() if "stream" in line} == {
        "whole": False,
        "streamed": True,
        "left": True,
        "left-waiting": False,
        "cut": True,
    }


def test_the_line_has_the_figures_an_operator_asks_for(said: Said) -> None:
    line = said.last["whole"]
    assert line["id"].startswith("chatcmpl-")
    assert (line["model"], line["completion_tokens"], line["kv_budget"]) == ("embedded", 5, 16)
    assert line["retained"] + line["evicted"] == (line["prompt_tokens"] + 4) * 90
    assert 0 <= line["queue_s"] < line["ttft_s"] < line["e2e_s"]
    assert "ttft_s" not in said.last["left-waiting"]


def test_its_access_log_is_quiet_and_knows_the_request(said: Said) -> None:
    access = [line for line in said.lines if line["logger"] == "uvicorn.access"]
    assert {line["path"] for line in access} == {CHAT, "/v1/models"}
    statuses = {line["http_request_id"]: line["status"] for line in access if line["path"] == CHAT}
    assert statuses["whole"] == 200
    assert statuses["refused"] == 400


def test_no_line_and_no_span_repeats_a_prompt(said: Said) -> None:
    assert "Kyrgyzstan" not in "".join(said.raw)
    assert b"Kyrgyzstan" not in b"".join(body for bodies in said.collector.bodies.values() for body in bodies)


def test_its_spans_are_the_requests_that_reached_the_engine(said: Said) -> None:
    spans = [span for span in said.collector.spans() if span.name == "chat embedded"]
    ids = {
        attribute.value.string_value
        for span in spans
        for attribute in span.attributes
        if attribute.key == "gen_ai.response.id"
    }
    assert ids == {line["id"] for line in said.last.values() if "id" in line}
    assert len(spans) == 5
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert "gen_ai.server.time_to_first_token" in said.collector.metrics()

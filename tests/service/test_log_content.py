"""Over real HTTP: prompts and answers are in no line of the log, at any level, unless asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.logs import LoggedMetrics, setup_logging
from tests.service.scripted import ScriptedEngine, delta, finished, say, serving

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "an unheard-of question"}]
BODY: dict[str, Any] = {"model": "tiny/model", "messages": MESSAGES}


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:], logger.level = handlers, level
    logging.captureWarnings(False)


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("is_asked", [True, False])
def test_prompts_and_answers_are_logged_only_if_asked(
    capsys: pytest.CaptureFixture[str], is_asked: bool, is_streaming: bool
) -> None:
    setup_logging("debug", log_format="json")
    engine = ScriptedEngine(say(delta("a most ", 1), finished("secret answer")))
    with serving(engine, metrics=LoggedMetrics(), log_content=is_asked) as address:
        answer = httpx.post(f"{address}{CHAT}", json=BODY | {"stream": is_streaming})
    assert answer.status_code == 200
    said = capsys.readouterr().err
    content = [line for line in map(json.loads, said.splitlines()) if line["message"] == "content"]
    if is_asked:
        (line,) = content
        assert (line["messages"], line["answer"]) == (MESSAGES, "a most secret answer")
        assert line["http_request_id"] == answer.headers["x-request-id"]
        assert "prompts and answers are logged" in said
    else:
        assert '"path": "/v1/chat/completions", "status": 200' in said
        assert not content
        for secret in ("unheard-of", "a most ", "secret answer"):
            assert secret not in said


@pytest.mark.parametrize("is_asked", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        BODY | {"temperature": 9},
        BODY | {"messages": [{"role": "user", "content": {"text": "an unheard-of question"}}]},
        BODY | {"messages": [{"role": "unheard-of", "content": "a question"}]},
        BODY | {"stop": ["unheard-of"] * 99},
        BODY | {"user": "unheard-of"},
    ],
)
def test_a_refusal_does_not_repeat_what_was_asked(
    capsys: pytest.CaptureFixture[str], body: dict[str, Any], is_asked: bool
) -> None:
    setup_logging("debug", log_format="json")
    engine = ScriptedEngine()
    if "user" in body:
        engine.refusal = RuntimeError("never thought of")  # type: ignore[assignment]
    with serving(engine, log_content=is_asked) as address:
        assert httpx.post(f"{address}{CHAT}", json=body).status_code in (400, 500)
    said = capsys.readouterr().err
    assert '"path": "/v1/chat/completions"' in said
    assert "unheard-of" not in said


def test_where_a_request_came_from_reaches_the_engine() -> None:
    engine = ScriptedEngine()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(engine) as address:
        headers = {"X-Request-Id": "mine-7", "traceparent": parent, "cookie": "a=b"}
        httpx.post(f"{address}{CHAT}", json=BODY | {"stream": True}, headers=headers)
    (request,) = engine.submitted
    assert request.origin.http_request_id == "mine-7"
    assert request.origin.model == "tiny/model"
    assert request.origin.is_streaming is True
    assert dict(request.origin.trace_headers) == {"traceparent": parent}

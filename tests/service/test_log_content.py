"""Over real HTTP: prompts and answers are in no line of the log, at any level, unless asked for."""

from __future__ import annotations

import logging

import httpx
import pytest

from service.logs import LoggedMetrics
from tests.service.scripted import ScriptedEngine, delta, finished, say, serving

BODY = {"model": "tiny/model", "messages": [{"role": "user", "content": "an unheard-of question"}]}


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("is_asked", [True, False])
def test_prompts_and_answers_are_logged_only_if_asked(
    caplog: pytest.LogCaptureFixture, is_asked: bool, is_streaming: bool
) -> None:
    engine = ScriptedEngine(say(delta("a most ", 1), finished("secret answer")))
    with (
        caplog.at_level(logging.DEBUG),
        serving(engine, metrics=LoggedMetrics(), log_content=is_asked) as address,
    ):
        answer = httpx.post(f"{address}/v1/chat/completions", json=BODY | {"stream": is_streaming})
        refused = httpx.post(f"{address}/v1/chat/completions", json=BODY | {"temperature": 9})
    assert answer.status_code == 200
    assert refused.status_code == 400
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert ("unheard-of question" in said) is is_asked
    assert ("a most secret answer" in said) is is_asked


def test_where_a_request_came_from_reaches_the_engine() -> None:
    engine = ScriptedEngine()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(engine) as address:
        headers = {"X-Request-Id": "mine-7", "traceparent": parent, "cookie": "a=b"}
        httpx.post(f"{address}/v1/chat/completions", json=BODY, headers=headers)
    (request,) = engine.submitted
    assert request.origin.http_request_id == "mine-7"
    assert request.origin.model == "tiny/model"
    assert dict(request.origin.trace_headers) == {"traceparent": parent}

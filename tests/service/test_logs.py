"""What is logged, in which form, and what never is."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from service.engine.interface import (
    AbortReason,
    Event,
    Finished,
    FinishReason,
    RequestOrigin,
    TextDelta,
)
from service.logs import (
    JsonFormatter,
    LoggedMetrics,
    current_http_request,
    is_worth_logging,
    log_content,
    log_event,
    log_refused,
    setup_logging,
)
from service.settings import SettingsError, load_settings
from tests.service import scripted

ENDED = replace(scripted.ENDED, origin=RequestOrigin(http_request_id="req-7", model="tiny/model", is_streaming=True))


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, as it was afterwards."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], logger.level = handlers, level
    logging.captureWarnings(False)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def access(path: str, status: int) -> logging.LogRecord:
    arguments = ("127.0.0.1:1", "GET", path, "1.1", status)
    return logging.LogRecord("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', arguments, None)


def test_an_ended_request_is_one_json_line(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", log_format="json")
    LoggedMetrics().on_finished(ENDED)
    (line,) = lines_of(capsys)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "service.logs",
        "message": "finished",
        "id": "chatcmpl-1",
        "http_request_id": "req-7",
        "model": "tiny/model",
        "stream": True,
        "reason": "stop",
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "kv_budget": 64,
        "retained": 6,
        "evicted": 6,
        "evictions": 1,
        "peak_bytes": 480,
        "queue_s": 0.1,
        "ttft_s": 0.2,
        "e2e_s": 1.0,
    }


def test_a_request_that_never_began_has_no_made_up_figures(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("info", log_format="json")
    aborted = replace(
        ENDED,
        finish_reason=FinishReason.ABORT,
        abort_reason=AbortReason.CLIENT,
        kv=None,
        budget_entries_per_stream=None,
        time_to_first_token=None,
    )
    LoggedMetrics().on_finished(aborted)
    (line,) = lines_of(capsys)
    assert line["abort"] == "client_disconnected"
    assert line["kv_budget"] == "dense"
    assert not {"retained", "evicted", "peak_bytes", "ttft_s"} & set(line)


def test_the_same_line_for_a_person(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info")
    LoggedMetrics().on_finished(ENDED)
    (line,) = capsys.readouterr().err.splitlines()
    said = "finished id=chatcmpl-1 http_request_id=req-7 model=tiny/model stream=true reason=stop"
    assert f"INFO    service.logs: {said}" in line
    assert "kv_budget=64 retained=6 evicted=6" in line
    assert "ttft_s=0.200" in line


def test_an_exception_stays_on_its_json_line(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", log_format="json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("service.somewhere").exception("it broke at %d", 7)
    (line,) = lines_of(capsys)
    assert line["message"] == "it broke at 7"
    assert line["level"] == "error"
    assert "ValueError: two\nlines" in line["exception"]


def test_text_from_outside_cannot_begin_a_line(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info")
    log_event("finished", {"model": 'a\nfinished id="forged"'})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r'model="a\nfinished id=\"forged\""')


def test_a_refusal_is_one_line_without_the_words_of_the_client(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("info", log_format="json")
    current = current_http_request.set("req-9")
    log_refused(path="/v1/chat/completions", status=400, code="invalid_value", param="messages[0].content")
    current_http_request.reset(current)
    (line,) = lines_of(capsys)
    del line["time"]
    assert line == {
        "level": "info",
        "logger": "service.logs",
        "message": "refused",
        "http_request_id": "req-9",
        "path": "/v1/chat/completions",
        "status": 400,
        "code": "invalid_value",
        "param": "messages[0].content",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_every_line_of_a_request_has_its_id_once(
    root: logging.Logger, capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    setup_logging("info", log_format=log_format)
    current = current_http_request.set("req-9")
    logging.getLogger("uvicorn.access").handle(access("/v1/models", 200))
    logging.getLogger("service.somewhere").info("said of req-9")
    log_refused(path="/", status=404, code=None)
    current_http_request.reset(current)
    logging.getLogger("service.somewhere").info("said of nobody")
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "req-9" not in last
    if log_format == "json":
        assert [json.loads(line)["http_request_id"] for line in lines] == ["req-9"] * 3
    else:
        assert [line.count("req-9") for line in lines] == [1, 1, 1]


def test_libraries_and_warnings_speak_in_the_same_form(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("transformers")
    before, propagates = library.handlers[:], library.propagate
    library.handlers[:], library.propagate = [logging.StreamHandler()], False
    try:
        setup_logging("info", log_format="json")
        library.warning("what a library warns of")
        warnings.warn("what Python warns of", stacklevel=1)
        logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    finally:
        library.handlers[:], library.propagate = before, propagates
    said = lines_of(capsys)
    assert [line["logger"] for line in said] == ["transformers", "py.warnings", "uvicorn.error"]
    assert said[2]["message"] == "Started server process [7]"


def test_a_json_line_is_one_line_in_any_encoding(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", log_format="json")
    log_event("content", {"answer": "日本\u2028\x85\ud800\n🌈"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isascii()
    assert json.loads(line)["answer"] == "日本\u2028\x85\ud800\n🌈"


def test_the_access_log_has_fields_too() -> None:
    line = json.loads(JsonFormatter().format(access("/v1/models", 200)))
    assert (line["method"], line["path"], line["status"]) == ("GET", "/v1/models", 200)


@pytest.mark.parametrize(
    ("path", "status", "is_logged"),
    [
        ("/health", 200, False),
        ("/health/ready", 503, False),
        ("/metrics", 200, False),
        ("/metrics", 500, True),
        ("/healthy", 200, True),
        ("/v1/kv", 200, False),
        ("/v1/kv/chatcmpl-1?layer=2", 200, False),
        ("/v1/kv/chatcmpl-1", 404, True),
        ("/v1/chat/completions", 200, True),
        ("/", 200, True),
    ],
)
def test_probes_and_watching_pages_stay_out_of_the_access_log(path: str, status: int, is_logged: bool) -> None:
    assert is_worth_logging(access(path, status)) is is_logged


async def some_events() -> AsyncIterator[Event]:
    yield TextDelta(text="a sec", token_ids=(7,), prompt_tokens=5, completion_tokens=1)
    yield Finished(
        text="ret", token_ids=(), finish_reason=FinishReason.STOP, prompt_tokens=5, completion_tokens=2, kv=scripted.KV
    )


async def test_content_is_written_once_and_handed_on_whole(caplog: pytest.LogCaptureFixture) -> None:
    messages = [{"role": "user", "content": "whisper"}]
    with caplog.at_level(logging.INFO):
        heard = [event async for event in log_content(some_events(), request_id="chatcmpl-1", messages=messages)]
    assert [type(event) for event in heard] == [TextDelta, Finished]
    (record,) = caplog.records
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["id"], line["answer"]) == ("content", "chatcmpl-1", "a secret")
    assert line["messages"] == messages


async def test_content_of_a_client_that_left_is_written_as_far_as_it_came(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        events = log_content(some_events(), request_id="chatcmpl-1", messages=[])
        await anext(events)
        await events.aclose()  # type: ignore[attr-defined]
    (record,) = caplog.records
    assert 'answer="a sec"' in record.message


def test_settings_of_the_log() -> None:
    assert load_settings([]).log_format == "text"
    assert load_settings([]).log_content is False
    assert load_settings(["--log-format", "json", "--log-content"]).log_content is True
    with pytest.raises(SettingsError, match="text or json"):
        load_settings(["--log-format", "xml"])

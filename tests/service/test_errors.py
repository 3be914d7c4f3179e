from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from service.api.errors import RETRY_AFTER_SECONDS, from_submit_error
from service.engine.interface import EngineState, RejectionReason, SubmitError
from tests.service.scripted import ScriptedEngine, serving

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny/model", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module")
def client(engine: ScriptedEngine) -> Iterator[httpx.Client]:
    with serving(engine, max_body_bytes=2000) as address, httpx.Client(base_url=address) as client:
        yield client


def envelope(response: httpx.Response) -> dict[str, str | None]:
    """The error of `response`, whose shape and request id are checked on the way."""
    assert response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("POST", CHAT + "/", 404, "not_found"),
    ],
)
def test_fastapis_own_errors_wear_the_envelope(
    client: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert envelope(response)["code"] == code


def test_a_405_says_what_is_allowed(client: httpx.Client) -> None:
    assert client.get(CHAT).headers["allow"] == "POST"


def test_an_unknown_model_is_a_404(client: httpx.Client) -> None:
    response = client.post(CHAT, json=BODY | {"model": "gpt-5"})
    assert response.status_code == 404
    error = envelope(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize("content", [b"", b"not json", b"[1, 2]"])
def test_a_broken_body_is_a_400(client: httpx.Client, content: bytes) -> None:
    response = client.post(CHAT, content=content)
    assert response.status_code == 400
    assert envelope(response)["type"] == "invalid_request_error"


def test_validation_is_a_400_never_a_422(client: httpx.Client) -> None:
    response = client.post(CHAT, json=BODY | {"temperature": 9})
    assert response.status_code == 400
    error = envelope(response)
    assert error["param"] == "temperature"
    assert error["message"] == "temperature=9 is not possible: must be a number from 0 (greedy) to 2."


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_a_413(client: httpx.Client, is_chunked: bool) -> None:
    body = json.dumps(BODY | {"user": "x" * 500_000}).encode()
    pieces = (body[start : start + 1000] for start in range(0, len(body), 1000))
    response = client.post(CHAT, content=pieces if is_chunked else body)
    assert response.status_code == 413
    assert envelope(response)["code"] == "body_too_large"


def test_an_absurd_declared_length_is_refused_unread(client: httpx.Client) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**15}\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("reason", list(RejectionReason))
def test_every_refusal_of_the_engine_has_its_status(
    client: httpx.Client, engine: ScriptedEngine, reason: RejectionReason
) -> None:
    engine.refusal = SubmitError(reason, "no room: 5 of 4 pages")
    try:
        response = client.post(CHAT, json=BODY)
    finally:
        engine.refusal = None
    error = envelope(response)
    assert error["code"] == reason
    assert error["message"] == "no room: 5 of 4 pages"
    if reason is RejectionReason.NEVER_FITS:
        assert response.status_code == 400
        assert "retry-after" not in response.headers
    else:
        assert response.status_code == 503
        assert response.headers["retry-after"] == str(RETRY_AFTER_SECONDS[reason])
    assert engine.slots_held == 0


@pytest.mark.parametrize("state", [EngineState.LOADING, EngineState.DRAINING, EngineState.FAILED])
def test_until_ready_every_post_is_a_503_even_a_broken_one(
    client: httpx.Client, engine: ScriptedEngine, state: EngineState
) -> None:
    engine.state = state
    try:
        for path in (CHAT, "/v1/completions", "/health", "/nowhere"):
            for content in (json.dumps(BODY).encode(), b"broken"):
                response = client.post(path, content=content)
                assert response.status_code == 503
                assert int(response.headers["retry-after"]) > 0
                envelope(response)
    finally:
        engine.state = EngineState.READY


def test_an_unforeseen_exception_is_a_500_that_tells_nothing_of_the_inside(
    client: httpx.Client, engine: ScriptedEngine
) -> None:
    engine.refusal = RuntimeError("secret detail")  # type: ignore[assignment]
    try:
        response = client.post(CHAT, json=BODY, headers={"X-Request-Id": "mine-1"})
    finally:
        engine.refusal = None
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "mine-1"
    assert envelope(response)["code"] == "internal_error"
    assert engine.slots_held == 0


@pytest.mark.parametrize(
    ("sent", "is_kept"), [("abc-1.2_3", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)]
)
def test_a_sane_request_id_is_echoed_and_another_replaced(client: httpx.Client, sent: str, is_kept: bool) -> None:
    for response in (
        client.get("/health", headers={"X-Request-Id": sent}),
        client.get("/x", headers={"X-Request-Id": sent}),
    ):
        assert (response.headers["x-request-id"] == sent) is is_kept
        assert response.headers["x-request-id"]


def test_prompt_and_limits_are_checked_with_the_slot_given_back(client: httpx.Client, engine: ScriptedEngine) -> None:
    response = client.post(CHAT, json=BODY | {"messages": [{"role": "user", "content": "x" * 1000}]})
    assert response.status_code == 400
    assert envelope(response)["code"] == "context_length_exceeded"
    response = client.post(CHAT, json=BODY | {"max_completion_tokens": 996, "max_tokens": 1})
    assert envelope(response)["param"] == "max_completion_tokens"
    assert engine.slots_held == 0


def test_never_fits_is_a_400_and_waiting_a_503() -> None:
    assert from_submit_error(SubmitError(RejectionReason.NEVER_FITS, "x")).status == 400
    assert from_submit_error(SubmitError(RejectionReason.QUEUE_TOKENS, "x")).status == 503

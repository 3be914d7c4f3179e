"""The shipped nginx configuration under the real nginx: before stand-ins, and before real replicas of the service."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.deploy.proxy import Proxy, free_port, nginx
from tests.service.live import Live, serving, wait_for

QUESTION = [{"role": "user", "content": "Name three colours and say in one sentence what each reminds you of."}]
SMALL = ("--kv-memory", "300MiB", "--dtype", "float32", "--max-num-seqs", "2", "--max-queue-requests", "2")


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "embedded", "messages": QUESTION, "temperature": 0, "kv_budget": 32} | fields


class StandIn:
    """A replica that answers what it is told and counts its requests."""

    def __init__(self, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers, self.seen = status, headers or {}, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.seen += 1
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def stand_ins(*statuses: int, **headers: str) -> Iterator[list[StandIn]]:
    made = [StandIn(status, {name.replace("_", "-"): value for name, value in headers.items()}) for status in statuses]
    try:
        yield made
    finally:
        for each in made:
            each.close()


def post(proxy: Proxy, **fields: Any) -> httpx.Response:
    return httpx.post(f"{proxy.url}/v1/chat/completions", json=body(**fields), timeout=60)


def test_requests_are_shared_among_replicas() -> None:
    with stand_ins(200, 200) as replicas, nginx([each.url for each in replicas]) as proxy:
        assert all(post(proxy).status_code == 200 for _ in range(20))
        assert [each.seen for each in replicas] == [10, 10]


def test_a_request_that_one_replica_cannot_take_goes_to_another() -> None:
    with stand_ins(503, 200, Retry_After="1") as (busy, idle), nginx([busy.url, idle.url]) as proxy:
        assert all(post(proxy).status_code == 200 for _ in range(20))
        assert idle.seen == 20
        assert busy.seen > 0  # it is asked again: a full queue is no failure


def test_a_replica_that_is_gone_costs_nobody_a_request() -> None:
    with stand_ins(200) as (here,), nginx([f"http://127.0.0.1:{free_port()}", here.url]) as proxy:
        assert all(post(proxy).status_code == 200 for _ in range(20))


def test_when_all_are_full_the_client_hears_so_from_one_of_them() -> None:
    with stand_ins(503, 503, Retry_After="7") as replicas, nginx([each.url for each in replicas]) as proxy:
        for _ in range(20):
            answer = post(proxy)
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "7"
        assert all(each.seen == 20 for each in replicas)


def test_errors_are_passed_on_and_not_repeated() -> None:
    with stand_ins(500, 500) as replicas, nginx([each.url for each in replicas]) as proxy:
        assert post(proxy).status_code == 500
        assert sum(each.seen for each in replicas) == 1


def test_one_requests_cache_is_found_on_whichever_replica_has_it() -> None:
    url = "/v1/kv/chatcmpl-1"
    with stand_ins(404, 404, 404, 404, 200) as replicas, nginx([each.url for each in replicas]) as proxy:
        assert all(httpx.get(proxy.url + url, timeout=60).status_code == 200 for _ in range(5))
    with stand_ins(404, 404) as replicas, nginx([each.url for each in replicas]) as proxy:
        assert httpx.get(proxy.url + url, timeout=60).status_code == 404
        assert [each.seen for each in replicas] == [1, 1]
        assert post(proxy).status_code == 404
        assert sum(each.seen for each in replicas) == 3  # any other path is asked for once


def test_what_nginx_itself_says_is_said_in_the_apis_words() -> None:
    with nginx([f"http://127.0.0.1:{free_port()}"]) as proxy:
        nobody = post(proxy)
        assert nobody.status_code == 503
        assert int(nobody.headers["Retry-After"]) >= 1
        assert nobody.headers["content-type"] == "application/json"
        assert nobody.json()["error"]["code"] == "no_replica"
        large = httpx.post(f"{proxy.url}/v1/chat/completions", content=b"x" * (17 << 20), timeout=60)
        assert large.status_code == 413
        assert large.json()["error"]["type"] == "invalid_request_error"
        metrics = httpx.get(f"{proxy.url}/metrics", timeout=60)
        assert metrics.status_code == 404
        assert metrics.json().keys() == {"error"}
        assert "nginx/" not in metrics.headers["server"]


def test_the_log_has_a_line_of_every_request_and_none_of_good_probes() -> None:
    with stand_ins(200, X_Request_Id="abc") as (replica,), nginx([replica.url]) as proxy:
        assert httpx.get(f"{proxy.url}/health/ready", timeout=60).status_code == 200
        post(proxy)
        wait_for(lambda: bool(proxy.log()), "a line", 10)
        (line,) = proxy.log()
    assert line["request"] == "POST /v1/chat/completions"
    assert line["status"] == 200
    assert line["request_id"] == "abc"
    assert line["replicas"] == replica.url.removeprefix("http://")


@pytest.fixture(scope="module")
def replicas() -> Iterator[tuple[Live, Live]]:
    """Two real replicas, a core each."""
    with serving(*SMALL, OMP_NUM_THREADS="1") as one, serving(*SMALL, OMP_NUM_THREADS="1") as two:
        yield one, two


@pytest.fixture(scope="module")
def proxy(replicas: tuple[Live, Live]) -> Iterator[Proxy]:
    with nginx([live.url for live in replicas]) as running:
        yield running


def running_on(live: Live) -> int:
    return len(live.kv()["requests"])


async def read_stream(url: str, **fields: Any) -> tuple[bool, int]:
    """Whether the stream came to its end, and how many events it had."""
    events, is_whole = 0, False
    try:
        async with (
            httpx.AsyncClient(timeout=300) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body(stream=True, **fields)) as answer,
        ):
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                events += line.startswith("data: {")
                is_whole = is_whole or line == "data: [DONE]"
    except httpx.RemoteProtocolError:
        return False, events
    return is_whole, events


def test_events_pass_as_they_are_made(proxy: Proxy, replicas: tuple[Live, Live]) -> None:
    arrivals, text = [], ""
    with httpx.stream(
        "POST",
        f"{proxy.url}/v1/chat/completions",
        json=body(stream=True, max_tokens=60, ignore_eos=True),
        headers={"Accept-Encoding": "gzip", "X-Request-Id": "mine-7"},
        timeout=300,
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"] == "mine-7"
        assert "content-encoding" not in answer.headers
        for line in answer.iter_lines():
            if line.startswith("data: "):
                arrivals.append(time.monotonic())
                text += line
    assert text.endswith("data: [DONE]")
    first, last = arrivals[0], arrivals[-1]
    early = sum(arrival < first + (last - first) / 2 for arrival in arrivals)
    assert last - first > 0.2
    assert 0.2 < early / len(arrivals) < 0.8
    assert len({round(arrival, 3) for arrival in arrivals}) > 20


def test_an_answer_is_the_same_through_the_proxy(proxy: Proxy, replicas: tuple[Live, Live]) -> None:
    answers = [
        httpx.post(f"{url}/v1/chat/completions", json=body(max_tokens=20), timeout=300).json()
        for url in (proxy.url, replicas[0].url, replicas[1].url)
    ]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_the_cache_of_an_answer_can_be_read_through_the_proxy(proxy: Proxy, replicas: tuple[Live, Live]) -> None:
    made = post(proxy, max_tokens=5).json()["id"]
    read = [httpx.get(f"{proxy.url}/v1/kv/{made}", timeout=60) for _ in range(6)]
    assert [answer.status_code for answer in read] == [200] * 6
    assert {answer.json()["id"] for answer in read} == {made}
    assert sorted(httpx.get(f"{live.url}/v1/kv/{made}", timeout=60).status_code for live in replicas) == [200, 404]


async def test_streams_at_once_are_spread_over_real_replicas(proxy: Proxy, replicas: tuple[Live, Live]) -> None:
    streams = [asyncio.create_task(read_stream(proxy.url, max_tokens=60, ignore_eos=True)) for _ in range(4)]
    await asyncio.to_thread(
        wait_for, lambda: [running_on(live) for live in replicas] == [2, 2], "two requests on each replica"
    )
    assert all(is_whole for is_whole, _ in await asyncio.gather(*streams))


async def test_full_queues_turn_the_surplus_away_and_fail_nobody(proxy: Proxy, replicas: tuple[Live, Live]) -> None:
    async with httpx.AsyncClient(timeout=300) as client:
        answers = await asyncio.gather(
            *(
                client.post(f"{proxy.url}/v1/chat/completions", json=body(max_tokens=40, ignore_eos=True))
                for _ in range(20)
            )
        )
    refused = [answer for answer in answers if answer.status_code == 503]
    served = [answer for answer in answers if answer.status_code == 200]
    assert refused
    assert len(served) >= 4  # two places in each queue, if none has left it yet
    assert len(served) + len(refused) == 20
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert all(answer.json()["error"]["message"].startswith("the queue is full") for answer in refused)


async def test_a_client_that_goes_away_frees_its_pages_behind_the_proxy(
    proxy: Proxy, replicas: tuple[Live, Live]
) -> None:
    leaving = asyncio.create_task(read_stream(proxy.url, max_tokens=4000, ignore_eos=True))
    await asyncio.to_thread(wait_for, lambda: any(running_on(live) for live in replicas), "a running request")
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await asyncio.to_thread(wait_for, lambda: not any(running_on(live) for live in replicas), "the abort", 30)


def test_a_body_that_nginx_keeps_on_disk_arrives_whole(proxy: Proxy, replicas: tuple[Live, Live]) -> None:
    answer = post(proxy, messages=[{"role": "user", "content": "word " * 300_000}])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_a_replica_that_drains_and_one_that_is_killed_cost_only_their_own(replicas: tuple[Live, Live]) -> None:
    staying = replicas[0]
    with serving(*SMALL, OMP_NUM_THREADS="1") as leaving, nginx([leaving.url, staying.url]) as proxy:
        last = asyncio.create_task(read_stream(leaving.url, max_tokens=120, ignore_eos=True))
        await asyncio.to_thread(wait_for, lambda: running_on(leaving) == 1, "a running request")
        leaving.process.terminate()
        await asyncio.sleep(0.3)
        # While it drains, and after, others take what comes.
        for _ in range(3):
            assert (await read_stream(proxy.url, max_tokens=5))[0]
        assert (await last)[0]
        assert await asyncio.to_thread(leaving.process.wait, 60) == 0
    with serving(*SMALL, OMP_NUM_THREADS="1") as dying, nginx([dying.url, staying.url]) as proxy:
        streams = [asyncio.create_task(read_stream(proxy.url, max_tokens=150, ignore_eos=True)) for _ in range(4)]
        await asyncio.to_thread(
            wait_for, lambda: running_on(dying) == 2 and running_on(staying) == 2, "two requests on each replica"
        )
        dying.process.kill()
        ends = [is_whole for is_whole, _ in await asyncio.gather(*streams)]
        assert sorted(ends) == [False, False, True, True]
        for _ in range(4):
            assert (await read_stream(proxy.url, max_tokens=5))[0]

"""A fleet of engines of the small model on this machine: `serve run`, and a real process killed under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from service.engine.interface import TooManyPositions

pytest.importorskip("ray", reason="needs the extra 'ray'")

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "ray" / "serve.yaml"
START_SECONDS = 240
STOP_SECONDS = 60
# Whoever looks at a fleet takes the time that it gets ready in.
LOOK_SECONDS = 0.25
STREAMS = 6
# Fewer engines than this many streams would like, so that the fleet grows; and fewer places than a rush would like.
TARGET_STREAMS = 2
QUEUE_REQUESTS = 8
RUSH = 24
MARK = "FLEET_UNDER_TEST"
QUESTION = [{"role": "user", "content": "Tell me a long story about a river."}]


@dataclass
class Fleet:
    """A running `serve run`."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def values(self, name: str, **labels: str) -> dict[str, float]:
        """Values of a metric by replica, added up over other labels."""
        found: dict[str, float] = {}
        for sample in self._samples(name):
            if labels.items() <= sample.labels.items():
                replica = sample.labels["replica"]
                found[replica] = found.get(replica, 0.0) + sample.value
        return found

    def pids(self) -> dict[str, int]:
        """Processes of the engines that answer."""
        return {sample.labels["replica"]: int(sample.labels["pid"]) for sample in self._samples("trimkv_replica_info")}

    def running(self) -> dict[str, float]:
        """Requests that are being computed, by the engines that have any."""
        return {name: count for name, count in self.values("trimkv_num_requests_running").items() if count}

    def processes(self) -> list[str]:
        """Every process that `serve run` has brought about and that is still there."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.url}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        return [command for command in found if command]  # a process that has ended has none

    def stop(self) -> int:
        """What Ctrl-C does: running answers may end."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=STOP_SECONDS)

    def _samples(self, name: str) -> list[Any]:
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        families = text_string_to_metric_families(text)
        return [sample for family in families for sample in family.samples if sample.name == name]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The shipped configuration, which begins with one engine and may have two, on a free port of the loopback."""
    config: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())
    url = f"http://127.0.0.1:{(port := free_port())}"
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] |= {
        "kv_memory": "64MiB",
        "target_ongoing_requests": TARGET_STREAMS,
        "upscale_delay_s": 0,
        "max_queue_requests": QUEUE_REQUESTS,
        "keepalive_seconds": 0,
    }
    path = tmp_path_factory.mktemp("ray") / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    # Logical cores: the door and two engines are placed wherever there are fewer.
    start = "import ray, signal, sys; ray.init(num_cpus=4, include_dashboard=False, namespace='serve'); "
    # Whoever starts the tests in the background may have had SIGINT ignored, and children inherit that.
    start += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    run = f"from ray.serve.scripts import cli; sys.argv = ['serve', 'run', {str(path)!r}]; cli()"
    environment = {
        MARK: url,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # How often demand is reported to whoever scales.
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", start + run],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
    )
    started = Fleet(url, process)
    assert process.stdout is not None
    threading.Thread(target=lambda: started.lines.extend(process.stdout or ()), daemon=True).start()
    try:
        wait_for(lambda: has_engines(started, 1), "a fleet of one engine", START_SECONDS)
        yield started
    except AssertionError as error:
        raise AssertionError(f"{error}\n{''.join(started.lines[-80:])}") from error
    finally:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def has_engines(fleet: Fleet, count: int) -> bool:
    if fleet.process.poll() is not None:
        raise AssertionError("serve run ended")
    try:
        is_ready = httpx.get(f"{fleet.url}/health/ready", timeout=60).status_code == 200
        return is_ready and len(fleet.pids()) == count
    except (httpx.HTTPError, KeyError):
        return False


@dataclass
class Story:
    """What one client of a stream has seen."""

    texts: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    is_done: bool = False


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "embedded", "messages": QUESTION, "max_tokens": 8, "kv_budget": 64} | fields


async def read_story(client: httpx.AsyncClient, story: Story, *, max_tokens: int) -> None:
    """Stream one answer of `max_tokens` tokens, as bytes on the wire: an error event is data as well."""
    asked = body(stream=True, max_tokens=max_tokens, ignore_eos=True)
    async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                story.is_done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    story.error = event["error"]
                else:
                    story.texts += [choice["delta"].get("content") or "" for choice in event["choices"]]


@asynccontextmanager
async def reading(fleet: Fleet, *, max_tokens: int) -> AsyncIterator[tuple[list[Story], list[asyncio.Task[None]]]]:
    """Clients that have their first tokens; those that still read at the end leave."""
    stories = [Story() for _ in range(STREAMS)]
    async with httpx.AsyncClient(base_url=fleet.url, timeout=300) as client:
        tasks = [asyncio.create_task(read_story(client, story, max_tokens=max_tokens)) for story in stories]
        try:
            await until(lambda: all(story.texts for story in stories), "a first token of each")
            yield stories, tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def wait_for(is_true: Callable[[], bool], what: str, seconds: float) -> None:
    """Look now and then until it is true."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds:.0f} s"
        time.sleep(LOOK_SECONDS)


async def until(is_true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """As `wait_for`, while other coroutines go on."""
    await asyncio.to_thread(wait_for, is_true, what, seconds)


def test_what_serve_run_is_given_becomes_an_application() -> None:
    from ray import serve

    from deploy.ray.app import app
    from service.settings import SettingsError

    assert isinstance(app({"max_replicas": "2", "kv_memory": "64MiB"}), serve.Application)
    with pytest.raises(SettingsError, match="kv_memry is unknown"):
        app({"kv_memry": "64MiB"})


def test_the_shipped_configuration_is_one_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    from deploy.ray.app import app

    config = ServeDeploySchema.model_validate(yaml.safe_load(SHIPPED.read_text()))
    (application,) = config.applications
    assert application.import_path == f"{app.__module__}:{app.__name__}"
    app(application.args)


@pytest.mark.parametrize("kind", [TooManyPositions, TimeoutError])
async def test_what_an_engine_raises_arrives_in_its_own_words(kind: type[Exception]) -> None:
    from ray.exceptions import RayTaskError

    from deploy.ray.app import RayFleet

    cause = kind("9 are more than 8")
    raised = RayTaskError("kv_detail", "Traceback …\n", cause, "ray::engine", 1, "127.0.0.1").as_instanceof_cause()
    assert str(raised) != str(cause)

    async def results(**_: object) -> Sequence[object]:
        return [None, raised]

    handle = SimpleNamespace(broadcast=lambda *_: SimpleNamespace(results_async=results))
    with pytest.raises(kind) as caught:
        await RayFleet(handle).kv_details("r", None)
    assert str(caught.value) == "9 are more than 8"


async def test_the_fleet_grows_under_load_and_a_client_that_leaves_is_taken_out(fleet: Fleet) -> None:
    async with reading(fleet, max_tokens=7000):
        assert len(fleet.pids()) == 1
        await until(lambda: has_engines(fleet, 2), "a second engine", START_SECONDS)
        assert sum(fleet.running().values()) == STREAMS
    await until(lambda: not fleet.running(), "the engines to let go", 30)
    assert sum(fleet.values("trimkv_requests_aborted_total", reason="client_disconnected").values()) == STREAMS


async def test_requests_spread_over_the_engines_and_stream(fleet: Fleet) -> None:
    before = fleet.values("trimkv_request_success_total")
    async with reading(fleet, max_tokens=24) as (stories, tasks):
        await asyncio.gather(*tasks)
    assert all(story.is_done and story.error is None for story in stories)
    assert all(len(story.texts) > 12 for story in stories)  # in pieces, not as one

    def ended() -> dict[str, float]:
        now = fleet.values("trimkv_request_success_total")
        return {name: count - before.get(name, 0) for name, count in now.items()}

    await until(lambda: sum(ended().values()) == STREAMS, "the count of finished requests")
    assert len([count for count in ended().values() if count >= STREAMS // 3]) == 2, ended()


async def test_refusals_are_those_of_the_service(fleet: Fleet) -> None:
    async with httpx.AsyncClient(base_url=fleet.url, timeout=300) as client:
        for fields, status, code in (
            ({"kv_budget": -1}, 400, "invalid_value"),
            ({"model": "other"}, 404, "model_not_found"),
        ):
            answer = await client.post("/v1/chat/completions", json=body(**fields), headers={"X-Request-Id": "mine"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert answer.headers.get_list("x-request-id") == ["mine"]
        unknown = await client.get("/v1/nothing")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
        rush = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=body(max_tokens=1)) for _ in range(RUSH))
        )
    refused = [answer for answer in rush if answer.status_code != 200]
    assert 0 < len(refused) <= RUSH - QUEUE_REQUESTS
    assert {answer.status_code for answer in refused} == {503}
    assert {answer.json()["error"]["code"] for answer in refused} == {"queue_requests"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


async def test_a_killed_engine_fails_its_own_streams_only_and_is_replaced(fleet: Fleet) -> None:
    async with reading(fleet, max_tokens=300) as (stories, tasks):
        await until(lambda: sum(fleet.running().values()) == STREAMS, "all to run")
        running, pids = fleet.running(), fleet.pids()
        assert len(running) == 2, running
        victim = max(running, key=lambda name: running[name])
        os.kill(pids[victim], signal.SIGKILL)
        await until(lambda: sum(story.error is not None for story in stories) == running[victim], "the error events")

        # Nobody waits for the replacement: the one that is left answers whoever asks again.
        retrying = fleet.client.with_options(max_retries=5)
        again = await asyncio.gather(
            *(
                retrying.chat.completions.create(model="embedded", messages=QUESTION, max_tokens=8)  # type: ignore[arg-type]
                for _ in range(int(running[victim]))
            )
        )
        assert all(answer.choices[0].message.content for answer in again)
        await asyncio.gather(*tasks)

    lost = [story for story in stories if story.error is not None]
    assert len(lost) == running[victim]
    assert all(story.is_done and story.error["code"] == "engine_error" for story in lost if story.error)
    kept = [story for story in stories if story.error is None]
    assert len(kept) == STREAMS - running[victim] > 0
    assert all(story.is_done for story in kept)

    await until(lambda: has_engines(fleet, 2), "a replacement", START_SECONDS)
    now = fleet.pids()
    assert victim not in now
    assert len(set(now.values()) - set(pids.values())) == 1


def test_stopping_leaves_no_process(fleet: Fleet) -> None:
    assert len(fleet.processes()) > 5  # Ray's own, the proxy, the door and the engines
    assert fleet.stop() == 0
    wait_for(lambda: not fleet.processes(), "the end of every process", STOP_SECONDS)

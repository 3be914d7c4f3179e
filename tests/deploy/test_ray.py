"""A fleet of two engines of the small model on this machine: `serve run`, and a real process killed under load."""

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.service.live import wait_for

pytest.importorskip("ray", reason="needs the extra 'ray'")

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "ray" / "serve.yaml"
START_SECONDS = 300
STREAMS = 6
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
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    replica = sample.labels["replica"]
                    found[replica] = found.get(replica, 0.0) + sample.value
        return found

    def pids(self) -> dict[str, int]:
        """Processes of the engines that answer."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return {
            sample.labels["replica"]: int(sample.labels["pid"])
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "trimkv_replica_info"
        }

    def running(self) -> dict[str, float]:
        return {name: count for name, count in self.values("trimkv_num_requests_running").items() if count}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The shipped configuration with two engines, small ones, on a free port of the loopback."""
    config: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())
    port = free_port()
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] |= {
        "min_replicas": 2,
        "max_replicas": 2,
        "num_cpus": 1,
        "kv_memory": "64MiB",
        "max_num_seqs": 8,
        "keepalive_seconds": 0,
    }
    path = tmp_path_factory.mktemp("ray") / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    # Logical cores: the door and two engines are placed wherever there are fewer.
    start = "import ray, sys; ray.init(num_cpus=4, include_dashboard=False, namespace='serve'); "
    run = f"from ray.serve.scripts import cli; sys.argv = ['serve', 'run', {str(path)!r}]; cli()"
    process = subprocess.Popen(
        [sys.executable, "-c", start + run],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"},
    )
    started = Fleet(f"http://127.0.0.1:{port}", process)
    assert process.stdout is not None
    threading.Thread(target=lambda: started.lines.extend(process.stdout or ()), daemon=True).start()
    try:
        wait_for(lambda: has_two_engines(started), "a fleet of two engines", START_SECONDS)
        yield started
    except AssertionError as error:
        raise AssertionError(f"{error}\n{''.join(started.lines[-80:])}") from error
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=90)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def has_two_engines(fleet: Fleet) -> bool:
    if fleet.process.poll() is not None:
        raise AssertionError("serve run ended")
    try:
        is_ready = httpx.get(f"{fleet.url}/health/ready", timeout=60).status_code == 200
        return is_ready and len(fleet.pids()) == 2
    except (httpx.HTTPError, KeyError):
        return False


@dataclass
class Story:
    """What one client of a stream has seen."""

    texts: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    is_done: bool = False


async def read_story(client: httpx.AsyncClient, story: Story, *, max_tokens: int) -> None:
    """Stream one answer of `max_tokens` tokens, as bytes on the wire: an error event is data as well."""
    body = {
        "model": "embedded",
        "messages": QUESTION,
        "stream": True,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "kv_budget": 64,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
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


async def until(is_true: Any, what: str, seconds: float = 60) -> None:
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


async def test_requests_spread_over_the_engines_and_stream(fleet: Fleet) -> None:
    before = fleet.values("trimkv_request_success_total")
    stories = [Story() for _ in range(STREAMS)]
    async with httpx.AsyncClient(base_url=fleet.url, timeout=300) as client:
        await asyncio.gather(*(read_story(client, story, max_tokens=24) for story in stories))
    assert all(story.is_done and story.error is None for story in stories)
    assert all(len(story.texts) > 12 for story in stories)  # in pieces, not as one
    await until(lambda: sum_of(fleet) - sum(before.values()) == STREAMS, "the count of finished requests")
    ended = {name: count - before.get(name, 0) for name, count in fleet.values("trimkv_request_success_total").items()}
    assert len([count for count in ended.values() if count]) == 2, ended


def sum_of(fleet: Fleet) -> float:
    return sum(fleet.values("trimkv_request_success_total").values())


async def test_a_client_that_leaves_is_taken_out_of_its_engine(fleet: Fleet) -> None:
    async with httpx.AsyncClient(base_url=fleet.url, timeout=300) as client:
        story = Story()
        reading = asyncio.create_task(read_story(client, story, max_tokens=2000))
        await until(lambda: bool(story.texts), "a first token")
        reading.cancel()
        await asyncio.wait([reading])
    await until(lambda: not fleet.running(), "the engine to let go", 30)
    assert sum(fleet.values("trimkv_requests_aborted_total", reason="client_disconnected").values()) >= 1


async def test_a_killed_engine_fails_its_own_streams_only_and_is_replaced(fleet: Fleet) -> None:
    stories = [Story() for _ in range(STREAMS)]
    async with httpx.AsyncClient(base_url=fleet.url, timeout=300) as client:
        reading = [asyncio.create_task(read_story(client, story, max_tokens=400)) for story in stories]
        await until(lambda: all(story.texts for story in stories), "a first token of each")
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
        await asyncio.gather(*reading)

    lost = [story for story in stories if story.error is not None]
    assert len(lost) == running[victim]
    assert all(story.is_done and story.error["code"] == "engine_error" for story in lost if story.error)
    kept = [story for story in stories if story.error is None]
    assert len(kept) == STREAMS - running[victim] > 0
    assert all(story.is_done for story in kept)

    await until(lambda: has_two_engines(fleet), "a replacement", START_SECONDS)
    now = fleet.pids()
    assert victim not in now
    assert len(set(now.values()) - set(pids.values())) == 1

"""The real Prometheus with the shipped rules on the real service under load: nothing that is asked stays empty."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.dashboards import GRAFANA, NAMES, queries
from tests.deploy.prometheus import Prometheus, has_values, scraping
from tests.service.contract import COUNTERS, GAUGES, HISTOGRAMS
from tests.service.live import Live, serving, wait_for

# Four scrapes, as Grafana has it.
RATE_INTERVAL = "12s"
LOAD_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Watched:
    """A Prometheus that has watched two servers from `start` to `end`, both in Unix seconds."""

    prometheus: Prometheus
    replicas: tuple[Live, Live]
    start: float
    end: float


async def load(replicas: tuple[Live, Live], seconds: float) -> None:
    """Chats of all kinds for a while: short and long prompts, budgets, dense, refused and broken-off ones."""
    until = time.monotonic() + seconds

    async def one(client: httpx.AsyncClient, url: str, **fields: Any) -> int:
        body = {"model": "embedded", "temperature": 0, "ignore_eos": True} | fields
        return (await client.post(f"{url}/v1/chat/completions", json=body)).status_code

    async def insist(client: httpx.AsyncClient, url: str, **fields: Any) -> None:
        """Ask again while the queue is full."""
        while await one(client, url, **fields) == 503 and time.monotonic() < until:  # noqa: ASYNC110 -- it tells nobody
            await asyncio.sleep(0.3)

    async def chat(client: httpx.AsyncClient, url: str, number: int) -> None:
        words = "The ferry crosses the river at noon. " * (1 + 12 * (number % 3))
        messages = [{"role": "user", "content": words + "When does the ferry cross?"}]
        while time.monotonic() < until:
            await insist(client, url, messages=messages, max_tokens=24, kv_budget=(0, 16, 64)[number % 3])

    async def leave(client: httpx.AsyncClient, url: str) -> None:
        """Break a long answer off in its middle, once the queue has room for it."""
        messages = [{"role": "user", "content": "Tell me about rivers."}]
        while time.monotonic() < until:
            leaving = asyncio.create_task(one(client, url, messages=messages, max_tokens=2000, kv_budget=16))
            ended, _ = await asyncio.wait([leaving], timeout=seconds / 4)
            if not ended:
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
                return
            await asyncio.sleep(0.3)

    async with httpx.AsyncClient(timeout=300) as client:
        work = [chat(client, live.url, number) for live in replicas for number in range(6)]
        work += [leave(client, live.url) for live in replicas]
        too_much = [{"role": "user", "content": "word " * 7000}]
        await asyncio.gather(*work, insist(client, replicas[0].url, messages=too_much, max_tokens=10, kv_budget=0))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    small = ("--kv-memory", "250MiB", "--dtype", "float32", "--max-num-seqs", "3", "--max-queue-requests", "3")
    with (
        serving(*small, OMP_NUM_THREADS="1") as one,
        serving(*small, OMP_NUM_THREADS="1") as two,
        scraping([one.url, two.url], tmp_path_factory.mktemp("prometheus")) as prometheus,
    ):
        wait_for(lambda: len(prometheus.now('up{job="trimkv"} == 1')) == 2, "both targets up", 30)
        start = time.time()
        asyncio.run(load((one, two), LOAD_SECONDS))
        prometheus.catch_up()
        yield Watched(prometheus, (one, two), start, time.time())


def test_every_metric_of_the_contract_was_scraped(watched: Watched) -> None:
    names = set(watched.prometheus.get("label/__name__/values"))
    assert {f"trimkv_{name}" for name in (*GAUGES, *COUNTERS)} <= names
    assert {f"trimkv_{name}_bucket" for name in HISTOGRAMS} <= names


def test_the_load_was_one(watched: Watched) -> None:
    """What the tests below rest on: each kind of thing happened on some replica."""
    for expression in (
        'trimkv_request_success_total{finished_reason="length"}',
        'trimkv_requests_aborted_total{reason="client_disconnected"}',
        'trimkv_admission_rejections_total{reason="queue_requests"}',
        'trimkv_admission_rejections_total{reason="never_fits"}',
        'trimkv_kv_evictions_total{strategy="fixed_budget"}',
        "trimkv_num_requests_waiting",
        "trimkv_kv_budget_entries",
    ):
        found = watched.prometheus.range(f"sum({expression})", start=watched.start, end=watched.end)
        assert max(float(value) for _, value in found[0]["values"]) > 0, expression


def test_every_rule_evaluates(watched: Watched) -> None:
    rules = watched.prometheus.rules()
    assert len(rules) > 20
    for rule in rules:
        assert rule["health"] == "ok", rule
        assert not rule.get("lastError"), rule


def test_every_recorded_series_has_values(watched: Watched) -> None:
    for rule in watched.prometheus.rules():
        if rule["type"] == "recording":
            found = watched.prometheus.range(rule["name"], start=watched.start, end=watched.end)
            assert has_values(found), rule["name"]


def test_a_load_that_the_service_bears_fires_nothing(watched: Watched) -> None:
    firing = watched.prometheus.range(
        'ALERTS{alertstate="firing", alertname=~"TrimKV.*"}', start=watched.start, end=watched.end
    )
    assert not firing


def test_every_panels_query_has_an_answer(watched: Watched) -> None:
    empty = []
    for query in queries(rate_interval=RATE_INTERVAL):
        if not has_values(watched.prometheus.answer(query, start=watched.start, end=watched.end)):
            empty.append(str(query))
    assert not empty, "\n".join(empty)


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_is_drawn_where_there_is_no_grafana(watched: Watched, name: str, tmp_path: Path) -> None:
    """TRIMKV_PICTURES names a folder to keep them in."""
    picture = Path(os.environ.get("TRIMKV_PICTURES", tmp_path)) / f"{name}.png"
    end = watched.start + LOAD_SECONDS
    span = ("--start", str(watched.start), "--end", str(end), "--rate-interval", RATE_INTERVAL)
    what = ("--prometheus", watched.prometheus.url, "--dashboard", name, "--output", picture)
    subprocess.run([sys.executable, GRAFANA / "draw.py", *what, *span], check=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 30_000


def test_figures_are_the_services_own(watched: Watched) -> None:
    """Prometheus' sums are what the replicas say: the labels of the rules do not mix them up."""
    for live in watched.replicas:
        instance = live.url.removeprefix("http://")
        (series,) = watched.prometheus.now(f'sum(trimkv_generation_tokens_total{{instance="{instance}"}})')
        said = [line for line in live.metrics().splitlines() if line.startswith("trimkv_generation_tokens_total ")]
        assert float(series["value"][1]) == float(said[0].split()[1])


def test_a_replica_that_ends_is_missed(watched: Watched) -> None:
    gone = watched.replicas[1]
    gone.process.kill()
    gone.process.wait()
    instance = gone.url.removeprefix("http://")

    def is_pending() -> bool:
        alerts = watched.prometheus.get("alerts")["alerts"]
        names = {(alert["labels"]["alertname"], alert["labels"].get("instance")) for alert in alerts}
        return ("TrimKVInstanceDown", instance) in names

    wait_for(is_pending, "the alert", 30)

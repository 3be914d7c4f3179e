from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.engine.interface import (
    AbortReason,
    EngineState,
    EngineStats,
    FinishReason,
    RejectionReason,
)
from service.metrics import INTER_TOKEN_BUCKETS, TIME_TO_FIRST_TOKEN_BUCKETS, Metrics
from tests.service.contract import COUNTERS, GAUGES, HISTOGRAMS
from tests.service.scripted import ENDED, RUNNING, ScriptedEngine

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def samples(metrics: Metrics, engine: ScriptedEngine | None = None) -> Samples:
    body, content_type = await metrics.render(engine or ScriptedEngine(), accept="")
    assert content_type.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def of(found: Samples, name: str, **labels: str) -> float:
    return found["trimkv_" + name, tuple(sorted(labels.items()))]


async def test_every_metric_of_the_contract_exists_before_the_first_request() -> None:
    names = {name for name, _ in await samples(Metrics())}
    assert {f"trimkv_{name}" for name in (*GAUGES, *COUNTERS)} <= names
    assert {f"trimkv_{name}_bucket" for name in HISTOGRAMS} <= names


async def test_series_with_known_labels_start_at_zero() -> None:
    found = await samples(Metrics())
    for reason in FinishReason:
        assert of(found, "request_success_total", finished_reason=reason) == 0
    for rejection in RejectionReason:
        assert of(found, "admission_rejections_total", reason=rejection) == 0
    for abort in AbortReason:
        assert of(found, "requests_aborted_total", reason=abort) == 0
    for strategy in ("fixed_budget", "threshold"):
        assert of(found, "kv_evictions_total", strategy=strategy) == 0
    for phase in ("prefill", "decode", "mixed"):
        assert of(found, "step_duration_seconds_count", phase=phase) == 0


@pytest.mark.parametrize("state", [EngineState.LOADING, EngineState.FAILED])
async def test_without_a_model_a_scrape_still_works(state: EngineState) -> None:
    engine = ScriptedEngine()
    engine.state = state
    assert of(await samples(Metrics(), engine), "num_requests_running") == 0


async def test_buckets_are_the_contracts() -> None:
    found = await samples(Metrics())
    for name, buckets in (
        ("time_to_first_token_seconds", TIME_TO_FIRST_TOKEN_BUCKETS),
        ("inter_token_latency_seconds", INTER_TOKEN_BUCKETS),
    ):
        exposed = {labels[0][1] for metric, labels in found if metric == f"trimkv_{name}_bucket"}
        assert {float(bound) for bound in exposed} == {*map(float, buckets), float("inf")}
    first = ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160"
    between = ".001 .002 .005 .01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 10"
    assert list(TIME_TO_FIRST_TOKEN_BUCKETS) == [float(bound) for bound in first.split()]
    assert list(INTER_TOKEN_BUCKETS) == [float(bound) for bound in between.split()]


async def test_what_the_engine_reports_is_counted() -> None:
    metrics = Metrics()
    metrics.on_prompt(tokens=5)
    metrics.on_first_token(seconds_since_arrival=0.2)
    metrics.on_tokens(inter_token_seconds=[0.1, 0.3])
    metrics.on_step(duration_seconds=0.1, prefill_tokens=5, prefill_sequences=1, decode_sequences=0)
    metrics.on_step(duration_seconds=0.1, prefill_tokens=5, prefill_sequences=1, decode_sequences=3)
    metrics.on_eviction(strategy="fixed_budget", sequences=2, entries=30, duration_seconds=0.01)
    metrics.on_rejected(RejectionReason.NEVER_FITS)
    metrics.on_restart()
    metrics.on_finished(ENDED)
    metrics.on_finished(
        replace(ENDED, finish_reason=FinishReason.ABORT, abort_reason=AbortReason.CLIENT, kv=None, decode_time=None)
    )
    found = await samples(metrics)
    assert of(found, "prompt_tokens_total") == 5
    assert of(found, "generation_tokens_total") == 3
    assert of(found, "time_to_first_token_seconds_count") == 1
    assert of(found, "inter_token_latency_seconds_sum") == pytest.approx(0.4)
    assert of(found, "step_batch_size_sum", phase="mixed") == 4
    assert of(found, "step_batch_size_sum", phase="prefill") == 1
    assert of(found, "kv_evictions_total", strategy="fixed_budget") == 2
    assert of(found, "kv_evicted_entries_total") == 30
    assert of(found, "admission_rejections_total", reason="never_fits") == 1
    assert of(found, "engine_restarts_total") == 1
    assert of(found, "request_success_total", finished_reason="stop") == 1
    assert of(found, "requests_aborted_total", reason="client_disconnected") == 1
    assert of(found, "request_kv_retained_ratio_sum") == 0.5
    assert of(found, "request_decode_time_seconds_count") == 1
    assert of(found, "request_kv_budget_count") == 2


async def test_gauges_are_the_engines_figures() -> None:
    engine = ScriptedEngine()
    engine.last_step_age_seconds = 1.5
    running = replace(RUNNING, request_id="chatcmpl-secret")
    engine.running = (running, running)
    metrics = Metrics()
    found = await samples(metrics, engine)
    assert of(found, "num_requests_running") == 2
    assert of(found, "num_requests_waiting") == 2
    assert of(found, "num_requests_waiting_by_reason", reason="capacity") == 2
    assert of(found, "num_requests_waiting_by_reason", reason="slots") == 0
    assert of(found, "kv_pages", state="used") + of(found, "kv_pages", state="free") == 100
    assert of(found, "kv_cache_usage_perc") == 0.25
    assert of(found, "kv_entries", kind="logical") == 84
    assert of(found, "kv_entries", kind="physical") == 80
    assert of(found, "kv_entries", kind="allocated") == 25 * 16
    assert [of(found, "kv_layer_entries", layer=layer) for layer in "01"] == [36, 44]
    assert of(found, "kv_budget_entries") == 2 * 64 * 6
    assert of(found, "engine_last_step_age_seconds") == 1.5
    body, _ = await metrics.render(engine, accept="application/openmetrics-text")
    assert b"secret" not in body
    assert body.endswith(b"# EOF\n")


async def test_an_engine_that_gives_no_figures_does_not_stop_a_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    class StuckEngine(ScriptedEngine):
        is_stuck = False

        async def stats(self) -> EngineStats:
            if self.is_stuck:
                await asyncio.sleep(60)
            return await super().stats()

    monkeypatch.setattr("service.metrics.STATS_TIMEOUT_SECONDS", 0.05)
    engine, metrics = StuckEngine(), Metrics()
    await samples(metrics, engine)
    engine.is_stuck = True
    assert of(await samples(metrics, engine), "kv_pages", state="used") == 25

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from service.engine.interface import FinishReason, RejectionReason
from service.fleet.engine import FleetEngine
from service.fleet.metrics import FleetMetrics
from tests.fleet.pretend import PretendFleet, ToldEngine


async def rendered() -> tuple[str, list[str]]:
    fleet = PretendFleet([ToldEngine(), ToldEngine()])
    await fleet.start()
    metrics = FleetMetrics("door-1")
    engine = FleetEngine(fleet, metrics, max_queue_requests=1, max_queue_tokens=100, prefill_chunk=512)
    metrics.on_rejected(RejectionReason.QUEUE_REQUESTS)
    fleet.replicas[0]._metrics.on_first_token(seconds_since_arrival=0.3)
    body, content_type = await metrics.render(engine, accept="")
    assert content_type.startswith("text/plain")
    text = body.decode()
    return text, [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]


async def test_every_sample_says_whose_it_is_and_every_name_is_described_once() -> None:
    text, names = await rendered()
    assert len(names) == len(set(names))
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert {sample.labels["replica"] for sample in samples} == {"e0", "e1", "door-1"}


async def test_a_sum_over_replicas_counts_nothing_twice() -> None:
    text, _ = await rendered()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def values(name: str, **labels: str) -> dict[str, float]:
        return {
            sample.labels["replica"]: sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }

    assert values("trimkv_num_requests_waiting") == {"e0": 2, "e1": 2}
    assert values("trimkv_generation_tokens_total") == {"e0": 1, "e1": 0}
    assert values("trimkv_time_to_first_token_seconds_bucket", le="0.5") == {"e0": 1, "e1": 0}
    refused = values("trimkv_admission_rejections_total", reason=RejectionReason.QUEUE_REQUESTS)
    assert refused == {"e0": 0, "e1": 0, "door-1": 1}
    assert set(values("trimkv_request_success_total", finished_reason=FinishReason.STOP)) == {"e0", "e1"}
    assert values("trimkv_fleet_requests_unanswered") == {"door-1": 0}
    assert 0 < values("trimkv_fleet_figures_age_seconds")["door-1"] < 10


async def test_engines_are_listed_with_where_they_run() -> None:
    text, _ = await rendered()
    info = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    listed = {sample.labels["replica"]: sample for sample in info if sample.name == "trimkv_replica_info"}
    assert set(listed) == {"e0", "e1"}
    assert all(sample.labels["pid"].isdecimal() and sample.labels["host"] for sample in listed.values())

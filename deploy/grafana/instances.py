"""Instances: replica beside replica."""

from __future__ import annotations

from expressions import of, rate
from panels import Json, dashboard, row, table, timeseries

# How Grafana tells apart the columns of several queries that have one name.
REPEATED = ("", *(f" {number}" for number in range(1, 9)))


def instances() -> Json:
    """The dashboard."""

    def each(title: str, expression: str, text: str, *, unit: str = "short", largest: float | None = None) -> Json:
        return timeseries(title, [(expression, "{{instance}}")], text, unit=unit, largest=largest)

    return dashboard(
        "trimkv-instances",
        "TrimKV · Instances",
        "Replica beside replica: which one is different.",
        [
            row("Now"),
            table(
                "Replicas",
                {
                    "Up": (of("up"), "bool_yes_no"),
                    "Model": (of("trimkv_model_info"), "short"),
                    "Running": (of("trimkv_num_requests_running"), "short"),
                    "Waiting": (of("trimkv_num_requests_waiting"), "short"),
                    "Pages used": (of("trimkv_kv_cache_usage_perc"), "percentunit"),
                    "Pages promised": (of("instance:trimkv_kv_pages_reserved:ratio"), "percentunit"),
                    "Step age": (of("trimkv_engine_last_step_age_seconds"), "s"),
                    "Pools rebuilt": (of("trimkv_engine_restarts_total"), "short"),
                },
                "What each replica serves, on what, and how it is.",
                key="instance",
                hidden=[
                    "Value #B",
                    *(f"{name}{number}" for name in ("Time", "job", "__name__") for number in REPEATED),
                ],
            ),
            row("Traffic"),
            each("Requests ended", of("instance:trimkv_requests:rate5m"), "Over five minutes.", unit="reqps"),
            each("Tokens generated", of("instance:trimkv_generation_tokens:rate5m"), "Each second, over five minutes."),
            each("Prompt tokens", of("instance:trimkv_prompt_tokens:rate5m"), "Each second, over five minutes."),
            each("Running", of("trimkv_num_requests_running"), "Requests being computed."),
            each("Waiting", of("trimkv_num_requests_waiting"), "Requests in the queue."),
            each(
                "Turned away",
                f"sum by (instance) ({rate('trimkv_admission_rejections_total')})",
                "For any reason, each second.",
                unit="reqps",
            ),
            row("Latency"),
            each(
                "Time to first token, p50",
                of("instance:trimkv_time_to_first_token_seconds:p50_5m"),
                "Over five minutes.",
                unit="s",
            ),
            each(
                "Time to first token, p95",
                of("instance:trimkv_time_to_first_token_seconds:p95_5m"),
                "Over five minutes.",
                unit="s",
            ),
            each(
                "Between tokens, p95",
                of("instance:trimkv_inter_token_latency_seconds:p95_5m"),
                "Over five minutes.",
                unit="s",
            ),
            row("Memory and health"),
            each(
                "Pages promised",
                of("instance:trimkv_kv_pages_reserved:ratio"),
                "Of all pages.",
                unit="percentunit",
                largest=1,
            ),
            each("Step age", of("trimkv_engine_last_step_age_seconds"), "Of the running step; 0 while idle.", unit="s"),
            each(
                "Restarts",
                f"resets({of('trimkv_generation_tokens_total')}[1h])"
                f" + on (job, instance) increase({of('trimkv_engine_restarts_total')}[1h])",
                "Processes started anew and pools rebuilt, within the last hour.",
            ),
        ],
    )

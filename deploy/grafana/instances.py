"""Instances: engine beside engine, be they instances of their own or one fleet's."""

from __future__ import annotations

from expressions import ENGINE, by_engine, of, rate
from panels import Json, dashboard, row, table, timeseries

# A fleet's door answers as one instance, and says which engines answer it.
UP = f"({of('up')} unless on (job, instance) {of('trimkv_replica_info')}) or {of('trimkv_replica_info')}"
MODEL = ("model", "gates", "backend", "dtype", "device", "max_model_len", "kv_budget")


def instances() -> Json:
    """The dashboard."""

    def each(title: str, expression: str, text: str, *, unit: str = "short", largest: float | None = None) -> Json:
        return timeseries(title, [(expression, ENGINE)], text, unit=unit, largest=largest)

    return dashboard(
        "trimkv-instances",
        "TrimKV · Instances",
        "Engine beside engine: which one is different.",
        [
            row("Now"),
            table(
                "Engines",
                {
                    "Up": (by_engine(UP), "bool_yes_no"),
                    "Running": (by_engine(of("trimkv_num_requests_running")), "short"),
                    "Waiting": (by_engine(of("trimkv_num_requests_waiting")), "short"),
                    "Pages used": (by_engine(of("trimkv_kv_cache_usage_perc")), "percentunit"),
                    "Pages promised": (by_engine(of("instance:trimkv_kv_pages_reserved:ratio")), "percentunit"),
                    "Step age": (by_engine(of("trimkv_engine_last_step_age_seconds")), "s"),
                    "Pools rebuilt": (by_engine(of("trimkv_engine_restarts_total")), "short"),
                    "What it serves": (by_engine(of("trimkv_model_info"), *MODEL), None),
                },
                "How each is, what it serves, and on what.",
                key="engine",
                name="Engine",
                labels=MODEL,
            ),
            row("Traffic"),
            each("Requests ended", of("instance:trimkv_requests:rate5m"), "Over five minutes.", unit="reqps"),
            each("Tokens generated", of("instance:trimkv_generation_tokens:rate5m"), "Each second, over five minutes."),
            each("Prompt tokens", of("instance:trimkv_prompt_tokens:rate5m"), "Each second, over five minutes."),
            each("Running", of("trimkv_num_requests_running"), "Requests being computed."),
            each("Waiting", of("trimkv_num_requests_waiting"), "Requests in the queue."),
            each(
                "Turned away",
                f"sum by (instance, replica) ({rate('trimkv_admission_rejections_total')})",
                "For any reason, each second. A fleet's door turns away, its engines do not.",
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
            each(
                "Step age",
                f"{of('trimkv_engine_last_step_age_seconds')} or {of('trimkv_fleet_figures_age_seconds')}",
                "Of the running step; 0 while idle. Of a fleet's door: since all engines last told their figures.",
                unit="s",
            ),
            each(
                "Restarts",
                f"sum by (instance, replica) (resets({of('trimkv_generation_tokens_total')}[1h])"
                f" + increase({of('trimkv_engine_restarts_total')}[1h]))",
                "Processes started anew and pools rebuilt, within an hour. A fleet starts engines under new names.",
            ),
        ],
    )
